"""Infix [x; INFIX; y]: against equation (3) written as a loop over positions; padding, decoding.

Tolerances allow for other orders of summation in fp64: 1e-12 of the largest number; the worst error
seen in this file is 1.0e-15.
"""

import pytest
import torch
from conftest import assert_close, random_ids, tiny_gpt2
from test_prefix import Words, literal_logits

from minprefix.data.batches import collate, encode_examples, encode_prompt
from minprefix.data.examples import Example
from minprefix.generation.config import GenerationConfig
from minprefix.generation.decoding import Beginning, Rows
from minprefix.generation.texts import generate_ids
from minprefix.models.gpt2 import GPT2
from minprefix.prefix.bank import PrefixBank
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.make import make_prefix
from minprefix.prefix.parametrisations import token_activations
from minprefix.prefix.prefix import Prefix

LENGTHS, STARTS = [9, 4, 1, 7], [5, 3, 0, 0]  # tokens of each row, and the first after the infix


def random_infix(model: GPT2, P: int = 3, seed: int = 0, **options) -> Prefix:
    options = {"mid_dim": 8, "place": "infix", **options}
    infix = Prefix.random(model.config, P, seed, **options).double()
    if infix.gate is not None:
        torch.nn.init.uniform_(infix.gate, 0.1, 2, torch.Generator().manual_seed(seed))
    return infix


@pytest.mark.parametrize("parametrisation", ["table", "mlp"])
def test_equals_equation_3_row_by_row(parametrisation):
    """A padded batch; the padding after the rows holds random tokens."""
    model = tiny_gpt2().requires_grad_(False)
    infix = random_infix(model, parametrisation=parametrisation)
    ids, lengths = random_ids(model, 4, 9), torch.tensor(LENGTHS)
    starts = torch.tensor(STARTS)
    real = torch.arange(9) < lengths[:, None]
    logits = model(ids, prefix=infix, starts=starts, kv_lens=lengths)[real]
    table = infix.table()
    exact = torch.cat(
        [
            literal_logits(model, ids[b, :n].tolist(), table, infix.prefix_len, start=STARTS[b])
            for b, n in enumerate(LENGTHS)
        ]
    )
    assert_close(logits, exact, 1e-12)  # other orders of summation in fp64; worst seen: 9.4e-16
    generator = torch.Generator().manual_seed(2)
    do = torch.randn(exact.shape, generator=generator, dtype=exact.dtype)
    got, expected = (
        torch.autograd.grad((x * do).sum(), list(infix.parameters())) for x in (logits, exact)
    )
    for x, y in zip(got, expected, strict=True):
        assert (y != 0).all()
        assert_close(x / y.abs().max(), y / y.abs().max(), 1e-10)  # worst seen: 1.3e-15
    # without kv_lens, too: causality alone hides the padding
    assert_close(model(ids, prefix=infix, starts=starts)[real], exact, 1e-12)


@torch.no_grad()
def test_only_tokens_behind_it_see_it():
    """Those before are bit for bit those of the frozen model, whatever the infix holds."""
    model = tiny_gpt2()
    infix, ids, starts = random_infix(model), random_ids(model, 4, 9), torch.tensor(STARTS)
    before = torch.arange(9) < starts[:, None]
    frozen, logits = model(ids), model(ids, prefix=infix, starts=starts)
    assert torch.equal(logits[before], frozen[before])
    infix.prefix_table *= -50
    changed = model(ids, prefix=infix, starts=starts)
    assert torch.equal(changed[before], logits[before])
    assert ((changed - logits).abs().amax(-1) > 1e-3)[~before].all()


@torch.no_grad()
@pytest.mark.parametrize("gate", [False, True])
def test_at_the_beginning_it_is_a_prefix(gate):
    model = tiny_gpt2()
    infix, ids = random_infix(model, gate=gate, position_offset=3), random_ids(model, 2, 6)
    prefix = Prefix.from_table(infix.table(), 3, infix.gate)
    logits = model(ids, prefix=infix, starts=torch.tensor([0, 0]))
    assert_close(logits, model(ids, prefix=prefix), 1e-13)
    for row in range(2):
        exact = literal_logits(model, ids[row].tolist(), infix.table(), 3, infix.gate)
        assert_close(logits[row], exact, 1e-12)


@torch.no_grad()
def test_gate_of_zero_is_the_frozen_model():
    model = tiny_gpt2()
    infix = Prefix.random(model.config, 3, 0, place="infix", gate=True).double()
    ids = random_ids(model, 2, 6)
    assert infix.position_offset == 0
    assert torch.equal(model(ids, prefix=infix, starts=torch.tensor([4, 1])), model(ids))


