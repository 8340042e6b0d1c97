"""The functions of the kernels in plain PyTorch: the definition of correct, and the CPU path.

Attention over [prefix; sequence]: query i of a row attends to the whole prefix and to the visible
part of the sequence [1, eq. (3)],

    s_ij = scale <q_i, k_j>,   lse_i = log sum_j exp(s_ij),   o_i = sum_j exp(s_ij - lse_i) v_j

where j runs over the columns of [prefix; sequence] that query i sees:

    prefix column p:    p < prefix_len of the row (0 if the row has no prefix)
    sequence column j:  j < kv_len of the row, and j <= q_offset + i when causal.

With `append` the keys and values of the queries' own tokens are first written into k and v, at the
columns q_offset + i (`write_new`). No query sees later columns; `seen` may hide earlier ones.

Columns that no query of a row sees are set to zero before the products (`hide`). A mask over the
scores would not be enough if they contain inf or NaN, because 0 x inf is NaN.

`prefix_attention_eager` implements this literally, in any floating dtype up to fp64.
`prefix_attention_lean` computes the same with PyTorch's fused attention, and builds a mask only if
one is needed; it runs on a CPU. Neither checks its arguments; `kernels.prefix_attention` does, and
its docstring has all shapes. Shapes use batch B, queries T, keys S, prefix positions P, heads H and
head width D. `cross_entropy_plain_`, `add_norm_plain` and `fused_linear_plain`, at the end,
correspond to `cross_entropy.py`, `layer_norm.py` and `few_rows.py`, whose headers have the
equations.

[1] Li & Liang 2021, https://arxiv.org/abs/2101.00190
"""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

# limits for `scores_side_by_side` (measured on two cores, fp32 and bf16, H = 6, D = 64)
FEW_QUERIES = 8  # largest T
MANY_KEYS = 2**18  # least elements of k; copying fewer takes less time than starting four products


def hide(x: Tensor, shown: Tensor | None) -> Tensor:
    """x (B, H, S, D) with zeros in the columns that `shown` (B or 1, S) hides; None = x itself."""
    return x if shown is None else x.masked_fill(~shown[:, None, :, None], 0)


def prefix_rows(
    prefix: Tensor, prefix_index: Tensor | None, q: Tensor, row_lens: Tensor | None = None
) -> Tensor:
    """The prefix that each row of the batch sees, in q's dtype: (B, H, P, D).

    Columns from row_lens on (see `prefix_row_lens`) are zeros. The cast comes last, so that
    autograd sums the rows' gradients in the prefix's own dtype.
    """
    if prefix.dim() == 3 or prefix_index is None:  # (H, P, D), (1, H, P, D) or (B, H, P, D)
        rows = prefix.expand(q.shape[0], -1, -1, -1)
    else:  # -1 = no prefix: read an arbitrary one, and hide all of it
        rows = prefix[prefix_index.clamp(min=0).long()]
    if row_lens is not None:
        rows = hide(rows, torch.arange(rows.shape[2], device=q.device) < row_lens[:, None])
    return rows.to(q.dtype)


def prefix_row_lens(
    prefix: Tensor, prefix_index: Tensor | None, prefix_lens: Tensor | None
) -> Tensor | None:
    """How many prefix columns each row sees: (B,) or (1,) int64; None = all P in every row."""
    if prefix_index is None:
        return None if prefix_lens is None else prefix_lens.long()
    if prefix_lens is None:
        lens = torch.full_like(prefix_index, prefix.shape[-2])
    else:
        lens = prefix_lens.expand(prefix.shape[0])[prefix_index.clamp(min=0).long()]
    return torch.where(prefix_index >= 0, lens, 0).long()


def write_new(
    k: Tensor, v: Tensor, append: tuple[Tensor, Tensor], q_offset: Tensor | None
) -> Tensor | None:
    """Write new keys and values (B, H, T, D) into k and v (B, H, S, D), in place.

    Returns the number of columns up to the last new one in each row, (B,); None = all S.
    """
    (B, _, T, _), S = append[0].shape, k.shape[2]
    if q_offset is None:
        for cache, new in zip((k, v), append, strict=True):
            cache[:, :, S - T :] = new
        return None
    row, at = torch.arange(B, device=k.device)[:, None], q_offset[:, None]
    if T > 1:
        at = at + torch.arange(T, device=k.device)  # (B, T)
    for cache, new in zip((k, v), append, strict=True):
        cache[row, :, at] = new.transpose(1, 2)
    return q_offset + T


