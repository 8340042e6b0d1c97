"""Batches: examples -> token ids with a loss mask -> padded rows, in a fixed order.

Read `encode_pair` (the frame of one example), `collate` (what a step reads) and `BatchOrder` (which
rows step s sees). For GPT-2 the frame is source, bos, target, eos, which section 3 of [1] writes as
[x; y]. For BART the encoder reads bos, source, eos, and the decoder eos, bos, target, eos. Shapes
use the letters of `models/gpt2.py`. Unlike the authors' code [2], it never cuts anything silently.
[1] https://arxiv.org/abs/2101.00190   [2] https://github.com/XiangLi1999/PrefixTuning
"""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from minprefix.checks import check_choice
from minprefix.data.examples import LINEARISATIONS, Example, checked_text
from minprefix.files import brief, reading
from minprefix.models.losses import IGNORE

log = logging.getLogger(__name__)
POOL_BATCHES = 50  # batches whose rows are sorted together: little padding, yet a shuffled order


@dataclass(frozen=True)
class Encoded:
    """Prompt and target of one example as token ids; the loss is on ids[prompt_len:]."""

    ids: list[int]  # source, bos, target, eos; BART's decoder: eos (its start), bos, target, eos
    prompt_len: int  # tokens of the source and the bos; BART: 1
    where: str
    source: list[int] | None = None  # BART's encoder: bos, source, eos

    @property
    def length(self) -> int:
        """Number of tokens, source and target."""
        return len(self.ids) + len(self.source or ())

    @property
    def source_len(self) -> int:
        """Tokens of the source as max_source counts them."""
        return self.prompt_len - 1 if self.source is None else len(self.source)


def for_bart(tokenizer) -> bool:
    """Whether its texts are for an encoder-decoder."""
    return getattr(tokenizer, "family", "gpt2") == "bart"


def check_family(family: str, tokenizer) -> None:
    """ValueError if the tokenizer is for another family of models than "GPT-2" or "BART"."""
    if (family == "BART") != for_bart(tokenizer):
        other = "a GPT-2's" if family == "BART" else "a BART's"
        raise ValueError(f"the model is a {family}, but the tokenizer is {other}")


def encode_prompt(
    tokenizer, source: str, linearisation: str = "paper", max_source: int | None = None
) -> list[int]:
    """enc(source) + [bos]; with "original-code", enc(" " + source + " ") + [bos].

    For BART, both give [bos] + enc(source) + [eos], which the encoder reads, as in [2].

    The code of [2] puts both blanks around its tables. For articles its GPT-2 code puts none, but
    [1] reports no result of it.

    Args:
        max_source: keep at most this many of the source's first tokens ([1] and [2] keep 512 for
            XSum); None keeps all of them. BART's bos and eos are counted, as in [2].
    """
    check_choice("linearisation", linearisation, LINEARISATIONS)
    if max_source is not None and max_source < 1:
        raise ValueError(f"max_source must be at least 1, got {max_source}")
    if for_bart(tokenizer):
        kept = None if max_source is None else max(0, max_source - 2)
        return [tokenizer.bos_id] + tokenizer.encode(source)[:kept] + [tokenizer.eos_id]
    text = source if linearisation == "paper" else f" {source} "
    return tokenizer.encode(text)[:max_source] + [tokenizer.bos_id]


def warn_of_cuts(tokenizer, sources: Iterable[tuple[str, str, int | None]]) -> None:
    """Warn how many sources `encode_prompt` cuts.

    Args:
        sources: for each source its text, linearisation and max_source.
    """
    ends, total, found = 0 if for_bart(tokenizer) else 1, 0, []
    for text, linearisation, most in sources:
        total += 1
        if most is not None:
            length = len(encode_prompt(tokenizer, text, linearisation)) - ends
            found += [(length, most)] if length > most else []
    if found:
        length, most = max(found)
        verb, longest = ("is", "") if len(found) == 1 else ("are", "the longest ")
        log.warning(
            f"note: {len(found)} of {total} sources {verb} cut, {longest}from {length:,} to "
            f"{most:,} tokens (max_source)"
        )


