// Elements and numbers. Text goes in as text nodes only: nothing from a run is ever parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** An HTML element. A function among the attributes is a listener for the event of that name. */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** Puts `children` in place of what `node` holds. */
export function show(node, ...children) {
  node.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
}

/** 300, 0.032, 3.2e5, NaN, ∞: as on the other pages of stabilitylab. */
export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  let text;
  if (Number.isInteger(value) && size < 1e6) text = value.toLocaleString("en-US");
  else if (size >= 1e-3 && size < 1e5) {
    text = size >= 10 ** digits ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(digits)));
  } else {
    const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
    text = `${Number(mantissa)}e${Number(exponent)}`;
  }
  return text.replace("-", "−");
}

/** All digits that tell this float64 from its neighbours. */
export function exact(value) {
  return Number.isFinite(value) ? String(value) : number(value);
}

/** "1 edit", "12 edits". */
/** What there is to say of a run without a verdict yet. */
export function waiting(run) {
  return run.of ? `judging: ${run.judged.toLocaleString("en-US")} of ${count(run.of, "edit")}` : "reading …";
}

export function count(many, word) {
  return `${many.toLocaleString("en-US")} ${word}${many === 1 ? "" : "s"}`;
}
