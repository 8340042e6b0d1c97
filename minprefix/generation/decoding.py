"""Decoding: from logits to tokens. Greedy, sampling and beam search over one batch of prompts.

A batch of prompts is read in one call; after that each call reads one token per row. The
activations of a prefix are computed once per batch and then only read (eq. (3) of Li & Liang 2021
[1]). They are not part of the cache, so rearranging the cache for beams and finished rows does not
touch them.

Read `GenerationConfig` and `Decided` in `config.py`, then `forbid`, `sampling_probabilities` and
`sample` (logits to token), `begin` (the first input; a BART encodes its prompts once), `Rows`,
then the two loops, `greedy_or_sampled` and `beam_search`. Shapes use the letters of
`models/gpt2.py`; b counts prompts, K beams.

A text ends when the model chooses one of its end tokens (`eos_ids`, any number of them), when it
has max_new_tokens new tokens, when a stop string appears (`stopping.py`), and when every token is
forbidden (`ENDED`), because a forbidden token is never written.

Beam search, forbidden words, the repetition penalty, top-k and top-p give exactly the tokens of
`generate` in transformers 5 [2], with one difference: [2] rounds logits to fp32 and adds log p in
fp32; here the search with an fp64 model is in fp64.

[1] https://arxiv.org/abs/2101.00190
[2] https://github.com/huggingface/transformers/tree/v5.23.0
"""

import math
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minprefix.generation.config import Decided
from minprefix.generation.stopping import known_ids
from minprefix.models.activations import Activations
from minprefix.models.base import LanguageModel
from minprefix.models.cache import KVCache, right_padded

ENDED = -1  # instead of a token: every token is forbidden, so the text ends


class Beginning(NamedTuple):
    """What the model reads before the first new token is chosen."""

    texts: list[list[int]]  # by prompt: GPT-2 reads the prompt, a BART's decoder its first tokens
    options: dict[str, Any] = {}  # of `hidden_states`: a BART's encoded sources  # noqa: RUF012
    given: int = 0  # new tokens that are already in the texts: 1 if the first one is forced
    must_end: int | None = None  # the forced last token, at max_new_tokens
    never: tuple[int, ...] = ()  # tokens that the model's checkpoint forbids
    never_first: tuple[int, ...] = ()
    last: int = 0  # how many new tokens come before the last possible one


def begin(
    model: LanguageModel, prompts: list[list[int]], config: Decided, acts: Activations
) -> Beginning:
    """What the model reads first for these prompts; the first new token may be forced."""
    given = int(model.config.forced_bos_token_id is not None)
    if config.max_new_tokens <= given:
        raise ValueError(
            f"max_new_tokens must be at least {given + 1}, as the first token is forced; got "
            f"{config.max_new_tokens}"
        )
    said = model.config
    lists = (said.suppress_tokens, said.begin_suppress_tokens)
    never, never_first = (known_ids(ids, said.vocab_size) for ids in lists)
    return Beginning(
        *model.begin(prompts, acts), given, said.forced_eos_token_id, never, never_first,
        last=config.max_new_tokens - 1,
    )  # fmt: skip


class Bans(NamedTuple):
    """Which tokens are forbidden at one step; `bans_after` derives it from the settings."""

    bad_words_ids: list[list[int]]
    no_repeat: int = 0  # n: no sequence of n tokens may occur twice
    tokens: tuple[int, ...] = ()  # the end of text, if it is too early, and suppressed tokens
    must_end: int | None = None  # the end of text, if nothing else may follow
    repetition_penalty: float = 1.0  # see `penalise`


def bans_after(
    n_new: int, config: Decided, beginning: Beginning, bad_words_ids: list[list[int]],
    eos_ids: tuple[int, ...],
) -> Bans:  # fmt: skip
    """The bans for the token after `n_new` new ones."""
    tokens = beginning.never
    if n_new == beginning.given:
        tokens += beginning.never_first
    if n_new < config.min_new_tokens:
        tokens += eos_ids
    last = n_new + 1 == config.max_new_tokens
    return Bans(
        bad_words_ids, config.no_repeat_ngram_size, tokens,
        beginning.must_end if last else None, config.repetition_penalty,
    )  # fmt: skip


