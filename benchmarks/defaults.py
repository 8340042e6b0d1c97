"""The rule for settings that are not given (`training.config.settle`), compared with a grid.

    python -m benchmarks.defaults run --e2e DIR [--minutes 30] [--device cuda]
    python -m benchmarks.defaults figure

Each case is a model and some training pairs. The rule runs with three subsets and seeds; the grid
halves and doubles its peak learning rate and the number of steps with which it starts, for the
first seed. Each row of benchmarks/defaults.csv is one run, with its lowest dev loss on the same dev
pairs. Runs that are in the CSV are not repeated. `figure` plots and prints the rule's loss relative
to the best of the grid.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from statistics import mean

from benchmarks.machine import add_row, machine, read_rows
from benchmarks.tuning import rows_of
from minprefix.cli.report import new_figure, save_figure
from minprefix.data.load import load_examples
from minprefix.data.splits import subset
from minprefix.models.weights import load
from minprefix.palette import PREFIX
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.make import make_prefix
from minprefix.training.config import TrainConfig, settle
from minprefix.training.trainer import Trainer

HERE = Path(__file__).parent
CSV, FIGURE = HERE / "defaults.csv", HERE / "defaults.png"
# model, data set, training pairs (None = all)
CASES = (
    ("mini", "e2e", 20), ("mini", "e2e", 50), ("mini", "e2e", 200), ("mini", "restaurants", None),
    ("mini-bart", "notes", None), ("mini", "notes", None), ("mini", "e2e", 1000),
    ("mini-bart", "e2e", 50), ("mini-bart", "restaurants", None), ("mini", "e2e", None),
)  # fmt: skip
SEEDS = (0, 1, 2)
FULL_GRID = 5  # runs with seed 0, at least: the rule, half and twice its rate and first steps
DEV_PAIRS = 160
KEY = ("model", "data", "pairs", "lr", "steps", "seed", "rule")


def trained(
    model_name: str, data: str, folder: str, pairs: int | None, seed: int, device: str = "cpu",
    **scale,
) -> None:  # fmt: skip
    """Add the row of one run, if the CSV lacks it. `scale` multiplies settings of the rule."""
    model, tokenizer = load(model_name, device=device)
    train, dev = load_examples(folder, "train"), load_examples(folder, "dev")
    train = train if pairs is None else subset(train, pairs, seed)
    n_pairs = sum(len(example.targets) for example in train)
    dev = subset(dev, min(DEV_PAIRS, sum(len(example.targets) for example in dev)), 0)
    prefix = make_prefix(model, tokenizer, PrefixConfig(), seed)
    config = TrainConfig(seed=seed, samples=0, log_every=10**6)
    with tempfile.TemporaryDirectory() as out:
        run = Trainer(model, tokenizer, config, train, dev, out, prefix)
        lr, steps = run.config.lr, run.config.steps
        key = {"model": model_name, "data": data, "pairs": n_pairs, "seed": seed}
        if scale:
            lr, steps = lr * scale.get("lr", 1), round(steps * scale.get("steps", 1))
        if rows_of(CSV, key | ({"lr": lr, "steps": steps} if scale else {"rule": True})):
            return
        if scale:
            config = settle(dataclasses.replace(config, lr=lr, steps=steps), n_pairs, lr)
            run = Trainer(model, tokenizer, config, train, dev, out, prefix)
        result = run.run()
    used = run.config
    row = key | {
        "lr": lr, "steps": run.steps, "rule": not scale, "batch_size": used.batch_size,
        "warmup_steps": used.warmup_steps, "steps_done": result["steps"],
        "dev_loss": round(run.best, 4), "best_step": run.best_step,
        "last_dev_loss": round(run.measured[-1][1], 4), "precision": used.precision,
        "seconds": result["seconds"], "device": device,
    }  # fmt: skip
    add_row(CSV, row | machine(), KEY)
    print(row, flush=True)


def run_all(e2e: str, minutes: float, device: str) -> None:
    """All runs that are missing, case by case, until the time is up."""
    end = time.perf_counter() + 60 * minutes
    for model, data, pairs in CASES:
        folder = e2e if data == "e2e" else data
        runs = [{"seed": seed} for seed in SEEDS]
        runs += [{"seed": 0, name: factor} for name in ("lr", "steps") for factor in (0.5, 2)]
        for changes in runs:
            if time.perf_counter() > end:
                return
            trained(model, data, folder, pairs, device=device, **changes)


def summary() -> list[dict]:
    """For each case: the rule's dev loss, mean over seeds, and the best of the grid at seed 0."""
    cases: dict[tuple, list[dict]] = {}
    for row in read_rows(CSV):
        cases.setdefault((row["model"], row["data"], int(row["pairs"])), []).append(row)
    found = []
    for (model, data, pairs), rows in cases.items():
        rule = [float(row["dev_loss"]) for row in rows if row["rule"] == "True"]
        first = [row for row in rows if row["seed"] == "0"]
        best = min(first, key=lambda row: float(row["dev_loss"]))
        own = next(float(row["dev_loss"]) for row in first if row["rule"] == "True")
        found.append({
            "model": model, "data": data, "pairs": pairs, "rule": mean(rule), "seeds": len(rule),
            "spread": max(rule) - min(rule), "seed 0": own, "best of grid": float(best["dev_loss"]),
            "grid": len(first), "excess": 100 * (own / float(best["dev_loss"]) - 1),
            "best lr": best["lr"], "best steps": best["steps"],
        })  # fmt: skip
    return found


def draw(rows: list[dict]) -> None:
    """Plot how far the rule's dev loss is above the best of the grid, in percent, for each case."""
    figure, axes = new_figure()
    names = [f"{row['model']}\n{row['data']}\n{row['pairs']:,}" for row in rows]
    bars = axes.bar(range(len(rows)), [row["excess"] for row in rows], 0.6, color=PREFIX)
    axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.axhline(5, color="grey", lw=1, ls="--", label="5 %")
    axes.set_xticks(range(len(rows)), names, fontsize=7)
    axes.set(
        ylabel="dev loss above the best of the grid (%)", xlabel="model, data, training pairs",
        title="The rule for settings that are not given, compared with a grid, seed 0",
    )  # fmt: skip
    axes.legend(frameon=False)
    save_figure(figure, FIGURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "figure"))
    parser.add_argument("--e2e", default="e2e", help="folder of the official CSVs")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after this time")
    parser.add_argument("--device", default="cpu", help="where the prefixes are trained")
    args = parser.parse_args()
    if args.what == "run":
        run_all(args.e2e, args.minutes, args.device)
        return
    from minprefix.cli.report import format_rows

    rows = summary()
    draw([row for row in rows if row["grid"] >= FULL_GRID])
    print(format_rows(rows))


if __name__ == "__main__":
    main()
