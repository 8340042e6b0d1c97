"""The command `convert`: from and to each system, exact round trips, errors that write nothing."""

import json
import shutil
import warnings

import pytest
import torch
from conftest import assert_close, random_ids, tiny_with_words
from safetensors.torch import load_file

from minprefix.models.weights import find, fingerprint, load
from minprefix.prefix.foreign import AuthorsTokens, run_virtual_tokens
from minprefix.prefix.prefix import Prefix
from minprefix.tensors import load_tensors

P = 5
MODEL = tiny_with_words()
CONFIG = MODEL.config
C, ROW = CONFIG.n_embd, 2 * CONFIG.n_layer * CONFIG.n_embd


@pytest.fixture
def ours(tmp_path):
    """A prefix file bound to the tiny model, with a frame."""
    prefix = Prefix.random(CONFIG, P, seed=1)
    prefix.bind(MODEL)
    prefix.linearisation = "paper"
    prefix.save(tmp_path / "ours.safetensors")
    return tmp_path / "ours.safetensors"


def authors(folder, state, config=CONFIG):
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **config.of_model()}))
    return folder


def hub(folder, flat):
    folder.mkdir()
    key = "transformer.prefix_tuning.prefix_tunings.a.self_prefix.control_trans"
    torch.save({key: flat}, folder / "pytorch_adapter.bin")
    raw = {"architecture": "prefix_tuning", "prefix_length": P, "use_gating": False}
    (folder / "adapter_config.json").write_text(json.dumps({"config": raw, "model_type": "gpt2"}))
    return folder


def test_to_peft_and_back(cli, ours, tmp_path):
    """The same file comes back; the frame is printed, since PEFT does not read it."""
    out, err = cli("convert", ours, "--to", "peft", "--out", tmp_path / "peft", "--json")
    assert json.loads(out) == {
        "file": str(tmp_path / "peft"), "prefix_len": P, "position_offset": P,
        "n_layer": 2, "n_head": 2, "head_dim": 8, "base": fingerprint(MODEL),
    }  # fmt: skip
    assert err == (
        "note: this prefix was trained on ids that PEFT does not make by itself: "
        'tokenizer(source)["input_ids"] + [tokenizer.eos_token_id]; the text that follows begins '
        "with a blank; load the model with dtype=torch.float32 for the same texts as here "
        "(docs/recipes.md has the lines)\n"
    )
    (tmp_path / "run").mkdir()
    shutil.copy(ours, tmp_path / "run" / "prefix.safetensors")
    again = cli("convert", tmp_path / "run", "--to", "peft", "--out", tmp_path / "too", "--json")
    assert json.loads(again[0])["prefix_len"] == P  # a run folder
    _, err = cli("convert", tmp_path / "peft", "--to", "minprefix", "--out", tmp_path / "back")
    (tensors, metadata), again = load_tensors(ours), load_tensors(tmp_path / "back")
    assert list(again[0]) == list(tensors) == ["prefix_table"] and err == ""
    assert torch.equal(again[0]["prefix_table"], tensors["prefix_table"])
    assert again[1] == metadata


@torch.no_grad()
def test_peft_finds_the_base_model(cli, ours, tiny_folder, tmp_path):
    """With --model the folder names it: PEFT's Auto class loads both."""
    from peft import AutoPeftModelForCausalLM

    cli("convert", ours, "--to", "peft", "--out", tmp_path / "peft", "--model", tiny_folder)
    with warnings.catch_warnings(action="ignore"):
        peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft", dtype=torch.float64)
    ids = random_ids(MODEL, 2, 6)
    model = load(tiny_folder, dtype=torch.float64)[0]
    exact = peft.eval()(ids).logits
    # of the largest logit, other orders of summation in fp64; worst seen: 3.5e-16
    assert_close(model(ids, prefix=Prefix.load(ours)), exact, 1e-12)


def test_mini_is_named_by_its_folder(cli, tmp_path):
    Prefix.random(load("mini")[0].config, P, seed=0).save(tmp_path / "a.safetensors")
    source = tmp_path / "a.safetensors"
    cli("convert", source, "--to", "peft", "--out", tmp_path / "peft", "--model", "mini")
    raw = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == str(find("mini"))


