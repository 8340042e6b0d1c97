/* What the reader has chosen, and the cards: what each asks, of the worker or of the recorded answers
   (data.js), and how a text is shown. The recorded answers serve before the model is loaded, and
   where the page was opened as a file. Read `state`, `CARDS`, then `write` and `say`. */
"use strict";

const data = window.LIVE,
  { layers: L, heads: H } = data;
const at = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const FULL = "e2e-P10"; // the unchanged prefix
const KEPT = Math.max(0, data.steps.indexOf(data.kept)); // the step at which it was kept
const USERS = {
  e2e: "the restaurant prefix",
  notes: "the notes prefix",
  "e2e keys": "keys of the restaurant prefix, values of the notes prefix",
  "notes keys": "keys of the notes prefix, values of the restaurant prefix",
};
const UNCHANGED = {
  who: "e2e",
  P: 10,
  step: KEPT,
  gate: 1,
  reads: "table",
  positionsOff: [],
  layersOff: [],
};
const state = {
  ...UNCHANGED,
  table: { ...data.presets[0] },
  template: data.template,
  note: data.note,
  token: 0,
  layer: 6,
  head: 0,
};
let worker = null,
  live = false,
  trace = null;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false)
      made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

const tableRows = () =>
  data.fields
    .map((field) => [field, (state.table[field] ?? "").trim()])
    .filter(([, value]) => value);
const tableText = () =>
  tableRows()
    .map(([field, value]) => `${field} : ${value}`)
    .join(" | ");
const visible = (token) => (/^\s+$/.test(token) ? "␣" : token.replace(/^ /, "·"));
const percent = (x) =>
  x > 0 && x < 0.0005 ? "<0.1" : (100 * x).toFixed(x > 0 && x < 0.0995 ? 1 : 0);

/* Bytes as text, in powers of 1000. */
function bytes(n) {
  const units = ["bytes", "KB", "MB", "GB", "TB"],
    i = Math.min(4, Math.floor(Math.log10(n) / 3));
  return `${Number((n / 1000 ** i).toPrecision(3)).toLocaleString("en")} ${units[i]}`;
}

const names = () =>
  ({
    e2e: [ownName(), ownName()],
    notes: ["notes-P10", "notes-P10"],
    "e2e keys": [FULL, "notes-P10"],
    "notes keys": ["notes-P10", FULL],
  })[state.who];
const ownName = () =>
  state.P === 10 && state.step !== KEPT ? `${FULL}/${data.steps[state.step]}` : `e2e-P${state.P}`;
const lengthNow = () => (state.who === "e2e" ? state.P : 10);

/* {source, ask, prefix} of the changed prefix, and under which key its answer may be recorded. */
function ownTask() {
  const [keys, values] = names(),
    { gate, positionsOff, layersOff } = state;
  const shown = positionsOff.length
    ? Array.from({ length: lengthNow() }, (_, p) => !positionsOff.includes(p))
    : null;
  const changed = gate !== 1 || shown || layersOff.length;
  return {
    source: state.reads === "note" ? state.note : tableText(),
    ask: {},
    prefix: { keys, values, gate, shown, layersOff },
    key: changed ? null : keys === values ? keys : `${keys}+${values}`,
  };
}

const prefixCard = () => ({
  source: ownTask().source,
  ask: {},
  prefix: { keys: FULL, values: FULL },
  key: FULL,
});
const { searched, finetuned } = data;
const CARDS = {
  frozen: {
    title: "The frozen model",
    about:
      "It reads the table and a mark that the text has ended. Nobody told it what to do, so it begins some other text.",
    task: () => ({ source: tableText(), ask: {}, prefix: null, key: "frozen" }),
  },
  instruction: {
    title: "An instruction",
    about: "The frozen model is asked in words. Change them: {table} stands for the table.",
    task: () => ({
      source: tableText(),
      ask: { template: state.template },
      prefix: null,
      key: state.template === data.template && "instruction",
    }),
  },
  searched: searched && {
    title: "A searched prompt",
    about: `${searched.before.length + searched.after.length} tokens that a search of ${searched.steps} steps chose, before and after the table: “${searched.text[0]}” … “${searched.text[1]}”.`,
    task: () => ({ source: tableText(), ask: searched, prefix: null, key: "searched" }),
  },
  prefix: {
    title: "A trained prefix",
    about:
      "It reads the same as the frozen model on its own, with 10 trained positions before the table.",
    task: () => ({ ...prefixCard(), source: tableText() }),
  },
  finetuned: finetuned && {
    title: "A fine-tuned copy",
    about: `All weights trained, ${finetuned.steps} steps of ${finetuned.batch_size} texts. Its weights are not part of this page: the answers to the prepared tables are recorded.`,
    task: () => ({ source: tableText(), key: "finetuned" }),
    recorded: true,
  },
  unchanged: {
    title: "The unchanged prefix",
    about: "10 positions for restaurants, trained to the end.",
    task: prefixCard,
  },
  own: { title: "Your changed prefix", about: "", task: ownTask },
};
const FIRST = ["frozen", "instruction", "searched", "prefix", "finetuned"],
  SECOND = ["unchanged", "own"];
