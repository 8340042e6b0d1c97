"""Checkpoints in common forms, against transformers: both forms of a tokenizer, models that were
resized, padded or extended by tokens, relatives of GPT-2, nanoGPT, wrapped names."""

import json
import logging
import shutil

import pytest
import torch
from conftest import bart_bytes, byte_tokenizer, hf_twin, tiny_bart, tiny_gpt2
from test_weights import assert_same_logits
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2LMHeadModel,
)
from transformers import GPT2Config as TheirConfig

from minprefix.generation.config import GenerationConfig
from minprefix.generation.texts import generate, generate_ids
from minprefix.models.gpt2 import GPT2
from minprefix.models.tokenizer import Tokenizer
from minprefix.models.weights import ASSETS, fingerprint, load, read_config, save_model
from minprefix.prefix.prefix import Prefix
from minprefix.training.trainer import TrainConfig, Trainer

TEXTS = [
    "name : The Eagle | food : Chinese",
    "  two blanks, é, 漢字 and\nlines ",
    "it's 12 <s>",
    "",
]
GEN = GenerationConfig(max_new_tokens=8)
TINY = {"vocab_size": 8192, "n_positions": 48, "n_embd": 16, "n_layer": 2, "n_head": 2}


@pytest.fixture(scope="module")
def saved_by_transformers(tmp_path_factory):
    """By family, a folder as transformers 5 saves it: tokenizer.json alone."""
    folders = {}
    for name, kind in (("mini", AutoModelForCausalLM), ("mini-bart", AutoModelForSeq2SeqLM)):
        folders[name] = tmp_path_factory.mktemp(name)
        kind.from_pretrained(ASSETS / name).save_pretrained(folders[name])
        AutoTokenizer.from_pretrained(ASSETS / name).save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("name", ["mini", "mini-bart"])
def test_a_folder_with_tokenizer_json_alone(saved_by_transformers, name):
    folder = saved_by_transformers[name]
    assert (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists()
    (model, tokenizer), (ours, usual) = load(folder), load(name)
    assert model.config == ours.config and fingerprint(model) == fingerprint(ours)
    assert tokenizer.files() == usual.files()
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS[:2]:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text) == usual.encode(text) == ids
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (usual.bos_id, usual.eos_id)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model": {"type": "WordPiece"}}, "a tokenizer of type 'WordPiece'; supported: 'BPE'"),
        ({"model": {"type": "BPE", "vocab": [], "merges": []}}, "model has no vocab and merges"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer is .*Metaspace"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
        ({"normalizer": {"type": "NFC"}}, "normalizer is .*NFC.*supported: none"),
        ({"added_tokens": [{"id": "x", "content": "a"}]}, "is not an added token with an id"),
        ({"added_tokens": [{"id": 3, "content": "a"}]}, "'a' has the ids .* and 3"),
    ],
)
def test_other_tokenizers_are_refused_in_one_line(saved_by_transformers, tmp_path, change, message):
    path = tmp_path / "tokenizer.json"
    raw = json.loads((saved_by_transformers["mini"] / "tokenizer.json").read_text())
    path.write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.from_folder(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def grown(folder, fast: bool):
    """transformers' GPT-2 with added tokens, resized to a multiple of 64."""
    model = GPT2LMHeadModel(TheirConfig(**TINY, bos_token_id=8191, eos_token_id=8191))
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "mini")
    tokenizer.add_tokens(["[name]", "[name", AddedToken("<area>", lstrip=True, rstrip=True),
                          AddedToken("cheap", single_word=True)])  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": ["<table>"], "pad_token": "[PAD]"})
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    model.double().eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not fast:  # as older versions wrote it
        raw = json.loads((folder / "tokenizer.json").read_text())
        added = {token["content"]: token["id"] for token in raw["added_tokens"]}
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["added_tokens_decoder"] = {t.pop("id"): t for t in raw["added_tokens"]}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "added_tokens.json").write_text(json.dumps(added))
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(ASSETS / "mini" / name, folder)
        (folder / "tokenizer.json").unlink()
    return model, tokenizer


@pytest.mark.parametrize("fast", [True, False], ids=["tokenizer.json", "added_tokens.json"])
def test_models_with_added_tokens(tmp_path, fast):
    theirs, their_tokenizer = grown(tmp_path, fast)
    model, tokenizer = load(tmp_path, dtype=torch.float64)
    assert model.config.vocab_size == 8256 and tokenizer.vocab_size == len(their_tokenizer)
    for text in ("[name] The Eagle <area> centre,cheap cheaper", "a<table>b [name c", *TEXTS[:2]):
        ids = their_tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == their_tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer.encode("[PAD]") != [their_tokenizer.pad_token_id]  # no text is padding
    assert tokenizer.pad_id == tokenizer.eos_id == 8191
    ids = torch.tensor([[8192, 8193, 8197, 5, 8255]])
    with torch.no_grad():
        assert_same_logits(model(ids), theirs(ids).logits)
    assert tokenizer.decode([8255, 8220]) == ""  # what only the model has
    with pytest.raises(ValueError, match="8256 is not in 0 ... 8255"):
        tokenizer.decode([8256])
    text = generate(model, tokenizer, ["[name] a"], max_new_tokens=5)
    assert len(text) == 1

    save_model(model, tokenizer, tmp_path / "again")
    again, same = load(tmp_path / "again", dtype=torch.float64)
    assert again.config == model.config and same.encode("[name] <area> a") == tokenizer.encode(
        "[name] <area> a"
    )
    reread = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert reread("a [name] b").input_ids == their_tokenizer("a [name] b").input_ids


