/* The page: lambda = r / (1 + r), r = g exp(lse_P - lse_S), of the numbers that data.js holds. */
"use strict";

const data = window.PREFIX_DATA;
const T = data.tokens.length, L = data.layers, H = data.heads;
const LENGTHS = [0, ...data.prefixes.map((prefix) => prefix.P)];
let shownToken = data.prompt_len;
const at = (id) => document.getElementById(id);

/* base64 of little-endian int16 -> nats, in the order (L, H, T) */
function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float64Array.from({ length: bytes.length / 2 }, (_, i) => view.getInt16(2 * i, true) * data.nats);
}

const sums = new Map(
  data.prefixes.map((p) => [p.P, { lseP: unpacked(p.lse_p), lseS: unpacked(p.lse_s), loss: p.dev_loss }])
);

/* What the sliders say. */
function chosen() {
  const value = (id) => Number(at(id).value);
  return { P: LENGTHS[value("P")], g: value("g"), t: value("token"), layer: value("layer"), head: value("head") };
}

/* lse_P, lse_S, r and lambda of one layer, head and token; without a prefix Z_P = 0 and r = 0. */
function share({ P, g, t, layer, head }) {
  if (P === 0) return { lseP: -Infinity, lseS: NaN, r: 0, lambda: 0 };
  const i = (layer * H + head) * T + t, { lseP, lseS } = sums.get(P);
  const r = g * Math.exp(lseP[i] - lseS[i]);
  return { lseP: lseP[i], lseS: lseS[i], r, lambda: r / (1 + r) };
}

const visible = (token) => (/^\s+$/.test(token) ? "␣" : token.replace(/^ /, "·"));
const percent = (x) => (100 * x).toFixed(x > 0 && x < 0.095 ? 1 : 0);

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function showPositions({ P, t }, moved) {
  const offset = at("offset").checked ? P : 0;
  const cells = [];
  for (let p = 0; p < P; p++) {
    cells.push(element("div", { class: "prefix" }, element("span", { class: "what" }, "θ"),
      element("span", { class: "where" }, String(p))));
  }
  data.tokens.forEach((token, j) => cells.push(
    element("div", { class: "token", "aria-current": j === t ? "true" : null },
      element("span", { class: "what" }, visible(token)),
      element("span", { class: "where" }, String(j + offset)))));
  const strip = at("positions");
  strip.replaceChildren(...cells);
  const asked = cells[P + t];
  if (moved) strip.scrollLeft = asked.offsetLeft - strip.offsetLeft - strip.clientWidth / 2;
  const indices = P === 0 ? "is empty" : P === 1 ? "= {0}" : `= {0, …, ${P - 1}}`;
  at("positions-text").textContent =
    `${indices}: ${P === 0 ? "no prefix, the frozen model" : "these activations are read from the trained table, θ"}. ` +
    `Token t stands at t + ${offset}, so the ${T} tokens stand at ${offset} to ${offset + T - 1}.`;
}

/* One path for each kind of cell: query rows downwards, prefix columns first. */
function showMask({ P, t }) {
  const paths = { prefix: "", text: "", hidden: "" };
  for (let i = 0; i < T; i++) {
    for (let c = 0; c < P + T; c++) {
      const kind = c < P ? "prefix" : c - P <= i ? "text" : "hidden";
      paths[kind] += `M${c} ${i}h.86v.86h-.86z`;
    }
  }
  const svg = at("mask"), space = "http://www.w3.org/2000/svg";
  svg.setAttribute("viewBox", `-0.3 -0.3 ${P + T + 0.5} ${T + 0.5}`);
  const shapes = Object.entries(paths).map(([kind, d]) => {
    const path = document.createElementNS(space, "path");
    path.setAttribute("class", kind);
    path.setAttribute("d", d);
    return path;
  });
  const row = document.createElementNS(space, "rect");
  const place = { class: "row", x: -0.12, y: t - 0.12, width: P + t + 1.1, height: 1.1, rx: 0.2 };
  for (const [name, value] of Object.entries(place)) row.setAttribute(name, value);
  svg.replaceChildren(...shapes, row);
  const prefix = P === 0 ? "" : P === 1 ? "the prefix column and " : `all ${P} prefix columns and `;
  at("mask-text").textContent =
    `Rows are the ${T} tokens that ask, columns the ${P} + ${T} keys. Token ${t} (the outlined row) sees ` +
    `${prefix}tokens 0 to ${t}: ${P + t + 1} keys. ` +
    "Every token sees the whole prefix, so the prefix needs no mask.";
}

