"""Attention over [prefix; sequence] and the other operations with kernels, with their checks.

The models call `prefix_attention`, and `prefix_attention_qkv` for self-attention in training. On a
GPU they run the Triton kernels of `attention.py`, `backward.py` and `decode.py`. On a CPU, and for
cases without a kernel (fp64, other head sizes), they run `reference.py`, plain PyTorch, which is
also the definition of correct. In the same way `cross_entropy_`, `add_norm` and `fused_linear` run
`cross_entropy.py`, `layer_norm.py`, `few_rows.py` and `some_rows.py`. Importing this package
imports only torch.
"""

import importlib.util
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from kernels.inputs import Inputs, check, check_append, heads
from kernels.reference import (
    add_norm_plain,
    cross_entropy_plain_,
    fused_linear_plain,
    prefix_attention_eager,
    prefix_attention_lean,
)

__all__ = [
    "add_norm",
    "cross_entropy_",
    "fused_linear",
    "fuses",
    "linear_parts",
    "prefix_attention",
    "prefix_attention_eager",
    "prefix_attention_lean",
    "prefix_attention_qkv",
]


def prefix_attention(  # noqa: PLR0913
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *,
    causal: bool = True, scale: float | None = None,
    prefix_index: Tensor | None = None, prefix_lens: Tensor | None = None,
    kv_lens: Tensor | None = None, q_offset: Tensor | None = None, return_lse: bool = False,
    append: tuple[Tensor, Tensor] | None = None, seen: Tensor | None = None,
):  # fmt: skip
    """Attention of each query to its whole prefix and to the visible part of the sequence.

        o_i = softmax(scale * q_i [K_p ; K_visible(i)]^T) [V_p ; V_visible(i)]

    Args:
        q: (B, H, T, D), fp16, bf16, fp32 or fp64; any strides with a contiguous last dimension.
        k, v: (B, H, S, D), q's dtype: keys and values of the sequence, without the prefix.
        prefix_k, prefix_v: (H, P, D), one prefix for the batch, or a bank (N, H, P, D); q's dtype
            or fp32 (the gradient is then fp32). P = 0 is plain attention.
        causal: query i sees only the sequence columns j <= q_offset + i.
        scale: multiplies q.k, no unit; None means D ** -0.5.
        prefix_index: (B,) int, the prefix of the bank that each row uses; -1 = none. Without it, a
            bank must have N = 1 or N = B.
        prefix_lens: (N,) or (1,) int: columns from prefix_lens[n] on are not seen; None = all P.
        kv_lens: (B,) int, columns j >= kv_len are not seen; None = all S.
        q_offset: (B,) int, the sequence column of each row's first query; None = S - T.
        append: new_k, new_v, each (B, H, T, D) in q's dtype: the keys and values of the queries'
            own tokens. They are first written into k and v, a KV cache, in place, at the columns
            q_offset + i; no query sees columns after those. Without gradients and kv_lens.
        seen: (B, T, S) bool, with append and causal=False: the columns that each query sees.
    Returns:
        o: (B, H, T, D) in q's dtype, in the memory order (B, T, H, D). With return_lse also
        lse: (B, H, T), fp32 (fp64 from fp64), in nats. A query that sees nothing has o = 0,
        lse = -inf and gives zero gradients. Differentiable in all five tensors, through lse too.
    Raises:
        ValueError: shapes, dtypes or (on the CPU) index values that disagree; both are named.
    Source: Li & Liang 2021 (arXiv:2101.00190), eq. (3).
    """
    inputs = Inputs(
        q, k, v, prefix_k, prefix_v, prefix_index, prefix_lens, kv_lens, q_offset, causal, scale
    )
    check(inputs)
    new = check_append(inputs, append, seen)
    if on_triton(q) and (new is None or q.shape[2] <= MOST_NEW):
        from kernels.attention import attention, attention_append

        o, lse = attention(*inputs) if new is None else attention_append(*inputs, *new)
        return (o, lse) if return_lse else o
    return prefix_attention_lean(
        q, k, v, prefix_k, prefix_v, causal=causal, scale=scale, prefix_index=prefix_index,
        prefix_lens=prefix_lens, kv_lens=kv_lens, q_offset=q_offset, return_lse=return_lse,
        append=append, seen=seen,
    )  # fmt: skip