def test_from_the_authors_code(cli, tiny_folder, tmp_path):
    """Bound to a model that is named; otherwise told."""
    flat = torch.randn(P * ROW)
    source, out = authors(tmp_path / "a", {"control_trans": flat}), tmp_path / "out.safetensors"
    _, err = cli("convert", source, "--to", "minprefix", "--out", out)
    assert err.startswith("note: without --model") and err.count("\n") == 1
    first = Prefix.load(out)
    assert first.base == "" and first.position_offset == P
    assert torch.equal(first.prefix_table[1, 0, 1, 3], flat.view(P, 4, 2, 8)[3, 2, 1])
    bound = ("convert", source, "--to", "minprefix", "--model", tiny_folder, "--out")
    _, err = cli(*bound, out, code=1)
    assert f"{out} already exists: choose another --out" in err and Prefix.load(out).base == ""
    out.unlink()
    cli(*bound, out)
    assert Prefix.load(out).base == fingerprint(MODEL)
    assert torch.equal(Prefix.load(out).prefix_table, first.prefix_table)

    cli("convert", source, "--to", "peft", "--out", tmp_path / "peft")  # a copy of the rows
    rows = load_file(tmp_path / "peft" / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(rows, flat.view(P, ROW))
    _, err = cli("convert", source, "--to", "cartridge", "--out", tmp_path / "peft", code=1)
    assert f"{tmp_path}/peft/adapter_config.json already exists" in err


def test_from_virtual_tokens(cli, tiny_folder, tmp_path):
    embeddings, out = torch.randn(P, C), tmp_path / "out.safetensors"
    source = authors(tmp_path / "a", {"wte.weight": embeddings})
    cli("convert", source, "--to", "minprefix", "--out", out, "--model", tiny_folder)
    exact = run_virtual_tokens(MODEL, AuthorsTokens(embeddings))
    assert torch.equal(Prefix.load(out).prefix_table, exact.prefix_table)
    assert Prefix.load(out).base == fingerprint(MODEL)


def test_from_adapter_hub(cli, tiny_folder, tmp_path):
    """Its text starts at 0; another offset is given on request, with a note."""
    flat = torch.randn(P * ROW)
    source, out = hub(tmp_path / "hub", flat), tmp_path / "out.safetensors"
    command = ("convert", source, "--model", tiny_folder)
    _, err = cli(*command, "--to", "minprefix", "--out", out)
    assert Prefix.load(out).position_offset == 0 and err == ""
    assert torch.equal(Prefix.load(out).prefix_table[1, 1, 0, 4], flat.view(P, 4, 2, 8)[4, 3, 0])
    _, err = cli(*command, "--to", "peft", "--out", tmp_path / "peft", "--position-offset", P)
    assert err == "note: token t is at t + 5 instead of t + 0, so this is not what was trained\n"


def test_refusals_write_nothing(cli, ours, tiny_folder, tmp_path):
    gated = Prefix.random(CONFIG, P, seed=1, gate=True, position_offset=P)
    gated.save(tmp_path / "gated.safetensors")
    wide = authors(tmp_path / "wide", {"control_trans": torch.randn(4, 1, 4, P, 8)})
    virtual = authors(tmp_path / "virtual", {"wte.weight": torch.randn(P, C)})
    mlp = {"control_trans.0.weight": torch.ones(3, C), "control_trans.0.bias": torch.ones(3),
           "control_trans.2.weight": torch.ones(ROW, 3), "control_trans.2.bias": torch.ones(ROW),
           "wte.weight": torch.ones(P, C), "wte2.weight": torch.ones(P, C)}  # fmt: skip
    infix = authors(tmp_path / "infix", mlp)
    flat = hub(tmp_path / "hub", torch.randn(P * ROW))
    (tmp_path / "empty").mkdir()
    other = Prefix.random(CONFIG, P, seed=1)
    other.base = "0" * 64
    other.save(tmp_path / "other.safetensors")
    before = sorted(tmp_path.rglob("*"))
    model = ("--model", tiny_folder)
    for source, to, more, message in (
        (tmp_path / "gated.safetensors", "peft", (), "no gate"),
        (flat, "minprefix", (), "adapter_config.json: does not contain the number of heads"),
        (flat, "peft", model, "--position-offset 5"),
        (virtual, "minprefix", (), f"{virtual}: virtual tokens at the input"),
        (
            infix,
            "minprefix",
            model,
            f"{infix}: the keys and values of the authors' infix depend on",
        ),
        (infix, "minprefix", (), f"{infix}: the keys and values of the authors' infix depend on"),
        (wide, "minprefix", model, f"{wide}: 2 layers with 4 heads of 8 do not fit"),
        (tmp_path / "other.safetensors", "peft", model, "made for another model"),
        (ours, "minprefix", ("--position-offset", -1), "position_offset must be >= 0, got -1"),
        (ours, "minprefix", (*model, "--position-offset", 96), "leaves no room in the 96"),
        (tmp_path / "none", "minprefix", (), "none: no such file or folder"),
        (tmp_path / "empty", "minprefix", (), "neither adapter_config.json"),
        (wide / "config.json", "minprefix", (), "config.json: damaged, or holds something"),
    ):
        out, err = cli("convert", source, "--to", to, "--out", tmp_path / "x", *more, code=1)
        assert message in err and out == "" and err.count("\n") == 1, err
        assert sorted(tmp_path.rglob("*")) == before
    _, err = cli("convert", ours, "--to", "onnx", "--out", tmp_path / "x", code=2)
    assert "onnx" in err
    _, err = cli("convert", ours, "--to", "peft", "--out", ours, code=1)
    assert "ours.safetensors" in err and err.count("\n") == 1
