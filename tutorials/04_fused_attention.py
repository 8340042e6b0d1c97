# %% [markdown]
# # 4. Attention over [prefix; sequence] in one kernel
#
# **What you will learn.** How attention over a prefix and a sequence becomes one GPU kernel that
# copies nothing: softmax in tiles, what is kept for the backward pass, the backward pass itself,
# how many bytes that saves and when bytes matter. At the end you read the Triton kernel of this
# repository beside your own loops, and run it without a GPU.
#
# **What to know first.** Tutorial 2 (`02_equation_3`): a prefix is `prefix_k`, `prefix_v` (H, P, D)
# in each layer. Letters: batch B, heads H, queries T, prefix positions P, width per head D.
#
# **Running time.** Well under a minute on a CPU; no GPU is needed.
#
# **Sources.** Li & Liang 2021 [1]; online softmax [2]; FlashAttention-2 [3]; a prefix seen as an
# adapter [4]; an H100's data sheet [5].

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # kernels on the CPU; read when `kernels` is imported

import csv
import math
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import torch
from figure import FAINT, OTHER, PREFIX, TEXT, new, show
from matplotlib.patches import Rectangle

import kernels
from benchmarks.kernels.attention import Shape, work
from kernels import prefix_attention, prefix_attention_eager

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
B, H, T, P, D = 2, 3, 37, 5, 16  # odd lengths on purpose: no tile fits evenly
scale = D**-0.5
q, k, v, do = (torch.randn(B, H, T, D) for _ in range(4))  # do: the gradient that will come back
prefix_k, prefix_v = (torch.randn(H, P, D) for _ in range(2))


def same(name: str, actual, exact, bound: float = 2e-14) -> None:
    """Print and check the largest |difference|. Rounding of sums in fp64, worst seen: 2e-15."""
    gap = (actual - exact).abs().max().item()
    print(f"{name:44} largest |difference| {gap:.1e}")
    assert gap < bound


# %% [markdown]
# ## 1. The formula, written down
# Query $i$ sees every prefix position and the tokens up to itself:
#
# $$ s_{ij} = \frac{\langle q_i, k_j \rangle}{\sqrt D}, \qquad
# \mathrm{lse}_i = \log \sum_j e^{s_{ij}}, \qquad p_{ij} = e^{s_{ij} - \mathrm{lse}_i}, \qquad
# o_i = \sum_j p_{ij} v_j $$
#
# with $j$ over the columns [prefix; sequence]. In PyTorch one copies the prefix for each row,
# concatenates, and masks. That is right, and it is what libraries do that know no prefix.


# %%
def attend_concatenated(q, k, v, prefix_k, prefix_v):
    """o (B, H, T, D) of the formula, with everything in memory."""
    T, P = q.shape[2], prefix_k.shape[-2]
    keys = torch.cat([prefix_k.expand(len(q), -1, -1, -1), k], dim=2)  # (B, H, P + T, D)
    values = torch.cat([prefix_v.expand(len(q), -1, -1, -1), v], dim=2)
    visible = torch.ones(T, P + T, dtype=torch.bool).tril(P)  # query i: columns up to P + i
    s = (scale * q @ keys.mT).masked_fill(~visible, float("-inf"))  # (B, H, T, P + T)
    return s.softmax(-1) @ values


o_exact = attend_concatenated(q, k, v, prefix_k, prefix_v)
same("against this repository's definition", prefix_attention_eager(q, k, v, prefix_k, prefix_v),
     o_exact)  # fmt: skip

# %% [markdown]
# The intermediate `s` has T (P + T) numbers per row and head, far more than q, k, v and o. A GPU
# multiplies faster than it reads memory, so writing and reading `s` takes most of the time. Can we
# sum without ever holding a whole row of scores?
#
# ## 2. Softmax, number by number
# Take one query and one component of v. Reading scores one after the other, keep three numbers: the
# largest score so far $m$, and two sums under it, $z = \sum e^{s_j - m}$ and
# $o = \sum e^{s_j - m} v_j$. When a larger score arrives, what was summed before is too large by
# $e^{m_{new} - m}$, so both sums shrink by
#
# $$ \alpha = e^{m - m_{new}} . $$

# %%
i = 20  # a query
s = scale * torch.cat([prefix_k[0], k[0, 0, : i + 1]]) @ q[0, 0, i]  # (P + i + 1,) what it sees
values = torch.cat([prefix_v[0], v[0, 0, : i + 1]])  # (P + i + 1, D)