const serials = {};

function makeCard(slot) {
  const { title, about } = CARDS[slot];
  const extra =
    slot === "instruction"
      ? [element("textarea", { id: "template", rows: 2, "aria-label": "The instruction" })]
      : [];
  return element(
    "section",
    {
      class: `card ${["prefix", "own"].includes(slot) ? "prefix" : ""}`,
      id: slot,
      "aria-label": title,
    },
    element("h3", {}, title),
    element("p", { class: "about" }, about),
    ...extra,
    element("p", { class: "said", "aria-live": slot === "own" ? "polite" : null }),
    element("p", { class: "counts" }),
  );
}

/* Asks for a card's text: of the worker if there is one, else of what is recorded. */
function write(slot) {
  if (!CARDS[slot]) return;
  const { key, ...task } = CARDS[slot].task(),
    serial = (serials[slot] = (serials[slot] ?? 0) + 1);
  if (slot === "own") setTrace(null);
  if (live && !CARDS[slot].recorded) {
    at(slot).querySelector(".said").setAttribute("aria-busy", "true");
    worker.postMessage({ kind: "write", slot, serial, task, traced: slot === "own" });
    return;
  }
  const text = data.texts[task.source]?.[key];
  const why = CARDS[slot].recorded
    ? "No answer was recorded for this table."
    : "No recorded answer for this. Load the model to see it written.";
  if (text === undefined) say(slot, why, true);
  else say(slot, text);
  if (slot === "own" && data.trace?.source === task.source && data.trace.key === key)
    setTrace(unpacked(data.trace));
}

const writeAll = () => [...FIRST, ...SECOND].forEach(write);
const writeSecond = () => SECOND.forEach(write);

/* Shows a card's text, with marks where it speaks of a restaurant; `note` = the page's own words. */
function say(slot, words, note = false) {
  const said = at(slot).querySelector(".said"),
    counts = at(slot).querySelector(".counts");
  said.classList.toggle("none", note || !words);
  said.setAttribute("aria-busy", "false");
  counts.replaceChildren();
  if (note || !words || CARDS[slot].task().source !== tableText())
    return said.replaceChildren(words || "(it writes nothing)");
  const facts = factsOf(words, tableRows(), data);
  const marks = ["invented", "kept"].flatMap((kind) =>
    facts[kind].flatMap((fact) => fact.places.map(([from, to]) => ({ from, to, kind, fact }))),
  );
  let end = 0;
  said.replaceChildren(
    ...marks
      .sort((a, b) => a.from - b.from)
      .flatMap(({ from, to, kind, fact }) => {
        if (from < end) return [];
        const before = words.slice(end, from);
        end = to;
        return [
          before,
          element("mark", { class: kind, title: `${fact.field}: ${kind}` }, words.slice(from, to)),
        ];
      }),
    words.slice(end),
  );
  const list = (kind) =>
    facts[kind].flatMap(({ field, value }) => [
      " ",
      element("span", { class: kind }, /^(yes|no)$/.test(value) ? `${field}: ${value}` : value),
    ]);
  counts.append(`${facts.kept.length} of ${facts.kept.length + facts.lost.length} values kept`);
  if (facts.lost.length) counts.append("; lost:", ...list("lost"));
  if (facts.invented.length) counts.append("; invented:", ...list("invented"));
}
