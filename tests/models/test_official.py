"""The official GPT-2 against transformers. `make test-official` runs this, and needs the weights:
from the network, or with MINPREFIX_GPT2=<folder>."""

import os

import pytest
import torch
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from minprefix.models.config import MODELS
from minprefix.models.weights import find, load

pytestmark = pytest.mark.official

PROMPT = "The Eagle is a coffee shop near the river. It"


@pytest.fixture(scope="module")
def folder():
    """The official gpt2; a folder that is given must be right, a hub need not be in reach."""
    if given := os.environ.get("MINPREFIX_GPT2"):
        return given
    try:
        return find("gpt2")
    except OSError as error:
        pytest.skip(f"no official weights: MINPREFIX_GPT2 is not set, and {error}")


def test_official_gpt2_equals_transformers(folder):
    ours, tokenizer = load(folder, dtype=torch.float64)
    assert sum(p.numel() for p in ours.parameters()) == MODELS["gpt2"]
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64).eval()
    their_tokenizer = GPT2Tokenizer.from_pretrained(folder)
    for text in (PROMPT, "naïve 日本語 👩‍👧\n\n  I'll", "x = [1, 2]\n\tprint(x)"):
        assert tokenizer.encode(text) == their_tokenizer(text)["input_ids"]

    ids = torch.tensor([tokenizer.encode(PROMPT)])  # (1, T)
    with torch.no_grad():
        expected = theirs(ids).logits
        bound = 1e-12 * max(1, expected.abs().max().item())
        assert (ours(ids) - expected).abs().max().item() <= bound

        tokens = ids
        for _ in range(20):
            tokens = torch.cat([tokens, ours(tokens)[:, -1:].argmax(-1)], dim=1)
    greedy = dict(do_sample=False, num_beams=1, max_new_tokens=20, min_new_tokens=20)
    expected = theirs.generate(ids, **greedy, pad_token_id=tokenizer.eos_id)
    assert tokens.tolist() == expected.tolist()
