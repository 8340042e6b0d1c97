/* The page's controls, and the messages to and from the worker. Comes last: `begin` starts it all. */
"use strict";

const answers = {
  loading({ bytes: got, total }) {
    at("progress").value = Math.min(1, got / total);
    at("status").textContent = `${bytes(got)} of ${bytes(total)}`;
  },
  ready({ simd }) {
    live = true;
    at("progress").hidden = at("load").hidden = true;
    at("status").textContent =
      `The model runs in your browser${simd ? "" : ", slowly, since this browser has no SIMD"}. Everything below is written as you look.`;
    writeAll();
  },
  text({ slot, serial, text, done }) {
    if (serial === serials[slot] && (done || !calm.matches)) {
      say(slot, text);
      at(slot).querySelector(".said").setAttribute("aria-busy", String(!done));
    }
  },
  trace: ({ slot, serial, trace: found }) => serial === serials[slot] && setTrace(found),
  inspected: ({ numbers }) => showNumbers(numbers),
  failed({ slot, serial, message }) {
    if (slot && serial === serials[slot]) return say(slot, message, true);
    if (slot) return;
    at("status").textContent = `It could not be loaded: ${message}`;
    at("load").disabled = false;
    at("progress").hidden = true;
  },
};

function load() {
  if (location.protocol === "file:") {
    at("status").textContent =
      "A page opened as a file may not load the model. Start “python -m http.server” in the site's folder and open http://localhost:8000/interactive/.";
    return;
  }
  at("load").disabled = true;
  at("progress").hidden = false;
  at("status").textContent = "Loading…";
  worker?.terminate();
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = ({ data: message }) => answers[message.kind](message);
  worker.onerror = () =>
    answers.failed({ message: "this browser does not run the worker; a newer one does" });
  worker.postMessage({ kind: "load", total: data.bytes.download });
}

function showTable() {
  for (const field of data.fields) at(`field-${field}`).value = state.table[field] ?? "";
  at("source").textContent = tableText();
  [...at("presets").children].forEach((button, i) =>
    button.setAttribute(
      "aria-pressed",
      data.fields.every((f) => (data.presets[i][f] ?? "") === (state.table[f] ?? "")),
    ),
  );
}

/* Puts the choices of section 3 into the controls, and says them in the card. */
function showControls() {
  const P = lengthNow(),
    own = state.who === "e2e",
    kept = state.step === KEPT;
  for (const name of ["who", "P", "reads"])
    for (const radio of document.getElementsByName(name))
      radio.checked = radio.value === String(state[name]);
  at("step").value = state.step;
  at("gate").value = state.gate;
  at("gate-value").textContent = state.gate.toFixed(2);
  const [step, last] = [data.steps[state.step], data.steps.at(-1)].map((x) =>
    Number(x ?? 0).toLocaleString("en"),
  );
  at("step-value").textContent = `${step} of ${last}`;
  at("step").setAttribute("aria-valuetext", step);
  at("step").closest("fieldset").disabled = !own || state.P !== 10 || data.steps.length < 2;
  at("lengths").closest("fieldset").disabled = !own;
  const switches = (id, n, off, word) =>
    at(id).replaceChildren(
      element("span", {}, `${word}s`),
      ...Array.from({ length: n }, (_, i) =>
        element(
          "button",
          {
            type: "button",
            "aria-pressed": String(!state[off].includes(i)),
            "aria-label": `${word} ${i}`,
            "data-i": i,
            onclick: () => {
              const now = state[off].includes(i)
                ? state[off].filter((x) => x !== i)
                : [...state[off], i];
              change({ [off]: now });
              at(id).querySelector(`[data-i="${i}"]`).focus();
            },
          },
          String(i),
        ),
      ),
    );
  switches("positions", P, "positionsOff", "position");
  switches("layers", L, "layersOff", "layer");
  const said = [USERS[state.who], `P = ${P}`];
  if (own && !kept && state.P === 10) said.push(`step ${step} of ${last}`);
  if (state.gate !== 1) said.push(`g = ${state.gate.toFixed(2)}`);
  if (state.positionsOff.length) said.push(`${state.positionsOff.length} of ${P} positions off`);
  if (state.layersOff.length) said.push(`${state.layersOff.length} of ${L} layers off`);
  const words = `${said.join(", ")}.`;
  at("own").querySelector(".about").textContent = words[0].toUpperCase() + words.slice(1);
}

