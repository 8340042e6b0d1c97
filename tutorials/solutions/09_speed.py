"""Solutions to the exercises of tutorial 9 (09_speed). Each one is asserted."""

import csv
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import minprefix
from minprefix.data.batches import encode_examples, epoch_batches
from minprefix.data.load import load_examples

model, tokenizer = minprefix.load("mini")
config = model.config
L, C, V = config.n_layer, config.n_embd, config.vocab_size
N = 12 * L * C * C
path = Path(minprefix.__file__).parents[1] / "benchmarks" / "cpu" / "bench.csv"
with path.open(encoding="utf-8", newline="") as file:
    bench = list(csv.DictReader(file))

# 1. Every matrix costs 2 FLOPs more per number and token, the head too. And now the embeddings need
#    a gradient, so the first layer passes one back: nothing is left out.
b, t = 2, 16
ids, labels = torch.randint(V, (2, b, t), generator=torch.Generator().manual_seed(0))
with FlopCounterMode(display=False) as counter:
    model.requires_grad_().token_losses(ids, labels).mean().backward()
found, formula = counter.get_total_flops(), 6 * N * b * t + 6 * C * V * b * t
print(f"1. fine-tuning: counted {found / 1e9:.4f} GFLOP, by formula {formula / 1e9:.4f}")
assert found == formula

# 2. 6 (512 C + 512 * 2 L C) B P = 4 N B T: B cancels, so the answer grows with T alone.
T, mlp = 128, 512 * C + 512 * 2 * L * C
P = 4 * N * T / (6 * mlp)
print(f"2. the MLP on B P inputs costs as much as the layers at P = {P:.0f}")
assert abs(6 * mlp * 10 * P - 4 * N * 10 * T) < 1

# 3. A step of one row reads every weight but the position embeddings.
n_bytes = 4 * sum(w.numel() for name, w in model.named_parameters() if name != "wpe.weight")
usual = {"work": "generate", "model": "mini", "dtype": "fp32", "B": "1", "beams": "1", "P": "10"}
(row,) = (r for r in bench if r["method"] == "minprefix" and all(r[k] == usual[k] for k in usual))
limit = 1e9 * float(row["read_gb_per_s"]) / n_bytes  # tokens/s
reached = float(row["decode_tokens_per_s"])
print(f"3. at most {limit:.0f} tokens/s, measured {reached:.0f}: {100 * reached / limit:.1f} %")
assert abs(100 * reached / limit - float(row["percent"])) < 0.2  # the CSV's column, rounded
# The gap: products of one row do not reach the memory's speed, and some hundred operators a token
# are called from Python. A compiled step or a CUDA graph takes away the second part.

# 4. Padding of three orders, in percent of the computed positions, at batches of 10.
encoded = encode_examples(tokenizer, load_examples("restaurants", "train"))
lengths = np.array([len(row.ids) - 1 for row in encoded])


def padding(batches: list[list[int]]) -> float:
    computed = sum(len(batch) * lengths[batch].max() for batch in batches)
    return 100 * (1 - lengths.sum() / computed)


def cut(order: list[int]) -> list[list[int]]:
    return [list(order[n : n + 10]) for n in range(0, len(order), 10)]


orders = {
    "sorted": cut(np.argsort(lengths, kind="stable")),
    "pools": epoch_batches(lengths.tolist(), 10, seed=0, epoch=0),
    "shuffled": cut(np.random.default_rng(0).permutation(len(lengths))),
}
shares = {name: padding(batches) for name, batches in orders.items()}
print("4. padding: " + ", ".join(f"{name} {share:.2f} %" for name, share in shares.items()))
assert shares["sorted"] <= shares["pools"] < shares["shuffled"]
