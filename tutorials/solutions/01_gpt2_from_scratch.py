"""Solutions to the exercises of 01_gpt2_from_scratch, with the library's model."""

from functools import partial
from unittest.mock import patch

import torch

import minprefix
from minprefix.models.activations import Visible
from minprefix.models.cache import KVCache
from minprefix.models.config import MODELS, GPT2Config
from minprefix.models.gpt2 import GPT2

torch.set_grad_enabled(False)
model, tokenizer = minprefix.load("mini", dtype=torch.float64)


def encode(text: str) -> torch.Tensor:  # (1, T)
    return torch.tensor([tokenizer.encode(text)])


def exercise_1():
    """Two tables of embeddings; per layer the matrices C x 3C, C x C, C x 4C and 4C x C, which are
    12 C^2 numbers, their biases 3C + C + 4C + C = 9C, two LayerNorms 4C; one LayerNorm at the end.
    The head is the embedding once more and costs nothing."""

    def count(V, n_positions, C, L):
        return V * C + n_positions * C + L * (12 * C**2 + 13 * C) + 2 * C

    config = model.config
    n = count(config.vocab_size, config.n_positions, config.n_embd, config.n_layer)
    assert n == sum(weight.numel() for weight in model.parameters()) == MODELS["mini"]
    sizes = {"distilgpt2": (768, 6), "gpt2": (768, 12), "gpt2-medium": (1024, 24),
             "gpt2-large": (1280, 36), "gpt2-xl": (1600, 48)}  # fmt: skip
    for name, (C, L) in sizes.items():
        assert count(50257, 1024, C, L) == MODELS[name]
        print(f"  {name:12} {MODELS[name]:13,}")


def exercise_2():
    """With the mask, a change of the last token changes the logits of the last position alone.
    Without it those of all positions change: every position now reads the last token. In training,
    position i could then read token i + 1, which is the answer that it is asked for. The model
    would learn to copy it, and be lost when it writes, where that token does not exist yet.

    `tril()` begins its diagonal at the first key. For one new token and three older ones it is
    [1, 0, 0, 0]: the token reads the oldest key and nothing else, not even itself."""
    ids = encode("The Eagle is a pub near the river.")
    other = ids.clone()
    other[0, -1] = tokenizer.bos_id
    changed = (model(ids) - model(other)).abs().amax((0, 2)) > 1e-9  # (T,)
    assert changed.tolist() == [False] * (ids.shape[1] - 1) + [True]
    with patch("minprefix.models.activations.Visible", partial(Visible, causal=False)):
        changed_without = (model(ids) - model(other)).abs().amax((0, 2)) > 1e-9
    assert changed_without.all()
    print(f"  positions whose logits change: {changed.sum()} with, {ids.shape[1]} without the mask")
    T, S = 1, 4
    ones = torch.ones(T, S)
    print(f"  one new token, tril(): {ones.tril().tolist()}; right: {ones.tril(S - T).tolist()}")
    assert ones.tril().sum() == 1 and ones.tril(S - T).all()


def exercise_3():
    """Padding on the right is the future of all real positions, which causality hides. Only the
    padded positions' own logits are meaningless, and nobody reads these."""
    short, long = (
        encode("The Eagle is a pub."),
        encode("The Wrestlers serves Italian food by the river."),
    )
    n = short.shape[1]
    batch = torch.full((2, long.shape[1]), tokenizer.eos_id)
    batch[0, :n], batch[1] = short, long[0]
    logits = model(batch)
    torch.testing.assert_close(logits[:1, :n], model(short), rtol=0, atol=1e-11)
    torch.testing.assert_close(logits[1:], model(long), rtol=0, atol=1e-11)
    print(f"  {long.shape[1] - n} padded positions changed no real one")


def exercise_4():
    """By less than fp32 rounds, so a test in fp32 cannot tell this mistake from rounding. In fp64,
    whose rounding is a billion times smaller, it stands out: equality is tested there."""
    ids = encode("The Eagle is a pub near the river.")
    sizes = {"layer_norm_epsilon": 1.001 * model.config.layer_norm_epsilon}
    wrong = GPT2(GPT2Config(**model.config.__dict__ | sizes)).double().eval()
    wrong.load_state_dict(model.state_dict())
    exact = model(ids)
    mistake = (wrong(ids) - exact).abs().max().item()
    fp32 = (minprefix.load("mini")[0](ids).double() - exact).abs().max().item()
    print(f"  logits: eps moves them by {mistake:.0e}, fp32 by {fp32:.0e}")
    assert 1e-9 < mistake < fp32


def exercise_5():
    """The values' animal. Keys decide where a later token looks, values what it then finds; and
    in a text of this form it looks at the name, whichever that was."""

    def read(text):
        cache = KVCache(model.config, 1, 32, model.wte.weight)
        model(encode(text), cache=cache)
        return cache

    rest = encode(" is a pub near the river. The food at the")
    tiger, raven, mixed = read("The Tiger"), read("The Raven"), read("The Tiger")
    mixed.v = read("The Raven").v  # keys of the tiger, values of the raven
    assert tiger.longest == raven.longest == 3
    t, r = tokenizer.encode(" Tiger")[0], tokenizer.encode(" Raven")[0]
    chances = {}
    for name, cache in {"Tiger": tiger, "Raven": raven, "mixed": mixed}.items():
        p = model(rest, cache=cache)[0, -1].softmax(-1)
        chances[name] = (p[t].item(), p[r].item())
        shown = (
            f"p({tokenizer.decode([t])!r}) {p[t]:6.2%}, p({tokenizer.decode([r])!r}) {p[r]:6.2%}"
        )
        print(f"  cache of {name}: {shown}")
    assert chances["Tiger"][0] > chances["Tiger"][1]
    assert chances["mixed"][1] > chances["mixed"][0]


for exercise in (exercise_1, exercise_2, exercise_3, exercise_4, exercise_5):
    print(exercise.__name__)
    exercise()
