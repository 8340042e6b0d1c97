"""The comparison of the CPU benchmark at two commits, here with this version on both sides."""

import sys

import pytest

from benchmarks import cpu_pairs, machine
from benchmarks.machine import read_rows


class Here:
    """A `Side` without a process of its own."""

    def __init__(self, folder):
        self.folder = str(folder)

    def ask(self, request=None):
        if request is not None:
            self.call = cpu_pairs.made(*request, self.folder)
        self.call()
        return 1.0


def test_each_row_is_measured_on_both_sides(tiny_folder, tmp_path, monkeypatch, capsys):
    small = {"model": str(tiny_folder), "dtype": "fp32", "B": "2", "T": "8", "P": "2"}
    rows = [
        small | {"work": "train", "data": "random", "labels": "targets", "mlp": "True"},
        small | {"work": "train", "data": "e2e", "labels": "targets", "mlp": "True"},
        small | {"work": "generate", "data": "random", "beams": "2", "new": "3"},
    ]
    every = dict.fromkeys(cpu_pairs.SIZES, "") | {"method": "minprefix"}
    rows = [every | row for row in rows] + [every | rows[0] | {"method": "peft"}]
    written = tmp_path / "pairs.csv"
    monkeypatch.setattr(machine, "read_rows", lambda path: rows if path != written else seen(path))
    monkeypatch.setattr(cpu_pairs, "Side", lambda checkout: Here(tmp_path / checkout.name))
    monkeypatch.setattr(sys, "argv", ["x", "--before", "HEAD", "--minutes", "0",
                                      "--out", str(written)])  # fmt: skip
    seen = read_rows
    if not (cpu_pairs.ROOT / ".git").exists():
        pytest.skip("no history here")
    cpu_pairs.main()
    found = [(row["work"], row["data"], row["pairs"], row["slower"]) for row in seen(written)]
    assert found == [("train", "random", "3", "0"), ("generate", "random", "3", "0")]  # fmt: skip
    assert capsys.readouterr().out.endswith("0 of 2 rows are slower\n")


@pytest.mark.parametrize(
    "now, slower", [([1.01, 1.1, 1.2], 1), ([0.9, 1.1, 1.2], 0), ([1.0, 1.02, 1.5], 0)]
)
def test_a_row_is_slower_where_most_pairs_say_so(now, slower):
    row = cpu_pairs.columns([(1.0, x) for x in now])
    assert row["slower"] == slower and row["before_ms"] == 1000


def test_pairs_change_their_order():
    order = []

    class Noted:
        def __init__(self, name, seconds):
            self.name, self.seconds = name, seconds

        def ask(self, request=None):
            order.append(self.name)
            return self.seconds

    found = cpu_pairs.pairs(Noted("before", 1.0), Noted("now", 2.0), seconds=0)
    assert found == [(1.0, 2.0)] * cpu_pairs.MIN_PAIRS
    assert order == ["now", "before", "before", "now", "now", "before"]
