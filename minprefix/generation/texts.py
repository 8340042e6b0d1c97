"""Generation: from prompts to texts, in batches or as a stream.

`generate` checks everything, sorts prompts into batches and lets `fast.py` choose the
tokens, or `decoding.py`, the plain loops that define them;
`stream` gives the text of one prompt piece by piece. Read `prepare` (what a prompt becomes), then
`generate`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from minprefix.data.batches import encode_prompt
from minprefix.generation import decoding
from minprefix.generation import fast as fast_generation
from minprefix.generation.config import GenerationConfig
from minprefix.models.activations import Activations
from minprefix.models.base import LanguageModel, evaluating
from minprefix.prefix.bank import PrefixBank
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.prefix import Prefix

AnyPrefix = Prefix | BARTPrefix | PrefixBank


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


def frame_of(model: LanguageModel, prefix=None) -> tuple[str, int | None]:
    """The frame that was trained, (linearisation, max_source): the prefix's, or else the model's;
    ("", None) = none."""
    return model.frame if prefix is None else (prefix.linearisation, prefix.max_source)


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


class Prompts(NamedTuple):
    """Prompts as the model reads them; a list entry for each."""

    ids: list[list[int]]
    framed: list[bool]  # whether it is a text that was put into a frame
    prefix_index: list[int] | None  # into the bank
    offsets: list[int]  # position offsets


def prepare(
    model: LanguageModel, tokenizer, prompts, prefix, prefix_index, config: GenerationConfig
) -> Prompts:
    """The prompts made ready; ValueError if one is unfit."""
    index, offsets = rows_of_prefix(prefix, prefix_index, len(prompts))
    ids, framed = [], []
    for b, prompt in enumerate(prompts):
        own = prefix if index is None else prefix.prefixes[index[b]] if index[b] >= 0 else None
        frame, cut = frame_of(model, own)
        frame = frame or model.config.default_frame
        framed.append(isinstance(prompt, str) and frame != "")
        if not isinstance(prompt, str):
            ids.append(list(prompt))
        elif frame:
            ids.append(encode_prompt(tokenizer, prompt, frame, cut))
        else:
            ids.append(tokenizer.encode(prompt))
    check_tokens(ids, model.config.vocab_size)
    for tokens, offset in zip(ids, offsets, strict=True):
        model.config.check_room(len(tokens), config.max_new_tokens, offset)
    if prefix is not None:
        prefix.check_base(model)
    return Prompts(ids, framed, index, offsets)


def stripped(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a text without the white space at its ends, which a frame adds."""
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
    """What the model reads of each row's prefix."""
    if index is None:
        return model.activations_of(prefix)
    acts = model.activations_of(prefix, torch.tensor(index, device=model.wte.weight.device))
    # the bank's largest offset may be that of a prefix which no row here uses
    return replace(acts, max_offset=max(offsets))


