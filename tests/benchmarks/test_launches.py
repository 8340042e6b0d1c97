"""Launches of a step, counted without a GPU."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.kernels.launches import generate_row
from minprefix.models.config import GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.prefix.prefix import Prefix


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_a_token_is_one_launch_of_ours_for_each_layer(options):
    """No copies into the cache, no merging; the host makes a replay and asks for the tokens."""
    config = GPT2Config(n_layer=3, n_head=2, n_embd=32, n_inner=64, vocab_size=200)
    model, prefix = GPT2(config).init_weights(0).eval(), Prefix.random(config, 10, seed=0)
    row = generate_row(model, prefix, 2, graphs=True, **options)
    assert (row["triton"], row["waits"], row["calls"]) == (3, 0, 2)
    assert "index" not in row["most"] and "addmm 12" in row["most"]
    eager = generate_row(model, prefix, 2, graphs=False, **options)
    assert eager["launches"] == eager["calls"] == row["launches"]
