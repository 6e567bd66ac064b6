// From a reading to a place: logarithmic, linear, or both where a few values would flatten all others.

import { number } from "./dom.js";

const SUPER = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

/** Whether a reading has a place on the scale; NaN and ∞ have none, and 0 has no logarithm. */
export function drawable(value, log) {
  return Number.isFinite(value) && (!log || value > 0);
}

/** 10⁵, 0.01, 300. */
export function tick(value) {
  const size = Math.abs(value);
  if (size > 0 && (size >= 1e4 || size < 1e-2)) {
    const exponent = Math.floor(Math.log10(size) + 1e-9);
    const factor = exponent > -300 ? size / 10 ** exponent : 1;
    const power = `10${[...String(exponent)].map((char) => SUPER[char]).join("")}`;
    return (value < 0 ? "−" : "") + (Math.abs(factor - 1) < 1e-6 ? power : `${number(factor)}·${power}`);
  }
  return number(value);
}

function steps(low, high, most) {
  const raw = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  const found = [];
  for (let place = Math.ceil(low / step); place * step <= high + 1e-9 * step; place += 1) {
    found.push(Number((place * step).toPrecision(12)));
  }
  return found;
}

/**
 * A scale over `values` (drawable ones only). Returns place(value) from 0 to 1, ticks, and whether there is anything.
 * pad: how much of the range stays free at both ends.
 */
export function scaleOf(values, log, pad = 0.06) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (low > high) return { place: () => 0.5, ticks: [], low: NaN, high: NaN, empty: true };
  if (!log && flattens(values)) return symmetric(values, low, high, pad);
  let [from, to] = log ? [Math.log10(low), Math.log10(high)] : [low, high];
  const room = (to - from) * pad || (pad ? (log ? 0.3 : 0.05 * Math.abs(from) || 0.5) : 0);
  from -= room;
  to += room;
  const span = to - from || 1;
  const place = (value) => ((log ? Math.log10(value) : value) - from) / span;
  let ticks;
  if (!log) ticks = steps(from, to, 4);
  else if (span < 0.9) ticks = steps(10 ** from, 10 ** to, 4).filter((value) => value > 0);
  else {
    const whole = [];
    const step = Math.max(1, Math.ceil(span / 5));
    for (let power = Math.ceil(from / step) * step; power <= to; power += step) whole.push(10 ** power);
    ticks = whole.length > 1 ? whole : whole.flatMap((value) => [value * 0.3, value, value * 3]);
    ticks = ticks.filter((value) => place(value) >= 0 && place(value) <= 1);
  }
  return { place, ticks, low, high, empty: false };
}

function typicalSize(values) {
  const sizes = Float64Array.from(values, Math.abs).filter((size) => size > 0).sort();
  return { typical: sizes[Math.floor(sizes.length / 2)], largest: sizes[sizes.length - 1], many: sizes.length };
}

function flattens(values) {
  const { typical, largest, many } = typicalSize(values);
  return many > 2 && largest > 300 * typical;
}

function symmetric(values, low, high, pad) {
  const { typical } = typicalSize(values);
  const bend = (value) => Math.asinh(value / typical);
  const room = (bend(high) - bend(low)) * pad;
  const from = bend(low) - room;
  const span = bend(high) + room - from;
  const powers = [];
  const first = Math.ceil(Math.log10(typical));
  const last = Math.floor(Math.log10(Math.max(Math.abs(low), Math.abs(high))));
  const step = Math.max(1, Math.ceil((last - first) / 3));
  for (let power = first; power <= last; power += step) powers.push(10 ** power);
  const place = (value) => (bend(value) - from) / span;
  const apart = powers.filter((value) => place(value) - place(0) > 0.1);
  const ticks = [...apart.map((value) => -value).reverse(), 0, ...apart].filter((value) => value >= low && value <= high);
  return { place, ticks, low, high, empty: false };
}

/** Whole edit numbers for an axis of `width` pixels. */
export function editTicks(first, last, width) {
  if (last <= first) return [first];
  const ticks = steps(first, last, Math.max(2, Math.min(14, width / 70)));
  return ticks.filter((value) => Number.isInteger(value));
}