def penalise(scores: Tensor, seen: Tensor, penalty: float) -> None:
    """Make earlier tokens less likely, in place: their scores s become s / penalty, or s * penalty
    if s < 0.

    Args:
        scores: (B, V). seen: (B, n) int, tokens of each row; -1 = none.
    Source: Keskar et al. 2019 (arXiv:1909.05858), section 4.1.
    """
    V = scores.shape[-1]
    there = torch.zeros(len(scores), V + 1, dtype=torch.bool, device=scores.device)
    there = there.scatter_(1, seen.where(seen >= 0, V), True)[:, :V]
    lower = torch.where(scores < 0, scores * penalty, scores / penalty)
    scores.copy_(torch.where(there, lower, scores))


def repeated(tokens: list[int], n: int) -> list[int]:
    """The tokens that would complete a sequence of n tokens which `tokens` already contains."""
    end = tokens[len(tokens) - n + 1 :]  # the n - 1 tokens before the next one
    starts = range(len(tokens) - n + 1)
    return [tokens[i + n - 1] for i in starts if tokens[i : i + n - 1] == end]


def forbid(scores: Tensor, sequences: list[list[int]], bans: Bans) -> None:
    """Lower the scores of earlier tokens and set those of forbidden tokens to -inf, in place.

    Args:
        scores: (B, V), logits or log-probabilities.
        sequences: each row's tokens so far, including a prompt of GPT-2.
        bans: the last token of a bad word is forbidden if the sequence ends in the tokens before
            it; a bad word of a single token is always forbidden.
    """
    if bans.repetition_penalty != 1:
        longest = max(map(len, sequences))
        seen = [tokens + [-1] * (longest - len(tokens)) for tokens in sequences]
        penalise(scores, torch.tensor(seen, device=scores.device), bans.repetition_penalty)
    for token in bans.tokens:
        scores[:, token] = -math.inf
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


