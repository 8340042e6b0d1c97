"""Functions shared by the Triton kernels: the range of a row's keys, loading tiles, the softmax.

Everything here runs inside a kernel. Square brackets give the shapes of tiles; upper case names are
compile-time constants. A tile's columns past D (if D is not a power of two) are zeros.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # log2(e)
LN2 = tl.constexpr(0.6931471805599453)  # ln(2)


@triton.jit
def await_previous(PDL: tl.constexpr):
    """Wait for the previous kernels to end, then let the next one start (`launch.overlaps`)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def gelu(y):
    """The tanh form of GELU: y (1 + tanh u) / 2 = y / (1 + exp(-2 u)), where
    u = sqrt(2 / pi) (y + 0.044715 y^3)."""
    return y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))


@triton.jit
def row_prefix(b, prefix_index_ptr, prefix_lens_ptr, stride_lens, prefix_len):
    """(n, columns): which prefix of the bank row b uses, and how many of its columns it sees."""
    n = b
    if prefix_index_ptr is not None:
        n = tl.load(prefix_index_ptr + b)
    some = tl.maximum(n, 0).to(tl.int64)  # -1 = none: name prefix 0, of which no column is seen
    columns = prefix_len
    if prefix_lens_ptr is not None:
        columns = tl.load(prefix_lens_ptr + some * stride_lens).to(tl.int32)
        columns = tl.minimum(columns, prefix_len)
    return some, tl.where(n < 0, 0, columns)


@triton.jit
def row_sequence(b, kv_lens_ptr, q_offset_ptr, seq_len, kv_len, CAUSAL: tl.constexpr):
    """(keys, first): row b's number of keys, and the column of its first query.

    Keys that no query of the row sees are not counted and never read.
    """
    keys = kv_len
    if kv_lens_ptr is not None:
        keys = tl.minimum(tl.load(kv_lens_ptr + b).to(tl.int32), kv_len)
    first = kv_len - seq_len
    if q_offset_ptr is not None:
        first = tl.load(q_offset_ptr + b).to(tl.int32)
    if CAUSAL:
        keys = tl.minimum(keys, first + seq_len)
    return keys, first


@triton.jit
def limits(m0, keys, first, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """(limit, whole): query i of a tile sees the keys j < limit_i [BLOCK_M]; all see j < whole."""
    if CAUSAL:
        return (
            tl.minimum(first + m0 + tl.arange(0, BLOCK_M) + 1, keys),
            tl.minimum(first + m0 + 1, keys),
        )
    return tl.zeros([BLOCK_M], tl.int32) + keys, keys


@triton.jit
def load_rows(ptr, start, end, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows start.. of a (rows, D) matrix: [ROWS, BLOCK_D], zeros from row `end` on."""
    rows, columns = tl.arange(0, ROWS).to(tl.int64), tl.arange(0, BLOCK_D)
    mask = (start + rows < end)[:, None]
    if D < BLOCK_D:
        mask = mask & (columns < D)[None, :]
    ptr += tl.cast(start, tl.int64) * stride
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(
    ptr, tile, start, end, stride, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The inverse of `load_rows`, in the dtype of `ptr`."""
    rows, columns = tl.arange(0, ROWS).to(tl.int64), tl.arange(0, BLOCK_D)
    mask = (start + rows < end)[:, None]
    if D < BLOCK_D:
        mask = mask & (columns < D)[None, :]
    ptr += tl.cast(start, tl.int64) * stride
    at = ptr + rows[:, None] * stride + columns[None, :]
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def softmax_step(o, z, m, s, v, scale2):
    """Add one tile of keys to the running softmax; s = <q_i, k_j>, -inf where i does not see j.

    So far o_i = sum_j 2^(s_ij scale2 - m_i) v_j, z_i is the same sum without v, and
    m_i = max_j s_ij scale2, with scale2 = |scale| log2(e).
    """
    # m_i <- max(m_i, max_j S_ij); sums under the old maximum are multiplied by alpha_i
    m_new = tl.maximum(m, tl.max(s, 1) * scale2)  # [M]
    # for a query that has seen nothing yet, 2^(-inf - 0) = 0, whereas -inf - -inf would be NaN
    m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * scale2 - m_finite[:, None])  # [M, N]
    alpha = tl.exp2(m - m_finite)
    z = z * alpha + tl.sum(p, 1)
    o = tl.dot(p.to(v.dtype), v, o * alpha[:, None], input_precision="ieee")  # [M, BLOCK_D]
    return o, z, m_new
