"""The trainer with every form of a prefix: which weights change, resuming, dropout, bf16."""

import json

import pytest
import torch
from conftest import assert_close, few_tables, run_until_killed, small_model, trainer
from test_training import log_of

from minprefix.generation.texts import generate
from minprefix.models.weights import load
from minprefix.prefix.prefix import Prefix
from minprefix.training.graphs import drop_entries
from minprefix.training.run_folder import read_state, write_state

MLP = {"mid_dim": 8}
FORMS = {
    "table": {},
    "mlp": {"parametrisation": "mlp", **MLP},
    "gate": {"gate": True},
    "embedding": {"parametrisation": "embedding"},
    "embedding-mlp": {"parametrisation": "embedding-mlp", **MLP},
    "gated embedding": {"parametrisation": "embedding", "gate": True},
    "infix": {"place": "infix"},
    "infix mlp": {"place": "infix", "parametrisation": "mlp", **MLP},
    "gated infix": {"place": "infix", "gate": True},
}
ABLATIONS = ["embedding", "embedding-mlp", "infix", "infix mlp"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("form", FORMS)
def test_all_that_is_trained_moves_and_nothing_else(tokenizer, tmp_path, form, precision):
    """Three steps: every trained number but those behind a closed gate, no frozen bit."""
    run = trainer(tokenizer, tmp_path, prefix_options=FORMS[form], precision=precision)
    frozen = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    before = {name: p.detach().clone() for name, p in run.prefix.named_parameters()}
    for _ in range(3):
        run.step()
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, frozen[name]), name
    assert {(p.requires_grad, p.grad) for p in run.model.parameters()} == {(False, None)}
    for name, parameter in run.prefix.named_parameters():
        moved = parameter != before[name]
        assert moved.any() if "gate" in form else moved.all(), name


@pytest.mark.parametrize("form", ABLATIONS)
def test_losses_and_files_of_a_run(tokenizer, tmp_path, form):
    """It learns; the file that is kept writes what the trained prefix writes."""
    model = small_model(torch.float64)
    run = trainer(
        tokenizer, tmp_path, model=model, prefix_options=FORMS[form], steps=30, eval_every=30,
        batch_size=10, lr=0.3 if "mlp" not in form else 0.03,
    )  # fmt: skip
    run.run(progress=False)
    losses = log_of(tmp_path)
    # nats, over the same rows in each step; 0.0 if nothing were learned. Virtual tokens do least
    assert losses[30] < losses[1] - 0.01
    loaded = Prefix.load(tmp_path / "prefix.safetensors")
    assert loaded.place == run.prefix.place and loaded.prefix_table is not None
    sources = [example.source for example in run.dev]
    trained, kept = (
        generate(model, tokenizer, sources, prefix=prefix, max_new_tokens=8)
        for prefix in (run.prefix.float(), loaded)
    )
    assert trained == kept and any(trained)


@pytest.mark.parametrize("form", ABLATIONS)
def test_a_broken_run_goes_on_to_the_same_losses(tokenizer, tmp_path, form):
    """With prefix dropout, whose masks are a function of seed and step."""
    options = {"prefix_options": FORMS[form], "steps": 7, "prefix_dropout": 0.3}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    trainer(tokenizer, whole, **options).run(progress=False)
    run = trainer(tokenizer, broken, **options)
    run_until_killed(run, after=5)
    again = trainer(tokenizer, broken, **options)
    again.load_state()
    assert again.step_done == 3
    again.run(progress=False)
    assert log_of(broken) == log_of(whole)
    assert log_of(broken, "dev_loss") == log_of(whole, "dev_loss")
    tables = [Prefix.load(f / "prefix.safetensors").prefix_table for f in (whole, broken)]
    assert torch.equal(*tables)


def test_resuming_at_another_place_is_refused(tokenizer, tmp_path):
    trainer(tokenizer, tmp_path, prefix_options={"place": "infix"}).run(progress=False)
    with pytest.raises(ValueError, match="differs in place"):
        trainer(tokenizer, tmp_path).load_state()
    with pytest.raises(ValueError, match="differs in prefix_dropout"):
        trainer(
            tokenizer, tmp_path, prefix_options={"place": "infix"}, prefix_dropout=0.5
        ).load_state()
    embedding = {"parametrisation": "embedding"}
    trainer(tokenizer, tmp_path / "b", prefix_options=embedding).run(progress=False)
    with pytest.raises(ValueError, match="another model, prefix or adapter"):
        trainer(tokenizer, tmp_path / "b").load_state()


@pytest.mark.parametrize("form", ABLATIONS)
def test_a_step_in_bf16_follows_fp32(tokenizer, tmp_path, form):
    """The frozen model is a copy in bf16, and virtual tokens are read by that copy."""
    runs = [
        trainer(tokenizer, tmp_path, precision=precision, prefix_options=FORMS[form])
        for precision in ("fp32", "bf16")
    ]
    nats = [float(run.step()["nats"]) for run in runs]
    assert nats[1] == pytest.approx(nats[0], rel=2**-8) and nats[1] != nats[0]  # 8 bits
    assert {p.dtype for p in runs[1].prefix.parameters()} == {torch.float32}
    if runs[1].prefix.virtual is not None:
        assert runs[1].prefix.virtual.model_reference.model is runs[1].model
        assert runs[1].model.wte.weight.dtype == torch.bfloat16


