"""Caches that stay where they are, for `fast.py`: keys and values are written once.

`RowCache` has one row per prompt. `BeamCache` has the K beams of a prompt as K queries of one row:
the prompt's keys are there once, the beams' own tokens lie in slots, and a mask says whose they
are. Both attend for the model, as `KVCache` does; the prefix is in neither. Shapes use the letters
of the README's table; K counts beams.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kernels import prefix_attention
from kernels.merge import Partial, merge
from kernels.reference import query_key_products
from minprefix.generation.graphs import round_up
from minprefix.models.activations import (
    LayerPrefix,
    Visible,
    gated_attention,
    with_gated_prefix,
)
from minprefix.models.cache import KVCache
from minprefix.models.config import BARTConfig, GPT2Config

COLUMNS = 64  # columns of a cache are read in multiples of this where shapes are static


class RowCache(KVCache):
    """One row per prompt, allocated once; steps read its first `rows` rows and `columns` columns.

    Differs from `KVCache`: nothing is copied to keep rows, and `count` says that a step is over
    (a graph replays what the GPU does, not the counting of `advance`).
    """

    def __init__(
        self, config: GPT2Config | BARTConfig, rows: int, max_len: int, like: Tensor, static: bool
    ):
        super().__init__(config, rows, max_len, like)
        self.rows, self.max_len, self.static = rows, max_len, static
        self.equal = False  # all rows are of one length
        self.first = torch.arange(rows * config.n_head, device=like.device) * max_len
        self.first = self.first.view(rows, -1)  # (B, H): where the row's columns begin, flat

    def fill(self, prompts: list[list[int]]) -> None:
        """Get ready to read prompts, all in one call."""
        self.rows, self.longest = len(prompts), 0
        lengths = [len(tokens) for tokens in prompts]
        self.equal = len(set(lengths)) == 1 and not self.static
        # rows beyond the prompts pretend to hold one token, so that they stay finite
        self.lengths.copy_(torch.tensor(lengths + [1] * (len(self.lengths) - len(lengths))))

    @property
    def columns(self) -> int:
        """What a step reads: the tokens so far and its own; rounded up where shapes are static."""
        n = self.longest + 1
        return min(round_up(n, COLUMNS), self.max_len) if self.static else n

    def places(self, T: int) -> Tensor:
        """(T,) for prompts, (B, 1) in a step."""
        if self.longest == 0:
            return torch.arange(T, device=self.lengths.device)
        return self.lengths[: self.rows, None]

    def attend(self, layer: int, q, k, v, prefix: LayerPrefix, visible: Visible) -> Tensor:
        """As in `KVCache`, written in place."""
        if self.longest == 0:  # the prompts: everything there is to see is in k and v
            self.k[layer, : self.rows, :, : k.shape[2]] = k
            self.v[layer, : self.rows, :, : v.shape[2]] = v
            return gated_attention(q, k, v, prefix, visible)
        at = (self.first + self.lengths[:, None])[: self.rows].flatten()  # (B H,)
        for cache, new in ((self.k, k), (self.v, v)):
            cache[layer].view(-1, new.shape[-1]).index_copy_(0, at, new.reshape(len(at), -1))
        k, v = (x[layer, : self.rows, :, : self.columns] for x in (self.k, self.v))
        if not self.equal:
            visible = replace(visible, q_offset=self.lengths[: self.rows])
        return gated_attention(q, k, v, prefix, visible)

    def advance(self, lengths: Tensor | None, T: int) -> None:
        """After the prompts; `count` does it after a step."""
        if self.longest == 0:
            self.longest = T

    def count(self) -> None:
        self.lengths += 1
        self.longest += 1

    def move(self, to: list[int], source: list[int]) -> None:
        """Overwrite rows `to` with rows `source`."""
        n = self.longest
        for x in (self.k, self.v):
            x[:, to, :, :n] = x[:, source, :, :n]
        self.lengths[to] = self.lengths[source]


def attend_where(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Partial:
    """Each query's attention to the keys it sees, at least one: seen (B, T, S), bool."""
    s = (
        query_key_products(q, k).to(torch.promote_types(q.dtype, torch.float32))
        * q.shape[-1] ** -0.5
    )
    s = s.masked_fill(~seen[:, None], float("-inf"))  # (B, H, T, S)
    return s.softmax(-1).to(q.dtype) @ v, s.logsumexp(-1)


