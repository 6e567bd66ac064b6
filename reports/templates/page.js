"use strict";
/* What all pages share: the data that came with them, numbers as all reports write them, and tables that sort.
   Text from a run is only ever put in place with textContent. */

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

  /** What a base64 text of deflated text holds. */
  async inflate(text) {
    const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).text();
  },

  /** The value of a base64 text of deflated JSON. */
  unpack: async (text) => JSON.parse(await page.inflate(text)),

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
