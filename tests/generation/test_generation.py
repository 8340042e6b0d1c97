"""Generation: against `transformers`, batches against single rows, prefixes, sampling, errors."""

import warnings

import pytest
import torch
from conftest import hf_twin, tiny_gpt2

from minprefix.data.batches import encode_prompt
from minprefix.generation.config import Decided, GenerationConfig
from minprefix.generation.decoding import sample, sampling_probabilities
from minprefix.generation.texts import generate, generate_ids, stream
from minprefix.models.gpt2 import GPT2
from minprefix.prefix.bank import PrefixBank
from minprefix.prefix.prefix import Prefix

EOS = 96  # of the tiny models
BAD_WORDS = [[5], [7, 8], [20, 9, 11], [EOS]]  # ids; a lone eos is ignored
TEXTS = [
    f"name : {name} | {more} | area : {area}"
    for name in ("The Eagle", "Aromi", "Blue Spice", "Cotto", "The Phoenix")
    for more in ("Type : pub", "food : Chinese", "food : Indian | price : cheap",
                 "Type : restaurant | customer rating : 5 out of 5 | family friendly : yes",
                 "near : Burger King, beyond the river and the old railway station")
    for area in ("riverside", "the centre of a small town by the sea")
]  # fmt: skip


class Chars:
    """A tokenizer for the tiny models: one printable character a token."""

    bos_id = eos_id = EOS

    def encode(self, text: str) -> list[int]:
        return [ord(char) - 32 for char in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token + 32) for token in ids)

    def decode_stream(self, ids):
        for token in ids:
            yield self.decode([token])


@pytest.fixture(scope="module")
def mini():
    from minprefix.models.weights import load

    return load("mini", dtype=torch.float64)


