"""Generation: from prompts to texts, in batches or as a stream.

`generate` checks its arguments, sorts prompts into batches and lets `fast.py` choose the tokens, or
`decoding.py`, the plain loops that define them. `stream` yields the text of one prompt piece by
piece. Read `prepare` (how a prompt is encoded), then `generate`.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from minprefix.data.batches import check_family, encode_prompt, warn_of_cuts
from minprefix.files import brief
from minprefix.generation import decoding
from minprefix.generation import fast as fast_generation
from minprefix.generation.config import Decided, GenerationConfig
from minprefix.generation.stopping import Stopping, end_ids, known_ids, word_ids
from minprefix.models.activations import Activations
from minprefix.models.base import LanguageModel, evaluating
from minprefix.prefix.bank import PrefixBank
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.prefix import Prefix

AnyPrefix = Prefix | BARTPrefix | PrefixBank


def check_tokens(prompts: list[list[int]], vocab_size: int) -> None:
    """ValueError for a prompt without tokens or with tokens outside of the vocabulary."""
    for b, tokens in enumerate(prompts):
        if not tokens:
            raise ValueError(
                f"prompt {b} has no tokens, so nothing predicts the first one (a prefix is only "
                'read by tokens): give "" or [tokenizer.bos_id] to start from nothing'
            )
        if min(tokens) < 0 or max(tokens) >= vocab_size:
            raise ValueError(f"prompt {b} has ids outside [0, {vocab_size - 1}]: {brief(tokens)}")


def bos_prompt(model: LanguageModel, tokenizer) -> list[int]:
    """The prompt for a text that starts from nothing."""
    bos = model.config.bos_token_id
    return [tokenizer.bos_id if bos is None else bos]


def frame_of(model: LanguageModel, prefix=None) -> tuple[str, int | None]:
    """The frame of training (linearisation, max_source): that of the prefix, or else that of the
    model; ("", None) = none."""
    return model.frame if prefix is None else (prefix.linearisation, prefix.max_source)


def is_framed(model: LanguageModel, prefix) -> bool:
    """Whether some of the texts may have the frame of training."""
    if isinstance(prefix, PrefixBank):
        return any(one.linearisation for one in prefix.prefixes) or bool(model.frame[0])
    return bool(frame_of(model, prefix)[0])


def rows_of_prefix(prefix, prefix_index, n_prompts: int) -> tuple[list[int] | None, list[int]]:
    """For each prompt, its prefix in the bank (None without a bank) and its position offset."""
    if not isinstance(prefix, PrefixBank):
        if not isinstance(prefix, Prefix | BARTPrefix | None):
            raise ValueError(
                f"prefix must be a Prefix, BARTPrefix or PrefixBank, got {type(prefix).__name__}: "
                "Prefix.load(path) reads a file"
            )
        if prefix_index is not None:
            raise ValueError(f"prefix_index {prefix_index} needs a PrefixBank")
        return None, [0 if prefix is None else prefix.position_offset] * n_prompts
    N = len(prefix.prefixes)
    try:
        index = [operator.index(n) for n in (range(N) if prefix_index is None else prefix_index)]
    except TypeError:
        raise ValueError(
            f"prefix_index must hold an integer for each prompt, got {brief(prefix_index)}"
        ) from None
    if len(index) != n_prompts:
        raise ValueError(f"prefix_index has {len(index)} entries for {n_prompts} prompts")
    if any(not -1 <= n < N for n in index):
        raise ValueError(f"prefix_index must lie in [-1, {N - 1}], got {brief(index)}")
    return index, [0 if n < 0 else prefix.prefixes[n].position_offset for n in index]


def token_ids(prompt: Iterable[int], b: int) -> list[int]:
    """The ids of prompt b, which is not a text; ValueError if it is no list of integers either."""
    try:
        if isinstance(prompt, bytes):
            raise TypeError
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise ValueError(
            f"prompt {b} must be a text or a list of token ids, got {brief(prompt)}"
        ) from None


class Prompts(NamedTuple):
    """Prompts as the model reads them; each list has one entry per prompt."""

    ids: list[list[int]]
    framed: list[bool]  # whether the prompt was a text and has been put into a frame
    prefix_index: list[int] | None  # into the bank
    offsets: list[int]  # position offsets


def prepare(
    model: LanguageModel, tokenizer, prompts, prefix, prefix_index, config: Decided
) -> Prompts:
    """Encode and check the prompts; ValueError if one is invalid."""
    check_family(model.config.family, tokenizer)
    index, offsets = rows_of_prefix(prefix, prefix_index, len(prompts))
    ids, framed, sources = [], [], []
    for b, prompt in enumerate(prompts):
        own = prefix if index is None else prefix.prefixes[index[b]] if index[b] >= 0 else None
        frame, cut = frame_of(model, own)
        frame = frame or model.config.default_frame
        framed.append(isinstance(prompt, str) and frame != "")
        if not isinstance(prompt, str):
            ids.append(token_ids(prompt, b))
        elif frame:
            sources.append((prompt, frame, cut))
            ids.append(encode_prompt(tokenizer, *sources[-1]))
        else:
            ids.append(tokenizer.encode(prompt) or bos_prompt(model, tokenizer))
    warn_of_cuts(tokenizer, sources)
    check_tokens(ids, model.config.vocab_size)
    for b, (tokens, offset) in enumerate(zip(ids, offsets, strict=True)):
        try:
            model.config.check_room(len(tokens), config.max_new_tokens, offset)
        except ValueError as error:
            raise ValueError(f"prompt {b}: {error}" if len(ids) > 1 else str(error)) from None
    if prefix is not None:
        prefix.check_base(model)
    return Prompts(ids, framed, index, offsets)


def stripped(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a text, without the white space that a frame adds at both ends."""
    blank, begun = "", False
    for piece in pieces:
        text = (blank + piece) if begun else piece.lstrip()
        kept = text.rstrip()
        blank, begun = text[len(kept) :], begun or kept != ""
        if kept:
            yield kept


