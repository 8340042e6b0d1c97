"""Decoding: from logits to tokens. Greedy, sampling and beam search over one batch of prompts.

A batch of prompts is read in one call; after that each call reads one token per row. A prefix is
made into activations once per batch and then only read (eq. (3) of Li & Liang 2021 [1]): it is no
part of the cache, so beams and finished rows rearrange the cache without touching it.

Read `forbid`, `sampling_probabilities` and `sample` (logits to token), `begin` (what is read first:
a BART encodes its prompts once), `Rows`, then the two loops, `greedy_or_sampled` and
`beam_search`. Shapes use the letters of the README's table; b counts
prompts, K beams.

Beam search, forbidden words, top-k and top-p follow `generate` of transformers 5 [2] to the token,
with one difference: [2] rounds logits to fp32 and adds log p in fp32, here an fp64 model is
searched in fp64.

[1] https://arxiv.org/abs/2101.00190
[2] https://github.com/huggingface/transformers/tree/v5.23.0
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minprefix.generation.config import GenerationConfig
from minprefix.models.activations import Activations
from minprefix.models.base import LanguageModel
from minprefix.models.cache import KVCache, right_padded


class Beginning(NamedTuple):
    """What the model reads before the first new token is chosen."""

    texts: list[list[int]]  # by prompt: GPT-2 reads the prompt, a BART's decoder its first tokens
    options: dict[str, Any] = {}  # of `hidden_states`: a BART's encoded sources  # noqa: RUF012
    given: int = 0  # new tokens among the texts: a first one that is forced
    must_end: bool = False  # the last of max_new_tokens can only be the end of text


def begin(
    model: LanguageModel, prompts: list[list[int]], config: GenerationConfig, acts: Activations
) -> Beginning:
    """What the model reads of the prompts, whose first new token may be forced."""
    given = int(model.config.forced_bos_token_id is not None)
    if config.max_new_tokens <= given:
        raise ValueError(
            f"max_new_tokens must be at least {given + 1}, as the first token is forced; got "
            f"{config.max_new_tokens}"
        )
    must_end = model.config.forced_eos_token_id is not None
    return Beginning(*model.begin(prompts, acts), given, must_end)


class Bans(NamedTuple):
    """What may not come after so many new tokens; `bans_after` makes it of the settings."""

    bad_words_ids: list[list[int]]
    no_repeat: int = 0  # n: no n tokens in a row twice
    too_early: int | None = None  # the end of text, where it may not come yet
    must_end: int | None = None  # the end of text, where nothing else may come


def bans_after(
    n_new: int, config: GenerationConfig, beginning: Beginning, bad_words_ids: list[list[int]],
    eos_id: int,
) -> Bans:  # fmt: skip
    """For the token that comes after `n_new` others; `config` has gone through `for_model`."""
    last = beginning.must_end and n_new + 1 == config.max_new_tokens
    return Bans(
        bad_words_ids, config.no_repeat_ngram_size or 0,
        eos_id if n_new < config.min_new_tokens else None, eos_id if last else None,
    )  # fmt: skip


def repeated(tokens: list[int], n: int) -> list[int]:
    """What would complete n tokens in a row that `tokens` has already."""
    end = tokens[len(tokens) - n + 1 :]  # the n - 1 before the next
    starts = range(len(tokens) - n + 1)
    return [tokens[i + n - 1] for i in starts if tokens[i : i + n - 1] == end]


def forbid(scores: Tensor, sequences: list[list[int]], bans: Bans) -> None:
    """Set the scores of tokens that may not come next to -inf, in place.

    Args:
        scores: (B, V), logits or log-probabilities.
        sequences: each row's tokens so far, a prompt of GPT-2 included.
        bans: where a sequence ends in all but the last token of one of its bad words, that last
            token is forbidden; one of a single token is forbidden everywhere.
    """
    if bans.too_early is not None:
        scores[:, bans.too_early] = -math.inf
    if bans.no_repeat:
        for row, tokens in enumerate(sequences):
            scores[row, repeated(tokens, bans.no_repeat)] = -math.inf
    for *beginning, last in bans.bad_words_ids:
        n = len(beginning)
        rows = [b for b, tokens in enumerate(sequences) if tokens[len(tokens) - n :] == beginning]
        scores[rows, last] = -math.inf
    if bans.must_end is not None:  # log p = 0, as in [2]
        scores.fill_(-math.inf)
        scores[:, bans.must_end] = 0.0


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

    u: (B,), fp64, uniform in [0, 1). A row of NaN gets the last token and so ends no other row.
    """
    cumulated = probabilities.cumsum(-1)  # (B, V)
    drawn = torch.searchsorted(cumulated, u[:, None] * cumulated[:, -1:], right=True)[:, 0]
    return drawn.clamp(max=probabilities.shape[-1] - 1)


