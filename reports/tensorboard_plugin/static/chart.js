// Lines over edits as SVG. What is no finite number stands in a lane at the top, zero on a log axis in one below.

import { svg } from "./dom.js";
import { grouped, named } from "./marks.js";
import { drawable, editTicks, scaleOf, tick } from "./scale.js";

const LANE = 15;
const DOTTED = 80;

/**
 * series: [{ name, edits, values, taken, colour, dashed, faint }]; values and taken as long as edits. options: { log, marks,
 * width, height, label, edit, pick(edit), small }. Returns an <svg>.
 */
export function lineChart(series, options) {
  const { log, marks = [], width, height, label, edit = null, pick = null, small = false } = options;
  const finite = [];
  let above = false;
  let below = false;
  for (const line of series) {
    line.values.forEach((value, at) => {
      if (!line.taken[at]) return;
      if (drawable(value, log)) finite.push(value);
      else if (Number.isNaN(value) || value === Infinity) above = true;
      else below = true;
    });
  }
  const [first, last] = [Math.min(...series.map((line) => line.edits[0])), Math.max(...series.map((line) => line.edits[line.edits.length - 1]))];
  const scale = scaleOf(finite, log);
  const left = 50;
  const right = width - 16;
  const x = (at) => left + ((at - first + 0.5) / (last - first + 1)) * (right - left);
  const known = grouped(marks);
  const names = named(small ? [] : known, x, (words) => 6.6 * words.length, left, width);
  const top = 6 + 12 * names.rows;
  const bottom = height - 20;
  const high = top + (above ? LANE : 0);
  const low = bottom - (below ? LANE : 0);
  const y = (value) => low - scale.place(value) * (low - high);
  const root = svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label });
  const add = (...nodes) => root.append(...nodes);
  if (edit !== null) {
    const band = Math.max(5, (right - left) / (last - first + 1));
    add(svg("rect", { class: "chosen", x: x(edit) - band / 2, y: top, width: band, height: bottom - top }));
  }

  for (const value of scale.ticks) {
    if ((above && y(value) < high + 8) || (below && y(value) > low - 8)) continue; // the lane's own name stands there
    add(svg("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }),
      svg("text", { class: "tick", x: left - 6, y: y(value) + 4, "text-anchor": "end" }, tick(value)));
  }
  if (above) add(svg("rect", { class: "lane-bad", x: left, y: top, width: right - left, height: LANE }), svg("text", { class: "lane bad", x: left - 6, y: top + 11, "text-anchor": "end" }, "NaN, ∞"));
  if (below) add(svg("rect", { class: "lane-low", x: left, y: bottom - LANE, width: right - left, height: LANE }), svg("text", { class: "lane", x: left - 6, y: bottom - 4, "text-anchor": "end" }, log ? "≤ 0" : "−∞"));
  add(svg("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  for (const value of editTicks(first, last, right - left)) add(svg("text", { class: "tick", x: x(value), y: bottom + 14, "text-anchor": "middle" }, value));

  for (const mark of known) add(svg("line", { class: `mark ${mark.colour}`, "stroke-dasharray": mark.dash.join(" "), x1: x(mark.edit), x2: x(mark.edit), y1: top, y2: bottom }));
  for (const { mark, words, start, row } of names.places) add(svg("text", { class: `mark-name ${mark.colour}`, x: start, y: top - 4 - 12 * row }, words));

  for (const line of series) {
    const group = svg("g", { class: line.faint ? "line faint" : "line", stroke: line.colour, fill: line.colour, "data-name": line.name });
    let path = "";
    let pen = false;
    const lone = [];
    line.values.forEach((value, at) => {
      const good = line.taken[at] && drawable(value, log);
      if (good) {
        path += `${pen ? "L" : "M"}${x(line.edits[at]).toFixed(1)},${y(value).toFixed(1)}`;
        const next = at + 1 < line.values.length && line.taken[at + 1] && drawable(line.values[at + 1], log);
        if (!pen && !next) lone.push([x(line.edits[at]), y(value)]);
      } else if (line.taken[at] && !line.faint) {
        const up = Number.isNaN(value) || value === Infinity;
        const [px, py] = [x(line.edits[at]), up ? top + LANE / 2 : bottom - LANE / 2];
        if (up) group.append(svg("path", { class: "cross", d: `M${px - 3},${py - 3}l6,6m0,-6l-6,6` }));
        else group.append(svg("circle", { class: "ring", cx: px, cy: py, r: 2.6 }));
      }
      pen = Boolean(good);
    });
    if (path) group.append(svg("path", { class: "trace", d: path, ...(line.dashed ? { "stroke-dasharray": "6 4" } : {}) }));
    const dots = line.faint ? [] : line.edits.length <= DOTTED && !small
      ? [...line.values].flatMap((value, at) => (line.taken[at] && drawable(value, log) ? [[x(line.edits[at]), y(value)]] : []))
      : lone;
    for (const [cx, cy] of dots) group.append(svg("circle", { class: "dot", cx, cy, r: small ? 1.8 : 2.6 }));
    add(group);
  }
  if (scale.empty && !above && !below) add(svg("text", { class: "tick", x: (left + right) / 2, y: (top + bottom) / 2, "text-anchor": "middle" }, "no reading"));
  if (pick) {
    root.classList.add("pickable");
    root.addEventListener("click", (event) => {
      const box = root.getBoundingClientRect();
      const at = ((event.clientX - box.left) * (width / box.width) - left) / (right - left);
      pick(Math.round(first - 0.5 + at * (last - first + 1)));
    });
  }
  return root;
}
