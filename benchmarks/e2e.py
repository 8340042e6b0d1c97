"""E2E with the embedded model on a CPU: hard prompts, prefix, fine-tuning; all training rows.

    python -m benchmarks.e2e select --data DIR      learning rates, on the dev set
    python -m benchmarks.e2e prefix --data DIR      train, then score dev and test
    python -m benchmarks.e2e finetune --data DIR
    python -m benchmarks.e2e hard-prompt --data DIR templates and examples chosen on the dev set

DIR holds the official CSVs (https://github.com/tuetschek/e2e-dataset). --device cuda does the same
on a GPU, with the scores in the file --csv (`benchmarks/gpu.sh train`). Every stage can be stopped,
and continued by the same command: training continues from its last state, and rows that are in the
CSVs are not recomputed. `select` writes benchmarks/e2e_select.csv, the others benchmarks/e2e.csv.
Learning rates are compared after few steps. The numbers of steps below were limited by time, and
the kept weights are those with the lowest dev loss. Only the final scoring reads the test set.
"""

import argparse
import dataclasses
import math
import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

from benchmarks.machine import add_row, machine
from benchmarks.tuning import best_of, rows_of, train
from minprefix.data.examples import Example
from minprefix.data.load import load_examples
from minprefix.generation.config import GenerationConfig
from minprefix.methods.config import TEMPLATES
from minprefix.methods.evaluate import evaluate_method
from minprefix.methods.hard_prompt import HardPrompt, show_examples
from minprefix.models.weights import load
from minprefix.prefix.config import PrefixConfig
from minprefix.training.config import TrainConfig

HERE = Path(__file__).parent
PREFIX = PrefixConfig(prefix_len=10, mid_dim=512, init="random")
COMMON = TrainConfig(
    batch_size=32, precision="bf16", eval_pairs=500, log_every=25, warmup_steps=0, patience=0
)
TRAIN = {
    "prefix": dataclasses.replace(COMMON, method="prefix", lr=1e-3, steps=2500, eval_every=250),
    "finetune": dataclasses.replace(COMMON, method="finetune", lr=1e-3, steps=1200, eval_every=200),
}
SELECT = {
    "prefix": (5e-4, 1e-3, 2e-3, 4e-3),
    "finetune": (2e-4, 5e-4, 1e-3),
}  # learning rates tried
SELECT_STEPS = 300
DECODING = {
    "greedy": GenerationConfig(max_new_tokens=80),
    "beam 5": GenerationConfig(max_new_tokens=80, num_beams=5),
}
SHOTS = (0, 2, 4)  # examples in context
HARD_TABLES = 200  # dev tables that choose the hard prompt


def select(data: str, out: Path) -> None:
    """Short runs with several learning rates, scored on the dev set."""
    sets = load_examples(data, "train"), load_examples(data, "dev")
    path = HERE / "e2e_select.csv"
    for method, rates in SELECT.items():
        for lr in rates:
            key = {"method": method, "lr": lr, "steps": SELECT_STEPS}
            if rows_of(path, key):
                continue
            config = dataclasses.replace(TRAIN[method], lr=lr, steps=SELECT_STEPS)
            folder = out / f"select-{method}-{lr}"
            run = train("mini", config, PREFIX, sets, folder)
            model, tokenizer, prefix = best_of("mini", method, folder)
            scores, _ = evaluate_method(
                model, tokenizer, sets[1], prefix=prefix, config=DECODING["greedy"]
            )
            row = key | {"dev_loss": round(run.best, 4), "dev_bleu": round(scores["bleu"], 2)}
            add_row(path, row | {"seconds": round(run.seconds)} | machine(), tuple(key))
            print(row)


