"""BART's checkpoints in all their forms against transformers; its tokenizer; errors."""

import json

import pytest
import torch
from conftest import bart_bytes, hf_bart_twin, random_ids, tiny_bart
from test_weights import set_config, write_weights

from minprefix.models.bart import BART
from minprefix.models.config import MODELS
from minprefix.models.weights import ASSETS, fingerprint, load, read_config, save_model
from minprefix.models.weights_bart import TIED, to_checkpoint


@pytest.fixture
def model() -> BART:
    return tiny_bart(
        vocab_size=261, forced_bos_token_id=0, no_repeat_ngram_size=3, early_stopping=True
    )


@pytest.fixture
def folder(tmp_path, model):
    save_model(model, bart_bytes(mask=True), tmp_path)
    return tmp_path


def official_names(model: BART, prefixed: bool) -> dict[str, torch.Tensor]:
    """As old files have them: tied copies, version buffers; the bare model without the bias."""
    tensors = to_checkpoint(model.state_dict())
    tensors |= dict.fromkeys(TIED, model.wte.weight.detach())
    tensors |= {f"{stack}.version": torch.tensor([3.0]) for stack in ("encoder", "decoder")}
    if not prefixed:  # facebook/bart-large: a BartModel, which has no head
        return {n: x for n, x in tensors.items() if n not in ("final_logits_bias", TIED[-1])}
    own = ("final_logits_bias", "lm_head.weight")
    return {n if n in own else f"model.{n}": x for n, x in tensors.items()}


@pytest.mark.parametrize("layout", ["safetensors", "safetensors shards", "bin"])
@pytest.mark.parametrize("prefixed", [False, True])
def test_every_layout_gives_the_same_weights(folder, model, layout, prefixed):
    (folder / "model.safetensors").unlink()
    write_weights(folder, official_names(model, prefixed), layout)
    loaded, tokenizer = load(folder, dtype=torch.float64)
    assert isinstance(loaded, BART) and not loaded.training and tokenizer.family == "bart"
    assert loaded.config == model.config
    if not prefixed:
        model.head_bias.zero_()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert fingerprint(loaded) == fingerprint(model)
    assert fingerprint(loaded) == fingerprint(load(folder, dtype=torch.bfloat16)[0])


def test_transformers_reads_what_we_save_and_we_what_it_saves(folder, model, tmp_path):
    from transformers import BartForConditionalGeneration

    source, target = random_ids(model, 2, 9), random_ids(model, 2, 6, seed=1)
    theirs = BartForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        exact = model(source, target)
        logits = theirs(input_ids=source, decoder_input_ids=target).logits
        assert (logits - exact).abs().max() <= 1e-12 * exact.abs().max()
    twin = hf_bart_twin(model)
    for name in ("forced_bos_token_id", "no_repeat_ngram_size", "early_stopping"):
        setattr(twin.generation_config, name, getattr(model.config, name))
    twin.generation_config.num_beams = 4  # without beams early_stopping is not valid to them
    twin.save_pretrained(tmp_path / "theirs")
    bart_bytes(mask=True).save(tmp_path / "theirs")
    again, _ = load(tmp_path / "theirs", dtype=torch.float64)
    assert again.config.forced_bos_token_id == 0 and again.config.no_repeat_ngram_size == 3
    assert again.config.early_stopping is True
    with torch.no_grad():
        assert (again(source, target) - exact).abs().max() <= 1e-12 * exact.abs().max()


def test_mini_bart_is_embedded():
    model, tokenizer = load("mini-bart")
    assert sum(p.numel() for p in model.parameters()) == MODELS["mini-bart"]
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == model.config.vocab_size == tokenizer.text_ids + 1
    assert tokenizer.decode([0, *tokenizer.encode("the food"), 2, 1, 8195]) == "the food"
    assert tokenizer.encode("<mask>")[0] != 8195  # text never becomes a special token
    folder = ASSETS / "mini-bart"
    assert (folder / "merges.txt").read_bytes() == (ASSETS / "mini/merges.txt").read_bytes()
    assert (folder / "MODEL_CARD.md").is_file()


def test_a_mask_beyond_the_model_is_no_error(folder, model):
    """As in facebook/bart-large-cnn: 50265 tokens, of which the model has 50264."""
    small = tiny_bart(vocab_size=260)
    save_model(small, bart_bytes(mask=True), folder)
    _, tokenizer = load(folder)
    assert tokenizer.vocab_size == 261 and tokenizer.text_ids == 260
    save_model(tiny_bart(vocab_size=259), bart_bytes(mask=True), folder)
    with pytest.raises(ValueError, match="vocab.json has 260 tokens, the model 259"):
        load(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "t5"}, "model_type is 't5'; supported: 'gpt2' or 'bart'"),
        ({"normalize_before": True}, "normalize_before is True; supported: False"),
        ({"add_final_layer_norm": True}, "add_final_layer_norm"),
        ({"static_position_embeddings": True}, "static_position_embeddings"),
        ({"activation_function": "mish"}, "activation_function is 'mish'; supported: 'gelu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"encoder_attention_heads": 2}, "encoder_attention_heads 2, decoder_attention_heads 4"),
        ({"encoder_ffn_dim": 7, "decoder_ffn_dim": 8}, "only equal values are supported"),
        ({"d_model": 33}, "n_embd 33 is not a multiple of n_head 4"),
        ({"scale_embedding": 1}, "scale_embedding is 1"),
        ({"decoder_layers": 4}, "26 missing (decoder.layers.3."),
        ({"d_model": 64}, "of another shape (shared.weight (261, 32) for (261, 64)"),
    ],
)
def test_other_models_are_refused(folder, change, message):
    set_config(folder, **change)
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert message in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "said, message",
    [
        ({"early_stopping": "soon"}, "generation_config.json: early_stopping is 'soon'"),
        ({"decoder_start_token_id": -1}, "decoder_start_token_id is -1"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"max_length": "long", "max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_wrong_settings_of_generation_are_refused(folder, said, message):
    (folder / "generation_config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert message in str(caught.value) and str(folder) in str(caught.value)


def test_generation_config_decides_where_there_is_one(folder):
    assert read_config(folder).no_repeat_ngram_size == 3
    (folder / "generation_config.json").write_text('{"length_penalty": 2.0}')
    config = read_config(folder)
    assert (config.length_penalty, config.no_repeat_ngram_size) == (2.0, 0)
    assert config.forced_eos_token_id is None and config.early_stopping is False
    (folder / "generation_config.json").unlink()
    set_config(folder, forced_bos_token_id=..., force_bos_token_to_be_generated=True)
    assert read_config(folder).forced_bos_token_id == 0


def test_wrong_tensors_are_listed(folder, model):
    good = official_names(model, prefixed=True)

    def error(**changes) -> str:
        (folder / "model.safetensors").unlink()
        tensors = {n: x for n, x in {**good, **changes}.items() if x is not None}
        write_weights(folder, tensors, "safetensors")
        with pytest.raises(ValueError) as caught:
            load(folder)
        return str(caught.value)

    name = "model.decoder.layers.1.encoder_attn.k_proj.weight"
    assert f"1 missing ({name.removeprefix('model.')})" in error(**{name: None})
    assert "1 left over (classification_head.weight)" in error(
        **{"classification_head.weight": torch.zeros(2)}
    )
    assert "lm_head.weight differs from shared.weight" in error(
        **{"lm_head.weight": model.wte.weight.detach() + 1}
    )
    assert "shared.weight occurs twice" in error(**{"shared.weight": good["lm_head.weight"]})
