"""Chooses the kernels and tiles that compute the gradients of a call, and allocates the results.

`backward` is the entry; `plans_of` chooses between one kernel for a whole row and several kernels.
The choice depends only on sizes, so CUDA graphs can replay a call and results repeat.

A part of dprefix per tile of queries costs 16 P D bytes, written and read. If that is more than
reading q and do of the tile again, 2 e BLOCK_M D bytes, a third kernel computes dprefix (`fuses`).

Bytes, with e per element, M = ceil(T / BLOCK_M) tiles of queries and G parts:

    short            e B H D (3 T + 2 S) read, e B H D (T + 2 S) written
    dq, dkdv         e B H D (3 T + 2 S) + e B H D (2 T + 2 S) read, e B H D (T + 2 S) written;
                     keys, or queries, again for each further tile if L2 does not hold them
    dprefix          2 e B H D T read (all from L2 or memory once per tile of prefix columns)
    parts            8 G H P D written, then read; G = B (short), B M (dq), the number of chunks of
                     rows (dprefix); none for prefixes with one part, which is their gradient
    workspace        4 B H T (delta; not if short) + 8 G H P D: `workspace_bytes`
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.backward import (
    _bwd_dkdv_kernel,
    _bwd_dprefix_kernel,
    _bwd_dq_kernel,
    _bwd_short_kernel,
    _reduce_kernel,
)
from kernels.inputs import Inputs
from kernels.launch import (
    Tile,
    bucket,
    by_length,
    cdiv,
    kernel_arguments,
    launch,
    prefix_blocks,
    programs_wanted,
    run_best,
    tiles_of,
)
from kernels.tiles import LOG2E

UNROLLED = 16  # pairs of tiles that `_bwd_short_kernel` may hold
NO_PARTS = dict.fromkeys(("partial_k_ptr", "partial_v_ptr", "dprefix_k_ptr", "dprefix_v_ptr"))


class Gradients(NamedTuple):
    """Tensors for the gradients; None if one is not needed. dk and dv, and the last two, are either
    both None or both tensors."""

    dq: Tensor | None  # (B, H, T, D), a contiguous last dimension
    dk: Tensor | None  # (B, H, S, D), likewise
    dv: Tensor | None  # like dk, with the same strides
    dprefix_k: Tensor | None  # like prefix_k, contiguous
    dprefix_v: Tensor | None


def backward(
    inputs: Inputs, o: Tensor, lse: Tensor, do: Tensor | None, dlse: Tensor | None, to: Gradients
) -> None:
    """Write the gradients of `kernels.prefix_attention`.

    Args:
        inputs: with separate q, k and v.
        o, lse: the results, (B, H, T, D) and (B, H, T).
        do, dlse: their gradients, dlse in fp32; None means zero.
    """
    q, k, causal, scale = inputs.q, inputs.k, inputs.causal, inputs.scale
    (B, _, T, D), S, P = q.shape, k.shape[2], inputs.prefix_k.shape[-2]
    do = torch.zeros_like(o) if do is None else do
    do, o = (x if x.stride(-1) == 1 else x.contiguous() for x in (do, o))
    scale = D**-0.5 if scale is None else scale
    a = kernel_arguments(inputs)
    a |= {
        "do_ptr": do, "o_ptr": o, "lse_ptr": lse.contiguous(),
        "dlse_ptr": None if dlse is None else dlse.contiguous(),
        "stride_dob": do.stride(0), "stride_doh": do.stride(1), "stride_dot": do.stride(2),
        "stride_ob": o.stride(0), "stride_oh": o.stride(1), "stride_ot": o.stride(2),
        "dq_ptr": to.dq, "dk_ptr": to.dk, "dv_ptr": to.dv,
        **strides("dq", to.dq), **strides("dk", to.dk),
        "batch_size": B, "scale": scale, "scale2": scale * LOG2E.value,
        "CAUSAL": causal, **prefix_blocks(P, q),
    }  # fmt: skip
    a |= NO_PARTS
    if P > 0 and to.dprefix_k is not None:
        a |= {"dprefix_k_ptr": to.dprefix_k, "dprefix_v_ptr": to.dprefix_v}
    aligned = causal and inputs.q_offset is None and T == S  # query i is at column i
    whole = (to.dq is None) == (to.dk is None)  # the short kernel computes all three or none
    plans = plans_of(q, k, P, aligned) if whole else [None]

    def run(tile: Tile | None) -> None:
        if tile is None:
            run_split(a)
        else:
            run_short(a, tile, aligned)

    run_best("bwd_short", q, (bucket(T), bucket(S), bucket(P), aligned), run, plans)


def plans_of(q: Tensor, k: Tensor, prefix_len: int, aligned: bool) -> list[Tile | None]:
    """How a row's gradients can be computed, the default first: a tile of `_bwd_short_kernel`, or
    None for one kernel by query and one by key.

    One tile that holds the whole row comes first. Several smaller tiles (up to UNROLLED pairs) are
    possible for `aligned` rows, which are causal with query i at column i.
    """
    T, S = q.shape[2], k.shape[2]
    if prefix_blocks(prefix_len, q)["MORE_P"]:
        return [None]
    tiles = tiles_of("bwd_short", q)
    holding = [t for t in tiles if t.block_m >= T and t.block_n >= S]
    smallest = min((t.block_m for t in holding), default=0)
    one: list[Tile | None] = [t for t in holding if t.block_m == smallest]
    several = [
        t
        for t in tiles
        if aligned and t not in holding and cdiv(T, t.block_m) * cdiv(T, t.block_n) <= UNROLLED
    ]
    return [*(one or [None]), *several]


def fuses(q: Tensor, prefix_len: int) -> bool:
    """Whether `_bwd_dq_kernel` also computes the prefix's gradient: see the header."""
    block_m = tiles_of(by_length("bwd_dq", q.shape[2]), q)[0].block_m
    cheaper = 16 * prefix_len <= 2 * q.element_size() * block_m
    return cheaper and not prefix_blocks(prefix_len, q)["MORE_P"]