m, z, o = -math.inf, 0.0, 0.0
for s_j, v_j in zip(s.tolist(), values[:, 0].tolist(), strict=True):
    m_new = max(m, s_j)
    alpha = math.exp(m - m_new)
    z = z * alpha + math.exp(s_j - m_new)
    o = o * alpha + math.exp(s_j - m_new) * v_j
    m = m_new
same("one component of o, number by number", torch.tensor(o / z), o_exact[0, 0, i, 0])
same("its log-sum-exp, m + log z", torch.tensor(m + math.log(z)), s.logsumexp(0))

# %% [markdown]
# Why the maximum at all? Without it a score of 800 overflows, even in fp64. With it every exponent
# is at most 0. And the order of the columns plays no role, so the prefix may come first or last,
# from wherever it lies.

# %%
print(f"exp(800) = {torch.tensor(800.0).exp()},  exp(800 - 800) = {math.exp(800 - 800)}")

# %% [markdown]
# ## 3. Rows, then tiles
# The same with a tile of columns at a time, for M queries at once. Nothing changes but the shapes:
# `m`, `z` are (M,), `o` is (M, D), and the products are matrix products.


# %%
def softmax_step(o, z, m, s, v):
    """One tile of scores s (M, N) and values v (N, D) into the running softmax of M queries."""
    m_new = torch.maximum(m, s.amax(1))  # (M,)
    p = torch.exp(s - m_new[:, None])  # (M, N)
    alpha = torch.exp(m - m_new)  # (M,)
    return o * alpha[:, None] + p @ v, z * alpha + p.sum(1), m_new


def start(M: int, D: int):
    """o, z, m before the first tile."""
    return torch.zeros(M, D), torch.zeros(M), torch.full((M,), -math.inf)


o, z, m = start(1, D)
for j in range(0, len(s), 8):  # the row of query i, eight columns at a time
    o, z, m = softmax_step(o, z, m, s[None, j : j + 8], values[j : j + 8])
same("a row of o, eight columns at a time", (o / z[:, None])[0], o_exact[0, 0, i])

# %% [markdown]
# Now the tiles of a whole head. **Prefix tiles come first and need no mask**: every query sees all
# of the prefix. Sequence tiles are of three kinds: those left of the diagonal are seen by all
# queries of the tile, those on it need the mask $j \le i$, and those right of it are not visited
# at all. No mask exists in memory; it is two ranges compared.

# %%
BLOCK_M, BLOCK_N, BLOCK_P = 8, 8, 4


def hidden(rows: slice, cols: slice):
    """(M, N) bool: which sequence columns these queries do not see, j > i."""
    i, j = torch.arange(rows.start, rows.stop), torch.arange(cols.start, cols.stop)
    return j > i[:, None]


def tiles(start: int, end: int, size: int) -> list[slice]:
    """start .. end in pieces; the last one may be short."""
    return [slice(at, min(at + size, end)) for at in range(start, end, size)]


def forward_head(q, k, v, prefix_k, prefix_v):
    """o (T, D), lse (T,) of one row and head, and what kinds of tiles were met."""
    out, lse, met = torch.empty_like(q), q.new_empty(len(q)), {}
    for rows in tiles(0, len(q), BLOCK_M):  # on a GPU: one program each
        o, z, m = start(rows.stop - rows.start, q.shape[1])
        for cols in tiles(0, len(prefix_k), BLOCK_P):
            o, z, m = softmax_step(o, z, m, scale * q[rows] @ prefix_k[cols].T, prefix_v[cols])
            met[rows.start, cols.start - len(prefix_k)] = cols, "prefix"
        for cols in tiles(0, rows.stop, BLOCK_N):
            s = scale * q[rows] @ k[cols].T  # (M, N)
            masked = cols.stop > rows.start + 1  # the first query does not see all of them
            if masked:
                s = s.masked_fill(hidden(rows, cols), -math.inf)
            o, z, m = softmax_step(o, z, m, s, v[cols])
            met[rows.start, cols.start] = cols, "masked" if masked else "whole"
        out[rows], lse[rows] = o / z[:, None], m + z.log()
    return out, lse, met


def forward(q, k, v, prefix_k, prefix_v):
    """o (B, H, T, D), lse (B, H, T): each row and head on its own, the prefix shared by rows."""
    heads = [[forward_head(q[b, h], k[b, h], v[b, h], prefix_k[h], prefix_v[h])[:2]
              for h in range(q.shape[1])] for b in range(len(q))]  # fmt: skip
    return tuple(torch.stack([torch.stack([h[n] for h in row]) for row in heads]) for n in (0, 1))


