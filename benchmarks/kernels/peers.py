"""The methods that are timed together with prefix attention, and the check before the timing.

bf16, D = 64, causal. Methods (`METHODS`):

  - ours: `prefix_attention` on views of one qkv; ours_qkv: `prefix_attention_qkv`.
  - peers (`PEERS`) that first concatenate the prefix, expanded over the batch, with k and v. flash:
    SDPA's flash kernel, bottom-right causal; fa3, fa4: the same with FlashAttention-3 or -4, if
    torch supports it and the package is installed; cudnn: SDPA's cuDNN kernel, with P additional
    queries in front, so that ordinary causality applies; efficient: SDPA's memory-efficient kernel
    with a mask; flex: FlexAttention, compiled; eager: the definition.
  - a peer that does not concatenate. flex_merged: FlexAttention over the sequence (causal) and over
    the prefix, whose keys and values have a batch of 1, merged by their log-sum-exp [1] in the same
    compiled function.
  - bare, attention without a prefix: bare_flash and bare_cudnn on views of one qkv, whose gradient
    autograd stacks (a copy); with _leaves, the same on three separate leaves, whose gradients are
    not copied.

[1] o = o_S + sigmoid(lse_P - lse_S) (o_P - o_S): He et al. 2022, https://arxiv.org/abs/2110.04366;
    also used for shared prefixes elsewhere (cascade inference, attention-gym).
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from kernels import prefix_attention, prefix_attention_eager, prefix_attention_qkv

D = 64
PEER_SLACK = 4  # factor on a peer's error budget: only wrong results are rejected, not rough ones


class Shape(NamedTuple):
    """N = 0: one prefix (H, P, D) for all rows; else a bank of N, and an index drawn at random."""

    B: int
    T: int
    H: int
    P: int
    N: int = 0


class Sample(NamedTuple):
    """Inputs of one call, and the gradient that comes back."""

    qkv: Tensor  # (B, T, 3, H, D), a leaf
    leaves: tuple[Tensor, Tensor, Tensor]  # views of it (B, H, T, D), as three leaves
    prefix_k: Tensor  # (H, P, D) or (N, H, P, D), a leaf
    prefix_v: Tensor
    index: Tensor | None  # (B,)
    do: Tensor  # (B, H, T, D) in the memory order (B, T, H, D)


def make_sample(shape: Shape, device: str, seed: int, dtype=torch.bfloat16) -> Sample:
    B, T, H, P, N = shape
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device).to(dtype)

    qkv, bank = normal(B, T, 3, H, D), ((N,) if N else ()) + (H, P, D)
    index = torch.randint(N, (B,), generator=random, device=device) if N else None
    return with_leaves(Sample(qkv, (), normal(*bank), normal(*bank), index, normal(B, T, H, D)))


def with_leaves(sample: Sample, dtype: torch.dtype | None = None) -> Sample:
    """The same values as leaves of autograd, in `dtype` if given."""
    qkv, prefix_k, prefix_v, do = (
        x.detach().to(dtype or x.dtype)
        for x in (sample.qkv, sample.prefix_k, sample.prefix_v, sample.do)
    )
    leaves = tuple(x.detach().requires_grad_() for x in heads(qkv))
    do = do if sample.leaves else do.transpose(1, 2)
    for x in (qkv, prefix_k, prefix_v):
        x.requires_grad_()
    return Sample(qkv, leaves, prefix_k, prefix_v, sample.index, do)


def heads(qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k, v as views (B, H, T, D)."""
    return tuple(x.transpose(1, 2) for x in qkv.unbind(2))


def backend(wanted: SDPBackend, x: Tensor):
    """Make SDPA use the wanted kernel on CUDA; elsewhere its plain one."""
    return sdpa_kernel(wanted if x.is_cuda else SDPBackend.MATH)


def concatenated(s: Sample) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, T, D) and k, v (B, H, P + T, D) for the peers."""
    q, k, v = heads(s.qkv)
    if s.prefix_k.shape[-2] == 0:  # there is nothing to concatenate
        return q, k, v
    rows = (x if s.index is None else x[s.index] for x in (s.prefix_k, s.prefix_v))
    prefix_k, prefix_v = (x.expand(len(q), -1, -1, -1) for x in rows)
    return q, torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2)


@lru_cache(maxsize=1)
def additive_mask(T: int, P: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(1, 1, T, P + T): 0 or -inf; rows are padded to 8 elements, so that SDPA copies nothing."""
    width = math.ceil((P + T) / 8) * 8
    full = torch.full((T, width), float("-inf"), device=device, dtype=dtype)
    return full.triu(P + 1)[None, None, :, : P + T]


