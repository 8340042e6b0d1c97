"""Records the answers that the live page shows before its model is loaded: interactive/data.js.

    python -m minprefix train --method finetune --data E2E --out runs/live/finetuned
    python -m minprefix search --data E2E --prompt-len 10 --after 5 --out runs/live/searched
    python -m docs.record_live --e2e E2E --finetuned runs/live/finetuned \\
        --searched runs/live/searched

E2E is the folder of the official CSVs. Without a fine-tuned model or a searched prompt, the page
does not show that method. The page's own scripts generate the texts in node, so they are what a
reader sees after loading the model; the tests compare them with the Python model. Only those of the
fine-tuned model are generated here.
"""

import argparse
import base64
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from docs.export_live import EVALUATED, LOADED, PAGE, STEPS, trained, write_site
from minprefix.data.load import load_examples
from minprefix.files import read_json, write_text
from minprefix.generation.texts import generate
from minprefix.methods.config import TEMPLATES
from minprefix.methods.hard_prompt import TokenPrompt
from minprefix.metrics.quick import YES_NO_PHRASES, known_values
from minprefix.models.weights import find, load
from minprefix.tensors import load_tensors

DATA = PAGE / "data.js"
BEGIN = "window.LIVE = "
MAX_NEW = 80  # tokens, as in writing.js
TEMPLATE = TEMPLATES[2]  # the one with the best dev BLEU of benchmarks/e2e_hard_prompts.csv
NOTE = 0  # the number of the embedded test note that is shown
FIELDS = (
    "name", "type", "food", "price", "customer rating", "area", "family friendly", "near",
)  # fmt: skip
PRESETS = (  # four tables of the E2E test set, one of the embedded restaurants
    "name : The Mill | type : pub | food : Fast food | price : cheap | customer rating : 5 out of 5"
    " | area : city centre | family friendly : yes | near : Café Sicilia",
    "name : The Vaults | type : pub | food : French | price : more than £30 | area : riverside"
    " | family friendly : no | near : Raja Indian Cuisine",
    "name : The Cricketers | type : restaurant | customer rating : low | family friendly : no"
    " | near : Ranch",
    "name : Blue Spice | type : coffee shop | area : city centre",
    "name : Sumac Gate | type : pub | food : Indian | customer rating : excellent"
    " | family friendly : no | near : Matilda's Pantry",
)
# For each task: the prompt's tokens, the generated ones (none with "promptOnly"), the text, and
# with "traced" the values inside the model.
RUN = """(Live, Writing, files, tasks, simd) => {
    const live = new Live(files, simd);
    return tasks.map((task) => {
        const writing = new Writing(live, task);
        while (!writing.done && !task.promptOnly) writing.next();
        const trace = task.traced ? writing.trace() : null;
        if (trace) trace.lambda = Array.from(trace.lambda);
        return { prompt: writing.prompt, ids: writing.ids, text: writing.text(), trace };
    });
}"""
NODE = f"""
import {{ readFileSync }} from "node:fs";
import {{ Live, Writing }} from "./writing.js";
const text = (name) => readFileSync(name, "utf8");
const bytes = (name) => Uint8Array.from(readFileSync(name)).buffer;
const files = {{
    config: JSON.parse(text("config.json")), vocab: JSON.parse(text("vocab.json")),
    merges: text("merges.txt"), weights: bytes("mini.safetensors"),
    prefixes: [bytes("prefixes.safetensors"), bytes("steps.safetensors")],
}};
const {{ tasks, simd }} = JSON.parse(readFileSync(0, "utf8"));
console.log(JSON.stringify(({RUN})(Live, Writing, files, tasks, simd)));
"""


def put_together(folder: Path) -> None:
    """Put the page, its weights and node's files into a folder."""
    shutil.copytree(PAGE, folder, dirs_exist_ok=True)
    write_site(folder)
    write_text(folder / "package.json", '{"type": "module"}')
    write_text(folder / "run.js", NODE)


def in_node(folder: Path, tasks: list[dict], simd: bool = True) -> list[dict]:
    """The results of the page's scripts, without a browser; `writing.js` describes a task."""
    done = subprocess.run(
        ["node", "run.js"], cwd=folder, input=json.dumps({"tasks": tasks, "simd": simd}),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"node failed: {done.stderr}")
    return json.loads(done.stdout)


def task(source: str, keys: str | None = EVALUATED, values: str | None = None, **changes) -> dict:
    """A task with the keys and values of these prefixes; None = only the frozen model."""
    prefix = None if keys is None else {"keys": keys, "values": values or keys, **changes}
    return {"source": source, "ask": {}, "prefix": prefix}


