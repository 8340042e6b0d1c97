"""Solutions to the exercises of 10_pretrain_your_own."""

import math
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

import minprefix
from minprefix.data.load import load_examples
from minprefix.models.config import GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.models.tokenizer import Tokenizer
from minprefix.training.corpus import (
    encode,
    unigram_entropy,
    validation_windows,
)

torch.set_grad_enabled(False)
train_texts, dev_texts = (
    [text for example in load_examples("restaurants", split) for text in example.targets]
    for split in ("train", "dev")
)
n_bytes = len("".join(dev_texts).encode())


def exercises_1_and_2():
    """More merges, longer tokens: more bytes for each. A longer token is also harder to guess, so
    nats per token rise while bits per byte fall: a longer token holds some of the context that a
    table of frequencies cannot see. Only bits per byte are of the text and not of the tokenizer."""
    rows = []
    for V in (300, 512, 1024):
        tokenizer = Tokenizer.train(train_texts, V)
        ids = encode(tokenizer, dev_texts)
        nats = unigram_entropy(ids, V)
        bits = nats * len(ids) / (n_bytes * math.log(2))
        rows.append((n_bytes / len(ids), nats, bits))
        print(f"  V = {V:4}: {rows[-1][0]:.2f} bytes per token, unigram entropy {nats:.2f} nats "
              f"per token = {bits:.2f} bits per byte")  # fmt: skip
    for first, second in pairwise(rows):
        assert first[0] < second[0] and first[1] < second[1] and first[2] > second[2]


def exercise_3():
    """The first tokens of a window lack the context that the last have."""
    model, tokenizer = minprefix.load("mini")
    ids = encode(tokenizer, dev_texts)
    windows = [w for w in validation_windows(ids, 128, 4096) if len(w) == 129]
    batch = torch.from_numpy(np.stack(windows).astype(np.int64))  # (B, T + 1)
    losses = F.cross_entropy(model(batch[:, :-1]).mT, batch[:, 1:], reduction="none")  # (B, T)
    first, last = losses[:, :8].mean().item(), losses[:, -64:].mean().item()
    print(f"  first 8 tokens {first:.2f}, last 64 tokens {last:.2f} nats per token")
    assert first > last + 0.3


def exercise_4():
    """The token that was just read. The residual stream begins as its embedding, w + a position,
    and its logit is w . h with h along w: about |w| sqrt(C), which grows with the embeddings, while
    those of other tokens are random. A tied head therefore starts as "the same word again"; at
    0.02 that is too weak to matter, at 0.1 the model is sure of it, and it is wrong."""
    V, C = 512, 96
    sizes = {"vocab_size": V, "n_positions": 192, "n_embd": C, "n_layer": 3, "n_head": 3}
    ids = torch.randint(V, (8, 65), generator=torch.Generator().manual_seed(0))
    for scale in (1, 5):
        model = GPT2(GPT2Config(**sizes, bos_token_id=V - 1, eos_token_id=V - 1)).eval()
        model.init_weights(0).wte.weight *= scale
        p = model(ids[:, :-1]).softmax(-1)  # (B, T, V)
        loss = -p.gather(-1, ids[:, 1:, None]).log().mean().item()
        again = p.gather(-1, ids[:, :-1, None]).mean().item()
        formula = math.log(V) + (0.02 * scale) ** 2 * C / 2
        print(f"  embeddings x {scale}: loss {loss:.2f}, formula {formula:.2f} nats per token; "
              f"probability of the token just read {again:.3f}")  # fmt: skip
        assert (abs(loss - formula) < 0.05) == (scale == 1)
        assert (again > 0.5) == (scale == 5)


for exercise in (exercises_1_and_2, exercise_3, exercise_4):
    print(exercise.__name__)
    exercise()
