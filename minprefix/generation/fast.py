"""Fast generation: the same tokens as `decoding.py`, with caches at fixed addresses.

`decoding.py` defines what is generated; this file generates the same tokens with less work:

  - Keys and values are written once, into memory that is allocated once (`RowCache`), by the
    operator that reads them. A row that has ended is overwritten by a running one, instead of
    copying all others (`order_without`).
  - The K beams of a prompt are K queries of one row (`BeamCache`). They read the prompt's keys
    once, not K times, and nothing is copied when beams are reordered: token n of beam i stays in
    slot n K + i, and each beam sees the slots of its ancestors.
  - Tokens are chosen, and forbidden ones found, on the model's device (`choice.py`). A step goes
    from ids to ids without waiting for the host, which reads the tokens up to AHEAD steps later and
    drops those after the end of a text (`Decoding.run`).
  - On a GPU a step is a CUDA graph for each bucket of rows and of columns (`Decoding.graph`), so it
    costs one launch. A graph also reads short prompts of GPT-2. A BART's encoded sources are copied
    to where its graphs read them. MINPREFIX_CUDA_GRAPHS=0 turns graphs off.

The prefix is an argument of attention and not in a cache, as everywhere. Read `caches.py`,
`choice.py`, `Decoding`, then `greedy_or_sampled` and `beam_search`, whose arguments and results are
the same as in `decoding.py`. Shapes use the letters of `models/gpt2.py`; b counts prompts, K beams.
"""

from collections import deque
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kernels import fuses
from minprefix.generation import caches
from minprefix.generation.caches import BeamCache, RowCache
from minprefix.generation.choice import Beams, Choice, Forbidden, Tokens
from minprefix.generation.config import Decided
from minprefix.generation.decoding import ENDED, Beam, BeamSearch, Beginning, begin, n_candidates
from minprefix.generation.graphs import capture, round_up, uses_graphs
from minprefix.models.activations import Activations
from minprefix.models.base import LanguageModel, adapter_of
from minprefix.models.cache import computed_dtype, right_padded
from minprefix.models.fused import fused_blocks

GRAPHED = 4096  # positions of prompts up to which launching takes longer than the work
AHEAD = 4  # how many steps the GPU may be ahead of the host, which reads the tokens


def row_bucket(rows: int) -> int:
    """The smallest power of two that is not below `rows`."""
    return 1 << (rows - 1).bit_length()


def order_without(ended: list[bool]) -> list[int]:
    """The rows to keep; the last ones replace those that have ended.

    [no, yes, no, yes, no] -> [0, 4, 2]: row 4 moves, rows 0 and 2 stay where they are.
    """
    kept = [row for row, end in enumerate(ended) if not end]
    movers = iter(reversed(kept))
    return [next(movers) if ended[row] else row for row in range(len(kept))]


def source_columns(source: Any) -> int:
    """Room for the tokens of a batch's sources, with static shapes; few sizes, so that graphs serve
    many batches. Unused columns take memory, but attention does not read them."""
    return max(caches.COLUMNS, row_bucket(source.kv.shape[4]))


class Sent:
    """A tensor that is being copied to the host while the GPU continues."""

    def __init__(self, x: Tensor):
        self.x = x.to("cpu", non_blocking=True, copy=True)
        self.arrived = torch.cuda.Event() if x.is_cuda else None
        if self.arrived is not None:
            self.arrived.record(torch.cuda.current_stream(x.device))

    def get(self) -> Any:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.x.tolist()


