# %% [markdown]
# # 4. Attention over [prefix; sequence] in one kernel
#
# Written in PyTorch, attention with a prefix copies the prefix for every row and writes every score
# to memory. One GPU kernel can do without both.
#
# **What you will learn.** Softmax in tiles; a complete Triton kernel that you run here without a
# GPU; the backward pass and what must be kept for it; how fast the kernels of this repository are
# on a real GPU.
#
# **What to know first.** 02_equation_3: a layer's prefix is `prefix_k`, `prefix_v` (H, P, D); its
# section 9 has the gradient. The letters are those of [the table in tutorial
# 01](01_gpt2_from_scratch.py); here z is a running sum, and M and N are the sizes of tiles.
#
# **Running time.** Some ten seconds on a CPU; no GPU is needed.
#
# **Sources.** Li & Liang 2021 [1]; online softmax [2]; FlashAttention-2 [3]; Triton [4].

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # run kernels on the CPU; Triton reads it

import math
from collections import Counter
from functools import reduce

import pictures_attention as pictures
import torch

from kernels import HAVE_TRITON, prefix_attention, prefix_attention_eager

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
B, H, T, P, D = 2, 3, 37, 5, 16  # odd lengths: no tile fits evenly
scale = D**-0.5
q, k, v = (torch.randn(B, H, T, D) for _ in range(3))
do = torch.randn(B, H, T, D)  # the gradient that will arrive at the output
prefix_k, prefix_v = (torch.randn(H, P, D) for _ in range(2))


def same(name: str, actual, exact, bound: float = 2e-14) -> None:
    """Print and check the largest |difference|; fp64: worst seen 2e-15."""
    gap = (actual - exact).abs().max().item()
    print(f"{name:42} largest |difference| {gap:.1e}")
    assert gap < bound


# %% [markdown]
# With `TRITON_INTERPRET=1` Triton does not compile a kernel but runs it line by line in Python. The
# variable must be set before Triton is first imported.
#
# ## 1. The formula, written down
# Query $i$ sees every prefix position, and the tokens up to itself:
#
# $$ s_{ij} = \frac{\langle q_i, k_j \rangle}{\sqrt D}, \qquad
# \mathrm{lse}_i = \log \sum_j e^{s_{ij}}, \qquad p_{ij} = e^{s_{ij} - \mathrm{lse}_i}, \qquad
# o_i = \sum_j p_{ij} v_j $$
#
# where $j$ runs over the columns [prefix; sequence]. The direct way in PyTorch is to copy the
# prefix for each row, concatenate, and mask:


# %%
def attend_concatenated(q, k, v, prefix_k, prefix_v):
    """o (B, H, T, D) of the formula, with everything in memory."""
    B, T, P = q.shape[0], q.shape[2], prefix_k.shape[-2]
    keys = torch.cat([prefix_k.expand(B, -1, -1, -1), k], dim=2)
    values = torch.cat([prefix_v.expand(B, -1, -1, -1), v], dim=2)
    visible = torch.ones(T, P + T, dtype=torch.bool).tril(P)
    s = (scale * q) @ keys.mT  # (B, H, T, P + T)
    return s.masked_fill(~visible, -math.inf).softmax(-1) @ values


o_exact, lse_exact = prefix_attention_eager(
    q, k, v, prefix_k, prefix_v, return_lse=True
)  # fmt: skip
o_concatenated = attend_concatenated(q, k, v, prefix_k, prefix_v)
same("this repository's definition", o_concatenated, o_exact)

# %% [markdown]
# The scores `s` are T (P + T) numbers per row and head, and q, k, v and o together are 4 T D, which
# is more unless P + T > 4 D. But the scores pass through memory six times: they are written, read
# and written by the mask, read and written by the softmax, and read by the last product. q, k, v
# and o need one pass each, and concatenation adds two over all keys and values. Can we sum over the
# columns without ever writing a score to memory?
#
# ## 2. Softmax, one column at a time
# Take one query and one component of v. Read the scores one after the other, and keep three
# numbers: the largest score so far, $m$, and the two sums $z = \sum e^{s_j - m}$ and $u = \sum
# e^{s_j - m} v_j$. At the end $o = u / z$. When a larger score arrives, the earlier sums are too
# large by the factor $e^{m_{new} - m}$, so both are multiplied by $\alpha = e^{m - m_{new}}$.