def searched_prompt(folder: Path) -> dict:
    """The prompt that a search has found, in the form that the page uses."""
    _, tokenizer = load("mini")
    kept = TokenPrompt.load(folder / "prompt.json", tokenizer)
    return {
        "before": kept.before,
        "after": kept.after,
        "text": [tokenizer.decode(kept.before), tokenizer.decode(kept.after)],
        "steps": json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["step"],
    }


def tasks_of(source: str, names: list[str], searched: dict | None) -> dict[str, dict]:
    """All tasks to record for one source, by the page's keys."""
    tasks = {"frozen": task(source, None)} | {name: task(source, name) for name in names}
    for name in names:
        if name.startswith("notes"):
            tasks[f"{EVALUATED}+{name}"] = task(source, EVALUATED, name)
            tasks[f"{name}+{EVALUATED}"] = task(source, name, EVALUATED)
    tasks["instruction"] = task(source, None) | {"ask": {"template": TEMPLATE}}
    if searched:
        tasks["searched"] = task(source, None) | {"ask": searched}
    return tasks


def record(e2e: str, finetuned: Path | None, searched: Path | None) -> dict:
    """The contents of data.js."""
    whole, steps = trained(), load_tensors(STEPS)[0]
    kept = [name for name, table in steps.items() if torch.equal(table, whole[EVALUATED])]
    prompt = None if searched is None else searched_prompt(searched)
    note = load_examples("notes", "test")[NOTE].source
    asked = {source: tasks_of(source, [*whole, *steps], prompt) for source in PRESETS}
    asked[note] = tasks_of(note, [*whole], None)
    asked[PRESETS[0]][EVALUATED]["traced"] = True
    pairs = [(source, key) for source, tasks in asked.items() for key in tasks]
    with tempfile.TemporaryDirectory() as folder:
        put_together(Path(folder))
        found = in_node(Path(folder), [asked[source][key] for source, key in pairs])
        download = sum(Path(folder, name).stat().st_size for name in LOADED)
    texts: dict[str, dict[str, str]] = {source: {} for source in asked}
    for (source, key), answer in zip(pairs, found, strict=True):
        texts[source][key] = answer["text"]
    tuned = None
    if finetuned is not None:
        copy, tokenizer = load(finetuned / "model")
        written = generate(copy, tokenizer, list(PRESETS), max_new_tokens=MAX_NEW)
        for source, text in zip(PRESETS, written, strict=True):
            texts[source]["finetuned"] = text
        settings = read_json(finetuned / "config.json")["train"]
        tuned = {name: settings[name] for name in ("steps", "batch_size")}
    examples = [e for split in ("train", "dev", "test") for e in load_examples(e2e, split)]
    config = read_json(find("mini") / "config.json")
    traced = {"source": PRESETS[0], "key": EVALUATED}
    return {
        "layers": config["n_layer"],
        "heads": config["n_head"],
        "bytes": {
            "prefix": 2 * whole[EVALUATED].numel(),  # fp16
            "model": (find("mini") / "model.safetensors").stat().st_size,  # bf16
            "download": download,
        },
        "fields": FIELDS,
        "known": known_values(examples),
        "phrases": YES_NO_PHRASES,
        "prefixes": [*whole],
        "steps": [name.split("/")[1] for name in steps],
        "kept": kept[-1].split("/")[1] if kept else "",
        "template": TEMPLATE,
        "searched": prompt,
        "finetuned": tuned,
        "presets": [as_table(source) for source in PRESETS],
        "note": note,
        "texts": texts,
        "trace": traced | small(next(x["trace"] for x in found if x["trace"])),
    }


def as_table(source: str) -> dict[str, str]:
    """The inverse of the paper's linearisation."""
    return dict(pair.split(" : ") for pair in source.split(" | "))


def small(trace: dict) -> dict:
    """A trace with shares as bytes, in units of 1 / 255, and probabilities of four decimals."""
    units = bytes(round(255 * x) for x in trace["lambda"])
    nexts = [[[text, round(p, 4), round(q, 4)] for text, p, q in n] for n in trace["nexts"]]
    return trace | {"nexts": nexts, "lambda": base64.b64encode(units).decode()}


def read_data() -> dict:
    """Read the contents of data.js."""
    return json.loads(DATA.read_text("utf-8").split(BEGIN, 1)[1].rstrip().removesuffix(";"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--e2e", default="e2e", help="folder of the official CSVs")
    parser.add_argument("--finetuned", type=Path, help="run folder of a fine-tuning")
    parser.add_argument("--searched", type=Path, help="run folder of a search")
    args = parser.parse_args()
    recorded = record(args.e2e, args.finetuned, args.searched)
    made = "// Made by python -m docs.record_live, which says what stands here.\n"
    fields = [f" {json.dumps(k)}: {json.dumps(x, ensure_ascii=False)}" for k, x in recorded.items()]
    write_text(DATA, f"{made}{BEGIN}{{\n" + ",\n".join(fields) + "\n};\n")
    print(f"{DATA}: {DATA.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
