// Several runs: their verdicts as a table, and one metric of all of them on one axis.

import { el, show, count, waiting } from "./dom.js";
import { fetchMetric, fetchRun } from "./data.js";
import { lineChart } from "./chart.js";

// Far from the colours of verdicts, which mean something else; the first four runs solid, the others dashed.
const COLOURS = 4;
const LOOKS = 2 * COLOURS;
const LARGEST = "";

/** What a line looks like, for a key. */
function swatchOf({ colour, dashed }) {
  const swatch = el("span", { class: dashed ? "swatch dashed" : "swatch", "aria-hidden": "true" });
  swatch.style[dashed ? "borderTopColor" : "background"] = colour;
  return swatch;
}

export class CompareView {
  /** open(run): shows one run. again: asks for what is wrong to be said, and for another try. */
  constructor(panel, open, again) {
    this.open = open;
    this.again = again;
    this.off = new Set();
    this.abouts = new Map();
    this.asked = 0;
    this.metric = null;
    this.site = LARGEST;
    this.table = el("div", { class: "box", tabindex: "0", role: "region", "aria-label": "Verdicts of the runs" });
    this.metrics = el("select", { id: "compare-metric", change: () => this.choose(this.metrics.value, LARGEST) });
    this.sites = el("select", { id: "compare-site", change: () => this.choose(this.metric, this.sites.value) });
    this.chart = el("div", {});
    this.note = el("p", { class: "muted small" });
    panel.append(
      el("div", { class: "card" }, el("h2", {}, "Verdicts"), this.table),
      el("div", { class: "card" }, el("div", { class: "card-head" }, el("h2", {}, "One metric over all of them"),
        el("div", { class: "choices" }, el("label", { for: "compare-metric" }, "Metric ", this.metrics), el("label", { for: "compare-site" }, "Site ", this.sites))), this.note, this.chart));
  }

  async update(runs) {
    this.runs = runs;
    const state = JSON.stringify([runs.map((run) => [run.id, run.version, run.state]), [...this.off]]);
    if (state === this.state) return;
    const mine = (this.asked += 1);
    const wanted = runs.filter((run) => run.state === "read" && this.shown(run));
    for (const run of wanted) {
      if (this.abouts.get(run.id)?.version !== run.version) this.abouts.set(run.id, await fetchRun(run.id));
      if (mine !== this.asked) return;
    }
    this.drawTable();
    this.drawSelects();
    try {
      await this.drawChart(mine);
    } catch (error) {
      this.abouts.clear();
      throw error;
    }
    if (mine === this.asked) this.state = state;
  }

  readable() {
    return this.runs.filter((run) => run.state === "read");
  }

  /** The first eight are drawn, unless others are ticked: more lines than colours tell nothing. */
  shown(run) {
    return this.off.has(run.id) ? false : this.ticked().has(run.id);
  }

  ticked() {
    return new Set(this.readable().filter((run) => !this.off.has(run.id)).slice(0, LOOKS).map((run) => run.id));
  }

  async choose(metric, site) {
    this.metric = metric;
    this.site = site;
    this.drawSelects();
    await this.chosen(this.drawChart((this.asked += 1)));
  }

  /** Draws on someone's choice. What it needs may be kept no longer; then the runs are fetched anew. */
  async chosen(drawing) {
    try {
      await drawing;
    } catch {
      this.abouts.clear();
      this.state = null;
      this.again();
    }
  }

  async tick(run, on) {
    if (on) this.off.delete(run.id);
    else this.off.add(run.id);
    await this.chosen(this.update(this.runs));
    this.table.querySelector(`input[data-place="${this.runs.indexOf(run)}"]`)?.focus();
  }

  look(run) {
    const place = [...this.ticked()].indexOf(run.id);
    return { colour: `var(--line-${1 + (place % COLOURS)})`, dashed: place >= COLOURS };
  }