def seen_columns(
    k: Tensor, T: int, causal: bool, kv_lens: Tensor | None, q_offset: Tensor | None,
    seen: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """The sequence columns that at least one query of each row sees: (B, S) bool; None = all."""
    reach = kv_lens
    if causal and q_offset is not None:
        reach = q_offset + T if reach is None else torch.minimum(q_offset + T, reach)
    shown = None if seen is None else seen.any(1)
    if reach is None:
        return shown
    inside = torch.arange(k.shape[2], device=k.device) < reach[:, None]
    return inside if shown is None else inside & shown


def prefix_attention_eager(  # noqa: PLR0913
    q, k, v, prefix_k, prefix_v, *, causal=True, scale=None, prefix_index=None, prefix_lens=None,
    kv_lens=None, q_offset=None, return_lse=False, append=None, seen=None,
):  # fmt: skip
    """The definition: concatenate, mask, softmax, multiply. See `kernels.prefix_attention`.

    Products are computed in q's dtype, the softmax in fp32 (fp64 for fp64).
    """
    (B, _, T, D), S, P = q.shape, k.shape[2], prefix_k.shape[-2]
    device, softmax_dtype = q.device, torch.promote_types(q.dtype, torch.float32)
    if append is not None:
        kv_lens = write_new(k, v, append, q_offset)
    scale = D**-0.5 if scale is None else scale
    row_lens = prefix_row_lens(prefix_k, prefix_index, prefix_lens)
    shown = seen_columns(k, T, causal, kv_lens, q_offset, seen)
    keys, values = (
        torch.cat([prefix_rows(prefix, prefix_index, q, row_lens), hide(x, shown)], dim=2)
        for prefix, x in ((prefix_k, k), (prefix_v, v))
    )  # (B, H, P + S, D)

    visible = torch.ones(B, T, P + S, dtype=torch.bool, device=device)
    if row_lens is not None:
        visible[:, :, :P] &= torch.arange(P, device=device) < row_lens[:, None, None]
    j = torch.arange(S, device=device)
    if kv_lens is not None:
        visible[:, :, P:] &= j < kv_lens[:, None, None]
    if causal:
        first = torch.full((B,), S - T, device=device) if q_offset is None else q_offset
        visible[:, :, P:] &= j <= first[:, None, None] + torch.arange(T, device=device)[:, None]
    if seen is not None:
        visible[:, :, P:] &= seen
    visible = visible[:, None]  # (B, 1, T, P + S)

    # a query that sees nothing keeps finite scores here, to avoid inf - inf; it is zeroed below
    blind = ~visible.any(-1, keepdim=True)  # (B, 1, T, 1)
    s = (scale * (q @ keys.mT)).to(softmax_dtype)  # (B, H, T, P + S)
    s = s.masked_fill(~(visible | blind), float("-inf"))
    lse = s.logsumexp(-1, keepdim=True)  # (B, H, T, 1)
    p = (s - lse).exp().masked_fill(blind, 0.0)
    o = merged_order(p.to(q.dtype) @ values)  # (B, H, T, D)
    return (o, lse.masked_fill(blind, float("-inf"))[..., 0]) if return_lse else o


def prefix_attention_lean(  # noqa: PLR0913
    q, k, v, prefix_k, prefix_v, *, causal=True, scale=None, prefix_index=None, prefix_lens=None,
    kv_lens=None, q_offset=None, return_lse=False, append=None, seen=None,
):  # fmt: skip
    """The CPU path, with a mask only if needed. See `kernels.prefix_attention`.

    Decoding uses `scores_side_by_side`; everything else concatenates the keys and uses PyTorch's
    fused attention. Training in bf16 uses `masked_products` instead, because the fused backward
    pass is slower than batched products on a CPU (benchmarks/cpu_attention.csv). Fused attention
    returns no lse, so with return_lse the scores are computed a second time.
    """
    (_, _, T, D), S, P = q.shape, k.shape[2], prefix_k.shape[-2]
    scale = D**-0.5 if scale is None else scale
    row_lens = prefix_row_lens(prefix_k, prefix_index, prefix_lens) if P > 0 else None
    if append is not None:
        columns = write_new(k, v, append, q_offset)
        kv_lens = None if causal else columns  # if causal, it is implied
    mask = lean_mask(T, S, P, q.device, causal, row_lens, kv_lens, q_offset, seen)
    shown = seen_columns(k, T, causal, kv_lens, q_offset, seen)
    training = torch.is_grad_enabled() and any(
        x.requires_grad for x in (q, k, v, prefix_k, prefix_v)
    )
    few = T <= FEW_QUERIES or append is not None
    if few and k.numel() >= MANY_KEYS and not training:
        prefix = prefix_k, prefix_v
        if prefix_k.dim() == 4 or row_lens is not None:
            prefix = tuple(prefix_rows(x, prefix_index, q, row_lens) for x in prefix)
        return scores_side_by_side(q, k, v, *prefix, mask, shown, scale, return_lse)
    keys, values = hide(k, shown), hide(v, shown)
    if P > 0:
        keys, values = (
            torch.cat([prefix_rows(prefix, prefix_index, q, row_lens), x], dim=2)
            for prefix, x in ((prefix_k, keys), (prefix_v, values))
        )  # (B, H, P + S, D)
    if training and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        o = masked_products(q, keys, values, mask, scale)
    else:
        o = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
    o = merged_order(o)
    if not return_lse:
        return o
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):  # autocast would round the scores to bf16
        s = scale * (q.to(lse_dtype) @ keys.to(lse_dtype).mT)  # (B, H, T, P + S)
    if mask is None:
        return o, s.logsumexp(-1)
    blind = ~mask.any(-1, keepdim=True)  # (B or 1, 1, T or 1, 1)
    lse = s.masked_fill(~(mask | blind), float("-inf")).logsumexp(-1)
    return o, lse.masked_fill(blind[..., 0], float("-inf"))


