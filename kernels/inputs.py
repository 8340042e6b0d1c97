"""The arguments of one call of the operator, and the check that they fit together.

All functions between `kernels.prefix_attention` and a kernel pass them on as one `Inputs`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """The arguments of `kernels.prefix_attention`, in the order of the registered operators."""

    q: Tensor  # (B, H, T, D); or qkv (B, T, 3, H, D), and then k and v are None
    k: Any  # Tensor (B, H, S, D), or None
    v: Any
    prefix_k: Tensor  # (H, P, D) or (N, H, P, D)
    prefix_v: Tensor
    prefix_index: Tensor | None = None  # (B,)
    prefix_lens: Tensor | None = None  # (N,) or (1,)
    kv_lens: Tensor | None = None  # (B,)
    q_offset: Tensor | None = None  # (B,)
    causal: bool = True
    scale: float | None = None  # None: D ** -0.5

    def split(self) -> "Inputs":
        """The same with q, k and v apart: views of qkv if that was given."""
        if self.k is not None:
            return self
        q, k, v = heads(self.q)
        return self._replace(q=q, k=k, v=v)


class Append(NamedTuple):
    """The keys and values of the queries' own tokens, for a step that writes them to the cache."""

    new_k: Tensor  # (B, H, T, D); to column q_offset + i of `Inputs.k`
    new_v: Tensor
    seen: Tensor | None = None  # (B, T, S) bool: the columns each query sees; None = causal


def heads(qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k, v (B, H, T, D) as views of qkv (B, T, 3, H, D)."""
    return qkv.permute(2, 0, 3, 1, 4).unbind()


def check(inputs: Inputs) -> None:
    """ValueError if the arguments of `prefix_attention` do not fit together."""
    q, k, v, prefix_k, prefix_v, prefix_index, prefix_lens, kv_lens, q_offset, _, _ = inputs
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"q and k must be (B, H, T, D), got {shape(q)} and {shape(k)}")
    B, H, _, D = q.shape
    if k.shape != v.shape or (k.shape[0], k.shape[1], k.shape[3]) != (B, H, D):
        raise ValueError(f"k {shape(k)} and v {shape(v)} do not fit q {shape(q)}")
    if prefix_k.shape != prefix_v.shape or prefix_k.dim() not in (3, 4):
        raise ValueError(f"prefix_k {shape(prefix_k)} and prefix_v {shape(prefix_v)} do not fit")
    if (prefix_k.shape[-3], prefix_k.shape[-1]) != (H, D):
        raise ValueError(f"prefix_k {shape(prefix_k)} must end in H, P, D like q {shape(q)}")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}")
    if prefix_k.dtype != prefix_v.dtype or prefix_k.dtype not in (q.dtype, torch.float32):
        raise ValueError(
            f"prefix_k and prefix_v are {prefix_k.dtype} and {prefix_v.dtype}; both must be "
            f"torch.float32 or have the dtype of q, {q.dtype}"
        )
    for name, x in (("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}")
    N = 1 if prefix_k.dim() == 3 else prefix_k.shape[0]
    if prefix_k.dim() == 3 and prefix_index is not None:
        raise ValueError(f"prefix_index needs a bank (N, H, P, D), prefix_k is {shape(prefix_k)}")
    if prefix_k.dim() == 4 and prefix_index is None and N not in (1, B):
        raise ValueError(f"a bank of {N} prefixes needs a prefix_index for {B} rows")
    for x in (prefix_index, prefix_lens, kv_lens, q_offset):
        if x is not None and not isinstance(x, Tensor):
            raise ValueError(f"an index or a length must be a tensor, got a {type(x).__name__}")
        if x is not None and x.device != q.device:
            raise ValueError(f"an index tensor is on {x.device}, q on {q.device}")
    check_int(prefix_index, "prefix_index", (B,), -1, N - 1)
    check_int(prefix_lens, "prefix_lens", (N,), 0, prefix_k.shape[-2], also=(1,))
    check_int(kv_lens, "kv_lens", (B,), 0, k.shape[2])
    check_int(q_offset, "q_offset", (B,), None, None)


def check_append(inputs: Inputs, append: Any, seen: Tensor | None) -> Append | None:
    """The arguments as `Append`, or None without `append`; ValueError if they do not fit the
    others."""
    q, k = inputs.q, inputs.k
    if append is None:
        if seen is not None:
            raise ValueError("seen needs append")
        return None
    (B, _, T, _), S = q.shape, k.shape[2]
    for x in append:
        if (x.shape, x.dtype, x.device) != (q.shape, q.dtype, q.device):
            raise ValueError(
                f"append must be two tensors like q, {shape(q)} {q.dtype} on {q.device}; got "
                f"{shape(x)} {x.dtype} on {x.device}"
            )
    if T > S:
        raise ValueError(f"{T} new columns do not fit into the {S} of k")
    if inputs.kv_lens is not None:
        raise ValueError("append excludes kv_lens: the new columns are the last ones")
    if seen is not None and (seen.dtype, shape(seen)) != (torch.bool, (B, T, S)):
        raise ValueError(f"seen must be bool {(B, T, S)}, got {seen.dtype} {shape(seen)}")
    if seen is not None and inputs.causal:
        raise ValueError("seen says what is visible, so it needs causal=False")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs[:5], *append)):
        raise ValueError("append has no gradient: call it under torch.no_grad()")
    check_int(inputs.q_offset, "q_offset", (B,), 0, S - T)
    return Append(append[0], append[1], seen)


def check_int(x: Tensor | None, name: str, want: tuple, low: Any, high: Any, also=None):
    """ValueError unless x is None or an integer tensor of the wanted shape with low <= x <= high.

    Values are checked only on the CPU, because on a GPU the check would wait for it.
    """
    if x is None:
        return
    if x.is_floating_point() or x.dtype == torch.bool or tuple(x.shape) not in (want, also):
        raise ValueError(f"{name} must be an integer tensor {want}, got {x.dtype} {shape(x)}")
    if (
        low is not None
        and x.device.type == "cpu"
        and x.numel()
        and not torch.compiler.is_compiling()
        and outside(x, low, high)
    ):
        raise ValueError(f"{name} must lie in [{low}, {high}], got {x.tolist()}")


def outside(x: Tensor, low: int, high: int) -> bool:
    smallest, largest = x.aminmax()
    return int(smallest) < low or int(largest) > high


def shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