  drawTable() {
    const full = this.ticked().size >= LOOKS;
    const heads = ["Shown", "Run", "Verdict", "Cause", "Took effect", "Edits", "Onset", "First bad", "Where", "Forecast"];
    const cell = (value) => el("td", { class: "n" }, value === null || value === undefined ? "–" : String(value));
    show(this.table, el("table", { id: "verdicts" }, el("thead", {}, el("tr", {}, heads.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, this.runs.map((run, place) => {
        const name = el("th", { scope: "row", class: "wrap" }, el("button", { type: "button", class: "link", click: () => this.open(run.id) }, run.name));
        if (run.state !== "read") return el("tr", {}, el("td", {}), name, el("td", { colspan: 8, class: "wrap" }, run.state === "unread" ? waiting(run) : run.reason));
        const box = el("input", { type: "checkbox", "data-place": place, "aria-label": `Show ${run.name}`, disabled: full && !this.shown(run), change: () => this.tick(run, box.checked) });
        box.checked = this.shown(run);
        const swatch = box.checked ? swatchOf(this.look(run)) : el("span", { class: "swatch", "aria-hidden": "true" });
        return el("tr", { class: `v-${run.verdict}` }, el("td", {}, el("span", { class: "keyed" }, box, swatch)), name,
          el("td", {}, el("span", { class: "sign" }, `${run.sign} ${run.word}`)), el("td", {}, run.cause === "unknown" && run.verdict === "stable" ? "–" : run.cause), el("td", { class: "wrap" }, run.landed), cell(run.edits), cell(run.onset_edit), cell(run.first_bad_edit),
          el("td", { class: "wrap where" }, run.first_bad_site ?? "–"), el("td", { class: "wrap forecast" }, run.forecast ?? "–"));
      }))));
    const drawn = this.ticked().size;
    const many = this.readable().length;
    show(this.note, full && many > drawn ? `${count(drawn, "run")} of ${many} are drawn; untick one to show another.` : "");
  }

  drawn() {
    return this.readable().filter((run) => this.shown(run) && this.abouts.has(run.id)).map((run) => ({ run, about: this.abouts.get(run.id) }));
  }

  drawSelects() {
    const names = new Set();
    const several = new Set();
    for (const { about } of this.drawn()) for (const metric of about.metrics) {
      names.add(metric.name);
      if (metric.sites.length > 1) several.add(metric.name);
    }
    if (!names.has(this.metric)) this.metric = ["update.norm", "drift.norm", "canary.kl"].find((name) => names.has(name)) ?? [...names][0] ?? null;
    const sites = new Set();
    for (const { about } of this.drawn()) for (const metric of about.metrics) {
      if (metric.name === this.metric) metric.sites.forEach((site) => sites.add(about.sites[site]));
    }
    const whole = several.has(this.metric);
    if (this.site !== LARGEST && !sites.has(this.site)) this.site = LARGEST;
    show(this.metrics, [...names].map((name) => el("option", { value: name }, name)));
    show(this.sites, whole ? el("option", { value: LARGEST }, "largest of all") : null, [...sites].map((site) => el("option", { value: site }, site)));
    this.metrics.value = this.metric ?? "";
    if (!whole && this.site === LARGEST) this.site = [...sites][0] ?? LARGEST;
    this.sites.value = this.site;
  }

  async drawChart(mine) {
    const lines = [];
    let log = false;
    for (const { run, about } of this.drawn()) {
      const at = about.metrics.findIndex((metric) => metric.name === this.metric);
      if (at < 0 || !about.number.length) continue;
      const described = about.metrics[at];
      log = described.scale === "log";
      const block = await fetchMetric(about, at);
      if (mine !== this.asked) return;
      const rows = this.site === LARGEST ? described.sites.map((_, row) => row) : [described.sites.findIndex((site) => about.sites[site] === this.site)];
      if (rows[0] >= 0) lines.push({ name: run.name, edits: about.number, ...largest(block, rows), ...this.look(run) });
    }
    this.lines = { lines, log };
    this.redraw();
  }

  redraw() {
    if (!this.lines || !this.chart.clientWidth) return;
    const { lines, log } = this.lines;
    show(this.chart, lines.length ? [lineChart(lines, { log, width: this.chart.clientWidth, height: 340, label: `${this.metric} of ${count(lines.length, "run")} over edits` }),
      el("ul", { class: "key" }, lines.map((line) => el("li", { class: "keyed" }, swatchOf(line), line.name)))] : el("p", { class: "muted" }, "No run that is shown has a reading of it."));
  }
}

/** Per edit the largest reading of these rows; NaN or ∞ where one of them is. */
function largest(block, rows) {
  const values = new Float64Array(block.columns).fill(-Infinity);
  const taken = new Uint8Array(block.columns);
  for (const row of rows) {
    for (let column = 0; column < block.columns; column += 1) {
      const at = row * block.columns + column;
      if (!block.taken[at]) continue;
      values[column] = taken[column] ? Math.max(values[column], block.values[at]) : block.values[at];
      taken[column] = 1;
    }
  }
  return { values, taken };
}
