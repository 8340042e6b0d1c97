"""Caches that stay where they are, for `fast.py`: keys and values are written once.

`RowCache` has one row per prompt. `BeamCache` has the K beams of a prompt as K queries of one row:
the prompt's keys are there once, the beams' own tokens lie in slots after them, and a mask says
whose they are. Both attend for the model, as `KVCache` does, and in a step the operator itself
writes the new keys and values (`append`); the prefix is in neither. Shapes use the letters of
`models/gpt2.py`; K counts beams.
"""

from dataclasses import replace

import torch
from torch import Tensor

from minprefix.generation.graphs import round_up
from minprefix.models.activations import LayerPrefix, Visible, gated_attention
from minprefix.models.cache import KVCache
from minprefix.models.config import BARTConfig, GPT2Config

COLUMNS = 64  # columns of a cache are read in multiples of this where shapes are static


class RowCache(KVCache):
    """One row per prompt, allocated once; steps read its first `rows` rows and `columns` columns.

    Differs from `KVCache`: nothing is copied to keep rows. What the device counts, which a graph
    repeats, is counted by `advance`; what the host knows of it, by `count`.
    """

    def __init__(
        self, config: GPT2Config | BARTConfig, rows: int, max_len: int, like: Tensor, static: bool
    ):
        super().__init__(config, rows, max_len, like)
        self.rows, self.max_len, self.static = rows, max_len, static
        self.equal = False  # the new tokens of all rows stand in the last columns that are read

    def fill(self, prompts: list[list[int]]) -> None:
        """Get ready to read prompts, all in one call."""
        self.rows, self.longest = len(prompts), 0
        lengths = [len(tokens) for tokens in prompts]
        self.equal = len(set(lengths)) == 1 and not self.static
        # rows beyond the prompts pretend to hold one token, so that they stay finite
        self.lengths.copy_(torch.tensor(lengths + [1] * (len(self.lengths) - len(lengths))))

    def longest_after(self, T: int) -> int:
        return self.longest + 1 if self.longest else T

    @property
    def used(self) -> int:
        """Columns that hold something in some row."""
        return self.longest

    @property
    def columns(self) -> int:
        """What a step reads: the tokens so far and its own; rounded up where shapes are static."""
        n = self.longest + 1
        return min(round_up(n, COLUMNS), self.max_len) if self.static else n

    def places(self, T: int) -> Tensor:
        """(T,) for prompts, (B, 1) in a step: the same for all beams of a prompt."""
        if self.longest == 0:
            return torch.arange(T, device=self.lengths.device)
        return self.lengths[: self.rows, None]

    def attend(self, layer: int, q, k, v, prefix: LayerPrefix, visible: Visible) -> Tensor:
        """As in `KVCache`, written in place; the queries of a step are a row's beams, if any."""
        if self.longest == 0:  # the prompts: everything there is to see is in k and v
            self.k[layer, : self.rows, :, : k.shape[2]] = k
            self.v[layer, : self.rows, :, : v.shape[2]] = v
            return gated_attention(q, k, v, prefix, visible)
        keys, values = (x[layer, : self.rows, :, : self.columns] for x in (self.k, self.v))
        return gated_attention(q, keys, values, prefix, self.in_a_step(visible), append=(k, v))

    def in_a_step(self, visible: Visible) -> Visible:
        """What a step's queries see."""
        return visible if self.equal else replace(visible, q_offset=self.lengths[: self.rows])

    def advance(self, lengths: Tensor | None, T: int) -> None:
        """Count the tokens that all layers have read: those of the prompts, or one in each row."""
        if self.longest == 0:
            self.longest = T
        else:
            self.lengths += 1

    def count(self) -> None:
        """A step is over, on the host's side."""
        self.longest += 1

    def move(self, to: Tensor, source: Tensor) -> None:
        """Overwrite rows `to` with rows `source`."""
        for x in (self.k, self.v):
            x[:, to, :, : self.used] = x[:, source, :, : self.used]
        self.lengths[to] = self.lengths[source]

    def state(self) -> list[Tensor]:
        """What a step changes, beside keys and values."""
        return [self.lengths]


class BeamCache(RowCache):
    """K beams per prompt: the prompt's keys once, then a slot for each new token of each beam.

    Token n of beam i of its prompt is in slot n K + i for good. Beam i sees the prompt and the
    slots of its ancestors: `seen` is what is reordered when beams are.
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
        self.n_new = 0  # tokens of each beam that steps have read

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
        """Beam i goes on from parents[:, i] (B, K): it sees what that saw, and its own new slot."""
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