def run_short(a: dict, tile: Tile, aligned: bool) -> None:
    """All gradients by `_bwd_short_kernel`."""
    tiles_m, tiles_n = cdiv(a["seq_len"], tile.block_m), cdiv(a["kv_len"], tile.block_n)
    parts = new_parts(a, a["batch_size"])
    launch(
        _bwd_short_kernel, a["batch_size"] * a["n_head"], tile, **a | parts,
        TILES_M=tiles_m, TILES_N=max(tiles_n, 1), SQUARE=aligned and tiles_m * tiles_n > 1,
    )  # fmt: skip
    reduce_parts(a, parts, per_row=1)


def run_split(a: dict) -> None:
    """dq by one kernel, dk and dv by a second, the prefix's gradient by the first or a third."""
    a = a | {"delta_ptr": torch.empty_like(a["lse_ptr"])}
    q, need_prefix = a["q_ptr"], a["dprefix_k_ptr"] is not None
    fused = need_prefix and fuses(q, a["prefix_len"])
    key = tuple(bucket(a[name]) for name in ("seq_len", "kv_len", "prefix_len"))
    name = by_length("bwd_dq", a["seq_len"])
    parts, per_row = run_best(name, q, key, partial(run_dq, a, fused))
    if a["dk_ptr"] is not None:
        run_best("bwd_dkdv", q, key, partial(run_dkdv, a))
    if need_prefix and not fused:
        parts, per_row = run_best("bwd_dprefix", q, key, partial(run_dprefix, a)), 1
    reduce_parts(a, parts, per_row)


def run_dq(a: dict, need_prefix: bool, tile: Tile) -> tuple[dict[str, Any], int]:
    """Compute dq and delta. Returns the parts of the prefix's gradient, if needed, and their number
    per row."""
    tiles_m = cdiv(a["seq_len"], tile.block_m)
    parts = new_parts(a, a["batch_size"] * tiles_m, may_be_direct=False) if need_prefix else {}
    launch(_bwd_dq_kernel, a["batch_size"] * a["n_head"] * tiles_m, tile, **a | parts)
    return parts, tiles_m


def run_dkdv(a: dict, tile: Tile) -> None:
    tiles_n = cdiv(a["kv_len"], tile.block_n)
    launch(_bwd_dkdv_kernel, a["batch_size"] * a["n_head"] * tiles_n, tile, **a)