def test_tokens_beyond_the_model_are_plain_text(tmp_path, caplog):
    """Added to a tokenizer whose model was not resized: mostly a padding token."""
    model = tiny_gpt2(**TINY, bos_token_id=8191, eos_token_id=8191)
    save_model(model, Tokenizer.from_folder(ASSETS / "mini"), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path)[1].vocab_size == 8193
    assert not caplog.records
    tokenizer.add_tokens(["[name]"])
    tokenizer.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        _, ours = load(tmp_path)
    assert max(ours.encode("[name][PAD]")) < 8192
    assert "1 tokens of the tokenizer are beyond the model's 8192" in caplog.text
    assert "'[name]'" in caplog.text


def test_another_end_token(tmp_path):
    """Of the tokenizer's files, in prompts and training; of config.json, in generation."""
    model = tiny_gpt2(**{**TINY, "vocab_size": 8256}, bos_token_id=8192, eos_token_id=8193)
    save_model(model, Tokenizer.from_folder(ASSETS / "mini"), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"bos_token": "<start>", "eos_token": "<end>"})
    tokenizer.save_pretrained(tmp_path)
    loaded, ours = load(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (8192, 8193, 8193)
    assert loaded.config.eos_ids == (8193,)
    save_model(loaded, ours, tmp_path / "again")
    assert (load(tmp_path / "again")[1].bos_id, ours.eos_id) == (8192, 8193)


def test_ids_that_the_model_has_not_end_nothing(tmp_path):
    """Of a small model with the sizes' usual config, whose eos is 50256."""
    model = tiny_gpt2(**TINY, bos_token_id=8191, eos_token_id=50256)
    tokenizer = Tokenizer.from_folder(ASSETS / "mini")
    texts = generate(model, tokenizer, ["a", "b"], max_new_tokens=4, min_new_tokens=2)
    assert len(texts) == 2
    assert generate(model, tokenizer, ["a"], max_new_tokens=4, num_beams=2)


RELATIVES = {
    "Cerebras-GPT": {"activation_function": "gelu", "n_inner": 80},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "tanh": {"activation_function": "tanh"},
    "stanford-crfm": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "unscaled": {"scale_attn_weights": False},
    "untied": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_of_gpt2_equal_transformers(tmp_path, name):
    """Logits, greedy texts, a prefix, and the saved model."""
    torch.manual_seed(0)
    config = TheirConfig(**TINY, **RELATIVES[name], initializer_range=0.3, bos_token_id=8191,
                         eos_token_id=[8191, 50], attn_implementation="sdpa")  # fmt: skip
    theirs = GPT2LMHeadModel(config).double().eval()
    theirs.save_pretrained(tmp_path)
    Tokenizer.from_folder(ASSETS / "mini").save(tmp_path)
    model, tokenizer = load(tmp_path, dtype=torch.float64)
    ids = torch.arange(48).view(2, 24) * 37 % 8192
    with torch.no_grad():
        exact = theirs(ids).logits
        assert_same_logits(model(ids), exact)
        plain = {**TINY, "n_inner": RELATIVES[name].get("n_inner")}
        usual = GPT2(type(model.config)(**plain)).double().eval()
        usual.load_state_dict(model.state_dict(), strict=False)
        assert (usual(ids) - exact).abs().max() > 1e-3  # it matters
    prompt, n = [5, 900, 70], 8
    new = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 3),
                          max_new_tokens=n, do_sample=False)[0, 3:].tolist()  # fmt: skip
    ours = generate_ids(model, [prompt], GEN, model.config.eos_ids)[0]
    assert ours == new[: len(ours)] and (len(ours) == n or new[len(ours)] in (8191, 50))

    save_model(model, tokenizer, tmp_path / "again")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "again", dtype=torch.float64).eval()
    with torch.no_grad():
        assert_same_logits(again(ids).logits, exact)
    assert load(tmp_path / "again")[0].config == model.config
    assert fingerprint(model) == fingerprint(load(tmp_path / "again")[0])


def test_an_untied_head_trains_a_prefix_and_itself(tmp_path, tokenizer):
    """The loss is that of the head, not of the embedding."""
    from conftest import pairs, small_model

    model = small_model(tie_word_embeddings=False)
    batch = torch.tensor([[5, 6, 7, 8]])
    labels = torch.tensor([[-100, 7, 8, 9]])
    losses = model.token_losses(batch, labels)
    logits = model(batch)[0, 1:]
    exact = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="none")
    assert torch.allclose(losses, exact, atol=1e-5)
    prefix = Prefix.random(model.config, 2, 0)
    prefix.bind(model)
    config = TrainConfig(batch_size=4, steps=3, lr=1e-2)
    result = Trainer(model, tokenizer, config, pairs(8), pairs(2, 50), tmp_path, prefix)
    result.run(progress=False)
    assert (tmp_path / "prefix.safetensors").exists()


