"""Generation: from prompts to texts, token by token. Greedy, sampling and beam search.

A batch of prompts is read in one call; after that each call reads one token per row. A prefix is
made into activations once per batch and then only read (eq. (3) of Li & Liang 2021 [1]): it is no
part of the cache, so beams and finished rows rearrange the cache without touching it.

`generate` is the function to use, `stream` gives its text as it comes. Read from the top: from
logits to a token (`forbid`, `sampling_probabilities`, `sample`), what the model has read (`Batch`),
then the two loops, `greedy_or_sampled` and `beam_search`; the rest checks arguments and makes
batches. Shapes use the letters of the README's table; b numbers prompts, K is the number of beams.

Greedy and beam search give the tokens of `generate` in transformers 5.23 [2]; forbidden words,
top-k and top-p mean the same. One difference: [2] rounds logits to fp32 and adds log p in fp32,
here an fp64 model is searched in fp64.

[1] https://arxiv.org/abs/2101.00190
[2] https://github.com/huggingface/transformers/tree/v5.23.0/src/transformers/generation
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minprefix.batches import encode_prompt
from minprefix.gpt2 import GPT2, KVCache, PrefixActivations
from minprefix.prefix import Prefix, PrefixBank


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


def sample(probabilities: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One token per row, (B, V) -> (B,): the first at which the cumulated probability exceeds u.

    Row b takes its u, uniform in [0, 1), from its own generator on the CPU: the draw depends
    neither on the other rows nor on the device.
    """
    u = [torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators]
    u = torch.cat(u).to(probabilities.device)[:, None]  # (B, 1)
    cumulated = probabilities.cumsum(-1)  # (B, V)
    return torch.searchsorted(cumulated, u * cumulated[:, -1:], right=True)[:, 0]


class Batch:
    """What the model has read so far of the rows of a batch, and the prefix that each row has."""

    def __init__(self, model: GPT2, prompts: list[list[int]], acts: PrefixActivations, n_new: int):
        self.model, self.acts = model, acts
        self.device = model.wte.weight.device
        max_len = max(len(tokens) for tokens in prompts) + n_new
        self.cache = KVCache(model.config, len(prompts), max_len, like=model.wte.weight)

    def read(self, texts: list[list[int]]) -> Tensor:
        """Logits after reading these tokens behind each row's earlier ones: (B, V), fp32 or fp64.

        Rows of different lengths are padded on the right, where no real token sees the padding.
        """
        lengths = torch.tensor([len(tokens) for tokens in texts], device=self.device)  # (B,)
        T = max(len(tokens) for tokens in texts)
        ids = torch.tensor([tokens + [0] * (T - len(tokens)) for tokens in texts])  # (B, T)
        hidden = self.model.hidden_states(
            ids.to(self.device), prefix=self.acts, kv_lens=lengths, cache=self.cache
        )  # (B, T, C)
        last = hidden[torch.arange(len(texts), device=self.device), lengths - 1]  # (B, C)
        logits = F.linear(last, self.model.wte.weight)
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
    batch = Batch(model, prompts, acts, config.max_new_tokens)
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


def beam_search(
    model: GPT2, prompts: list[list[int]], config: GenerationConfig, eos_id: int,
    acts: PrefixActivations, bad_words_ids: list[list[int]],
) -> list[list[int]]:  # fmt: skip
    """The best that `BeamSearch` finds for each prompt: its new tokens, without eos."""
    K, V = config.num_beams, model.config.vocab_size
    if 2 * K > V:
        raise ValueError(f"num_beams {K} needs a vocabulary of {2 * K} tokens, the model has {V}")
    batch = Batch(model, prompts, acts, config.max_new_tokens)
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


