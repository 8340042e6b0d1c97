"""How the kernels are launched on a device: tile sizes, launches, and optional tuning.

`TILES` is the table of tiles for each target, kernel, size of an element and width of a head. The
first tile is the default; with MINPREFIX_AUTOTUNE=1 all are tried. All of them fit into the
target's shared memory (`SHARED_MEMORY`); `kernels.tools.compile_offline` shows how much each one
uses. `recorded` collects launches instead of executing them, so that the tests can compile exactly
the kernels that would be launched on a GPU that this machine does not have.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from kernels.assembler import driver_version
from kernels.inputs import Inputs

KIB = 1024
SHARED_MEMORY = {  # bytes that one program may use
    "sm_80": 99 * KIB,  # the A100 has 163; the other NVIDIA GPUs with these tiles (RTX) have 99
    "sm_90": 227 * KIB,  # H100, H200
    "sm_100": 227 * KIB,  # B200
    "gfx942": 64 * KIB,  # MI300; its tiles are used for every other AMD GPU
}


class Tile(NamedTuple):
    """How a kernel divides its work."""

    block_m: int  # queries in a tile
    block_n: int  # keys in a tile
    num_warps: int
    num_stages: int  # depth of the software pipeline over tiles


class Launch(NamedTuple):
    """One recorded launch."""

    kernel: Any
    programs: int
    tile: Tile
    arguments: dict[str, Any]
    default: bool  # whether it is made without tuning


# (kernel, bytes of an element, BLOCK_D; 32 also stands for 16): tiles as (block_m, block_n,
# num_warps, num_stages). The defaults spill at most a dozen registers, except for IEEE products in
# fp32 with D >= 80. With an empty list the kernel is not used.
_FP32 = {
    ("fwd", 4, 32): [(32, 32, 4, 1)],
    ("fwd", 4, 64): [(32, 32, 8, 1)],
    ("fwd", 4, 128): [(32, 32, 8, 1)],
    **{("bwd_short", 4, d): [] for d in (32, 64, 128)},
    **{("bwd_dq", 4, d): [(32, 32, 8, 1)] for d in (32, 64, 128)},
    **{("bwd_dkdv", 4, d): [(32, 32, 8, 1)] for d in (32, 64, 128)},
    **{("bwd_dprefix", 4, d): [(32, 32, 8, 1)] for d in (32, 64, 128)},
}
_REDUCE = {  # block_m: parts in a step of the loop, block_n: elements of the prefix's gradient
    **{("reduce", n, d): [(64, 32, 2, 1), (128, 32, 4, 1)] for n in (2, 4) for d in (32, 64, 128)},
    **{("reduce_bank", n, d): [(32, 256, 4, 1), (8, 512, 4, 1)]
       for n in (2, 4) for d in (32, 64, 128)},
}  # fmt: skip
_COMMON = _FP32 | _REDUCE
_DECODE = {  # block_m: stacked queries of a shared prefix; a row's own queries are a tile of 16
    ("decode", 2, 32): [(32, 64, 4, 3), (32, 128, 4, 2)],
    ("decode", 2, 64): [(32, 64, 4, 3), (32, 32, 4, 4), (32, 128, 4, 2)],
    ("decode", 2, 128): [(32, 64, 4, 3), (32, 32, 4, 3)],
    ("decode", 4, 32): [(16, 32, 4, 3), (16, 64, 4, 2)],
    ("decode", 4, 64): [(16, 32, 4, 3), (16, 32, 4, 2)],
    ("decode", 4, 128): [(16, 32, 8, 2), (16, 16, 8, 3)],
}
# D = 64: measured on one H200, 2026-11-26, torch 2.11.0, triton 3.6.0, ptxas 13.0.88
# (benchmarks/gpu). Slower tiles are kept because other lengths or prefixes may prefer them.
_SM_90 = (
    _COMMON
    | _DECODE
    | {
        ("fwd", 2, 32): [(64, 64, 4, 3), (128, 64, 8, 3)],
        ("fwd", 2, 64): [(64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 4, 2)],
        ("fwd", 2, 128): [(128, 64, 8, 2), (128, 64, 8, 1)],
        ("fwd_short", 2, 64): [(64, 64, 4, 2), (64, 32, 4, 4), (64, 64, 4, 3)],
        ("bwd_short", 2, 32): [(64, 64, 4, 1), (64, 64, 8, 1)],
        ("bwd_short", 2, 64): [(64, 64, 4, 1), (64, 64, 8, 1), (128, 64, 8, 1), (128, 128, 8, 1)],
        ("bwd_short", 2, 128): [(64, 64, 8, 1)],
        ("bwd_dq", 2, 32): [(64, 64, 4, 3), (64, 64, 4, 2)],
        ("bwd_dq", 2, 64): [(64, 64, 4, 3), (64, 32, 4, 3), (64, 64, 4, 2)],
        ("bwd_dq_short", 2, 64): [(64, 32, 4, 3), (64, 64, 4, 3)],
        ("bwd_dq", 2, 128): [(64, 64, 8, 2), (64, 64, 8, 1)],
        ("bwd_dkdv", 2, 32): [(64, 64, 4, 2), (64, 64, 8, 2)],
        ("bwd_dkdv", 2, 64): [(64, 64, 4, 3), (64, 64, 4, 2)],
        ("bwd_dkdv", 2, 128): [(64, 64, 8, 2), (64, 64, 8, 1)],
        ("bwd_dprefix", 2, 32): [(64, 64, 4, 2), (64, 64, 8, 2)],
        ("bwd_dprefix", 2, 64): [(64, 64, 4, 2), (64, 32, 4, 3)],
        ("bwd_dprefix", 2, 128): [(64, 64, 8, 2), (64, 64, 8, 1)],
        ("decode_short", 2, 64): [(32, 32, 4, 4), (32, 64, 4, 3), (32, 128, 4, 2)],
    }
)
_SM_100 = _SM_90 | {  # a 128-wide tile would need more tensor memory than there is
    ("bwd_short", 2, 64): [(64, 64, 4, 1), (64, 64, 8, 1)],
}
_SM_80 = (
    _COMMON
    | _DECODE
    | {
        ("fwd", 2, 32): [(64, 64, 4, 2)],
        ("fwd", 2, 64): [(64, 32, 4, 2), (64, 64, 4, 2)],
        ("fwd", 2, 128): [(64, 64, 8, 2)],
        ("bwd_short", 2, 32): [(64, 64, 8, 1)],
        ("bwd_short", 2, 64): [],
        ("bwd_short", 2, 128): [],
        ("bwd_dq", 2, 32): [(64, 64, 4, 2)],
        ("bwd_dq", 2, 64): [(64, 64, 8, 1), (64, 32, 4, 1)],
        ("bwd_dq", 2, 128): [(16, 64, 8, 1)],
        ("bwd_dkdv", 2, 32): [(64, 64, 4, 2)],
        ("bwd_dkdv", 2, 64): [(64, 64, 8, 2), (64, 32, 4, 2)],
        ("bwd_dkdv", 2, 128): [(64, 32, 8, 1)],
        ("bwd_dprefix", 2, 32): [(64, 64, 4, 2)],
        ("bwd_dprefix", 2, 64): [(64, 32, 4, 2)],
        ("bwd_dprefix", 2, 128): [(32, 32, 8, 1)],
    }
)
_GFX942 = _COMMON | {
    ("fwd", 2, 32): [(64, 64, 4, 1), (128, 64, 4, 1)],
    ("fwd", 2, 64): [(64, 64, 4, 1), (128, 64, 4, 1)],
    ("fwd", 2, 128): [(64, 64, 4, 1)],
    ("bwd_short", 2, 32): [(64, 64, 4, 1)],
    ("bwd_short", 2, 64): [(64, 64, 4, 1)],
    ("bwd_short", 2, 128): [],
    **{("bwd_dq", 2, d): [(64, 64, 4, 1)] for d in (32, 64, 128)},
    **{("bwd_dkdv", 2, d): [(64, 64, 4, 1)] for d in (32, 64, 128)},
    **{("bwd_dprefix", 2, d): [(64, 64, 4, 1)] for d in (32, 64, 128)},
    **{("decode", 2, d): [(32, 64, 4, 2), (32, 32, 4, 2)] for d in (32, 64, 128)},
    **{("decode", 4, d): [(16, 32, 4, 2), (16, 16, 4, 2)] for d in (32, 64, 128)},
}
_INTERPRETER = {
    **{(name, size, d): [(32, 32, 4, 1)] for name, _, d in _FP32 for size in (2, 4)},
    **{("bwd_short", size, d): [(32, 32, 4, 1), (64, 64, 4, 1)]
       for size in (2, 4) for d in (32, 64, 128)},
    **{("decode", size, d): [(16, 16, 4, 1)] for size in (2, 4) for d in (32, 64, 128)},
    **{("reduce", size, d): [(4, 64, 4, 1)] for size in (2, 4) for d in (32, 64, 128)},
    **{("reduce_bank", size, d): [(4, 64, 4, 1)] for size in (2, 4) for d in (32, 64, 128)},
}  # fmt: skip


def _table(rows: dict) -> dict[tuple[str, int, int], list[Tile]]:
    """The rows as Tiles; "fwd_short" defaults to "fwd" (see `by_length`), and so on."""
    short = {
        (f"{name}_short", *key): tiles
        for (name, *key), tiles in rows.items()
        if name in ("fwd", "bwd_dq", "decode")
    }
    return {key: [Tile(*tile) for tile in tiles] for key, tiles in (short | rows).items()}


def by_length(kernel: str, seq_len: int) -> str:
    """The name of "fwd" or "bwd_dq" in the table, because short rows prefer other tiles."""
    return f"{kernel}_short" if seq_len <= 256 else kernel


TILES = {
    "sm_80": _table(_SM_80),
    "sm_90": _table(_SM_90),
    "sm_100": _table(_SM_100),
    "gfx942": _table(_GFX942),
    "interpreter": _table(_INTERPRETER),
}

MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "interpreter": 8}
PROGRAMS_EACH = 2  # programs on each multiprocessor: two pipelines hide each other's latency

_tuned: dict[tuple, Tile] = {}


@dataclass
class Recording:
    """The launches that `recorded` collects for a target; `every`: for all tiles."""

    target: str
    every: bool
    launches: list[Launch] = field(default_factory=list)
    default: bool = True  # whether the present launch is the default

    def all_of(self, tiles: list, run: Callable[[Any], Any]) -> Any:
        """Run with each tile, and with the default last, so that its results remain."""
        outer = self.default
        for tile in reversed(tiles):
            self.default = outer and tile == tiles[0]
            result = run(tile)
        self.default = outer
        return result


_recording: Recording | None = None


def options_of(tile: Tile, arguments: dict[str, Any]) -> dict[str, Any]:
    """Triton's options for a kernel with this tile and these arguments."""
    overlapping = {"launch_pdl": True} if arguments.get("PDL") else {}
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **overlapping}