# %%
i = 20  # a query of row 0 and head 0, and the columns that it sees
seen = torch.cat([prefix_k[0], k[0, 0, : i + 1]])  # (P + i + 1, D)
values = torch.cat([prefix_v[0], v[0, 0, : i + 1]])  # (P + i + 1, D)
s = scale * seen @ q[0, 0, i]  # (P + i + 1,)

m, z, u = -math.inf, 0.0, 0.0
for s_j, v_j in zip(s.tolist(), values[:, 0].tolist(), strict=True):
    m_new = max(m, s_j)
    alpha = math.exp(m - m_new)
    z = z * alpha + math.exp(s_j - m_new)
    u = u * alpha + math.exp(s_j - m_new) * v_j
    m = m_new
same("one component of o", torch.tensor(u / z), o_exact[0, 0, i, 0])
same("lse = m + log z", torch.tensor(m + math.log(z)), s.logsumexp(0))
print(f"why a maximum: exp(800) = {torch.tensor(800.0).exp()}")

# %% [markdown]
# Without the maximum a score of 800 overflows, even in fp64; with it no exponent is above 0. The
# order of the columns changes nothing but rounding. So the prefix may come first or last, and may
# lie anywhere in memory.
#
# ## 3. The same, one tile at a time
# A GPU is fast at products of matrices, so we read a *tile* of N columns at once, for M queries at
# once. Only the shapes change: `m` and `z` are (M,), `u` is (M, D). The animation shows query 20
# reading its columns in four tiles. When a larger maximum arrives, the bars that are already there
# shrink: that is alpha.


# %%
def softmax_step(u, z, m, s, v):
    """Add a tile of scores s (M, N) and values v (N, D) to the running sums."""
    m_new = torch.maximum(m, s.amax(1))  # (M,)
    p = torch.exp(s - m_new[:, None])  # (M, N)
    alpha = torch.exp(m - m_new)  # (M,)
    return u * alpha[:, None] + p @ v, z * alpha + p.sum(1), m_new


u_i, z_i, m_i = torch.zeros(1, D), torch.zeros(1), torch.tensor([-math.inf])
frames = []
for a, b in ((0, P), (P, P + 7), (P + 7, P + 14), (P + 14, P + 21)):
    m_old, z_old = m_i, z_i
    u_i, z_i, m_i = softmax_step(u_i, z_i, m_i, s[None, a:b], values[a:b])
    alpha = torch.exp(m_old - m_i).item()
    frames.append((f"{a - P}..{b - P - 1}" if a else "prefix", s[a:b].tolist()))
    print(f"alpha {alpha:.3f}, m {m_i.item():.3f}, z {z_i.item():.3f}")
assert alpha < 1 and z_i < z_old  # in the last tile
same("o of query 20, in four tiles", (u_i / z_i)[0], o_exact[0, 0, i])
pictures.running_softmax(frames)

# %% [markdown]
# This query finds its largest score in its last tile, so alpha is below 1 there and z shrinks,
# although seven terms are added. Now all queries of a head. **The prefix's tiles come first and
# need no mask**, because every query sees the whole prefix. (Without a prefix there are none.)
# Tiles of the sequence are of three kinds: those before the diagonal are seen by all queries of the
# tile, those on the diagonal need the mask $j \le i$, and those after it are not visited. The mask
# is a comparison of two ranges of numbers; nothing of size (T, P + T) exists.
#
# With a cache there are S > T keys, and query i is the token S - T + i. The mask is then
# $j \le S - T + i$, and a tile of queries visits the columns up to S - T + its last i. Nothing else
# changes, here or in the backward pass.

# %%
BLOCK = 8  # queries in a tile, and columns (on a GPU: 16 to 128)


def tiles(end: int) -> list[slice]:
    """0 .. end in pieces of BLOCK; the last one may be shorter."""
    return [slice(a, min(a + BLOCK, end)) for a in range(0, end, BLOCK)]


def later(queries: slice, columns: slice):
    """(M, N) bool: columns of the sequence that these queries do not see."""
    i = torch.arange(queries.start, queries.stop)
    return torch.arange(columns.start, columns.stop) > i[:, None]