@contextmanager
def eval_mode(model: GPT2) -> Iterator[None]:
    """No dropout inside; the model's state before comes back at the end."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def check_tokens(prompts: list[list[int]], vocab_size: int) -> None:
    """ValueError for a prompt without tokens or of tokens that the model does not know."""
    for b, tokens in enumerate(prompts):
        if not tokens:
            raise ValueError(
                f"prompt {b} has no tokens, so nothing predicts the first one (a prefix is only "
                "read by tokens): give [tokenizer.bos_id] to start from nothing"
            )
        if min(tokens) < 0 or max(tokens) >= vocab_size:
            raise ValueError(f"prompt {b} has ids outside [0, {vocab_size - 1}]: {tokens}")


def check_fit(prompt_len: int, offset: int, config: GenerationConfig, n_positions: int) -> None:
    """ValueError if a prompt and what is generated after it need more positions than there are."""
    if prompt_len + offset + config.max_new_tokens > n_positions:
        raise ValueError(
            f"too long: {prompt_len} prompt tokens + position offset {offset} + max_new_tokens "
            f"{config.max_new_tokens} > {n_positions} positions of the model"
        )


def rows_of_prefix(prefix, prefix_index, n_prompts: int) -> tuple[list[int] | None, list[int]]:
    """By prompt: which prefix of the bank it uses (None without a bank), its position offset."""
    if not isinstance(prefix, PrefixBank):
        if prefix_index is not None:
            raise ValueError(f"prefix_index {prefix_index} needs a PrefixBank")
        return None, [0 if prefix is None else prefix.position_offset] * n_prompts
    N = len(prefix.prefixes)
    index = [int(n) for n in (range(N) if prefix_index is None else prefix_index)]
    if len(index) != n_prompts:
        raise ValueError(f"prefix_index has {len(index)} entries for {n_prompts} prompts")
    if any(not -1 <= n < N for n in index):
        raise ValueError(f"prefix_index must lie in [-1, {N - 1}], got {index}")
    return index, [0 if n < 0 else prefix.prefixes[n].position_offset for n in index]


def prepare(
    model: GPT2, tokenizer, prompts, prefix, prefix_index, config: GenerationConfig
) -> tuple[list[list[int]], list[int] | None, list[int]]:
    """Token ids, index into the bank and position offset of each prompt; ValueError if unfit."""
    index, offsets = rows_of_prefix(prefix, prefix_index, len(prompts))
    ids = []
    for b, prompt in enumerate(prompts):
        own = prefix if index is None else prefix.prefixes[index[b]] if index[b] >= 0 else None
        if not isinstance(prompt, str):
            ids.append(list(prompt))
        elif own is not None and own.linearisation:
            ids.append(encode_prompt(tokenizer, prompt, own.linearisation))
        else:
            ids.append(tokenizer.encode(prompt))
    check_tokens(ids, model.config.vocab_size)
    for tokens, offset in zip(ids, offsets, strict=True):
        check_fit(len(tokens), offset, config, model.config.n_positions)
    if prefix is not None:
        prefix.check_base(model)
    return ids, index, offsets


def activations(
    model: GPT2, prefix, index: list[int] | None, offsets: list[int]
) -> PrefixActivations:
    """What the model reads of each row's prefix."""
    if prefix is None:
        return PrefixActivations.empty(model.config, model.wte.weight)
    if index is None:
        return prefix.activations()
    acts = prefix.activations(torch.tensor(index, device=model.wte.weight.device))
    # the bank's largest offset may be that of a prefix which no row here uses
    return replace(acts, max_offset=max(offsets))


@torch.inference_mode()
def generate_ids(
    model: GPT2, prompts: list[list[int]], config: GenerationConfig, eos_id: int, *,
    prefix: Prefix | PrefixBank | None = None, prefix_index: Sequence[int] | Tensor | None = None,
    bad_words_ids: Sequence[Sequence[int]] = (), seeds: Sequence[int] | None = None,
) -> list[list[int]]:  # fmt: skip
    """Continue one batch of prompts, at least one: the new tokens of each, without eos.

    Args:
        prompts: token ids, of any lengths. They are padded to the longest, so the longest must fit
            beside the largest position offset (`generate` makes batches that do).
        config: its bad_words are texts and not read here.
        eos_id: the token that ends a text.
        prefix, prefix_index: as in `generate`; `prefix.check_base` is left to the caller.
        bad_words_ids: token sequences that are never completed. A lone eos_id among them is
            ignored, as in [2]; min_new_tokens is for that.
        seeds: for sampling, one per prompt; None = config.seed + b.
    Raises:
        ValueError: a prompt that is empty or too long, an index that does not fit.
    """
    index, offsets = rows_of_prefix(prefix, prefix_index, len(prompts))
    check_tokens(prompts, model.config.vocab_size)
    check_fit(max(map(len, prompts)), max(offsets), config, model.config.n_positions)
    bad_words_ids = [list(word) for word in bad_words_ids if list(word) != [eos_id]]
    if seeds is None:
        seeds = [config.seed + b for b in range(len(prompts))]

    with eval_mode(model):
        acts = activations(model, prefix, index, offsets)
        args = (model, prompts, config, eos_id, acts, bad_words_ids)
        if config.num_beams > 1:
            return beam_search(*args)
        new = [[] for _ in prompts]
        for tokens in greedy_or_sampled(*args, seeds):
            for b, token in tokens.items():
                new[b].append(token)
        return new