o, lse = forward(q, k, v, prefix_k, prefix_v)
_, lse_exact = prefix_attention_eager(q, k, v, prefix_k, prefix_v, return_lse=True)
same("o, all tiles of all rows and heads", o, o_exact)
same("lse", lse, lse_exact)
met = forward_head(q[0, 0], k[0, 0], v[0, 0], prefix_k[0], prefix_v[0])[2]
kinds = Counter(kind for _, kind in met.values())
n_all = len(tiles(0, T, BLOCK_M)) * len(tiles(0, T, BLOCK_N)) + kinds["prefix"]
print(f"tiles of a head: {dict(kinds)}, not visited: {n_all - sum(kinds.values())}")

# %%
figure, axes = new(width=6.6)
colours = {"prefix": PREFIX, "whole": TEXT, "masked": OTHER}
for (row, at), (cols, kind) in met.items():
    size = cols.stop - cols.start, min(BLOCK_M, T - row)
    axes.add_patch(Rectangle((at, row), *size, fc=colours[kind], ec="white", lw=1.2))
for kind, label in (("prefix", "prefix: no mask"), ("whole", "seen by all queries: no mask"),
                    ("masked", "on the diagonal: masked")):  # fmt: skip
    axes.plot([], [], "s", color=colours[kind], label=label)
axes.plot([], [], "s", color=FAINT, mfc="none", label="not visited")
axes.plot([0, T], [0, T], color="black", lw=0.8)
axes.set(xlim=(-P - 1, T), ylim=(T, 0), xlabel="column: prefix (< 0), sequence j (>= 0)",
         ylabel="query i", title=f"Tiles of one head: T {T}, P {P}")  # fmt: skip
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
show(figure, "04_tiles")

# %% [markdown]
# ## 4. The backward pass
# Let $do_i$ be the gradient that arrives at $o_i$. Four products of matrices follow from the chain
# rule, if $p$ is known:
#
# $$ dv_j = \sum_i p_{ij}\, do_i, \qquad dp_{ij} = \langle do_i, v_j \rangle, $$
# $$ dq_i = \tfrac{1}{\sqrt D} \sum_j ds_{ij} k_j, \qquad
# dk_j = \tfrac{1}{\sqrt D} \sum_i ds_{ij} q_i . $$
#
# Between $dp$ and $ds$ stands the softmax: $\partial p_{ij} / \partial s_{il} = p_{ij} (1_{j=l} -
# p_{il})$, so $ds_{ij} = p_{ij} (dp_{ij} - \sum_l p_{il}\, dp_{il})$. That sum runs over a whole
# row of columns, which no tile has. But
#
# $$ \sum_l p_{il} \langle do_i, v_l \rangle = \langle do_i, \sum_l p_{il} v_l \rangle
# = \langle do_i, o_i \rangle =: \delta_i : $$
#
# it is a product of two rows of D numbers that are there. And $p$ itself needs no memory: with
# $\mathrm{lse}$ at hand, $p_{ij} = e^{s_{ij} - \mathrm{lse}_i}$ is made again, tile by tile, in
# any order. **So besides its inputs the forward pass keeps o and lse, and nothing of size T x T.**
# First as matrices, for one row and head:

# %%
inputs = [x.clone().requires_grad_() for x in (q, k, v, prefix_k, prefix_v)]
exact = torch.autograd.grad(attend_concatenated(*inputs), inputs, do)
names = ("dq", "dk", "dv", "dprefix_k", "dprefix_v")

delta = (do * o).sum(-1)  # (B, H, T)
visible = torch.ones(T, P + T).tril(P)
keys, values = torch.cat([prefix_k[0], k[0, 0]]), torch.cat([prefix_v[0], v[0, 0]])
p = torch.exp(scale * q[0, 0] @ keys.T - lse[0, 0, :, None]) * visible  # (T, P + T)
ds = p * (do[0, 0] @ values.T - delta[0, 0, :, None])  # (T, P + T)
same("dq of one head, as matrices", scale * ds @ keys, exact[0][0, 0])
same("dk of one head, as matrices", (scale * ds.T @ q[0, 0])[P:], exact[1][0, 0])
same("dv of one head, as matrices", (p.T @ do[0, 0])[P:], exact[2][0, 0])

