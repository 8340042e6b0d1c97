"""Ends of texts and forbidden words: all tokens forbidden, stop strings, words in all forms,
several texts for a prompt; the same in all loops, inside autocast, and without fp64."""

import pytest
import torch
from conftest import hf_twin, tiny_bart, tiny_gpt2
from torch.overrides import TorchFunctionMode

from minprefix.generation import choice, decoding
from minprefix.generation import fast as fast_loops
from minprefix.generation.config import GenerationConfig
from minprefix.generation.stopping import Stopping, word_ids
from minprefix.generation.texts import generate, generate_ids, stream
from minprefix.models.weights import load
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.prefix import Prefix

WAYS = [{}, {"do_sample": True}, {"num_beams": 2}]


@pytest.fixture(scope="module")
def mini():
    return load("mini")


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("eos", [7, ()], ids=["eos", "no eos"])
def test_a_text_ends_where_every_token_is_forbidden(way, fast, eos):
    """8 tokens, none of them twice: no token is left after at most 8, eos being too early."""
    model = tiny_gpt2(vocab_size=8, eos_token_id=7, bos_token_id=7)
    config = GenerationConfig(max_new_tokens=12, min_new_tokens=12, no_repeat_ngram_size=1, **way)
    prompts = [[0, 1], [2], [3, 4, 5, 6, 0]]
    texts = generate_ids(model, prompts, config, eos, fast=fast)
    free = 7 if eos == 7 else 8  # tokens that may come at all
    for prompt, new in zip(prompts, texts, strict=True):
        assert len({*prompt, *new}) == len(prompt) + len(new) == free
    nothing = [[token] for token in range(8)]
    assert generate_ids(model, [[1], [2, 3]], GenerationConfig(max_new_tokens=5, **way), (),
                        bad_words_ids=nothing, fast=fast) == [[], []]  # fmt: skip


def test_beams_are_not_ended_by_forbidden_continuations_alone():
    """A dead beam and a living one: the living one continues, and only it counts."""
    model = tiny_gpt2(vocab_size=8, eos_token_id=7, bos_token_id=7)
    config = GenerationConfig(max_new_tokens=6, num_beams=3)
    bad = [[a, b] for a in range(7) for b in range(8) if b != a]  # each token by itself only
    for fast in (False, True):
        (new,) = generate_ids(model, [[2, 3]], config, (), bad_words_ids=bad, fast=fast)
        assert len(new) == 6 and set(new) == {3}


@pytest.mark.parametrize(
    "word, forms", [("cat", ["cat", " cat"]), (" cat", [" cat"]), ("\n", ["\n"])]
)
def test_words_are_forbidden_in_all_their_forms(mini, word, forms):
    _, tokenizer = mini
    assert word_ids(tokenizer, (word, word)) == [tokenizer.encode(form) for form in forms]


@pytest.mark.parametrize("way", [{}, {"num_beams": 2}], ids=str)
def test_a_bad_word_does_not_come_after_a_blank(mini, way):
    model, tokenizer = mini
    prompt, options = "The restaurant is in the centre", {"max_new_tokens": 8, **way}
    (before,) = generate(model, tokenizer, [prompt], **options)
    word = before.split()[0]
    (after,) = generate(model, tokenizer, [prompt], bad_words=(word,), **options)
    assert word not in after.split() and after != before


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_text_ends_before_a_stop_string(mini, way):
    """Which begins within a token and ends within another."""
    model, tokenizer = mini
    prompts, options = ["The river is", "A house"], {"max_new_tokens": 12, **way}
    whole = generate(model, tokenizer, prompts, **options)
    at = len(whole[0]) // 2
    stop = (whole[0][at : at + 3], "no such text")
    if way.get("num_beams"):  # a stop string is an end like others: another beam may be the best
        texts = generate(model, tokenizer, prompts, stop=stop, **options)
        assert not any(string in text for string in stop for text in texts)
        assert texts == generate(model, tokenizer, prompts, stop=stop, fast=False, **options)
        return
    expected = [text.split(stop[0])[0] for text in whole]
    assert expected[0] != whole[0]
    for fast in (False, True):
        assert generate(model, tokenizer, prompts, stop=stop, fast=fast, **options) == expected
        pieces = stream(model, tokenizer, prompts[0], stop=stop, fast=fast, **options)
        assert "".join(pieces) == expected[0]


def test_rows_that_stop_are_read_no_further(mini, monkeypatch):
    model, tokenizer = mini
    (whole,) = generate(model, tokenizer, ["The river is"], max_new_tokens=12)
    read = []
    step = fast_loops.Decoding.step
    monkeypatch.setattr(fast_loops.Decoding, "step", lambda *a: read.append(1) or step(*a))
    generate(model, tokenizer, ["The river is"], max_new_tokens=12, stop=(whole[:3],))
    assert len(read) <= 3


