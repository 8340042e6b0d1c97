# %% [markdown]
# # 9. Where a step's time goes
#
# **What you will learn.** To ask of a training step what it must cost at least, to compare each of
# its parts with that floor, and to find the cause where a part takes longer: here and in
# transformers + PEFT [1], on a CPU and on a GPU. Three of the causes you measure yourself.
#
# **What to know first.** Tutorial 1 for the model and
# [the table of letters](01_gpt2_from_scratch.py); tutorial 4 for bytes, FLOPs and the roofline.
#
# **Running time.** Half a minute on two CPU cores.
#
# **Sources.** The times are those of the committed files `benchmarks/cpu/*.csv`, which name
# machine, versions and commit (`make bench-cpu` makes them again), and of `benchmarks/gpu/*.csv`
# (`make bench-gpu`). Nothing below is typed from them: each number is read and printed.

# %%
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from figure import FAINT, OTHER, PREFIX, TEXT, new, show
from torch.utils.flop_counter import FlopCounterMode

import minprefix
from benchmarks.kernels.attention import Shape, work
from benchmarks.machine import read_rows
from benchmarks.peft.limits import train_flops
from benchmarks.peft.pictures import PARTS, REST
from minprefix.data.batches import collate, encode_examples
from minprefix.data.load import load_examples

BENCHMARKS = Path(minprefix.__file__).parents[1] / "benchmarks"
model, tokenizer = minprefix.load("mini")
model.requires_grad_(False)
config = model.config
L, C, V = config.n_layer, config.n_embd, config.vocab_size
N = 12 * L * C * C  # numbers in the matrices of the layers
bench = read_rows(BENCHMARKS / "cpu" / "bench.csv")


def measured(method: str, column: str = "ms", **wanted) -> float:
    """A column of the one measurement of mini with these properties."""
    usual = {"work": "train", "model": "mini", "B": 10, "T": 128, "P": 10,
             "data": "random", "labels": "all", "dtype": "fp32"}  # fmt: skip
    if wanted.get("work") == "generate":
        usual |= {"B": 16, "beams": 1, "labels": "", "data": "random"}
    wanted = {**usual, **wanted, "method": method}
    found = [r for r in bench if all(r[x] == str(y) for x, y in wanted.items())]
    assert len(found) == 1, (wanted, len(found))
    return float(found[0][column])


# %% [markdown]
# ## 1. The floor
# A matrix with n numbers costs a token 2n FLOPs forward, and 2n backward for the gradient that
# passes through it. Training the matrix costs 2n more, for its own gradient. **Frozen matrices do
# not pay these**. With N numbers in the layers' matrices, m labels, and W pairs of a query and a
# column that it sees (each takes 4C FLOPs forward and 8C backward in a layer), a step takes
#
# $$ 4 N B T + 4 C V m + 12 L C W, \qquad W = B \left(T P + \tfrac{T (T + 1)}{2}\right) . $$
#
# **Predict.** How many times as much work is fine-tuning: 3, 2 or 1.5? And what share of
# the step is attention?

# %%
B, T, P = 10, 128, 10
m, W = B * T, B * (T * P + T * (T + 1) / 2)
terms = {"layers": 4 * N * B * T, "head": 4 * C * V * m}
terms["attention"] = 12 * L * C * W
total = sum(terms.values())
for name, flops in terms.items():
    print(f"{name:10} {flops / 1e9:6.1f} GFLOP  {flops / total:.0%}")
more = 2 * N * B * T + 2 * C * V * m
print(f"fine-tuning: {(total + more) / total:.2f} times as many")
assert total == train_flops(config, [T] * B, m, P)  # the benchmark's formula

b, t = 2, 16  # PyTorch counts the products that really run, on a small batch
prefix = minprefix.Prefix.random(config, 5, seed=0)
random = torch.Generator().manual_seed(0)
ids, labels = torch.randint(V, (2, b, t), generator=random)


def counted(at, ids, labels, prefix) -> int:
    """FLOPs of a step's products; attention on a CPU is not counted."""
    with FlopCounterMode(display=False) as counter:
        losses = model.token_losses(ids, labels, at, prefix=prefix)
        losses.mean().backward()
    return counter.get_total_flops()


# below the first layer's c_attn nothing needs a gradient
products = 4 * N * b * t + 4 * C * V * b * t - 2 * 3 * C * C * b * t
assert counted(None, ids, labels, prefix) == products

# %% [markdown]
# **Answer.** Fine-tuning takes not quite half as much again: prefix-tuning trains very few numbers
# and still saves only a third of the work, because the gradient has to pass through every layer.
# Attention, the subject of tutorial 4, is a few percent at this length.
#
# The benchmark also timed a plain large product on its machine. FLOPs divided by that speed are a
# time that no step can beat. How close do we come?

