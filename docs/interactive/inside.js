/* Section 4 of the page: what the model has read and written with the changed prefix, token by
   token: the next tokens, lambda in each layer and head, and the numbers of equation (3). */
"use strict";

/* A recorded trace, whose shares are base64 of bytes in units of 1 / 255. */
function unpacked(recorded) {
  return {
    ...recorded,
    lambda: Float32Array.from(atob(recorded.lambda), (c) => c.charCodeAt(0) / 255),
  };
}

function setTrace(found) {
  trace = found;
  at("inside").hidden = !trace;
  at("inside-about").textContent = trace
    ? "Here is all that the model read and wrote with the prefix of section 3. Choose a token by a click or with the slider."
    : live
      ? "This appears when your changed prefix has written its text."
      : "Nothing was recorded for these choices. Undo the changes of section 3 and take the first table, or load the model.";
  if (!trace) return;
  at("token").max = trace.tokens.length - 1;
  state.token = Math.min(Math.max(state.token, 0), trace.tokens.length - 1) || trace.first;
  at("tokens").replaceChildren(
    ...trace.tokens.map((token, t) =>
      element(
        "span",
        { class: t > trace.first ? "written" : "", onclick: () => choose({ token: t }) },
        element("span", { class: "ribbon" }, element("i")),
        visible(token),
        element("small"),
      ),
    ),
  );
  showInside();
}

const share = (t, l, h) => trace.lambda[(t * L + l) * H + h];

function meanShare(t) {
  let sum = 0;
  for (let l = 0; l < L; l++) for (let h = 0; h < H; h++) sum += share(t, l, h);
  return sum / (L * H);
}

function showInside() {
  const { token, layer, head } = state,
    name = visible(trace.tokens[token]);
  for (const id of ["token", "layer", "head"]) at(id).value = state[id];
  at("token-value").textContent = `${token} “${name}”`;
  at("token").setAttribute("aria-valuetext", `token ${token}, ${trace.tokens[token]}`);
  at("layer-value").textContent = layer;
  at("head-value").textContent = head;
  [...at("tokens").children].forEach((span, t) => {
    const x = at("one-head").checked ? share(t, layer, head) : meanShare(t);
    span.firstChild.firstChild.style.height = `${100 * x}%`;
    span.lastChild.textContent = percent(x);
    span.setAttribute("aria-current", t === token);
  });
  at("heat")
    .querySelectorAll("td")
    .forEach((cell, i) => {
      const [l, h] = [Math.floor(i / H), i % H],
        x = share(token, l, h);
      cell.style.setProperty("--share", `${100 * x}%`);
      cell.textContent = percent(x);
      cell.setAttribute("aria-current", l === layer && h === head);
    });
  at("mean").textContent = percent(meanShare(token));
  at("after").textContent = name;
  const nexts = trace.nexts[token - trace.first];
  at("bars").replaceChildren(
    ...(nexts
      ? nexts.map(bars)
      : [
          element(
            "p",
            {},
            "The model has not begun to write here. Choose the last token of the table or a later one.",
          ),
        ]),
  );
  at("numbers").hidden = at("keys").hidden = true;
  at("numbers-missing").hidden = live;
  if (live)
    worker.postMessage({
      kind: "inspect",
      slot: "own",
      serial: serials.own,
      at: [token, layer, head],
    });
}

/* One next token: its probability with the prefix, and below it without. */
function bars([token, ...shares]) {
  const bar = (kind, x) =>
    element(
      "div",
      { class: kind === "without" ? "second" : "" },
      element("i", { class: kind, style: `width: ${100 * x}%` }),
    );
  return element(
    "div",
    { class: "bar" },
    element("code", {}, visible(token)),
    bar("with", shares[0]),
    element("span", {}, `${percent(shares[0])} %`),
    bar("without", shares[1]),
    element("span", {}, `${percent(shares[1])} %`),
  );
}

/* Equation (3) of one head, and the keys that take most of its attention. */
function showNumbers(n) {
  if (!trace || n.token !== state.token || n.layer !== state.layer || n.head !== state.head) return;
  const sub = (letter) => element("sub", {}, letter);
  const number = (x) => (Number.isFinite(x) ? x.toFixed(3).replace("-", "−") : "−∞");
  const rows = [
    [["log Z", sub("P"), ", of the prefix’s scores"], number(n.lseP)],
    [["log Z", sub("S"), ", of the text’s scores"], number(n.lseS)],
    [
      ["r = g exp(log Z", sub("P"), " − log Z", sub("S"), `), with g = ${n.gate}`],
      n.r.toPrecision(4),
    ],
    [["λ = r / (1 + r)"], n.lambda.toFixed(4)],
    ...n.o.map((o, d) => [
      [
        `o[${d}] = ${n.lambda.toFixed(3)} × (${number(n.oP[d])}) + ${(1 - n.lambda).toFixed(3)} × (${number(n.oS[d])})`,
      ],
      number(o),
    ]),
  ];
  at("numbers").tBodies[0].replaceChildren(
    ...rows.map(([what, x]) =>
      element("tr", {}, element("th", { scope: "row" }, ...what), element("td", {}, x)),
    ),
  );
  const keys = [
    ...n.prefixShares.map((x, p) => [`prefix ${p}`, x, "with"]),
    ...n.textShares.map((x, t) => [`${t} ${visible(trace.tokens[t])}`, x, "without"]),
  ];
  const most = keys.sort((a, b) => b[1] - a[1]).slice(0, 8);
  at("keys").replaceChildren(
    element(
      "p",
      { class: "key" },
      "The keys that this head looks at most, in the ",
      element("span", { class: "swatch prefix" }),
      " prefix and in the ",
      element("span", { class: "swatch text" }),
      " text:",
    ),
    ...most.map(([name, x, kind]) =>
      element(
        "div",
        { class: "bar" },
        element("code", {}, name),
        element("div", {}, element("i", { class: kind, style: `width: ${100 * x}%` })),
        element("span", {}, `${percent(x)} %`),
      ),
    ),
  );
  at("numbers").hidden = at("keys").hidden = false;
}

function choose(values) {
  Object.assign(state, values);
  showInside();
}
