"""Trains the prefixes in `docs/prefixes/`, which the tutorials and the live page load.

    python -m docs.train_prefixes --e2e DIR [--only e2e-P10 notes-P10]

The prefixes of E2E are trained on all pairs, with 2,500 steps of 32 pairs as in the README. The
prefix of the embedded notes uses the default number of steps and learning rate of the command line.
All other settings are defaults. DIR is the folder of the official CSVs, whose licence is CC BY-SA
4.0. A prefix that exists is not trained again. Each run adds a row to `docs/prefixes/prefixes.csv`,
with the dev loss in nats per target token. For e2e-P10, the prefix at every evaluation is kept in
`runs/prefixes/e2e-P10/steps`.
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from benchmarks.machine import add_row, machine
from minprefix.data.load import load_examples
from minprefix.models.weights import load
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.make import make_prefix
from minprefix.training.config import TrainConfig
from minprefix.training.trainer import Trainer

KEPT = Path(__file__).parent / "prefixes"
RUNS = Path("runs/prefixes")
E2E = TrainConfig(steps=2500, batch_size=32, eval_every=125, patience=0, samples=0)
NOTES = TrainConfig(samples=0)
# data set, P, settings
PREFIXES = {
    "e2e-P10": ("e2e", 10, E2E),
    "notes-P10": ("notes", 10, NOTES),
    "e2e-P40": ("e2e", 40, E2E),
    "e2e-P1": ("e2e", 1, E2E),
    "e2e-P5": ("e2e", 5, E2E),
    "e2e-P2": ("e2e", 2, E2E),
}
EVALUATED = "e2e-P10"  # the run in which the prefix is kept at every evaluation


class KeepsAll(Trainer):
    """Keeps the prefix of every evaluation in the run folder, not only the best one."""

    def evaluate(self) -> None:
        super().evaluate()
        assert self.prefix is not None
        (self.out / "steps").mkdir(exist_ok=True)
        self.prefix.export().save(self.out / "steps" / f"{self.step_done:04d}.safetensors")


def train(name: str, e2e: str) -> None:
    """Train one of PREFIXES, or continue its run; write its file and its row."""
    data, prefix_len, config = PREFIXES[name]
    folder = e2e if data == "e2e" else data
    model, tokenizer = load("mini")
    prefix = make_prefix(model, tokenizer, PrefixConfig(prefix_len), seed=0)
    kind = KeepsAll if name == EVALUATED else Trainer
    sets = load_examples(folder, "train"), load_examples(folder, "dev")
    run = kind(model, tokenizer, replace(config), *sets, RUNS / name, prefix)
    run.resume()
    result = run.run()
    shutil.copyfile(run.kept, KEPT / f"{name}.safetensors")
    row = {
        "name": name, "data": data, "prefix_len": prefix_len, "steps": run.step_done,
        "batch_size": run.config.batch_size, "lr": run.config.lr, "best_step": run.best_step,
        "dev_loss": round(run.best, 4), "seconds": result["seconds"],
    }  # fmt: skip
    add_row(KEPT / "prefixes.csv", row | machine(), ("name",))
    print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--e2e", default="e2e", help="folder of the official CSVs")
    parser.add_argument("--only", nargs="*", choices=PREFIXES, default=list(PREFIXES))
    args = parser.parse_args()
    for name in args.only:
        if not (KEPT / f"{name}.safetensors").exists():
            train(name, args.e2e)


if __name__ == "__main__":
    main()