def activations_for(
    model: LanguageModel, prefix, index: list[int] | None, offsets: list[int]
) -> Activations:
    """The activations of each row's prefix."""
    if index is None:
        return model.activations_of(prefix)
    acts = model.activations_of(prefix, torch.tensor(index, device=model.wte.weight.device))
    # the bank's largest offset may belong to a prefix that no row here uses
    return replace(acts, max_offset=max(offsets))


@torch.inference_mode()
def generate_ids(
    model: LanguageModel, prompts: list[list[int]], config: GenerationConfig,
    eos_id: int | Sequence[int] | Stopping, *,
    prefix: AnyPrefix | None = None, prefix_index: Sequence[int] | Tensor | None = None,
    bad_words_ids: Sequence[Sequence[int]] = (), seeds: Sequence[int] | None = None,
    fast: bool = True,
) -> list[list[int]]:  # fmt: skip
    """Continue a batch of at least one prompt. Returns the new tokens of each, without eos; with
    beams, num_return_sequences texts of the first prompt, then those of the second, ...

    For a BART, prompts are sources with their <s> and </s>, and the new tokens are the target,
    without a forced first token.

    Args:
        prompts: token ids, of any lengths. They are padded to the longest, which must fit into the
            model together with the largest position offset (`generate` makes such batches).
        config: its bad_words and stop are texts and are not used here.
        eos_id: the tokens that end a text: one, several, or none, (); or a `Stopping`, whose
            strings end a text after the token that completes them.
        prefix, prefix_index: as in `generate`; the caller must call `prefix.check_base`.
        bad_words_ids: token sequences that are never completed. A lone eos_id among them is
            ignored, as in [2]; min_new_tokens is for that.
        seeds: for sampling, one per prompt; None = config.seed + b.
        fast: use `fast.py`; False = the plain loops of `decoding.py`, with the same tokens.
    Raises:
        ValueError: a prompt is empty or too long, or an index does not fit.
    """
    config = config.for_model(model)
    ids = (eos_id,) if isinstance(eos_id, int) else eos_id
    stopping = ids if isinstance(ids, Stopping) else Stopping(ids)
    eos_ids = known_ids(stopping.eos_ids, model.config.vocab_size)
    index, offsets = rows_of_prefix(prefix, prefix_index, len(prompts))
    check_tokens(prompts, model.config.vocab_size)
    longest = max(map(len, prompts))
    model.config.check_room(longest, config.max_new_tokens, max(offsets))
    bad_words_ids = checked_words(model, bad_words_ids, eos_ids)
    if seeds is None:
        seeds = [config.seed + b for b in range(len(prompts))]

    with evaluating(model):
        acts = activations_for(model, prefix, index, offsets)
        args = (model, prompts, config, eos_ids, acts, bad_words_ids)
        # fast beams are chosen on the device, where stop strings cannot be checked
        plain = not fast or (stopping.strings and config.num_beams > 1)
        loops = decoding if plain else fast_generation
        if config.num_beams > 1:
            texts = loops.beam_search(*args, lambda new: new[-1] in eos_ids or stopping.found(new))
            return [new[:-1] if new and new[-1] in eos_ids else new for new in texts]
        texts = [[] for _ in prompts]
        for tokens in loops.greedy_or_sampled(*args, seeds, stopping.stopped):
            for b, token in tokens.items():
                texts[b].append(token)
                stopping.read(b, token)
        return texts


