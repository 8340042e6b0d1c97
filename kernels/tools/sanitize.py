"""One small call of each kernel, at odd shapes, to be run under compute-sanitizer.

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck python -m kernels.tools.sanitize

The calls are forward and backward passes with incomplete tiles in T, S, P and D, with each option,
and decoding; then the kernels other than attention. Results are not compared with the definition,
which the tests do, but each call is made twice and must repeat bit for bit. Without PyTorch's
memory cache each tensor is a separate allocation, so that reading past its end is detected. On a
CPU the same calls use the CPU path.
"""

from typing import Any

import torch
from torch import Tensor

from kernels import (
    MOST_NEW,
    add_norm,
    cross_entropy_,
    fused_linear,
    linear_parts,
    prefix_attention,
    takes_some,
)

H = 3
CASES = [  # B, T, S, P, D, dtype, options
    (2, 50, 50, 0, 64, torch.bfloat16, ""),
    (2, 61, 61, 5, 64, torch.bfloat16, "index lens kv_lens"),
    (3, 127, 127, 33, 64, torch.float16, "index lens"),
    (2, 130, 130, 70, 64, torch.bfloat16, "kv_lens"),
    (2, 261, 301, 10, 64, torch.bfloat16, "index q_offset"),
    (2, 67, 67, 10, 80, torch.bfloat16, "lens fp32_prefix"),
    (2, 35, 35, 37, 128, torch.float16, "index fp32_prefix"),
    (2, 19, 19, 3, 16, torch.float32, "index lens kv_lens q_offset"),
    (2, 70, 41, 40, 32, torch.float32, "full"),
    (3, 1, 203, 10, 64, torch.bfloat16, "kv_lens q_offset"),
    (3, 5, 1030, 33, 80, torch.float16, "index lens kv_lens q_offset"),
    (70, 1, 65, 70, 64, torch.bfloat16, "lens"),
    (150, 1, 33, 700, 64, torch.bfloat16, "lens"),  # enough rows for a stacked prefix
]


def call(B: int, T: int, S: int, P: int, D: int, dtype: torch.dtype, options: str, device: str):
    """o, lse and all gradients of one case: the same each time."""
    random = torch.Generator().manual_seed(T)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=random).to(device, dtype).requires_grad_()

    def integers(low: int, high: int, n: int) -> Tensor:
        return torch.randint(low, high + 1, (n,), generator=random).to(device)

    q, k, v = normal(B, H, T, D), normal(B, H, S, D), normal(B, H, S, D)
    N = 4 if "index" in options else 0
    bank = (N, H, P, D) if N else (H, P, D)
    prefix_dtype = torch.float32 if "fp32_prefix" in options else dtype
    prefix_k, prefix_v = normal(*bank, dtype=prefix_dtype), normal(*bank, dtype=prefix_dtype)
    o, lse = prefix_attention(
        q, k, v, prefix_k, prefix_v, causal="full" not in options, return_lse=True,
        prefix_index=integers(-1, N - 1, B) if N else None,
        prefix_lens=integers(0, P, max(1, N)) if "lens" in options.split() else None,
        kv_lens=integers(1, S, B) if "kv_lens" in options else None,
        q_offset=integers(-3, S, B) if "q_offset" in options else None,
    )  # fmt: skip
    inputs, do = (q, k, v, prefix_k, prefix_v), torch.ones_like(o)
    seen = lse.masked_fill(lse.isinf(), 0.0)  # -inf if a query sees nothing
    grads = torch.autograd.grad((o, seen), inputs, (do, torch.ones_like(lse)), allow_unused=True)
    with torch.no_grad():  # as in decoding
        again = prefix_attention(q, k, v, prefix_k, prefix_v, causal="full" not in options,
                                 prefix_index=integers(-1, N - 1, B) if N else None)  # fmt: skip
        results = [o, seen, again, *(x for x in grads if x is not None)]
        if min(S, MOST_NEW) >= T:  # a step that also writes the cache, with and without beams
            cache, at = (k.clone(), v.clone()), integers(0, S - T, B)
            mask = torch.ones(B, T, S, dtype=torch.bool, device=device)
            rules: list[dict[str, Any]] = [{}, {"causal": False, "seen": mask}]
            for rule in rules:
                results.append(prefix_attention(
                    q, *cache, prefix_k, prefix_v, q_offset=at, append=(q, q), **rule,
                    prefix_index=integers(-1, N - 1, B) if N else None,
                ))  # fmt: skip
            results += cache
    return results


OTHERS = [  # n, C, V, columns, dtype: a padded vocabulary, odd widths, one position
    (4, 96, 5003, 5056, torch.bfloat16),
    (3, 101, 77, 77, torch.float32),
    (1, 96, 5003, 5056, torch.bfloat16),
    (9, 1100, 77, 77, torch.float16),
    (21, 96, 2050, 2056, torch.bfloat16),
]


def call_other(n: int, C: int, V: int, columns: int, dtype: torch.dtype, device: str):
    """Losses, their gradient, sums and norms of one case with their gradients, and products."""
    random = torch.Generator().manual_seed(n)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random).to(device, dtype)

    logits, bias = normal(n, columns), normal(columns)
    labels = torch.randint(V, (n,), generator=random).to(device)
    losses = cross_entropy_(logits, labels, bias, V)
    x, y = normal(n, C).requires_grad_(), normal(n, C).requires_grad_()
    s, norm = add_norm(x, y, normal(C), normal(C), 1e-5)
    s, again = add_norm(s, None, normal(C), normal(C), 1e-5)
    grads = torch.autograd.grad((s, norm, again), (x, y), [normal(n, C) for _ in range(3)])
    with torch.no_grad():  # products of few and of some rows, with all that they take along
        given: dict[str, Any] = {"norm": (normal(C), normal(C), 1e-5), "residual": normal(n, V)}
        y = fused_linear(x, normal(C, V), normal(V), gelu=True, **given)
        bare = fused_linear(y, normal(V, C), normal(C))
        results = [losses, logits, s, norm, again, y, bare, *grads]
        if takes_some(x):
            y = fused_linear(x, normal(C, V), normal(V), gelu=True)
            parts = linear_parts(y, normal(V, C))
            results += [y, parts, *add_norm(x, parts, normal(C), normal(C), 1e-5, normal(C))]
    return results


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    calls: list[Any] = [(call, case) for case in CASES] + [(call_other, case) for case in OTHERS]
    for run, case in calls:
        first, second = run(*case, device), run(*case, device)
        for x, y in zip(first, second, strict=True):
            assert torch.isfinite(x).all(), f"{case}: not finite"
            assert torch.equal(x, y), f"{case}: does not repeat"
        print(*case, "ok", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
