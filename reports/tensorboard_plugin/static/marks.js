// The edits that every chart marks: onset dashed, alarm dotted, first bad and the end solid.

const LOOKS = { onset: ["onset", [5, 3]], alarm: ["alarm", [1.5, 2.5]], "first bad": ["first-bad", []], "NaN or ∞": ["first-bad", []], collapse: ["first-bad", []] };

/** One mark an edit, in order, with colour and dash. */
export function grouped(marks) {
  const at = new Map();
  for (const mark of marks) at.set(mark.edit, [...(at.get(mark.edit) ?? []), mark.name]);
  return [...at].sort((left, right) => left[0] - right[0]).map(([edit, names]) => {
    const [colour, dash] = LOOKS[names[names.length - 1]];
    return { edit, name: names.join(" · "), colour, dash };
  });
}

/**
 * Where the names of marks go, so that none lies on another. marks: as `grouped` gives them. at(edit): the place of its
 * line; wide(words): a width. Returns { places: [{ mark, words, start, row }], rows }; row 0 is the lowest.
 */
export function named(marks, at, wide, left, right) {
  const ends = [];
  const places = marks.map((mark) => {
    const words = `${mark.name} ${mark.edit}`;
    const size = wide(words);
    const start = Math.max(left, Math.min(right - size, at(mark.edit) - size / 2));
    let row = ends.findIndex((end) => end <= start);
    if (row < 0) row = ends.length;
    ends[row] = start + size + 7;
    return { mark, words, start, row };
  });
  return { places, rows: ends.length };
}
