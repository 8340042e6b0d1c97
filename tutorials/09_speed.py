# %% [markdown]
# # 9. Where a step's time goes
#
# **What you will learn.** To read a profile of prefix-tuning: what a training step must compute at
# least, where this library and transformers + PEFT [1] spend more than that, and the cause of each
# difference. Then two of the causes are measured again here, on your machine.
#
# **What to know first.** Tutorial 1 (`01_gpt2_from_scratch`): the model; tutorial 4
# (`04_fused_attention`): bytes, FLOPs, the roofline. Letters: batch B, tokens T, prefix positions
# P, layers L, width C, vocabulary V.
#
# **Running time.** Half a minute on two CPU cores.
#
# **Sources.** The times are those of the committed files `benchmarks/cpu/*.csv`, which name
# machine, versions and commit (`make bench-cpu` makes them again), and of `benchmarks/gpu/*.csv`
# (`make bench-gpu`). Nothing below is typed from them: each number is read and printed.

# %%
import csv
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from figure import FAINT, OTHER, PREFIX, TEXT, new, show
from torch.utils.flop_counter import FlopCounterMode

import minprefix
from benchmarks.peft.limits import train_flops
from benchmarks.peft.pictures import PARTS, REST
from minprefix.data.batches import collate, encode_examples
from minprefix.data.load import load_examples

BENCHMARKS = Path(minprefix.__file__).parents[1] / "benchmarks"
model, tokenizer = minprefix.load("mini")
model.requires_grad_(False)
config = model.config
L, C, V = config.n_layer, config.n_embd, config.vocab_size


def table(*parts: str) -> list[dict[str, str]]:
    """The rows of a CSV below benchmarks/; none where there is no such file."""
    path = BENCHMARKS.joinpath(*parts)
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


bench = table("cpu", "bench.csv")


def row(method: str, work: str = "train", **wanted) -> dict[str, str]:
    """The one row of mini with these columns; B 10, T 128, P 10, random tokens, all labels."""
    usual = {"B": 10, "T": 128, "P": 10, "data": "random", "labels": "all", "dtype": "fp32"}
    if work == "generate":
        usual = {"B": 16, "T": 128, "P": 10, "beams": 1, "dtype": "fp32"}
    wanted = usual | wanted | {"method": method, "work": work, "model": "mini"}
    (found,) = (r for r in bench if all(r[k] == str(v) for k, v in wanted.items()))
    return found


def ms(method: str, work: str = "train", column: str = "ms", **wanted) -> float:
    return float(row(method, work, **wanted)[column])


# %% [markdown]
# ## 1. One step, in parts
# `python -m benchmarks.peft train --profile` runs one training step of each method under PyTorch's
# profiler, with the same weights, batches and dtype, after it has checked that they compute the
# same, and sorts its operators into parts. "compiled" is the method through `torch.compile`.

# %%
panels = {}  # dtype: rows
for r in table("cpu", "profile.csv"):
    panels.setdefault(r["dtype"], []).append(r)

parts = (*PARTS, REST)
for dtype, rows in panels.items():
    names = [r["method"] for r in rows]
    print(f"{f'{dtype}, ms of one step':31}" + "".join(f"{name:>15}" for name in names))
    for part in parts:
        print(f"  {part:29}" + "".join(f"{float(r[part]):15.1f}" for r in rows))
    print(f"  {'sum, under the profiler':29}"
          + "".join(f"{sum(float(r[part]) for part in parts):15.1f}" for r in rows))  # fmt: skip
    print(f"  {'a step without the profiler':29}"
          + "".join(f"{ms(name, dtype=dtype):15.1f}" for name in names))  # fmt: skip

