/* What a text does with the values of its table, as minprefix/metrics/quick.py looks for them
   (`facts`): by words, not by meaning. The patterns and the known values come from there. */
"use strict";

const blank = (text) => text.replace(/[\s-]/g, " ").toLowerCase();

/* Where the text, from `blank`, states a field's value: [[from, to], ...]; null = cannot be told. */
function stated(text, field, value, { phrases }) {
  const found = (pattern, within) =>
    Array.from(within.matchAll(pattern), (m) => [m.index, m.index + m[0].length]);
  if (value !== "yes" && value !== "no") return found(wholeWords(value), text);
  if (!phrases[field]) return null;
  const [yes, no] = phrases[field].map((pattern) => new RegExp(pattern, "gu"));
  return value === "no"
    ? found(no, text)
    : found(
        yes,
        text.replace(no, (m) => "|".repeat(m.length)),
      );
}

function wholeWords(value) {
  const escaped = blank(value)
    .replace(/[.*+?^${}()|[\]\\]/g, "\\$&")
    .replace(/ +/g, " +");
  return new RegExp(`(?<![\\p{L}\\p{N}_])${escaped}(?![\\p{L}\\p{N}_])`, "gu");
}

/* {kept, lost, invented}: lists of {field, value, places}. `table` is a list of [field, value];
   `known` has the values that fields can have. */
function factsOf(text, table, data) {
  const plain = blank(text),
    own = table.map(([, value]) => blank(value));
  const rest = own
    .toSorted((a, b) => b.length - a.length)
    .reduce((left, value) => left.replace(wholeWords(value), (m) => "|".repeat(m.length)), plain);
  const facts = { kept: [], lost: [], invented: [] };
  for (const [field, value] of table) {
    const places = stated(plain, field, value, data);
    if (places) facts[places.length ? "kept" : "lost"].push({ field, value, places });
  }
  for (const [field, values] of Object.entries(data.known)) {
    for (const value of values) {
      const yesNo = value === "yes" || value === "no";
      if (
        table.some(([f, v]) => f === field && v === value) ||
        (!yesNo && own.includes(blank(value)))
      )
        continue;
      const places = stated(yesNo ? plain : rest, field, value, data) ?? [];
      if (places.length) facts.invented.push({ field, value, places });
    }
  }
  return facts;
}
