"""Decoding: from logits to tokens. Greedy, sampling and beam search over one batch of prompts.

A batch of prompts is read in one call; after that each call reads one token per row. A prefix is
made into activations once per batch and then only read (eq. (3) of Li & Liang 2021 [1]): it is no
part of the cache, so beams and finished rows rearrange the cache without touching it.

Read `forbid`, `sampling_probabilities` and `sample` (logits to token), `Rows`, then the two loops,
`greedy_or_sampled` and `beam_search`. Shapes use the letters of the README's table; b counts
prompts, K beams.

Beam search, forbidden words, top-k and top-p follow `generate` of transformers 5 [2] to the token,
with one difference: [2] rounds logits to fp32 and adds log p in fp32, here an fp64 model is
searched in fp64.

[1] https://arxiv.org/abs/2101.00190
[2] https://github.com/huggingface/transformers/tree/v5.23.0
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minprefix.gpt2 import GPT2, KVCache, PrefixActivations


@dataclass(frozen=True)
class GenerationConfig:
    """How the next token is chosen. Without `num_beams` or `do_sample`: always the likeliest."""

    max_new_tokens: int = 100  # a text ends here at the latest
    min_new_tokens: int = 0  # the end-of-text token is forbidden before
    num_beams: int = 1  # K of beam search; 1 = off (the paper: 5 for tables)
    length_penalty: float = 1.0  # beams: score = sum of log p / (tokens with the end) ** this
    do_sample: bool = False  # draw tokens at random
    temperature: float = 1.0  # sampling: logits are divided by it
    top_k: int = 0  # sampling: only the k likeliest tokens; 0 = off
    top_p: float = 1.0  # sampling: only the likeliest tokens that together reach this; 1 = off
    seed: int = 0  # sampling: prompt b draws with seed + b
    bad_words: tuple[str, ...] = ()  # texts whose tokens are never generated in a row, like "\n"

    def __post_init__(self):
        for name, low in (("max_new_tokens", 1), ("num_beams", 1), ("top_k", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens must lie in [0, max_new_tokens], got {self.min_new_tokens} of "
                f"{self.max_new_tokens}"
            )
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be finite, got {self.length_penalty}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature must be > 0, got {self.temperature}; greedy (do_sample=False) "
                "takes the likeliest token"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.do_sample and self.num_beams > 1:
            raise ValueError(f"do_sample=True and num_beams={self.num_beams} exclude each other")
        if not self.do_sample and (self.temperature, self.top_k, self.top_p) != (1.0, 0, 1.0):
            raise ValueError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p} have no "
                "effect without do_sample=True"
            )
        if isinstance(self.bad_words, str) or "" in self.bad_words:
            raise ValueError(f"bad_words must be a tuple of texts, got {self.bad_words!r}")


def forbid(
    scores: Tensor, sequences: list[list[int]], bad_words_ids: list[list[int]], eos_id: int | None
) -> None:
    """Set the scores of tokens that may not come next to -inf, in place.

    Args:
        scores: (B, V), logits or log-probabilities.
        sequences: each row's tokens so far, prompt included.
        bad_words_ids: where a sequence ends in all but the last token of one of these, that last
            token is forbidden; one of a single token is forbidden everywhere.
        eos_id: the end of text where it may not come yet, else None.
    """
    if eos_id is not None:
        scores[:, eos_id] = -math.inf
    for *beginning, last in bad_words_ids:
        n = len(beginning)
        rows = [b for b, tokens in enumerate(sequences) if tokens[len(tokens) - n :] == beginning]
        scores[rows, last] = -math.inf


def sampling_probabilities(logits: Tensor, config: GenerationConfig) -> Tensor:
    """softmax(logits / temperature), then the top k, then the top p of it: (B, V), fp64."""
    scores = logits.double()
    # the largest is 0 before the division, so that a tiny temperature gives no inf - inf
    scores = (scores - scores.amax(-1, keepdim=True)) / config.temperature
    if config.top_k:
        kth = scores.topk(min(config.top_k, scores.shape[-1])).values[:, -1:]  # (B, 1)
        scores = scores.masked_fill(scores < kth, -math.inf)
    if config.top_p < 1:
        p, order = scores.softmax(-1).sort(-1, descending=True)
        dropped = p.cumsum(-1) - p >= config.top_p  # those before it hold top_p already
        dropped = torch.zeros_like(dropped).scatter(-1, order, dropped)
        scores = scores.masked_fill(dropped, -math.inf)
    return scores.softmax(-1)


def draw(probabilities: Tensor, u: Tensor) -> Tensor:
    """One token per row, (B, V) -> (B,): the first at which the cumulated probability exceeds u.

    u: (B,), fp64, uniform in [0, 1).
    """
    cumulated = probabilities.cumsum(-1)  # (B, V)
    return torch.searchsorted(cumulated, u[:, None] * cumulated[:, -1:], right=True)[:, 0]


def sample(probabilities: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One token per row, (B, V) -> (B,), by `draw`.

    Row b takes its u from its own generator on the CPU: the draw depends neither on the other rows
    nor on the device.
    """
    u = [torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators]
    return draw(probabilities, torch.cat(u).to(probabilities.device))


