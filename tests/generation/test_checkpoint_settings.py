"""A checkpoint's settings for generation: every key of transformers is obeyed or reported."""

import json
import logging

import pytest
import torch
from conftest import bart_bytes, byte_tokenizer, hf_bart_twin, hf_twin, tiny_bart, tiny_gpt2
from transformers import GenerationConfig as TheirConfig
from transformers import GPT2Tokenizer

from minprefix.generation.config import GenerationConfig
from minprefix.generation.stopping import Stopping, end_ids
from minprefix.generation.texts import generate_ids
from minprefix.models import settings
from minprefix.models.weights import load, read_config, save_model

PROMPTS = [[70, 80, 90], [100], [75, 76, 77, 78, 79]]
BEAMS = {"num_beams": 3}
# the contents of generation_config.json by family, in addition to max_new_tokens
BOTH = {
    "eos_token_id": [{"eos_token_id": 11}, {"eos_token_id": [11, 30, 50]}, {"eos_token_id": None},
                     {"eos_token_id": [*range(60, 100)], **BEAMS}, {"eos_token_id": None, **BEAMS}],
    "bos_token_id": [{"bos_token_id": 7}],
    "max_new_tokens": [{"max_new_tokens": 5}],
    "min_new_tokens": [{"min_new_tokens": 9}],
    "num_beams": [BEAMS],
    "length_penalty": [{"length_penalty": 0.2, **BEAMS}],
    "early_stopping": [{"early_stopping": True, **BEAMS},
                       {"early_stopping": "never", "length_penalty": 2.0, **BEAMS}],
    "no_repeat_ngram_size": [{"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2, **BEAMS}],
    "repetition_penalty": [{"repetition_penalty": 1.7}, {"repetition_penalty": 0.6},
                           {"repetition_penalty": 1.7, **BEAMS}],
    "bad_words_ids": [{"bad_words_ids": [[20], [40, 41], [11]]}],
    "suppress_tokens": [{"suppress_tokens": [20, 21, 22]}],
    "begin_suppress_tokens": [{"begin_suppress_tokens": [*range(100)]}],
    "forced_eos_token_id": [{"forced_eos_token_id": 12}],
    "stop_strings": [{"stop_strings": ["a", "b", "c", "d"]}, {"stop_strings": "e"}],
}  # fmt: skip
BART_ONLY = {
    "forced_bos_token_id": [{"forced_bos_token_id": 9}, {"forced_bos_token_id": 9, **BEAMS}],
    "decoder_start_token_id": [{"decoder_start_token_id": 5}],
    "max_length": [{"max_new_tokens": None, "max_length": 7}],
    "min_length": [{"min_length": 9}],
}
# settings that matter only if the caller requests sampling
SAMPLING = {"temperature", "top_k", "top_p"}
CASES = [("GPT-2", case) for cases in BOTH.values() for case in cases] + [
    ("BART", case) for cases in (BOTH | BART_ONLY).values() for case in cases
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By family: a random model that often ends, its tokenizer, its twin, its folder."""
    made = {}
    for family in ("GPT-2", "BART"):
        bart = family == "BART"
        tokenizer = bart_bytes() if bart else byte_tokenizer()
        sizes = {"vocab_size": tokenizer.vocab_size}
        model = tiny_bart(**sizes) if bart else tiny_gpt2(**sizes, eos_token_id=256)
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 2 if weight.dim() == 2 and bart else 1
        folder = tmp_path_factory.mktemp("model")
        save_model(model, tokenizer, folder)
        model, tokenizer = load(folder, dtype=torch.float64)
        made[family] = model, tokenizer, (hf_bart_twin if bart else hf_twin)(model), folder
    return made


def said(models, family: str, case: dict):
    """The family's model and twin with this generation_config.json."""
    model, tokenizer, twin, folder = models[family]
    ids = {"bos_token_id": 256, "eos_token_id": 256}
    if family == "BART":
        ids = {"bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    raw = {**ids, "pad_token_id": 1, "max_new_tokens": 12} | case
    (folder / "generation_config.json").write_text(json.dumps(raw))
    model.config = read_config(folder)
    twin.generation_config = TheirConfig.from_pretrained(folder)
    return model, tokenizer, twin, folder


def up_to_end(new: list[int], ends: tuple[int, ...]) -> list[int]:
    at = [n for n, token in enumerate(new) if token in ends]
    return new[: at[0]] if at else new


@pytest.mark.parametrize("family, case", CASES, ids=lambda value: str(value)[:50])
def test_what_a_checkpoint_says_gives_the_texts_of_transformers(models, family, case):
    model, tokenizer, twin, folder = said(models, family, case)
    theirs, ends = [], end_ids(model, tokenizer, framed=False)
    reader = None
    if "stop_strings" in case:
        tokens = {token: n for token, n in tokenizer._vocab.items()}
        reader = GPT2Tokenizer(vocab=tokens, merges=[])
    for prompt in PROMPTS:
        out = twin.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), tokenizer=reader
        )[0].tolist()
        given = len(prompt) if family == "GPT-2" else 1
        given += model.config.forced_bos_token_id is not None
        theirs.append(up_to_end(out[given:], ends))
    for fast in (False, True):
        stopping = Stopping(ends, tokenizer, model.config.stop_strings)
        assert generate_ids(model, PROMPTS, GenerationConfig(), stopping, fast=fast) == theirs
    assert settings.not_followed(folder, family) == []
    assert len({*map(tuple, theirs)}) > 1


@pytest.mark.parametrize("family", ["GPT-2", "BART"])
def test_every_key_of_transformers_is_followed_harmless_or_named(models, family, caplog):
    keys = {key for key in vars(TheirConfig()) if key != "_from_model_config"} | {
        "_from_model_config"
    }
    followed = {*BOTH, *SAMPLING} | ({*BART_ONLY} if family == "BART" else set())
    followed -= settings.HARMLESS
    named = {*settings.NEUTRAL, *BART_ONLY} - followed - settings.HARMLESS
    assert keys - settings.HARMLESS == (followed | named) & keys
    assert not followed & named and not settings.HARMLESS & named
    folder = models[family][-1]
    for key in sorted(named):
        (folder / "generation_config.json").write_text(json.dumps({key: 0.125}))
        assert settings.not_followed(folder, family) == [f"{key} 0.125"]
        neutral = settings.NEUTRAL.get(key)
        (folder / "generation_config.json").write_text(json.dumps({key: neutral}))
        assert settings.not_followed(folder, family) == []
    (folder / "generation_config.json").write_text('{"min_p": 0.1, "typical_p": 1.0, "mine": 3}')
    with caplog.at_level(logging.WARNING):
        load(folder)
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.getMessage().endswith("generation here ignores min_p 0.1, mine 3")
    (folder / "generation_config.json").unlink()


def test_without_generation_config_the_keys_of_config_count(models):
    *_, folder = said(models, "GPT-2", {})
    (folder / "generation_config.json").unlink()
    path = folder / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"eos_token_id": [11, 30], "min_p": 0.2}))
    assert read_config(folder).eos_ids == (11, 30)
    assert settings.not_followed(folder, "GPT-2") == ["min_p 0.2"]
    path.write_text(json.dumps(json.loads(before) | {"eos_token_id": None}))
    assert read_config(folder).eos_ids == ()
    path.write_text(before)


