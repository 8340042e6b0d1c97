"""Batches: the frame of an example, padding and labels, the order of rows."""

import random
import re
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from minprefix.data import batches
from minprefix.data.batches import (
    BatchOrder,
    Encoded,
    collate,
    encode_examples,
    encode_pair,
    encode_prompt,
    epoch_batches,
    pinned,
    warn_of_cuts,
)
from minprefix.data.examples import Example
from minprefix.models.losses import IGNORE
from minprefix.models.tokenizer import Tokenizer

MINI = Path(batches.__file__).parents[1] / "assets" / "mini"
quick = settings(deadline=None, derandomize=True, max_examples=40)


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), Tokenizer.from_folder(MINI)])
def test_frame_round_trip(tokenizer):
    pair = encode_pair(tokenizer, "name : É", "It is.", where="f:1")
    prompt, target = pair.ids[: pair.prompt_len], pair.ids[pair.prompt_len :]
    assert prompt == encode_prompt(tokenizer, "name : É")
    assert (prompt[-1], target[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert pair.where == "f:1"
    assert tokenizer.decode(prompt[:-1]) == "name : É"
    assert tokenizer.decode(target[:-1]) == " It is."
    pair = encode_pair(tokenizer, " | s", "It is. ", "original-code")
    assert tokenizer.decode(pair.ids[: pair.prompt_len - 1]) == "  | s "
    assert tokenizer.decode(pair.ids[pair.prompt_len : -1]) == " It is.  "


def test_only_max_source_cuts_and_only_the_source():
    tokenizer, article = byte_tokenizer(), Example("0123456789", ("a summary",), None, "f:1")
    (whole,) = encode_examples(tokenizer, [article])
    for max_source, kept in ((4, "0123"), (10, "0123456789"), (512, "0123456789")):
        (pair,) = encode_examples(tokenizer, [article], max_source=max_source)
        assert tokenizer.decode(pair.ids[: pair.prompt_len - 1]) == kept
        assert pair.ids[pair.prompt_len :] == whole.ids[whole.prompt_len :]
        assert pair.ids[pair.prompt_len - 1] == tokenizer.bos_id
        prompt = encode_prompt(tokenizer, article.source, max_source=max_source)
        assert prompt == pair.ids[: pair.prompt_len]
    with pytest.raises(ValueError, match="max_source must be at least 1, got 0"):
        encode_prompt(tokenizer, "a", max_source=0)
    with pytest.raises(ValueError, match=r"f:1: 22 tokens \(source 10, target 11\), at most 21"):
        encode_examples(tokenizer, [article], max_len=21)


def test_too_long_pairs_are_counted_and_what_helps_does():
    """The --max-source that the message names makes all pairs fit, and one more does not."""
    tokenizer, long = byte_tokenizer(), Example("0123456789", ("a", "longer"), None, "f:2")
    few = [Example("a", ("b",), None, "f:1"), long]
    told = "2 of 3 pairs are too long: train --max-source 3 cuts sources, or remove the pairs"
    with pytest.raises(ValueError, match=re.escape(told)):
        encode_examples(tokenizer, few, max_len=12)
    assert len(encode_examples(tokenizer, few, max_len=12, max_source=3)) == 3
    with pytest.raises(ValueError, match="1 of 3 pairs is too long"):
        encode_examples(tokenizer, few, max_len=12, max_source=4)
    with pytest.raises(ValueError, match="shorten the target, or remove the pairs"):
        encode_examples(tokenizer, few, max_len=6)


def test_cut_sources_are_counted(caplog):
    sources = [("0123456789", "paper", 4), ("ab", "paper", 4), ("0123456", "paper", None)]
    warn_of_cuts(byte_tokenizer(), sources[1:])
    assert not caplog.text
    warn_of_cuts(byte_tokenizer(), sources)
    warn_of_cuts(byte_tokenizer(), [sources[0], ("0123456", "original-code", 4)])
    assert caplog.messages == [
        "note: 1 of 3 sources is cut, from 10 to 4 tokens (max_source)",
        "note: 2 of 2 sources are cut, the longest from 10 to 4 tokens (max_source)",
    ]


def test_encode_examples_takes_every_pair_and_refuses_long_or_empty_ones():
    examples = [Example("a", ("b", "cc"), None, "f:1"), Example("d", ("e",), None, "f:2")]
    encoded = encode_examples(byte_tokenizer(), examples, max_len=6)
    assert [row.where for row in encoded] == ["f:1 (target 1)", "f:1 (target 2)", "f:2"]
    assert [len(row.ids) for row in encoded] == [5, 6, 5]  # a, bos, blank, b or cc, eos
    with pytest.raises(ValueError, match=r"f:1 \(target 2\): 6 tokens .*, at most 5 are allowed"):
        encode_examples(byte_tokenizer(), examples, max_len=5)
    with pytest.raises(ValueError, match="f:3: the target is empty"):
        encode_examples(byte_tokenizer(), [Example("a", (" ",), None, "f:3")])


def test_collate_shifts_masks_and_pads():
    batch = collate([Encoded([1, 2, 9, 5, 6, 9], 3, ""), Encoded([3, 9, 7, 9], 2, "")], pad_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 9, 5, 6], [3, 9, 7, 9, 9]]
    assert batch.labels.tolist() == [[IGNORE, IGNORE, 5, 6, 9], [IGNORE, 7, 9, IGNORE, IGNORE]]
    assert batch.lengths.tolist() == [5, 3]
    assert {x.dtype for x in (batch.input_ids, batch.labels, batch.lengths)} == {torch.int64}
    with pytest.raises(ValueError, match="at least one example"):
        collate([], pad_id=0)


@quick
@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=300),
    st.integers(1, 9),
    st.integers(0, 2**40),
    st.integers(0, 5),
)
def test_epoch_batches_cover_every_index_once(lengths, batch_size, seed, epoch):
    batches = epoch_batches(lengths, batch_size, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert max(map(len, batches)) <= batch_size


def test_epoch_batches_depend_on_seed_and_epoch_alone():
    lengths = [(7 * i) % 61 for i in range(600)]
    torch.manual_seed(0), random.seed(0)
    first = epoch_batches(lengths, 8, seed=3, epoch=1)
    torch.manual_seed(1), random.seed(1)
    state = torch.get_rng_state()
    assert epoch_batches(lengths, 8, seed=3, epoch=1) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert epoch_batches(lengths, 8, seed=3, epoch=2) != first
    assert epoch_batches(lengths, 8, seed=4, epoch=1) != first


def test_epoch_batches_have_similar_lengths_in_random_order():
    lengths = [(37 * i) % 101 for i in range(4_000)]
    batches = epoch_batches(lengths, 10, seed=0, epoch=0)
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    # 500 lengths sorted, 10 neighbours: 2 % of the range of 101 on average; random rows have 83.
    assert sum(spread) / len(spread) < 5
    # Without shuffled batches, the first pool would run from the shortest to the longest.
    shortest = [min(lengths[i] for i in b) for b in batches[:50]]
    assert shortest != sorted(shortest)
    # Without shuffled rows, another epoch would have the same batches in another order.
    again = epoch_batches(lengths, 10, seed=0, epoch=1)
    assert len({frozenset(b) for b in batches} & {frozenset(b) for b in again}) < 10


def test_batch_order_is_a_function_of_the_step():
    lengths = [5, 9, 2, 7, 3, 3, 8]
    order = BatchOrder(lengths, 3, seed=1)
    assert order.steps_per_epoch == 3
    run = [order.batch(step) for step in range(9)]
    assert run == [b for epoch in range(3) for b in epoch_batches(lengths, 3, 1, epoch)]
    resumed = BatchOrder(lengths, 3, seed=1)
    assert [resumed.batch(step) for step in (8, 0, 4)] == [run[8], run[0], run[4]]


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: epoch_batches([1], 0, 0, 0), "at least 1, got 0 and 1"),
        (lambda: epoch_batches([], 2, 0, 0), "at least 1, got 2 and 0"),
        (lambda: epoch_batches([1], 1, -1, 0), "must not be negative, got -1 and 0"),
        (lambda: encode_prompt(None, "", "x"), "linearisation must be one of .* got 'x'"),
        (lambda: BatchOrder([1], 1, 0).batch(-1), "step must not be negative, got -1"),
    ],
)
def test_wrong_batch_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_only_what_is_on_the_cpu_is_pinned():
    """A batch that a GPU has already is not touched (a meta tensor is not on the CPU either)."""
    x = torch.empty(2, device="meta")
    assert pinned(x, torch.device("cuda")) is x
    on_cpu = torch.zeros(2)
    assert pinned(on_cpu, torch.device("cpu")) is on_cpu