class Decoding:
    """A batch of prompts: its cache, its prefix, its `Choice`, and the graphs of its steps.

    It holds no reference to the model, so that a batch can be kept as long as its model exists.
    """

    def __init__(self, key: tuple, cache: RowCache, choice: Choice, acts: Activations):
        self.key, self.cache, self.choice = key, cache, choice
        self.device, self.max_rows = cache.k.device, len(cache.lengths)
        self.acts = acts.with_room(self.max_rows)
        self.options: dict[str, Any] = {}  # of `hidden_states`: a BART's encoded sources
        self.graphs: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self.prompts: Tensor | None = None  # what the graph of the prompts reads, if there is one
        self.reads = 0
        on_gpu = self.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if cache.static and on_gpu else None
        self.ahead = AHEAD if cache.static or on_gpu else 0

    def read(
        self, model: LanguageModel, beginning: Beginning, acts: Activations, seeds: Sequence[int]
    ) -> Tensor:
        """Read the prompts in one call and choose; returns the result of `Choice.choose`."""
        self.acts = self.acts.overwritten(acts.passed())
        self.cache.fill(beginning.texts)
        self.choice.fill(beginning, seeds)
        self.fill_options(beginning.options)
        self.reads += 1
        ids, lengths = right_padded(beginning.texts, self.device)
        if self.repeats(model, acts, ids.shape[1]):
            return self.read_again(model, ids)
        at = torch.arange(len(ids), device=ids.device) * ids.shape[1] + lengths - 1  # last tokens
        infix = {} if acts.infix is False else {"starts": lengths - 1}
        last = model.hidden_states(
            ids, prefix=acts, kv_lens=lengths, cache=self.cache, at=at, **infix,
            **beginning.options,
        )  # (B, C)  # fmt: skip
        self.use(len(ids))
        return self.choice.choose(head(model, last)[:, None])

    def fill_options(self, options: dict[str, Any]) -> None:
        """Take the sources of a batch; with static shapes, to where the graphs read them."""
        if self.cache.static and self.options:
            options = {name: self.options[name].overwritten(x) for name, x in options.items()}
        elif self.cache.static:
            options = {
                name: x.with_room(self.max_rows, source_columns(x)) for name, x in options.items()
            }
        self.options = options

    def repeats(self, model: LanguageModel, acts: Any, longest: int) -> bool:
        """Whether a graph reads the prompts: from the second batch on, so that a single call does
        not pay for recording it, and where the host takes longer than the GPU."""
        width = round_up(longest, caches.COLUMNS)
        plain = acts.infix is False and not self.options and self.cache.static and self.reads > 1
        short = self.max_rows * width <= GRAPHED
        return plain and short and acts.max_offset + width <= model.config.n_positions

    def read_again(self, model: LanguageModel, ids: Tensor) -> Tensor:
        """`read` as a graph for all rows of the cache, with prompts padded to a bucket's width."""
        (n, T), rows, width = ids.shape, self.max_rows, round_up(ids.shape[1], caches.COLUMNS)
        self.use(n)
        if self.prompts is None:
            self.prompts = ids.new_zeros(rows, width)
        self.prompts[:n, :T] = ids  # nothing after a prompt, or in other rows, is seen

        def run() -> Tensor:
            self.cache.longest, lengths = 0, self.cache.lengths
            at = torch.arange(rows, device=ids.device) * width + lengths - 1
            with fused_blocks(model, rows * width):
                last = model.hidden_states(
                    self.prompts, prefix=self.acts, kv_lens=lengths, cache=self.cache, at=at
                )
            return self.choice.choose(head(model, last)[:, None])

        out = self.graph((rows, 0), run)()
        self.cache.longest = T
        return out

    def graph(self, bucket: tuple[int, int], run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The graph of `run` for this number of rows and columns (0: the prompts)."""
        if bucket not in self.graphs:
            state = [*self.cache.state(), *self.choice.state()]
            before = [x.clone() for x in state]
            self.graphs[bucket] = capture(run, self.device, self.pool)
            for x, y in zip(state, before, strict=True):  # undo the step made by capturing
                x.copy_(y)
        return self.graphs[bucket]

    def logits(self, model: LanguageModel) -> Tensor:
        """The logits after the chosen token of each row or beam: (rows, K, V), fp32 or fp64."""
        rows = self.cache.rows
        ids = self.choice.ids[:rows]
        options = {name: x.first(rows) for name, x in self.options.items()}
        with fused_blocks(model, ids.numel()) if self.cache.static else nullcontext():
            hidden = model.hidden_states(
                ids, prefix=self.acts.first(rows), cache=self.cache, **options
            )
        return head(model, hidden)

    def step(self, model: LanguageModel) -> Tensor:
        """Read the chosen tokens and choose the next; returns the result of `Choice.choose`."""

        def run() -> Tensor:
            return self.choice.choose(self.logits(model))

        static = self.cache.static
        out = self.graph((self.cache.rows, self.cache.columns), run)() if static else run()
        self.cache.count()
        return out

    def run(
        self, model: LanguageModel, chosen: Tensor, rows: list, n: int, done: Callable[[Any], bool]
    ) -> Iterator[list[tuple[Any, Any]]]:
        """Make up to `n` choices, or until all rows are done.

        Args:
            chosen: the result of `read`, which is the first choice.
            rows: the identity (such as b) of each row.
            done: called after each step; tells whether a row is done.
        Yields:
            (identity, values) for each row that was not done before.
        """
        on_its_way: deque[tuple[list, Sent]] = deque()
        for step in range(n):
            if step:
                left = sum(not done(row) for row in rows)
                if self.worth_moving(left):
                    order = order_without([done(row) for row in rows])
                    self.keep(order)
                    rows = [rows[row] for row in order]
                chosen = self.step(model)
            on_its_way.append((rows, Sent(chosen[: len(rows)])))
            while len(on_its_way) > (self.ahead if step + 1 < n else 0):
                whom, sent = on_its_way.popleft()
                pairs = zip(whom, sent.get(), strict=True)
                yield [(row, values) for row, values in pairs if not done(row)]
                if all(done(row) for row in rows):
                    return

    def use(self, rows: int) -> None:
        """Set the number of rows of the next steps."""
        self.cache.rows = min(row_bucket(rows), self.max_rows) if self.cache.static else rows

    def worth_moving(self, rows: int) -> bool:
        """Whether steps for this number of rows would be smaller than now."""
        return (row_bucket(rows) if self.cache.static else rows) < self.cache.rows

    def keep(self, order: list[int]) -> None:
        """Move row order[i] to row i."""
        moved = [(to, source) for to, source in enumerate(order) if to != source]
        if moved:
            to, source = torch.tensor(moved).to(self.device, non_blocking=True).T
            for rows_of in (self.cache, self.choice, self.acts, *self.options.values()):
                rows_of.move(to, source)
        self.use(len(order))


def head(model: LanguageModel, hidden: Tensor) -> Tensor:
    """Logits in fp32 or fp64: (..., C) -> (..., V)."""
    logits = model.head(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


KEPT: WeakKeyDictionary[LanguageModel, Decoding] = (
    WeakKeyDictionary()
)  # the last batch, for its graphs


def take_batch(
    model: LanguageModel, beginning: Beginning, config: Decided, eos_ids: tuple[int, ...],
    acts: Any, bad_words_ids: list[list[int]],
) -> Decoding:  # fmt: skip
    """A batch with room for `beginning`; the kept one if it fits.

    `give_back` returns it to `KEPT`. Until then, another generation with the same model makes a
    batch of its own.
    """
    if fuses(model.wte.weight):
        model.pad_head()
    like, K, acts = model.wte.weight, config.num_beams, acts.passed()
    static = uses_graphs(like.device)
    rows, prompt_len = len(beginning.texts), max(map(len, beginning.texts))
    n_new, key = config.max_new_tokens, ()
    if static:  # graphs depend on sizes, the choice, and the addresses of the weights
        rows = row_bucket(rows)
        prompt_len, n_new = (
            round_up(prompt_len, caches.COLUMNS),
            round_up(n_new, caches.COLUMNS // 4),
        )
        config = replace(config, max_new_tokens=n_new, seed=0, bad_words=(), stop=())
        sources = tuple(map(source_columns, beginning.options.values()))
        own = [of for of in (model, adapter_of(model)) if of is not None]
        read = (x for of in own for x in (*of.parameters(), *of.buffers()))
        weights = tuple((x.data_ptr(), x.dtype) for x in read)
        chosen = (config, eos_ids, tuple(map(tuple, bad_words_ids)), beginning[2:6])
        kind = computed_dtype(like), fuses(like)
        key = (rows, prompt_len, sources, chosen, acts.sizes(), weights, kind)
        kept = KEPT.pop(model, None)
        if kept is not None and kept.key == key:
            return kept
        del kept
    words = Forbidden(config, bad_words_ids, eos_ids, beginning, prompt_len + n_new, like.device)
    if K == 1:
        cache = RowCache(model.config, rows, prompt_len + n_new, like, static)
        return Decoding(key, cache, Tokens(words, config, rows, like.device), acts)
    cache = BeamCache(model.config, rows, prompt_len, K, n_new, like, static)
    dtype, V = torch.promote_types(like.dtype, torch.float32), model.config.vocab_size
    return Decoding(key, cache, Beams(words, config, rows, cache, dtype, V), acts)


def give_back(model: LanguageModel, batch: Decoding) -> None:
    if batch.cache.static:
        KEPT[model] = batch


def greedy_or_sampled(
    model: LanguageModel, prompts: list[list[int]], config: Decided,
    eos_ids: tuple[int, ...], acts: Activations, bad_words_ids: list[list[int]],
    seeds: Sequence[int], stopped: Container[int] = (),
) -> Iterator[dict[int, int]]:  # fmt: skip
    """As in `decoding.py`."""
    beginning = begin(model, prompts, config, acts)
    batch = take_batch(model, beginning, config, eos_ids, acts, bad_words_ids)
    rows, ends = list(range(len(prompts))), (ENDED, *eos_ids)
    ended: set[int] = set()

    def done(b: int) -> bool:
        return b in ended or b in stopped

    n = config.max_new_tokens - beginning.given
    try:
        chosen = batch.read(model, beginning, acts, seeds)
        del beginning  # the memory of a BART's sources, which the batch may have copied
        for pairs in batch.run(model, chosen, rows, n, done):
            ended.update(b for b, token in pairs if token in ends)
            if new := {b: token for b, token in pairs if b not in ended}:
                yield new
    finally:
        give_back(model, batch)


def beam_search(
    model: LanguageModel, prompts: list[list[int]], config: Decided,
    eos_ids: tuple[int, ...], acts: Activations, bad_words_ids: list[list[int]],
    ends: Callable[[list[int]], bool],
) -> list[list[int]]:  # fmt: skip
    """As in `decoding.py`, but only `eos_ids` end a text.

    The running beams are chosen on the device; `BeamSearch` follows on the host and decides when a
    prompt is done.
    """
    V = model.config.vocab_size
    n_candidates(config, eos_ids, V)  # raises its error before any work
    beginning = begin(model, prompts, config, acts)
    batch = take_batch(model, beginning, config, eos_ids, acts, bad_words_ids)
    searches = [BeamSearch(tokens, config, ends) for tokens in beginning.texts]
    n, given = config.max_new_tokens - beginning.given, beginning.given
    try:
        best = batch.read(model, beginning, acts, ())
        del beginning  # as above
        steps = batch.run(model, best, list(searches), n, lambda search: search.done)
        for n_new, pairs in enumerate(steps, given + 1):
            for search, (scores, found) in pairs:
                at = [divmod(int(index), V) for index in found]
                search.extend(
                    [Beam(score, search.running[beam].tokens + [token], beam)
                     for score, (beam, token) in zip(scores, at, strict=True)], n_new,
                )  # fmt: skip
    finally:
        give_back(model, batch)
    return [text for search in searches for text in search.best()]