def launch(kernel, programs: int, tile: Tile, **arguments) -> None:
    """Run `programs` programs of a kernel. It gets the arguments that it names; the others come
    from the tile and, unless PDL is False, from `overlaps`. None stands for a missing pointer."""
    arguments |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    if "PDL" in kernel.arg_names:
        wanted = arguments.get("PDL", True)
        arguments["PDL"] = wanted and overlaps(next(iter(arguments.values())).device)
    arguments = {name: arguments[name] for name in kernel.arg_names}
    if _recording is not None:
        one = Launch(kernel, programs, tile, arguments, _recording.default)
        _recording.launches.append(one)
    elif programs:
        first = next(iter(arguments.values()))  # a tensor, in every kernel
        # Triton launches on the current device, which may differ from that of the tensors
        with torch.cuda.device_of(first):
            kernel[(programs,)](**arguments, **options_of(tile, arguments))


@contextmanager
def recorded(target: str, every: bool = False):
    """Collect the launches in the block, with the tiles of `target`; tensors may be "meta" ones.

    With `every`, each choice of `run_best` is recorded, not only the default.
    """
    global _recording
    _recording = Recording(target, every)
    try:
        yield _recording.launches
    finally:
        _recording = None


def target_of(device: torch.device) -> str:
    """The row of the table for a device: one of SHARED_MEMORY, or "interpreter"."""
    if _recording is not None:
        return _recording.target
    if device.type == "cpu":
        return "interpreter"
    return _gpu_target(device.index or 0)


