# %% [markdown]
# # 9. Where a step's time goes
#
# What must a training step cost at least, and where does the rest of its time go?
#
# **What you will learn.** To compute that floor, to compare each part of a step with it, and to
# find the cause where a part takes longer: here and in transformers + PEFT [1], on a CPU and on a
# GPU. Two of the causes you time yourself.
#
# **What to know first.** 01_gpt2_from_scratch for the model and [the table of
# letters](01_gpt2_from_scratch.py); 04_fused_attention for bytes, FLOPs and the roofline.
#
# **Running time.** Under half a minute on two CPU cores.
#
# **Sources.** The times are read from the committed files `benchmarks/cpu/*.csv`, which name
# machine, versions and commit (`make bench-cpu` makes them again), and from `benchmarks/gpu/*.csv`
# (`make bench-gpu`).

# %%
import time
from pathlib import Path

import pictures_results as pictures
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import minprefix
from benchmarks.kernels.attention import Shape, work
from benchmarks.machine import read_rows
from benchmarks.paper.results import pick
from benchmarks.peft.pictures import PARTS, REST
from minprefix.data.batches import collate, encode_examples
from minprefix.data.load import load_examples

BENCHMARKS = Path(minprefix.__file__).parents[1] / "benchmarks"
model, tokenizer = minprefix.load("mini")
model.requires_grad_(False)
config = model.config
L, H, D = config.n_layer, config.n_head, config.head_dim
C, V = config.n_embd, config.vocab_size
M = 12 * L * C * C  # numbers in the matrices of the layers

bench = read_rows(BENCHMARKS / "cpu" / "bench.csv")
USUAL = {"work": "train", "model": "mini", "B": "10", "T": "128", "P": "10",
         "data": "random", "labels": "all", "dtype": "fp32"}  # fmt: skip


def measured(method: str, column: str = "ms", **other: str) -> float:
    """A column of the one line of bench.csv with USUAL, but for `other`."""
    (line,) = pick(bench, **USUAL | other | {"method": method})
    return float(line[column])


# %% [markdown]
# ## 1. The floor
# A matrix with n numbers costs 2n FLOPs per token forward, and 2n backward for the gradient that
# passes through it to the prefixes of the layers below. Training the matrix costs 2n more, for its
# own gradient. **Frozen matrices do not need these**.
#
# In attention, a query and a column that it sees cost two products of D numbers in each head: the
# score $q \cdot k$ and the sum of values, so 4C FLOPs forward. Backward has four such products (for
# $dv$, $dp$, $dq$ and $dk$ in 04_fused_attention), so 8C. (A kernel that did not keep the scores
# computes them again, one product more.) With M numbers in the layers' matrices, $n_y$ labels and
# $n_s$ visible pairs of a query and a column, a step takes
#
# $$ 4 M B T + 4 C V n_y + 12 L C n_s, \qquad
# n_s = B \left(T P + \tfrac{T (T + 1)}{2}\right) . $$
#
# **Predict.** How many times as much work is fine-tuning: 3, 2 or 1.5? And what share of
# the step is attention?

# %%
B, T, P = 10, 128, 10
n_y, n_s = B * T, B * (T * P + T * (T + 1) / 2)
terms = {"layers": 4 * M * B * T, "head": 4 * C * V * n_y}
terms["attention"] = 12 * L * C * n_s
total = sum(terms.values())
for name, flops in terms.items():
    print(f"{name:10} {flops / 1e9:6.1f} GFLOP  {flops / total:.0%}")
more = 2 * M * B * T + 2 * C * V * n_y
print(f"fine-tuning: {(total + more) / total:.2f} times as many")

# PyTorch counts the products that really run, here on a small batch
b, t, random = 2, 16, torch.Generator().manual_seed(0)
prefix = minprefix.Prefix.random(config, 5, seed=0)
ids, labels = torch.randint(V, (2, b, t), generator=random)


def counted(at, ids, labels, prefix) -> int:
    """FLOPs of a step's products; attention on a CPU is not counted."""
    with FlopCounterMode(display=False) as counter:
        losses = model.token_losses(ids, labels, at, prefix=prefix)
        losses.mean().backward()
    return counter.get_total_flops()


# below the first layer's c_attn nothing needs a gradient
products = 4 * M * b * t + 4 * C * V * b * t - 2 * 3 * C * C * b * t
assert counted(None, ids, labels, prefix) == products