def batches(lengths: list[int], offsets: list[int], batch_size: int, room: int) -> list[list[int]]:
    """The numbers of the prompts in batches, the longest first, so that there is little padding.

    A prompt is padded to the longest of its batch; with its position offset that may be at most
    `room`, or the padding would stand past the model's last position.
    """
    result: list[list[int]] = []
    for b in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
        batch = result[-1] if result else []
        if 0 < len(batch) < batch_size and lengths[batch[0]] + offsets[b] <= room:
            batch.append(b)
        else:
            result.append([b])
    return result


def stream(
    model: GPT2, tokenizer, prompt: str | list[int], *,
    prefix: Prefix | PrefixBank | None = None, prefix_index: int | None = None,
    config: GenerationConfig | None = None, **options,
) -> Iterator[str]:  # fmt: skip
    """What `generate` gives for one prompt, piece by piece as it comes; greedy or sampling.

    A character that consists of several tokens waits for its last. The model is in eval mode until
    the iterator ends or is dropped. Beam search knows its text only at the end, so num_beams > 1 is
    a ValueError; other arguments and errors are those of `generate`.
    """
    config = replace(config or GenerationConfig(), **options)
    if config.num_beams > 1:
        raise ValueError(f"beam search cannot stream, got num_beams={config.num_beams}")
    prefix_index = None if prefix_index is None else [prefix_index]
    ids, index, offsets = prepare(model, tokenizer, [prompt], prefix, prefix_index, config)
    bad_words_ids = [tokenizer.encode(word) for word in config.bad_words]

    @torch.inference_mode()  # of a generator: while it runs, not between its tokens
    def new_tokens() -> Iterator[int]:
        with eval_mode(model):
            acts = activations(model, prefix, index, offsets)
            args = (model, ids, config, tokenizer.eos_id, acts, bad_words_ids, [config.seed])
            for chosen in greedy_or_sampled(*args):
                yield chosen[0]

    return tokenizer.decode_stream(new_tokens())


def generate(
    model: GPT2, tokenizer, prompts: Sequence[str | list[int]], *,
    prefix: Prefix | PrefixBank | None = None, prefix_index: Sequence[int] | Tensor | None = None,
    batch_size: int = 64, config: GenerationConfig | None = None,
    progress: Callable[[int, int], None] | None = None, **options,
) -> list[str]:  # fmt: skip
    """Continue prompts: the new text of each, in their order.

        generate(model, tokenizer, ["name : The Eagle"], prefix=prefix, num_beams=5)

    Args:
        prompts: a list of token ids is taken as it is. A text is encoded in the frame that its
            prefix was trained in (`Prefix.linearisation`), as it is if there is none.
        prefix: for all prompts, or a bank.
        prefix_index: with a bank, one int per prompt: which prefix it uses, -1 = none. None = as
            many prompts as prefixes, in the same order.
        batch_size: prompts at a time; it changes no text (beyond rounding).
        config, options: how tokens are chosen; options replace fields of config.
        progress: called after each batch with (prompts done, prompts in all).
    Raises:
        ValueError: before any work, for options that make no sense, a prompt that is empty or too
            long, an index that does not fit, or a prefix of another model.
    """
    config = replace(config or GenerationConfig(), **options)
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of texts, got one text: {prompts!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    ids, index, offsets = prepare(model, tokenizer, prompts, prefix, prefix_index, config)
    bad_words_ids = [tokenizer.encode(word) for word in config.bad_words]
    texts: dict[int, str] = {}
    room = model.config.n_positions - config.max_new_tokens
    for batch in batches([len(tokens) for tokens in ids], offsets, batch_size, room):
        new = generate_ids(
            model, [ids[b] for b in batch], config, tokenizer.eos_id,
            prefix=prefix, prefix_index=None if index is None else [index[b] for b in batch],
            bad_words_ids=bad_words_ids, seeds=[config.seed + b for b in batch],
        )  # fmt: skip
        texts |= {b: tokenizer.decode(tokens) for b, tokens in zip(batch, new, strict=True)}
        if progress is not None:
            progress(len(texts), len(ids))
    return [texts[b] for b in range(len(ids))]
