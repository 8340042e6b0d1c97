"""Training a BART's prefix and fine-tuning it, through the Trainer and the commands of GPT-2."""

import json

import pytest
import torch
from conftest import pairs, run_until_killed, tiny_bart, trainer
from test_training import log_of

from minprefix.data.batches import collate, encode_examples, encode_prompt
from minprefix.data.examples import Example
from minprefix.models.tokenizer import Tokenizer
from minprefix.models.weights import ASSETS, fingerprint, load, save_model
from minprefix.prefix.bart import BARTPrefix
from minprefix.training.run_folder import read_log
from minprefix.training.trainer import Trainer


@pytest.fixture(scope="session")
def bart_tokenizer() -> Tokenizer:
    """Of mini-bart."""
    return Tokenizer.from_folder(ASSETS / "mini-bart", "bart")


def small_bart(dtype=torch.float32, **changes):
    """With mini-bart's tokens."""
    sizes = {"vocab_size": 8196, "n_embd": 16, "n_head": 2, "n_inner": 20, "n_positions": 96}
    return tiny_bart(dtype=dtype, **{**sizes, **changes})


def bart_trainer(tokenizer, out, *, model=None, **options) -> Trainer:
    return trainer(tokenizer, out, model=model or small_bart(), **options)


def test_rows_are_what_transformers_makes_of_labels(bart_tokenizer):
    """The decoder's input is `shift_tokens_right` of the labels <s> y </s>."""
    from transformers.models.bart.modeling_bart import shift_tokens_right

    rows = encode_examples(bart_tokenizer, pairs(4))
    batch = collate(rows, bart_tokenizer.pad_id)
    for b, (row, example) in enumerate(zip(rows, pairs(4), strict=True)):
        target = [0, *bart_tokenizer.encode(example.targets[0]), 2]
        n = len(target)
        assert batch.labels[b, :n].tolist() == target and (batch.labels[b, n:] == -100).all()
        shifted = shift_tokens_right(torch.tensor([target]), 1, 2)
        assert batch.input_ids[b, :n].tolist() == shifted[0].tolist()
        source = [0, *bart_tokenizer.encode(example.source), 2]
        assert batch.source_ids[b, : len(source)].tolist() == source == row.source
        assert batch.source_lens[b] == len(source)
    assert len(set(batch.source_lens.tolist())) > 1


def test_sources_are_cut_on_request_only(bart_tokenizer):
    article = Example("amber brook " * 40, ("short",))
    whole = encode_prompt(bart_tokenizer, article.source)
    cut = encode_prompt(bart_tokenizer, article.source, max_source=12)  # <s> and </s> included
    assert cut == [*whole[:11], 2] and len(whole) > 60
    (row,) = encode_examples(bart_tokenizer, [article], max_len=40, max_source=39)
    assert len(row.source) == 39
    with pytest.raises(ValueError, match=r"a source of \d+ tokens, at most 39 are allowed"):
        encode_examples(bart_tokenizer, [article], max_len=40)
    long = Example("short", ("amber brook " * 40,))
    with pytest.raises(ValueError, match=r"a target of \d+ tokens, at most 40 are allowed"):
        encode_examples(bart_tokenizer, [long], max_len=40)


@pytest.mark.parametrize("parametrisation", ["table", "mlp", "embedding"])
def test_the_prefix_learns_and_the_model_stays(bart_tokenizer, tmp_path, parametrisation):
    model = small_bart()
    before = fingerprint(model)
    prefix = BARTPrefix.random(model.config, 3, 0, parametrisation=parametrisation, mid_dim=8)
    prefix.bind(model)
    start = [weight.clone() for weight in prefix.parameters()]
    options = {"model": model, "prefix": prefix, "steps": 20, "lr": 0.05, "eval_every": 10}
    run = bart_trainer(bart_tokenizer, tmp_path, **options)
    run.run(progress=False)
    _, first = run.measured[0]
    assert run.best < first - 0.001 and fingerprint(model) == before  # nats per token
    for old, new in zip(start, prefix.parameters(), strict=True):
        assert not torch.equal(old, new)
    kept = BARTPrefix.load(tmp_path / "prefix.safetensors")
    assert kept.base == before and kept.linearisation == "paper"
    samples = [entry for entry in read_log(tmp_path) if "samples" in entry]
    assert len(samples) == 3 and all(len(entry["samples"]) == 2 for entry in samples)


def test_finetuning_changes_all_weights_and_loads_again(bart_tokenizer, tmp_path):
    model = small_bart()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    bart_trainer(bart_tokenizer, tmp_path, model=model, method="finetune").run(progress=False)
    for name, weight in model.named_parameters():
        assert not torch.equal(weight, before[name]), name
    again, _ = load(tmp_path / "model")
    assert fingerprint(again) == fingerprint(model) and again.config.linearisation == "paper"