visited = []
for queries in tiles(T):
    visited += [(queries, columns, "prefix") for columns in tiles(P)]
    for columns in tiles(queries.stop):  # none after the last query
        kind = "diagonal" if later(queries, columns).any() else "whole"
        visited.append((queries, columns, kind))
kinds = Counter(kind for *_, kind in visited)
print(f"{len(tiles(T))} tiles of queries visit tiles of columns: {kinds}")
assert kinds["diagonal"] == len(tiles(T))  # one masked tile for each
pictures.tiles(visited, T, P)

# %% [markdown]
# ## 4. A complete Triton kernel
# A GPU has a large memory (141 GB on an H200), which is slow. Each of its many processors has a
# memory of its own on the chip (some 200 KiB), which is fast. A *kernel* is a function that runs as
# many **programs** at the same time. Here each program handles one tile of queries: it loads its q
# once, reads the columns tile by tile, keeps u, z and m on the chip, and writes o and lse at the
# end. The diagram compares what lies in memory, to scale.

# %%
share = pictures.memory(B=10, H=16, T=128, P=10, D=64)  # of GPT-2 medium
print(f"written down, copies, scores and weights are {share:.0%}")
assert share > 0.5

# %% [markdown]
# Written down, more than half of the memory holds copies, scores and weights. Fused, none of them
# exists, and the prefix is a thin line, since all rows share one. What a program holds fits on the
# chip.
#
# Here is the whole kernel. Five things are new beside the loops above.
# - **Grid.** `kernel[(a, b)](...)` starts a x b programs. Each asks `tl.program_id` which one it
#   is, and derives from that which row, head and queries are its own.
# - **Pointers.** A kernel gets the address of a tensor's first element and does its own indexing.
#   Element (b, h, i, d) of a contiguous q lies at `((b * H + h) * T + i) * D + d`. The prefix has
#   no b, so **all rows read the same addresses**: this is why it need not be copied.
# - **Masks.** Tiles have fixed sizes, powers of two (16 or more for a product; D, too), so the last
#   one reaches past the end. `tl.load(..., mask=, other=0.0)` reads zeros there, and `tl.store`
#   with a mask writes nothing. The columns of the sequence need no mask of their own at its end:
#   only queries past the end would see them, and these are not stored.
# - **constexpr.** Sizes of tiles must be known to the compiler. T and P are ordinary numbers;
#   otherwise every new length would be compiled anew.
# - **Precision.** `input_precision="ieee"` asks for products in full fp32. Without it Triton takes
#   TF32, which keeps 10 bits.

# %%
if not HAVE_TRITON:
    print("Triton is not installed: its cells are skipped (Linux has it)")
