"""Checkpoints with impossible sizes: no model is built, and one line names the file."""

import json

import pytest
import torch
from conftest import tiny_with_words

from minprefix.models.tensor_files import read_pickle
from minprefix.models.weights import load, read_config, save_model
from minprefix.tensors import verify_checksum


def change(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", ["n_layer", "vocab_size", "n_positions", "n_embd", "n_inner"])
def test_sizes_are_compared_with_the_weights_before_a_model_is_built(checkpoint, monkeypatch, name):
    change(checkpoint / "config.json", **{name: 10**9, "n_head": 1})
    monkeypatch.setattr("minprefix.models.weights.shapes_of", None)
    with pytest.raises(ValueError, match=f"do not fit config.json: {name} is 1000000000, the"):
        load(checkpoint)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon is inf"),
        ({"eos_token_id": 10**9}, "eos_token_id is 1000000000, but the model has the tokens"),
        ({"eos_token_id": [3, 8192]}, "eos_token_id is (3, 8192), but the model has the tokens 0"),
        ({"suppress_tokens": [-1]}, "suppress_tokens is (-1,), but the model has"),
        ({"bad_words_ids": [[1], [9999]]}, "bad_words_ids is ((1,), (9999,)), but the model"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"num_beams": 10**9}, "more than 1,000 beams in a checkpoint's settings (MINPREFIX_MAX_B"),
    ],
)
def test_settings_that_cannot_be_are_refused(checkpoint, values, message):
    change(checkpoint / "config.json", **values)
    (checkpoint / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(ValueError) as error:
        read_config(checkpoint)
    assert str(checkpoint / "config.json") in str(error.value) and message in str(error.value)


def test_a_tensor_has_the_size_of_what_the_file_holds_of_it(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**11)}, tmp_path / "large.bin")
    with pytest.raises(ValueError, match=r"large.bin: 'a' is larger than its data in the file"):
        read_pickle(tmp_path / "large.bin")
    whole = torch.arange(12.0).view(3, 4)
    torch.save({"a": whole, "b": whole[:2]}, tmp_path / "shared.bin")  # as tied weights are
    assert torch.equal(read_pickle(tmp_path / "shared.bin")["b"], whole[:2])


def test_weights_that_were_saved_here_have_a_checksum(tmp_path, tokenizer):
    save_model(tiny_with_words(), tokenizer, tmp_path)
    path = tmp_path / "model.safetensors"
    assert verify_checksum(path)
    load(tmp_path)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"model.safetensors: damaged, its contents do not match"):
        load(tmp_path)