colours = dict(zip(parts, ("#8c6bb1", OTHER, PREFIX, TEXT, "#c44e52", FAINT), strict=True))
figure, axes = new(len(panels), width=5.0)
for axis, (dtype, rows) in zip(figure.axes, panels.items(), strict=True):
    left = [0.0] * len(rows)
    for part in parts:
        widths = [float(r[part]) for r in rows]
        axis.barh([r["method"] for r in rows], widths, left=left, color=colours[part], label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    r = rows[0]
    axis.set(xlabel="one training step (ms)", title=f"CPU, {dtype}, B {r['B']}, T {r['T']}")
handles, labels = figure.axes[0].get_legend_handles_labels()
figure.legend(handles, labels, frameon=False, ncols=3, loc="outside lower center", fontsize=9)
show(figure, "09_parts")

# %% [markdown]
# These are parts of a single step, and a profiler takes time of its own for each operator that it
# sees: compare the last two lines. The parts say where to look; the clock says how much it is.
#
# ## 2. What a step must compute
# Count FLOPs from the parameters. A matrix with n numbers costs a token 2n FLOPs forward and 2n
# backward, for the gradient that passes through it. Fine-tuning needs 2n more, for the gradient of
# the matrix itself; **frozen matrices have none**. With $N = 12 L C^2$ numbers in the layers, m
# labels, and $W$ visible pairs of a query and a column, each of which takes 4C forward and 8C
# backward in a layer:
#
# $$ 4 N B T + 4 C V m + 12 L C W, \qquad W = B \left(T P + \tfrac{T (T + 1)}{2}\right) $$

# %%
B, T, P = 10, 128, 10
N, m, W = 12 * L * C * C, B * T, B * (T * P + T * (T + 1) / 2)
terms = {"layers": 4 * N * B * T, "head": 4 * C * V * m, "attention": 12 * L * C * W}
total = sum(terms.values())
assert total == train_flops(config, [T] * B, m, P)  # the benchmark's own formula
for name, flops in terms.items():
    print(f"{name:12} {flops / 1e9:7.1f} GFLOP  {flops / total:.0%}")
print(f"in all       {total / 1e9:7.1f} GFLOP, and {total / 1e9 + 2 * N * B * T / 1e9:.1f} "
      "if the layers' matrices were trained")  # fmt: skip

# %% [markdown]
# Is that what really runs? PyTorch can count the FLOPs of matrix products as they happen (its
# counter does not see attention on a CPU). On a small batch they are the formula's but for one
# thing that the formula leaves in: in the first layer nothing is passed back through `c_attn`,
# because the embeddings under it need no gradient.


# %%
def counted(at: torch.Tensor | None, ids, labels, prefix) -> int:
    with FlopCounterMode(display=False) as counter:
        model.token_losses(ids, labels, at, prefix=prefix).mean().backward()
    return counter.get_total_flops()


b, t = 2, 16
prefix = minprefix.Prefix.random(config, 5, seed=0)
ids, labels = torch.randint(V, (2, b, t), generator=torch.Generator().manual_seed(0))
products = 4 * N * b * t + 4 * C * V * b * t - 2 * 3 * C * C * b * t
found = counted(None, ids, labels, prefix)
print(f"counted {found / 1e9:.4f} GFLOP, by formula {products / 1e9:.4f}")
assert found == products

# %% [markdown]
# Bytes. Weights are read once forward and once backward. Per token and layer, activations of 16C
# numbers are written, read, read again by the backward pass, and their gradients written and read.
# Divided by what this machine was measured to reach, in a plain product and in a plain sum, both
# give a time that no step can beat.

# %%
print(f"{'':6} {'products, ms':>13} {'memory, ms':>11} {'measured: ours':>15} {'PEFT':>7}")
for dtype, e in (("fp32", 4), ("bf16", 2)):
    mine = row("minprefix", dtype=dtype)
    moved = e * (2 * (N + C * V) + 5 * 16 * C * L * B * T)  # bytes
    speed = float(row("minprefix", "generate", dtype=dtype)["read_gb_per_s"])
    print(f"{dtype:6} {1e3 * total / float(mine['matmul_gflops']) / 1e9:13.0f} "
          f"{1e3 * moved / speed / 1e9:11.0f} {float(mine['ms']):15.0f} "
          f"{ms('peft', dtype=dtype):7.0f}")  # fmt: skip

# %% [markdown]
# In fp32 the products are most of the step for both: there is not much to win, and `torch.compile`
# brings PEFT to the same time. In bf16 the products take a fraction of that (if the processor has
# instructions for it), and everything else shows.
#
# ## 3. The causes, one by one
# **GELU as eight operators.** transformers computes GPT-2's GELU as written, $0.5\, x\, (1 +
# \tanh(\sqrt{2/\pi}\,(x + 0.044715\, x^3)))$ [2]: each operator reads and writes 4C numbers per
# token, and so does each of its derivatives. Here it is one operator, and `torch.compile` makes it
# one, too. It is in the part "norms, GELU, sums, copies", with others; section 5 measures it alone.

# %%
part = "norms, GELU, sums, copies"
for dtype in ("fp32", "bf16"):
    by = {r["method"]: float(r[part]) for r in panels[dtype]}
    print(f"{dtype}: {part}: ours {by['minprefix']:.0f} ms, PEFT {by['peft']:.0f} ms, "
          f"PEFT compiled {by['peft-compiled']:.0f} ms")  # fmt: skip

# %% [markdown]
# **Attention.** PEFT passes the prefix as `past_key_values`, a cache that was never filled by
# tokens: for each row its own copy, which every layer concatenates with the row's keys (and, where
# rows are padded, a mask of ones for it). On a GPU our kernel does neither. *On a CPU we
# concatenate as well*, and in fp32 the parts hardly differ. In bf16 they do, for another reason:
# there PyTorch's fused attention has a slow backward pass, and two batched products are faster at
# usual lengths.

# %%
for r in table("cpu_attention.csv"):
    if r["T"] == "128":
        print(f"{r['dtype']:9} B {r['B']}, T {r['T']}: fused attention {r['fused_ms']:>6} ms, "
              f"two batched products {r['products_ms']:>6} ms")  # fmt: skip
for dtype in ("fp32", "bf16"):
    by = {r["method"]: float(r["attention"]) for r in panels[dtype]}
    print(f"{dtype}: attention of a step: ours {by['minprefix']:.0f} ms, PEFT {by['peft']:.0f} ms")

# %% [markdown]
# **The prefix once per row.** PEFT runs the prefix's MLP (C to 512 to 2LC) on the P positions of
# *each row*, B P inputs, and sums the gradients of the B equal results. Here it runs once, on P
# inputs, and the table has no row dimension at all. The difference grows with P. Since the MLP is
# trained, it takes 6 FLOPs per weight and input; where P is large, that is the difference:


# %%
mlp = C * 512 + 512 * 2 * L * C  # weights
rate = 1e6 * ms("minprefix", column="matmul_gflops")  # FLOP per ms; the MLP is fp32 in both dtypes
print("ms of a step more than at P 10:  ours  + PEFT's MLP, at full speed  = sum  PEFT, measured")
for dtype in ("fp32", "bf16"):
    for p in (50, 100, 200):
        ours, peft = (ms(x, P=p, dtype=dtype) - ms(x, dtype=dtype) for x in ("minprefix", "peft"))
        extra = 6 * mlp * (B - 1) * (p - 10) / rate
        print(f"  {dtype}, P {p:3} {ours:25.0f} {extra:28.0f} {ours + extra:7.0f} {peft:16.0f}")

lengths = (1, 10, 50, 100, 200)
figure, axes = new(2)
for who, colour in (("minprefix", PREFIX), ("peft", OTHER)):
    rates = [ms(who, P=p, dtype="bf16", column="tokens_per_s") for p in lengths]
    axes[0].plot(lengths, rates, "o-", color=colour, label=who)
axes[0].set(xlabel="prefix positions P", ylabel="tokens/s", ylim=(0, None), title="training, bf16")
axes[0].legend(frameon=False)
names = {"restaurants": "restaurants", "e2e": "E2E"}
bars = {"minprefix": PREFIX, "peft": OTHER, "peft-shuffled": FAINT}
for n, (who, colour) in enumerate(bars.items()):
    heights = [ms(who, data=d, labels="targets", dtype="bf16", column="tokens_per_s",
                  T=81 if d == "restaurants" else 65) for d in names]  # fmt: skip
    axes[1].bar([x + 0.27 * (n - 1) for x in range(2)], heights, 0.25, color=colour, label=who)
axes[1].set_xticks(range(2), names.values())
axes[1].set(ylabel="real tokens/s", title="training on tables, B 10, bf16", ylim=(0, 8500))
axes[1].legend(frameon=False, loc="upper right", ncols=3, fontsize=8)
show(figure, "09_causes")

# %% [markdown]
# **Padding.** A batch is as wide as its longest row. Drawn at random, rows of a batch differ in
# length, and the rest is computed for nothing. Sorted within pools of 50 batches, they hardly
# differ (`batches.epoch_batches`). "peft-shuffled" is PEFT with batches as a plain data loader
# makes them, "peft" gets ours.

# %%
for dtype in ("fp32", "bf16"):
    for data, length in (("restaurants", 81), ("e2e", 65)):
        kind = {"data": data, "labels": "targets", "T": length, "dtype": dtype}
        print(f"{dtype} {data:12}" + ";  ".join(
            f"{who} {ms(who, column='padding', **kind):.1f} % padding, "
            f"{ms(who, column='tokens_per_s', **kind):,.0f} tokens/s"
            for who in ("minprefix", "peft", "peft-shuffled")))  # fmt: skip

# %% [markdown]
# **Head and last MLP where there are labels only.** Half of a row or more is the source, whose
# tokens have no loss. Their logits are V numbers each that nobody reads; nor does anything read
# what the last layer's MLP adds at those positions, since no later attention follows. PEFT makes
# all logits, as the model's forward pass always returns them. By formula, at m of the n = B T
# positions:
#
# $$ \text{saved} = 4 C V (n - m) + 4 \cdot 8 C^2 (n - m) $$

# %%
at = torch.arange(b * t).view(b, t)[:, t // 2 :].flatten()  # the second half of each row
some = torch.full_like(labels, -100)
some.view(-1)[at] = labels.view(-1)[at]
saved = (4 * C * V + 4 * 8 * C * C) * (b * t - len(at))
found = counted(at, ids, some, prefix)
print(f"counted {found / 1e9:.4f} GFLOP, by formula {(products - saved) / 1e9:.4f}")
assert found == products - saved
for who in ("minprefix", "peft"):
    print(f"{who:10} fp32: with a loss everywhere {ms(who):.0f} ms, "
          f"on the second half {ms(who, labels='targets'):.0f} ms")  # fmt: skip

# %% [markdown]
# And where there is a loss, PEFT's route writes all logits in fp32, then their softmax, then their
# gradient. Here the gradient of the frozen head's input is made with the loss, from the logits of
# some positions at a time (`losses.py`): the same products, less memory. The parts of section 1
# also show where we are not the fastest: `torch.compile` merges the passes over the logits, and
# PEFT compiled spends less on head and loss than we do.
#
# **bf16 weights.** The frozen model never takes an optimiser step, so nothing needs its weights in
# fp32: they are *stored* in bf16, and no cast runs in a step. The prefix, which does take steps,
# stays in fp32.
#
# **Beams.** With K beams the `generate` of transformers copies prompt and prefix for each beam and
# reads the prompt K times; then it reorders the whole cache in every step. Here the prompt is read
# once, beams are queries on the same keys, and new keys stay where they were written
# (`caches.BeamCache`).

# %%
print("B 16, 64 new tokens, fp32      reading the prompts, ms    then tokens/s")
for beams in (1, 5):
    for who in ("minprefix", "peft"):
        prefill, rate = (ms(who, "generate", beams=beams, column=c)
                         for c in ("prefill_ms", "decode_tokens_per_s"))  # fmt: skip
        print(f"  {beams} beam{'s' * (beams > 1):1}, {who:10} {prefill:30.0f} {rate:16.0f}")

# %% [markdown]
# **What it costs to call.** Before any work an operator is called from Python. On a CPU that is
# nothing beside a layer; on a GPU it can be as long as the kernel. So in eager mode we call an
# `autograd.Function`, and a `torch.library` operator only where something watches.

# %%
for r in table("call_overhead.csv"):
    share = L * float(r["forward_backward_us"]) / 1e3 / ms("minprefix")
    print(f"{r['form']:18} {float(r['forward_backward_us']):6.1f} us a call, {L} layers: "
          f"{share:.2%} of a step")  # fmt: skip

# %% [markdown]
# ## 4. On a GPU
# The same causes with other weights. A GPU makes the products of a step so fast that the rest is
# most of it, and every kernel has to be launched by the host, which Python does slowly. So a step
# is recorded once as a **CUDA graph** and then replayed with one launch (`graphs.py`;
# `MINPREFIX_CUDA_GRAPHS=0` turns this off). What one GPU measured, with random weights of GPT-2
# medium's size:

# %%
steps = table("gpu", "steps-h200.csv")
where = steps[0]
print(f"{where['gpu']}, {where['dtype']}, torch {where['torch']}, Triton {where['triton']}, "
      f"{where['assembler']}, commit {where['commit']}")  # fmt: skip
print(f"transformers {where['transformers']}, PEFT {where['peft']}\n")
for r in steps:
    what = f"B {r['B']}, T {r['T']}" if r["work"] == "train" else f"B {r['B']}, {r['new']} tokens"
    ratio = f"{float(r['ratio']):.1f} times ours" if r["ratio"] else ""
    print(
        f"{r['work']:9} {what:16} {r['method']:10} {float(r['ms']):7.1f} ms  {ratio}  {r['note']}"
    )

# %% [markdown]
# And where our own time goes. In training the head is the largest part, not attention. Its matrix
# has an odd number of columns, V, for which cuBLAS has no fast kernels, and the softmax over V
# logits passes over memory several times. In generation with one row every product is a matrix
# times a vector, bound by reading the matrix, and many small kernels wait for one another.

# %%
figure, panes = new(2, width=6.0, height=3.4)
for axis, work in zip(panes, ("train", "one token"), strict=True):
    rows = [r for r in table("gpu", "parts-h200.csv") if r["work"] == work]
    total = sum(float(r["ms"]) for r in rows)
    print(
        f"{work}: {total:.2f} ms"
        + "".join(
            f"\n  {r['part']:48} {float(r['ms']):6.3f} ms {float(r['ms']) / total:5.0%}"
            for r in rows
        )
    )
    mine = [PREFIX if r["part"] == "attention" else TEXT for r in rows]
    axis.barh([r["part"] for r in rows], [float(r["ms"]) for r in rows], color=mine)
    axis.invert_yaxis()
    size = f"B {rows[0]['B']}" + (f", T {rows[0]['T']}" if rows[0]["T"] else "")
    axis.set(xlabel="time (ms)", title=f"{work}, {size}, {rows[0]['gpu']}")
show(figure, "09_gpu")

# %% [markdown]
# ## 5. Measured here
# Times below are of your machine, now, the best of three; they are printed, never asserted. What is
# asserted: that the fast way gives the same as the slow one.


# %%
def best(call) -> float:
    """Milliseconds, the best of three."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return min(times)


examples = encode_examples(tokenizer, load_examples("restaurants", "dev"))[:24]
prefix = minprefix.Prefix.from_words(model, tokenizer, "table-to-text:")


def gradient(loss: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, prefix.prefix_table)[0]


def agree(name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """fp32 sums in another order; worst seen 3e-6 of the largest element."""
    gap = ((a - b).abs().max() / b.abs().max()).item()
    print(f"  {name}: largest |difference| {gap:.1e} of the largest")
    assert gap < 1e-4


# %% [markdown]
# **Labelled positions only.** The same batch, once with logits everywhere.

# %%
batch = collate(sorted(examples, key=lambda r: len(r.ids))[:8], tokenizer.eos_id)


def everywhere() -> torch.Tensor:
    logits = model(batch.input_ids, prefix=prefix)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())  # ignores -100


def at_labels() -> torch.Tensor:
    return model.token_losses(batch.input_ids, batch.labels, batch.at, prefix=prefix).mean()


print(f"{len(batch.at)} of {batch.labels.numel()} positions have a label")
agree("gradient", gradient(at_labels()), gradient(everywhere()))
for name, loss in (("everywhere", everywhere), ("at labels", at_labels)):
    print(f"  {name:11} {best(lambda loss=loss: gradient(loss())):7.0f} ms")

# %% [markdown]
# **Batches of similar length.** The same 24 rows in batches of 8, in any order and sorted.

# %%
order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
orders = {"shuffled": order, "sorted": sorted(order, key=lambda n: len(examples[n].ids))}


def epoch(order: list[int]) -> torch.Tensor:
    """Gradient of the summed loss of all rows."""
    total = torch.zeros_like(prefix.prefix_table)
    for start in range(0, len(order), 8):
        rows = collate([examples[n] for n in order[start : start + 8]], tokenizer.eos_id)
        losses = model.token_losses(rows.input_ids, rows.labels, rows.at, prefix=prefix)
        total += gradient(losses.sum())
    return total


agree("gradient", epoch(orders["sorted"]), epoch(orders["shuffled"]))
real = sum(len(r.ids) - 1 for r in examples)
for name, order in orders.items():
    lengths = [len(examples[n].ids) - 1 for n in order]
    computed = sum(8 * max(lengths[n : n + 8]) for n in range(0, len(order), 8))
    print(f"  {name:9} {best(lambda order=order: epoch(order)):7.0f} ms, "
          f"{1 - real / computed:.0%} of the positions are padding")  # fmt: skip

# %% [markdown]
# **GELU in one pass.** And the first cause of section 3, on the activations of one layer of a
# batch.

# %%
x = torch.randn(B * T, 4 * C, generator=torch.Generator().manual_seed(0), requires_grad=True)


def as_written(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def one_pass(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


assert (one_pass(x.double()) - as_written(x.double())).abs().max() < 1e-13  # fp64; worst seen 4e-16
for name, gelu in (("as written", as_written), ("one pass", one_pass)):
    took = best(lambda gelu=gelu: torch.autograd.grad(gelu(x).sum(), x))
    print(f"  {name:11} {took:7.1f} ms forward and backward, {L * took:7.0f} ms for {L} layers")

# %% [markdown]
# ## Recap
# - Frozen weights cost 4 FLOPs per number and token, not 6; the rest of the step is to be compared
#   with that floor.
# - Where the floor is most of the time (fp32 on a CPU, one row of greedy decoding), no library is
#   much faster than another. The ratios in `bench.csv` near 1 say so.
# - Time is won where work is not needed: eight passes for one function, B copies of a prefix,
#   logits without a loss, padding, copies of a cache.
# - A kernel is one of these causes among others. On a CPU it is not even there, and on a GPU
#   attention is a small part of a step.
#
# ## Exercises
# 1. Fine-tuning: add the gradients of the matrices to the count, and check it with PyTorch's
#    counter.
# 2. From which prefix length on does PEFT's MLP on B P inputs cost as much as the layers, at B 10
#    and T 128?
# 3. Decoding reads all weights for each token. Compute the most tokens per second of one row that
#    the measured memory speed allows, and compare with `bench.csv`. What fills the gap?
# 4. What is the least padding that sorting by length can leave, and how much do pools of 50 batches
#    lose against it on the restaurants' training rows?
#
# Solutions: `tutorials/solutions/09_speed.py`.
#
# ## References
# 1. PEFT, prefix tuning: https://huggingface.co/docs/peft/package_reference/prefix_tuning
# 2. Hendrycks & Gimpel 2016, Gaussian Error Linear Units: https://arxiv.org/abs/1606.08415
# 3. Li & Liang 2021, Prefix-Tuning: https://arxiv.org/abs/2101.00190
