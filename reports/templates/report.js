"use strict";
/* The page of one run: what is chosen (edit, layer, metric) stands in the address; everything is drawn from that. */

(async () => {
  const FIRST_SHOWN = [
    "update.norm", "drift.ratio", "weight.headroom_bits", "activation.max_abs", "activation.headroom_bits",
    "gradient.norm", "feedback.gain", "editor.input_max", "editor.input_unit_std",
  ];
  const CANARY = ["canary.agreement", "canary.kl", "canary.perplexity"];
  const MULTIPLES = 6;
  const RIDGES = 12;
  const LINES = 8;
  const SAID = 5;

  const report = page.json("report-data");
  const charts = new Charts(page.json("report-charts"));
  setUpFindings();
  setUpCopy();
  setUpFolds();
  unfold();
  addEventListener("hashchange", unfold);
  if (typeof DecompressionStream === "undefined") {
    page.at("too-old").hidden = false;
    return;
  }
  const { edits, series } = await page.unpack(report.data);
  const metrics = new Map(report.metrics.map((metric) => [metric.name, metric]));
  const places = Object.fromEntries(
    Object.entries(report.grids).map(([grid, listed]) => [grid, new Map(listed.map((edit, at) => [edit, at]))]),
  );
  const diagnosis = report.diagnosis;
  const model = report.sites.findIndex((site) => site.name === "model");
  const every = { first: (edits.edit[0] ?? 0) - 0.5, last: (edits.edit.at(-1) ?? 0) + 0.5 };

  const hasReadings = report.metrics.some((metric) => metric.length === 1) && edits.edit.length > 1;
  if (hasReadings) {
    page.at("explore").hidden = false;
    page.at("to-explore").hidden = false;
    if (page.at("pictures")) page.at("pictures").open = false;
    await setUpExplorer();
  }
  document.documentElement.dataset.ready = "yes";
  performance.mark("stabilitylab-ready");

  /** A reading of a metric at a site; undefined where that edit was not kept. */
  function reading(metric, site, edit) {
    const at = places[metrics.get(metric).grid].get(edit);
    return at === undefined ? undefined : series[metric][site]?.[at];
  }

  function sitesOf(metric) {
    return Object.keys(series[metric] ?? {}).map(Number);
  }

  function isScalar(metric) {
    return metrics.get(metric)?.length === 1;
  }

  function marks() {
    return [["onset", diagnosis.onset_edit], ["alarm", diagnosis.alarm_edit], ["first bad", diagnosis.first_bad_edit]]
      .filter(([, edit]) => edit !== null)
      .map(([name, edit]) => ({ name, edit }));
  }

  async function setUpExplorer() {
    const shown = {}; // what the charts show now
    const short = new Map(report.sites.map((site) => [site.name, site.short]));
    const state = { edit: 0, site: 0, metric: "", range: every };
    const mapped = report.metrics.filter((metric) => metric.length === 1 && sitesOf(metric.name).some((site) => site !== model));
    const single = report.metrics.filter((metric) => metric.length === 1 && !mapped.includes(metric));
    fillControls();
    readAddress();
    await draw({ everything: true });
    charts.followColours();
    addEventListener("popstate", follow);
    addEventListener("hashchange", follow);

    function fillControls() {
      for (const [title, listed] of [["Per layer", mapped], ["Of the whole model", single]]) {
        if (!listed.length) continue;
        const group = document.createElement("optgroup");
        group.label = title;
        for (const metric of listed) group.append(new Option(metric.name, metric.name));
        page.at("metric").append(group);
      }
      report.sites.forEach((site, place) => page.at("site").append(new Option(site.short, String(place))));
      const number = page.at("edit");
      number.min = edits.edit[0];
      number.max = edits.edit.at(-1);
      const flagged = marks();
      if (flagged.length) {
        page.at("range").append(new Option("Around the flagged edits", "flagged"));
        flagged.forEach(({ name, edit }) => {
          const button = page.make("button", `${name}: ${edit}`);
          button.type = "button";
          button.addEventListener("click", () => choose({ edit }));
          page.at("jumps").append(button);
        });
      }
      page.at("metric").addEventListener("change", (event) => choose({ metric: event.target.value }));
      page.at("site").addEventListener("change", (event) => choose({ site: Number(event.target.value) }));
      number.addEventListener("change", () => choose({ edit: nearest(Number(number.value)) }));
      page.at("range").addEventListener("change", (event) => zoom(event.target.value));
      page.at("before").addEventListener("click", () => step(-1));
      page.at("after").addEventListener("click", () => step(1));
      const map = page.at("heatmap");
      map.addEventListener("keydown", (event) => {
        const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
        const ends = { Home: edits.edit[0], End: edits.edit.at(-1) };
        if (event.key in ends) choose({ edit: nearestKept(ends[event.key]) });
        else if (event.key in moves) move(...moves[event.key]);
        else return;
        event.preventDefault();
      });
      map.addEventListener("click", (event) => {
        const cell = cellAt(event);
        if (cell) choose(cell);
      });
      map.addEventListener("mousemove", (event) => {
        const cell = cellAt(event);
        page.at("hovered").textContent = cell ? says(cell.edit, cell.site) : "";
      });
      map.addEventListener("mouseleave", () => { page.at("hovered").textContent = ""; });
      page.at("timeline").addEventListener("click", (event) => {
        const edit = editAt("timeline", event);
        if (edit !== null) choose({ edit: nearest(edit) });
      });
      document.querySelectorAll("a[data-cell]").forEach((link) => {
        link.addEventListener("click", () => page.at("explore").scrollIntoView());
      });
      const few = [["main", "the main metrics"], ["other", "the others"], ["spectra", "spectra"]]
        .filter(([grid]) => report.grids[grid].length < report.run.rows)
        .map(([grid, words]) => `${report.grids[grid].length} for ${words}`);
      page.at("thinned").textContent = few.length
        ? `Thinned to keep this page small: of ${report.run.rows.toLocaleString("en-US")} rows, ${few.join(", ")} are kept. ` +
          "Flagged edits and those beside them are all here; the run file has every one."
        : "";
    }

    function nearest(edit, listed = edits.edit) {
      return listed.reduce((best, each) => (Math.abs(each - edit) < Math.abs(best - edit) ? each : best), listed[0]);
    }

    function nearestKept(edit) {
      return nearest(edit, report.grids[metrics.get(state.metric).grid]);
    }

    function step(by) {
      const at = edits.edit.indexOf(state.edit) + by;
      if (at >= 0 && at < edits.edit.length) choose({ edit: edits.edit[at] });
    }

    function move(along, down) {
      const listed = report.grids[metrics.get(state.metric).grid];
      const at = listed.indexOf(nearest(state.edit, listed)) + along;
      const rows = sitesOf(state.metric);
      const row = rows.indexOf(state.site) + down;
      choose({
        edit: listed[Math.min(Math.max(at, 0), listed.length - 1)],
        site: rows[Math.min(Math.max(row, 0), rows.length - 1)],
      });
    }

    /** What to show when the address does not say. */
    function preset() {
      const edit = diagnosis.first_bad_edit ?? diagnosis.alarm_edit ?? diagnosis.onset_edit ?? edits.edit.at(-1);
      const bad = isScalar(diagnosis.first_bad_metric) ? diagnosis.first_bad_metric : null;
      const site = diagnosis.first_bad_place;
      const known = mapped.map((metric) => metric.name);
      const told = FIRST_SHOWN.filter((name) => known.includes(name));
      const moves = (name) => sitesOf(name).some((place) => new Set(series[name][place]).size > 2);
      const metric = known.includes(bad) ? bad : told.find(moves) ?? told[0] ?? known[0] ?? single[0].name;
      return { edit: nearest(edit), metric, site: sitesOf(metric).includes(site) ? site : sitesOf(metric)[0] };
    }

    function readAddress() {
      const asked = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
      Object.assign(state, preset());
      const site = report.sites.findIndex((each) => each.name === asked.get("site"));
      if (isScalar(asked.get("metric"))) settle({ metric: asked.get("metric") });
      if (site >= 0) settle({ site });
      if (asked.has("edit") && Number.isFinite(Number(asked.get("edit")))) state.edit = nearest(Number(asked.get("edit")));
    }

    function follow() {
      if (location.hash && !location.hash.includes("=")) return; // a place on the page
      readAddress();
      draw({});
    }

    /** Take over a choice; what does not go with it, a metric that was not read there or a site, gives way. */
    function settle(change) {
      Object.assign(state, change);
      if (sitesOf(state.metric).includes(state.site)) return;
      if (change.site === undefined) state.site = sitesOf(state.metric)[0];
      else state.metric = bestOf(scalarsAt(state.site))[0] ?? state.metric;
    }

    function scalarsAt(site) {
      return report.metrics.map((metric) => metric.name).filter((name) => isScalar(name) && series[name][site]);
    }

    /** The best known metrics first. */
    function bestOf(names) {
      const rank = (name) => (FIRST_SHOWN.includes(name) ? FIRST_SHOWN.indexOf(name) : FIRST_SHOWN.length);
      return names.sort((one, other) => rank(one) - rank(other));
    }

    /** Choose an edit, a site or a metric: the address says so, and `Back` undoes it. */
    function choose(change) {
      settle(change);
      const words = new URLSearchParams({ edit: state.edit, site: report.sites[state.site].name, metric: state.metric });
      if (location.hash !== `#${words}`) history.pushState(null, "", `#${words}`);
      draw({});
    }

    function zoom(which) {
      const flagged = marks().map((mark) => mark.edit);
      const around = which === "flagged" ? flagged : which === "chosen" ? [state.edit] : null;
      const room = Math.max(5, 0.02 * (every.last - every.first));
      state.range = around === null ? every : {
        first: Math.max(every.first, Math.min(...around) - room),
        last: Math.min(every.last, Math.max(...around) + room),
      };
      charts.change({ names: names() }, state.range);
    }

    /** The edges of a heatmap's columns: halfway between the edits that were kept. */
    function edges(listed) {
      return listed.map((edit, at) => ({
        start: at ? (listed[at - 1] + edit) / 2 : edit - 0.5,
        end: at + 1 < listed.length ? (listed[at + 1] + edit) / 2 : edit + 0.5,
      }));
    }

    function cells(metric) {
      const { grid, scale } = metrics.get(metric);
      const columns = edges(report.grids[grid]);
      const log = scale === "log";
      const rows = [];
      for (const site of sitesOf(metric)) {
        series[metric][site].forEach((value, at) => {
          if (value === null) return;
          const kind = page.isBad(value) ? "bad" : log && value <= 0 ? "zero" : "good";
          rows.push({ ...columns[at], site: report.sites[site].short, value: kind === "good" ? value : null, kind });
        });
      }
      return rows;
    }

    function outline() {
      const listed = report.grids[metrics.get(state.metric).grid];
      const at = listed.indexOf(nearest(state.edit, listed));
      if (!sitesOf(state.metric).includes(state.site)) return [];
      return [{ ...edges(listed)[at], site: report.sites[state.site].short }];
    }

    function editAt(id, event) {
      const view = charts.view(id);
      const canvas = page.at(id).querySelector("canvas");
      if (!view || !canvas) return null;
      const along = event.clientX - canvas.getBoundingClientRect().left - view.origin()[0];
      const edit = view.scale("x").invert(along);
      return edit < state.range.first || edit > state.range.last ? null : edit;
    }

    function cellAt(event) {
      const edit = editAt("heatmap", event);
      if (edit === null) return null;
      const view = charts.view("heatmap");
      const canvas = page.at("heatmap").querySelector("canvas");
      const down = event.clientY - canvas.getBoundingClientRect().top - view.origin()[1];
      const rows = sitesOf(state.metric);
      const row = Math.floor(down / view.scale("y").bandwidth());
      return row >= 0 && row < rows.length ? { edit: nearestKept(edit), site: rows[row] } : null;
    }

    function says(edit, site) {
      const value = series[state.metric][site] ? reading(state.metric, site, edit) : null;
      const { unit } = metrics.get(state.metric);
      const told = value === undefined ? "not kept on this page" : value === null ? "not taken" : page.number(value);
      return `Edit ${edit}, ${report.sites[site].name}: ${state.metric} ${told}${unit && unit !== "1" && value !== null ? ` ${unit}` : ""}`;
    }

    function limitsOf(metric) {
      const rest = diagnosis.findings.filter((each) => each.metric === metric && each.absolute && each.verdict !== "stable");
      const known = new Set(rest.map((each) => each.threshold));
      const [only] = known;
      return known.size === 1 && typeof only === "number" && (metrics.get(metric).scale !== "log" || only > 0) ? [{ value: only }] : [];
    }

    function drawLines(id, metric, sites) {
      const { grid, scale } = metrics.get(metric);
      const kind = scale === "log" ? "log" : "linear";
      const points = sites.flatMap((site) =>
        page.linePoints(report.grids[grid], series[metric][site], kind, report.sites[site].short));
      const rings = diagnosis.findings
        .filter((each) => each.metric === metric && sites.includes(each.place))
        .map((each) => ({ edit: each.edit, value: reading(metric, each.place, each.edit) }))
        .filter((row) => typeof row.value === "number" && (kind !== "log" || row.value > 0));
      const sets = { points, rings, marks: marks(), chosen: [{ edit: state.edit }], limits: limitsOf(metric) };
      charts.draw(id, `lines.${kind}`, sets, state.range);
    }

    /** Draw what the choice changed; everything: also what no choice changes. */
    async function draw({ everything = false }) {
      page.at("metric").value = state.metric;
      page.at("site").value = String(state.site);
      page.at("edit").value = String(state.edit);
      page.at("chosen").textContent = says(state.edit, state.site);
      describeMetric();
      describeEdit();
      if (everything) drawTimeline();
      if (shown.metric !== state.metric) drawHeatmap();
      else charts.draw("heatmap", shown.heatmap, { outline: outline() }, frame());
      if (shown.site !== state.site || shown.metric !== state.metric) drawLayer();
      if (everything) drawModel();
      drawRidges();
      if (!everything) charts.change({ chosen: [{ edit: state.edit }] });
      Object.assign(shown, { site: state.site, metric: state.metric });
      await charts.queue;
    }

    function drawTimeline() {
      const kinds = { stable: "worth knowing" };
      const events = diagnosis.findings.map((each) => ({ edit: each.since ?? each.edit, kind: kinds[each.verdict] ?? each.verdict }));
      edits.edit.forEach((edit, at) => {
        if (edits.status[at] === "failed") events.push({ edit, kind: "failed" });
        if (edits.outcome[at] === "restored" || edits.outcome[at] === "rolled_back") events.push({ edit, kind: "undone" });
      });
      const rows = new Set(events.map((event) => event.kind)).size;
      const phases = report.phases.map((part) => ({ start: part.first - 0.5, end: part.last + 0.5, kind: part.kind }));
      charts.draw("timeline", "timeline", { phases, events, marks: marks(), chosen: [{ edit: state.edit }] }, { ...state.range, height: 22 * Math.max(1, rows) });
    }

    function frame() {
      const rows = sitesOf(state.metric).length;
      const step = rows <= 12 ? 22 : rows <= 60 ? 13 : Math.max(4, 780 / rows);
      return { ...state.range, height: Math.max(3, rows) * step };
    }

    function drawHeatmap() {
      const name = `heatmap.${metrics.get(state.metric).scale === "log" ? "log" : "linear"}`;
      const kept = report.grids[metrics.get(state.metric).grid].length;
      page.at("kept").textContent = kept < edits.edit.length ? `${kept} edits are kept for this metric: a cell reaches halfway to the next.` : "";
      const order = sitesOf(state.metric).map((site) => ({ site: report.sites[site].short }));
      shown.heatmap = name;
      charts.draw("heatmap", name, { cells: cells(state.metric), order, outline: outline(), marks: marks(), names: names() }, frame());
    }

    /** Names above the map's marks: what its labels leave of the width is the frame's. */
    function names() {
      const labels = Charts.widest(sitesOf(state.metric).map((site) => report.sites[site].short));
      return Charts.names(marks(), state.range, page.at("heatmap").clientWidth - Math.min(190, labels) - 12);
    }

    /** Metrics at the chosen site that say something: the chosen one apart, those that moved, the best known first. */
    function metricsHere() {
      const others = scalarsAt(state.site).filter((name) => name !== state.metric);
      return bestOf(others.filter((name) => new Set(series[name][state.site]).size > 2)).slice(0, MULTIPLES);
    }

    function drawLayer() {
      page.at("layer-title").replaceChildren(...breakable(report.sites[state.site].name));
      const listed = [state.metric, ...metricsHere()];
      for (let slot = 0; slot <= MULTIPLES; slot += 1) {
        const metric = listed[slot];
        const figure = page.at(`line-${slot}`).parentElement;
        figure.hidden = metric === undefined || !series[metric][state.site];
        if (figure.hidden) continue;
        figure.querySelector("h4").textContent = metric;
        figure.querySelector("p").textContent = metrics.get(metric).meaning;
        drawLines(`line-${slot}`, metric, [state.site]);
      }
    }

    function drawModel() {
      let any = false;
      CANARY.forEach((metric, slot) => {
        const figure = page.at(`canary-${slot}`).parentElement;
        figure.hidden = !series[metric]?.[model];
        if (figure.hidden) return;
        any = true;
        figure.querySelector("h4").textContent = metric;
        figure.querySelector("p").textContent = metrics.get(metric).meaning;
        drawLines(`canary-${slot}`, metric, [model]);
      });
      const family = ["canary", "logits"].find((name) => series[`${name}.min`]?.[model] && series[`${name}.max`]?.[model]);
      page.at("band").parentElement.hidden = family === undefined;
      if (family) {
        any = true;
        const [low, high, middle] = ["min", "max", "logsumexp"].map((name) => series[`${family}.${name}`]?.[model] ?? []);
        const finite = (value) => (typeof value === "number" ? value : null);
        const band = report.grids.all.map((edit, at) => ({
          edit, low: finite(low[at]), high: finite(high[at]), middle: finite(middle[at]),
          above: page.isBad(low[at]) || page.isBad(high[at]),
        }));
        page.at("band").parentElement.querySelector("h4").textContent = `${family} range`;
        charts.draw("band", "band", { band, marks: marks(), chosen: [{ edit: state.edit }] }, state.range);
      }
      page.at("canary").hidden = !any;
      drawEditor();
    }

    function drawEditor() {
      const own = report.metrics.map((metric) => metric.name).filter((name) => name.startsWith("editor.") && isScalar(name) && !name.endsWith("_unit"));
      const moving = own.filter((name) => sitesOf(name).some((site) => new Set(series[name][site]).size > 2));
      const listed = bestOf(moving).slice(0, 3);
      page.at("editor-state").hidden = listed.length === 0;
      for (let slot = 0; slot < 3; slot += 1) {
        const metric = listed[slot];
        const figure = page.at(`editor-${slot}`).parentElement;
        figure.hidden = metric === undefined;
        if (figure.hidden) continue;
        const sites = sitesOf(metric);
        const few = sites.slice(0, LINES);
        figure.querySelector("h4").textContent = metric;
        figure.querySelector("p").textContent =
          metrics.get(metric).meaning + (few.length < sites.length ? ` The first ${few.length} of ${sites.length} parts.` : "");
        drawLines(`editor-${slot}`, metric, few);
      }
    }

    function drawRidges() {
      const metric = report.metrics.find((each) => each.length > 1 && each.name.endsWith(".spectrum") && series[each.name][state.site]);
      const figure = page.at("ridges").parentElement;
      const kept = metric ? report.grids[metric.grid] : [];
      const good = kept.filter((edit) => (reading(metric.name, state.site, edit) ?? []).some((value) => value > 0));
      figure.hidden = good.length === 0;
      if (figure.hidden) return;
      const wanted = new Set([nearest(state.edit, good)]);
      for (const { edit } of marks()) wanted.add(nearest(edit, good));
      for (let at = 0; wanted.size < Math.min(RIDGES, good.length) && at < good.length; at += 1) {
        wanted.add(good[Math.round((at * (good.length - 1)) / Math.max(1, Math.min(RIDGES, good.length) - 1)) % good.length]);
      }
      const picked = [...wanted].sort((one, other) => one - other);
      const rows = picked.flatMap((edit) =>
        reading(metric.name, state.site, edit)
          .map((value, at) => ({ edit, rank: at + 1, value }))
          .filter((row) => typeof row.value === "number" && row.value > 0));
      const bad = kept.filter((edit) => (reading(metric.name, state.site, edit) ?? []).some(page.isBad));
      figure.querySelector("h4").textContent = metric.name;
      figure.querySelector("p").textContent = `${metric.meaning} ${picked.length} edits, one below the other.` +
        (bad.length ? ` NaN or infinite at ${bad.length === 1 ? "edit" : "edits"} ${bad.slice(0, 12).join(", ")}${bad.length > 12 ? ", …" : ""}.` : "");
      const width = Math.max(180, page.at("ridges").clientWidth - 80);
      charts.draw("ridges", "ridges", { ridge: rows }, { width });
    }

    /** What is said, with short names for layers. */
    function briefly(says) {
      return says.replace(/[\w]+(?:\.[\w]+)+/g, (name) => short.get(name) ?? name);
    }

    function describeMetric() {
      const about = metrics.get(state.metric);
      page.at("metric-name").textContent = state.metric;
      const facts = [
        ["Meaning", about.meaning], ["Formula", about.formula], ["Unit", about.unit === "1" ? "none" : about.unit],
        ["Taken", about.phase], ["Source", about.source],
      ];
      page.at("metric-facts").replaceChildren(...facts.filter(([, text]) => text).map(([name, text]) => {
        const row = document.createElement("div");
        row.append(page.make("dt", name), page.make("dd", text));
        return row;
      }));
    }

    function describeEdit() {
      const at = edits.edit.indexOf(state.edit);
      const flags = marks().filter((mark) => mark.edit === state.edit).map((mark) => mark.name);
      page.at("edit-title").textContent = `Edit ${state.edit}`;
      const facts = [
        ["Label", edits.label[at] || (state.edit === 0 ? "(before the first edit)" : "–")],
        ["Status", edits.error[at] ? `${edits.status[at]}: ${edits.error[at]}` : edits.status[at]],
        ["What became of it", (edits.outcome[at] ?? "–").replaceAll("_", " ")],
        ["Flag", flags.join(", ") || "–"],
        ["Seconds", page.number(edits.seconds[at])],
      ];
      page.at("edit-facts").replaceChildren(...facts.map(([name, text]) => {
        const row = document.createElement("div");
        row.append(page.make("dt", name), page.make("dd", text));
        return row;
      }));
      const said = diagnosis.findings.filter((each) => each.edit === state.edit || each.since === state.edit);
      const told = said.slice(0, SAID).map((each) => page.make("li", briefly(each.says)));
      if (said.length > SAID) told.push(page.make("li", `${said.length - SAID} more in the table of findings.`));
      page.at("edit-findings").replaceChildren(...told);
      page.at("readings-title").textContent = `Readings at ${report.sites[state.site].short}`;
      let gone = 0;
      const rows = [];
      for (const metric of report.metrics) {
        if (!series[metric.name][state.site]) continue;
        const value = reading(metric.name, state.site, state.edit);
        if (value === undefined) gone += 1;
        if (value === undefined || value === null) continue;
        const told = Array.isArray(value)
          ? value.slice(0, 4).map(page.number).join(", ") + (value.length > 4 ? ", …" : "")
          : page.number(value);
        const row = document.createElement("tr");
        const name = page.make("th", "", "mono");
        name.append(...breakable(metric.name));
        name.scope = "row";
        name.title = metric.meaning;
        const bad = page.isBad(value) || (Array.isArray(value) && value.some(page.isBad));
        row.append(name, page.make("td", told, bad ? "n bad-value" : "n"), page.make("td", metric.unit === "1" ? "–" : metric.unit));
        rows.push(row);
      }
      page.at("cell-readings").replaceChildren(...rows);
      page.at("readings-note").textContent = gone
        ? `${gone} metrics were not kept for this edit on this page; the run file has them.`
        : rows.length ? "" : "Nothing was read here at this edit.";
    }
  }

  /** One findings table: the rest unfolded into the first, headings that sort, and a filter. */
  function setUpFindings() {
    const table = page.at("findings-table");
    if (!table) return;
    const body = table.tBodies[0];
    const more = page.at("more-findings");
    for (const row of [...(more?.querySelectorAll("tbody tr") ?? [])]) {
      row.dataset.more = "yes";
      body.append(row);
    }
    more?.remove();
    const rows = [...body.rows];
    page.at("findings-controls").hidden = false;
    const [text, verdict, kinds] = ["findings-text", "findings-verdict", "findings-kinds"].map(page.at);
    kinds.parentElement.hidden = !rows.some((row) => row.dataset.more);
    const filter = () => {
      const wanted = text.value.toLowerCase();
      let left = 0;
      for (const row of rows) {
        row.hidden = (kinds.checked && !wanted && !verdict.value && row.dataset.more === "yes") ||
          (verdict.value !== "" && row.dataset.verdict !== verdict.value) ||
          !row.textContent.toLowerCase().includes(wanted);
        left += row.hidden ? 0 : 1;
      }
      page.at("findings-count").textContent = `${left} of ${rows.length} shown`;
    };
    for (const control of [text, verdict, kinds]) control.addEventListener("input", filter);
    filter();
    page.sortable(table);
  }

  /** A name that may go on in a new line after each of its parts. */
  function breakable(name) {
    return name.split(/(?<=[._])/).flatMap((part) => [part, document.createElement("wbr")]);
  }

  /** What an address leads to may stand in a fold. */
  function unfold() {
    const target = page.at(decodeURIComponent(location.hash.slice(1)));
    for (let fold = target?.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
    if (target && target.closest("details")) target.scrollIntoView();
  }

  /** On a narrow page, what is many charts long is folded, and drawn when it is unfolded. */
  function setUpFolds() {
    const narrow = matchMedia("(max-width: 560px)");
    const fold = () => document.querySelectorAll("details.fold").forEach((each) => { each.open = !narrow.matches; });
    fold();
    narrow.addEventListener("change", fold);
  }

  function setUpCopy() {
    const button = page.at("copy");
    if (!button) return;
    button.hidden = false;
    button.addEventListener("click", async () => {
      const text = page.at("reproduce").textContent;
      try {
        await navigator.clipboard.writeText(text);
      } catch {
        getSelection().selectAllChildren(page.at("reproduce"));
        document.execCommand("copy");
      }
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }
})();