@torch.inference_mode()
def generate_ids(
    model: LanguageModel, prompts: list[list[int]], config: GenerationConfig, eos_id: int, *,
    prefix: AnyPrefix | None = None, prefix_index: Sequence[int] | Tensor | None = None,
    bad_words_ids: Sequence[Sequence[int]] = (), seeds: Sequence[int] | None = None,
    fast: bool = True,
) -> list[list[int]]:  # fmt: skip
    """Continue one batch of prompts, at least one: the new tokens of each, without eos.

    A BART's prompts are sources, with their <s> and </s>; what is new is the target, without the
    first token where that is forced.

    Args:
        prompts: token ids, of any lengths. They are padded to the longest, so the longest must fit
            beside the largest position offset (`generate` makes batches that do).
        config: its bad_words are texts and not read here.
        eos_id: the token that ends a text.
        prefix, prefix_index: as in `generate`; `prefix.check_base` is left to the caller.
        bad_words_ids: token sequences that are never completed. A lone eos_id among them is
            ignored, as in [2]; min_new_tokens is for that.
        seeds: for sampling, one per prompt; None = config.seed + b.
        fast: through `fast.py`; False = the plain loops of `decoding.py`, same tokens.
    Raises:
        ValueError: a prompt that is empty or too long, an index that does not fit.
    """
    index, offsets = rows_of_prefix(prefix, prefix_index, len(prompts))
    check_tokens(prompts, model.config.vocab_size)
    longest = max(map(len, prompts))
    model.config.check_room(longest, config.max_new_tokens, max(offsets))
    bad_words_ids = [list(word) for word in bad_words_ids if list(word) != [eos_id]]
    if seeds is None:
        seeds = [config.seed + b for b in range(len(prompts))]

    with evaluating(model):
        acts = activations_for(model, prefix, index, offsets)
        args = (model, prompts, config, eos_id, acts, bad_words_ids)
        loops = fast_generation if fast else decoding
        if config.num_beams > 1:
            return loops.beam_search(*args)
        new = [[] for _ in prompts]
        for tokens in loops.greedy_or_sampled(*args, seeds):
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
    model: LanguageModel, tokenizer, prompt: str | list[int], *,
    prefix: AnyPrefix | None = None, prefix_index: int | None = None,
    config: GenerationConfig | None = None, fast: bool = True, **options,
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
    ids, (framed,), index, offsets = prepare(
        model, tokenizer, [prompt], prefix, prefix_index, config
    )
    bad_words_ids = [tokenizer.encode(word) for word in config.bad_words]

    @torch.inference_mode()  # of a generator: while it runs, not between its tokens
    def new_tokens() -> Iterator[int]:
        with evaluating(model):
            acts = activations_for(model, prefix, index, offsets)
            args = (model, ids, config, tokenizer.eos_id, acts, bad_words_ids, [config.seed])
            loops = fast_generation if fast else decoding
            for chosen in loops.greedy_or_sampled(*args):
                yield chosen[0]

    pieces = tokenizer.decode_stream(new_tokens())
    return stripped(pieces) if framed else pieces


def generate(
    model: LanguageModel, tokenizer, prompts: Sequence[str | list[int]], *,
    prefix: AnyPrefix | None = None, prefix_index: Sequence[int] | Tensor | None = None,
    batch_size: int = 64, config: GenerationConfig | None = None,
    progress: Callable[[int, int], None] | None = None, fast: bool = True, **options,
) -> list[str]:  # fmt: skip
    """Continue prompts, or answer them with a BART: the new text of each, in their order.

        generate(model, tokenizer, ["name : The Eagle"], prefix=prefix, num_beams=5)

    Args:
        prompts: a list of token ids is taken as it is. A text is encoded in the frame that its
            prefix, adapter or fine-tuned model was trained in (`frame_of`), and what comes back is
            without the white space at its ends. Without a frame, the text is continued as it is.
            For a BART it is the source, which always has its <s> and </s>.
        prefix: for all prompts, or a bank.
        prefix_index: with a bank, one int per prompt: which prefix it uses, -1 = none. None = as
            many prompts as prefixes, in the same order.
        batch_size: prompts at a time; it changes no text (beyond rounding).
        config, options: how tokens are chosen; options replace fields of config.
        progress: called after each batch with (prompts done, prompts in all).
        fast: False = the plain loops, several times slower; the same tokens (beyond rounding).
    Raises:
        ValueError: before any work, for options that make no sense, a prompt that is empty or too
            long, an index that does not fit, or a prefix of another model.
    """
    config = replace(config or GenerationConfig(), **options)
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of texts, got one text: {prompts!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    ids, framed, index, offsets = prepare(model, tokenizer, prompts, prefix, prefix_index, config)
    bad_words_ids = [tokenizer.encode(word) for word in config.bad_words]
    texts: dict[int, str] = {}
    room = model.config.room_for_prompt(config.max_new_tokens)
    for batch in batches([len(tokens) for tokens in ids], offsets, batch_size, room):
        new = generate_ids(
            model, [ids[b] for b in batch], config, tokenizer.eos_id,
            prefix=prefix, prefix_index=None if index is None else [index[b] for b in batch],
            bad_words_ids=bad_words_ids, seeds=[config.seed + b for b in batch], fast=fast,
        )  # fmt: skip
        texts |= {b: tokenizer.decode(tokens) for b, tokens in zip(batch, new, strict=True)}
        if progress is not None:
            progress(len(texts), len(ids))
    return [texts[b].strip() if framed[b] else texts[b] for b in range(len(ids))]