@pytest.mark.parametrize("method", ["prefix", "finetune"])
def test_a_resumed_run_has_the_losses_of_an_unbroken_one(bart_tokenizer, tmp_path, method):
    bart_trainer(bart_tokenizer, tmp_path / "whole", method=method).run(progress=False)
    first = bart_trainer(bart_tokenizer, tmp_path / "parts", method=method)
    run_until_killed(first, after=4)
    second = bart_trainer(bart_tokenizer, tmp_path / "parts", method=method)
    second.load_state()
    assert second.step_done == 3  # the last evaluation
    second.run(progress=False)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_resuming_with_other_sites_is_refused(bart_tokenizer, tmp_path):
    bart_trainer(bart_tokenizer, tmp_path, steps=3).run(progress=False)
    model = small_bart()
    prefix = BARTPrefix.random(model.config, 3, 0, sites=("cross",))
    prefix.bind(model)
    with pytest.raises(ValueError, match="differs in sites"):
        bart_trainer(bart_tokenizer, tmp_path, model=model, prefix=prefix, steps=3).load_state()


def test_what_bart_has_not_is_named(bart_tokenizer, tmp_path):
    for method in ("adapter", "ft-top"):
        with pytest.raises(ValueError, match=f"'{method}'"):
            bart_trainer(bart_tokenizer, tmp_path, method=method)


# the commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bart_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "bart"
    save_model(
        small_bart(forced_bos_token_id=0, no_repeat_ngram_size=3),
        Tokenizer.from_folder(ASSETS / "mini-bart", "bart"),
        folder,
    )
    return folder


@pytest.mark.slow
def test_commands(cli, bart_folder, tables, tmp_path):
    """train, resume, export, evaluate, generate, info: as for GPT-2."""
    model, run = ("--model", bart_folder, "--device", "cpu"), tmp_path / "run"
    short = ("--steps", 4, "--eval-every", 2, "--batch-size", 2, "--prefix-len", 3)
    options = ("--mid-dim", 8, "--sites", "encoder", "--sites", "cross", "--max-source", 20)
    out, _ = cli(
        "train", *model, "--data", tables, "--out", run, *short, *options, "--json",
        "--init", "words", "--init-text", "summarize",
    )  # fmt: skip
    assert json.loads(out)["steps"] == 4
    kept = run / "prefix.safetensors"
    assert tuple(BARTPrefix.load(kept).sites) == ("encoder", "cross")
    cli("train", "--resume", run)
    exported, _ = cli("export", run, "--out", tmp_path / "p.safetensors", "--json")
    assert json.loads(exported)["kept_parameters"] == 3 * (2 + 3) * 2 * 16
    out, _ = cli("evaluate", *model, "--data", tables, "--prefix", kept, "--num-beams", 2,
                 "--max-new-tokens", 8, "--json")  # fmt: skip
    assert json.loads(out)["tables"] == 3 and "bleu" in json.loads(out)
    streamed, _ = cli("generate", *model, "--prefix", kept, "boat : Gull", "--max-new-tokens", 6)
    texts, _ = cli(
        "generate", *model, "--prefix", kept, "boat : Gull", "--max-new-tokens", 6, "--json"
    )
    assert json.loads(texts)["texts"] == [streamed.strip("\n")]
    out, _ = cli("info", *model, "--prefix", kept, "--json")
    parts = {row["part"]: row["parameters"] for row in json.loads(out)["parameters"]}
    assert parts["prefix table, cross"] == 3 * 3 * 2 * 16 and parts["prefix in all"] == 480
    _, err = cli("train", *model, "--method", "adapter", "--out", tmp_path / "no", code=1)
    assert "'adapter' is for GPT-2 only" in err and not (tmp_path / "no" / "state").exists()
    _, err = cli("search", *model, "--out", tmp_path / "search", code=1)
    assert "for GPT-2 only" in err
    _, err = cli("generate", "--prefix", kept, "boat : Gull", code=1)  # mini
    assert "this prefix is for a BART and cannot be used with a GPT-2; its run was of" in err


def test_articles_go_through(cli, bart_folder, tmp_path):
    """XSum's rows: document and summary; long ones are refused unless --max-source cuts them."""
    for split in ("train", "dev"):
        rows = [{"document": "amber brook cedar " * 40, "summary": f"Amber {n}."} for n in range(3)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    args = ("train", "--model", bart_folder, "--data", tmp_path, "--steps", 2, "--prefix-len", 2,
            "--mid-dim", 8)  # fmt: skip
    _, err = cli(*args, "--out", tmp_path / "long", code=1)
    assert "at most 96 are allowed; 3 of 3 pairs are too long: train --max-source 96 cuts" in err
    cli(*args, "--out", tmp_path / "cut", "--max-source", 64)
    assert (tmp_path / "cut" / "prefix.safetensors").is_file()
