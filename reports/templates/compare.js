"use strict";
/* The page of several runs: everything is drawn once. */

(async () => {
  const { runs, metrics } = page.json("report-data");
  const specs = page.json("report-charts");
  // A run has one colour on all charts, also where another was not read.
  for (const { encoding } of [specs.trade, ...specs["lines.log"].layer, ...specs["lines.linear"].layer]) {
    if (["site", "run"].includes(encoding.color?.field)) encoding.color.scale.domain = runs.map((run) => run.name);
  }
  const charts = new Charts(specs);
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
    const points = having.flatMap((run) => {
      const { edit, value } = run.series[metric.name];
      return page.linePoints(edit, value, kind, run.name);
    });
    charts.draw(`multiple-${slot}`, `lines.${kind}`, { points, rings: [], marks: [], chosen: [], limits: [] }, span);
  });

  await charts.queue;
  charts.followColours();
  document.documentElement.dataset.ready = "yes";
  performance.mark("stabilitylab-ready");
})();