# %% [markdown]
# Tile by tile there are two loops. One program per tile of *queries* owns its `dq`; one program per
# tile of *keys* owns its `dk`, `dv` and visits the queries that see it. A single loop would have
# many programs add to the same `dk` at the same time, which needs atomic additions.
#
# A prefix column is a key like any other, but **all B rows of the batch see it**, so its gradient
# is a sum over the batch. Each row writes its own part, and a last step adds the parts in the order
# of the rows.


# %%
def tile_grads(q, do, k, v, lse, delta, unseen):
    """What one tile of queries and one of keys add to dq (M, D), dk and dv (N, D)."""
    p = torch.exp(scale * q @ k.T - lse[:, None]).masked_fill(unseen, 0.0)  # (M, N)
    ds = p * (do @ v.T - delta[:, None])
    return scale * ds @ k, scale * ds.T @ q, p.T @ do


def backward_head(q, k, v, prefix_k, prefix_v, o, lse, do):
    """dq, dk, dv of one row and head, and this row's part of dprefix_k and dprefix_v."""
    delta, every = (do * o).sum(1), torch.tensor(False)  # (T,); of prefix columns none is unseen
    dq, dk, dv, part_k, part_v = (torch.zeros_like(x) for x in (q, k, v, prefix_k, prefix_v))

    def grads(rows, k, v, unseen):
        return tile_grads(q[rows], do[rows], k, v, lse[rows], delta[rows], unseen)

    for rows in tiles(0, len(q), BLOCK_M):  # one program each: dq
        for cols in tiles(0, len(prefix_k), BLOCK_P):
            dq[rows] += grads(rows, prefix_k[cols], prefix_v[cols], every)[0]
        for cols in tiles(0, rows.stop, BLOCK_N):
            dq[rows] += grads(rows, k[cols], v[cols], hidden(rows, cols))[0]
    for cols in tiles(0, len(k), BLOCK_N):  # one program each: dk, dv
        for rows in tiles(cols.start // BLOCK_M * BLOCK_M, len(q), BLOCK_M):
            _, dk_tile, dv_tile = grads(rows, k[cols], v[cols], hidden(rows, cols))
            dk[cols], dv[cols] = dk[cols] + dk_tile, dv[cols] + dv_tile
    for cols in tiles(0, len(prefix_k), BLOCK_P):  # one program each: a part of dprefix
        for rows in tiles(0, len(q), BLOCK_M):
            _, dk_tile, dv_tile = grads(rows, prefix_k[cols], prefix_v[cols], every)
            part_k[cols], part_v[cols] = part_k[cols] + dk_tile, part_v[cols] + dv_tile
    return dq, dk, dv, part_k, part_v


found = [torch.stack([torch.stack([backward_head(
    q[b, h], k[b, h], v[b, h], prefix_k[h], prefix_v[h], o[b, h], lse[b, h], do[b, h])[n]
    for h in range(H)]) for b in range(B)]) for n in range(5)]  # fmt: skip
tiled = [*found[:3], *(partials.sum(0) for partials in found[3:])]  # (H, P, D): over the rows
for name, actual, wanted in zip(names, tiled, exact, strict=True):
    same(f"{name}, tile by tile", actual, wanted)

# %% [markdown]
# **Why no atomics, and why fp32 parts?** A sum of floating-point numbers depends on its order.
# Atomic additions come in the order in which programs happen to finish, so two equal runs would
# differ in their last bits; parts that are added in a fixed order repeat bit for bit. And in the 16
# bits of q, k and v the rounding of each addition adds up over the rows of a batch, so the parts
# and their sum are fp32 whatever the inputs are.

# %%
rows = 64
parts = torch.randn(rows, H, P, D) + 0.1  # what 64 rows add to dprefix_k
in_order = torch.stack(list(parts.float())).sum(0)
shuffled = parts.float()[torch.randperm(rows)].sum(0)
print(f"fp32, two orders: {(in_order != shuffled).float().mean():.0%} of the elements differ")
assert not torch.equal(in_order, shuffled) and torch.equal(in_order, parts.float().sum(0))
total = torch.zeros(H, P, D, dtype=torch.bfloat16)
for part in parts.bfloat16():
    total += part
for name, x in (("fp32 parts", in_order), ("bf16 parts and sum", total)):
    error = (x - parts.sum(0)).abs().max() / parts.sum(0).abs().max()
    print(f"{name:20} largest error {error:.1e} of the largest gradient")

# %% [markdown]
# ## 5. Counting bytes
# Let $e$ be the bytes of an element (2 for bf16), and S the number of keys: S = T in training, all
# cached tokens while decoding, where T = 1. What must a forward pass move?
#
# | | bytes |
# |---|---|
# | fused: q, k, v in, o and lse (fp32) out, the prefix once | $2eBH(T + S)D + 2eHPD + 4BHT$ |
# | concatenation first: k, v read, keys, values written | $2eBHSD + 2eBH(P + S)D$ |
# | and then the prefix read with each row's keys | $2e(B - 1)HPD$ |
# | written down as in section 1: scores of T x (P + S) | $6eBHT(P + S)$ |
#
# Each line comes on top of those above it. The scores are written, read and written by the mask,
# read and written by the softmax, and read by the product. While decoding, concatenation copies the
# whole cache for each new token. FLOPs are the same for all: a pair of a query and a column that it
# sees takes $2D$ for its score and $2D$ for its value.

# %%
e, d = 2, 64


def bytes_of(B: int, T: int, H: int, P: int, S: int) -> tuple[int, int, int]:
    """Bytes of a forward pass: fused, with concatenation, written down."""
    fused = 2 * e * B * H * (T + S) * d + 2 * e * H * P * d + 4 * B * H * T
    copy = 2 * e * B * H * S * d + 2 * e * B * H * (P + S) * d
    joined = fused + copy + 2 * e * (B - 1) * H * P * d
    return fused, joined, joined + 6 * e * B * H * T * (P + S)


cases = {  # B, T, H, P, S: GPT-2 medium has 16 heads of 64
    "training": (10, 128, 16, 10, 128),
    "training, P 200": (10, 128, 16, 200, 128),
    "prefill": (1, 512, 16, 10, 512),
    "decoding": (16, 1, 16, 10, 512),
}
print(f"{'forward, one layer, bf16, MB':48} {'fused':>7} {'concat.':>8} {'written down':>13}")
for name, sizes in cases.items():
    fused, joined, literal = (x / 1e6 for x in bytes_of(*sizes))
    at = ", ".join(f"{a} {b}" for a, b in zip("BTHPS", sizes, strict=True))
    print(f"{name + ': ' + at:48} {fused:7.2f} {joined:8.2f} {literal:13.2f}")
same_work = work(Shape(10, 128, 16, 10), "forward")  # FLOPs and bytes, as the benchmark counts
assert bytes_of(*cases["training"])[0] == same_work[1]

# %% [markdown]
# ## 6. When bytes matter: the roofline
# A machine that makes $F$ FLOPs and moves $W$ bytes per second needs at least
# $\max(\text{FLOPs}/F, \text{bytes}/W)$. FLOPs per byte are the **arithmetic intensity**; below
# $F/W$ a kernel is bound by memory. NVIDIA's data sheet of the H100 SXM [5] says 3.35 TB/s and, in
# bf16, 1,979 TFLOP/s with sparsity, which is half of that for the dense products here.

# %%
PEAK, BANDWIDTH = 1979e12 / 2, 3.35e12  # FLOP/s (dense bf16), bytes/s; published, not measured
print(f"an H100 is bound by memory below {PEAK / BANDWIDTH:.0f} FLOPs per byte\n")
decoding = 4 * d * 16 * 16 * (512 + 10)  # FLOPs: all columns are seen
points = {  # FLOPs, bytes fused, bytes with concatenation
    "training, forward + backward": (*work(Shape(10, 128, 16, 10), "forward+backward"), None),
    "prefill": (work(Shape(1, 512, 16, 10), "forward")[0], *bytes_of(*cases["prefill"])[:2]),
    "decoding": (decoding, *bytes_of(*cases["decoding"])[:2]),
}
print(f"{'fused':30} {'GFLOP':>7} {'MB':>7} {'FLOPs/byte':>11} {'at least, us':>13}  bound by")
for name, (flops, moved, _) in points.items():
    bound = "memory" if flops / moved < PEAK / BANDWIDTH else "products"
    least = 1e6 * max(flops / PEAK, moved / BANDWIDTH)
    print(f"{name:30} {flops / 1e9:7.3f} {moved / 1e6:7.2f} {flops / moved:11.1f} {least:13.2f}"
          f"  {bound}")  # fmt: skip


def roof(intensity: float) -> float:
    """TFLOP/s, at most."""
    return min(PEAK, BANDWIDTH * intensity) / 1e12


figure, axes = new(width=6.0)
x = [0.25, PEAK / BANDWIDTH, 2048]
axes.plot(x, [roof(one) for one in x], color="black", label="H100, data sheet")
for marker, (name, (flops, fused, joined)) in zip("osD", points.items(), strict=True):
    axes.plot(flops / fused, roof(flops / fused), marker, color=PREFIX, label=f"{name}: fused")
    if joined:
        axes.plot(flops / joined, roof(flops / joined), marker, color=TEXT, mfc="none",
                  label=f"{name}: concatenation")  # fmt: skip
axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOPs per byte)",
         ylabel="at most (TFLOP/s)", title="Attention under the roof")  # fmt: skip
