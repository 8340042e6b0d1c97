"""Caches with fixed addresses for `fast.py`, in which keys and values are written once.

`RowCache` has one row per prompt. `BeamCache` treats the K beams of a prompt as K queries of one
row: the prompt's keys are stored once, the beams' own tokens are in slots after them, and a mask
gives each beam its own. Both attend for the model, as `KVCache` does, and in a step the attention
operator itself writes the new keys and values (`append`). Neither holds the prefix. Shapes use the
letters of `models/gpt2.py`; K counts beams.
"""

from dataclasses import replace

import torch
from torch import Tensor

from minprefix.generation.graphs import round_up
from minprefix.models.activations import LayerPrefix, Visible, gated_attention
from minprefix.models.cache import KVCache
from minprefix.models.config import BARTConfig, GPT2Config

COLUMNS = 64  # with static shapes, columns of a cache are read in multiples of this


class RowCache(KVCache):
    """One row per prompt, allocated once; steps read its first `rows` rows and `columns` columns.

    Unlike `KVCache`, it copies nothing to keep rows. `advance` updates the counters on the device,
    which is part of a graph; `count` updates those on the host.
    """

    def __init__(
        self, config: GPT2Config | BARTConfig, rows: int, max_len: int, like: Tensor, static: bool
    ):
        super().__init__(config, rows, max_len, like)
        self.rows, self.max_len, self.static = rows, max_len, static
        self.equal = False  # whether the new tokens of all rows are in the last columns read

    def fill(self, prompts: list[list[int]]) -> None:
        """Prepare for reading these prompts in one call."""
        self.rows, self.longest = len(prompts), 0
        lengths = [len(tokens) for tokens in prompts]
        self.equal = len(set(lengths)) == 1 and not self.static
        # rows beyond the prompts have length 1, so that their values stay finite
        self.lengths.copy_(torch.tensor(lengths + [1] * (len(self.lengths) - len(lengths))))

    def longest_after(self, T: int) -> int:
        return self.longest + 1 if self.longest else T

    @property
    def used(self) -> int:
        """The number of columns in use."""
        return self.longest

    @property
    def columns(self) -> int:
        """How many columns a step reads, its own included; rounded up for static shapes."""
        n = self.longest + 1
        return min(round_up(n, COLUMNS), self.max_len) if self.static else n

    def places(self, T: int) -> Tensor:
        """(T,) for prompts, (B, 1) in a step: the same for all beams of a prompt."""
        if self.longest == 0:
            return torch.arange(T, device=self.lengths.device)
        return self.lengths[: self.rows, None]

    def attend(self, layer: int, q, k, v, prefix: LayerPrefix, visible: Visible) -> Tensor:
        """As in `KVCache`, but in place. In a step with beams, a row's queries are its beams."""
        if self.longest == 0:  # the prompts: all visible keys are in k and v
            self.k[layer, : self.rows, :, : k.shape[2]] = k
            self.v[layer, : self.rows, :, : v.shape[2]] = v
            return gated_attention(q, k, v, prefix, visible)
        keys, values = (x[layer, : self.rows, :, : self.columns] for x in (self.k, self.v))
        return gated_attention(q, keys, values, prefix, self.in_a_step(visible), append=(k, v))

    def in_a_step(self, visible: Visible) -> Visible:
        """The visible keys of a step's queries."""
        return visible if self.equal else replace(visible, q_offset=self.lengths[: self.rows])

    def advance(self, lengths: Tensor | None, T: int) -> None:
        """Count the tokens that all layers have read: the prompts, or one token in each row."""
        if self.longest == 0:
            self.longest = T
        else:
            self.lengths += 1

    def count(self) -> None:
        """Count a finished step on the host."""
        self.longest += 1

    def move(self, to: Tensor, source: Tensor) -> None:
        """Overwrite rows `to` with rows `source`."""
        for x in (self.k, self.v):
            x[:, to, :, : self.used] = x[:, source, :, : self.used]
        self.lengths[to] = self.lengths[source]

    def state(self) -> list[Tensor]:
        """The tensors that a step changes, apart from keys and values."""
        return [self.lengths]


class BeamCache(RowCache):
    """K beams per prompt: the prompt's keys once, then a slot for each new token of each beam.

    Token n of beam i is in slot n K + i and stays there. Beam i sees the prompt and the slots of
    its ancestors; reordering the beams reorders only `seen`.
    """

    def __init__(
        self, config: GPT2Config | BARTConfig, rows: int, prompt_len: int, num_beams: int,
        n_new: int, like: Tensor, static: bool,
    ):  # fmt: skip
        super().__init__(config, rows, prompt_len + n_new * num_beams, like, static)
        self.prompt_len, self.num_beams = prompt_len, num_beams
        self.seen = like.new_zeros(rows, num_beams, self.max_len, dtype=torch.bool)
        self.column = torch.arange(self.max_len, device=like.device)  # 0, 1, ...
        self.first = torch.full_like(self.lengths, prompt_len)  # (B,) the column of the next slots
        self.n_new = 0  # tokens of each beam that the steps have read

    def fill(self, prompts: list[list[int]]) -> None:
        super().fill(prompts)
        self.equal = not self.static
        self.n_new = 0
        self.first.fill_(self.prompt_len)
        inside = self.column < self.lengths[:, None]  # (B, S)
        self.seen.copy_(inside[:, None].expand_as(self.seen))

    @property
    def used(self) -> int:
        return self.prompt_len + self.n_new * self.num_beams

    @property
    def columns(self) -> int:
        n = self.n_new + 1
        n = round_up(n, COLUMNS // 4) if self.static else n
        return min(self.prompt_len + n * self.num_beams, self.max_len)

    def in_a_step(self, visible: Visible) -> Visible:
        seen = self.seen[: self.rows, :, : self.columns]
        first = None if self.equal else self.first[: self.rows]
        return replace(visible, causal=False, seen=seen, q_offset=first)

    def follow(self, parents: Tensor) -> None:
        """Beam i continues parents[:, i] (B, K): it sees the same slots and its own new one."""
        R, K = parents.shape
        at = parents[..., None].expand(-1, -1, self.max_len)
        slot = self.first[0] + self.column[:K]  # (K,)
        own = self.column == slot[:, None]  # (K, S)
        self.seen[:R] = self.seen[:R].gather(1, at) | own

    def advance(self, lengths: Tensor | None, T: int) -> None:
        if self.longest:
            self.first += self.num_beams
        super().advance(lengths, T)

    def count(self) -> None:
        super().count()
        self.n_new += 1

    def move(self, to: Tensor, source: Tensor) -> None:
        super().move(to, source)
        self.seen[to] = self.seen[source]

    def state(self) -> list[Tensor]:
        return [*super().state(), self.first, self.seen]