def encode_pair(
    tokenizer, source: str, target: str, linearisation: str = "paper", where: str = "",
    max_source: int | None = None,
) -> Encoded:  # fmt: skip
    """The prompt, then enc(" " + target) + [eos]; "original-code" adds a blank before eos.

    For BART the prompt is the source. The decoder reads [start, bos] + enc(target), that is, the
    labels shifted by one. Its start token is eos [2], unless the model's config names another one.
    """
    checked_text(target, "the target", where)
    prompt = encode_prompt(tokenizer, source, linearisation, max_source)
    if for_bart(tokenizer):
        begin = [tokenizer.start_id, tokenizer.bos_id]
        ids = begin + tokenizer.encode(target) + [tokenizer.eos_id]
        return Encoded(ids, 1, where, prompt)
    text = f" {target}" if linearisation == "paper" else f" {target} "
    return Encoded(prompt + tokenizer.encode(text) + [tokenizer.eos_id], len(prompt), where)


def encode_examples(
    tokenizer,
    examples: Sequence[Example],
    linearisation: str = "paper",
    max_len: int | None = None,
    max_source: int | None = None,
) -> list[Encoded]:
    """Encode every (source, target) pair, in order.

    Args:
        tokenizer: has encode(text) -> ids, bos_id and eos_id.
        max_len: the largest number of tokens in a pair, its bos and eos included. The model does
            not read the eos, so N positions are enough for max_len = N + 1. For BART it limits the
            target, and the source may have max_len - 1.
        max_source: cut sources to this many tokens, see `encode_prompt`; nothing else is cut.
    Raises:
        ValueError: an empty target, or a pair longer than max_len.
    """
    encoded, too_long = [], []
    for example in examples:
        if not isinstance(example, Example) or isinstance(example.targets, str):
            raise ValueError(f"expected Example(source, (target, ...)), got {brief(example)}")
        for number, target in enumerate(example.targets, 1):
            where = example.where + (f" (target {number})" if len(example.targets) > 1 else "")
            with reading(where or "an example"):
                pair = encode_pair(
                    tokenizer, example.source, target, linearisation, where, max_source
                )
            if max_len is not None and room_for_source(pair, max_len) < pair.source_len:
                too_long.append(pair)
            encoded.append(pair)
    if too_long and max_len is not None:
        raise ValueError(too_long_message(too_long, len(encoded), max_len))
    return encoded


def room_for_source(pair: Encoded, max_len: int) -> int:
    """How many tokens the source may have for the pair to fit; below 1, the target alone is too
    long."""
    if pair.source is None:
        return max_len - 1 - (len(pair.ids) - pair.prompt_len)
    return max_len - 1 if len(pair.ids) <= max_len else 0


def too_long_message(pairs: Sequence[Encoded], total: int, max_len: int) -> str:
    """The error for pairs that are too long: where the first one is, its lengths and what to do."""
    pair, room = pairs[0], min(room_for_source(pair, max_len) for pair in pairs)
    n, source, most = len(pair.ids), pair.source_len, max_len
    if pair.source is None:
        size = f"{n:,} tokens (source {source:,}, target {n - pair.prompt_len:,})"
    elif n > max_len:
        size = f"a target of {n:,} tokens"
    else:
        size, most = f"a source of {source:,} tokens", max_len - 1
    many = f"{len(pairs)} of {total} pairs {'is' if len(pairs) == 1 else 'are'} too long"
    helps = f"train --max-source {room} cuts sources" if room > 0 else "shorten the target"
    return (
        f"{pair.where}: {size}, at most {most:,} are allowed; {many}: {helps}, or remove the pairs"
    )


def spread(rows: Sequence, most: int) -> list:
    """At most `most` of the rows, evenly spaced."""
    return [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(len(rows), most))]


def digest(rows: Sequence[Encoded]) -> str:
    """A sha256 of the rows' tokens, in hexadecimal."""
    found = hashlib.sha256()
    for row in rows:
        ids = [row.prompt_len, *row.ids, *(row.source or ())]
        found.update(np.array(ids, dtype=np.int64).tobytes())
    return found.hexdigest()


def origins(rows: Sequence[Encoded], most: int = 4) -> str:
    """Where the rows come from, such as "a.jsonl:7, a.jsonl:9 and 14 more"; "" if unknown."""
    places = [row.where for row in rows if row.where]
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return ", ".join(places[:most]) + more if places else ""