/* Section 3 has changed; whose text is not the same any more is written again. */
function change(values) {
  Object.assign(state, values);
  if (values.P !== undefined || values.who !== undefined) state.positionsOff = [];
  showControls();
  if (values.reads === undefined && values.note === undefined) write("own");
  else writeSecond();
}

function takeTable(table) {
  state.table = { ...table };
  showTable();
  [...FIRST, ...(state.reads === "table" ? SECOND : [])].forEach(write);
}

function radios(id, name, choices) {
  at(id).append(
    ...choices.map(([value, text]) =>
      element(
        "label",
        {},
        element("input", {
          type: "radio",
          name,
          value,
          onchange: () => change({ [name]: name === "P" ? Number(value) : value }),
        }),
        ` ${text}`,
      ),
    ),
  );
}

function begin() {
  at("load").textContent = `Load the model (${bytes(data.bytes.download)})`;
  at("load").addEventListener("click", load);
  at("presets").append(
    ...data.presets.map((table, i) =>
      element(
        "button",
        { type: "button", onclick: () => takeTable(table) },
        `${i + 1}: ${table.name}`,
      ),
    ),
  );
  at("table").append(
    ...data.fields.map((field) =>
      element(
        "label",
        {},
        field,
        element("input", {
          type: "text",
          id: `field-${field}`,
          list: `values-${field}`,
          maxlength: 60,
          onchange: (event) => takeTable({ ...state.table, [field]: event.target.value }),
        }),
        element(
          "datalist",
          { id: `values-${field}` },
          ...data.known[field].map((value) => element("option", { value })),
        ),
      ),
    ),
  );
  at("table").addEventListener("submit", (event) => event.preventDefault());
  at("cards").append(...FIRST.filter((slot) => CARDS[slot]).map(makeCard));
  at("compared").append(...SECOND.map(makeCard));
  at("template").value = state.template;
  at("template").addEventListener("change", (event) => {
    state.template = event.target.value;
    write("instruction");
  });
  const has = (name) => data.prefixes.includes(name);
  radios(
    "who",
    "who",
    Object.entries(USERS).filter(([who]) => who === "e2e" || has("notes-P10")),
  );
  radios(
    "lengths",
    "P",
    [1, 2, 5, 10, 40].filter((P) => has(`e2e-P${P}`)).map((P) => [P, String(P)]),
  );
  for (const radio of document.getElementsByName("reads"))
    radio.addEventListener("change", () => change({ reads: radio.value }));
  at("note").value = state.note;
  at("note").addEventListener("change", (event) =>
    change({ reads: "note", note: event.target.value.replace(/\s+/g, " ").trim() }),
  );
  at("step").max = data.steps.length - 1;
  at("step").addEventListener("input", (event) => change({ step: Number(event.target.value) }));
  at("gate").addEventListener("input", (event) => change({ gate: Number(event.target.value) }));
  at("controls").addEventListener("reset", (event) => {
    event.preventDefault();
    change({ ...UNCHANGED });
  });
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const id of ["token", "layer", "head"])
    at(id).addEventListener("input", (event) => choose({ [id]: Number(event.target.value) }));
  at("one-head").addEventListener("change", showInside);
  at("layer").max = L - 1;
  at("head").max = H - 1;
  const cells = (l) =>
    Array.from({ length: H }, (_, h) =>
      element("td", { onclick: () => choose({ layer: l, head: h }) }),
    );
  at("heat").append(
    element(
      "tr",
      {},
      element("th", {}),
      ...Array.from({ length: H }, (_, h) => element("th", { scope: "col" }, `head ${h}`)),
    ),
    ...Array.from({ length: L }, (_, l) =>
      element("tr", {}, element("th", { scope: "row" }, `layer ${l}`), ...cells(l)),
    ),
  );
  at("prefix-size").textContent = bytes(data.bytes.prefix);
  at("model-size").textContent = bytes(data.bytes.model);
  at("users").addEventListener("input", showUsers);
  showUsers();
  showTable();
  showControls();
  writeAll();
}

/* One model and a prefix for each user, against a model for each user. */
function showUsers() {
  const n = 10 ** at("users").value,
    { prefix, model } = data.bytes;
  at("users-value").textContent = n.toLocaleString("en");
  at("users-text").textContent =
    `One model and ${n.toLocaleString("en")} prefixes take ${bytes(model + n * prefix)}. A fine-tuned copy for each takes ${bytes(n * model)}.`;
}

begin();