else:
    import triton
    import triton.language as tl

    @triton.jit
    def read_tile(ptr, at, end, D: tl.constexpr):
        """A tile [len(at), D] of a (end, D) matrix; zeros from `end` on."""
        address = ptr + at[:, None] * D + tl.arange(0, D)[None, :]
        return tl.load(address, mask=at[:, None] < end, other=0.0)

    @triton.jit
    def add_tile(u, z, m, q, k, v, visible, scale):
        """softmax_step, with the product that makes the scores."""
        s = scale * tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
        s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))  # [M]
        p = tl.exp(s - m_new[:, None])  # [M, N]
        alpha = tl.exp(m - m_new)  # [M]
        u = u * alpha[:, None] + tl.dot(p, v, input_precision="ieee")
        return u, z * alpha + tl.sum(p, 1), m_new

    @triton.jit
    def attend_kernel(  # noqa: PLR0913
        q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, o_ptr, lse_ptr,
        n_head, seq_len, prefix_len, scale,
        D: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """o and lse of BLOCK queries of one row and head."""
        # which program am I?
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # my queries
        bh = tl.program_id(1)  # my row b and head h, as b * H + h
        # where does my row and head begin?
        start = bh * seq_len * D
        prefix_start = (bh % n_head) * prefix_len * D  # no b in here
        q = read_tile(q_ptr + start, i, seq_len, D)  # [BLOCK, D]
        u = tl.zeros([BLOCK, D], tl.float32)
        z = tl.zeros([BLOCK], tl.float32)
        m = tl.full([BLOCK], float("-inf"), tl.float32)
        # the prefix: every query sees all of it, and nothing past its end
        for first in range(0, prefix_len, BLOCK):
            j = first + tl.arange(0, BLOCK)
            k = read_tile(prefix_k_ptr + prefix_start, j, prefix_len, D)
            v = read_tile(prefix_v_ptr + prefix_start, j, prefix_len, D)
            inside = (j < prefix_len)[None, :]
            u, z, m = add_tile(u, z, m, q, k, v, inside, scale)
        # the sequence, up to my last query
        for first in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):
            j = first + tl.arange(0, BLOCK)
            k = read_tile(k_ptr + start, j, seq_len, D)
            v = read_tile(v_ptr + start, j, seq_len, D)
            causal = j[None, :] <= i[:, None]
            u, z, m = add_tile(u, z, m, q, k, v, causal, scale)
        at = o_ptr + start + i[:, None] * D + tl.arange(0, D)[None, :]
        tl.store(at, u / z[:, None], mask=i[:, None] < seq_len)
        tl.store(lse_ptr + bh * seq_len + i, m + tl.log(z), mask=i < seq_len)

    def attend_triton(q, k, v, prefix_k, prefix_v, BLOCK: int = 16):
        """o (B, H, T, D) and lse (B, H, T) from contiguous fp32 tensors."""
        B, H, T, D = q.shape
        o, lse = torch.empty_like(q), q.new_empty(B, H, T)
        grid = triton.cdiv(T, BLOCK), B * H
        attend_kernel[grid](
            q, k, v, prefix_k, prefix_v, o, lse, H, T, prefix_k.shape[1],
            D**-0.5, D=D, BLOCK=BLOCK,
        )  # fmt: skip
        return o, lse

    single = [x.float() for x in (q, k, v, prefix_k, prefix_v)]
    o_triton, lse_triton = attend_triton(*single)
    same("Triton, fp32: o", o_triton, o_exact, 1e-5)  # worst seen: 8e-7
    same("Triton, fp32: lse", lse_triton, lse_exact, 1e-5)

# %% [markdown]
# **Predict.** How many programs did that start? And what happens if the first loop leaves
# out `inside`, so that the prefix's 5 columns become 16, the last 11 of them zeros? (Below, the
# prefix is padded with zeros, which gives the same.)

# %%
if HAVE_TRITON:
    n = triton.cdiv(T, 16)
    print(f"{n} tiles of queries x {B * H} heads of rows: {n * B * H} programs")
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 11)) for x in single[3:]]
    o_padded, lse_padded = attend_triton(*single[:3], *padded)
    gap = (o_padded - o_exact).abs().max().item()
    print(f"zeros that are seen move o by up to {gap:.2f}")
    same("each one adds e^0 to z", lse_padded.exp(), lse_exact.exp() + 11, 1e-3)
    assert gap > 0.1

# %% [markdown]
# **Answer.** 18 programs, 3 tiles of queries for each of the 6 heads of rows. And a column of zeros
# is not nothing. Its score is 0, so it gets the weight $e^0 = 1$ in the sum $z$, and every other
# weight shrinks. The mask must give -inf, not 0. (For the same reason a prefix of zeros changes the
# model, as tutorial 2 shows.)
#
# ## 5. The backward pass
# Let $do_i$ be the gradient that arrives at $o_i$ ($d_i$ in section 9 of tutorial 2, which derives
# what follows). If $p$ is known,
#
# $$ dv_j = \sum_i p_{ij}\, do_i, \qquad
# ds_{ij} = p_{ij} \Big( \langle do_i, v_j \rangle - \sum_l p_{il} \langle do_i, v_l \rangle \Big),
# \qquad dq_i = \tfrac{1}{\sqrt D} \sum_j ds_{ij} k_j, \qquad
# dk_j = \tfrac{1}{\sqrt D} \sum_i ds_{ij} q_i . $$
#
# The sum over $l$ runs over all columns of a query, and no tile has them all. But it is equal to a
# product of two vectors of D numbers which we do have:
#
# $$ \sum_l p_{il} \langle do_i, v_l \rangle = \langle do_i, \sum_l p_{il} v_l \rangle
# = \langle do_i, o_i \rangle =: \delta_i . $$
#
# And $p$ itself need not be kept: $p_{ij} = e^{s_{ij} - \mathrm{lse}_i}$ can be made again for any
# tile, in any order. **So besides its inputs the forward pass keeps o and lse, and nothing of size
# T x T.**