axes.legend(frameon=False)
show(figure, "04_roofline")

# %% [markdown]
# A decoding step does about one FLOP per byte: nothing but reading less makes it faster, and
# concatenation makes it read and write several times as much. Training at T of a hundred or so is
# bound by memory too; only long sequences come near the flat part of the roof. (Where a bound is a
# few microseconds, launching the kernel costs as much again. No formula here knows of that.)
#
# ## 7. The kernel, side by side
# `kernels/` holds the same steps in Triton. The next cell prints them from the files, so they are
# the lines that run; above each excerpt stands what it is called in this tutorial.


# %%
def quote(module: str, first: str, last: str) -> None:
    """Print the lines of a module from the first one with `first` to the next one with `last`."""
    path = Path(find_spec(module).origin)
    lines = path.read_text(encoding="utf-8").splitlines()
    a = next(n for n, line in enumerate(lines) if first in line)
    b = next(n for n in range(a, len(lines)) if last in lines[n])
    for n in range(a, b + 1):
        print(f"  {path.name}:{n + 1:<4} {lines[n]}")


print("softmax_step: m_new, p, alpha, z, o. Powers of 2 instead of e: scale2 = scale log2(e)")
quote("kernels.tiles", "m_new = tl.maximum(m, tl.max(s, 1)", "o = tl.dot(p.to(v.dtype)")
print("\nthe prefix's first tile, before the sequence: `every` query sees all its columns")
quote("kernels.attention", "every = tl.zeros", "o, z, m = attend_tile(o, z, m, q, pk, pv")
print("\nforward_head: the sequence's tiles, up to the last column that a query of the tile sees")
quote("kernels.attention", "for n0 in range(0, last, BLOCK_N)", "o, z, m = attend_tile")
print("\nthe mask, on tiles that not every query sees whole (hidden)")
quote("kernels.attention", "if n0 + BLOCK_N > whole:", "s = tl.where")
print("\nout and lse: what is kept")
quote("kernels.attention", "o = o / tl.where(z > 0.0", "lse = (m + tl.log2(z))")
print("\ntile_grads: p, ds, then dv and dk (transposed), dq")
quote("kernels.backward", "s = tl.dot(q, tl.trans(k)", "dq = tl.dot(ds, k, dq")
print("\ndelta")
quote("kernels.backward", "delta = tl.sum(do.to", "delta = tl.sum(do.to")
print("\npartials.sum(0): the parts of dprefix in their order, fp32")
quote("kernels.backward", "for g0 in range(start, end, BLOCK_M)", "dv += tl.sum(")