@dataclass(frozen=True)
class Batch:
    """Right-padded rows; labels are already shifted, so logits and labels align by position."""

    input_ids: torch.Tensor  # (B, T), int64
    labels: torch.Tensor  # (B, T), int64: the next token if it belongs to the target, else IGNORE
    lengths: torch.Tensor  # (B,), int64: real input tokens
    at: torch.Tensor  # (n,), int64: places b T + t that have a label
    starts: torch.Tensor  # (B,), int64: the bos, the first token after an infix
    # for BART: what the encoder reads
    source_ids: torch.Tensor | None = field(default=None, kw_only=True)  # (B, S), int64
    source_lens: torch.Tensor | None = field(default=None, kw_only=True)  # (B,), int64

    def to(self, device: torch.device) -> Self:
        """Copy to this device, without waiting for a GPU."""
        given = {name: x for name, x in vars(self).items() if x is not None}
        return type(self)(
            **{n: pinned(x, device).to(device, non_blocking=True) for n, x in given.items()}
        )

    def model_kwargs(self) -> dict[str, torch.Tensor | None]:
        """The arguments of `hidden_states` other than input_ids."""
        if self.source_ids is None:
            return {"starts": self.starts}
        return {"source_ids": self.source_ids, "source_lens": self.source_lens}


def pinned(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x in pinned memory if `device` is a GPU, which can then copy it while the host continues."""
    return x.pin_memory() if (x.device.type, device.type) == ("cpu", "cuda") else x


def collate(encoded: Sequence[Encoded], pad_id: int) -> Batch:
    """input_ids = ids[:-1], labels[t] = ids[t + 1] for t + 1 >= prompt_len, padded to the longest
    row."""
    if not encoded:
        raise ValueError("a batch needs at least one example, got none")
    lengths = torch.tensor([len(row.ids) - 1 for row in encoded])  # (B,)
    shape = (len(encoded), int(lengths.max()))
    input_ids = torch.full(shape, pad_id)  # (B, T)
    labels = torch.full(shape, IGNORE)  # (B, T)
    for b, row in enumerate(encoded):
        ids = torch.tensor(row.ids)  # (T_b + 1,)
        input_ids[b, : len(ids) - 1] = ids[:-1]
        labels[b, row.prompt_len - 1 : len(ids) - 1] = ids[row.prompt_len :]
    at = (labels != IGNORE).flatten().nonzero()[:, 0]  # (n,)
    starts = torch.tensor([row.prompt_len - 1 for row in encoded])  # (B,)
    if encoded[0].source is None:
        return Batch(input_ids, labels, lengths, at, starts)
    sources = [torch.tensor(row.source) for row in encoded]
    source_lens = torch.tensor([len(source) for source in sources])  # (B,)
    source_ids = pad_sequence(sources, batch_first=True, padding_value=pad_id)  # (B, S)
    more = {"source_ids": source_ids, "source_lens": source_lens}
    return Batch(input_ids, labels, lengths, at, starts, **more)


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """One epoch: every index of `lengths` once, in batches of similar length, in random order.

    The shuffled indices are divided into pools of POOL_BATCHES batches. Each pool is sorted by
    length and divided into batches, and the batches are shuffled. The result depends on seed and
    epoch alone, not on global random state. At most one batch is smaller than batch_size.
    """
    if batch_size < 1 or not len(lengths):
        raise ValueError(
            f"batch_size and examples must be at least 1, got {batch_size} and {len(lengths)}"
        )
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed and epoch must not be negative, got {seed} and {epoch}")
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths)).tolist()
    batches = []
    for start in range(0, len(order), POOL_BATCHES * batch_size):
        pool = sorted(order[start : start + POOL_BATCHES * batch_size], key=lengths.__getitem__)
        batches += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


class BatchOrder:
    """The endless order of batches: `batch(step)` depends on the arguments and the step alone.

    A run that resumes at step s therefore sees the same batches as an uninterrupted run.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self._epoch, self._batches = 0, epoch_batches(lengths, batch_size, seed, 0)
        self.steps_per_epoch = len(self._batches)

    def batch(self, step: int) -> list[int]:
        """The indices of the batch at `step`, counted from 0 over all epochs."""
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._batches = epoch_batches(self.lengths, self.batch_size, self.seed, epoch)
            self._epoch = epoch
        return self._batches[position]
