// One run: what the analyzer says, the heatmap, and the layer and edit that were chosen.

import { el, show, number, exact, count, waiting } from "./dom.js";
import { fetchMetric, fetchRun, fetchSite } from "./data.js";
import { Heatmap } from "./heatmap.js";
import { lineChart } from "./chart.js";

const FIRST = ["update.norm", "drift.norm", "activation.max_abs", "gradient.norm", "canary.kl"];
const LISTED = 40;

export class RunView {
  /** again: asks for what is wrong to be said, and for another try. */
  constructor(panel, again) {
    this.again = again;
    this.panel = panel;
    this.about = null;
    this.asked = 0;
    this.waits = null;
    this.verdict = el("div", { class: "card verdict" });
    this.select = el("select", { id: "metric", change: () => this.chooseMetric(Number(this.select.value)) });
    this.meaning = el("p", { class: "muted small" });
    this.map = new Heatmap((row, column) => this.chooseCell(row, column));
    this.mapCard = el("div", { class: "card" }, el("div", { class: "card-head" }, el("h2", {}, "Layers by edits"),
      el("label", { for: "metric" }, "Metric ", this.select)), this.meaning, this.map.element);
    this.layer = el("div", { class: "card" });
    this.more = el("div", {});
    this.panel.append(this.verdict, this.mapCard, this.layer, this.more);
  }

  /** line: the run's entry in the list, or null. Fetches the run again only where its version has changed. */
  async update(line) {
    if (!line) return this.blank("No run yet. Runs appear here as soon as their file does.");
    if (line.id === this.about?.id && (line.version ?? this.about.version) === this.about.version) return;
    if (line.id !== this.fetching) await this.fetch(line);
  }

  async fetch(line) {
    const mine = (this.asked += 1);
    this.fetching = line.id;
    try {
      await this.load(line, mine);
    } catch (error) {
      if (mine === this.asked) this.about = null; // else this version would pass for shown
      throw error;
    } finally {
      if (mine === this.asked) this.fetching = null;
    }
  }

  async load(line, mine) {
    if (this.known !== line.id && this.waits !== line.id) this.blank("Reading the run …");
    const about = await fetchRun(line.id);
    if (mine !== this.asked) return;
    this.waits = about.state === "judging" ? line.id : null;
    if (this.waits) {
      const words = waiting(about);
      return this.blank(`${words[0].toUpperCase()}${words.slice(1)}. The verdict is shown once all of them are judged.`);
    }
    const same = this.known === about.id;
    this.known = about.id;
    if (about.state === "unreadable") {
      this.about = about;
      return this.blank(about.reason, "This run can't be read");
    }
    if (!same) this.begin(about);
    this.edit = this.follows ? defaultEdit(about) : this.edit;
    this.about = about;
    if (!same || !about.metrics.some((metric) => metric.name === this.metricName)) this.metricName = firstMetric(about);
    this.drawVerdict();
    this.drawMore();
    this.drawSelect();
    await Promise.all([this.drawCurve(mine), this.drawMap(mine)]);
  }

  /** A run that was not shown before: its first bad place is what one wants to see. */
  begin(about) {
    this.follows = true;
    this.siteName = about.diagnosis.first_bad_site ?? null;
    this.map.zoom = 0;
  }

  blank(words, heading = null) {
    this.known = null;
    if (!heading) this.about = null;
    show(this.verdict, heading ? el("h2", {}, heading) : null, el("p", { class: heading ? "" : "muted" }, words));
    this.mapCard.hidden = this.layer.hidden = this.more.hidden = true;
  }

  /** Draws on someone's choice. What it needs may be kept no longer; then the run is fetched anew. */
  async chosen(drawing) {
    try {
      await drawing;
    } catch {
      this.about = null;
      this.again();
    }
  }

  get metric() {
    return this.about.metrics.findIndex((metric) => metric.name === this.metricName);
  }

  async chooseMetric(metric) {
    this.metricName = this.about.metrics[metric].name;
    await this.chosen(this.drawMap(this.asked));
  }

  async chooseCell(row, column) {
    const about = this.about;
    this.siteName = about.sites[about.metrics[this.metric].sites[row]];
    this.edit = about.number[column];
    this.follows = false;
    await this.chosen(this.drawLayer(this.asked));
  }

