"""What the embedded mini-bart learns on a CPU: tables to texts, and notes to one sentence.

    python -m benchmarks.bart_tasks e2e --data DIR      # DIR: the official CSVs of E2E
    python -m benchmarks.bart_tasks notes               # the embedded notes; ROUGE, also of lead-1
    python -m benchmarks.bart_tasks news-to-sports      # topics held out, or within-news

Each command compares learning rates in short runs on the dev set, trains at full length for each
method and seed (keeping the weights with the lowest dev loss), and generates texts for the dev and
test sets in two ways of decoding. It can be stopped, and continued by the same command. Short runs
are written to benchmarks/bart_select.csv, the others to benchmarks/bart_tasks.csv. The topics of
`notes` use the learning rates chosen on all of `notes`. Only the final scoring reads the test set.
"""

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import add_row, machine
from benchmarks.tuning import best_of, rows_of, train
from minprefix.data.examples import Example
from minprefix.data.load import load_examples
from minprefix.data.splits import choose
from minprefix.generation.config import GenerationConfig
from minprefix.methods.evaluate import evaluate_method, measure
from minprefix.prefix.config import PrefixConfig
from minprefix.training.config import TrainConfig
from tools.notes.measure import baselines

HERE = Path(__file__).parent
PREFIX = PrefixConfig(
    prefix_len=10, mid_dim=512, init="random"
)  # an MLP at each of the three attentions
RATES = {"prefix": (1e-3, 2e-3, 4e-3), "finetune": (2e-4, 5e-4, 1e-3)}
GREEDY = GenerationConfig(max_new_tokens=80, num_beams=1)
XSUM = GenerationConfig(  # the paper's 6 beams and penalty; BART's config blocks n-grams
    max_new_tokens=60, num_beams=6, length_penalty=0.8, no_repeat_ngram_size=3
)


@dataclass(frozen=True)
class Task:
    """What is trained and how it is scored."""

    metrics: str  # `evaluate.measure`
    best: str  # the score by which a learning rate is chosen
    decoding: dict[str, GenerationConfig]
    common: TrainConfig
    select_steps: int
    topics: str | None = None  # of the notes


PLAIN: dict[str, Any] = {"precision": "bf16", "samples": 0, "warmup_steps": 0, "patience": 0}
NOTES = Task(
    "xsum", "R-L", {"greedy": GREEDY, "beam 6": XSUM},
    TrainConfig(batch_size=16, steps=880, eval_every=88, eval_pairs=1000, **PLAIN), 176,
)  # fmt: skip
TASKS = {
    "e2e": Task(
        "e2e", "BLEU", {"greedy": GREEDY, "beam 5": dataclasses.replace(GREEDY, num_beams=5)},
        TrainConfig(batch_size=32, steps=1000, eval_every=100, eval_pairs=500, **PLAIN), 200,
    ),
    "notes": NOTES,
    "news-to-sports": dataclasses.replace(NOTES, topics="news-to-sports"),
    "within-news": dataclasses.replace(NOTES, topics="within-news"),
}  # fmt: skip
DEV_EXAMPLES = 200  # least number of dev examples (if there are enough) for choosing a rate


def load_sets(name: str, data: str) -> dict[str, list[Example]]:
    """Split -> examples, of the task's topics."""
    topics, splits = TASKS[name].topics, ("train", "dev", "test")
    return {split: choose(load_examples(data, split), topics, split) for split in splits}


