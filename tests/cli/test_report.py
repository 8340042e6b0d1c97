"""The readable results of a run: tables, parameters, samples, figures."""

import json

import pytest
from conftest import tiny_with_words
from matplotlib.figure import Figure
from matplotlib.image import imread

from minprefix.cli.report import (
    format_rows,
    parameter_rows,
    plot_comparison,
    plot_loss,
    write_samples,
)
from minprefix.data.examples import Example
from minprefix.models.config import MODELS
from minprefix.models.weights import load
from minprefix.prefix.prefix import Prefix
from minprefix.training.run_folder import read_log


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that the test saves."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw))
    )
    return figures


def test_rows_become_a_table():
    rows = [
        {"method": "hard prompt", "BLEU": 9.876, "parameters": 0},
        {"method": "prefix", "BLEU": 62.0, "parameters": 61440},
    ]
    assert format_rows(rows).split("\n") == [
        "method        BLEU  parameters",
        "-----------  -----  ----------",
        "hard prompt   9.88           0",
        "prefix       62.00      61,440",
    ]
    assert format_rows([]) == ""
    assert format_rows([{"file": None, "x": 1}]).split("\n")[2] == "None  1"


def test_parameters_of_mini_add_up():
    model, _ = load("mini")
    rows = parameter_rows(model)
    assert [row["part"] for row in rows][-1] == "model"
    assert rows[-1]["parameters"] == MODELS["mini"] == sum(r["parameters"] for r in rows[:-1])
    assert rows[-1]["percent"] == 100
    assert sum(row["percent"] for row in rows[:-1]) == pytest.approx(100, abs=1e-3)


TRAINED = {  # P C or L 2 C P; (C + 1) mid_dim, mid_dim times the output and its bias; L H
    "table": 2 * 2 * 16 * 3 + 4,
    "mlp": 3 * 16 + 17 * 4 + 5 * 2 * 2 * 16 + 4,
    "embedding": 3 * 16 + 4,
    "embedding-mlp": 3 * 16 + 17 * 4 + 5 * 16 + 4,
}


@pytest.mark.parametrize("parametrisation", TRAINED)
def test_parameters_of_a_prefix_are_those_trained_and_those_kept(tmp_path, parametrisation):
    """Also for a file, which holds only the kept ones."""
    model = tiny_with_words()
    options = {"parametrisation": parametrisation, "mid_dim": 4, "gate": True}
    prefix = Prefix.random(model.config, 3, 0, **options)
    prefix.bind(model)
    prefix.save(tmp_path / "a.safetensors")
    rows = parameter_rows(model, prefix)
    assert parameter_rows(model, Prefix.load(tmp_path / "a.safetensors")) == rows
    numbers = {row["part"]: row["parameters"] for row in rows}
    assert numbers[f"trained ({parametrisation})"] == TRAINED[parametrisation]
    assert numbers["prefix table"] == 2 * 2 * 16 * 3  # L 2 C P
    assert numbers["prefix gate"] == 2 * 2  # L H
    assert numbers["model"] == sum(p.numel() for p in model.parameters())


def test_samples_stand_side_by_side(tmp_path):
    examples = [
        Example("boat : Gull", ("It is Gull.", "Gull, a boat."), (("boat", "Gull"),)),
        Example("a ship", ("One ship.",)),
    ]
    texts = {"prefix": ["Gull é.", "Ship."], "hard prompt": ["?", "!"]}
    write_samples(tmp_path / "samples.txt", examples, texts)
    assert (tmp_path / "samples.txt").read_text(encoding="utf-8").split("\n") == [
        "[1]",
        "  boat: Gull",
        "  references:",
        "    - It is Gull.",
        "    - Gull, a boat.",
        "  prefix      | Gull é.",
        "  hard prompt | ?",
        "              |   missing: boat = Gull",
        "",
        "[2]",
        "  source: a ship",
        "  references:",
        "    - One ship.",
        "  prefix      | Ship.",
        "  hard prompt | !",
        "",
    ]


def test_loss_curve_has_both_losses_and_labelled_axes(tmp_path, drawn):
    entries = [{"step": n, "loss": 3 - n} for n in (1, 2)] + [{"step": 2, "dev_loss": 1.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    plot_loss(read_log(tmp_path), tmp_path / "loss.png", "A title")
    (figure,) = drawn
    (axes,) = figure.axes
    assert axes.get_xlabel() == "optimizer step" and "nats" in axes.get_ylabel()
    assert axes.get_title() == "A title"
    curves = {c.get_label(): [list(xy) for xy in c.get_xydata()] for c in axes.get_lines()}
    assert curves == {"training": [[1, 2], [2, 1]], "dev": [[2, 1.5]]}
    assert imread(tmp_path / "loss.png").std() > 0


def test_comparison_has_a_bar_per_score_and_method(tmp_path, drawn):
    rows = [
        {"method": "hard prompt", "BLEU": 10.0, "ROUGE-L": 20.0, "slots %": 30.0},
        {"method": "prefix", "BLEU": 60.0, "ROUGE-L": 70.0, "slots %": 80.0},
    ]
    plot_comparison(rows, tmp_path / "c.png", "A title")
    (figure,) = drawn
    (axes,) = figure.axes
    assert "0 to 100" in axes.get_ylabel() and axes.get_title() == "A title"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["hard prompt", "prefix"]
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers if len(bars) == 3]
    assert heights == [[10, 20, 30], [60, 70, 80]]
    assert len(axes.get_xticklabels()) == 3
    assert imread(tmp_path / "c.png").std() > 0
