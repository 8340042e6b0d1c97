"""How `decode.py` divides the columns of a call into splits, also for a prefix shared by all rows.

This depends only on shapes, never on the lengths of the rows, so that a CUDA graph can replay a
call for any lengths. `plans_for` has the default first; tuning and `benchmarks/gpu.sh decode` time
the others.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from kernels.launch import (
    MULTIPROCESSORS,
    Tile,
    bucket,
    by_length,
    cdiv,
    programs_wanted,
    target_of,
    tiles_of,
)

SPLIT_BYTES = 48 * 2**10  # one program reads them in 2 us, what a second launch costs (H200)
EARLY_BYTES = 16 * 2**10  # prefix that a program holds in registers: 32 for each of 128 threads
PREFIX_TILES = 4  # in one split of a stacked prefix, as in a short split of the cache
STACK_BYTES = 16 * 2**20  # stacking pays if it saves these reads: 3 us of L2, for one more launch


class Plan(NamedTuple):
    """The tile of a call, and whether its columns are split."""

    tile: Tile
    split: bool

    def __str__(self) -> str:
        return ",".join(map(str, self.tile)) + (" split" if self.split else "")


class Cut(NamedTuple):
    """How the columns of a call are divided."""

    splits: int  # programs per row and head
    chunk: int  # columns of each program, in whole tiles
    prefix_splits: int  # programs per head and stack; 0: the prefix is not stacked
    prefix_chunk: int

    @property
    def parts(self) -> int:
        """C, the partial results per query."""
        return self.splits + self.prefix_splits


def stacks(q: Tensor, prefix_k: Tensor, prefix_index: Tensor | None, tile: Tile) -> bool:
    """Whether the queries of all rows are stacked for the prefix; depends only on the shapes.

    This is possible if all rows share the prefix. It pays if the reads that it saves take longer
    than merging one more partial result, which is not so for a short prefix in the L2 cache.
    """
    (B, H, T, D), P = q.shape, prefix_k.shape[-2]
    shared = prefix_index is None and (prefix_k.dim() == 3 or prefix_k.shape[0] == 1)
    saved = (B - cdiv(B * T, tile.block_m)) * 2 * H * P * D * prefix_k.element_size()
    return shared and saved >= STACK_BYTES


def cut_for(q: Tensor, k: Tensor, prefix_k: Tensor, prefix_index: Tensor | None, plan: Plan) -> Cut:
    """The splits, which depend on the shapes and the plan, never on the lengths of the rows.

    There are enough for PROGRAMS_EACH programs on each multiprocessor, if there are enough tiles.
    """
    (B, H, _, _), S, P, tile = q.shape, k.shape[2], prefix_k.shape[-2], plan.tile
    tiles, prefix_splits = cdiv(S, tile.block_n), 0
    if stacks(q, prefix_k, prefix_index, tile):
        prefix_splits = cdiv(P, PREFIX_TILES * tile.block_n)
    else:
        tiles += cdiv(P, tile.block_n)
    wanted_splits = programs_wanted(q) // max(B * H, 1) if plan.split else 1
    each = max(cdiv(tiles, max(wanted_splits, 1)), 1)
    chunks = (each * tile.block_n, PREFIX_TILES * tile.block_n)
    return Cut(max(1, cdiv(tiles, each)), chunks[0], prefix_splits, chunks[1])


def tiles_name(q: Tensor, k: Tensor) -> str:
    """The tiles' name in the table: many short rows prefer smaller ones, of which more fit.

    Measured on an H200 for 32 and for 8 rows, 16 heads, 192 keys: 12.9 instead of 14.6 us, but 7.5
    instead of 6.5 us.
    """
    rows_and_heads, multiprocessors = q.shape[0] * q.shape[1], MULTIPROCESSORS[target_of(q.device)]
    many = rows_and_heads >= 3 * multiprocessors
    return by_length("decode", k.shape[2]) if many else "decode"


def plans_for(
    q: Tensor, k: Tensor, prefix_k: Tensor, prefix_index: Tensor | None
) -> Iterator[Plan]:
    """The default plan first, then the alternatives: the other choice of splitting, other tiles.

    Splitting pays if it saves a program more than SPLIT_BYTES of keys and values, or if there are
    partial results anyway.
    """
    for n, tile in enumerate(tiles_of(tiles_name(q, k), q)):
        cuts = {x: cut_for(q, k, prefix_k, prefix_index, Plan(tile, x)) for x in (False, True)}
        spared = (cuts[False].chunk - cuts[True].chunk) * 2 * q.shape[-1] * q.element_size()
        pays = spared > SPLIT_BYTES or cuts[False].prefix_splits > 0
        yield Plan(tile, pays)
        if spared and n == 0:
            yield Plan(tile, not pays)


def prefix_tiles(prefix_k: Tensor, block_d: int) -> dict[str, int | bool]:
    """BLOCK_P: prefix columns in a tile, a power of two (0: none); MORE_P: whether there are more.

    The first tile is held in registers while the cache is read, so its size is limited.
    """
    prefix_len = prefix_k.shape[-2]
    most = EARLY_BYTES // (2 * block_d * prefix_k.element_size())
    block = min(64, most, max(16, bucket(prefix_len))) if prefix_len else 0
    return {"BLOCK_P": block, "MORE_P": prefix_len > block}


def workspace_bytes(
    q: Tensor, k: Tensor, prefix_k: Tensor, prefix_index: Tensor | None = None
) -> int:
    """Bytes that `decode` allocates besides o and lse by the default plan: 4 C B H T (D + 1)."""
    (B, H, T, D), call = q.shape, (q, k, prefix_k, prefix_index)
    parts = cut_for(*call, next(plans_for(*call))).parts
    return 4 * parts * B * H * T * (D + 1) if parts > 1 else 0