# %%
def tile_grads(q, do, lse, delta, k, v, hidden=None):
    """What a tile of queries and a tile of columns add to dq, dk and dv."""
    p = torch.exp(scale * q @ k.T - lse[:, None])  # (M, N)
    p = p if hidden is None else p.masked_fill(hidden, 0.0)
    ds = p * (do @ v.T - delta[:, None])
    return scale * ds @ k, scale * ds.T @ q, p.T @ do


def backward_head(q, k, v, prefix_k, prefix_v, o, lse, do):
    """dq, dk, dv of a row and head, and its part of the prefix's gradient."""
    delta = (do * o).sum(1)  # (T,)
    grads = [torch.zeros_like(x) for x in (q, k, v, prefix_k, prefix_v)]
    dq, dk, dv, part_k, part_v = grads
    for mine in tiles(len(q)):  # queries
        known = q[mine], do[mine], lse[mine], delta[mine]
        for at in tiles(len(prefix_k)):
            a, b, c = tile_grads(*known, prefix_k[at], prefix_v[at])
            dq[mine] += a
            part_k[at] += b
            part_v[at] += c
        for at in tiles(mine.stop):
            a, b, c = tile_grads(*known, k[at], v[at], later(mine, at))
            dq[mine] += a
            dk[at] += b
            dv[at] += c
    return grads


names_of_grads = "dq", "dk", "dv", "dprefix_k", "dprefix_v"
inputs = [x.clone().requires_grad_() for x in (q, k, v, prefix_k, prefix_v)]
exact = torch.autograd.grad(attend_concatenated(*inputs), inputs, do)
found = [torch.zeros_like(x) for x in inputs]
for b in range(B):
    for h in range(H):
        args = q[b, h], k[b, h], v[b, h], prefix_k[h], prefix_v[h]
        of_head = backward_head(*args, o_exact[b, h], lse_exact[b, h], do[b, h])
        for n, part in enumerate(of_head):
            at = (b, h) if n < 3 else (h,)  # the prefix's: summed over the rows
            found[n][at] += part
for name, actual, wanted in zip(names_of_grads, found, exact, strict=True):
    same(f"{name}, tile by tile", actual, wanted)

# %% [markdown]
# On a GPU many programs run at once, and no two of them may add to the same element. For short
# rows, one program takes a whole row and head, as `backward_head` does. For long rows the pairs of
# tiles are visited twice: by programs that own a tile of queries and write `dq`, and by programs
# that own a tile of columns and write `dk` and `dv`. The scores are then computed twice, too.
#
# **All B rows see the prefix's columns**, so their gradient is a sum over the batch. Each program
# writes its *part* of it to memory in fp32: a part is the sum over one row (for short rows), over a
# tile of queries, or, for a long prefix, over a few rows. A last kernel adds the parts.
#
# **Why parts?** The result of a floating-point sum depends on its order. Atomic additions happen in
# the order in which programs finish, so two equal runs would differ in their last bits. The last
# kernel reads the parts in the order of the rows, in blocks of fixed size. It sums each block in a
# pattern that the compiler has fixed, and adds the sums of the blocks from the first to the last.
# This order follows from the shapes (and, in a bank, from which row uses which prefix), so the sum
# repeats bit for bit. **Why fp32?** In 16 bits the rounding errors grow with the batch.

# %%
parts = torch.randn(64, H, P, D)  # what 64 rows add to dprefix_k
low = parts.float()
sums = {"fp32": reduce(torch.add, low)}  # one row after the other
sums["fp32, last row first"] = reduce(torch.add, low.flip(0))
sums["bf16"] = reduce(torch.add, parts.bfloat16())
error = {k: (x - parts.sum(0)).abs().max().item() for k, x in sums.items()}
print("largest error:", ", ".join(f"{k} {x:.1e}" for k, x in error.items()))
assert not torch.equal(sums["fp32"], sums["fp32, last row first"])
assert error["bf16"] > 1000 * error["fp32"]