# %% [markdown]
# The kernel has more than the loops: strides, so that views of the fused qkv projection go in
# without a copy; masked loads at the ends, where our slices are short; and a single backward kernel
# where a row's queries, keys and prefix are one tile each, since nothing is then read twice.
# Triton's interpreter runs it here, in fp32, on the same inputs.

# %%
if kernels.HAVE_TRITON:
    single = [x.float().requires_grad_() for x in (q, k, v, prefix_k, prefix_v)]
    assert kernels.on_triton(single[0])  # the Triton kernel runs, not the plain path
    o_kernel, lse_kernel = prefix_attention(*single, return_lse=True)
    kernel_grads = torch.autograd.grad(o_kernel, single, do.float())
    # fp32 beside fp64; worst seen: 8e-7
    same("Triton, o", o_kernel.detach(), o, 1e-5)
    same("Triton, lse", lse_kernel, lse, 1e-5)
    for name, actual, wanted in zip(names, kernel_grads, tiled, strict=True):
        same(f"Triton, {name}", actual, wanted, 1e-5)
    again = torch.autograd.grad(prefix_attention(*single), single, do.float())
    assert all(torch.equal(a, b) for a, b in zip(kernel_grads, again, strict=True))
    print("a second run gives the same bits")
else:
    print("Triton is not installed here (it exists for Linux): the loops above are what it does")

