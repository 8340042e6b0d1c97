"""BART's texts against `generate` of transformers in fp64: greedy, beams, forced tokens, blocked
n-grams; the fast loops against the plain ones, also with static shapes."""

import weakref

import pytest
import torch
from conftest import hf_bart_twin, tiny_bart
from test_fast_generation import captured  # noqa: F401  (a fixture)

from minprefix.generation import fast
from minprefix.generation.config import GenerationConfig
from minprefix.generation.texts import generate, generate_ids
from minprefix.models.weights import load
from minprefix.prefix.bart import BARTPrefix

EOS = 2
CNN = {
    "forced_bos_token_id": 0, "no_repeat_ngram_size": 3, "early_stopping": True,
    "length_penalty": 2.0,
}  # fmt: skip
# the model's own settings (those of a plain config, of bart-large-cnn), and the caller's
SETTINGS = {
    "greedy": ({}, {}),
    "greedy, cnn": (CNN, {}),
    "beams, cnn": (CNN, {"num_beams": 6}),
    "beams, paper": ({"no_repeat_ngram_size": 3}, {"num_beams": 6, "length_penalty": 0.8}),
    "beams, no end": (CNN | {"forced_eos_token_id": None}, {"num_beams": 4, "min_new_tokens": 5}),
    "bigrams": ({}, {"num_beams": 2, "no_repeat_ngram_size": 2, "early_stopping": True}),
    "single tokens": ({}, {"no_repeat_ngram_size": 1}),
}


def writer(**own):
    """A random model whose texts differ with the source, and in length."""
    model = tiny_bart(**own)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 2 if weight.dim() == 2 else 1  # clear preferences
        model.head_bias[EOS] += 2.5
    return model


def sources(count: int = 50, longest: int = 15, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(4, 97, (n,), generator=generator).tolist() for n in lengths]


def hf_generate(model, prompts: list[list[int]], **options) -> list[list[int]]:
    """New tokens of `generate`, up to the end of text, without a first one that is forced."""
    twin, own = hf_bart_twin(model), model.config
    S = max(map(len, prompts))
    ids = torch.tensor([p + [1] * (S - len(p)) for p in prompts])
    settings = {
        name: getattr(own, name)
        for name in ("forced_bos_token_id", "forced_eos_token_id", "no_repeat_ngram_size")
    }
    if options.get("num_beams", 1) > 1:
        names = ("early_stopping", "length_penalty")
        settings |= {name: getattr(own, name) for name in names}
    if "min_new_tokens" in options:
        twin.generation_config.min_length = 0
    for name, value in (settings | options).items():
        setattr(twin.generation_config, name, value)
    given = own.forced_bos_token_id is not None
    out = twin.generate(ids, attention_mask=(ids != 1).long(), do_sample=False)
    rows = [row[1 + given :] for row in out.tolist()]  # after the start token
    return [row[: row.index(EOS)] if EOS in row else row for row in rows]


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_equal_transformers_for_50_inputs(name):
    own, options = SETTINGS[name]
    model, prompts = writer(**own), sources()
    config = GenerationConfig(max_new_tokens=20, **options)
    exact = hf_generate(model, prompts, max_new_tokens=20, **options)
    plain = generate_ids(model, prompts, config, EOS, fast=False)
    assert plain == exact
    assert generate_ids(model, prompts, config, EOS) == plain
    assert len(set(map(tuple, plain))) > 20
    if name != "single tokens":  # there the start token, </s>, has been seen: no text ends early
        assert len(set(map(len, plain))) >= 3


@pytest.mark.parametrize("form", ["table", "gate", "embedding", "offset"])
@pytest.mark.parametrize("num_beams", [1, 4])
def test_fast_equals_plain_with_a_prefix_and_rows_alone(form, num_beams):
    model = writer(**CNN)
    options = {"gate": {"gate": True}, "embedding": {"parametrisation": "embedding"},
               "offset": {"position_offset": 5}}.get(form, {})  # fmt: skip
    prefix = BARTPrefix.random(model.config, 3, 0, **options).double()
    for gate in prefix.gates().values():
        gate.data.uniform_(0.2, 2.0, generator=torch.Generator().manual_seed(0))
    config, prompts = GenerationConfig(max_new_tokens=12, num_beams=num_beams), sources(9)
    plain = generate_ids(model, prompts, config, EOS, prefix=prefix, fast=False)
    assert generate_ids(model, prompts, config, EOS, prefix=prefix) == plain
    alone = [generate_ids(model, [p], config, EOS, prefix=prefix)[0] for p in prompts]
    assert alone == plain
    assert generate_ids(model, prompts, config, EOS) != plain  # without the prefix


@pytest.mark.parametrize("name", SETTINGS)
def test_static_shapes_equal_plain(name, captured):  # noqa: F811
    """One batch is kept with its graphs: for other sources, more of them and then fewer, another
    last token that is forced, and another prefix."""
    own, options = SETTINGS[name]
    model, found = writer(**own), []
    prefix = BARTPrefix.random(model.config, 3, 0, gate=True).double()
    for gate in prefix.gates().values():
        gate.data.uniform_(0.2, 2.0, generator=torch.Generator().manual_seed(0))
    other, addresses = BARTPrefix.random(model.config, 3, 1, gate=True).double(), set()
    calls = (9, 3, 12, prefix), (13, 4, 11, prefix), (9, 3, 12, prefix), (9, 3, 12, other)
    for rows, seed, n, read_prefix in calls:
        args = model, sources(rows, seed=seed), GenerationConfig(max_new_tokens=n, **options), EOS
        plain = generate_ids(*args, prefix=read_prefix, fast=False)
        assert generate_ids(*args, prefix=read_prefix) == plain
        found.append(plain)
        [batch] = fast.KEPT.values()
        source, sites = batch.options["source"], batch.acts.sites.values()
        read = [source.kv, source.lens, *(x for site in sites for x in site.leaves())]
        addresses.add(tuple(x.data_ptr() for x in read))
    assert len(addresses) == 1 and len(read) == 2 + 2 * 3
    assert source.states.untyped_storage().nbytes() == 0  # no memory of the first sources
    assert found[0] == found[2] != found[1]
    assert len(captured) == len(batch.graphs) > 1
    assert plain != found[0] == generate_ids(*args, prefix=prefix, fast=False)  # it is as it was
    assert generate_ids(*args) == generate_ids(*args, fast=False) != found[0]
    assert len(captured) > len(batch.graphs)  # without a prefix a batch of its own