def prefix_attention_qkv(  # noqa: PLR0913
    qkv: Tensor, prefix_k: Tensor, prefix_v: Tensor, *,
    causal: bool = True, scale: float | None = None,
    prefix_index: Tensor | None = None, prefix_lens: Tensor | None = None,
    kv_lens: Tensor | None = None, q_offset: Tensor | None = None, return_lse: bool = False,
):  # fmt: skip
    """Self-attention from the fused projection, whose gradient is one tensor.

    With separate q, k and v, which are views of one qkv, autograd would copy three gradients into
    one.

    Args:
        qkv: (B, T, 3, H, D), a view of the projection's output; the last dimension contiguous.
        The other arguments, results and errors are those of `prefix_attention`, with S = T.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be (B, T, 3, H, D), got {tuple(qkv.shape)}")
    options: Any = {
        "causal": causal, "scale": scale, "prefix_index": prefix_index, "prefix_lens": prefix_lens,
        "kv_lens": kv_lens, "q_offset": q_offset,
    }  # fmt: skip
    if not on_triton(qkv):
        q, k, v = heads(qkv)
        return prefix_attention(q, k, v, prefix_k, prefix_v, **options, return_lse=return_lse)
    inputs = Inputs(qkv, None, None, prefix_k, prefix_v, **options)
    check(inputs.split())
    from kernels.attention import attention

    o, lse = attention(*inputs)
    return (o, lse) if return_lse else o


def cross_entropy_(
    logits: Tensor, labels: Tensor, bias: Tensor | None = None, vocab_size: int | None = None,
    gradient: bool = True,
) -> Tensor:  # fmt: skip
    """-log softmax(logits + bias) at each label, in nats; the logits are overwritten.

    Args:
        logits: (n, V') with V' >= V, contiguous in the last dimension; columns from V on are
            ignored. They are overwritten by their gradient, which is softmax(logits + bias), minus
            1 at the label, and 0 from column V on; without `gradient`, by arbitrary values.
        labels: (n,) int64 in [0, V).
        bias: (V',), of which entries from V on are ignored; None = zero.
        vocab_size: V; None = V'.
        gradient: whether the gradient is needed.
    Returns:
        (n,), fp32 (fp64 from fp64).
    Raises:
        ValueError: shapes that disagree, or V > V'.
    """
    V = logits.shape[-1] if vocab_size is None else vocab_size
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not 1 <= V <= logits.shape[1]:
        found = f"{tuple(logits.shape)}, labels {tuple(labels.shape)}, a vocabulary of {V}"
        raise ValueError(f"logits (n, V' >= V) and labels (n,) do not fit: {found}")
    if bias is not None and bias.shape != logits.shape[1:]:
        raise ValueError(f"a bias {tuple(bias.shape)} does not fit logits {tuple(logits.shape)}")
    if fuses(logits) and logits.stride(1) == 1:
        from kernels import cross_entropy

        return cross_entropy.cross_entropy_(logits, labels.contiguous(), bias, V, gradient)
    return cross_entropy_plain_(logits, labels, bias, V, gradient)


def add_norm(
    x: Tensor, y: Tensor | None, gain: Tensor, shift: Tensor, eps: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """s = x + y and its layer norm: the residual sum of a layer and the norm after it.

        n = (s - mean(s)) / sqrt(var(s) + eps) * gain + shift, over the last dimension

    Args:
        x, y: (..., C), of the same dtype; y = None means zero, and s is x.
        gain, shift: (C,).
        eps: added to the variance, no unit.
        bias: (C,); y is then (S, ..., C), the result of `linear_parts`, and its sum over S plus
            the bias is added. Without gradients; gain, shift and bias must not be results of the
            kernel launched just before, as in `fused_linear`.
    Returns:
        s, n: (..., C). Differentiable in x and y, and also in gain and shift, but then computed by
        PyTorch's own kernels.
    Raises:
        ValueError: shapes that disagree.
    """
    wanted = x.shape if bias is None or y is None else (*y.shape[:1], *x.shape)
    one_each = all(a.shape == x.shape[-1:] for a in (gain, shift, bias) if a is not None)
    if (y is not None and y.shape != wanted) or not one_each:
        shapes = [None if a is None else tuple(a.shape) for a in (x, y, gain, shift, bias)]
        raise ValueError(f"x, y (..., C), gain, shift and bias (C,) do not fit: {shapes}")
    if bias is not None and y is not None and fuses(x):
        from kernels.layer_norm import forward

        return forward(x.contiguous(), y.contiguous(), gain, shift, eps, bias)
    trained = torch.is_grad_enabled() and (gain.requires_grad or shift.requires_grad)
    if fuses(x) and not trained:
        from kernels.layer_norm import AddNorm

        return AddNorm.apply(x, y, gain, shift, eps)
    return add_norm_plain(x, y, gain, shift, eps, bias)


def fused_linear(
    x: Tensor, weight: Tensor, bias: Tensor, *, norm: tuple[Tensor, Tensor, float] | None = None,
    gelu: bool = False, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A product with the operations around it in a layer; one kernel where `takes_few` holds, and
    without norm and residual also where `takes_some` does.

        y = residual + act(norm(x) weight + bias)

    Args:
        x: (..., K). weight: (K, N), as GPT-2 stores it. bias: (N,). All of one dtype. A kernel may
            read weight, bias and the norm's parameters before the kernel launched just before it
            has ended (`few_rows.py`), so they must not be its results.
        norm: gain (K,), shift (K,) and epsilon of a layer norm of x; None = no norm.
        gelu: whether act is the tanh form of GELU; otherwise it is the identity.
        residual: (..., N); None = zero.
    Returns:
        y: (..., N). Differentiable: with gradients enabled PyTorch's own kernels compute it.
    Raises:
        ValueError: shapes that disagree.
    """
    (K, N), n = weight.shape, x.shape[:-1]
    gain, shift = (None, None) if norm is None else norm[:2]
    tensors = {"x": x, "bias": bias, "gain": gain, "shift": shift, "residual": residual}
    wanted = {"x": (*n, K), "bias": (N,), "gain": (K,), "shift": (K,), "residual": (*n, N)}
    given = {name: a for name, a in tensors.items() if a is not None}
    for name, a in given.items():
        if a.shape != wanted[name]:
            found = f"{name} {tuple(a.shape)} does not fit a weight {(K, N)}"
            raise ValueError(f"{found} and x {tuple(x.shape)}: it must be {wanted[name]}")
    alike = all(a.dtype == weight.dtype and a.stride(-1) == 1 for a in (weight, *given.values()))
    if alike and norm is None and residual is None and takes_some(x):
        from kernels import some_rows

        return some_rows.linear(x.reshape(-1, K), weight, bias, gelu).view(*n, N)
    if not (alike and takes_few(x)) or (norm is not None and K > MOST_NORMED):
        return fused_linear_plain(x, weight, bias, norm, gelu, residual)
    from kernels.few_rows import linear

    rest = None if residual is None else residual.reshape(-1, N)
    return linear(x.reshape(-1, K), weight, bias, norm, gelu, rest).view(*n, N)


def linear_parts(x: Tensor, weight: Tensor) -> Tensor:
    """The product x weight as partial sums, for `add_norm` to add.

    Args:
        x: (..., K). weight: (K, N), as GPT-2 stores it. The kernel runs where `takes_some` holds
            for fewer inputs; K may be of any size.
    Returns:
        y: (S, ..., N) in fp32; S depends on K and is 1 without the kernel. x weight is the sum over
        S.
    Raises:
        ValueError: shapes that disagree.
    """
    if x.shape[-1] != weight.shape[0]:
        found = f"x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"x (..., K) and weight (K, N) do not fit: {found}")
    alike = all(a.dtype == x.dtype and a.stride(-1) == 1 for a in (x, weight))
    if not (alike and takes_some(x[..., :1])):
        return (x.float() @ weight.float())[None]
    from kernels.some_rows import partial_sums

    return partial_sums(x.reshape(-1, x.shape[-1]), weight).view(-1, *x.shape[:-1], weight.shape[1])


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on the CPU, for tests of the kernels
MOST_NEW = 16  # largest T that the kernel can append, its tile of queries
FEW_ROWS = 4  # most positions for which `fused_linear` runs the kernel of `few_rows.py`
SOME_ROWS = 32  # most positions for which it runs that of `some_rows.py`
MOST_INPUTS = 2048  # most inputs of one of its programs, so the largest K but in `linear_parts`
MOST_NORMED = 4096  # largest K of a norm in `few_rows.py`
HEAD_DIMS = (16, 32, 64, 80, 128)  # D for which there are kernels
HAVE_TRITON = importlib.util.find_spec("triton") is not None


def on_triton(q: Tensor) -> bool:
    """Whether the attention kernels are used for these queries; otherwise reference.py is.

    They are not used for bf16 in the interpreter, whose bf16 products are wrong.
    """
    wrong = INTERPRETED and q.dtype == torch.bfloat16
    return takes(q) and q.shape[-1] in HEAD_DIMS and not wrong


def fuses(x: Tensor) -> bool:
    """Whether the kernels other than attention are used for x; MINPREFIX_FUSED=0 turns them off.

    They are not used under torch.compile, which fuses these operations itself.
    """
    off = os.environ.get("MINPREFIX_FUSED") == "0" or torch.compiler.is_compiling()
    return not off and takes(x)


def takes_few(x: Tensor) -> bool:
    """Whether `fused_linear` runs the kernel of `few_rows.py` for x (..., K)."""
    return 0 < x.numel() <= FEW_ROWS * x.shape[-1] and decodes(x)


def takes_some(x: Tensor) -> bool:
    """Whether `fused_linear` runs the kernel of `some_rows.py` for x (..., K), which needs 16 bits
    and Hopper's shared memory."""
    n, K = x.shape[:-1].numel(), x.shape[-1]
    wrong = x.element_size() != 2 or (INTERPRETED and x.dtype == torch.bfloat16)
    if not (FEW_ROWS < n <= SOME_ROWS and 0 < K <= MOST_INPUTS) or wrong or not decodes(x):
        return False
    from kernels.launch import target_of
    from kernels.some_rows import TARGETS

    return target_of(x.device) in TARGETS


def decodes(x: Tensor) -> bool:
    """Whether the kernels without a backward pass may run: no gradients, and no autocast, which
    would compute products in another dtype."""
    plain = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type)
    return not plain and fuses(x)


def takes(x: Tensor) -> bool:
    """Whether Triton runs on x's device and supports its dtype."""
    device = INTERPRETED or (x.is_cuda and not why_not(x.device.index or 0))
    return device and HAVE_TRITON and x.dtype in (torch.float16, torch.bfloat16, torch.float32)


def why_not(index: int) -> str:
    """Why no kernel can run on a GPU; "" if they run.

    GPUs before Ampere lack the matrix instructions that Triton uses. If the assembler miscompiles
    the kernels, one warning is given; AMD GPUs need no assembler.
    """
    if index not in _why_not:
        _why_not[index] = _look(index)
    return _why_not[index]


# torch.compile calls it instead of tracing it
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]
_why_not: dict[int, str] = {}


def _look(index: int) -> str:
    if not HAVE_TRITON:
        return "Triton is not installed"
    if torch.version.hip is not None:
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"the GPU is sm_{major}{minor}, the kernels need sm_80 or later"
    from kernels.assembler import refusal

    if reason := refusal(10 * major + minor):
        message = f"{reason}. Until then attention runs in plain PyTorch, which is slower."
        warnings.warn(message, RuntimeWarning, stacklevel=5)
    return reason