  drawVerdict() {
    const { about } = this;
    const { diagnosis } = about;
    const at = (edit) => (edit === null ? "–" : `edit ${edit}`);
    const facts = [
      ["Edits", `${about.edits.toLocaleString("en-US")}${about.complete ? "" : ", not closed"}`],
      ["Took effect", diagnosis.landed],
      ["Onset", at(diagnosis.onset_edit)],
      ["Alarm", at(diagnosis.alarm_edit)],
      ["First bad", at(diagnosis.first_bad_edit)],
      diagnosis.first_bad_site ? ["Where", `${diagnosis.first_bad_site} (${diagnosis.first_bad_metric})`, true] : null,
      about.forecast ? ["Forecast", about.forecast, true] : null,
    ].filter(Boolean);
    const known = diagnosis.cause !== "unknown";
    this.curve = el("figure", { class: "curve" });
    this.verdict.className = `card verdict v-${about.verdict}`;
    show(this.verdict,
      el("h2", { id: "title" }, about.title),
      el("div", { class: "first" },
        el("div", {},
          el("p", { class: "badge", title: diagnosis.means }, el("span", { "aria-hidden": "true" }, `${about.sign} `), about.word),
          diagnosis.nothing_lands ? el("p", { class: "badge v-diverging" }, el("span", { "aria-hidden": "true" }, "▲ "), "No edit takes effect") : null,
          el("p", { class: "says", id: "says" }, diagnosis.says),
          diagnosis.cause_says ? block(known ? `Why: ${diagnosis.cause}` : "Why", diagnosis.cause_says, known ? el("p", { class: "muted small" }, `Confidence ${diagnosis.confidence}.`) : null) : null,
          block("What to do", diagnosis.advice),
          diagnosis.unwatched && !diagnosis.says.endsWith(`${diagnosis.unwatched}.`) ? el("p", { class: "muted small" }, `Not watched: ${diagnosis.unwatched}.`) : null),
        this.curve),
      diagnosis.causes.length ? el("ol", { class: "causes", "aria-label": "The chain of causes" }, diagnosis.causes.map(([role, cause, says]) =>
        el("li", {}, el("p", { class: "muted small" }, role), el("p", { class: "claim" }, cause), el("p", { class: "small" }, says)))) : null,
      diagnosis.operation.length ? el("details", { class: "operation" }, el("summary", {}, "The operation that gave it"), el("dl", {}, diagnosis.operation.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]).flat())) : null,
      el("dl", { class: "facts" }, facts.map(([name, value, long]) => el("div", { class: long ? "long" : "" }, el("dt", {}, name), el("dd", {}, value)))));
    this.mapCard.hidden = this.layer.hidden = !about.metrics.length || !about.number.length;
    this.more.hidden = false;
  }

  /** The reading that tells the run, beside what is said of it. */
  async drawCurve(mine) {
    const { about, curve } = this;
    if (!about.curve) return;
    const { metric, site, marks } = about.curve;
    const described = about.metrics[metric];
    const block = await fetchMetric(about, metric);
    if (mine !== this.asked || curve !== this.curve) return;
    const row = described.sites.indexOf(site);
    const [from, to] = [row * about.number.length, (row + 1) * about.number.length];
    const line = { name: described.short[row], edits: about.number, values: block.values.subarray(from, to), taken: block.taken.subarray(from, to), colour: "var(--line-1)", faint: false };
    show(curve, el("figcaption", {}, el("h3", {}, `${described.name} at ${described.short[row]}`), described.meaning),
      lineChart([line], { log: described.scale === "log", marks, width: Math.max(240, curve.clientWidth), height: 230, label: `${described.name} at ${about.sites[site]}` }));
  }

  drawSelect() {
    const families = new Map();
    this.about.metrics.forEach((metric, at) => families.set(metric.family, [...(families.get(metric.family) ?? []), [metric, at]]));
    show(this.select, [...families].map(([family, metrics]) => el("optgroup", { label: family }, metrics.map(([metric, at]) => el("option", { value: at }, metric.name)))));
  }

  async drawMap(mine) {
    const { about } = this;
    if (this.mapCard.hidden) return;
    const metric = this.metric;
    const described = about.metrics[metric];
    this.select.value = String(metric);
    const several = described.length > 1 ? ` Of its ${described.length} values the map shows the first.` : "";
    show(this.meaning, `${described.meaning}${several} Taken ${described.phase} each edit.`);
    const block = await fetchMetric(about, metric);
    if (mine !== this.asked || about !== this.about || metric !== this.metric) return;
    const columns = new Map(about.number.map((edit, column) => [edit, column]));
    const rows = new Map(described.sites.map((site, row) => [site, row]));
    const found = about.findings.filter((finding) => finding.metric === metric && rows.has(finding.site) && columns.has(finding.edit));
    const severe = about.findings.filter((finding) => finding.verdict !== "stable");
    const flagged = new Set(severe.flatMap((finding) => [finding.edit, finding.start]).map((edit) => columns.get(edit)).filter((column) => column !== undefined));
    const row = Math.max(0, described.sites.findIndex((site) => about.sites[site] === this.siteName));
    this.edit = columns.has(this.edit) ? this.edit : defaultEdit(about);
    this.map.update({ block, rows: described.short, edits: about.number, metric: described, marks: about.marks,
      findings: found.map((finding) => ({ row: rows.get(finding.site), column: columns.get(finding.edit) })), flagged: [...flagged] }, row, columns.get(this.edit));
    this.siteName = about.sites[described.sites[row]];
    this.drawn = { block, metric };
    await this.drawLayer(mine);
  }

  async drawLayer(mine) {
    const { about } = this;
    const site = about.sites.indexOf(this.siteName);
    const parts = await fetchSite(about, site);
    if (mine !== this.asked || about !== this.about || about.sites[site] !== this.siteName) return;
    this.parts = parts;
    this.site = site;
    const column = about.number.indexOf(this.edit);
    const inner = this.layer.clientWidth - 34;
    const wide = inner > 760;
    const chart = Math.max(240, wide ? Math.round(inner * 0.6) : inner);
    const small = Math.max(200, Math.min(300, Math.floor(inner / Math.max(1, Math.floor(inner / 250))) - 12));
    const chosen = this.metric;
    const rest = [...parts.keys()].filter((metric) => metric !== chosen);
    const still = rest.filter((metric) => unchanged(parts.get(metric)));
    const others = rest.filter((metric) => !still.includes(metric));
    show(this.layer,
      el("div", { class: "card-head" }, el("h2", { id: "layer-name" }, this.siteName), this.steps(column)),
      el("div", { class: wide ? "split" : "" },
        el("div", {}, el("h3", {}, about.metrics[chosen].name, about.metrics[chosen].sites.length > 1 ? el("span", { class: "muted" }, " here, and at the other sites in grey") : null), this.mainChart(chosen, chart, wide ? 340 : 260)),
        this.editDetails(column, parts)),
      others.length ? el("h3", { class: "apart" }, "Everything else that was read here") : null,
      el("div", { class: "smalls" }, others.map((metric) => el("figure", {}, el("figcaption", { title: about.metrics[metric].meaning }, about.metrics[metric].name), this.smallChart(metric, small)))),
      still.length ? el("p", { class: "muted small" }, "The same at every edit: ", still.map((metric) => `${about.metrics[metric].name} ${number(parts.get(metric).values[parts.get(metric).taken.indexOf(1)])}`).join(", "), ".") : null);
  }

  steps(column) {
    const { about } = this;
    const go = (place) => {
      this.edit = about.number[place];
      this.follows = false;
      this.map.select(this.map.row, place);
      this.chosen(this.drawLayer(this.asked));
    };
    return el("div", { class: "zoom", role: "group", "aria-label": "Edit" },
      el("button", { type: "button", disabled: column <= 0, click: () => go(column - 1), "aria-label": "Edit before" }, "‹"),
      el("span", { id: "edit-name" }, `edit ${this.edit}`),
      el("button", { type: "button", disabled: column >= about.number.length - 1, click: () => go(column + 1), "aria-label": "Edit after" }, "›"));
  }

  mainChart(metric, width, height) {
    const { about, drawn } = this;
    const described = about.metrics[metric];
    const edits = about.number;
    const lines = described.sites.map((site, row) => {
      const [from, to] = [row * edits.length, (row + 1) * edits.length];
      return { name: described.short[row], edits, values: drawn.block.values.subarray(from, to), taken: drawn.block.taken.subarray(from, to),
        colour: site === this.site ? "var(--line-1)" : "var(--other)", faint: site !== this.site };
    });
    lines.sort((left, right) => Number(right.faint) - Number(left.faint));
    return lineChart(lines, { log: described.scale === "log", marks: about.marks, width, height, edit: this.edit,
      label: `${described.name} at ${this.siteName} over edits ${edits[0]} to ${edits[edits.length - 1]}`,
      pick: (edit) => this.pick(edit) });
  }

  pick(edit) {
    const column = this.about.number.indexOf(edit);
    if (column < 0) return;
    this.map.select(this.map.row, column);
    this.edit = edit;
    this.follows = false;
    this.chosen(this.drawLayer(this.asked));
  }

  smallChart(metric, width) {
    const { about } = this;
    const described = about.metrics[metric];
    const part = this.parts.get(metric);
    const shown = described.length > 1 ? powers(part.columns) : [0];
    const lines = shown.map((column, at) => ({ name: `${column + 1}`, edits: about.number, values: stride(part.values, column, part.columns),
      taken: stride(part.taken, column, part.columns), colour: at === 0 ? "var(--line-1)" : "var(--other)", faint: at > 0 })).reverse();
    return lineChart(lines, { log: described.scale === "log", marks: about.marks, width, height: 130, edit: this.edit, small: true,
      label: `${described.name} at ${this.siteName}`, pick: (edit) => this.pick(edit) });
  }

  editDetails(column, parts) {
    const { about } = this;
    const rows = [...parts].flatMap(([metric, part]) => {
      const values = [...part.values.subarray(column * part.columns, (column + 1) * part.columns)];
      const taken = part.taken.subarray(column * part.columns, (column + 1) * part.columns);
      const there = values.filter((_, at) => taken[at]);
      const shown = there.slice(0, 3).map((value) => number(value, 4)).join(", ");
      const words = there.length ? (there.length > 3 ? `${shown}, …` : shown) : "not taken";
      const unit = about.metrics[metric].unit;
      return el("tr", { class: metric === this.metric ? "chosen" : "" }, el("th", { scope: "row" }, about.metrics[metric].name),
        el("td", { class: there.some((value) => !Number.isFinite(value)) ? "n bad" : "n", "data-metric": about.metrics[metric].name, "data-value": there.length ? there.map(exact).join(" ") : "absent",
          title: there.map(exact).join(", ") || null }, words, ["1", "—", "-", ""].includes(unit) ? "" : ` ${unit}`));
    });
    const outcome = about.outcome[column];
    const state = [about.status[column], outcome].filter(Boolean).join(", then ");
    const said = about.findings.filter((finding) => finding.edit === this.edit && (finding.site === this.site || finding.site === null));
    return el("div", { class: "details" },
      el("h3", {}, `Edit ${this.edit} here`),
      about.label[column] ? el("p", { class: "label" }, about.label[column]) : null,
      el("p", { class: "muted small" }, `${state}, ${number(typeof about.seconds[column] === "number" ? about.seconds[column] : NaN)} s`),
      about.error[column] ? el("p", { class: "error" }, about.error[column]) : null,
      said.slice(0, 4).map((finding) => el("p", { class: `finding v-${finding.verdict}` }, el("span", { class: "sign", "aria-hidden": "true" }, finding.sign), ` ${finding.says}`)),
      el("div", { class: "box", tabindex: "0", role: "region", "aria-label": "Readings of this edit" }, el("table", {}, el("tbody", {}, rows))));
  }

  drawMore() {
    const { about } = this;
    const opened = [...this.more.querySelectorAll("details")].map((details) => details.open);
    const { diagnosis } = about;
    show(this.more,
      fold(`What was found, that of the headline first: ${about.events.length}`, about.events.length ? el("div", { class: "box", tabindex: "0", role: "region", "aria-label": "Events" }, el("table", { id: "events" },
        el("tbody", {}, about.events.map((event) => el("tr", { class: `v-${event.verdict}` },
          el("td", {}, el("span", { class: "sign", title: event.verdict === "stable" ? "worth knowing" : event.verdict }, event.sign)), el("td", { class: "n" }, `edit ${event.edit}`),
          el("td", { class: "wrap wide" }, event.says)))))) : el("p", { class: "muted" }, "Nothing out of the ordinary.")),
      fold(`Each claim with its evidence: ${about.findings.length}`, about.findings.length ? el("div", { class: "box", tabindex: "0", role: "region", "aria-label": "Findings" }, el("table", {},
        el("thead", {}, el("tr", {}, ["", "Edit", "Metric", "Site", "Says"].map((name) => el("th", { scope: "col" }, name || el("span", { class: "hidden" }, "Verdict"))))),
        el("tbody", {}, about.findings.map((finding) => el("tr", { class: `v-${finding.verdict}` },
          el("td", {}, el("span", { class: "sign", title: finding.verdict }, finding.sign)), el("td", { class: "n" }, String(finding.edit)),
          el("td", {}, about.metrics[finding.metric]?.name ?? "–"), el("td", { class: "wrap" }, about.sites[finding.site] ?? "–"), el("td", { class: "wrap wide" }, finding.says)))))) : el("p", { class: "muted" }, "Nothing out of the ordinary.")),
      about.notes.length ? fold(`Not measured, or not as asked: ${about.notes.length + about.notes_left_out}`, el("ul", {}, about.notes.slice(0, LISTED).map((note) => el("li", {}, `edit ${note.edit}: ${note.says}`))),
        about.notes.length + about.notes_left_out > LISTED ? el("p", { class: "muted" }, `and ${about.notes.length + about.notes_left_out - LISTED} more, in the run's report`) : null) : null,
      fold("How it was judged, and what it was made with", el("dl", { class: "pairs" },
        [["compared with", diagnosis.baseline], ["limits", diagnosis.thresholds], ["probes took", about.time_in_probes], ["the canary took", share(about.canary_time_share)], ["the tracer took", share(about.trace_time_share)], ...about.environment]
          .filter(([, value]) => value).map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]))));
    [...this.more.querySelectorAll("details")].forEach((details, at) => {
      details.open = opened[at] ?? false;
    });
  }

  redraw() {
    if (!this.about || this.about.state === "unreadable" || !this.parts || !this.drawn) return;
    this.map.layout();
    this.chosen(this.drawCurve(this.asked));
    this.chosen(this.drawLayer(this.asked));
  }
}