# %%
for dtype in ("fp32", "bf16"):
    speed = 1e9 * measured("minprefix", "matmul_gflops", dtype=dtype)  # FLOP/s
    line = f"{dtype}: floor {1e3 * total / speed:4.0f} ms;"
    for who in ("minprefix", "peft", "peft-compiled"):
        line += f" {who} {measured(who, dtype=dtype):.0f},"
    print(line.rstrip(","))
    assert 1e3 * total / speed < measured("minprefix", dtype=dtype)
    assert measured("minprefix", dtype=dtype) < measured("peft", dtype=dtype)

# %% [markdown]
# In fp32 the floor is most of the step. Nobody can be much faster than anybody else there, and PEFT
# through `torch.compile` is as fast as we are. In bf16 this processor multiplies several times as
# fast, the floor sinks, and everything else comes to light. **The faster the products, the more the
# rest matters.** Keep this in mind for the GPU.
#
# ## 2. What lies above the floor
# `python -m benchmarks.peft train --profile` runs one step of each method under PyTorch's profiler,
# after checking that all compute the same, and sorts its operators into parts.

# %%
profile = {}  # {dtype: {method: parts}}
for r in read_rows(BENCHMARKS / "cpu" / "profile.csv"):
    profile.setdefault(r["dtype"], {})[r["method"]] = r
parts = (*PARTS, REST)
colours = "#8c6bb1", OTHER, PREFIX, TEXT, "#c44e52", FAINT
figure, axes = new(len(profile), width=5.0)
for axis, (dtype, methods) in zip(figure.axes, profile.items(), strict=True):
    left = [0.0] * len(methods)
    for part, colour in zip(parts, colours, strict=True):
        widths = [float(r[part]) for r in methods.values()]
        axis.barh(list(methods), widths, left=left, color=colour, label=part)
        left = [x + y for x, y in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set(xlabel="a training step (ms)", title=f"CPU, {dtype}, B {B}, T {T}")
handles, names = figure.axes[0].get_legend_handles_labels()
figure.legend(handles, names, ncols=3, loc="outside lower center")
show(figure, "09_parts")
for dtype, methods in profile.items():
    ours, peft = methods["minprefix"], methods["peft"]
    lost = {part: float(peft[part]) - float(ours[part]) for part in parts}
    first, second = sorted(parts, key=lost.get, reverse=True)[:2]
    print(f"{dtype}: PEFT takes {lost[first]:.0f} ms more in '{first}', "
          f"{lost[second]:.0f} in '{second}'")  # fmt: skip

# %% [markdown]
# In fp32 most of the difference is in the part "norms, GELU, sums, copies", where no product is
# made at all: section 3 finds it in GELU. In bf16 attention joins it. There PyTorch's fused
# attention has a slow backward pass on this CPU, and we take two batched products instead. We are
# not the fastest everywhere: `torch.compile` merges the passes over the logits, and PEFT compiled
# spends less on head and loss than we do. (A profiler takes time of its own for each operator, so
# the parts say where to look, and the clock says how much it is.)
#
# ## 3. The causes, one by one
# What follows is measured on your machine, now, the best of three. Times are printed and never
# asserted. What is asserted: that the fast way gives the same as the slow one.


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
# and writes once, and `torch.compile` makes one of the eight, too.
#
# **Logits that nobody reads.** Half of a row or more is the table, whose tokens have no loss. Their
# logits are V numbers each, and what the last layer's MLP adds at those positions is not used by
# anything either. **Predict.** how much of a step is saved if half of the positions have
# a label?

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


def gradient(loss: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, prefix.prefix_table)[0]


def agree(a: torch.Tensor, b: torch.Tensor) -> None:
    """fp32 sums in another order; worst seen 3e-6 of the largest."""
    assert ((a - b).abs().max() / b.abs().max()).item() < 1e-4


def everywhere() -> torch.Tensor:
    logits = model(batch.input_ids, prefix=prefix)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())


def losses_of(batch) -> torch.Tensor:
    where = batch.input_ids, batch.labels, batch.at
    return model.token_losses(*where, prefix=prefix)


agree(gradient(losses_of(batch).mean()), gradient(everywhere()))
print(f"{len(batch.at)} of {batch.labels.numel()} positions have a label")
print(f"everywhere {best(lambda: gradient(everywhere())):.0f} ms")
print(f"at labels {best(lambda: gradient(losses_of(batch).mean())):.0f} ms")

# %% [markdown]
# **Answer.** The formula saves an eighth of the products, no more: the head is less than a fifth of
# a step of `mini`. On real tables more than half of the positions have no label.
#
# **Padding.** A batch is as wide as its longest row. If rows are drawn at random, much is computed
# for nothing. Sorted within pools of 50 batches they hardly differ in length
# (`batches.epoch_batches`), and the order of the batches stays random. Here, with 24 rows in three
# batches:

# %%
order = torch.randperm(len(examples), generator=random).tolist()
by_length = sorted(order, key=lambda n: len(examples[n].ids))


def epoch(order: list[int]) -> torch.Tensor:
    """Gradient of the summed loss of all rows, in batches of 8."""
    total = torch.zeros_like(prefix.prefix_table)
    for n in range(0, len(order), 8):
        rows = [examples[i] for i in order[n : n + 8]]
        total += gradient(losses_of(collate(rows, tokenizer.eos_id)).sum())
    return total


agree(epoch(by_length), epoch(order))
real, padding = sum(len(r.ids) - 1 for r in examples), {}
for name, which in (("shuffled", order), ("sorted", by_length)):
    lengths = [len(examples[n].ids) - 1 for n in which]
    computed = sum(8 * max(lengths[n : n + 8]) for n in range(0, len(which), 8))
    padding[name] = 1 - real / computed
    print(f"{name:9} {padding[name]:4.0%} padding, "
          f"{best(lambda which=which: epoch(which)):.0f} ms")  # fmt: skip
assert padding["sorted"] < padding["shuffled"]

# %% [markdown]
# **The prefix once for each row.** PEFT runs the prefix's MLP on the P positions of every row and
# sums the gradients of B equal results. Here it runs once, and the table has no row dimension. The
# MLP is trained, so a position costs 6 FLOPs for each of its numbers. Does this explain how PEFT's
# time grows with P?

# %%
mlp = C * 512 + 512 * 2 * L * C  # numbers of the MLP
speed = 1e6 * measured("minprefix", "matmul_gflops")  # FLOP/ms; the MLP is fp32
for p in (50, 100, 200):
    ours, peft = (measured(x, P=p) - measured(x) for x in ("minprefix", "peft"))
    extra = 6 * mlp * (B - 1) * (p - 10) / speed
    print(f"P 10 -> {p:3}: ours {ours:+.0f} ms; with B MLPs "
          f"{ours + extra:+.0f} ms expected; PEFT {peft:+.0f} ms")  # fmt: skip

# %% [markdown]
# Roughly: at P = 200 the expectation is right, below it PEFT grows a little less. Copying the
# prefix into each row's keys, in every layer, comes on top of it. The same thing happens while
# decoding. With K beams transformers copies prompt and prefix for each beam, reads the prompt K
# times, and reorders the whole cache at every step. Here beams are queries on the same keys
# (`caches.BeamCache`):

# %%
for beams in (1, 5):
    for who in ("minprefix", "peft"):
        how = {"work": "generate", "beams": beams}
        prompts = measured(who, "prefill_ms", **how)
        rate = measured(who, "decode_tokens_per_s", **how)
        print(f"beams {beams}, {who:9} prompts {prompts:5.0f} ms, "
              f"then {rate:5.0f} tokens/s")  # fmt: skip

# %% [markdown]
# With five beams PEFT reads the prompts five times and more, and writes half as many tokens. With
# one beam the two are close, and neither is near the floor, which is to read every weight once for
# each step: exercise 3 asks what fills the gap.
#
# ## 4. On a GPU
# One GPU has run whole steps, with random weights of GPT-2 medium's size.

# %%
for r in read_rows(BENCHMARKS / "gpu" / "steps-h200.csv"):
    ratio = f"{float(r['ratio']):.1f} times ours" if r["ratio"] else ""
    size = f"T {r['T']}" if r["T"] else f"{r['new']} tokens"
    print(f"{r['work']:9} B {r['B']:2}, {size:9} {r['method']:10} "
          f"{float(r['ms']):6.1f} ms  {ratio}")  # fmt: skip
named = "gpu", "dtype", "assembler", "torch", "transformers", "peft", "commit"
print(", ".join(f"{name} {r[name]}" for name in named))

# %% [markdown]
# Why so much faster than on a CPU, relative to PEFT? The products are so fast that the rest is most
# of the step, as section 1 promised, and one cost is new: each kernel has to be launched, which
# Python does slowly. So a step is recorded once as a **CUDA graph** and replayed with one launch
# (`graphs.py`).
#
# Where is our own time lost? We put each part of the profile beside its floor: FLOPs over the speed
# of a large product, or bytes over the speed of a large copy, both timed on the same GPU. For the
# parts without products we count each tensor of n C numbers that must be read or written.

