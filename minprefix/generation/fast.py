"""Fast generation: the tokens of `decoding.py` from caches that stay where they are.

`decoding.py` defines what is generated; this file gives the same tokens and does less for them:

  - Keys and values are written once, into memory allocated once (`RowCache`); a row that has ended
    is overwritten by a running one instead of copying all others (`order_without`).
  - The K beams of a prompt are K queries of one row (`BeamCache`). They read the prompt's keys
    once, not K times, and nothing is copied when beams are reordered: token n of beam i stays in
    slot n K + i, and each beam sees the slots of its ancestors. Attention over the prompt (with the
    prefix) and over the slots are merged by their log-sum-exps.
  - Tokens are chosen, and forbidden ones found, on the model's device.
  - On a GPU a step is a CUDA graph for each bucket of rows and of columns (`Decoding.step`), so it
    costs one launch; the next step is launched before the host looks at the tokens of this one
    (`Sent`). MINPREFIX_CUDA_GRAPHS=0 turns graphs off.

The prefix stays an argument of attention and in no cache, as everywhere. Read `caches.py`,
`Decoding`, then the loops `greedy_or_sampled` and `beam_search`, whose arguments and
results are those of their namesakes in `decoding.py`. Shapes use the letters of the README's table;
b counts prompts, K beams.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from minprefix.generation import caches
from minprefix.generation.caches import BeamCache, RowCache
from minprefix.generation.decoding import (
    Bans,
    Beam,
    BeamSearch,
    Beginning,
    GenerationConfig,
    bans_after,
    begin,
    check_beams,
    draw,
    sampling_probabilities,
)
from minprefix.generation.graphs import capture, round_up, uses_graphs
from minprefix.models.activations import Activations
from minprefix.models.base import LanguageModel
from minprefix.models.cache import right_padded


def row_bucket(rows: int) -> int:
    """The power of two at or above."""
    return 1 << (rows - 1).bit_length()


def order_without(ended: list[bool]) -> list[int]:
    """The rows to keep; the last ones stand in the places of those that have ended.

    [no, yes, no, yes, no] -> [0, 4, 2]: row 4 moves, rows 0 and 2 stay where they are.
    """
    kept = [row for row, end in enumerate(ended) if not end]
    movers = iter(reversed(kept))
    return [next(movers) if ended[row] else row for row in range(len(kept))]


class Decoding:
    """A batch of prompts: its cache, its prefix, and the graphs of its steps.

    It holds no reference to the model, so that a batch can be kept for as long as its model lives.
    """

    def __init__(self, key: tuple, cache: RowCache | BeamCache, acts: Activations, K: int):
        self.key = key
        self.cache: Any = cache
        prompts = cache if isinstance(cache, RowCache) else cache.prompts
        self.max_rows = len(prompts.lengths)
        self.ids = prompts.lengths.new_zeros(self.max_rows, K)  # what a step reads
        self.acts = acts.with_room(self.max_rows)
        self.options: dict[str, Any] = {}  # of `hidden_states`: a BART's encoded sources
        self.graphs: dict[tuple[int, int], Callable[[], Tensor]] = {}

    def read(self, model: LanguageModel, beginning: Beginning, acts: Activations) -> Tensor:
        """Logits after the prompts, all in one call: (B, V), fp32 or fp64."""
        self.acts = self.acts.overwritten(acts.passed())
        self.cache.fill(beginning.texts)
        self.options = beginning.options
        ids, lengths = right_padded(beginning.texts, self.ids.device)
        at = torch.arange(len(ids), device=ids.device) * ids.shape[1] + lengths - 1  # last tokens
        infix = {} if acts.infix is False else {"starts": lengths - 1}
        last = model.hidden_states(
            ids, prefix=acts, kv_lens=lengths, cache=self.cache, at=at, **infix, **self.options
        )  # (B, C)
        self.use(len(ids))
        return head(model, last)

    def step(self, model: LanguageModel, tokens: Tensor) -> Tensor:
        """Logits after one token more for each row or beam: (rows, K) -> (rows, K, V)."""
        rows = self.cache.rows
        self.ids[: len(tokens)] = tokens

        def run() -> Tensor:
            hidden = model.hidden_states(
                self.ids[:rows], prefix=self.acts.first(rows), cache=self.cache, **self.options
            )
            return head(model, hidden)

        if self.cache.static:
            bucket = (rows, self.cache.columns)
            if bucket not in self.graphs:
                self.graphs[bucket] = capture(run, self.ids.device)
            logits = self.graphs[bucket]()
        else:
            logits = run()
        self.cache.count()
        return logits[: len(tokens)]

    def use(self, rows: int) -> None:
        """The next steps are for so many rows."""
        self.cache.rows = min(row_bucket(rows), self.max_rows) if self.cache.static else rows

    def worth_moving(self, rows: int) -> bool:
        """Whether steps for so many rows are smaller than they are now."""
        return (row_bucket(rows) if self.cache.static else rows) < self.cache.rows

    def keep(self, order: list[int]) -> None:
        """Row i is from now on what row order[i] was."""
        self.options = {name: rows_of.keep(order) for name, rows_of in self.options.items()}
        moved = [(to, source) for to, source in enumerate(order) if to != source]
        if moved:
            to, source = (list(rows) for rows in zip(*moved, strict=True))
            self.cache.move(to, source)
            self.acts.move(to, source)
        self.use(len(order))


def head(model: LanguageModel, hidden: Tensor) -> Tensor:
    """Logits in fp32 or fp64: (..., C) -> (..., V)."""
    logits = model.head(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


KEPT: WeakKeyDictionary[LanguageModel, Decoding] = (
    WeakKeyDictionary()
)  # the last batch, for its graphs


def take_batch(model: LanguageModel, prompts, config: GenerationConfig, acts: Any) -> Decoding:
    """A batch with room for the prompts (what is read first); the kept one if it fits.

    `KEPT` has it back afterwards. While it is taken, another generation with the same model makes
    its own.
    """
    like, K, acts = model.wte.weight, config.num_beams, acts.passed()
    static = uses_graphs(like.device) and model.captures
    rows, prompt_len, n_new = len(prompts), max(map(len, prompts)), config.max_new_tokens
    key = ()
    if static:  # what graphs depend on: sizes, and the addresses of the weights
        rows = row_bucket(rows)
        prompt_len, n_new = (
            round_up(prompt_len, caches.COLUMNS),
            round_up(n_new, caches.COLUMNS // 4),
        )
        sizes = tuple((name, x.shape, x.dtype) for name, x in acts.tensors().items())
        offset = None if acts.index is not None else acts.position_offset
        weights = tuple((x.data_ptr(), x.dtype) for x in model.parameters())
        key = (rows, prompt_len, n_new, K, sizes, offset, weights)
        kept = KEPT.pop(model, None)
        if kept is not None and kept.key == key:
            return kept
        del kept
    cache = RowCache(model.config, rows, prompt_len + (n_new if K == 1 else 0), like, static)
    return Decoding(key, cache if K == 1 else BeamCache(cache, K, n_new), acts, K)


def give_back(model: LanguageModel, batch: Decoding) -> None:
    if batch.cache.static:
        KEPT[model] = batch


class Sent:
    """A tensor on its way to the host, while the GPU works on."""

    def __init__(self, x: Tensor):
        self.x = x.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if x.is_cuda else None
        if self.arrived is not None:
            self.arrived.record(torch.cuda.current_stream(x.device))

    def get(self) -> Any:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.x.tolist()


class Forbidden:
    """Forbidden tokens, as `decoding.forbid` has them, found on the device.

    `recent` are the last tokens of each row, -1 before its first: as many as the longest bad word
    needs, or all so far where no n tokens may come twice.
    """

    def __init__(self, bad_words_ids: list[list[int]], no_repeat: int, device: torch.device):
        self.no_repeat = no_repeat
        self.words = [(torch.tensor(word[:-1], device=device, dtype=torch.long), word[-1])
                      for word in bad_words_ids]  # fmt: skip
        self.window = max((len(word) - 1 for word in bad_words_ids), default=0)  # tokens needed

    def recent(self, prompts: list[list[int]], device: torch.device) -> Tensor:
        """Of the prompts: (B, window)."""
        if self.no_repeat:
            self.window = max(self.window, self.no_repeat - 1, *map(len, prompts))
        W = self.window
        recent = [([-1] * W + tokens)[len(tokens) :] for tokens in prompts]
        return torch.tensor(recent, device=device, dtype=torch.long)

    def followed(self, recent: Tensor, tokens: Tensor) -> Tensor:
        """(..., window) and one token more of each (...)."""
        kept = recent if self.no_repeat else recent[..., 1:]
        return torch.cat([kept, tokens[..., None]], dim=-1) if self.window else recent

    def forbid(self, scores: Tensor, recent: Tensor, bans: Bans) -> None:
        """Set the scores (rows, V) of tokens that may not come after `recent` to -inf, in place."""
        if bans.too_early is not None:
            scores[:, bans.too_early] = float("-inf")
        if self.no_repeat:
            self._forbid_repeats(scores, recent)
        for beginning, last in self.words:
            hit = (recent[:, recent.shape[1] - len(beginning) :] == beginning).all(1)
            scores[:, last].masked_fill_(hit, float("-inf"))
        if bans.must_end is not None:
            scores.fill_(float("-inf"))
            scores[:, bans.must_end] = 0.0

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


def greedy_or_sampled(
    model: LanguageModel, prompts: list[list[int]], config: GenerationConfig, eos_id: int,
    acts: Activations, bad_words_ids: list[list[int]], seeds: Sequence[int],
) -> Iterator[dict[int, int]]:  # fmt: skip
    """At each step the next token of every prompt that has not ended: {b: token}, without eos."""
    config = config.for_model(model)
    beginning = begin(model, prompts, config, acts)
    batch = take_batch(model, beginning.texts, config, acts)
    ahead, device = batch.cache.static, batch.ids.device
    words = Forbidden(bad_words_ids, config.no_repeat_ngram_size or 0, device)
    recent, u = words.recent(beginning.texts, device), None
    if config.do_sample:  # all draws at once: (B, max_new_tokens)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        u = [torch.rand(config.max_new_tokens, generator=generator, dtype=torch.float64)
             for generator in generators]  # fmt: skip
        u = torch.stack(u).to(device)
    rows: list[int | None] = list(range(len(prompts)))  # the b in each row; None = it has ended
    try:
        logits = batch.read(model, beginning, acts)  # (rows, V)
        for n_new in range(beginning.given, config.max_new_tokens):
            now = bans_after(n_new, config, beginning, bad_words_ids, eos_id)
            words.forbid(logits, recent, now)
            if u is None:
                tokens = logits.argmax(-1)  # (rows,)
            else:
                drawn = u[:, n_new - beginning.given]
                tokens = draw(sampling_probabilities(logits, config), drawn)
            sent, at_limit = Sent(tokens), n_new + 1 == config.max_new_tokens
            recent = words.followed(recent, tokens)
            if ahead and not at_limit:  # the GPU reads the tokens while the host waits for them
                logits = batch.step(model, tokens[:, None])[:, 0]

            pairs = list(zip(rows, sent.get(), strict=True))
            chosen = {b: token for b, token in pairs if b is not None and token != eos_id}
            rows = [b if b in chosen else None for b in rows]
            if not chosen:
                return
            yield chosen
            if at_limit:
                return
            if batch.worth_moving(len(chosen)):
                order = order_without([b is None for b in rows])
                batch.keep(order)
                rows = [rows[row] for row in order]
                logits, tokens, recent = logits[order], tokens[order], recent[order]
                u = None if u is None else u[order]
            if not ahead:
                logits = batch.step(model, tokens[:, None])[:, 0]
    finally:
        give_back(model, batch)


def beam_search(
    model: LanguageModel, prompts: list[list[int]], config: GenerationConfig, eos_id: int,
    acts: Activations, bad_words_ids: list[list[int]],
) -> list[list[int]]:  # fmt: skip
    """The best that `BeamSearch` finds for each prompt: its new tokens, without eos.

    The beams that run on are chosen on the device; `BeamSearch` follows on the host and says when a
    prompt is done.
    """
    K, V = config.num_beams, model.config.vocab_size
    check_beams(config, V)
    config = config.for_model(model)
    beginning = begin(model, prompts, config, acts)
    batch = take_batch(model, beginning.texts, config, acts)
    ahead, device = batch.cache.static, batch.ids.device
    words = Forbidden(bad_words_ids, config.no_repeat_ngram_size or 0, device)
    searches = [BeamSearch(tokens, config, eos_id) for tokens in beginning.texts]
    rows = list(searches)  # in each row of the batch
    try:
        logits = batch.read(model, beginning, acts)[:, None]  # (rows, beams, V)
        recent = words.recent(beginning.texts, device)[:, None]  # (rows, beams, window)
        scores = logits.new_zeros(len(rows), 1)  # (rows, beams)
        for n_new in range(beginning.given + 1, config.max_new_tokens + 1):
            log_p, at_limit = logits.log_softmax(-1), n_new == config.max_new_tokens
            now = bans_after(n_new - 1, config, beginning, bad_words_ids, eos_id)
            words.forbid(log_p.flatten(0, 1), recent.flatten(0, 1), now)
            best = (log_p + scores[..., None]).flatten(1).topk(2 * K)
            sent = Sent(torch.stack([best.values.double(), best.indices.double()]))
            # those that run on: the first K that are no end
            running = (best.indices % V == eos_id).int().argsort(dim=1, stable=True)[:, :K]
            scores, indices = best.values.gather(1, running), best.indices.gather(1, running)
            tokens, parents = indices % V, indices // V  # (rows, K)
            recent = recent.gather(1, parents[..., None].expand(-1, -1, recent.shape[-1]))
            recent = words.followed(recent, tokens)
            if ahead and not at_limit:
                batch.cache.follow(parents)
                logits = batch.step(model, tokens)

            values, indices = sent.get()
            extend_all(rows, values, indices, V, n_new)
            left = sum(not search.done for search in rows)
            if left == 0:
                break
            if batch.worth_moving(left):
                order = order_without([search.done for search in rows])
                batch.keep(order)
                rows = [rows[row] for row in order]
                logits, scores, recent = logits[order], scores[order], recent[order]
                tokens, parents = tokens[order], parents[order]
            if not ahead:
                batch.cache.follow(parents)
                logits = batch.step(model, tokens)
    finally:
        give_back(model, batch)
    return [search.best() for search in searches]


def extend_all(
    searches: list[BeamSearch], values: list[list[float]], indices: list[list[float]],
    vocab_size: int, n_new: int,
) -> None:  # fmt: skip
    """Tell each search that is not done its 2K best continuations; index = beam * V + token."""
    for search, scores, found in zip(searches, values, indices, strict=True):
        if not search.done:
            at = [divmod(int(index), vocab_size) for index in found]
            search.extend(
                [Beam(score, search.running[beam].tokens + [token], beam)
                 for score, (beam, token) in zip(scores, at, strict=True)], n_new,
            )  # fmt: skip