q = torch.randn(H, t, D, requires_grad=True)  # one layer's attention, no mask
k, v = (torch.randn(H, 5 + t, D, requires_grad=True) for _ in range(2))
with FlopCounterMode(display=False) as counter:
    ((q @ k.mT).softmax(-1) @ v).sum().backward()
assert counter.get_total_flops() == 12 * C * t * (5 + t)

# %% [markdown]
# **Answer.** Almost 1.5 times: prefix-tuning trains very few numbers and still saves only a third
# of fine-tuning's work, because the gradient has to pass through every layer. (LoRA and adapters
# save no more, for the same reason.) Attention is a few percent at this length.
#
# The benchmark also timed a plain large product on its machine. FLOPs divided by that speed are a
# time that no step can beat. How close do we come?

# %%
shares = {}  # of our time that the floor is
for dtype in ("fp32", "bf16"):
    speed = 1e9 * measured("minprefix", "matmul_gflops", dtype=dtype)  # FLOP/s
    times = {
        who: measured(who, dtype=dtype)
        for who in ("minprefix", "peft", "peft-compiled")
    }
    shares[dtype] = 1e3 * total / speed / times["minprefix"]
    told = ", ".join(f"{who} {ms:.0f}" for who, ms in times.items())
    print(f"{dtype}: floor {1e3 * total / speed:.0f} ms; {told}")
    assert times["minprefix"] < times["peft"]
assert shares["bf16"] < shares["fp32"] and shares["fp32"] > 0.5

# %% [markdown]
# In fp32 the floor is most of the step, so no library can be much faster than another, and PEFT
# through `torch.compile` is about as fast as we are. In bf16 this processor multiplies several
# times as fast, so the floor is lower and the rest is a larger share. **The faster the products,
# the more the rest matters.** On a GPU they are faster still.
#
# ## 2. What lies above the floor
# `python -m benchmarks.peft train --profile` runs one step of each method under PyTorch's profiler,
# after checking that all compute the same, and sorts its operators into parts.

# %%
profile = {}  # {dtype: {method: parts}}
for line in read_rows(BENCHMARKS / "cpu" / "profile.csv"):
    profile.setdefault(line["dtype"], {})[line["method"]] = line
parts = (*PARTS, REST)
pictures.parts_of_a_step(profile, parts)
for dtype, part in (
    ("fp32", "norms, GELU, sums, copies"),
    ("bf16", "attention"),
):
    ours, peft = (profile[dtype][who] for who in ("minprefix", "peft"))
    lost = {part: float(peft[part]) - float(ours[part]) for part in parts}
    print(f"{dtype}: PEFT takes {lost[part]:.0f} ms more in '{part}'")
    assert part == max(lost, key=lost.get)

# %% [markdown]
# In fp32 most of the difference is in the part without products: section 3 finds it in GELU. In
# bf16 attention is first. PyTorch's fused attention has a slow backward pass on this CPU, so we use
# two batched products instead. We are not the fastest everywhere: PEFT compiled spends less on head
# and loss. (A profiler takes time of its own for each operator, so the parts say where to look, and
# a clock says how much it is.)
#
# ## 3. The causes, one by one
# What follows is measured on your machine, now, the best of three. Times are printed; that the fast
# way gives the same as the slow one is asserted.


