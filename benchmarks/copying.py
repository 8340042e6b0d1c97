"""How settings change the facts in the texts: the demo's prefix, with one setting changed at a
time.

    python -m benchmarks.copying [--minutes 30]

Each row of benchmarks/copying.csv is one way to train and to decode on the embedded restaurants:
BLEU and slot coverage on the test tables, and missing and wrong facts per text
(`metrics.quick.facts`). The first row is the demo. Rows that are in the CSV are not recomputed.
"""

import argparse
import dataclasses
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import add_row, machine
from benchmarks.tuning import best_of, rows_of, train
from minprefix.cli.demo import GENERATE, PREFIX, TRAIN
from minprefix.data.load import load_examples
from minprefix.methods.evaluate import evaluate_method
from minprefix.metrics.quick import facts, known_values

CSV = Path(__file__).parent / "copying.csv"


@dataclass(frozen=True)
class Choice:
    """The differences from the demo."""

    name: str
    train: dict[str, Any] = field(default_factory=dict)  # fields of TrainConfig
    prefix: dict[str, Any] = field(default_factory=dict)  # fields of PrefixConfig


CHOICES = (
    Choice("demo"),
    Choice("fine-tuning, as many steps", {"method": "finetune"}),
    Choice("twice the steps", {"steps": 2 * (TRAIN.steps or 0)}),
    Choice("half the steps", {"steps": (TRAIN.steps or 0) // 2}),
    Choice("fine-tuning, half the steps", {"method": "finetune", "steps": (TRAIN.steps or 0) // 2}),
    Choice("random start", {}, {"init": "random"}),
    Choice("prefix of 40", {}, {"prefix_len": 40}),
    Choice("twice the rate", {"lr": 2 * (TRAIN.lr or 0)}),
    Choice("table without MLP", {"lr": 1e-2}, {"parametrisation": "table"}),
)
DECODING = {
    "greedy": GENERATE,
    "beam 5": dataclasses.replace(GENERATE, num_beams=5),
    "beam 5, length penalty 2": dataclasses.replace(GENERATE, num_beams=5, length_penalty=2.0),
}


def measure(choice: Choice) -> None:
    """Train with the choice, then decode in each way; adds the rows that the CSV lacks."""
    wanted = DECODING if choice.name in ("demo", CHOICES[1].name) else {"greedy": GENERATE}
    keys = [{"choice": choice.name, "decoding": name} for name in wanted]
    if all(rows_of(CSV, key) for key in keys):
        return
    sets = load_examples("restaurants", "train"), load_examples("restaurants", "dev")
    test = load_examples("restaurants", "test")
    known = known_values([*sets[0], *test])
    config = dataclasses.replace(TRAIN, samples=0, **choice.train)
    with tempfile.TemporaryDirectory() as out:
        run = train("mini", config, dataclasses.replace(PREFIX, **choice.prefix), sets, Path(out))
        model, tokenizer, prefix = best_of("mini", config.method, Path(out))
        for key, (name, decoding) in zip(keys, wanted.items(), strict=True):
            scores, texts = evaluate_method(
                model, tokenizer, test, prefix=prefix, config=decoding, progress=True
            )
            found = [facts(t, e.table or (), known) for t, e in zip(texts, test, strict=True)]
            row = {"choice": choice.name, "decoding": name, "steps": run.step_done}
            row |= {"dev_loss": round(run.best, 3), "seconds": round(run.seconds)}
            row |= {name: round(value, 1) for name, value in scores.items()}
            row["missing_per_text"] = round(sum(len(f.missing) for f in found) / len(found), 2)
            row["wrong_per_text"] = round(sum(len(f.wrong) for f in found) / len(found), 2)
            add_row(CSV, row | machine(), tuple(key))
            print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after this time")
    end = time.perf_counter() + 60 * parser.parse_args().minutes
    for choice in CHOICES:
        if time.perf_counter() < end:
            measure(choice)


if __name__ == "__main__":
    main()