# %% [markdown]
# ## 6. What is kept for the backward pass
# PyTorch can tell: `saved_tensors_hooks` calls a function for each tensor that autograd keeps. We
# count their bytes, without the inputs themselves, and compare with a formula for each way.


# %%
def kept(attend, inputs) -> int:
    """Bytes that autograd keeps beside the inputs."""
    sizes = {}

    def note(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        output = attend(*inputs)
    for x in inputs:
        sizes.pop(x.untyped_storage().data_ptr(), None)
    del output  # it held what was kept
    return sum(sizes.values())


def formulas(B, H, T, P, D, e: int) -> tuple[int, int]:
    """Bytes kept, written down and fused; e: bytes of an element."""
    joined = 2 * (P + T) * D  # [prefix; k] and [prefix; v]
    plain = e * B * H * (T * D + joined + T * (P + T)) + T * (P + T)
    return plain, e * B * H * T * D + 4 * B * H * T  # o, and lse in fp32


leaves = [x.float().requires_grad_() for x in (q, k, v, prefix_k, prefix_v)]
plain, fused = formulas(B, H, T, P, D, 4)
assert kept(attend_concatenated, leaves) == plain
if HAVE_TRITON:  # the Triton kernels of this repository
    assert kept(prefix_attention, leaves) == fused
print(f"kept here: written down {plain:,} bytes, fused {fused:,}")
print("the 24 layers of GPT-2 medium in bf16, B 10:")
ratios = []
for t in (128, 1000):
    plain, fused = (24 * x / 2**20 for x in formulas(10, 16, t, 10, 64, 2))
    ratios.append(plain / fused)
    print(f"T {t:4}: written down {plain:,.0f} MiB, fused {fused:,.0f} MiB")
assert 5 < ratios[0] < 6 and 18 < ratios[1] < 19

# %% [markdown]
# Written down, autograd keeps the scaled q, the joined keys and values, the weights p and a mask.
# Fused, it keeps o and lse. The ratio grows with T, because p has T (P + T) numbers and o has T D:
# from 5 at T = 128 to 18 at T = 1000. While the fused backward pass of a layer runs, it also needs
# room for the parts of the prefix's gradient, for short rows 2 B H P D numbers in fp32, and for
# long rows for $\delta$, B H T numbers. This room is freed with the layer.
#
# ## 7. On a real GPU
# How fast can this be at best? A GPU that makes $F$ FLOPs and moves $W$ bytes per second needs at
# least $\max(\text{FLOPs} / F, \text{bytes} / W)$. The ratio of FLOPs to bytes is the **arithmetic
# intensity**; below $F / W$ memory is the limit. One product costs 2 D FLOPs for each pair of a
# query and a column that it sees. The forward pass has two (s and o), so 4 D; the backward pass has
# five (s again, dp, dq, dk, dv), so 10 D. The bytes are those of inputs and outputs, once each. The
# times below come from [`benchmarks/gpu`](../benchmarks/gpu/README.md), and so does the roof: $W$
# is the speed of a large copy and $F$ that of a large product in the same run.

# %%
pictures.roofline()
pictures.times()

# %% [markdown]
# **Decoding** makes about one FLOP per byte, so only reading less can make it faster. Of the three,
# its kernel comes nearest to the roof. **Training** at T around 128 is limited by memory, too, and
# reaches less of the roof; **long sequences** come near the flat part of the roof and stay far
# below it. The reason was not measured.
#
# After a concatenation cuDNN is slower than our kernels at both lengths where it was measured.
# cuDNN without a prefix does less work, so the printed line "equal work" multiplies its time by
# $1 + 2P / (T + 1)$, the ratio of visible pairs. Below 1 our kernels do the same work in less time:
# they are ahead at short lengths, and behind from T = 512 on. (The backward pass has been changed
# since. The changed one has not been timed on a GPU.)
#
# These times are worth something because the results are right, and at first they were not. All
# tests had passed in the interpreter; on the first real GPU most failed, and some gradients of the
# prefix were wrong *without any error*. The assembler `ptxas` 12.8 had put one register into both
# halves of an address ([the record](../benchmarks/gpu/README.md)). A newer one is right, and
# [`kernels/tools/sass.py`](../kernels/tools/sass.py) now finds that pattern in the machine code
# without a GPU. So compare with a plain version in fp64, on the hardware that you use, before you
# look at a clock.
#
# ## 8. The kernels of this repository
# [`attention.py`](../kernels/attention.py) and [`backward.py`](../kernels/backward.py) have the
# same functions `softmax_step` and `tile_grads`. They also read views of the fused qkv projection
# without a copy, banks of prefixes, and rows of different lengths.

# %%
if HAVE_TRITON:
    o_kernel = prefix_attention(*leaves)
    grads = torch.autograd.grad(o_kernel, leaves, do.float())
    again = torch.autograd.grad(prefix_attention(*leaves), leaves, do.float())
    for name, actual, wanted in zip(names_of_grads, grads, exact, strict=True):
        same(f"Triton, fp32: {name}", actual, wanted, 1e-5)  # worst seen: 8e-7
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    print("a second run gives the same bits")

# %% [markdown]
# ## Common mistakes
# > - **`is_causal=True` after concatenation.** PyTorch aligns that mask with the first column, so
# >   query i sees i + 1 columns of [prefix; sequence]: P too few. Version 1.3.0 of the library
# >   adapters did this to GPT-2 and Llama when we tried it.
# > - **A mask tensor "to be safe".** PyTorch's flash attention takes none, and a slower kernel is
# >   chosen without a message.
# > - **Forgetting the sum over the batch** in the prefix's gradient, or making it in 16 bits.
# > - **-inf minus -inf.** A query that has seen nothing yet has m = -inf, and $e^{m - m}$ is NaN.
# >   Here the first tile always has a visible column; with rows of different lengths, take care.
# > - **TRITON_INTERPRET=1 after the import**, or bf16 in the interpreter, whose products in bf16
# >   come out wrong without an error.
#
# ## Recap
# - Softmax never needs all scores of a query: m, z and u are enough, and earlier sums shrink by
#   alpha when m grows.
# - A tile of columns may come from anywhere, so prefix and sequence are never joined, and only
#   tiles on the diagonal are masked.
# - Kept for the backward pass: o and lse. p is made again, and delta, the product of do and o,
#   replaces the sum over the columns.
# - The prefix's gradient is a sum over the batch: parts in fp32, added in the order of the rows.
# - Decoding and short training steps are limited by memory: bytes saved are time saved.
#
# ## Exercises
# 1. *Easy.* Visit the prefix *after* the sequence. What changes in o, in lse, and in the number of
#    masked tiles? *Hint:* section 2 says on what the result does not depend.
# 2. *Medium.* Give each row its own prefix length, and compare with `prefix_attention(...,
#    prefix_index=, prefix_lens=)`. *Hint:* only the end of the loop over prefix tiles changes.
# 3. *Medium.* Let a gradient `dlse` arrive at lse, too. Which one line of `backward_head` changes?
#    *Hint:* $\partial\, \mathrm{lse}_i / \partial s_{ij} = p_{ij}$; compare with $ds$.
# 4. *Hard.* Decoding on a GPU cuts the columns of a row into parts that different programs read.
#    Merge their results, and count the bytes that this adds. *Hint:* each part gives o and lse; its
#    share of the whole is $e^{\mathrm{lse}_c - \mathrm{lse}}$.
# 5. *Hard.* Show that a prefix acts like an adapter [5]: with $\lambda = Z_P / (Z_P + Z_S)$ as in
#    tutorial 2, $o = (1 - \lambda)\, o_S + \lambda\, o_P$, and $o_P$ is a two-layer network of
#    width P on the layer's input. *Hint:* its weights are $W_q K_P^\top / \sqrt D$ and $V_P$.
#
# Solutions: `tutorials/solutions/04_fused_attention.py`.
#
# ## References
# 1. Li & Liang 2021, Prefix-Tuning, eq. (3): https://arxiv.org/abs/2101.00190
# 2. Milakov & Gimelshein 2018, Online normalizer calculation: https://arxiv.org/abs/1805.02867
# 3. Dao 2023, FlashAttention-2, algorithms 1 and 2: https://arxiv.org/abs/2307.08691
# 4. Triton, tutorials: https://triton-lang.org/main/getting-started/tutorials/
# 5. He et al. 2022, A Unified View of Parameter-Efficient Transfer Learning:
#    https://arxiv.org/abs/2110.04366