def random_prompts(count: int = 50, longest: int = 20, seed: int = 3) -> list[list[int]]:
    """Token ids, 1 to `longest` of them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(EOS, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def prefer(model: GPT2, tokens: list[int], strength: float) -> GPT2:
    """Make these tokens likelier: their embeddings move towards the mean hidden state."""
    hidden = torch.cat([model.hidden_states(torch.tensor([p]))[0] for p in random_prompts()])
    mean = hidden.mean(0)  # (C,)
    model.wte.weight[tokens] += strength * mean / mean.norm()
    return model


def hf_generate(twin, prompts: list[list[int]], eos_id: int, bad_words_ids=(), **options):
    """New tokens of one left-padded batch, without eos; the other arguments spelled out."""
    longest = max(len(tokens) for tokens in prompts)
    ids = torch.tensor([[0] * (longest - len(tokens)) + tokens for tokens in prompts])
    real = torch.tensor([[0] * (longest - len(t)) + [1] * len(t) for t in prompts])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = twin.generate(
            ids, attention_mask=real, do_sample=False, early_stopping=False, use_cache=True,
            bad_words_ids=list(bad_words_ids) or None, eos_token_id=eos_id, pad_token_id=eos_id,
            repetition_penalty=1.0, no_repeat_ngram_size=0, **options,
        )[:, longest:].tolist()  # fmt: skip
    return [new[: new.index(eos_id)] if eos_id in new else new for new in out]


def hf_rows(twin, prompts, *args, **options) -> list[list[int]]:
    return [hf_generate(twin, [tokens], *args, **options)[0] for tokens in prompts]


@pytest.mark.parametrize("strength", [0.0, 0.3])  # eos: almost never, about half of the texts
@pytest.mark.parametrize("min_new_tokens, bad_words_ids", [(0, []), (4, BAD_WORDS)])
def test_greedy_equals_transformers(strength, min_new_tokens, bad_words_ids):
    model, prompts = prefer(tiny_gpt2(), [EOS], strength), random_prompts()
    options = {"max_new_tokens": 20, "min_new_tokens": min_new_tokens, "num_beams": 1}
    config = GenerationConfig(**options)
    ours = generate_ids(model, prompts, config, EOS, bad_words_ids=bad_words_ids)
    assert ours == hf_rows(hf_twin(model), prompts, EOS, bad_words_ids, **options)
    if strength:
        assert 5 < sum(len(new) < 20 for new in ours) < 45


# transformers sums log p in fp32: equal tokens need gaps between beams above 1e-6, which these
# prompts have
@pytest.mark.parametrize(
    "strength, length_penalty, min_new_tokens, bad_words_ids",
    [(0.0, 1.0, 0, []), (0.3, 1.0, 0, BAD_WORDS), (0.3, 0.0, 4, []), (0.6, 2.0, 0, BAD_WORDS),
     (0.3, -0.5, 2, BAD_WORDS)],
)  # fmt: skip
def test_beam_search_equals_transformers(strength, length_penalty, min_new_tokens, bad_words_ids):
    model, prompts = prefer(tiny_gpt2(), [EOS], strength), random_prompts()
    options = {
        "max_new_tokens": 16, "min_new_tokens": min_new_tokens, "num_beams": 5,
        "length_penalty": length_penalty,
    }  # fmt: skip
    config = GenerationConfig(**options)
    ours = generate_ids(model, prompts, config, EOS, bad_words_ids=bad_words_ids)
    assert min(map(len, ours)) >= min_new_tokens
    if strength:  # the best one did end, and not at the last step
        assert sum(len(new) < 15 for new in ours) > 5
    twin = hf_twin(model)
    assert ours == hf_generate(twin, prompts, EOS, bad_words_ids, **options)
    assert ours[:10] == hf_rows(twin, prompts[:10], EOS, bad_words_ids, **options)


@pytest.mark.parametrize("num_beams", [2, 7])
def test_other_numbers_of_beams_equal_transformers(num_beams):
    model, prompts = prefer(tiny_gpt2(seed=4), [EOS], 0.3), random_prompts(20)
    options = {"max_new_tokens": 12, "num_beams": num_beams, "length_penalty": 0.8}
    ours = generate_ids(model, prompts, GenerationConfig(**options), EOS)
    assert ours == hf_generate(hf_twin(model), prompts, EOS, **options)


@pytest.mark.parametrize(
    "num_beams, texts",
    [(1, TEXTS), (5, TEXTS[::6]), pytest.param(5, TEXTS[1::2], marks=pytest.mark.slow)],
    ids=["greedy", "beams", "beams-half"],
)
def test_mini_equals_transformers(mini, num_beams, texts):
    model, tokenizer = mini
    prompts, words = [tokenizer.encode(text) for text in texts], (" pub", "\n", " The")
    options = {"max_new_tokens": 10, "num_beams": num_beams, "length_penalty": 1.0}
    ours = generate(model, tokenizer, texts, bad_words=words, **options)
    bad_words_ids = [tokenizer.encode(word) for word in words]
    theirs = hf_generate(hf_twin(model), prompts, tokenizer.eos_id, bad_words_ids, **options)
    assert ours == [tokenizer.decode(new) for new in theirs]
    assert [text for text in ours for word in words if word in text] == []


METHODS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 30, "top_p": 0.9, "seed": 5},
    "beams": {"num_beams": 5},
}


@pytest.mark.parametrize("method", METHODS)
def test_batches_equal_single_rows(method):
    model, tokenizer = prefer(tiny_gpt2(), [EOS], 0.3), Chars()
    prompts, options = random_prompts(12), {"max_new_tokens": 16, **METHODS[method]}
    seed = options.pop("seed", 0)
    alone = [
        generate(model, tokenizer, [tokens], seed=seed + b, **options)[0]
        for b, tokens in enumerate(prompts)
    ]
    assert len({len(text) for text in alone}) > 2
    for batch_size in (1, 5, 64):
        calls = []
        texts = generate(
            model, tokenizer, prompts, seed=seed, batch_size=batch_size,
            progress=lambda *call, calls=calls: calls.append(call), **options,
        )  # fmt: skip
        assert texts == alone
        assert calls == [(min(n + batch_size, 12), 12) for n in range(0, 12, batch_size)]


def ragged_bank(model: GPT2) -> PrefixBank:
    """Lengths 1, 3, 6 and 2, offsets 1, 3, 0 and 30, the third gated, the second an MLP."""
    choices = [
        {"prefix_len": 1},
        {"prefix_len": 3, "parametrisation": "mlp", "mid_dim": 8},
        {"prefix_len": 6, "gate": True},
        {"prefix_len": 2, "position_offset": 30},
    ]
    prefixes = [
        Prefix.random(model.config, seed=n, **choice).double() for n, choice in enumerate(choices)
    ]
    torch.nn.init.uniform_(prefixes[2].gate, 0.1, 2, torch.Generator().manual_seed(9))
    return PrefixBank(prefixes)


@pytest.mark.parametrize("method", METHODS)
def test_bank_rows_equal_each_alone(method):
    """With different prefixes in a batch, also where the padding of a short prompt with a large
    offset would stand past the last position (40 + 30 > 64)."""
    model, tokenizer = prefer(tiny_gpt2(), [EOS], 0.3), Chars()
    bank, index = ragged_bank(model), [2, -1, 0, 3, 1, 3, 0, 2, -1, 1]
    prompts = random_prompts(9) + [list(range(40))]
    options = {"max_new_tokens": 14, **METHODS[method]}
    texts = generate(
        model, tokenizer, prompts, prefix=bank, prefix_index=torch.tensor(index), **options
    )
    seed = options.pop("seed", 0)
    for b, n in enumerate(index):
        prefix = None if n < 0 else bank.prefixes[n]
        args = (model, tokenizer, [prompts[b]])
        assert [texts[b]] == generate(*args, prefix=prefix, seed=seed + b, **options), (b, n)
    plain = generate(model, tokenizer, prompts, seed=seed, **options)
    assert sum(a != b for a, b in zip(texts, plain, strict=True)) >= 4  # the prefixes do act

    in_order = generate(model, tokenizer, prompts[:4], prefix=bank, **options)
    assert in_order == generate(
        model, tokenizer, prompts[:4], prefix=bank, prefix_index=range(4), **options
    )


@pytest.mark.parametrize("num_beams", [1, 5])
def test_prefix_from_prompt_equals_prompt(mini, num_beams):
    model, tokenizer = mini
    prompt, texts = "Tables and what they say.\n\n", TEXTS[::12]
    prefix = Prefix.from_prompt(model, tokenizer, prompt)
    whole = [tokenizer.encode(prompt) + tokenizer.encode(text) for text in texts]
    options = {"max_new_tokens": 8, "num_beams": num_beams}
    with_prefix = generate(model, tokenizer, texts, prefix=prefix, **options)
    assert with_prefix == generate(model, tokenizer, whole, **options)


def test_mlp_runs_once_per_batch():
    model, calls = tiny_gpt2(), []
    prefix = Prefix.random(model.config, 3, seed=0, parametrisation="mlp", mid_dim=8).double()
    prefix.mlp.register_forward_hook(lambda *_: calls.append(1))
    for method in METHODS.values():
        calls.clear()
        generate(
            model, Chars(), ["ab"] * 5, prefix=prefix, batch_size=2, max_new_tokens=8, **method
        )
        assert len(calls) == 3


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-308}], ids=lambda o: str(o)
)
def test_narrow_sampling_is_greedy(options):
    model, prompts = tiny_gpt2(), random_prompts(10)
    texts = generate(model, Chars(), prompts, max_new_tokens=10, do_sample=True, **options)
    assert texts == generate(model, Chars(), prompts, max_new_tokens=10)


def test_seeds():
    model, prompts = tiny_gpt2(), ["same prompt"] * 3
    texts = {seed: generate(model, Chars(), prompts, do_sample=True, seed=seed, max_new_tokens=10)
             for seed in (0, 1, 9)}  # fmt: skip
    assert texts[0] == generate(model, Chars(), prompts, do_sample=True, seed=0, max_new_tokens=10)
    assert texts[0][1:] == texts[1][:-1]  # prompt b draws with seed + b
    assert len({*texts[0], *texts[9]}) == 6


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.3}, {"temperature": 2.0, "top_k": 9}, {"top_p": 0.8},
                {"temperature": 1.7, "top_k": 40, "top_p": 0.6}], ids=str,
)  # fmt: skip
def test_sampling_frequencies(options):
    """The probabilities are those of transformers' processors; draws follow them (chi square)."""
    from transformers.generation import logits_process as hf

    config = Decided(do_sample=True, **options)
    logits = 2 * torch.randn(5, 97, generator=torch.Generator().manual_seed(1)).double()
    scores = hf.TemperatureLogitsWarper(config.temperature)(None, logits)
    if config.top_k:
        scores = hf.TopKLogitsWarper(config.top_k)(None, scores)
    if config.top_p < 1:
        scores = hf.TopPLogitsWarper(config.top_p)(None, scores)
    p = sampling_probabilities(logits, config)
    # the logits are shifted before the division: rounding of a few exp and sums; worst seen: 3 eps
    assert (p - scores.softmax(-1)).abs().max() < 20 * torch.finfo(torch.float64).eps

    N = 5000
    generators = [torch.Generator().manual_seed(seed) for seed in range(N)]
    counts = sample(p[:1].expand(N, -1), generators).bincount(minlength=97)
    expected = N * p[0]
    assert counts[expected == 0].sum() == 0
    often = expected >= 5  # the rare ones together
    rest = torch.stack([(counts - expected)[~often].sum(), expected[~often].sum()])
    chi2 = ((counts - expected) ** 2 / expected)[often].sum() + rest[0] ** 2 / (rest[1] + 1e-9)
    dof = int(often.sum())
    assert chi2 < dof + 4 * (2 * dof) ** 0.5  # mean and four standard deviations