# %%
def best(call) -> float:
    """Milliseconds, the best of three."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return min(times)


def as_written(x: torch.Tensor) -> torch.Tensor:
    inner = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    return 0.5 * x * (1 + torch.tanh(inner))


def one_pass(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


x = torch.randn(B * T, 4 * C, generator=random, requires_grad=True)  # a layer's
gap = (one_pass(x.double()) - as_written(x.double())).abs().max()
assert gap < 1e-13  # fp64; worst seen 4e-16
for name, gelu in (("as written", as_written), ("one pass", one_pass)):
    took = best(lambda gelu=gelu: torch.autograd.grad(gelu(x).sum(), x))
    print(f"GELU {name:10} {took:6.1f} ms a layer, {L * took:5.0f} ms a step")

# %% [markdown]
# **Eight operators for one function.** transformers computes GPT-2's GELU as it is written [2].
# Each operator reads and writes 4C numbers per token, and so does each of its derivatives. The
# arithmetic costs next to nothing; the passes over memory take the time. One operator reads once
# and writes once. `torch.compile` also turns the eight into one.
#
# **Logits that nobody reads.** Half of a row or more is the table, whose tokens have no loss. Their
# logits are V numbers each. What the last layer's MLP adds at those positions is not used either.
#
# **Predict.** How much of a step is saved if half of the positions have no label?

# %%
at = torch.arange(b * t).view(b, t)[:, t // 2 :].flatten()  # the second halves
some = torch.full_like(labels, -100)
some.view(-1)[at] = labels.view(-1)[at]
saved = (4 * C * V + 4 * 8 * C * C) * (b * t - len(at))
assert counted(at, ids, some, prefix) == products - saved
print(f"saved by the formula: {saved / products:.0%} of the products")

examples = encode_examples(tokenizer, load_examples("restaurants", "dev"))[:24]
prefix = minprefix.Prefix.from_words(model, tokenizer, "table-to-text:")
shortest = sorted(examples, key=lambda r: len(r.ids))[:8]
batch = collate(shortest, tokenizer.eos_id)


def everywhere() -> torch.Tensor:
    """The gradient of the table, by way of the logits of all positions."""
    logits = model(batch.input_ids, prefix=prefix)  # (B, T, V)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    return torch.autograd.grad(loss, prefix.prefix_table)[0]


def at_labels() -> torch.Tensor:
    """The same, from logits at the positions `batch.at` alone."""
    where = batch.input_ids, batch.labels, batch.at
    loss = model.token_losses(*where, prefix=prefix).mean()
    return torch.autograd.grad(loss, prefix.prefix_table)[0]


one, other = at_labels(), everywhere()
assert (one - other).abs().max() < 1e-4 * other.abs().max()  # fp32; seen 3e-6
print(f"{len(batch.at)} of {batch.labels.numel()} positions have a label")
print(
    f"everywhere {best(everywhere):.0f} ms, at labels {best(at_labels):.0f} ms"
)
assert 2 * len(batch.at) < batch.labels.numel()

# %% [markdown]
# **Answer.** An eighth of the products, no more: the head is less than a fifth of a step of `mini`.
# On real tables more than half of the positions have no label.
#
# **Padding.** A batch is as wide as its longest row, so in a batch of random rows much is computed
# for nothing. When rows are sorted within pools of 50 batches (`batches.epoch_batches`), those of a
# batch hardly differ in length, and the order of the batches stays random. Here are 24 rows in
# three batches:

# %%
lengths = [len(row.ids) - 1 for row in examples]
order = torch.randperm(len(lengths), generator=random).tolist()
padding = {}
for name, widths in (("shuffled", [lengths[n] for n in order]),
                     ("sorted", sorted(lengths))):  # fmt: skip
    computed = sum(8 * max(widths[n : n + 8]) for n in range(0, 24, 8))
    padding[name] = 1 - sum(lengths) / computed
    print(f"{name:9} {padding[name]:4.0%} of the positions are padding")
assert padding["sorted"] < padding["shuffled"]

# %% [markdown]
# **Copies for each row.** PEFT runs the prefix's MLP on the P positions of every row, and copies
# the result into each row's keys and values in every layer. Here it runs once, and all rows read
# one table. While decoding with K beams, transformers keeps K copies of the prompt's keys and
# values, and moves them whenever beams are exchanged. Here the beams of a row read one copy
# (`caches.BeamCache`). From the benchmark's file:

# %%
grows, rates = {}, {}
for who in ("minprefix", "peft"):
    grows[who] = measured(who, P="200") - measured(who)
    beams = {"work": "generate", "B": "16", "beams": "5", "labels": ""}
    rates[who] = measured(who, "decode_tokens_per_s", **beams)
    print(f"{who:9} P 10 -> 200: {grows[who]:+.0f} ms a step; "
          f"decoding with 5 beams: {rates[who]:.0f} tokens/s")  # fmt: skip
assert grows["peft"] > 2 * grows["minprefix"]
assert rates["minprefix"] > 1.5 * rates["peft"]

# %% [markdown]
# ## 4. On a GPU
# One GPU has run whole steps, with random weights of GPT-2 medium's size.

# %%
steps = read_rows(BENCHMARKS / "gpu" / "steps-h200.csv")
for r in pick(steps, model="random-medium", data="random"):
    if r["method"] not in ("minprefix", "peft"):
        continue
    ratio = f"{float(r['ratio']):.1f} times ours" if r["ratio"] else ""
    size = f"{r['new']} tokens" if r["new"] else f"T {r['T']}"
    print(f"{r['work']:9} B {r['B']:2}, {size:9} {r['method']:10} "
          f"{float(r['ms']):6.1f} ms  {ratio}")  # fmt: skip
named = "gpu", "dtype", "assembler", "torch", "transformers", "peft", "commit"
print(", ".join(f"{name} {r[name]}" for name in named))

# %% [markdown]
# The ratios are larger than on the CPU, as section 1 lets us expect of fast products. And one cost
# is new: each kernel has to be launched, which Python does slowly. So a step is recorded once as a
# **CUDA graph** and replayed with one launch (`graphs.py`).
#
# Where is our own time lost? We put each part of the profile beside its floor: FLOPs over the speed
# of a large product, or bytes over the speed of a large copy, both timed on the same GPU. For the
# parts without products we count each tensor of $B T C$ numbers that must be read or written.
#
# **Predict.** Which part is furthest above its floor: attention, the norms, the layers' products or
# the head?

# %%
kernels = read_rows(BENCHMARKS / "gpu" / "attention-h200.csv")[:2]
PRODUCT = 1e12 * float(kernels[0]["tflops"])  # FLOP/s
COPY = 1e9 * float(kernels[1]["gbs"])  # bytes/s
layers, width, vocab, n = 24, 1024, 50257, 10 * 128  # n: B T
numbers, tensor = 12 * layers * width**2, 2 * n * width / COPY  # s, bf16
flops, moved = work(Shape(10, 128, 16, 10), "forward+backward")
floors = {
    "head: two products": 4 * width * vocab * n / PRODUCT,
    "head: softmax in fp32": 2 * 2 * n * vocab / COPY,  # in, gradient out
    "layers: products": 4 * numbers * n / PRODUCT,
    "attention": layers * max(flops / PRODUCT, moved / COPY),
    "LayerNorm": 2 * layers * (2 + 3) * tensor,  # x, y; x, dy, dx
    "residual sums": 2 * layers * 2 * 3 * tensor,  # two in, one out, both ways
    "GELU": layers * 4 * (2 + 3) * tensor,  # 4C numbers
}
by_commit = {}  # two runs: before and after the changes described below
for line in read_rows(BENCHMARKS / "gpu" / "parts-h200.csv"):
    by_commit.setdefault(line["commit"], []).append(line)
profiled, after = by_commit.values()
ms = {(line["work"], line["part"]): float(line["ms"]) for line in profiled}
lost = {}  # ms
for part, floor in floors.items():
    lost[part] = ms["train", part] - 1e3 * floor
    print(f"{part:22} {ms['train', part]:5.2f} ms, floor {1e3 * floor:5.2f}")
step = sum(x for (work, _), x in ms.items() if work == "train")
need = 1e3 * (floors["head: two products"] + floors["layers: products"])
print(f"all products need {need / step:.0%} of the step's {step:.1f} ms")
assert need < 0.3 * step
assert max(lost, key=lost.get) == "head: two products"
assert ms["train", "GELU"] < 1.5e3 * floors["GELU"]
softmax = "head: softmax in fp32"
assert sorted(lost, key=lost.get)[-2] == softmax
assert ms["train", softmax] > 5e3 * floors[softmax]
of_token = sum(x for (work, _), x in ms.items() if work == "one token")
least = 1e3 * 2 * (numbers + width * vocab) / COPY
print(f"a token: {of_token:.2f} ms, to read the weights once {least:.2f} ms")
assert of_token > 5 * least
pictures.on_the_gpu(profiled, floors)

# %% [markdown]
# **Answer.** The head's two products. The cause is probably that V = 50257 is odd: rows of the
# matrix do not begin at aligned addresses, which fast product kernels need. The softmax in fp32 is
# next: it takes many times its floor. GELU, the residual sums and the layers' products are near
# their floors, so there is little to win. Attention and LayerNorm take about three times theirs,
# but their bars are short.
#
# One token (right) is another world. It takes many times its floor, in hundreds of small kernels
# that wait for one another and for the host.
#
# These findings were acted on: the head's matrix is padded to a multiple of 64 columns, its softmax
# and gradient are one kernel, and a residual sum and the norm after it are one. Here is the same
# step after these changes, beside the time of the same parts before.

# %%
merged = {  # a part after the changes: the parts that it was before
    "products of the layers and the head": (
        "head: two products", "layers: products",
    ),
    "head: softmax and its gradient": (softmax,),
    "LayerNorm with residual sums": ("LayerNorm", "residual sums"),
}  # fmt: skip
now, saved = {line["part"]: float(line["ms"]) for line in after}, {}  # ms
print(f"the step: {sum(now.values()):.2f} ms, before {step:.2f}")
for part, took in now.items():
    was = sum(ms.get(("train", x), 0) for x in merged.get(part, (part,)))
    if was:
        saved[part] = was - took
        print(f"{part:36} {took:5.2f} ms, before {was:5.2f}")
most, second, *_ = sorted(saved, key=saved.get, reverse=True)
assert [most, second] == [*merged][:2]
assert saved[most] > sum(saved.values()) / 2
assert max(abs(saved["attention"]), abs(saved["GELU"])) < 0.02

# %% [markdown]
# More than half of the time saved was the products', and most of the rest the softmax's. Attention
# and GELU took as long as before, so the two runs can be compared.
#
# A token was changed as well: norms, sums and GELU became part of the products, so that a layer has
# five launches in place of ten. **Predict.** How much faster are the products of a token then?

# %%
tried = read_rows(BENCHMARKS / "gpu" / "tokens-h200.csv")
us = {
    row["form"]: float(row["us"])
    for row in pick(tried, what="products of a token", B="1")
}
plain, first = "PyTorch's kernels", "tensor cores, 8 slices of K"
second = "32 columns, 8 where outputs are few"
for form in (plain, first, second):
    print(f"{us[form]:6.0f} us  {form}")
assert us[second] < us[plain] / 2 < us[plain] < us[first]

# %% [markdown]
# **Answer.** The first attempt was slower, with half the launches. A count of launches and bytes
# does not see that one load waits for another, nor the work on 15 rows of padding that tensor cores
# want. The second has the weights in registers before the previous kernel has ended, and no padding
# (`kernels/few_rows.py`). What no clock has seen is an expectation.
#
# ## Common mistakes
# > - **Stopping the clock before the GPU.** A launch returns at once; synchronize first, and warm
# >   up.
# > - **Counting padding as tokens**, which makes the worse order of batches look faster.
# > - **Comparing fp32 with bf16**, or before checking that both compute the same. A wrong result is
# >   often fast.
# > - **Making a small part fast.** If attention is a tenth of a step, an attention kernel that
# >   takes no time at all makes the step 1.1 times as fast.
# > - **Believing a profile's milliseconds.** It slows each operator down; use its proportions.
#
# ## Recap
# - Frozen numbers cost 4 FLOPs per token, not 6; prefix-tuning saves a third of the work, no more.
# - Compare each part with its floor. Where the floor is most of the time, no library is much faster
#   than another.
# - Time is saved by leaving out work: eight passes for one function, B copies of a prefix, logits
#   without a loss, padding, copies of a cache. A fast attention kernel is one such saving among
#   others.
#
# ## Exercises
# 1. *Easy.* Fine-tuning: add the gradients of the matrices to the count, and check it with
#    PyTorch's counter. *Hint:* `model.requires_grad_()`; now the first layer passes a gradient,
#    too.
# 2. *Medium.* From which prefix length on does PEFT's MLP on B P inputs cost as much as the
#    layers, at B 10 and T 128? *Hint:* 6 FLOPs for a trained number, 4 for a frozen one.
# 3. *Medium.* Decoding reads all weights for each token. How many tokens per second of one row
#    does the measured memory speed allow, and how many does `bench.csv` have? What fills the gap?
#    *Hint:* column `read_gb_per_s`.
# 4. *Hard.* What is the least padding that sorting by length can leave, and how much do pools of
#    50 batches lose against it on the restaurants' training rows? *Hint:* `epoch_batches` gives
#    batches.
#
# Solutions: `tutorials/solutions/09_speed.py`.
#
# ## References
# 1. PEFT, prefix tuning: https://huggingface.co/docs/peft/package_reference/prefix_tuning
# 2. Hendrycks & Gimpel 2016, Gaussian Error Linear Units: https://arxiv.org/abs/1606.08415
# 3. Li & Liang 2021, Prefix-Tuning: https://arxiv.org/abs/2101.00190