def select(name: str, method: str, sets: dict, out: Path) -> float:
    """The learning rate with the best score after short runs, on a part of the dev set."""
    task, path = TASKS[name], HERE / "bart_select.csv"
    dev = sets["dev"][:: max(1, len(sets["dev"]) // DEV_EXAMPLES)]
    found = {}
    for lr in RATES[method]:
        key = {"task": name, "method": method, "lr": lr, "steps": task.select_steps}
        if not rows_of(path, key):
            config = dataclasses.replace(task.common, method=method, lr=lr, steps=key["steps"])
            folder = out / f"{name}-select-{method}-{lr}"
            run = train("mini-bart", config, PREFIX, (sets["train"], sets["dev"]), folder)
            model, tokenizer, prefix = best_of("mini-bart", method, folder)
            scores, _ = evaluate_method(
                model, tokenizer, dev, prefix=prefix, config=GREEDY, metrics=task.metrics
            )
            row = key | {"dev_loss": round(run.best, 4), "dev_examples": len(dev)}
            row |= {f"dev {task.best}": round(scores[task.best], 2), "seconds": round(run.seconds)}
            add_row(path, row | machine(), tuple(key))
            print(row, flush=True)
        (row,) = rows_of(path, key)
        found[lr] = float(row[f"dev {task.best}"])
    return max(found, key=found.get)


def final(name: str, method: str, lr: float, sets: dict, out: Path, seed: int) -> None:
    """Train at full length, then score dev and test with both ways of decoding."""
    task = TASKS[name]
    keys = [
        {"task": name, "method": method, "seed": seed, "split": split, "decoding": decoding}
        for split in ("dev", "test")
        for decoding in task.decoding
    ]
    keys = [key for key in keys if not rows_of(HERE / "bart_tasks.csv", key)]
    if not keys:
        return
    config = dataclasses.replace(task.common, method=method, lr=lr, seed=seed)
    folder = out / f"{name}-{method}-{seed}"
    run = train("mini-bart", config, PREFIX, (sets["train"], sets["dev"]), folder)
    model, tokenizer, prefix = best_of("mini-bart", method, folder)
    kept = sum(p.numel() for p in (prefix or model).parameters())
    for key in keys:
        examples, began = sets[key["split"]], time.perf_counter()
        scores, texts = evaluate_method(
            model, tokenizer, examples, prefix=prefix, config=task.decoding[key["decoding"]]
        )
        if task.metrics == "xsum":
            scores = {}  # BLEU and slots are only for tables
        scores |= measure(texts, examples, task.metrics)
        row = key | {"examples": len(examples)}
        row |= {score: round(value, 2) for score, value in scores.items()}
        row |= {"lr": lr, "steps": config.steps, "dev_loss": round(run.best, 4)}
        row |= {"parameters": kept, "train_seconds": round(run.seconds)}
        row |= {"score_seconds": round(time.perf_counter() - began)} | machine()
        add_row(HERE / "bart_tasks.csv", row, tuple(key))
        print(row, "\n ", texts[0], flush=True)


def add_baselines(name: str, test: list[Example]) -> None:
    """Parts of the notes as their summaries."""
    for way, scores in baselines(test).items():
        key = {"task": name, "method": way, "seed": 0, "split": "test", "decoding": ""}
        row = key | {"examples": len(test)}
        row |= {score: round(value, 2) for score, value in scores.items()} | machine()
        add_row(HERE / "bart_tasks.csv", row, tuple(key))


def main() -> None:
    parser = argparse.ArgumentParser(description="What mini-bart learns on a CPU.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", help="folder with the official CSVs of E2E")
    parser.add_argument("--out", type=Path, default=Path("runs/bart_tasks"), help="run folders")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=["prefix", "finetune"], choices=RATES)
    args = parser.parse_args()
    if (args.task == "e2e") != (args.data is not None):
        parser.error("--data is for e2e, and e2e needs it")
    machine()  # the commit that runs, not the one at the end
    sets = load_sets(args.task, args.data or "notes")
    rates_of = "e2e" if args.task == "e2e" else "notes"
    rate_sets = sets if rates_of == args.task else load_sets(rates_of, "notes")
    try:
        if args.task != "e2e":
            add_baselines(args.task, sets["test"])
        for seed in range(args.seeds):
            for method in args.methods:
                lr = select(rates_of, method, rate_sets, args.out)
                final(args.task, method, lr, sets, args.out, seed)
    except KeyboardInterrupt as stop:
        sys.exit(f"{str(stop) or 'interrupted'}; run the same command to continue")


if __name__ == "__main__":
    main()