def checked_words(
    model: LanguageModel, bad_words_ids: Sequence[Sequence[int]], eos_ids: tuple[int, ...]
) -> list[list[int]]:
    """These bad words and those of the model's checkpoint, without lone end tokens and without
    words outside of the vocabulary."""
    words = dict.fromkeys(tuple(word) for word in (*bad_words_ids, *model.config.bad_words_ids))
    V, ends = model.config.vocab_size, {(eos_id,) for eos_id in eos_ids}
    return [list(word) for word in words if word not in ends and 0 <= min(word) <= max(word) < V]


def batches(lengths: list[int], offsets: list[int], batch_size: int, room: int) -> list[list[int]]:
    """The indices of the prompts in batches, the longest first, so that there is little padding.

    A prompt is padded to the longest of its batch. That length plus its position offset may be at
    most `room`; otherwise the padding would be past the model's last position.
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
    model: LanguageModel, tokenizer, prompt: str | list[int], *,
    prefix: AnyPrefix | None = None, prefix_index: int | None = None,
    config: GenerationConfig | None = None, fast: bool = True, **options,
) -> Iterator[str]:  # fmt: skip
    """Yields the text of `generate` for one prompt piece by piece; greedy or sampled.

    A character of several tokens is yielded after its last token. The model is in eval mode until
    the iterator ends or is dropped. Beam search knows its text only at the end, so num_beams > 1 is
    a ValueError; other arguments and errors are those of `generate`.
    """
    given = replace(config or GenerationConfig(), **options)
    if (given.num_beams or 1) > 1:
        raise ValueError(f"beam search cannot stream, got num_beams={given.num_beams}")
    config = replace(given, num_beams=1).for_model(model)
    if config.num_return_sequences > 1:
        n = config.num_return_sequences
        raise ValueError(f"one text can be streamed, got num_return_sequences={n}")
    prefix_index = None if prefix_index is None else [prefix_index]
    ids, (framed,), index, offsets = prepare(
        model, tokenizer, [prompt], prefix, prefix_index, config
    )
    eos_ids = end_ids(model, tokenizer, is_framed(model, prefix))
    bad_words_ids = checked_words(model, word_ids(tokenizer, config.bad_words), eos_ids)
    stopping = Stopping(eos_ids, tokenizer, config.stop)

    @torch.inference_mode()  # for a generator: active while it runs, not between its tokens
    def new_tokens() -> Iterator[int]:
        with evaluating(model):
            acts = activations_for(model, prefix, index, offsets)
            args = (model, ids, config, eos_ids, acts, bad_words_ids, [config.seed])
            loops = fast_generation if fast else decoding
            for chosen in loops.greedy_or_sampled(*args, stopping.stopped):
                stopping.read(0, chosen[0])
                yield chosen[0]

    pieces = stopping.cut_pieces(tokenizer.decode_stream(new_tokens()))
    return stripped(pieces) if framed else pieces


def generate(
    model: LanguageModel, tokenizer, prompts: Sequence[str | list[int]], *,
    prefix: AnyPrefix | None = None, prefix_index: Sequence[int] | Tensor | None = None,
    batch_size: int = 64, config: GenerationConfig | None = None,
    progress: Callable[[int, int], None] | None = None, fast: bool = True, **options,
) -> list[str]:  # fmt: skip
    """Continue prompts, or answer them with a BART. Returns the new text of each, in their order;
    with num_return_sequences = n, the n texts of the first, then those of the second, ...

        generate(model, tokenizer, ["name : The Eagle"], prefix=prefix, num_beams=5)

    Args:
        prompts: texts or lists of token ids, which are used unchanged. A text is encoded in the
            frame in which its prefix, adapter or model was trained (`frame_of`), and the result is
            stripped of white space. If training cut sources, the text is cut too, with a warning in
            the log. Without a frame, the text is continued as it is; "" starts from nothing, that
            is, from the bos. For a BART the text is the source, and <s> and </s> are added.
        prefix: one prefix for all prompts, or a bank.
        prefix_index: with a bank, one int per prompt: its prefix, or -1 for none. None = as many
            prompts as prefixes, in the same order.
        batch_size: prompts at a time; does not change the texts (beyond rounding).
        config, options: how tokens are chosen; options replace fields of config.
        progress: called after each batch with (prompts done, number of prompts).
        fast: False = the plain loops, several times slower, with the same tokens (beyond rounding).
    Raises:
        ValueError: before any work, for contradictory options, a prompt that is empty or too long,
            an index that does not fit, or a prefix of another model.
    """
    config = replace(config or GenerationConfig(), **options)
    if isinstance(prompts, str | bytes) or not hasattr(prompts, "__len__"):
        raise ValueError(f"prompts must be a list of texts, got {brief(prompts)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    config = config.for_model(model)
    ids, framed, index, offsets = prepare(model, tokenizer, prompts, prefix, prefix_index, config)
    copies = config.num_return_sequences if config.do_sample else 1
    ids, framed, offsets = (many(x, copies) for x in (ids, framed, offsets))
    index = None if index is None else many(index, copies)
    eos_ids = end_ids(model, tokenizer, is_framed(model, prefix))
    bad_words_ids = word_ids(tokenizer, config.bad_words)
    texts: dict[int, list[str]] = {}
    room = model.config.room_for_prompt(config.max_new_tokens)
    for batch in batches([len(tokens) for tokens in ids], offsets, batch_size, room):
        stopping = Stopping(eos_ids, tokenizer, config.stop)
        new = generate_ids(
            model, [ids[b] for b in batch], config, stopping,
            prefix=prefix, prefix_index=None if index is None else [index[b] for b in batch],
            bad_words_ids=bad_words_ids, seeds=[config.seed + b for b in batch], fast=fast,
        )  # fmt: skip
        written, n = [stopping.cut(tokenizer.decode(tokens)) for tokens in new], len(new)
        each = n // len(batch)
        texts |= {b: written[at * each : (at + 1) * each] for at, b in enumerate(batch)}
        if progress is not None:
            progress(len(texts) // copies, len(prompts))
    written = [text.strip() if framed[b] else text for b in range(len(ids)) for text in texts[b]]
    return written


def many(entries: list, times: int) -> list:
    """Each entry `times` times."""
    return [entry for entry in entries for _ in range(times)]