def scores_side_by_side(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor,
    mask: Tensor | None, shown: Tensor | None, scale: float, return_lse: bool,
):  # fmt: skip
    """o (and lse) of few queries without gradients; concatenates scores instead of keys.

    Scores have T / D of the size of the keys. Copying the keys, which are the whole cache in each
    layer of each step, takes longer than the attention itself (measured: 3x at B = 64). Therefore
    hidden columns are not zeroed: the mask replaces the scores of hidden keys, and hidden values
    are zeroed only if they would spoil the result.

    Args:
        prefix_k, prefix_v: (H, P, D), or (B, H, P, D) from `prefix_rows`.
        mask, shown: from `lean_mask` and `seen_columns`.
    """
    P = prefix_k.shape[-2]
    prefix_k, prefix_v = prefix_k.to(q.dtype), prefix_v.to(q.dtype)
    s = torch.cat([product(q, prefix_k.mT), query_key_products(q, k)], dim=-1)  # (B, H, T, P + S)
    s = scale * s.to(torch.promote_types(q.dtype, torch.float32))
    blind = None
    if mask is not None:
        blind = ~mask.any(-1, keepdim=True)  # (B or 1, 1, T or 1, 1)
        s.masked_fill_(~(mask | blind), float("-inf"))
    p = s.softmax(-1).to(q.dtype)
    o = p[..., P:] @ v + product(p[..., :P], prefix_v)
    # on a GPU (which we do not wait for) and under a tracer they are always zeroed
    always = q.is_cuda or torch.compiler.is_compiling()
    if shown is not None and (always or not o.isfinite().all()):
        o = p[..., P:] @ hide(v, shown) + product(p[..., :P], prefix_v)
    o = merged_order(o if blind is None else o.masked_fill(blind, 0.0))
    if not return_lse:
        return o
    lse = s.logsumexp(-1)
    return o, lse if blind is None else lse.masked_fill(blind[..., 0], float("-inf"))


def query_key_products(q: Tensor, k: Tensor) -> Tensor:
    """q k^T: (B, H, T, S).

    A 16-bit product on a CPU copies strided keys column by column. Making a plain copy first takes
    a third of the time (B = 64, S = 74: 0.23 ms instead of 0.76).
    """
    if k.device.type == "cpu" and k.element_size() == 2:
        k = k.contiguous()
    return q @ k.mT