# prefix dropout ------------------------------------------------------------------------------


def test_dropped_entries():
    """Zeros at the given rate, the rest enlarged so that the mean stays; (seed) decides."""
    acts = Prefix.random(small_model().config, 100, 0).activations()
    assert torch.equal(drop_entries(acts, 0.0, seed=3).table, acts.table)
    table = drop_entries(acts, 0.25, seed=3).table
    kept = table != 0
    # 6,400 entries: standard error 0.0054
    assert abs(kept.float().mean() - 0.75) < 0.02
    assert_close(table[kept], acts.table[kept] / 0.75, 1e-6)
    assert torch.equal(drop_entries(acts, 0.25, seed=3).table, table)
    assert not torch.equal(drop_entries(acts, 0.25, seed=4).table, table)


def test_prefix_dropout_acts_in_training_only(tokenizer, tmp_path):
    """Another loss and gradient in each step; the dev loss of the same prefix is the same."""
    runs = [
        trainer(tokenizer, tmp_path / str(p), prefix_dropout=p, batch_size=10, steps=4)
        for p in (0.0, 0.5)
    ]
    for run in runs:
        run.out.mkdir()
        run.evaluate()
    assert runs[0].best == runs[1].best
    for run in runs:
        run.lr_at = lambda step: 0.0  # the same prefix and the same rows in each step
    nats = [[float(run.step()["nats"]) for _ in range(2)] for run in runs]
    assert nats[0][0] == pytest.approx(nats[0][1], rel=1e-6)
    assert nats[1][0] != pytest.approx(nats[1][1], rel=1e-6) != nats[0][0]
    dropped_grads = runs[1].optimizer.state[runs[1].prefix.prefix_table]["exp_avg"] == 0
    # entries that neither of two masks has kept: a quarter of 192; standard error 0.03
    assert 0.1 < dropped_grads.float().mean() < 0.4


# the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, form, place",
    [
        (("--parametrisation", "embedding", "--init", "random"), "embedding", "prefix"),
        (
            ("--parametrisation", "embedding-mlp", "--gate", "--init", "random"),
            "embedding-mlp",
            "prefix",
        ),
        (("--place", "infix", "--init", "words", "--prefix-dropout", 0.1), "mlp", "infix"),
    ],
)
def test_commands(cli, tiny_folder, tables, tmp_path, options, form, place):
    """Train, export, look at, write: the exported file is that of the last step."""
    run, file = tmp_path / "run", tmp_path / "a.safetensors"
    few = few_tables(tables, tmp_path)
    common = ("--model", tiny_folder, "--device", "cpu", "--json")
    cli("train", *common, "--data", few, "--out", run, "--steps", 2, "--batch-size", 4,
        "--mid-dim", 8, "--prefix-len", 3, "--precision", "fp32", *options)  # fmt: skip
    exported = json.loads(cli("export", run, "--out", file, "--json")[0])
    rows = json.loads(cli("info", *common, "--prefix", file)[0])["parameters"]
    numbers = {row["part"]: row["parameters"] for row in rows}
    kept = numbers[f"{place} table"] + numbers.get(f"{place} gate", 0)
    assert exported["kept_parameters"] == kept >= 2 * 2 * 16 * 3  # L 2 C P
    assert exported["trained_parameters"] == numbers[f"trained ({form})"]
    latest, best = Prefix.load(file), Prefix.load(run / "prefix.safetensors")
    assert_close(latest.prefix_table, best.prefix_table, 1e-5)  # the last step is kept
    few = ("--prefix", file, "--max-new-tokens", 8)
    texts = json.loads(cli("generate", "boat : Gull 20", *common, *few)[0])["texts"]
    model, tokenizer = load(tiny_folder)
    own = generate(model, tokenizer, ["boat : Gull 20"], prefix=latest, max_new_tokens=8)
    assert texts == [own[0].strip()]


@pytest.mark.parametrize("form", ["embedding", "embedding-mlp"])
def test_a_run_in_bf16_is_exported_as_it_was_computed(cli, tiny_folder, tables, tmp_path, form):
    run, files = tmp_path / "run", [tmp_path / f"{name}.safetensors" for name in ("bf16", "fp32")]
    cli("train", "--model", tiny_folder, "--device", "cpu", "--out", run,
        "--data", few_tables(tables, tmp_path), "--steps", 2, "--batch-size", 4,
        "--mid-dim", 8, "--prefix-len", 3, "--parametrisation", form, "--precision", "bf16",
        "--init", "random")  # fmt: skip
    kept = Prefix.load(run / "prefix.safetensors").prefix_table
    for file in files:
        state = read_state(run)
        state["settings"]["bf16"] = file.stem == "bf16"
        write_state(run, state)
        cli("export", run, "--out", file)
    low, exact = ((Prefix.load(file).prefix_table - kept).abs().max().item() for file in files)
    assert low == 0 < exact  # the last step is kept