def test_the_caller_decides_before_the_checkpoint(models):
    own = {"num_beams": 3, "repetition_penalty": 1.5, "temperature": 0.5, "min_new_tokens": 11}
    model, *_ = said(models, "GPT-2", own)
    config = GenerationConfig().for_model(model)
    assert (config.num_beams, config.temperature, config.max_new_tokens) == (3, 1.0, 12)
    config = GenerationConfig(do_sample=True, max_new_tokens=4).for_model(model)
    assert (config.num_beams, config.temperature, config.repetition_penalty) == (1, 0.5, 1.5)
    assert config.min_new_tokens == 4
    config = GenerationConfig(num_beams=2, repetition_penalty=1.0).for_model(model)
    assert (config.num_beams, config.repetition_penalty) == (2, 1.0)


@pytest.mark.parametrize("family", ["GPT-2", "BART"])
def test_a_saved_model_keeps_its_settings(models, family, tmp_path):
    case = {"eos_token_id": [11, 30], "num_beams": 2, "stop_strings": ["x"], "top_k": 5}
    model, tokenizer, _, _ = said(models, family, case)
    save_model(model, tokenizer, tmp_path)
    assert load(tmp_path)[0].config == model.config
    theirs = TheirConfig.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.num_beams, theirs.stop_strings) == ([11, 30], 2, ["x"])


def test_trained_frames_end_with_the_token_that_ended_them(models):
    """Whatever else the checkpoint says: texts of training ended with the tokenizer's eos."""
    model, tokenizer, _, _ = said(models, "GPT-2", {"eos_token_id": 11})
    assert end_ids(model, tokenizer, framed=False) == (11,)
    assert end_ids(model, tokenizer, framed=True) == (11, 256)
