"""Numbers of parameters by method, from shapes, against the paper's."""

import pytest
import torch
from conftest import tiny_gpt2

from minprefix.methods.adapters import Adapter, count
from minprefix.methods.counts import method_rows
from minprefix.methods.top_layers import TopLayers
from minprefix.models.config import MODELS, OFFICIAL, GPT2Config
from minprefix.models.weights import shapes_of
from minprefix.prefix.prefix import Prefix


def by_name(config: GPT2Config) -> dict[str, dict]:
    return {row["method"]: row for row in method_rows(config)}


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_shapes_have_the_official_numbers_of_parameters(name):
    assert count(shapes_of(OFFICIAL[name][0])) == MODELS[name]


def test_gpt2_medium_has_the_counts_of_the_paper():
    """Footnote 7 of the ACL version: 250K and 500K of 345M; adapters of 3 % and 0.1 %."""
    rows = by_name(OFFICIAL["gpt2-medium"][0])
    assert rows["prefix, P = 5"]["kept"] == 245_760
    assert rows["prefix, P = 10"]["kept"] == 491_520
    assert rows["prefix, P = 5"]["trained"] == 25_744_896  # with the MLP, mid_dim 512
    assert rows["fine-tuning"]["kept"] == MODELS["gpt2-medium"]
    L, C, V = 24, 1024, 50257
    block = 12 * C * C + 13 * C  # weights 3 C C, C C, 4 C C, 4 C C; biases and two layer norms
    assert rows["FT-top2"]["kept"] == 2 * block + 2 * C
    assert rows["FT-top2 with the embedding"]["kept"] == 2 * block + 2 * C + V * C
    adapters = {name: row for name, row in rows.items() if name.startswith("adapter")}
    assert len(adapters) == 4
    for name, row in adapters.items():
        share, m = (0.03, 0.001)["0.1%" in name], int(name.split()[-1])
        one = 2 * m * C + m + C
        assert row["kept"] == row["trained"] == L * (one + 2 * C if "lin" in name else 2 * one)
        assert abs(row["kept"] / MODELS["gpt2-medium"] - share) < 0.0001  # 0.01 % of the model
        assert row["paper"] == ("0.1%" if share == 0.001 else "3%")
    assert rows["prefix, P = 5"]["paper"] == "250K" and rows["FT-top2"]["paper"] == ""


def test_counts_are_those_of_the_real_modules():
    model = tiny_gpt2()
    rows = by_name(model.config)
    assert rows["fine-tuning"]["kept"] == count(model)
    assert rows["FT-top2"]["trained"] == count(TopLayers(model, 2))
    mlp = Prefix.random(model.config, 5, 0, parametrisation="mlp")
    assert rows["prefix, P = 5"]["trained"] == count(mlp)
    assert rows["prefix, P = 5"]["kept"] == mlp.table().numel()
    for name, row in rows.items():
        if name.startswith("adapter"):
            design, m = name.split()[2].strip(","), int(name.split()[-1])
            assert row["kept"] == count(Adapter(model.config, m, design))
        assert row["percent"] == pytest.approx(100 * row["kept"] / count(model), abs=1e-4)
        assert "paper" not in row  # which speaks of GPT-2 medium


def test_counting_needs_no_memory():
    model = shapes_of(OFFICIAL["gpt2-xl"][0])
    assert {w.device for w in model.parameters()} == {torch.device("meta")}
