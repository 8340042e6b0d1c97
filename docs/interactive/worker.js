/* The worker: loads the files, then writes all texts that the page asks for side by side, a token
   each in turn, so that a new question can interrupt an old one.

   From the page:  {kind: "load", total}   {kind: "write", slot, serial, task, traced}
                   {kind: "inspect", slot, serial, at}
   To the page:    {kind: "loading", bytes, total}   {kind: "ready", simd}
                   {kind: "text", slot, serial, text, done}   {kind: "trace", slot, serial, trace}
                   {kind: "inspected", slot, numbers}   {kind: "failed", slot, serial, message} */

import { Live, Writing } from "./writing.js";

const FILES = {
  config: "config.json",
  vocab: "vocab.json",
  merges: "merges.txt",
  weights: "mini.safetensors",
  prefixes: "prefixes.safetensors",
  steps: "steps.safetensors",
};
let live = null;
const writings = new Map(); // by slot: {serial, writing}, finished ones too
let running = false;

/* A file as an ArrayBuffer; `told` hears of each piece that has come. */
async function download(name, told) {
  const answer = await fetch(name);
  if (!answer.ok)
    throw new Error(
      `${name} is not there (HTTP ${answer.status}). "make docs" builds the site with it.`,
    );
  const pieces = [],
    reader = answer.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return new Blob(pieces).arrayBuffer();
    pieces.push(value);
    told(value.length);
  }
}

async function load(total) {
  let bytes = 0;
  const told = (n) => postMessage({ kind: "loading", bytes: (bytes += n), total });
  const found = await Promise.all(Object.values(FILES).map((name) => download(name, told)));
  const files = Object.fromEntries(Object.keys(FILES).map((key, i) => [key, found[i]]));
  const text = (buffer) => new TextDecoder().decode(buffer);
  const [config, vocab] = [JSON.parse(text(files.config)), JSON.parse(text(files.vocab))];
  const prefixes = [files.prefixes, files.steps];
  live = new Live({ ...files, config, vocab, prefixes, merges: text(files.merges) });
  postMessage({ kind: "ready", simd: live.model.simd });
}

async function run() {
  running = true;
  for (;;) {
    const open = [...writings].filter(([, { writing }]) => !writing.done);
    if (!open.length) break;
    for (const [slot, { serial, writing, traced }] of open) {
      attempt(slot, serial, () => {
        writing.next();
        postMessage({ kind: "text", slot, serial, text: writing.text(), done: writing.done });
        if (writing.done && traced)
          postMessage({ kind: "trace", slot, serial, trace: writing.trace() });
      });
    }
    await new Promise((resolve) => setTimeout(resolve)); // messages of the page come in here
  }
  running = false;
}

function attempt(slot, serial, work) {
  try {
    return work();
  } catch (error) {
    writings.delete(slot);
    postMessage({ kind: "failed", slot, serial, message: error.message });
  }
}

onmessage = ({ data: { kind, slot, serial, task, traced, at, total } }) => {
  if (kind === "load")
    load(total).catch((error) => postMessage({ kind: "failed", message: error.message }));
  if (kind === "write") {
    attempt(slot, serial, () =>
      writings.set(slot, { serial, traced, writing: new Writing(live, task) }),
    );
    if (!running) run();
  }
  if (kind === "inspect")
    attempt(slot, serial, () =>
      postMessage({ kind: "inspected", numbers: writings.get(slot).writing.inspect(...at) }),
    );
};