def sample(probabilities: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One token per row, (B, V) -> (B,), by `draw`.

    Row b takes its u from its own generator on the CPU: the draw depends neither on the other rows
    nor on the device.
    """
    u = [torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators]
    return draw(probabilities, torch.cat(u).to(probabilities.device))


class Rows:
    """What the model has read so far of the rows of a batch, and the prefix that each row has."""

    def __init__(self, model: LanguageModel, beginning: Beginning, acts: Activations, n_new: int):
        self.model, self.acts, self.options = model, acts, beginning.options
        self.device = model.wte.weight.device
        max_len = max(len(tokens) for tokens in beginning.texts) + n_new
        self.cache = KVCache(model.config, len(beginning.texts), max_len, like=model.wte.weight)

    def read(self, texts: list[list[int]]) -> Tensor:
        """Logits after reading these tokens after each row's earlier ones: (B, V), fp32 or fp64.

        Rows of different lengths are padded on the right, where no real token sees the padding.
        The first call reads the prompts: an infix stands before the last token of each.
        """
        ids, lengths = right_padded(texts, self.device)
        at = torch.arange(len(texts), device=self.device) * ids.shape[1] + lengths - 1  # last ones
        infix = {} if self.acts.infix is False else {"starts": lengths - 1}
        last = self.model.hidden_states(
            ids, prefix=self.acts, kv_lens=lengths, cache=self.cache, at=at, **infix, **self.options
        )  # (B, C)
        self.acts = self.acts.passed()
        logits = self.model.head(last)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order and as often as they are named."""
        at = torch.tensor(rows, device=self.device)
        self.cache.select(at)
        self.acts = self.acts.select(at)
        self.options = {name: rows_of.select(at) for name, rows_of in self.options.items()}


def greedy_or_sampled(
    model: LanguageModel, prompts: list[list[int]], config: GenerationConfig, eos_id: int,
    acts: Activations, bad_words_ids: list[list[int]], seeds: Sequence[int],
) -> Iterator[dict[int, int]]:  # fmt: skip
    """At each step the next token of every prompt that has not ended: {b: token}, without eos."""
    config = config.for_model(model)
    beginning = begin(model, prompts, config, acts)
    batch = Rows(model, beginning, acts, config.max_new_tokens)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sequences = [list(tokens) for tokens in beginning.texts]  # by b; they grow
    rows, unread = list(range(len(prompts))), beginning.texts  # the b in each row of the batch
    for n_new in range(beginning.given, config.max_new_tokens):
        logits = batch.read(unread)  # (rows, V)
        now = bans_after(n_new, config, beginning, bad_words_ids, eos_id)
        forbid(logits, [sequences[b] for b in rows], now)
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
    """The beams of one prompt: K running ones and the K best that have ended, both best first.

    Args:
        prompt: what the model (a BART's decoder) reads first.
        config: `GenerationConfig.for_model`.
    """

    def __init__(self, prompt: list[int], config: GenerationConfig, eos_id: int):
        self.config, self.eos_id, self.prompt_len = config, eos_id, len(prompt)
        self.running = [Beam(0.0, prompt, parent=0)]  # one at first
        self.ended: list[Beam] = []
        self.done = False

    def extend(self, candidates: list[Beam], n_new: int) -> None:
        """Go on with the 2K best continuations, which have `n_new` new tokens; best first.

        At most K of them are ends (one eos per beam), so K remain to run on. An end counts only if
        it is among the first K. The search is done when K have ended and the best running beam,
        judged at its present length, does not beat the worst of them (early_stopping: whatever runs
        on); or at max_new_tokens, where every beam ends.
        """
        assert self.config.length_penalty is not None  # as `for_model` left it
        K, penalty = self.config.num_beams, n_new**self.config.length_penalty
        ends = [beam.tokens[-1] == self.eos_id for beam in candidates]
        at_limit = n_new == self.config.max_new_tokens
        for beam, end in zip(candidates[:K], ends, strict=False):
            if end or at_limit:
                self.ended.append(beam._replace(score=beam.score / penalty))
        self.ended = sorted(self.ended, key=lambda beam: -beam.score)[:K]
        self.running = [beam for beam, end in zip(candidates, ends, strict=True) if not end][:K]
        hope = self.running[0].score / penalty
        settled = self.config.early_stopping or (self.ended and hope <= self.ended[-1].score)
        self.done = at_limit or bool(len(self.ended) == K and settled)

    def best(self) -> list[int]:
        """New tokens of the best that has ended, without eos."""
        new = self.ended[0].tokens[self.prompt_len :]
        return new[:-1] if new[-1] == self.eos_id else new


def check_beams(config: GenerationConfig, vocab_size: int) -> None:
    """ValueError where there are fewer tokens than candidates."""
    K = config.num_beams
    if vocab_size < 2 * K:
        raise ValueError(
            f"num_beams {K} needs a vocabulary of {2 * K} tokens, the model has {vocab_size}"
        )


def beam_search(
    model: LanguageModel, prompts: list[list[int]], config: GenerationConfig, eos_id: int,
    acts: Activations, bad_words_ids: list[list[int]],
) -> list[list[int]]:  # fmt: skip
    """The best that `BeamSearch` finds for each prompt: its new tokens, without eos."""
    K, V = config.num_beams, model.config.vocab_size
    check_beams(config, V)
    config = config.for_model(model)
    beginning = begin(model, prompts, config, acts)
    batch = Rows(model, beginning, acts, config.max_new_tokens)
    searches = [BeamSearch(tokens, config, eos_id) for tokens in beginning.texts]
    active, unread, n_new = searches, beginning.texts, beginning.given
    while active:
        beams = [beam for search in active for beam in search.running]  # one per row of the batch
        log_p = batch.read(unread).log_softmax(-1)  # (rows, V)
        now = bans_after(n_new, config, beginning, bad_words_ids, eos_id)
        forbid(log_p, [beam.tokens for beam in beams], now)
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