# %% [markdown]
# ## 8. What a compiler and a clock say
# The compiler needs no GPU (`make compile`). It says how many registers a thread takes, how much
# shared memory a program, and how many bytes of registers had to be spilled to memory, which would
# undo the savings. A multiprocessor of an H100 has 65,536 registers, room for 2,048 threads and 228
# KiB of shared memory, of which each program takes 1 KiB more than it asks for [6]. `at once` is
# the number of programs that fit: while one waits for memory, another can multiply.

# %%
BENCHMARKS = Path(find_spec("kernels").origin).parents[1] / "benchmarks"


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


print(f"{'H100, bf16, D 64':12} {'P':>5}  {'tile':29} {'registers':>9} {'KiB':>5} {'spilled':>8} "
      f"{'at once':>8}")  # fmt: skip
for row in table(BENCHMARKS / "compiled.csv"):
    if (row["target"], row["prefix_len"], row["default"]) == ("sm_90", "10", "1"):
        threads = 32 * int(row["tile"].split(",")[1].split()[0])
        registers, shared = int(row["registers"]), int(row["shared_bytes"])
        at_once = min(65536 // (8 * math.ceil(registers / 8) * threads), 2048 // threads,
                      228 * 1024 // (shared + 1024))  # fmt: skip
        print(f"{row['kernel']:16} {row['prefix_len']:>5}  {row['tile']:29} {registers:9} "
              f"{shared / 1024:5.0f} {row['spilled_bytes']:>8} {at_once:8}")  # fmt: skip

# %% [markdown]
# A compiler can also be wrong. Triton hands its code to NVIDIA's assembler ptxas, and version
# 12.8.93, which several releases of Triton bring along, puts a wrong address into some of these
# kernels for an H100 or H200: illegal reads, and wrong gradients of the prefix without any error.
# With a newer ptxas nothing else had to change. So the kernels refuse an old one (the module
# `kernels.assembler`), and the comparison with fp64 comes before every clock.
#
# The clock. On a CPU no Triton runs: the same operator is PyTorch's fused attention over
# concatenated keys, or two batched products, whichever `benchmarks/cpu_attention.csv` found faster.
# On a GPU (`benchmarks/gpu`) the times are those of CUDA graphs. cuDNN without a prefix does less
# work, by the factor $1 + 2P / (T + 1)$, the ratio of visible pairs. Its time multiplied by this
# factor is the yardstick: below a ratio of 1, our kernels do the same work in less time than cuDNN
# would; above it they need more.

# %%
rows = table(BENCHMARKS / "cpu_attention.csv")
gpu = [r for r in table(BENCHMARKS / "gpu" / "attention-h200.csv") if r["us"]]
where = gpu[0]
print(f"{where['gpu']}, torch {where['torch']}, Triton {where['triton']}, {where['assembler']}, "
      f"commit {where['commit']}")  # fmt: skip
methods = {"ours_qkv": ("this kernel", PREFIX), "cudnn": ("cuDNN + concatenation", TEXT),
           "bare_cudnn_leaves": ("cuDNN, no prefix", FAINT)}  # fmt: skip
times = {method: {} for method in methods}  # {method: {T: us}}
for r in gpu:
    if (r["B"], r["H"], r["P"], r["pass"]) == ("16", "16", "10", "forward+backward"):
        times.setdefault(r["method"], {})[int(r["T"])] = float(r["us"])
print(f"{'B 16, H 16, P 10':18} {'ours, us':>9} {'no prefix':>10} {'work-adjusted ratio':>20}")
for t, us in sorted(times["ours_qkv"].items()):
    no_prefix = times["bare_cudnn_leaves"][t]
    print(f"T {t:<16} {us:9.1f} {no_prefix:10.1f} {us / no_prefix / (1 + 2 * 10 / (t + 1)):20.2f}")

figure, panels = new(3)
for axes, dtype in zip(panels, ("float32", "bfloat16"), strict=False):
    mine = [r for r in rows if r["dtype"] == dtype]
    lengths = [int(r["T"]) for r in mine]
    for column, label, colour in (("fused_ms", "fused attention", TEXT),
                                  ("products_ms", "two batched products", PREFIX)):  # fmt: skip
        axes.plot(lengths, [float(r[column]) for r in mine], "o-", color=colour, label=label)
    axes.set(xlabel="sequence length T (tokens)", ylabel="forward + backward (ms)", ylim=(0, None))
    axes.set_title(f"{mine[0]['cpu']}, {dtype}", fontsize=10)
    axes.legend(frameon=False)
for method, (label, colour) in methods.items():
    panels[2].plot(
        *zip(*sorted(times[method].items()), strict=True), "o-", color=colour, label=label
    )
panels[2].set(xlabel="sequence length T (tokens)", ylabel="forward + backward (µs)", ylim=(0, None))
panels[2].set_title(f"{where['gpu']}, bf16, B 16, H 16, P 10", fontsize=10)
panels[2].legend(frameon=False)
show(figure, "04_times")

# %% [markdown]
# ## 9. Another view: a gated adapter
# The sums of section 2 split into those over the prefix and those over the sequence. He et al. [4]
# read the formula that way: with $\lambda = Z_P / (Z_P + Z_S)$, the share of the prefix,
#
# $$ o = (1 - \lambda)\, o_S + \lambda\, o_P, \qquad o_P = \mathrm{softmax}(x W_1)\, W_2, $$
# $$ W_1 = \tfrac{1}{\sqrt D} W_q K_P^\top, \qquad W_2 = V_P . $$
#
# $o_P$ is a two-layer network of width P that runs *beside* attention on the same input $x$, an
# adapter in parallel, with a gate that the softmax itself provides. lse gives the gate, as
# $\lambda = \sigma(\mathrm{lse}_P - \mathrm{lse}_S)$.

# %%
none = prefix_k[:, :0]
o_s, lse_s = prefix_attention(q, k, v, none, none, return_lse=True)
o_p, lse_p = prefix_attention(q, k[:, :, :0], v[:, :, :0], prefix_k, prefix_v, return_lse=True)
lam = torch.sigmoid(lse_p - lse_s)[..., None]  # (B, H, T, 1)
same("o = (1 - lambda) o_S + lambda o_P", (1 - lam) * o_s + lam * o_p, o)

x, w_q = torch.randn(T, 48), torch.randn(48, D) / 7  # an input and a query projection of one head
adapter = (x @ (scale * w_q @ prefix_k[0].T)).softmax(-1) @ prefix_v[0]  # (T, D)
one = prefix_attention(
    (x @ w_q)[None, None], k[:1, :1, :0], v[:1, :1, :0], prefix_k[:1], prefix_v[:1]
)
same("o_P is a two-layer network of width P", adapter, one[0, 0])
print(f"mean share of the prefix: query 0 {lam[:, :, 0].mean():.2f}, query {T - 1} "
      f"{lam[:, :, -1].mean():.2f}: more text, less prefix")  # fmt: skip

# %% [markdown]
# ## Recap
# - Softmax needs no whole row: $m$, $z$, $o$ are enough, and older sums shrink by $\alpha$.
# - A tile of keys may come from anywhere, so prefix and sequence are never joined, and only tiles
#   on the diagonal are masked.
# - Kept for the backward pass: o and lse. $p$ is made again, and $\delta_i = \langle do_i, o_i
#   \rangle$ replaces the sum over a row.
# - The prefix's gradient is a sum over the batch: fp32 parts, added in a fixed order.
# - Training at usual lengths and all decoding are bound by memory: bytes saved are time saved.
#
# ## Exercises
# 1. Visit the prefix *after* the sequence. What changes in o, lse and the number of masked tiles?
# 2. Give each row its own prefix length (a bank with `prefix_lens`) in `forward_head`, and compare
#    with `prefix_attention(..., prefix_index=, prefix_lens=)`.
# 3. Let a gradient `dlse` arrive at lse, too. Which one line of `backward_head` changes?
# 4. Decoding on a GPU cuts the columns of a row into splits that run at the same time. Merge their
#    results by lse, and count the bytes that the merging adds.
# 5. From which T on is the fused forward pass at P = 10 bound by products on an H100?
#
# Solutions: `tutorials/solutions/04_fused_attention.py`.
#
# ## References
# 1. Li & Liang 2021, Prefix-Tuning, eq. (3): https://arxiv.org/abs/2101.00190
# 2. Milakov & Gimelshein 2018, Online normalizer calculation: https://arxiv.org/abs/1805.02867
# 3. Dao 2023, FlashAttention-2, algorithms 1 and 2: https://arxiv.org/abs/2307.08691
# 4. He et al. 2022, Towards a Unified View of Parameter-Efficient Transfer Learning, section 3:
#    https://arxiv.org/abs/2110.04366
# 5. NVIDIA, H100 Tensor Core GPU: https://www.nvidia.com/en-us/data-center/h100/
# 6. NVIDIA, Hopper tuning guide: https://docs.nvidia.com/cuda/hopper-tuning-guide/