def test_stream_equals_generate(mini):
    """Also where tokens are parts of characters: a piece is text as it stands in the whole."""
    tokenizer = mini[1]
    V, parts = tokenizer.vocab_size, (b"\xc3", b"\xa9", b"\xe2", b"\x82", b"\xac", b"a")
    tokens = [i for i in range(V) if tokenizer.decode_bytes([i]) in parts]
    model = prefer(tiny_gpt2(vocab_size=V, bos_token_id=V - 1, eos_token_id=V - 1), tokens, 3.0)
    seen = ""
    for seed in range(6):
        options = {"max_new_tokens": 40, "do_sample": True, "seed": seed}
        pieces = list(stream(model, tokenizer, "a text", **options))
        [text] = generate(model, tokenizer, ["a text"], **options)
        assert "".join(pieces) == text and len(pieces) > 5 and "" not in pieces
        seen += text
    assert "é" in seen and "\ufffd" in seen  # whole characters of two tokens, and broken ones

    bank, ids = ragged_bank(model), tokenizer.encode("a text")
    options = {"max_new_tokens": 10, "bad_words": ("a",)}
    [text] = generate(model, tokenizer, [ids], prefix=bank, prefix_index=[2], **options)
    assert "".join(stream(model, tokenizer, ids, prefix=bank, prefix_index=2, **options)) == text


