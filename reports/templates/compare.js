"use strict";
/* The page of several runs: everything is drawn once. */

(async () => {
  const LANES = 4;
  const { runs, metrics, survival } = page.json("report-data");
  const specs = page.json("report-charts");
  // A run has one colour and one dash on all charts, also where another was not read.
  for (const { encoding } of [specs.trade, ...specs["lines.log"].layer, ...specs["lines.linear"].layer]) {
    for (const channel of [encoding.color, encoding.strokeDash]) {
      if (["site", "run"].includes(channel?.field)) channel.scale.domain = runs.map((run) => run.name);
    }
  }
  const charts = new Charts(specs, { named: true });
  page.sortable(page.at("runs-table"));
  if (typeof DecompressionStream === "undefined") return; // a browser of before 2023: the table and the strips stand
  page.at("compared").hidden = false;
  const parts = runs.flatMap((run) => run.stretches);
  const span = {
    first: Math.min(0, ...parts.map((part) => part.first)) - 0.5,
    last: Math.max(1, ...parts.map((part) => part.last)) + 0.5,
  };

  const stretches = runs.flatMap((run) =>
    run.stretches.map((part) => ({ run: run.name, verdict: part.verdict, start: part.first - 0.5, end: part.last + 0.5 })));
  charts.draw("lanes", "lanes", { stretches }, { ...span, height: 30 * runs.length });

  const falling = Object.entries(survival).flatMap(([curve, { edits, share, ended }]) =>
    edits.map((edit, at) => ({ curve, edit, share: share[at], ended: ended[at] > 0 })));
  charts.draw("survival", "survival", { steps: falling, ended: falling.filter((step) => step.ended) }, span);

  const steps = runs.flatMap((run) => {
    const [drift, agreement] = ["drift.ratio", "canary.agreement"].map((name) => run.series[name]);
    if (!drift || !agreement) return [];
    return drift.edit
      .map((edit, at) => ({ run: run.name, edit, drift: drift.value[at], agreement: agreement.value[at] }))
      .filter((row) => typeof row.drift === "number" && row.drift > 0 && typeof row.agreement === "number");
  });
  page.at("trade-figure").hidden = steps.length === 0;
  if (steps.length) charts.draw("trade", "trade", { steps });

  metrics.forEach((metric, slot) => {
    const having = runs.filter((run) => run.series[metric.name]);
    const figure = page.at(`multiple-${slot}`).parentElement;
    figure.hidden = having.length === 0;
    if (figure.hidden) return;
    figure.querySelector("h3").textContent = metric.name;
    figure.querySelector("p").textContent = metric.meaning;
    const kind = metric.scale === "log" ? "log" : "linear";
    let lanes = 0;
    const points = having.flatMap((run) => {
      const { edit, value } = run.series[metric.name];
      const found = page.linePoints(edit, value, kind, run.name);
      const lane = 4 + (lanes % LANES) * 6;
      if (found.some((point) => point.above || point.below)) lanes += 1; // none hides another's
      return found.map((point) => ({ ...point, lane }));
    });
    charts.draw(`multiple-${slot}`, `lines.${kind}`, { points }, span);
  });

  await charts.queue;
  charts.followColours();
  document.documentElement.dataset.ready = "yes";
  performance.mark("stabilitylab-ready");
})();
