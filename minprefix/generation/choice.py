"""Chooses the tokens for the next step from the logits of a step, on the model's device.

`decoding.py` defines the choice; `Tokens` (greedy or sampled) and `Beams` make the same choice for
`fast.py`. Everything that persists between steps is in tensors at fixed addresses: the ids that the
next step reads, the number of new tokens, the random draws, the beams' scores. A CUDA graph can
therefore contain a whole step, from ids to ids, and nothing here waits for the device. Read
`Forbidden`, `Choice`, then `Tokens` and `Beams`. Shapes use the letters of `models/gpt2.py`; K
counts beams.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minprefix.generation.caches import BeamCache
from minprefix.generation.config import Decided
from minprefix.generation.decoding import (
    Beginning,
    allowed,
    draw,
    n_candidates,
    penalise,
    sampling_probabilities,
    widest,
)


class Forbidden:
    """`decoding.forbid` on the device.

    Args:
        bad_words_ids: the tokens of words that must not be generated.
        max_len: number of tokens of the longest text, with its prompt.
    """

    def __init__(
        self, config: Decided, bad_words_ids: list[list[int]], eos_ids: tuple[int, ...],
        beginning: Beginning, max_len: int, device: torch.device,
    ):  # fmt: skip
        self.min_new, self.eos_ids = config.min_new_tokens, eos_ids
        self.given, self.never, self.never_first = (
            beginning.given, beginning.never, beginning.never_first
        )  # fmt: skip
        self.last = torch.tensor(beginning.last, device=device)  # differs from batch to batch
        self.must_end = beginning.must_end
        self.no_repeat, self.penalty = config.no_repeat_ngram_size, config.repetition_penalty
        self.words = [(torch.tensor(word[:-1], device=device, dtype=torch.long), word[-1])
                      for word in bad_words_ids]  # fmt: skip
        # how many of a text's last tokens are needed: those of a bad word but its last, or all
        self.window = max((len(word) - 1 for word in bad_words_ids), default=0)
        if self.no_repeat or self.penalty != 1:
            self.window = max(self.window, max_len)

    def forbid(self, scores: Tensor, recent: Tensor, n_new: Tensor) -> None:
        """`decoding.forbid` for scores (rows, V), in place.

        Args:
            recent: (rows, window), the last tokens of each row, -1 before its first one.
            n_new: (), the number of new tokens of each row.
        """
        if self.penalty != 1:
            penalise(scores, recent, self.penalty)
        for token in self.never:
            scores[:, token] = float("-inf")
        for token in self.never_first:
            scores[:, token].masked_fill_(n_new == self.given, float("-inf"))
        for token in self.eos_ids if self.min_new else ():
            scores[:, token].masked_fill_(n_new < self.min_new, float("-inf"))
        if self.no_repeat:
            self._forbid_repeats(scores, recent)
        for beginning, last in self.words:
            hit = (recent[:, recent.shape[1] - len(beginning) :] == beginning).all(1)
            scores[:, last].masked_fill_(hit, float("-inf"))
        if self.must_end is not None:
            scores.masked_fill_(n_new == self.last, float("-inf"))
            scores[:, self.must_end].masked_fill_(n_new == self.last, 0.0)

    def _forbid_repeats(self, scores: Tensor, recent: Tensor) -> None:
        n = self.no_repeat
        if recent.shape[1] < n:
            return
        runs = recent.unfold(1, n, 1)  # (rows, window - n + 1, n): all n tokens in a row
        end = recent[:, None, recent.shape[1] - n + 1 :]  # (rows, 1, n - 1)
        again = (runs[..., :-1] == end).all(-1) & (runs >= 0).all(-1)
        scores.scatter_add_(  # -inf or 0
            1,
            runs[..., -1].clamp(min=0),
            scores.new_zeros(again.shape).masked_fill_(again, float("-inf")),
        )


class Choice:
    """The state that persists between steps, and `choose`, which updates it."""

    def __init__(self, words: Forbidden, config: Decided, rows: int, device: torch.device):
        self.words, self.config, K = words, config, config.num_beams
        self.ids = torch.zeros(rows, K, dtype=torch.long, device=device)  # what the next step reads
        self.recent = self.ids.new_full((rows, K, words.window), -1)  # as in `Forbidden.forbid`
        self.n_new = self.ids.new_zeros(())  # tokens chosen, including forced ones

    def fill(self, beginning: Beginning, seeds: Sequence[int]) -> None:
        """Prepare for the texts of `beginning`."""
        self.n_new.fill_(beginning.given)
        self.words.last.fill_(beginning.last)
        W = self.words.window
        if W:
            recent = [([-1] * W + tokens)[-W:] for tokens in beginning.texts]
            self.recent[: len(recent)] = torch.tensor(recent).to(self.ids.device)[:, None]

    def choose(self, logits: Tensor) -> Tensor:
        """Choose the next tokens from logits (rows, K, V), with K = 1 after the prompts.

        Returns the values for the host, one entry per row; the next step overwrites them.
        """
        raise NotImplementedError

    def keep(self, tokens: Tensor) -> None:
        """Make these tokens (rows, K) the next ones."""
        R = len(tokens)
        self.ids[:R] = tokens
        if self.words.window:
            self.recent[:R] = torch.cat([self.recent[:R, :, 1:], tokens[..., None]], dim=-1)
        self.n_new += 1

    def per_row(self) -> list[Tensor]:
        """The tensors that have an entry for each row."""
        return [self.ids, self.recent]

    def state(self) -> list[Tensor]:
        """The tensors that a step changes."""
        return [*self.per_row(), self.n_new]

    def move(self, to: Tensor, source: Tensor) -> None:
        """Overwrite rows `to` with rows `source`."""
        for x in self.per_row():
            x[to] = x[source]


class Tokens(Choice):
    """The most likely token of each row, or a sampled one."""

    def __init__(self, words: Forbidden, config: Decided, rows: int, device: torch.device):
        super().__init__(words, config, rows, device)
        n = config.max_new_tokens if config.do_sample else 0
        # indexed by the number of new tokens
        self.u = torch.zeros(rows, n, dtype=widest(device), device=device)
        self.chosen = self.ids.new_zeros(rows)

    def fill(self, beginning: Beginning, seeds: Sequence[int]) -> None:
        """Make all draws in advance, each row's with its own CPU generator, as in `sample`."""
        super().fill(beginning, seeds)
        if self.config.do_sample:
            n = self.u.shape[1] - beginning.given
            u = [torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                 for seed in seeds]  # fmt: skip
            drawn = torch.stack(u).to(self.u.dtype)
            self.u[: len(u), beginning.given :] = drawn.to(self.u.device)

    def choose(self, logits: Tensor) -> Tensor:
        scores, R = logits[:, 0], len(logits)
        self.words.forbid(scores, self.recent[:R, 0], self.n_new)
        largest, tokens = scores.max(-1)
        if self.config.do_sample:
            u = self.u[:R].index_select(1, self.n_new[None])[:, 0]
            tokens = draw(sampling_probabilities(scores, self.config), u)
        self.chosen[:R] = allowed(tokens, largest)
        self.keep(self.chosen[:R, None].clamp(min=0))  # rows that have ended read a token too
        return self.chosen[:R]

    def per_row(self) -> list[Tensor]:
        return [*super().per_row(), self.u]