@torch.no_grad()
def test_a_bank_mixes_places():
    """Prefixes, infixes and neither, gated and not, in one batch: each row as it is alone."""
    model = tiny_gpt2()
    prefixes = [
        random_infix(model, 3),
        Prefix.random(model.config, 5, 1).double(),
        random_infix(model, 1, 2, gate=True),
        random_infix(model, 2, 3, position_offset=9),
    ]
    ids, starts = random_ids(model, 6, 9), torch.tensor([5, 3, 0, 8, 2, 4])
    for chosen in ([0, 1, 2, 3, -1, 0], [3, 0, -1, 1, 0, 3]):  # the second: no gate in the bank
        bank = PrefixBank(prefixes if 2 in chosen else prefixes[:2] + prefixes[3:])
        index = torch.tensor(chosen if 2 in chosen else [min(n, 2) for n in chosen])
        logits = model(ids, prefix=bank, prefix_index=index, starts=starts)
        for b, n in enumerate(chosen):
            alone = {} if n < 0 else {"prefix": prefixes[n], "starts": starts[b : b + 1]}
            assert_close(logits[b], model(ids[b : b + 1], **alone)[0], 1e-12)


@torch.no_grad()
def test_reading_on_equals_reading_at_once():
    """Prompts of several lengths, then pieces after them: what decoding does."""
    model, infix = tiny_gpt2(), random_infix(tiny_gpt2())
    texts, prompt_lens = [random_ids(model, n, seed=n).tolist() for n in (12, 7, 9)], [8, 1, 4]
    prompts = [text[:n] for text, n in zip(texts, prompt_lens, strict=True)]
    rows = Rows(model, Beginning(prompts), infix.activations(), n_new=6)
    ends = [0, 0, 0]
    for more in (prompt_lens, [1, 3, 2], [1, 1, 1]):
        pieces = [text[e : e + n] for text, e, n in zip(texts, ends, more, strict=True)]
        logits, ends = rows.read(pieces), [e + n for e, n in zip(ends, more, strict=True)]
        for b, (text, start) in enumerate(zip(texts, prompt_lens, strict=True)):
            starts = torch.tensor([start - 1])
            exact = model(torch.tensor([text[: ends[b]]]), prefix=infix, starts=starts)[0, -1]
            assert_close(logits[b], exact, 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("fast", [False, True])
def test_greedy_equals_the_literal_loop(fast):
    """Mixed lengths in one batch, against equation (3) read anew for each token."""
    model, infix = tiny_gpt2(), random_infix(tiny_gpt2())
    prompts = [random_ids(model, n, seed=n).tolist() for n in (5, 1, 8)]
    config = GenerationConfig(max_new_tokens=4)
    got = generate_ids(model, prompts, config, eos_id=-1, prefix=infix, fast=fast)
    for prompt, new in zip(prompts, got, strict=True):
        text = list(prompt)
        for _ in range(4):
            logits = literal_logits(
                model, text, infix.table(), infix.prefix_len, start=len(prompt) - 1
            )
            text.append(logits[-1].argmax().item())
        assert new == text[len(prompt) :]


def test_training_and_generation_agree_on_its_place(tokenizer):
    """Between source and bos, in both frames: the bos is the first token after it."""
    for frame in ("paper", "original-code"):
        rows = encode_examples(tokenizer, [Example("a boat", ("It floats.",))], frame)
        batch = collate(rows, tokenizer.eos_id)
        prompt = encode_prompt(tokenizer, "a boat", frame)
        assert batch.starts.tolist() == [len(prompt) - 1]
        assert batch.input_ids[0, batch.starts[0]] == tokenizer.bos_id == prompt[-1]


@torch.no_grad()
def test_start_from_words_and_files(tmp_path):
    """The activations of the words alone; an MLP is fitted to them; a file remembers the place."""
    model, words = tiny_gpt2(), "some words of a task"
    table = token_activations(model, Words().encode(words))
    options = {
        "init": "words",
        "init_text": words,
        "place": "infix",
        "mid_dim": 16,
        "prefix_len": 5,
    }
    for parametrisation in ("table", "mlp"):
        config = PrefixConfig(parametrisation=parametrisation, **options)
        infix = make_prefix(model, Words(), config, seed=0)
        assert_close(infix.table(), table, 1e-12)
    infix.save(tmp_path / "a.safetensors")
    loaded = Prefix.load(tmp_path / "a.safetensors")
    assert loaded.place == infix.export().place == "infix" and loaded.position_offset == 5


def test_what_makes_no_sense_is_refused():
    model = tiny_gpt2()
    infix, ids = random_infix(model), random_ids(model, 2, 6)
    for prefix in (infix, infix.activations()):
        with pytest.raises(ValueError, match="an infix needs `starts`"):
            model(ids, prefix=prefix)
    with pytest.raises(ValueError, match="an infix needs `starts`"):
        model(ids, prefix=PrefixBank([infix, infix]))
    with pytest.raises(ValueError, match=r"`starts` \(B,\).* got \(2, 1\)"):
        model(ids, prefix=infix, starts=torch.tensor([[0], [1]]))
    for kind in ("embedding", "embedding-mlp"):
        with pytest.raises(ValueError, match=f"'{kind}' needs place 'prefix'"):
            PrefixConfig(parametrisation=kind, place="infix")
        with pytest.raises(ValueError, match=f"'{kind}' needs place 'prefix'"):
            Prefix.random(model.config, 3, 0, parametrisation=kind, place="infix")
    with pytest.raises(ValueError, match="a prompt comes before the text, got place 'infix'"):
        Prefix.from_prompt(model, Words(), "some words", place="infix")
    with pytest.raises(ValueError, match="place must be one of prefix, infix, got 'suffix'"):
        Prefix.random(model.config, 3, 0, place="suffix")
