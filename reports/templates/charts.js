"use strict";
/* What both pages share: the data that came with them, numbers as all reports write them, and drawing a chart.
   Text from a run is only ever put in place with textContent, or drawn as pixels by Vega. */

const page = {
  /** The element of this id. */
  at: (id) => document.getElementById(id),

  /** A new element with text in it. */
  make(tag, text = "", className = "") {
    const element = document.createElement(tag);
    element.textContent = text;
    if (className) element.className = className;
    return element;
  },

  /** The value of a script of JSON. */
  json: (id) => JSON.parse(page.at(id).textContent),

  /** The value of a base64 text of deflated JSON. */
  async unpack(text) {
    const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  },

  /** A number as stabilitylab.reports.text.number writes it. */
  number(value) {
    if (value === null || value === undefined) return "–";
    if (typeof value === "string") return { NaN: "NaN", Infinity: "∞", "-Infinity": "−∞" }[value] ?? "–";
    const size = Math.abs(value);
    let text;
    if (Number.isInteger(value) && size < 1e6) text = value.toLocaleString("en-US");
    else if (size >= 1e3 && size < 1e5) text = Math.round(value).toLocaleString("en-US");
    else if (size >= 1e-3 && size < 1e5) text = String(Number(value.toPrecision(3)));
    else {
      const [mantissa, exponent] = value.toExponential(2).split("e");
      text = `${Number(mantissa)}e${Number(exponent)}`;
    }
    return text.replaceAll("-", "−");
  },

  /** Whether a reading is NaN or infinite. */
  isBad: (value) => typeof value === "string",

  /** Make the headings of a table sort it; cells whose `data-key` is a number are sorted as numbers. */
  sortable(table) {
    const body = table.tBodies[0];
    const headings = [...table.tHead.rows[0].cells];
    const size = (text) => (text === "" || Number.isNaN(Number(text)) ? Infinity : Number(text));
    headings.forEach((heading, column) => {
      const button = page.make("button", heading.textContent, "sort");
      button.type = "button";
      heading.replaceChildren(button);
      heading.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const rising = heading.getAttribute("aria-sort") !== "ascending";
        for (const other of headings) other.setAttribute("aria-sort", "none");
        heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
        const rows = [...body.rows].map((row) => ({ row, cell: row.cells[column] }));
        const numeric = rows.every(({ cell }) => cell.dataset.key !== undefined);
        const compare = numeric
          ? (one, other) => Math.sign(size(one.cell.dataset.key) - size(other.cell.dataset.key)) || 0
          : (one, other) => one.cell.textContent.localeCompare(other.cell.textContent);
        rows.sort((one, other) => (rising ? compare(one, other) : compare(other, one)));
        body.append(...rows.map(({ row }) => row));
      });
    });
  },

  /** The rows of a line: what has no place on the axis is marked for the edge where it is drawn instead. */
  linePoints(edits, values, scale, site) {
    const fits = values.map((value) => typeof value === "number" && (scale !== "log" || value > 0));
    return edits.map((edit, at) => ({
      edit,
      site,
      value: fits[at] ? values[at] : null,
      above: values[at] === "NaN" || values[at] === "Infinity",
      below: values[at] === "-Infinity" || (scale === "log" && typeof values[at] === "number" && values[at] <= 0),
      lone: fits[at] && !fits[at - 1] && !fits[at + 1],
    }));
  },
};

/** Draws Vega-Lite charts by name, and changes what they show. */
class Charts {
  constructor(specs) {
    this.specs = specs;
    this.drawn = new Map();
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

  /** Put `sets` (rows by name of data set) and `signals` on the chart in the element `id`; draws it where need be.
      Among the signals, width (of one facet) and height are pixels. */
  draw(id, name, sets, signals = {}) {
    this.queue = this.queue.then(() => this.#draw(id, name, sets, signals)).catch((error) => {
      console.error(`chart ${name}: ${error.message}`);
    });
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
    if (new Set(sets.points?.map((row) => row.site)).size === 1) {
      for (const layer of spec.layer) if (layer.encoding.color?.legend) layer.encoding.color.legend = null;
    }
    const made = await vegaEmbed(page.at(id), spec, {
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

  /** Change data sets and signals of every chart that has them. */
  async change(sets, signals = {}) {
    for (const [id, chart] of this.drawn) {
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