function block(heading, words, more = null) {
  return words || more ? el("div", {}, el("h3", {}, heading), words ? el("p", {}, words) : null, more) : null;
}

function fold(heading, ...content) {
  return el("details", { class: "card" }, el("summary", {}, heading), content);
}

function share(value) {
  return typeof value === "number" ? `${(100 * value).toFixed(1)} % of the edits' time` : "";
}

/** Which edit one wants to see of a run: the first bad one, else the onset, else the last. */
function defaultEdit(about) {
  const { first_bad_edit: bad, onset_edit: onset } = about.diagnosis;
  return [bad, onset].find((edit) => edit !== null && about.number.includes(edit)) ?? about.number[about.number.length - 1];
}

function firstMetric(about) {
  const bad = about.diagnosis.first_bad_metric;
  const known = new Map(about.metrics.map((metric) => [metric.name, metric.sites.length]));
  const wanted = [bad, ...FIRST].filter((name) => known.has(name));
  return wanted.find((name) => known.get(name) > 1) ?? wanted[0] ?? about.metrics[0]?.name ?? null;
}

/** Whether a scalar was the same, and a finite number, whenever it was read. */
function unchanged(part) {
  const there = part.values.filter((_, at) => part.taken[at]);
  return part.columns === 1 && there.every((value) => value === there[0]) && Number.isFinite(there[0]);
}

function stride(values, from, step) {
  return Array.from({ length: values.length / step }, (_, at) => values[at * step + from]);
}

/** The 1st, 2nd, 4th, 8th … of `many`, as places from 0. */
function powers(many) {
  const places = [];
  for (let place = 1; place <= many; place *= 2) places.push(place - 1);
  return places;
}