@cache
def _gpu_target(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(index)
    if major in (9, 10):
        return f"sm_{major}0"
    return "sm_80"


def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start before the previous one has ended, as `few_rows.py` describes.

    Needs Hopper or later, and inside CUDA graphs a driver for CUDA 12.3. MINPREFIX_FUSED=0 turns it
    off.
    """
    if target_of(device) not in ("sm_90", "sm_100"):
        return False
    off = os.environ.get("MINPREFIX_FUSED") == "0"
    return _recording is not None or (driver_version() >= 12030 and not off)


def programs_wanted(x: torch.Tensor) -> int:
    """The number of programs that keeps x's device busy."""
    return PROGRAMS_EACH * MULTIPROCESSORS[target_of(x.device)]


def tiles_of(kernel: str, x: torch.Tensor) -> list[Tile]:
    """The tiles of a kernel for heads like those of x (..., D), the default first."""
    block_d = max(16, bucket(x.shape[-1]))
    return TILES[target_of(x.device)][kernel, x.element_size(), max(32, block_d)]


def run_best(
    kernel: str, x: torch.Tensor, key: tuple, run: Callable[[Any], Any], tiles=None
) -> Any:
    """`run(tile)` with the default tile, or with MINPREFIX_AUTOTUNE=1 the fastest of the table.

    The fastest is measured once per kernel, device, dtype, D and `key` (buckets of T and P), and
    never during the capture of a CUDA graph. `run` allocates its results, launches and returns
    them.
    """
    tiles = tiles_of(kernel, x) if tiles is None else tiles
    if _recording is not None and _recording.every:
        return _recording.all_of(tiles, run)
    tune = os.environ.get("MINPREFIX_AUTOTUNE") == "1" and x.is_cuda and len(tiles) > 1
    if not tune or _recording is not None:
        return run(tiles[0])
    key = (kernel, x.device, x.dtype, x.shape[-1], *key)
    if key not in _tuned:
        with torch.cuda.device_of(x):  # for its stream and events
            if torch.cuda.is_current_stream_capturing():
                return run(tiles[0])
            _tuned[key] = min(tiles, key=lambda tile: triton.testing.do_bench(lambda: run(tile)))
    return run(_tuned[key])


def bucket(n: int) -> int:
    """The smallest power of two >= n, or 0 for 0: the key of T and P in tuning."""
    return 1 << (n - 1).bit_length() if n else 0


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (Triton's own, made for kernels too, takes 4 us.)"""
    return -(-a // b)


def prefix_blocks(prefix_len: int, q: torch.Tensor) -> dict[str, int | bool]:
    """The width of a prefix tile (0: none), and whether there is more than one tile.

    It is at most 64 columns for 16-bit q (32 on an A100) and 16 for fp32; wider tiles would spill
    registers.
    """
    widest = 16 if q.element_size() == 4 else 32 if target_of(q.device) == "sm_80" else 64
    block = min(widest, max(16, bucket(prefix_len))) if prefix_len else 0
    return {"BLOCK_P": block, "MORE_P": prefix_len > block}


def empty_results(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """o (B, H, T, D) in the memory order (B, T, H, D), and lse (B, H, T) in fp32."""
    B, H, T, D = q.shape
    o = q.new_empty_strided((B, H, T, D), (T * H * D, D, H * D, 1))  # not a view, may be modified
    return o, q.new_empty(B, H, T, dtype=torch.float32)


def kernel_arguments(inputs: Inputs) -> dict[str, Any]:
    """The arguments of every kernel: inputs, index tensors or None, strides and sizes.

    Tensors are read through their strides, so views of the qkv projection or of a cache are not
    copied. A copy is made only if the last dimension is not contiguous, or if the strides of
    prefix_k and prefix_v differ.
    """
    q, k, v, prefix_k, prefix_v = (
        x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in inputs[:5]
    )
    prefix_index, prefix_lens, kv_lens, q_offset = inputs[5:9]
    if prefix_k.stride() != prefix_v.stride():
        prefix_k, prefix_v = prefix_k.contiguous(), prefix_v.contiguous()
    shared = prefix_k.dim() == 3 or (prefix_k.shape[0] == 1 and prefix_index is None)
    return {
        "q_ptr": q, "k_ptr": k, "v_ptr": v,
        "prefix_k_ptr": prefix_k, "prefix_v_ptr": prefix_v,
        "prefix_index_ptr": None if prefix_index is None else prefix_index.contiguous(),
        "prefix_lens_ptr": None if prefix_lens is None else prefix_lens.contiguous(),
        "kv_lens_ptr": None if kv_lens is None else kv_lens.contiguous(),
        "q_offset_ptr": None if q_offset is None else q_offset.contiguous(),
        "stride_qb": q.stride(0), "stride_qh": q.stride(1), "stride_qt": q.stride(2),
        "stride_kb": k.stride(0), "stride_kh": k.stride(1), "stride_ks": k.stride(2),
        "stride_vb": v.stride(0), "stride_vh": v.stride(1), "stride_vs": v.stride(2),
        "stride_pn": 0 if shared else prefix_k.stride(0),
        "stride_ph": prefix_k.stride(-3), "stride_pp": prefix_k.stride(-2),
        "stride_lens": 0 if shared or prefix_lens is None or len(prefix_lens) == 1 else 1,
        "n_head": q.shape[1], "seq_len": q.shape[2], "kv_len": k.shape[2],
        "prefix_len": prefix_k.shape[-2], "BANK": not shared,
        "D": q.shape[3], "BLOCK_D": max(16, bucket(q.shape[3])),
    }  # fmt: skip