def widest(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device: Apple's GPUs have no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def allowed(tokens: Tensor, largest: Tensor) -> Tensor:
    """The chosen tokens (B,), or ENDED in rows whose largest score (B,) is that of a forbidden
    token."""
    return tokens.masked_fill(largest == -math.inf, ENDED)


def sampling_probabilities(logits: Tensor, config: Decided) -> Tensor:
    """softmax(logits / temperature), restricted to the top k and then the top p: (B, V), in the
    device's `widest` type. A row in which every token is forbidden is NaN."""
    scores = logits.to(widest(logits.device))
    # subtract the largest before the division, so that a tiny temperature gives no inf - inf
    scores = (scores - scores.amax(-1, keepdim=True)) / config.temperature
    if config.top_k:
        kth = scores.topk(min(config.top_k, scores.shape[-1])).values[:, -1:]  # (B, 1)
        scores = scores.masked_fill(scores < kth, -math.inf)
    if config.top_p < 1:
        p, order = scores.softmax(-1).sort(-1, descending=True)
        dropped = p.cumsum(-1) - p >= config.top_p  # the tokens before it have reached top_p
        dropped = torch.zeros_like(dropped).scatter(-1, order, dropped)
        scores = scores.masked_fill(dropped, -math.inf)
    return scores.softmax(-1)


def draw(probabilities: Tensor, u: Tensor) -> Tensor:
    """One token per row, (B, V) -> (B,): the first at which the cumulated probability exceeds u.

    u: (B,), in the type of the probabilities, uniform in [0, 1). A row of NaN gets the last token,
        so that it does not disturb the other rows.
    """
    cumulated = probabilities.cumsum(-1)  # (B, V)
    drawn = torch.searchsorted(cumulated, u[:, None] * cumulated[:, -1:], right=True)[:, 0]
    return drawn.clamp(max=probabilities.shape[-1] - 1)


def sample(probabilities: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One token per row, (B, V) -> (B,), by `draw`.

    Row b draws u with its own generator on the CPU, so the token depends neither on the other rows
    nor on the device.
    """
    u = [torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators]
    return draw(probabilities, torch.cat(u).to(probabilities.dtype).to(probabilities.device))


class Rows:
    """The rows of a batch: what the model has read so far, and the prefix of each row."""

    def __init__(self, model: LanguageModel, beginning: Beginning, acts: Activations, n_new: int):
        self.model, self.acts, self.options = model, acts, beginning.options
        self.device = model.wte.weight.device
        max_len = max(len(tokens) for tokens in beginning.texts) + n_new
        self.cache = KVCache(model.config, len(beginning.texts), max_len, like=model.wte.weight)

    def read(self, texts: list[list[int]]) -> Tensor:
        """Append these tokens to the rows; returns the next logits (B, V), fp32 or fp64.

        Rows of different lengths are padded on the right, where no real token sees the padding.
        The first call reads the prompts; an infix is before the last token of each.
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
        """Keep these rows, in this order; a row that is named twice is duplicated."""
        at = torch.tensor(rows, device=self.device)
        self.cache.select(at)
        self.acts = self.acts.select(at)
        self.options = {name: rows_of.select(at) for name, rows_of in self.options.items()}


def greedy_or_sampled(
    model: LanguageModel, prompts: list[list[int]], config: Decided,
    eos_ids: tuple[int, ...], acts: Activations, bad_words_ids: list[list[int]],
    seeds: Sequence[int], stopped: Container[int] = (),
) -> Iterator[dict[int, int]]:  # fmt: skip
    """Yields, at each step, the next token of every prompt that has not ended: {b: token}. End
    tokens are not yielded.

    Args:
        stopped: the b that end after their last token; the caller may change it between steps.
    """
    beginning = begin(model, prompts, config, acts)
    batch = Rows(model, beginning, acts, config.max_new_tokens)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    sequences = [list(tokens) for tokens in beginning.texts]  # by b; they grow
    rows, unread = list(range(len(prompts))), beginning.texts  # rows: the b of each row
    for n_new in range(beginning.given, config.max_new_tokens):
        logits = batch.read(unread)  # (rows, V)
        now = bans_after(n_new, config, beginning, bad_words_ids, eos_ids)
        forbid(logits, [sequences[b] for b in rows], now)
        largest, tokens = logits.max(-1)
        if config.do_sample:
            probabilities = sampling_probabilities(logits, config)
            tokens = sample(probabilities, [generators[b] for b in rows])

        pairs = zip(rows, allowed(tokens, largest).tolist(), strict=True)
        chosen = {b: token for b, token in pairs if token not in (ENDED, *eos_ids)}
        if chosen:
            yield chosen
        chosen = {b: token for b, token in chosen.items() if b not in stopped}
        if not chosen:
            return
        if len(chosen) < len(rows):
            batch.select([row for row, b in enumerate(rows) if b in chosen])
        for b, token in chosen.items():
            sequences[b].append(token)
        rows, unread = list(chosen), [[token] for token in chosen.values()]


class Beam(NamedTuple):
    """A continuation of one prompt."""

    score: float  # sum of log p of its new tokens, nats; once it has ended, with the penalty
    tokens: list[int]  # prompt and new tokens
    parent: int  # the row of the batch that it continues


class BeamSearch:
    """The beams of one prompt: K running ones and the K best that have ended, both best first.

    A continuation by a forbidden token has the score -inf. It may keep running to fill up the K
    beams, but it and its continuations keep this score and are never chosen.

    Args:
        prompt: what the model (or a BART's decoder) reads first.
        ends: tells whether the new tokens of a text end it.
    """

    def __init__(self, prompt: list[int], config: Decided, ends: Callable[[list[int]], bool]):
        self.config, self.ends, self.prompt_len = config, ends, len(prompt)
        self.running = [Beam(0.0, prompt, parent=0)]  # at first a single beam
        self.ended: list[Beam] = []
        self.done = False

    def extend(self, candidates: list[Beam], n_new: int) -> None:
        """Continue with the best candidates (`n_candidates`), which have `n_new` new tokens.

        There are enough candidates that K of them do not end. One that ends counts only if it is
        among the first K. The search is done

          - when K beams have ended and the best running beam, scored at its present length, does
            not beat the worst of them (early_stopping=True: as soon as K have ended; "never": the
            running beam is scored at max_new_tokens if the penalty favours longer texts);
          - at max_new_tokens, where every beam ends;
          - when every token is forbidden to every beam: they end as they are.
        """
        K, power = self.config.num_beams, self.config.length_penalty
        ends = [self.ends(beam.tokens[self.prompt_len :]) for beam in candidates]
        at_limit = n_new == self.config.max_new_tokens
        ended = [
            beam._replace(score=beam.score / n_new**power)
            for beam, end in zip(candidates[:K], ends, strict=False)
            if (end or at_limit) and beam.score > -math.inf
        ]
        if all(beam.score == -math.inf for beam in candidates):
            length = max(n_new - 1, 1)
            ended = [beam._replace(score=beam.score / length**power) for beam in self.running]
            ended = [beam for beam in ended if beam.score > -math.inf]
        self.ended = sorted(self.ended + ended, key=lambda beam: -beam.score)[:K]
        self.running = [beam for beam, end in zip(candidates, ends, strict=True) if not end][:K]
        # stop strings may end more of them; K rows continue in any case
        short = K - len(self.running)
        self.running += [beam._replace(score=-math.inf) for beam in candidates[:short]]
        never = self.config.early_stopping == "never" and power > 0
        hope = self.running[0].score / (self.config.max_new_tokens if never else n_new) ** power
        stops = self.config.early_stopping is True
        settled = stops or (self.ended and hope <= self.ended[-1].score)
        dead = self.running[0].score == -math.inf
        self.done = at_limit or dead or bool(len(self.ended) == K and settled)

    def best(self) -> list[list[int]]:
        """The new tokens, including end tokens, of the num_return_sequences best ended beams. If
        fewer have ended, the best one is repeated."""
        n = self.config.num_return_sequences
        found = self.ended[:n] or self.running[:1]  # none has ended if all scores are NaN
        texts = [beam.tokens[self.prompt_len :] for beam in found]
        return texts + texts[:1] * (n - len(texts))


def n_candidates(config: Decided, eos_ids: tuple[int, ...], vocab_size: int) -> int:
    """How many continuations of a prompt's beams are needed so that at least K do not end.

    Raises:
        ValueError: the vocabulary has fewer tokens.
    """
    n = max(2, 1 + len(eos_ids)) * config.num_beams
    if vocab_size < n:
        raise ValueError(
            f"num_beams {config.num_beams} needs a vocabulary of {n} tokens, the model has "
            f"{vocab_size}"
        )
    return n


def beam_search(
    model: LanguageModel, prompts: list[list[int]], config: Decided,
    eos_ids: tuple[int, ...], acts: Activations, bad_words_ids: list[list[int]],
    ends: Callable[[list[int]], bool],
) -> list[list[int]]:  # fmt: skip
    """The new tokens, including end tokens, of the best texts that `BeamSearch` finds:
    num_return_sequences texts of the first prompt, then those of the second, ...

    Args:
        ends: tells whether the new tokens of a text end it, by one of eos_ids or a stop string.
    """
    V = model.config.vocab_size
    n_best = n_candidates(config, eos_ids, V)
    beginning = begin(model, prompts, config, acts)
    batch = Rows(model, beginning, acts, config.max_new_tokens)
    searches = [BeamSearch(tokens, config, ends) for tokens in beginning.texts]
    active, unread, n_new = searches, beginning.texts, beginning.given
    while active:
        beams = [beam for search in active for beam in search.running]  # one per row of the batch
        log_p = batch.read(unread).log_softmax(-1)  # (rows, V)
        now = bans_after(n_new, config, beginning, bad_words_ids, eos_ids)
        forbid(log_p, [beam.tokens for beam in beams], now)
        scores = log_p + log_p.new_tensor([beam.score for beam in beams])[:, None]
        best = scores.view(len(active), -1).topk(n_best)  # of a prompt's beams * V continuations

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
    return [text for search in searches for text in search.best()]