function showShares(now) {
  const { lseP, lseS, r, lambda } = share(now);
  at("lse-p").textContent = Number.isFinite(lseP) ? lseP.toFixed(3) : "−∞";
  at("lse-s").textContent = Number.isFinite(lseS) ? lseS.toFixed(3) : "not needed";
  at("r").textContent = r.toPrecision(4);
  at("lambda").textContent = lambda.toFixed(4);
  document.querySelectorAll("#tokens span").forEach((span, t) => {
    const x = share({ ...now, t }).lambda;
    span.style.setProperty("--share", `${100 * x}%`);
    span.toggleAttribute("aria-current", t === now.t);
    span.lastChild.textContent = percent(x);
  });
  let total = 0;
  document.querySelectorAll("#heat td").forEach((cell, i) => {
    const layer = Math.floor(i / H), head = i % H, x = share({ ...now, layer, head }).lambda;
    total += x;
    cell.style.setProperty("--share", `${100 * x}%`);
    cell.toggleAttribute("aria-current", layer === now.layer && head === now.head);
    cell.textContent = percent(x);
  });
  at("mean").textContent = ((100 * total) / (L * H)).toFixed(1);
}

function show() {
  const now = chosen();
  at("P-value").textContent = String(now.P);
  at("g-value").textContent = now.g.toFixed(2);
  at("token-value").textContent = `${now.t} “${visible(data.tokens[now.t])}”`;
  at("layer-value").textContent = String(now.layer);
  at("head-value").textContent = String(now.head);
  at("P").setAttribute("aria-valuetext", `P = ${now.P}`);
  at("token").setAttribute("aria-valuetext", `token ${now.t}, ${data.tokens[now.t]}`);
  showPositions(now, now.t !== shownToken);
  shownToken = now.t;
  showMask(now);
  showShares(now);
}

/* The slider's choice by a click on what stands for it. */
function choose(values) {
  for (const [id, value] of Object.entries(values)) at(id).value = value;
  show();
}

function begin() {
  at("P").max = LENGTHS.length - 1;
  at("P").value = LENGTHS.length - 1;
  for (const [id, n] of [["token", T], ["layer", L], ["head", H]]) at(id).max = n - 1;
  choose({ g: 1, token: data.prompt_len, layer: L >> 1, head: H >> 1 });
  data.tokens.forEach((token, t) => {
    const span = element("span", {}, visible(token), element("small", {}));
    span.addEventListener("click", () => choose({ token: t }));
    at("tokens").append(span);
  });
  const numbers = Array.from({ length: H }, (_, h) => element("th", { scope: "col" }, String(h)));
  at("heat").append(element("tr", {}, element("th", { scope: "col" }, "layer"), ...numbers));
  for (let layer = 0; layer < L; layer++) {
    const row = element("tr", {}, element("th", { scope: "row" }, String(layer)));
    for (let head = 0; head < H; head++) {
      const cell = element("td", {});
      cell.addEventListener("click", () => choose({ layer, head }));
      row.append(cell);
    }
    at("heat").append(row);
  }
  const losses = data.prefixes.map((p) => `${p.dev_loss.toFixed(3)} (P = ${p.P})`).join(", ");
  at("made").textContent =
    `Each P is a prefix of its own, trained for ${data.steps} steps of ${data.batch_size} texts on the embedded ` +
    `restaurant tables with the frozen model mini (${L} layers of ${H} heads); after that its loss on other tables was, ` +
    `in nats per token, ${losses}. The text is a table that training never showed, [bos], and a text ` +
    "that a person could write for it; · is a blank before a token. Made by python -m docs.export_lambda.";
  for (const id of ["P", "g", "token", "layer", "head"]) at(id).addEventListener("input", show);
  at("offset").addEventListener("input", show);
  show();
}

/* As the site around it, where that has been switched by hand (furo keeps it), else as the system. */
function theme() {
  let kept = null;
  try { kept = localStorage.getItem("theme"); } catch { /* not allowed: as the system */ }
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = kept === "dark" || kept === "light" ? kept : dark ? "dark" : "light";
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", theme);
theme();
begin();