class Beams(Choice):
    """The K running beams; `BeamSearch` follows on the host and decides when a prompt is done."""

    def __init__(
        self, words: Forbidden, config: Decided, rows: int, cache: BeamCache,
        dtype: torch.dtype, vocab_size: int,
    ):  # fmt: skip
        super().__init__(words, config, rows, cache.k.device)
        self.cache, K = cache, config.num_beams
        self.scores = self.ids.new_zeros(rows, K, dtype=dtype)  # sum of log p, nats
        self.ends = torch.tensor(words.eos_ids, dtype=torch.long, device=self.ids.device)
        self.n_best = n_candidates(config, words.eos_ids, vocab_size)
        self.best = self.ids.new_zeros(rows, 2, self.n_best, dtype=widest(self.ids.device))

    def fill(self, beginning: Beginning, seeds: Sequence[int]) -> None:
        super().fill(beginning, seeds)
        self.scores.zero_()

    def choose(self, logits: Tensor) -> Tensor:
        """Returns (rows, 2, n): the scores of the n best continuations, and beam * V + token."""
        (R, width, V), K = logits.shape, self.config.num_beams
        log_p = logits.log_softmax(-1)
        recent = self.recent[:R, :width]
        self.words.forbid(log_p.flatten(0, 1), recent.flatten(0, 1), self.n_new)
        best: Any = (log_p + self.scores[:R, :width, None]).flatten(1).topk(self.n_best)
        # the running beams are the first K that do not end
        ends = (best.indices[..., None] % V == self.ends).any(-1).int()
        running = ends.argsort(dim=1, stable=True)[:, :K]
        indices = best.indices.gather(1, running)
        tokens, parents = indices % V, indices // V  # (rows, K)
        self.scores[:R] = best.values.gather(1, running)
        if self.words.window:
            at = parents[..., None].expand(-1, -1, self.words.window)
            self.recent[:R] = recent.gather(1, at)
        self.cache.follow(parents)
        self.keep(tokens)
        self.best[:R, 0], self.best[:R, 1] = best.values, best.indices
        return self.best[:R]

    def per_row(self) -> list[Tensor]:
        return [*super().per_row(), self.scores]