def final(method: str, data: str, out: Path, seed: int, device: str, path: Path) -> None:
    """Train at full length, then score test and dev; rows of the CSV at `path`."""
    config = dataclasses.replace(TRAIN[method], seed=seed)
    folder = out / f"{method}-{seed}"
    sets = load_examples(data, "train"), load_examples(data, "dev")
    run = train("mini", config, PREFIX, sets, folder, device)
    model, tokenizer, prefix = best_of("mini", method, folder, device)
    kept = sum(p.numel() for p in (prefix or model).parameters())
    settings = {"steps": config.steps, "lr": config.lr, "train_seconds": round(run.seconds)}
    settings |= {"data": Path(data).name, "device": device}
    for split, name in (("test", "greedy"), ("test", "beam 5"), ("dev", "greedy")):
        score_row(
            path, model, tokenizer, load_examples(data, split), name,
            {"method": method, "seed": seed, "split": split}, kept, settings, prefix=prefix,
        )  # fmt: skip


def hard_prompts(data: str) -> None:
    """Choose the best hard prompt, with or without examples, on the first dev tables; score it on
    the test set."""
    model, tokenizer = load("mini")
    train_set, dev, test = (load_examples(data, split) for split in ("train", "dev", "test"))
    best: dict[bool, tuple[float, HardPrompt]] = {}
    path = HERE / "e2e_hard_prompts.csv"
    for template in TEMPLATES:
        for shots in SHOTS:
            prompt = show_examples(template, train_set, shots)
            key = {"template": template.replace("\n", "\\n"), "examples": shots}
            if not rows_of(path, key):
                scores, _ = evaluate_method(
                    model, tokenizer, dev[:HARD_TABLES], prompt=prompt, config=DECODING["greedy"]
                )
                row = key | {"dev_tables": HARD_TABLES, "dev_bleu": round(scores["bleu"], 2)}
                add_row(path, row | machine(), tuple(key))
            (row,) = rows_of(path, key)
            print(row, flush=True)
            choice = (float(row["dev_bleu"]), prompt)
            best[shots > 0] = max(best.get(shots > 0, choice), choice, key=lambda c: c[0])
    for in_context, (_, prompt) in best.items():
        method = "examples in context" if in_context else "hard prompt"
        settings = {"steps": 0, "lr": 0, "train_seconds": 0}
        score_row(
            HERE / "e2e.csv", model, tokenizer, test, "greedy",
            {"method": method, "seed": 0, "split": "test"}, 0, settings, prompt=prompt,
        )  # fmt: skip


def score_row(
    path: Path, model, tokenizer, examples: list[Example], decoding: str, key: dict, kept: int,
    settings: dict, **method,
) -> None:  # fmt: skip
    """Score one method on one split and add the row to the CSV at `path`."""
    if rows_of(path, key | {"decoding": decoding}):
        return
    began = time.perf_counter()
    no_rouge = patch("minprefix.metrics.quick.rouge_l", lambda *_: math.nan)
    with nullcontext() if find_spec("rouge_score") else no_rouge:  # a machine with few packages
        scores, texts = evaluate_method(
            model, tokenizer, examples, config=DECODING[decoding], **method
        )
    row = key | {"decoding": decoding, "tables": len(examples)}
    row |= {name: round(value, 2) for name, value in scores.items()}
    row |= {"parameters": kept} | settings
    row |= {"score_seconds": round(time.perf_counter() - began)} | machine()
    add_row(path, row, ("method", "seed", "split", "decoding"))
    print(row, "\n ", texts[0], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="E2E with the embedded model on a CPU.")
    parser.add_argument("stage", choices=("select", "prefix", "finetune", "hard-prompt"))
    parser.add_argument("--data", required=True, help="folder with the official CSVs")
    parser.add_argument("--out", type=Path, default=Path("runs/e2e"), help="run folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where prefix and finetune train")
    parser.add_argument("--csv", type=Path, default=HERE / "e2e.csv", help="their scores")
    args = parser.parse_args()
    machine()  # record the commit at the start, not at the end
    try:
        if args.stage == "select":
            select(args.data, args.out)
        elif args.stage == "hard-prompt":
            hard_prompts(args.data)
        else:
            final(args.stage, args.data, args.out, args.seed, args.device, args.csv)
    except KeyboardInterrupt as stop:
        sys.exit(f"{str(stop) or 'interrupted'}; run the same command to continue")


if __name__ == "__main__":
    main()