@lru_cache(maxsize=4)
def block_mask(T: int, P: int, device: torch.device):
    """The mask over [prefix; sequence]: query i sees the columns up to P + i."""
    return create_block_mask(
        lambda b, h, i, j: j <= i + P, None, None, T, P + T, device=str(device)
    )


@lru_cache(maxsize=4)
def whole_mask(B: int, T: int, P: int, device: torch.device):
    """The mask over the prefix, which every query sees. It needs the queries' batch size, although
    the keys have a batch of 1."""
    return create_block_mask(lambda b, h, i, j: j >= 0, B, None, T, P, device=str(device))


def merged(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, causal, whole):
    """o (B, H, T, D) of two passes, over the sequence and over the prefix (1 or B, H, P, D)."""
    o, of_o = flex_attention(q, k, v, block_mask=causal, return_aux=AuxRequest(lse=True))
    o_p, of_p = flex_attention(
        q, prefix_k, prefix_v, block_mask=whole, return_aux=AuxRequest(lse=True)
    )
    share = torch.sigmoid(of_p.lse - of_o.lse)[..., None]  # (B, H, T, 1), fp32
    return (o + share * (o_p - o)).to(q.dtype)


@lru_cache(maxsize=1)
def compiled(function: Callable, sizes: tuple, device: torch.device) -> Callable:
    """A function compiled separately for each shape; otherwise Dynamo gives up after a few."""
    if device.type != "cuda":
        return function
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def ours(s: Sample) -> Tensor:
    return prefix_attention(*heads(s.qkv), s.prefix_k, s.prefix_v, prefix_index=s.index)


def ours_qkv(s: Sample) -> Tensor:
    return prefix_attention_qkv(s.qkv, s.prefix_k, s.prefix_v, prefix_index=s.index)