# %%
kernels = read_rows(BENCHMARKS / "gpu" / "attention-h200.csv")[:2]
PRODUCT = 1e12 * float(kernels[0]["tflops"])  # FLOP/s
COPY = 1e9 * float(kernels[1]["gbs"])  # bytes/s
layers, width, vocab, n = 24, 1024, 50257, 10 * 128
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
profiled = read_rows(BENCHMARKS / "gpu" / "parts-h200.csv")
of_step = {r["part"]: float(r["ms"]) for r in profiled if r["work"] == "train"}
for part, floor in floors.items():
    print(f"{part:22} {of_step[part]:5.2f} ms, floor {1e3 * floor:5.2f}")
lost = {part: of_step[part] - 1e3 * floor for part, floor in floors.items()}
assert max(lost, key=lost.get) == "head: two products"
assert of_step["GELU"] < 1.5e3 * floors["GELU"]

figure, (left, right) = new(2, width=6.0, height=3.4)
for axis, work_name in ((left, "train"), (right, "one token")):
    rows = [r for r in profiled if r["work"] == work_name]
    names = [r["part"] for r in rows]
    colours = [PREFIX if x == "attention" else TEXT for x in names]
    axis.barh(names, [float(r["ms"]) for r in rows], color=colours)
    axis.invert_yaxis()
    axis.set(xlabel="time (ms)", title=f"{rows[0]['gpu']}, {work_name}")
marks = [1e3 * floor for floor in floors.values()]
left.plot(marks, list(floors), "k|", ms=14, label="floor")
left.legend(frameon=False)
show(figure, "09_gpu")

# %% [markdown]
# Read it from the left figure. GELU, the residual sums and the layers' products are near their
# floors: there is little to win. LayerNorm and attention take about three times theirs, but their
# bars are short. **The head's two products are far from theirs**, and the number of columns is the
# cause: V = 50257 is odd, so rows of the matrix do not begin at aligned addresses, and cuBLAS falls
# back to slow kernels. The softmax in fp32 passes over all logits several times where twice would
# do.
#
# One token (right) is another world. Its floor is the time to read all weights once, and it takes
# many times that, in hundreds of small kernels that wait for one another and for the host.

# %%
of_token = sum(float(r["ms"]) for r in profiled if r["work"] == "one token")
least = 1e3 * 2 * (numbers + width * vocab) / COPY
print(f"a token: {of_token:.2f} ms, the weights alone {least:.2f} ms")
assert of_token > 5 * least

counts = read_rows(BENCHMARKS / "launches.csv")
expected = {}
for form in ("before", "fused"):
    graphs = [r for r in counts if (r["form"], r["graphs"]) == (form, "1")]
    for wanted in (("train", "10"), ("generate", "1")):  # greedy comes first
        r = next(r for r in graphs if (r["work"], r["B"]) == wanted)
        launches = float(r["launches"])
        print(f"{form}, {r['work']}, B {r['B']}: {launches:.0f} launches")
        if r["work"] == "train":
            expected[form] = float(r["us"]) / 1e3  # ms
print(f"expected of a training step: before {expected['before']:.1f} ms, "
      f"fused {expected['fused']:.1f} ms; "
      f"measured before: {sum(of_step.values()):.1f} ms")  # fmt: skip
assert expected["fused"] < expected["before"] < sum(of_step.values())

# %% [markdown]
# These findings were acted on: the head's matrix is padded to a multiple of 64 columns, and its
# softmax and gradient are one kernel; the residual sum and the layer norm after it are one kernel;
# the attention kernel writes keys and values into the cache itself; the choice of the next token is
# a part of the graph. **No GPU has run any of this yet.** The lines above are counts, made without
# one. The expected time of a kernel is that of its bytes or of its FLOPs, the longer of the two,
# plus 2 µs for the launch. Such a sum is a floor: for the old step it says far less than what was
# measured. A claim of speed needs a clock.
#
# ## Common mistakes
# > - **Stopping the clock before the GPU.** A launch returns at once; synchronize first, and warm
# >   up.
# > - **Counting padding as tokens**, which makes the worse order of batches look faster.
# > - **Comparing fp32 with bf16**, or a compiled model with one that is not.
# > - **Comparing before checking that both compute the same.** A wrong result is often fast.
# > - **Making a small part fast.** If attention is a tenth of a step, an attention kernel that
# >   takes no time at all makes the step 1.1 times as fast.
# > - **Believing a profile's milliseconds.** It slows each operator down; use its proportions.
#
# ## Recap
# - Frozen numbers cost 4 FLOPs per token, not 6; prefix-tuning saves a third of the work, no more.
# - Compare each part with its floor. Where the floor is most of the time, no library is much faster
#   than another.
# - Time is won where work is not needed: eight passes for one function, B copies of a prefix,
#   logits without a loss, padding, copies of a cache.
# - A kernel is one of these causes among others, and what no clock has seen is an expectation.
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
