"""The attention operator's checks: each wrong argument gives an error that names what disagrees."""

import pytest
import torch
from test_reference import make_case

from kernels import prefix_attention

X = torch.zeros
ERRORS = [  # what is wrong, and the two things that the message names
    ({"q": X(3, 2, 8)}, r"\(3, 2, 8\) and \(3, 2, 7, 8\)"),
    ({"v": X(3, 2, 6, 8)}, r"k \(3, 2, 7, 8\) and v \(3, 2, 6, 8\)"),
    ({"k": X(3, 1, 7, 8), "v": X(3, 1, 7, 8)}, r"k \(3, 1, 7, 8\) .* q \(3, 2, 7, 8\)"),
    ({"prefix_v": X(2, 4, 8)}, r"prefix_k \(2, 5, 8\) and prefix_v \(2, 4, 8\)"),
    ({"prefix_k": X(5, 8), "prefix_v": X(5, 8)}, r"prefix_k \(5, 8\) and prefix_v \(5, 8\)"),
    ({"prefix_k": X(2, 5, 4), "prefix_v": X(2, 5, 4)}, r"prefix_k \(2, 5, 4\) .* q \(3, 2, 7, 8\)"),
    ({"v": X(3, 2, 7, 8).half()}, "float32, torch.float32, torch.float16"),
    ({n: X(3, 2, 7, 8).int() for n in "qkv"}, "int32"),
    ({"prefix_k": X(2, 5, 8).double()}, "float64 and torch.float32; both must be"),
    ({n: X(2, 5, 8).half() for n in ("prefix_k", "prefix_v")}, "float16; both must be"),
    ({"prefix_index": X(3).long()}, r"prefix_index needs a bank .* \(2, 5, 8\)"),
    ({"N": 4}, "bank of 4 prefixes needs a prefix_index for 3 rows"),
    ({"N": 4, "prefix_index": X(2).long()}, r"prefix_index .* \(3,\), got torch.int64 \(2,\)"),
    ({"N": 4, "prefix_index": X(3)}, "prefix_index must be an integer tensor .* torch.float32"),
    ({"N": 4, "prefix_index": torch.tensor([0, -2, 3])}, r"\[-1, 3\], got \[0, -2, 3\]"),
    ({"N": 4, "prefix_index": torch.tensor([0, 4, 3])}, r"\[-1, 3\], got \[0, 4, 3\]"),
    ({"N": 3, "prefix_lens": X(2).long()}, r"prefix_lens .* \(3,\), got torch.int64 \(2,\)"),
    ({"prefix_lens": torch.tensor([6])}, r"prefix_lens must lie in \[0, 5\], got \[6\]"),
    ({"kv_lens": X(3).bool()}, r"kv_lens must be an integer tensor \(3,\), got torch.bool"),
    ({"kv_lens": torch.tensor([7, 8, 0])}, r"kv_lens must lie in \[0, 7\], got \[7, 8, 0\]"),
    ({"kv_lens": torch.tensor([7, -1, 0])}, r"kv_lens must lie in \[0, 7\], got \[7, -1, 0\]"),
    ({"prefix_k": X(2, 5, 8, device="meta")}, "prefix_k is on meta, q on cpu"),
    ({"kv_lens": X(3, device="meta").long()}, "an index tensor is on meta, q on cpu"),
    ({"q_offset": torch.tensor(0)}, r"q_offset must be an integer tensor \(3,\), got .* \(\)"),
]


@pytest.mark.parametrize("changes, message", ERRORS)
def test_errors_name_both(changes, message):
    changes = dict(changes)
    case = make_case(N=changes.pop("N", None)).to(torch.float32)
    arguments = dict(zip(("q", "k", "v", "prefix_k", "prefix_v"), case.tensors, strict=True))
    prefix_attention(*case.tensors, prefix_index=None if case.tensors[3].dim() == 3 else X(3).int())
    with pytest.raises(ValueError, match=message):
        prefix_attention(**(arguments | changes))


def test_lse_is_fp32_under_autocast():
    """Autocast would round the scores to bf16: lse then misses by 1e-2."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 16, generator=generator) for _ in range(3))
    prefix = torch.randn(3, 4, 16, generator=generator)
    exact = prefix_attention(
        *(x.double() for x in (q, k, v)), prefix.double(), prefix.double(), return_lse=True
    )[1]
    with torch.autocast("cpu", torch.bfloat16):
        lse = prefix_attention(q, k, v, prefix, prefix, return_lse=True)[1]
    assert lse.dtype == torch.float32
    assert (lse - exact).abs().max() < 1e-5  # fp32 rounding of scores below 10; measured 3.3e-7