def run_dprefix(a: dict, tile: Tile) -> dict[str, Any]:
    tiles_p = cdiv(a["prefix_len"], tile.block_n)
    rows = 1 if a["BANK"] else rows_a_program(a["q_ptr"], a["n_head"] * tiles_p)
    chunks = cdiv(a["batch_size"], rows)
    parts = new_parts(a, chunks)
    launch(_bwd_dprefix_kernel, chunks * a["n_head"] * tiles_p, tile, **a | parts, rows=rows)
    return parts


def rows_a_program(q: Tensor, programs_a_row: int) -> int:
    """The number of rows over which one program sums the gradient of a shared prefix.

    It depends only on the shapes, so that the order of summation is always the same.
    """
    chunks = max(1, min(q.shape[0], programs_wanted(q) // max(1, programs_a_row)))
    return max(1, cdiv(q.shape[0], chunks))


def new_parts(a: dict, n: int, may_be_direct: bool = True) -> dict[str, Any]:
    """Space for n parts of the prefix's gradient, and flags that say how they are summed.

    DIRECT: each part is the gradient itself, since there is one part, or one for each prefix of a
    bank. LEFT_OUT: the index determines which parts are gradients (`store_part`).
    """
    if a["dprefix_k_ptr"] is None:
        return {"DIRECT": True}
    named = a["BANK"] and a["prefix_index_ptr"] is not None
    if may_be_direct and not named and (a["BANK"] or n == 1):
        return {"DIRECT": True}
    shape = (n, a["n_head"], a["prefix_len"], a["D"])
    both = {name: a["lse_ptr"].new_empty(shape) for name in ("partial_k_ptr", "partial_v_ptr")}
    return both | {"DIRECT": False, "LEFT_OUT": may_be_direct and named}


def reduce_parts(a: dict, parts: dict, per_row: int) -> None:
    """The gradient of each prefix: the sum of its parts, of which each row has `per_row`."""
    if parts.get("DIRECT", True):
        return
    n_partials, H, P, D = parts["partial_k_ptr"].shape
    named = a["BANK"] and a["prefix_index_ptr"] is not None
    tiles = tiles_of("reduce_bank" if named else "reduce", a["q_ptr"])
    if not named:  # a single step of the loop, if there is a tile that is large enough
        tiles = sorted(tiles, key=lambda tile: tile.block_m < n_partials)
    n_prefixes, n_elements = a["dprefix_k_ptr"].numel() // (H * P * D), H * P * D

    def run(tile: Tile) -> None:
        launch(
            _reduce_kernel, n_prefixes * cdiv(n_elements, tile.block_n), tile, **a | parts,
            n_partials=n_partials, n_elements=n_elements, per_row=per_row,
        )  # fmt: skip

    run_best("reduce", a["q_ptr"], (bucket(n_partials), bucket(P), named), run, tiles)


def workspace_bytes(q: Tensor, k: Tensor, prefix_k: Tensor, prefix_index=None) -> int:
    """The workspace of all gradients in bytes: delta and the parts of dprefix.

    For the default tiles. Arguments as in `kernels.prefix_attention`.
    """
    (B, H, T, D), P = q.shape, prefix_k.shape[-2]
    bank = prefix_k.dim() == 4 and (prefix_index is not None or prefix_k.shape[0] > 1)
    delta, parts, direct = 4 * B * H * T, B, True
    if plans_of(q, k, P, aligned=False)[0] is not None:
        delta = 0
    elif fuses(q, P):
        parts, direct = B * cdiv(T, tiles_of(by_length("bwd_dq", T), q)[0].block_m), False
    elif not bank:
        tiles_p = cdiv(P, tiles_of("bwd_dprefix", q)[0].block_n)
        parts = cdiv(B, rows_a_program(q, H * tiles_p))
    if direct and prefix_index is None and (bank or parts == 1):
        parts = 0
    return delta + 8 * parts * H * P * D


def strides(name: str, x: Tensor | None) -> dict[str, int]:
    """Strides of an output (B, H, T or S, D); zeros if it is not needed."""
    b, h, rows = (0, 0, 0) if x is None else x.stride()[:3]
    return {
        f"stride_{name}b": b,
        f"stride_{name}h": h,
        f"stride_{name}{'t' if name == 'dq' else 's'}": rows,
    }