@pytest.mark.usefixtures("captured")
def test_longer_sources_get_a_batch_of_their_own():
    model, config, columns = writer(), GenerationConfig(max_new_tokens=12), []
    for longest in (15, 30, 15):
        args = model, sources(9, longest), config, EOS
        assert generate_ids(*args) == generate_ids(*args, fast=False)
        [batch] = fast.KEPT.values()
        columns.append(batch.options["source"].kv.shape[4])
    assert columns == [16, 32, 16]


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("num_beams", [1, 3])
def test_steps_hold_the_sources_once(num_beams, monkeypatch):
    """The encoder's result is freed when the batch has its copy."""
    model, results, alive = writer(), [], []
    with_keys, step = model.with_keys, fast.Decoding.step

    def noted(source):
        source = with_keys(source)
        results.append(weakref.ref(source))
        return source

    def noted_step(self, model):
        alive.append(results[0]() is not None)
        return step(self, model)

    monkeypatch.setattr(model, "with_keys", noted)
    monkeypatch.setattr(fast.Decoding, "step", noted_step)
    generate_ids(model, sources(9), GenerationConfig(8, num_beams=num_beams), EOS)
    assert alive and not any(alive)


@pytest.mark.usefixtures("captured")
def test_a_kept_batch_follows_the_bias_of_the_head():
    model = writer()
    args = model, sources(9), GenerationConfig(max_new_tokens=12), EOS
    before = generate_ids(*args)
    [batch] = fast.KEPT.values()
    model.head_bias = model.head_bias.clone()  # at another address
    model.head_bias[7] += 9
    assert generate_ids(*args) == generate_ids(*args, fast=False) != before
    assert batch not in fast.KEPT.values()


def test_sampling_and_bad_words_are_the_same_in_both_loops():
    model, prompts = writer(**CNN), sources(8)
    config = GenerationConfig(max_new_tokens=12, do_sample=True, top_p=0.9, seed=4)
    bad = [[5], [7, 8]]
    plain, fast = (
        generate_ids(model, prompts, config, EOS, bad_words_ids=bad, fast=fast)
        for fast in (False, True)
    )
    assert plain == fast and not any(5 in tokens for tokens in plain)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_encoder_runs_once_and_its_keys_are_made_once(num_beams, monkeypatch):
    model, calls = writer(), []
    cross = type(model.decoder.h[0].cross)
    made = cross.keys_and_values
    monkeypatch.setattr(
        cross, "keys_and_values", lambda self, x: calls.append(len(x)) or made(self, x)
    )
    encode = model.encode
    monkeypatch.setattr(
        model, "encode", lambda *args, **kw: calls.append("source") or encode(*args, **kw)
    )
    generate_ids(model, sources(5), GenerationConfig(8, num_beams=num_beams), EOS)
    assert calls == ["source", *[5] * model.config.n_layer]  # beams share them, too


def test_what_cannot_be_generated_is_named():
    model = writer(**CNN)

    def error(prompts=((5,),), **options) -> str:
        with pytest.raises(ValueError) as caught:
            generate_ids(model, [list(p) for p in prompts], GenerationConfig(**options), EOS)
        return str(caught.value)

    assert "first token is forced" in error(max_new_tokens=1)
    assert "49 source tokens + position offset 0 > 48" in error([[5] * 49], max_new_tokens=5)
    assert "49 start and new tokens" in error(max_new_tokens=48)
    assert "no tokens" in error([[]])
    with pytest.raises(ValueError, match="no_repeat_ngram_size must be at least 0, got -1"):
        GenerationConfig(no_repeat_ngram_size=-1)


@pytest.mark.slow
def test_mini_bart_writes_what_transformers_writes():
    from transformers import BartForConditionalGeneration, BartTokenizer

    from minprefix.models.weights import ASSETS

    model, tokenizer = load("mini-bart", dtype=torch.float64)
    folder = ASSETS / "mini-bart"
    twin = BartForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)
    theirs = BartTokenizer.from_pretrained(folder)
    texts = ["The river is <mask>", "name : The Eagle | food : Chinese", "a"]
    prompts = [tokenizer.encode(t.split("<")[0]) for t in texts]
    prompts = [
        [0, *p, 8195, 2] if "<" in t else [0, *p, 2] for t, p in zip(texts, prompts, strict=True)
    ]
    for num_beams in (1, 4):
        for prompt in prompts:
            out = twin.generate(
                torch.tensor([prompt]), max_new_tokens=12, num_beams=num_beams, do_sample=False
            )
            expected = theirs.decode(out[0], skip_special_tokens=True)
            options = {"max_new_tokens": 12, "num_beams": num_beams}
            assert generate(model, tokenizer, [prompt], **options) == [expected]