def flash(s: Sample) -> Tensor:
    q, k, v = concatenated(s)
    with backend(SDPBackend.FLASH_ATTENTION, q):
        mask = causal_lower_right(q.shape[2], k.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def cudnn(s: Sample) -> Tensor:
    q, k, v = concatenated(s)
    P = k.shape[2] - q.shape[2]
    with backend(SDPBackend.CUDNN_ATTENTION, q):
        padded = F.pad(q, (0, 0, P, 0)) if P else q
        return F.scaled_dot_product_attention(padded, k, v, is_causal=True)[:, :, P:]


def efficient(s: Sample) -> Tensor:
    q, k, v = concatenated(s)
    mask = additive_mask(q.shape[2], k.shape[2] - q.shape[2], q.device, q.dtype)
    with backend(SDPBackend.EFFICIENT_ATTENTION, q):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex(s: Sample) -> Tensor:
    q, k, v = concatenated(s)
    T, P = q.shape[2], k.shape[2] - q.shape[2]
    attend = compiled(flex_attention, (*k.shape, T), q.device)
    return attend(q, k, v, block_mask=block_mask(T, P, q.device))


def flex_merged(s: Sample) -> Tensor:
    (q, k, v), P = heads(s.qkv), s.prefix_k.shape[-2]
    if P == 0:
        return flex(s)
    pair = (x[None] if s.index is None else x[s.index] for x in (s.prefix_k, s.prefix_v))
    masks = block_mask(q.shape[2], 0, q.device), whole_mask(len(q), q.shape[2], P, q.device)
    return compiled(merged, (*q.shape, P), q.device)(q, k, v, *pair, *masks)


def eager(s: Sample) -> Tensor:
    q, k, v = heads(s.qkv)
    return prefix_attention_eager(q, k, v, s.prefix_k, s.prefix_v, prefix_index=s.index)


def bare(wanted: SDPBackend, separate: bool) -> Callable[[Sample], Tensor]:
    """Attention with no prefix, on views of qkv or on three leaves."""

    def attend(s: Sample) -> Tensor:
        q, k, v = s.leaves if separate else heads(s.qkv)
        with backend(wanted, q):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


METHODS: dict[str, Callable[[Sample], Tensor]] = {
    "ours": ours,
    "ours_qkv": ours_qkv,
    "flash": flash,
    "fa3": flash,
    "fa4": flash,
    "cudnn": cudnn,
    "efficient": efficient,
    "flex": flex,
    "flex_merged": flex_merged,
    "eager": eager,
    "bare_flash": bare(SDPBackend.FLASH_ATTENTION, False),
    "bare_cudnn": bare(SDPBackend.CUDNN_ATTENTION, False),
    "bare_flash_leaves": bare(SDPBackend.FLASH_ATTENTION, True),
    "bare_fa3_leaves": bare(SDPBackend.FLASH_ATTENTION, True),
    "bare_fa4_leaves": bare(SDPBackend.FLASH_ATTENTION, True),
    "bare_cudnn_leaves": bare(SDPBackend.CUDNN_ATTENTION, True),
}
PEERS = ("flash", "fa3", "fa4", "cudnn", "efficient", "flex", "flex_merged", "eager")
COMPILED = ("flex", "flex_merged")  # half a minute each, for each shape
BARE = ("bare_flash", "bare_cudnn")
BARE_LEAVES = ("bare_flash_leaves", "bare_fa3_leaves", "bare_fa4_leaves", "bare_cudnn_leaves")
NEWER = {"fa3": "FA3", "fa4": "FA4", "bare_fa3_leaves": "FA3", "bare_fa4_leaves": "FA4"}


@contextmanager
def implementation(name: str):
    """Within the block, SDPA's flash kernel is the one for the method of this name.

    Raises:
        torch's own error if torch does not support it or its package is missing.
    """
    if name not in NEWER:
        yield
        return
    from torch.nn import attention  # its functions differ between versions: both, or nothing

    activate = attention.activate_flash_attention_impl
    restore = attention.restore_flash_attention_impl
    activate(NEWER[name])
    try:
        yield
    finally:
        restore()


@lru_cache(maxsize=1)
def missing() -> dict[str, str]:
    """Methods that cannot run here, with the reason."""
    reasons = {}
    for name in NEWER:
        try:
            with implementation(name):
                pass
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {error}"
    return reasons


def run(attend: Callable[[Sample], Tensor], s: Sample, backward: bool) -> list[Tensor]:
    """o, and with `backward` the gradients of what the method reads."""
    if not backward:
        with torch.no_grad():
            return [attend(s)]
    o = attend(s)
    inputs = [s.qkv, *s.leaves, s.prefix_k, s.prefix_v]
    return [
        o,
        *(x for x in torch.autograd.grad(o, inputs, s.do, allow_unused=True) if x is not None),
    ]


def results(name: str, attend: Callable[[Sample], Tensor], s: Sample) -> dict[str, Tensor]:
    """o and the gradients by name; three leaves' gradients are stacked as that of qkv."""
    found = run(attend, s, True)
    if name.endswith("_leaves"):
        found = [found[0], torch.stack([x.transpose(1, 2) for x in found[1:]], dim=2)]
    names = ("o", "dqkv", "dprefix_k", "dprefix_v")[: len(found)]
    return {key: x for key, x in zip(names, found, strict=True) if x.numel()}


def reason(error: Exception) -> str:
    """An error in one short line, for the column `note`."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


class Truth:
    """The expected results of one sample: in fp64, and by the same formula in its dtype."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        none = sample._replace(
            prefix_k=sample.prefix_k[..., :0, :].detach().requires_grad_(),
            prefix_v=sample.prefix_v[..., :0, :].detach().requires_grad_(),
        )
        self.low, self.exact = {}, {}
        for prefixed, s in ((True, sample), (False, none)):
            self.low[prefixed] = results("eager", eager, s)
            self.exact[prefixed] = results("eager", eager, with_leaves(s, torch.float64))

    def problem(self, name: str, attend: Callable[[Sample], Tensor]) -> str:
        """The fault of a method, or "".

        |actual - exact| <= 2 |low - exact| + 4 eps max|exact| allows for another order of summation
        and the rounding of a recomputation. Eager rounds more, since its scores are in bf16. The
        budget of peers is PEER_SLACK times as large.
        """
        prefixed = not name.startswith("bare")
        try:
            with implementation(name):
                actual = results(name, attend, self.sample)
        except Exception as error:  # a peer's failure is part of the result
            return reason(error)
        low, exact = self.low[prefixed], self.exact[prefixed]
        if set(actual) != set(exact):
            return f"wrong: gives {', '.join(actual)}, not {', '.join(exact)}"
        for key, x in actual.items():
            error, low_error = ((y.double() - exact[key]).abs().max().item() for y in (x, low[key]))
            top = exact[key].abs().max().item()
            budget = 2 * low_error + 4 * torch.finfo(x.dtype).eps * top
            budget *= PEER_SLACK if name in PEERS else 1
            if not error <= budget:  # also NaN
                return f"wrong: error of {key} {error:.1e}, budget {budget:.1e}"
        return ""
