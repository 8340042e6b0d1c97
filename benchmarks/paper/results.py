"""Rows of results: writes finished runs to a CSV, and computes means and spreads of its rows.

Read `row_of` (one run), `write_rows`, then `mean_sd` and `difference`, which are used by the
claims, figures and the report. The values of a row are strings, as in a CSV; an empty string means
no value.
"""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scipy import stats

from minprefix.files import read_text, write_text

Row = dict[str, str]
KEY = ("name", "x", "data", "size", "subset", "seed")  # identify a row of a CSV
# columns before and after the scores
FIRST = ("experiment", "model", "scale", *KEY, "split", "decoding")
LAST = (
    "tables", "method", "prefix_len", "init", "lr", "steps", "epochs", "batch_size", "precision",
    "pairs", "dev_pairs", "dev_loss", "train_loss", "trained", "kept", "train_seconds",
    "decode_seconds", "problem", "cpu", "gpu", "threads", "torch", "cuda", "triton", "commit",
    "run",
)  # fmt: skip


def row_of(experiment: str, scale: str, model: str, cell, record: dict | None, problem: str) -> Row:
    """The CSV row of a cell, from its run's `record` (scores.json), or the `problem` if it has
    none."""
    run = cell.run
    beams = run.decoding.num_beams
    row = {
        "experiment": experiment, "model": model, "scale": scale, "name": cell.name, "x": cell.x,
        "data": run.data, "size": run.size, "subset": run.subset, "seed": run.seed,
        "split": run.split, "decoding": f"beam {beams}" if beams > 1 else "greedy",
        "method": run.method, "problem": problem, "run": run.id,
    }  # fmt: skip
    if run.train is not None:
        row |= {"lr": run.train.lr, "batch_size": run.train.batch_size}
        row |= {"epochs": run.train.epochs if run.train.steps is None else None}
        row |= {"steps": run.train.steps, "precision": run.train.precision}
    if run.prefix is not None:
        words = run.prefix.init_text if run.prefix.init == "words" else run.prefix.init
        row |= {"prefix_len": run.prefix.prefix_len, "init": words}
    if record is not None:
        row |= {name: digits(value) for name, value in record["scores"].items()}
        row |= {n: digits(v) for n, v in record.items() if n not in ("scores", "origin")}
    return {name: "" if value is None else str(value) for name, value in row.items()}


def digits(value):
    """Floats with five significant digits."""
    return f"{value:.5g}" if isinstance(value, float) else value


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A CSV with the columns of all rows."""
    found = dict.fromkeys(name for row in rows for name in row)
    scores = [name for name in found if name not in (*FIRST, *LAST)]
    columns = [name for name in (*FIRST, *scores, *LAST) if name in found]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def scales_of(rows: Sequence[Row]) -> str:
    """How the runs differ from the preset; for each data set, if that is not the same for all."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        found.setdefault(row["scale"], {})[row["data"]] = None
    if len(found) < 2:
        return "".join(found)
    return "; ".join(f"{', '.join(data)}: {scale}" for scale, data in found.items())


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV; none if there is no file."""
    return list(csv.DictReader(io.StringIO(read_text(path)))) if path.exists() else []


def value(row: Row, column: str) -> float | None:
    """A score; None if the row has none."""
    return float(row[column]) if row.get(column) else None


def quality(row: Row) -> float | None:
    """BLEU of all tables, by which settings are chosen."""
    return value(row, "BLEU") if row.get("BLEU") else value(row, "BLEU A")


def pick(rows: Sequence[Row], **same: str) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(name, "") == v for name, v in same.items())]


class Mean(NamedTuple):
    """Mean and standard deviation (0 from one value) of n values."""

    mean: float
    sd: float
    n: int


def mean_sd(rows: Sequence[Row], column: str) -> Mean | None:
    """`Mean` of a column over the rows that have a value; None if none has."""
    values = [v for row in rows if (v := value(row, column)) is not None]
    if not values:
        return None
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return Mean(statistics.fmean(values), sd, len(values))


class Difference(NamedTuple):
    """The mean of paired differences a - b, its standard error (None for one pair), and the number
    of pairs."""

    mean: float
    error: float | None
    n: int

    @property
    def margin(self) -> float:
        """Half of the 95 % interval; infinite for one pair."""
        if self.error is None:
            return math.inf
        return float(stats.t.ppf(0.975, self.n - 1)) * self.error

    @property
    def noise(self) -> bool:
        """Whether 0 is in its 95 % interval, or its error is unknown."""
        return abs(self.mean) < self.margin

    def text(self, unit: str) -> str:
        """The difference in `unit`, with its standard error."""
        if self.error is None:
            return f"{self.mean:+.2f} {unit} (one pair, so no standard error)"
        return f"{self.mean:+.2f} ± {self.error:.2f} {unit} (standard error of {self.n} pairs)"


def means_by_cell(rows: Sequence[Row], column: str) -> dict[tuple[str, str, str], float]:
    """Mean over names by (x, subset, seed); cells in which one of the names is missing are left
    out, so that all are means of the same names."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        if (v := value(row, column)) is not None:
            key = (row.get("x", ""), row.get("subset", ""), row.get("seed", ""))
            found.setdefault(key, {})[row["name"]] = v
    names = set().union(*found.values())
    return {key: statistics.fmean(of.values()) for key, of in found.items() if set(of) == names}


def gaps(a: Sequence[Row], b: Sequence[Row], column: str) -> dict[str, float]:
    """a - b in a column for each pair; pairs are low-data subsets if there are several, else seeds.

    First, cells of the same x, subset and seed that both sides have are matched, so that unfinished
    experiments compare like with like. Then they are averaged: seeds on one subset share its data
    and are not independent trials, and the same holds for values at several x.
    """
    subsets = {row["subset"] for row in [*a, *b] if row["size"]}
    unit = 1 if len(subsets) > 1 else 2
    left, right = means_by_cell(a, column), means_by_cell(b, column)
    found: dict[str, list[float]] = {}
    for key in left:
        if key in right:
            found.setdefault(key[unit], []).append(left[key] - right[key])
    return {name: statistics.fmean(values) for name, values in found.items()}


def mean_gap(values: Sequence[float]) -> Difference | None:
    """`Difference` from paired differences; None without any."""
    if not values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Difference(statistics.fmean(values), error, len(values))


def difference(a: Sequence[Row], b: Sequence[Row], column: str) -> Difference | None:
    """a - b in a column, paired by `gaps`; None if there are no pairs."""
    return mean_gap(list(gaps(a, b, column).values()))