class BeamCache:
    """K beams per prompt: the prompt's keys once, and a slot for each new token of each beam.

    Token n of beam i of its prompt is in slot n K + i for good. Beam i sees the slots of its
    ancestors: `seen` is what is reordered when beams are.
    """

    def __init__(self, prompts: RowCache, num_beams: int, n_new: int):
        self.prompts, self.static, self.num_beams = prompts, prompts.static, num_beams
        L, B, H, _, D = prompts.k.shape
        self.k = prompts.k.new_zeros(L, B, H, n_new * num_beams, D)
        self.v = torch.zeros_like(self.k)
        self.seen = prompts.k.new_zeros(B, num_beams, n_new * num_beams, dtype=torch.bool)
        self.beams = torch.arange(num_beams, device=prompts.k.device)  # (K,)
        self.steps = torch.zeros_like(self.beams[0])  # n_new, on the device
        self.n_new = 0  # the same on the host

    @property
    def rows(self) -> int:
        return self.prompts.rows

    @rows.setter
    def rows(self, rows: int) -> None:
        self.prompts.rows = rows

    def longest_after(self, T: int) -> int:
        """The K tokens of a step stand side by side."""
        return T if self.prompts.longest == 0 else self.prompts.longest + self.n_new + 1

    @property
    def columns(self) -> int:
        """The slots that a step reads."""
        n = self.n_new + 1
        n = round_up(n, COLUMNS // 4) if self.static else n
        return min(n * self.num_beams, self.seen.shape[2])

    def fill(self, prompts: list[list[int]]) -> None:
        self.prompts.fill(prompts)
        self.seen.zero_()
        self.steps.zero_()
        self.n_new = 0

    def places(self, T: int) -> Tensor:
        """The same for all beams of a prompt: (B, 1)."""
        places = self.prompts.places(T)
        return places if self.prompts.longest == 0 else places + self.steps

    def attend(self, layer: int, q, k, v, prefix: LayerPrefix, visible: Visible) -> Tensor:
        """As in `KVCache`; in a step q, k, v are (B, H, K, D): the beams are the queries."""
        if self.prompts.longest == 0:
            return self.prompts.attend(layer, q, k, v, prefix, visible)
        R, n, prompts = self.rows, self.columns, self.prompts
        slots = self.steps * self.num_beams + self.beams  # (K,)
        self.k[layer, :R].index_copy_(2, slots, k)
        self.v[layer, :R].index_copy_(2, slots, v)
        own = attend_where(
            q, self.k[layer, :R, :, :n], self.v[layer, :R, :, :n], self.seen[:R, :, :n]
        )
        S = prompts.max_len if self.static else prompts.longest
        prompt_k, prompt_v = (x[layer, :R, :, :S] for x in (prompts.k, prompts.v))
        lens = None if prompts.equal else prompts.lengths[:R]
        visible = replace(visible, kv_lens=lens, causal=False)
        if prefix.gate is None:
            options, pair = visible.all(), (prefix.k, prefix.v)
        else:  # the prefix joins last
            none = q.new_empty(q.shape[1], 0, q.shape[3])
            options, pair = visible.keys(), (none, none)
        shared = prefix_attention(q, prompt_k, prompt_v, *pair, return_lse=True, **options)
        sequence = merge(shared, own)
        return (
            sequence[0] if prefix.gate is None else with_gated_prefix(q, sequence, prefix, visible)
        )

    def advance(self, lengths: Tensor | None, T: int) -> None:
        self.prompts.advance(lengths, T)

    def follow(self, parents: Tensor) -> None:
        """Beam i goes on from parents[:, i] (B, K): it sees what that saw, and its own new slot."""
        R, K = parents.shape
        at = parents[..., None].expand(-1, -1, self.seen.shape[2])
        self.seen[:R] = self.seen[:R].gather(1, at)
        self.seen[:, self.beams, self.n_new * K + self.beams] = True

    def count(self) -> None:
        self.steps += 1
        self.n_new += 1

    def move(self, to: list[int], source: list[int]) -> None:
        n = self.n_new * self.num_beams
        for x in (self.k, self.v):
            x[:, to, :, :n] = x[:, source, :, :n]
        self.seen[to] = self.seen[source]
        self.prompts.move(to, source)