def test_pieces_that_may_become_a_stop_string_wait():
    cut = Stopping((), None, ("STOP", "END!"))
    assert list(cut.cut_pieces(iter(["abcde", "fST", "OP"]))) == ["ab", "cde", "f"]
    for pieces in (["abcdST", "OPyEND!"], list("abcdSTOPEND!"), ["abcd", "STOP"]):
        assert "".join(cut.cut_pieces(iter(pieces))) == "abcd"
    assert "".join(cut.cut_pieces(iter(["ab", "ST"]))) == "abST"


def test_several_texts_for_a_prompt(mini):
    model, tokenizer = mini
    prompts, options = ["The river is", "A house"], {"max_new_tokens": 6}
    four = generate(model, tokenizer, prompts, do_sample=True, seed=5, num_return_sequences=2,
                    batch_size=3, **options)  # fmt: skip
    alone = [generate(model, tokenizer, [p], do_sample=True, seed=5 + n, **options)[0]
             for n, p in enumerate([p for p in prompts for _ in range(2)])]  # fmt: skip
    assert four == alone and len(set(four)) == 4
    beams = {"num_beams": 3, **options}
    best = generate(model, tokenizer, prompts, num_return_sequences=3, **beams)
    assert best[::3] == generate(model, tokenizer, prompts, **beams) and len(set(best)) == 6
    with pytest.raises(ValueError, match="num_return_sequences 2 needs do_sample=True or as many"):
        generate(model, tokenizer, prompts, num_return_sequences=2)
    with pytest.raises(ValueError, match="one text can be streamed"):
        stream(model, tokenizer, "a", do_sample=True, num_return_sequences=2)


@pytest.mark.parametrize("fast", [False, True])
def test_the_best_beams_are_those_of_transformers(fast):
    model, prompts = tiny_gpt2(), [[5, 6, 7], [20, 30]]
    config = GenerationConfig(max_new_tokens=6, num_beams=4, num_return_sequences=3)
    twin = hf_twin(model)
    theirs = [row[len(p) :] for p in prompts for row in twin.generate(
        torch.tensor([p]), attention_mask=torch.ones(1, len(p)), max_new_tokens=6, num_beams=4,
        num_return_sequences=3, do_sample=False, eos_token_id=96, pad_token_id=96,
    ).tolist()]  # fmt: skip
    theirs = [new[: new.index(96)] if 96 in new else new for new in theirs]
    assert generate_ids(model, prompts, config, 96, fast=fast) == theirs


def test_nothing_is_a_prompt(mini):
    model, tokenizer = mini
    options = {"max_new_tokens": 5}
    assert generate(model, tokenizer, [""], **options) == generate(
        model, tokenizer, [[tokenizer.bos_id]], **options
    )


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("family", ["GPT-2", "BART"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_generation_inside_autocast(family, way, dtype):
    model = (tiny_gpt2 if family == "GPT-2" else tiny_bart)(dtype=torch.float32)
    prefix = (Prefix if family == "GPT-2" else BARTPrefix).random(model.config, 3, 0)
    config, prompts = GenerationConfig(max_new_tokens=6, **way), [[5, 6, 7], [8, 9]]
    with torch.autocast("cpu", dtype):
        plain, quick = (
            generate_ids(model, prompts, config, 2, prefix=prefix, fast=fast)
            for fast in (False, True)
        )
    assert plain == quick and all(plain)


class NoFp64(TorchFunctionMode):
    """Refuses scores in fp64; draws are made in it on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        scores = isinstance(out, torch.Tensor) and out.dim() > 1 and out.shape[-1] == 97
        assert not (scores and out.dtype == torch.float64)
        return out


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_apple_gpus_are_asked_for_no_fp64(way, monkeypatch):
    assert decoding.widest(torch.device("mps")) == torch.float32
    assert decoding.widest(torch.device("cpu")) == torch.float64
    model, config = tiny_gpt2(dtype=torch.float32), GenerationConfig(max_new_tokens=5, **way)
    exact = generate_ids(model, [[5, 6]], config, 96)
    for module in (decoding, choice):
        monkeypatch.setattr(module, "widest", lambda device: torch.float32)
    for quick in (False, True):
        with NoFp64():
            assert generate_ids(model, [[5, 6]], config, 96, fast=quick) == exact


def test_beams_run_on_where_most_of_the_best_continuations_are_ends():
    """With n end tokens (1 + n) K continuations are looked at, as in transformers."""
    from test_generation import prefer

    ends = [*range(10, 22)]
    model = prefer(tiny_gpt2(), ends, 0.5)
    twin, prompts = hf_twin(model), [[5, 6, 7], [30, 40], [50], [60, 2, 3]]
    config = GenerationConfig(max_new_tokens=8, num_beams=3, min_new_tokens=2)
    theirs = [twin.generate(
        torch.tensor([p]), attention_mask=torch.ones(1, len(p)), max_new_tokens=8, num_beams=3,
        min_new_tokens=2, do_sample=False, eos_token_id=ends, pad_token_id=96,
    )[0, len(p) :].tolist() for p in prompts]  # fmt: skip
    theirs = [new[: min((new.index(t) for t in ends if t in new), default=8)] for new in theirs]
    for fast in (False, True):
        assert generate_ids(model, prompts, config, ends, fast=fast) == theirs
