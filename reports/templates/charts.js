"use strict";
/* What pages with charts share: drawing one. Text from a run is drawn as pixels by Vega. */

/** Draws Vega-Lite charts by name, and changes what they show. */
class Charts {
  /** named: whether a single line is told by its name too. */
  constructor(specs, { named = false } = {}) {
    this.specs = specs;
    this.named = named;
    this.drawn = new Map();
    this.folded = new Map(); // to be drawn when they are unfolded: until then they have no width
    this.queue = Promise.resolve();
  }

  /** Colours of text and grid, as the style sheet has them now. */
  static look() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const font = getComputedStyle(document.body).fontFamily;
    const text = { labelColor: colour("--ink"), titleColor: colour("--muted"), labelFont: font, titleFont: font };
    return {
      background: null,
      font,
      padding: 2,
      view: { stroke: null },
      axis: { ...text, gridColor: colour("--line"), domainColor: colour("--muted"), tickColor: colour("--muted"),
        labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" },
      legend: { ...text, labelFontSize: 12 },
      header: { ...text, labelFontSize: 11 },
    };
  }

  /** Vega-Embed, unpacked where need be: the page's policy knows the script that comes out by its hash. */
  static async vega() {
    if (!window.vegaEmbed) {
      const script = page.make("script", await page.inflate(page.at("vega").textContent));
      document.head.append(script);
    }
    return window.vegaEmbed;
  }

  /** Put `sets` (rows by name of data set) and `signals` on the chart in the element `id`; draws it where need be.
      Among the signals, width (of one facet) and height are pixels. */
  draw(id, name, sets, signals = {}) {
    const fold = page.at(id).closest("details:not([open])");
    if (fold) {
      const before = this.folded.get(id) ?? this.drawn.get(id);
      this.folded.set(id, { name, sets: before?.name === name ? { ...before.sets, ...sets } : sets, signals });
      fold.addEventListener("toggle", () => this.#unfold(), { once: true });
      return this.queue;
    }
    this.folded.delete(id);
    this.queue = this.queue.then(() => this.#draw(id, name, sets, signals)).catch((error) => {
      console.error(`chart ${name}: ${error.message}`);
    });
    return this.queue;
  }

  #unfold() {
    for (const [id, chart] of [...this.folded]) this.draw(id, chart.name, chart.sets, chart.signals);
    return this.queue;
  }

  async #draw(id, name, sets, signals) {
    const before = this.drawn.get(id);
    const { width, height, ...settings } = signals;
    if (before && before.name === name && before.signals.height === height && before.signals.width === width) {
      before.sets = { ...before.sets, ...sets };
      before.signals = { ...before.signals, ...signals };
      for (const [key, rows] of Object.entries(sets)) before.view.data(key, rows.map((row) => ({ ...row })));
      for (const [key, value] of Object.entries(settings)) before.view.signal(key, value);
      await before.view.runAsync();
      return;
    }
    if (before) before.view.finalize();
    const spec = structuredClone(this.specs[name]);
    if (width) spec.spec.width = width;
    if (height) spec.height = height;
    spec.datasets = Object.fromEntries(Object.entries(sets).map(([key, rows]) => [key, rows.map((row) => ({ ...row }))]));
    for (const param of spec.params ?? []) if (param.name in settings) param.value = settings[param.name];
    const told = [...new Set(sets.points?.map((row) => row.site))];
    for (const layer of told.length ? spec.layer : []) {
      for (const channel of [layer.encoding.color, layer.encoding.strokeDash]) {
        if (channel?.legend && told.length === 1 && !this.named) channel.legend = null;
        else if (channel?.legend && this.named) channel.legend.values = told;
      }
    }
    const made = await (await Charts.vega())(page.at(id), spec, {
      ast: true, // the page's policy forbids eval
      actions: false,
      config: Charts.look(),
      defaultStyle: false,
      logLevel: 1, // errors: a chart without a value in it is no cause for a warning
      mode: "vega-lite",
      renderer: "canvas",
      tooltip: false,
    });
    this.drawn.set(id, { name, sets, signals, view: made.view });
  }

  /** Pixels that the widest of these takes, as charts write them. */
  static widest(words) {
    const context = document.createElement("canvas").getContext("2d");
    context.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    return Math.max(0, ...words.map((each) => context.measureText(each).width));
  }

  /** What to write over the lines of flagged edits, so that no name lies on another. marks: (edit, name); first, last: the ends of the axis; width: of the frame, in pixels. */
  static names(marks, { first, last }, width) {
    const at = new Map();
    for (const { edit, name } of marks) at.set(edit, [...(at.get(edit) ?? []), name]);
    const ends = [];
    return [...at].sort((one, other) => one[0] - other[0]).map(([edit, names]) => {
      const words = `${names.join(" · ")} ${edit}`;
      const size = Charts.widest([words]);
      const place = ((edit - first) / (last - first)) * width;
      const align = place < size / 2 ? "left" : place > width - size / 2 ? "right" : "center";
      const start = place - { left: 0, center: size / 2, right: size }[align];
      const free = ends.findIndex((end) => end <= start);
      const row = free < 0 ? ends.length : free;
      ends[row] = start + size + 8;
      return { edit, name: names.at(-1), words, align, row };
    });
  }

  /** Change data sets and signals of every chart that has them. */
  async change(sets, signals = {}) {
    for (const [id, chart] of new Map([...this.drawn, ...this.folded])) {
      const own = Object.fromEntries(Object.entries(sets).filter(([key]) => key in chart.sets));
      const known = "first" in chart.signals ? signals : {};
      const frame = { ...chart.signals, ...known };
      if (Object.keys(own).length || Object.keys(known).length) this.draw(id, chart.name, own, frame);
    }
    return this.queue;
  }

  /** Draw everything anew, after a change of colours. */
  redraw() {
    for (const [id, chart] of [...this.drawn]) {
      chart.view.finalize();
      this.drawn.delete(id);
      this.draw(id, chart.name, chart.sets, chart.signals);
    }
    return this.queue;
  }

  /** The Vega view in an element, once it is drawn. */
  view(id) {
    return this.drawn.get(id)?.view;
  }

  /** Follow the reader's choice of a light or a dark page. */
  followColours() {
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.redraw());
  }
}