def test_a_head_that_differs_is_untied_as_in_transformers(tmp_path):
    model = tiny_gpt2(**TINY, eos_token_id=8191)
    save_model(model, Tokenizer.from_folder(ASSETS / "mini"), tmp_path)
    from safetensors.torch import save_file

    head = torch.randn(8192, 16, dtype=torch.float64)
    save_file({**model.state_dict(), "lm_head.weight": head}, tmp_path / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    loaded, _ = load(tmp_path, dtype=torch.float64)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert_same_logits(loaded(ids), theirs(ids).logits)
    assert not loaded.config.tie_word_embeddings and torch.equal(loaded.head_weight, head)


def nanogpt(model: GPT2, bias: bool = True, compiled: bool = True) -> dict:
    """The same weights as nanoGPT saves them in ckpt.pt."""
    tensors = {}
    for name, x in model.state_dict().items():
        turned = name.startswith("h.") and x.dim() == 2
        if bias or not name.endswith("bias"):
            tensors[f"{'_orig_mod.' if compiled else ''}transformer.{name}"] = x.T if turned else x
    tensors[f"{'_orig_mod.' if compiled else ''}lm_head.weight"] = model.wte.weight.detach()
    c = model.config
    sizes = {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "bias": bias,
             "block_size": c.n_positions, "vocab_size": c.vocab_size, "dropout": 0.0}  # fmt: skip
    return {"model": tensors, "model_args": sizes, "iter_num": 5, "best_val_loss": 2.0,
            "config": {"dataset": "x"}, "optimizer": {"state": {}, "param_groups": []}}  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
def test_a_folder_of_nanogpt(tmp_path, bias):
    """ckpt.pt and the tokenizer's files: sizes from model_args, the exact GELU, turned matrices."""
    model = tiny_gpt2(**TINY, eos_token_id=8191, activation_function="gelu")
    if not bias:
        with torch.no_grad():
            for name, x in model.named_parameters():
                if name.endswith("bias"):
                    x.zero_()
    torch.save(nanogpt(model, bias), tmp_path / "ckpt.pt")
    Tokenizer.from_folder(ASSETS / "mini").save(tmp_path)
    loaded, _ = load(tmp_path, dtype=torch.float64)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))
        assert_same_logits(loaded(ids), hf_twin(model)(ids).logits)
    assert loaded.config.eos_token_id == 8191 and loaded.config.activation_function == "gelu"
    (tmp_path / "ckpt.pt").unlink()
    torch.save({"model": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="no model_args with block_size"):
        load(tmp_path)


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("around", [None, "model", "state_dict", "model_state_dict"])
def test_wrapped_names_and_what_training_programs_put_around(tmp_path, wrapper, around):
    model = tiny_gpt2(**TINY, eos_token_id=8191)
    save_model(model, Tokenizer.from_folder(ASSETS / "mini"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tensors = {f"{wrapper}transformer.{name}": x for name, x in model.state_dict().items()}
    content = tensors if around is None else {around: tensors, "epoch": 3}
    torch.save(content, tmp_path / "pytorch_model.bin")
    loaded, _ = load(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded.h[1].mlp.c_fc.weight, model.h[1].mlp.c_fc.weight)


def test_wrapped_names_of_a_bart(tmp_path):
    model, tokenizer = tiny_bart(vocab_size=260), bart_bytes()
    save_model(model, tokenizer, tmp_path)
    from minprefix.models.tensor_files import read_weights

    tensors = {f"_orig_mod.{name}": x for name, x in read_weights(tmp_path).items()}
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert torch.equal(load(tmp_path, dtype=torch.float64)[0].wte.weight, model.wte.weight)


def test_a_bart_with_another_start_and_function(tmp_path):
    """decoder_start_token_id begins targets in generation and in training."""
    from minprefix.data.batches import encode_pair

    model = tiny_bart(vocab_size=260, decoder_start_token_id=0, activation_function="relu")
    save_model(model, bart_bytes(), tmp_path)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    loaded, tokenizer = load(tmp_path, dtype=torch.float64)
    source = torch.tensor([[0, 50, 60, 70, 2]])
    with torch.no_grad():
        exact = theirs(input_ids=source, decoder_input_ids=source).logits
        assert_same_logits(loaded(source, source), exact)
    out = theirs.generate(source, max_new_tokens=8, do_sample=False)[0].tolist()[1:]
    ours = generate_ids(loaded, source.tolist(), GEN, 2)[0]
    assert out[: len(ours)] == ours and (len(ours) == 8 or out[len(ours)] == 2)
    assert encode_pair(tokenizer, "a", "b").ids[:2] == [0, 0]
    assert read_config(tmp_path).decoder_start_token_id == 0
    assert byte_tokenizer().start_id == 256
