// Layers by edits on a canvas. Every cell is a reading; where cells are narrower than a pixel the worst of them shows.

import { el, number, exact, show } from "./dom.js";
import { grouped, named } from "./marks.js";
import { drawable, editTicks, scaleOf, tick } from "./scale.js";

const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
const BAD = "#b31440";
const ZERO = "#c3d6e8";
const TOP = 10;
const NAME = 12;
const BOTTOM = 24;
const WIDEST = 34;
const READABLE = 26;

const SHADES = (() => {
  const stops = CIVIDIS.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  return Array.from({ length: 256 }, (_, at) => {
    const place = (at / 255) * (stops.length - 1);
    const left = Math.min(stops.length - 2, Math.floor(place));
    const mix = stops[left].map((from, band) => Math.round(from + (place - left) * (stops[left + 1][band] - from)));
    return `rgb(${mix.join(",")})`;
  });
})();

const shade = (place) => SHADES[Math.max(0, Math.min(255, Math.round(place * 255)))];
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** The map's element with `update(content)` and `select(row, column)`. chosen(row, column) is called on a choice. */
export class Heatmap {
  constructor(chosen) {
    this.chosen = chosen;
    this.zoom = 0;
    this.row = 0;
    this.column = 0;
    this.labels = el("canvas", { class: "map-labels", "aria-hidden": "true" });
    this.canvas = el("canvas", { class: "map-cells", "aria-hidden": "true" });
    this.spacer = el("div", { class: "map-spacer" }, this.canvas);
    this.readout = el("p", { class: "readout", id: "map-readout", "aria-live": "polite" });
    this.scroller = el("div", { class: "map-scroll", tabindex: "0", role: "application", "aria-roledescription": "heatmap",
      "aria-describedby": "map-readout", scroll: () => this.draw(), keydown: (event) => this.key(event),
      focus: () => this.draw(), blur: () => this.draw() }, this.spacer);
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => this.say(this.row, this.column));
    this.canvas.addEventListener("click", (event) => {
      const at = this.cell(event);
      if (at) this.choose(...at);
    });
    this.out = el("button", { type: "button", click: () => this.zoomTo(this.zoom - 1), "aria-label": "Narrower cells" }, "−");
    this.in = el("button", { type: "button", click: () => this.zoomTo(this.zoom + 1), "aria-label": "Wider cells" }, "+");
    this.fit = el("button", { type: "button", click: () => this.zoomTo(0) }, "whole run");
    this.key_ = el("div", { class: "map-key" });
    this.note = el("p", { class: "muted small" });
    this.element = el("div", {}, el("div", { class: "map" }, this.labels, this.scroller),
      el("div", { class: "map-foot" }, this.key_, el("div", { class: "zoom", role: "group", "aria-label": "Width of the cells" }, this.out, this.fit, this.in)),
      this.note, this.readout);
    new ResizeObserver(() => this.layout()).observe(this.element);
  }

  /** content: { block, rows: names, edits: numbers, metric, marks, findings: [{row, column}], flagged: columns } */
  update(content, row, column) {
    this.content = content;
    this.marks = grouped(content.marks).filter((mark) => content.edits.includes(mark.edit));
    this.top = TOP + NAME * this.marks.length;
    const { block, metric } = content;
    this.log = metric.scale === "log";
    const good = block.values.filter((value, at) => block.taken[at] && drawable(value, this.log));
    this.scale = scaleOf(good, this.log, 0);
    this.scroller.setAttribute("aria-label", `Heatmap of ${metric.name}: ${content.rows.length} sites by ${content.edits.length} edits. Arrow keys move, Enter opens the layer.`);
    this.select(row, column);
    this.layout();
    this.legend(good.length);
  }

  select(row, column) {
    this.row = Math.max(0, Math.min(this.content.rows.length - 1, row));
    this.column = Math.max(0, Math.min(this.content.edits.length - 1, column));
    this.say(this.row, this.column);
    this.draw();
  }

  choose(row, column) {
    this.select(row, column);
    this.chosen(this.row, this.column);
  }

  layout() {
    if (!this.content) return;
    const width = this.element.clientWidth;
    if (!width) return;
    const rows = this.content.rows.length;
    this.height = rows <= 12 ? 24 : rows <= 30 ? 16 : rows <= 80 ? 12 : 7;
    const context = this.labels.getContext("2d");
    context.font = this.font();
    const widest = Math.max(...this.content.rows.map((name) => context.measureText(name).width), 20);
    this.gutter = Math.ceil(Math.min(widest + 12, width * 0.34));
    this.view = width - this.gutter;
    this.fitted = Math.min(WIDEST, this.view / this.content.edits.length);
    while (this.zoom > 0 && this.wide() > WIDEST * 2) this.zoom -= 1;
    this.size(this.labels, this.gutter);
    this.size(this.canvas, this.view);
    this.spacer.style.width = `${Math.max(this.view, Math.ceil(this.wide() * this.content.edits.length))}px`;
    this.out.disabled = this.fit.disabled = this.zoom === 0;
    this.in.disabled = this.wide() >= READABLE;
    const merged = this.wide() < 1;
    show(this.note, merged ? `Cells are narrower than a pixel here: of those that share one the largest shows, and NaN and ∞ always do. Widen the cells (+) to see each.` : "");
    this.note.hidden = !merged;
    this.draw();
  }

  size(canvas, width) {
    const ratio = window.devicePixelRatio || 1;
    const height = this.top + BOTTOM + this.height * this.content.rows.length;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
  }

  wide() {
    return this.fitted * 2 ** this.zoom;
  }

  font() {
    return `${this.height >= 16 ? 12 : this.height >= 12 ? 10.5 : 9}px system-ui, "DejaVu Sans", sans-serif`;
  }

  zoomTo(zoom) {
    const middle = this.column / Math.max(1, this.content.edits.length - 1);
    this.zoom = Math.max(0, zoom);
    this.layout();
    this.scroller.scrollLeft = middle * this.wide() * this.content.edits.length - this.view / 2;
    this.draw();
  }

  draw() {
    if (!this.content || !this.view) return;
    this.drawLabels();
    const context = this.canvas.getContext("2d");
    const height = this.height;
    const rows = this.content.rows.length;
    const bottom = this.top + rows * height;
    context.clearRect(0, 0, this.view, bottom + BOTTOM);
    context.fillStyle = ink("--blank");
    context.fillRect(0, this.top, Math.min(this.view, this.x(this.content.edits.length)), rows * height);
    for (let row = 0; row < rows; row += 1) this.drawRow(context, row);
    this.drawMarks(context, bottom);
    this.drawFindings(context);
    this.drawChoice(context);
    this.drawAxis(context, bottom);
  }

  x(column) {
    return Math.round(column * this.wide() - this.scroller.scrollLeft);
  }

  drawRow(context, row) {
    const { block, edits } = this.content;
    const wide = this.wide();
    const first = Math.max(0, Math.floor(this.scroller.scrollLeft / wide));
    const last = Math.min(edits.length, Math.ceil((this.scroller.scrollLeft + this.view) / wide) + 1);
    const y = this.top + row * this.height;
    const tall = this.height - (this.height >= 12 ? 1 : 0);
    let from = null;
    let worst = -1;
    for (let column = first; column <= last; column += 1) {
      const x = this.x(column);
      if (from !== null && (x > from || column === last)) {
        this.paint(context, from, y, Math.max(1, x - from - (wide >= 8 ? 1 : 0)), tall, worst);
        worst = -1;
        from = null;
      }
      if (column === last) break;
      if (from === null) from = x;
      const at = row * edits.length + column;
      if (block.taken[at]) worst = Math.max(worst, this.rank(block.values[at]));
    }
  }

  /** −1 not taken, −0.5 zero without a logarithm, 0 to 1 a shade, 2 no finite number. */
  rank(value) {
    if (!Number.isFinite(value)) return 2;
    if (this.log && value <= 0) return -0.5;
    return this.scale.low === this.scale.high ? 0.5 : Math.max(0, Math.min(1, this.scale.place(value)));
  }

  paint(context, x, y, wide, tall, rank) {
    if (rank === -1) return;
    context.fillStyle = rank === 2 ? BAD : rank === -0.5 ? ZERO : shade(rank);
    context.fillRect(x, y, wide, tall);
    if (rank !== 2 || this.wide() < 8 || tall < 9) return;
    const [middle, centre, arm] = [x + wide / 2, y + tall / 2, Math.min(wide, tall) / 4];
    context.strokeStyle = "#fff";
    context.lineWidth = 1.2;
    context.beginPath();
    for (const side of [1, -1]) {
      context.moveTo(middle - arm, centre - side * arm);
      context.lineTo(middle + arm, centre + side * arm);
    }
    context.stroke();
  }

  drawMarks(context, bottom) {
    const { edits, flagged } = this.content;
    const marks = this.marks;
    context.fillStyle = ink("--muted");
    for (const column of flagged) {
      const x = this.x(column + 0.5);
      context.fillRect(x - 1, this.top - 6, Math.max(2, Math.min(4, this.wide() / 3)), 5);
    }
    context.font = `600 11px system-ui, "DejaVu Sans", sans-serif`;
    const at = (edit) => this.x(edits.indexOf(edit) + 0.5) + 0.5;
    for (const mark of marks) {
      context.strokeStyle = ink(`--${mark.colour}`);
      context.lineWidth = 1.5;
      context.setLineDash(mark.dash);
      context.beginPath();
      context.moveTo(at(mark.edit), this.top - 8);
      context.lineTo(at(mark.edit), bottom);
      context.stroke();
      context.setLineDash([]);
    }
    const near = marks.filter((mark) => at(mark.edit) >= -1 && at(mark.edit) <= this.view + 1);
    for (const { mark, words, start, row } of named(near, at, (text) => context.measureText(text).width, 0, this.view).places) {
      context.fillStyle = ink(`--${mark.colour}`);
      context.fillText(words, start, this.top - 11 - NAME * row);
    }
  }

  drawFindings(context) {
    if (this.wide() < 5) return;
    context.lineWidth = 1.5;
    for (const { row, column } of this.content.findings) {
      const x = this.x(column);
      const size = [this.x(column + 1) - x, this.height];
      context.strokeStyle = "#fff";
      context.beginPath();
      context.arc(x + size[0] / 2, this.top + (row + 0.5) * this.height, Math.min(size[0], size[1]) / 2 - 2, 0, 2 * Math.PI);
      context.stroke();
    }
  }

  drawChoice(context) {
    const wide = Math.max(4, this.x(this.column + 1) - this.x(this.column));
    const x = this.x(this.column) - (this.wide() < 4 ? 2 : 0);
    const y = this.top + this.row * this.height;
    context.lineWidth = document.activeElement === this.scroller ? 3 : 2;
    context.strokeStyle = ink("--paper");
    context.strokeRect(x - 2.5, y - 2.5, wide + 4, this.height + 4);
    context.strokeStyle = ink("--link");
    context.strokeRect(x - 1, y - 1, wide + 1, this.height + 1);
  }

  drawAxis(context, bottom) {
    const { edits } = this.content;
    context.fillStyle = ink("--muted");
    context.font = `11px system-ui, "DejaVu Sans", sans-serif`;
    context.textAlign = "center";
    const places = new Map(edits.map((edit, column) => [edit, column]));
    const [first, last] = [0, this.view].map((x) => edits[Math.max(0, Math.min(edits.length - 1, Math.floor((x + this.scroller.scrollLeft) / this.wide())))]);
    for (const edit of editTicks(first, last, this.x(edits.length) - Math.max(0, this.x(0)))) {
      if (!places.has(edit)) continue;
      const x = this.x(places.get(edit) + 0.5);
      if (x >= 4 && x <= this.view - 4) context.fillText(String(edit), Math.min(this.view - 12, Math.max(8, x)), bottom + 15);
    }
    context.textAlign = "left";
  }

  drawLabels() {
    const context = this.labels.getContext("2d");
    const rows = this.content.rows;
    context.clearRect(0, 0, this.gutter, this.top + BOTTOM + rows.length * this.height);
    context.font = this.font();
    context.textAlign = "right";
    context.textBaseline = "middle";
    const step = Math.ceil(12 / this.height);
    rows.forEach((name, row) => {
      if (row % step && row !== this.row) return;
      context.fillStyle = ink(row === this.row ? "--link" : "--muted");
      context.fillText(fitting(context, name, this.gutter - 8), this.gutter - 8, this.top + (row + 0.5) * this.height);
    });
    context.font = `11px system-ui, "DejaVu Sans", sans-serif`;
    context.fillStyle = ink("--muted");
    context.textBaseline = "alphabetic";
    context.fillText("edit", this.gutter - 8, this.top + rows.length * this.height + 15);
    context.textAlign = "left";
  }

  legend(any) {
    const { metric, block } = this.content;
    const unit = metric.unit && !["1", "—", "-"].includes(metric.unit) ? ` (${metric.unit})` : "";
    const stops = CIVIDIS.map((hex, at) => `${hex} ${(100 * at) / (CIVIDIS.length - 1)}%`);
    const bar = el("span", { class: "bar", "aria-hidden": "true" });
    bar.style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
    const swatch = (colour, words) => {
      const box = el("span", { class: "swatch", "aria-hidden": "true" });
      if (colour) box.style.background = colour;
      return el("span", { class: "keyed" }, box, words);
    };
    const has = (test) => block.values.some((value, at) => block.taken[at] && test(value));
    show(this.key_,
      any ? el("span", { class: "keyed" }, tick(this.scale.low), bar, `${tick(this.scale.high)}${unit}`) : null,
      has((value) => !Number.isFinite(value)) ? swatch(BAD, "NaN, ∞") : null,
      this.log && has((value) => Number.isFinite(value) && value <= 0) ? swatch(ZERO, "0") : null,
      block.taken.some((taken) => !taken) ? swatch(null, "not taken") : null,
      this.content.findings.length ? el("span", { class: "keyed" }, "○ evidence") : null);
  }

  cell(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left + this.scroller.scrollLeft) / this.wide());
    const row = Math.floor((event.clientY - box.top - this.top) / this.height);
    return row >= 0 && row < this.content.rows.length && column >= 0 && column < this.content.edits.length ? [row, column] : null;
  }

  hover(event) {
    const at = this.cell(event);
    this.canvas.style.cursor = at ? "pointer" : "default";
    this.say(...(at ?? [this.row, this.column]));
  }

  say(row, column) {
    const { block, rows, edits, metric } = this.content;
    const at = row * edits.length + column;
    const value = block.values[at];
    const words = block.taken[at] ? number(value, 4) : "not taken";
    const reading = el("strong", { "data-value": block.taken[at] ? exact(value) : "absent" }, words);
    show(this.readout, `${rows[row]} · edit ${edits[column]} · ${metric.name} = `, reading);
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.view / this.wide() / 2));
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], PageUp: [0, -page],
      PageDown: [0, page], Home: [0, -Infinity], End: [0, Infinity] };
    if (event.key === "Enter" || event.key === " ") this.choose(this.row, this.column);
    else if (event.key === "+" || event.key === "-") this.zoomTo(this.zoom + (event.key === "+" ? 1 : -1));
    else if (event.key in moves) {
      this.select(this.row + moves[event.key][0], this.column + moves[event.key][1]);
      const x = this.x(this.column);
      if (x < 0 || x + this.wide() > this.view) this.scroller.scrollLeft += x - this.view / 2;
    } else return;
    event.preventDefault();
  }
}

function fitting(context, name, width) {
  if (context.measureText(name).width <= width) return name;
  let kept = name;
  while (kept.length > 1 && context.measureText(`…${kept}`).width > width) kept = kept.slice(1);
  return `…${kept}`;
}