def test_training_state_and_dropout():
    """Generation is without dropout and gradients, and the caller's modes come back."""
    model, prompts = tiny_gpt2(), ["ab", "c"]
    texts = generate(model, Chars(), prompts, max_new_tokens=8)
    model.train()
    assert generate(model, Chars(), prompts, max_new_tokens=8) == texts
    assert model.training and model.drop.training
    with pytest.raises(ValueError, match="num_beams 60 .* 120 tokens, the model has 97"):
        generate(model, Chars(), prompts, max_new_tokens=8, num_beams=60)
    assert model.training

    grad_modes = []
    model.drop.register_forward_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    pieces = stream(model, Chars(), "ab", max_new_tokens=8)
    assert next(pieces) + next(pieces) == texts[0][:2] and grad_modes == [False, False]
    assert not model.training and torch.is_grad_enabled()  # in between, the caller's
    pieces.close()
    assert model.training


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens .* got 9 of 8"),
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"length_penalty": float("nan")}, r"length_penalty must lie in \[-50, 50\], got nan"),
        ({"length_penalty": 1e308, "num_beams": 2}, r"must lie in \[-50, 50\], got 1e\+308"),
        ({"num_beams": 2.0}, "num_beams must be an integer, got 2.0"),
        ({"max_new_tokens": "8"}, "max_new_tokens must be an integer, got '8'"),
        ({"do_sample": True, "seed": 2**64}, r"seed must be an integer between .*, got 18446744"),
        ({"do_sample": "no"}, "do_sample must be True or False, got 'no'"),
        ({"early_stopping": "yes"}, "early_stopping must be True or False, got 'yes'"),
        ({"do_sample": True, "temperature": "1"}, "temperature must be a number, got '1'"),
        ({"stop": None}, "stop must be a tuple of texts, got None"),
        ({"bad_words": [1]}, r"bad_words must be a tuple of texts, got \[1\]"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be > 0, got 0.0; greedy"),
        ({"do_sample": True, "top_k": -1}, "top_k must be at least 0, got -1"),
        ({"do_sample": True, "top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"do_sample": True, "num_beams": 5}, "do_sample=True and num_beams=5"),
        ({"temperature": 0.7}, "^temperature 0.7 has no effect without do_sample"),
        ({"top_k": 5, "top_p": 0.5}, "^top_k 5 and top_p 0.5 have no effect without do_sample"),
        ({"bad_words": "no"}, "bad_words must be a tuple of texts, got 'no'"),
        ({"bad_words": ("",)}, "bad_words must not be an empty text"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_new_tokens": 60}, r"prompt 1: too long: 5 prompt tokens \+ .* 60 > 64"),
        ({"prefix_index": [0]}, r"prefix_index \[0\] needs a PrefixBank"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_gpt2(), Chars(), ["a", "bcdef"], **{"max_new_tokens": 8, **options})


def test_bad_prompts_and_prefixes():
    model, tokenizer = tiny_gpt2(), Chars()
    bank = ragged_bank(model)

    def check(message, prompts, call=generate, **options):
        with pytest.raises(ValueError, match=message):
            call(model, tokenizer, prompts, max_new_tokens=8, **options)

    for wrong in ("one text", b"bytes", None, 3, iter(["a"])):
        check("prompts must be a list of texts, got", wrong)
    for wrong in (None, 1, {"name": "The Eagle"}, b"bytes", ["text"], [0.5]):
        check("prompt 1 must be a text or a list of token ids, got", ["a", wrong])
    check("prompt 0 must be a text or a list", ["a"], call=stream)
    check(r"prompt 0 has ids outside \[0, 96\]: .{80}\.\.\.$", [[97] * 1000])
    for wrong in ("p.safetensors", [bank.prefixes[0]], bank.prefixes[0].table()):
        check("prefix must be a Prefix, .* Prefix.load.path. reads", ["a"], prefix=wrong)
    for wrong in (0, [0.5], [None], ["0"]):
        check("prefix_index must hold an integer for", ["a"], prefix=bank, prefix_index=wrong)
    check("prompt 1 has no tokens.*bos_id", ["a", []], prefix=bank.prefixes[0])
    check(r"prompt 0 has ids outside \[0, 96\]: \[97\]", [[97]])
    check("3 prompt tokens .* offset 54 .* 8 > 64 pos", [[1, 2, 3]],
          prefix=Prefix.random(model.config, 1, seed=0, position_offset=54))  # fmt: skip
    check("prefix_index has 1 entries for 2", ["a", "b"], prefix=bank, prefix_index=[0])
    check("prefix_index has 4 entries for 2", ["a", "b"], prefix=bank)
    check(r"prefix_index must lie in \[-1, 3\], got \[4\]", ["a"], prefix=bank, prefix_index=[4])
    other = Prefix.random(model.config, 2, seed=0)
    other.bind(tiny_gpt2(seed=1))
    check("made for another model", ["a"], prefix=other)
    check("made for another model", "a", call=stream, prefix=other)  # before the first piece
    check("cannot stream, got num_beams=2", "a", call=stream, num_beams=2)
    assert generate(model, tokenizer, []) == []
    for_bart = Chars()
    for_bart.family = "bart"
    with pytest.raises(ValueError, match="the model is a GPT-2, but the tokenizer is a BART's"):
        generate(model, for_bart, ["a"])

    # a single batch cannot pad this short prompt; `generate` makes two of them
    config = GenerationConfig(max_new_tokens=8)
    with pytest.raises(ValueError, match="too long: 40 prompt tokens .* offset 30"):
        generate_ids(model, [[1], [1] * 40], config, EOS, prefix=bank, prefix_index=[3, -1])


def test_a_trained_prefix_brings_its_frame(mini):
    """A text prompt gets the frame (source, bos) that the prefix was trained in; ids do not."""
    mini, tokenizer = mini
    trained = Prefix.random(mini.config, 4, seed=3).to(mini.wte.weight)
    trained.linearisation = "original-code"
    framed = encode_prompt(tokenizer, "name : X", "original-code")
    plain = Prefix.from_table(trained.table(), trained.position_offset)
    options = {"max_new_tokens": 6}
    expected = generate(mini, tokenizer, [framed], prefix=plain, **options)
    assert generate(mini, tokenizer, ["name : X"], prefix=trained, **options) == expected
    assert generate(mini, tokenizer, [framed], prefix=trained, **options) == expected
    assert "".join(stream(mini, tokenizer, "name : X", prefix=trained, **options)) == expected[0]
    bank = PrefixBank([plain, trained])
    index = {"prefix": bank, "prefix_index": [1, 0, -1]}
    texts = generate(mini, tokenizer, ["name : X", framed, "name : X"], **index, **options)
    assert texts[:2] == expected * 2
    assert texts[2] == generate(mini, tokenizer, ["name : X"], **options)[0]
