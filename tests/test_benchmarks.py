"""The README's figures are those of the committed CSVs."""

from pathlib import Path

import pytest

from benchmarks.machine import add_row, machine, read_rows
from benchmarks.readme import HERE, README, draw, final_rows, with_table


def test_readme_table_is_made_from_the_csv():
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "run: python -m benchmarks.readme"
    assert len(final_rows()) >= 4


def test_selection_was_on_the_dev_set_and_the_final_runs_follow_it():
    """The learning rate of each final run is the one with the best dev BLEU."""
    chosen = read_rows(HERE / "e2e_select.csv")
    for row in read_rows(HERE / "e2e.csv"):
        tried = [r for r in chosen if r["method"] == row["method"]]
        if tried:
            best = max(tried, key=lambda r: float(r["dev_bleu"]))
            assert float(best["lr"]) == float(row["lr"])


def test_picture_is_drawn(tmp_path: Path):
    draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_replaced_by_their_key(tmp_path: Path):
    path = tmp_path / "rows.csv"
    for n, value in (("a", 1), ("b", 2), ("a", 3)):
        add_row(path, {"name": n, "value": value} | machine(), ("name",))
    assert [(row["name"], row["value"]) for row in read_rows(path)] == [("b", "2"), ("a", "3")]
    with pytest.raises(KeyError):
        add_row(path, {"value": 1}, ("name",))