def product(x: Tensor, y: Tensor) -> Tensor:
    """x (B, H, T, X) times y, (B, H, X, Y) or (H, X, Y) shared by all rows: (B, H, T, Y).

    A shared y is not copied for each row; instead, all of x becomes one matrix per head.
    """
    if y.dim() == 4:
        return x @ y
    B, H, T, X = x.shape
    xy = x.transpose(0, 1).reshape(H, B * T, X) @ y  # (H, B T, Y)
    return xy.view(H, B, T, -1).transpose(0, 1)


def masked_products(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """softmax(scale q keys^T + bias) values by two batched products: (B, H, T, D) in q's dtype."""
    (B, H, T, D), S = q.shape, keys.shape[2]
    bias, blind = q.new_zeros(1, 1, T, S), None
    if mask is not None:
        blind = ~mask.any(-1, keepdim=True)  # (B or 1, 1, T or 1, 1)
        bias = q.new_zeros(()).where(mask | blind, float("-inf"))
    bias = bias.expand(B, H, T, S).flatten(0, 1)
    q, keys, values = (x.flatten(0, 1) for x in (q, keys, values))
    # autocast would cast the softmax to fp32 and back
    with torch.autocast(q.device.type, enabled=False):
        p = torch.baddbmm(bias, q, keys.mT, alpha=scale).softmax(-1)  # (B H, T, S)
        o = (p @ values).view(B, H, T, D)
    return o if blind is None else o.masked_fill(blind, 0.0)


def lean_mask(
    T: int, S: int, P: int, device: torch.device, causal: bool,
    row_lens: Tensor | None, kv_lens: Tensor | None, q_offset: Tensor | None,
    seen: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """What each query sees, as small as broadcasting allows: (B or 1, 1, T or 1, P + S) bool.

    None if every query sees every key, like a single query at the end of the keys. Column c < P is
    prefix column c, column c >= P is sequence column c - P.
    """
    parts = [] if seen is None else [F.pad(seen, (P, 0), value=True)[:, None]]
    causal = causal and not (q_offset is None and T == 1)
    if row_lens is not None or kv_lens is not None or causal:
        column = torch.arange(P + S, device=device)
        in_prefix, j = column < P, column - P
    if row_lens is not None:
        parts.append(~in_prefix | (column < row_lens[:, None, None, None]))
    if kv_lens is not None:
        parts.append(in_prefix | (j < kv_lens[:, None, None, None]))
    if causal:
        last = S - T if q_offset is None else q_offset[:, None, None, None]
        if T > 1:
            last = last + torch.arange(T, device=device)[None, None, :, None]
        parts.append(in_prefix | (j <= last))
    return reduce(torch.logical_and, parts) if parts else None


def merged_order(o: Tensor) -> Tensor:
    """o (B, H, T, D) in the memory order (B, T, H, D), so that merging the heads is a view."""
    return o.transpose(1, 2).contiguous().transpose(1, 2)


def cross_entropy_plain_(
    logits: Tensor, labels: Tensor, bias: Tensor | None, vocab_size: int, gradient: bool
) -> Tensor:
    """See `kernels.cross_entropy_`; any floating dtype, sums in fp32 (fp64 for fp64)."""
    scores, y = logits[:, :vocab_size], labels[:, None]  # (n, V), a view; (n, 1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    s = scores if bias is None else scores.to(wide) + bias[:vocab_size]
    logp = s.log_softmax(-1, dtype=wide)
    losses = -logp.gather(-1, y)
    if gradient:
        p = logp.exp_()  # softmax(s), overwriting log p
        scores.copy_(p.scatter_(-1, y, torch.expm1(-losses)))
        logits[:, vocab_size:] = 0
    return losses[:, 0]


def add_norm_plain(
    x: Tensor, y: Tensor | None, gain: Tensor, shift: Tensor, eps: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `kernels.add_norm`."""
    if y is not None and bias is not None:
        y = (y.sum(0) + bias).to(x.dtype)
    s = x if y is None else x + y
    return s, F.layer_norm(s, s.shape[-1:], gain, shift, eps)


def fused_linear_plain(
    x: Tensor, weight: Tensor, bias: Tensor, norm: tuple[Tensor, Tensor, float] | None,
    gelu: bool, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `kernels.fused_linear`."""
    x = x if norm is None else F.layer_norm(x, x.shape[-1:], *norm)
    y = F.linear(x, weight.T, bias)
    y = F.gelu(y, approximate="tanh") if gelu else y
    return y if residual is None else residual + y