class Rows:
    """What the model has read so far of the rows of a batch, and the prefix that each row has."""

    def __init__(self, model: GPT2, prompts: list[list[int]], acts: PrefixActivations, n_new: int):
        self.model, self.acts = model, acts
        self.device = model.wte.weight.device
        max_len = max(len(tokens) for tokens in prompts) + n_new
        self.cache = KVCache(model.config, len(prompts), max_len, like=model.wte.weight)

    def read(self, texts: list[list[int]]) -> Tensor:
        """Logits after reading these tokens behind each row's earlier ones: (B, V), fp32 or fp64.

        Rows of different lengths are padded on the right, where no real token sees the padding.
        The first call reads the prompts: an infix stands before the last token of each.
        """
        lengths = torch.tensor([len(tokens) for tokens in texts], device=self.device)  # (B,)
        T = max(len(tokens) for tokens in texts)
        ids = torch.tensor([tokens + [0] * (T - len(tokens)) for tokens in texts])  # (B, T)
        at = torch.arange(len(texts), device=self.device) * T + lengths - 1  # last token of each
        last = self.model.hidden_states(
            ids.to(self.device), prefix=self.acts, starts=lengths - 1, kv_lens=lengths,
            cache=self.cache, at=at,
        )  # (B, C)  # fmt: skip
        self.acts = self.acts.passed()
        logits = self.model.head(last)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order and as often as they are named."""
        at = torch.tensor(rows, device=self.device)
        self.cache.select(at)
        self.acts = self.acts.select(at)


def greedy_or_sampled(
    model: GPT2, prompts: list[list[int]], config: GenerationConfig, eos_id: int,
    acts: PrefixActivations, bad_words_ids: list[list[int]], seeds: Sequence[int],
) -> Iterator[dict[int, int]]:  # fmt: skip
    """At each step the next token of every prompt that has not ended: {b: token}, without eos."""
    batch = Rows(model, prompts, acts, config.max_new_tokens)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sequences = [list(tokens) for tokens in prompts]  # by b; they grow
    rows, unread = list(range(len(prompts))), prompts  # the b in each row of the batch
    for n_new in range(config.max_new_tokens):
        logits = batch.read(unread)  # (rows, V)
        too_early = eos_id if n_new < config.min_new_tokens else None
        forbid(logits, [sequences[b] for b in rows], bad_words_ids, too_early)
        if config.do_sample:
            probabilities = sampling_probabilities(logits, config)
            tokens = sample(probabilities, [generators[b] for b in rows]).tolist()
        else:
            tokens = logits.argmax(-1).tolist()

        chosen = {b: token for b, token in zip(rows, tokens, strict=True) if token != eos_id}
        if not chosen:
            return
        yield chosen
        if len(chosen) < len(rows):
            batch.select([row for row, b in enumerate(rows) if b in chosen])
        for b, token in chosen.items():
            sequences[b].append(token)
        rows, unread = list(chosen), [[token] for token in chosen.values()]


class Beam(NamedTuple):
    """A continuation of one prompt."""

    score: float  # sum of log p of its new tokens, nats; of one that has ended: with the penalty
    tokens: list[int]  # prompt and new tokens
    parent: int  # the row of the batch that it continues


class BeamSearch:
    """The beams of one prompt: K running ones and the K best that have ended, both best first."""

    def __init__(self, prompt: list[int], config: GenerationConfig, eos_id: int):
        self.config, self.eos_id, self.prompt_len = config, eos_id, len(prompt)
        self.running = [Beam(0.0, prompt, parent=0)]  # one at first
        self.ended: list[Beam] = []
        self.done = False

    def extend(self, candidates: list[Beam], n_new: int) -> None:
        """Go on with the 2K best continuations, which have `n_new` new tokens; best first.

        At most K of them are ends (one eos per beam), so K remain to run on. An end counts only if
        it is among the first K. The search is done when K have ended and the best running beam,
        judged at its present length, does not beat the worst of them; or at max_new_tokens, where
        every beam ends.
        """
        K, penalty = self.config.num_beams, n_new**self.config.length_penalty
        ends = [beam.tokens[-1] == self.eos_id for beam in candidates]
        at_limit = n_new == self.config.max_new_tokens
        for beam, end in zip(candidates[:K], ends, strict=False):
            if end or at_limit:
                self.ended.append(beam._replace(score=beam.score / penalty))
        self.ended = sorted(self.ended, key=lambda beam: -beam.score)[:K]
        self.running = [beam for beam, end in zip(candidates, ends, strict=True) if not end][:K]
        hope = self.running[0].score / penalty
        self.done = at_limit or (len(self.ended) == K and hope <= self.ended[-1].score)

    def best(self) -> list[int]:
        """New tokens of the best that has ended, without eos."""
        new = self.ended[0].tokens[self.prompt_len :]
        return new[:-1] if new[-1] == self.eos_id else new


def check_beams(config: GenerationConfig, vocab_size: int) -> None:
    """ValueError where there are fewer tokens than candidates."""
    K = config.num_beams
    if 2 * K > vocab_size:
        raise ValueError(
            f"num_beams {K} needs a vocabulary of {2 * K} tokens, the model has {vocab_size}"
        )


def beam_search(
    model: GPT2, prompts: list[list[int]], config: GenerationConfig, eos_id: int,
    acts: PrefixActivations, bad_words_ids: list[list[int]],
) -> list[list[int]]:  # fmt: skip
    """The best that `BeamSearch` finds for each prompt: its new tokens, without eos."""
    K, V = config.num_beams, model.config.vocab_size
    check_beams(config, V)
    batch = Rows(model, prompts, acts, config.max_new_tokens)
    searches = [BeamSearch(tokens, config, eos_id) for tokens in prompts]
    active, unread, n_new = searches, prompts, 0
    while active:
        beams = [beam for search in active for beam in search.running]  # one per row of the batch
        log_p = batch.read(unread).log_softmax(-1)  # (rows, V)
        too_early = eos_id if n_new < config.min_new_tokens else None
        forbid(log_p, [beam.tokens for beam in beams], bad_words_ids, too_early)
        scores = log_p + log_p.new_tensor([beam.score for beam in beams])[:, None]
        best = scores.view(len(active), -1).topk(2 * K)  # of a prompt's beams * V continuations

        n_new += 1
        width = len(beams) // len(active)  # beams per prompt: 1 at first, then K
        found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        for n, (search, (values, indices)) in enumerate(zip(active, found, strict=True)):
            candidates = []
            for score, index in zip(values, indices, strict=True):
                parent = n * width + index // V
                candidates.append(Beam(score, beams[parent].tokens + [index % V], parent))
            search.extend(candidates, n_new)

        active = [search for search in active if not search.done]
        if active:
            beams = [beam for search in active for beam in search.running]
            batch.select([beam.parent for beam in beams])
            unread = [beam.tokens[-1:] for beam in beams]
    return [search.best() for search in searches]
