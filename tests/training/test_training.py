"""The trainer: the result of a step, resuming, the files of a run folder."""

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import pairs, signalled, small_model, trainer

from minprefix.data.examples import Example
from minprefix.models.weights import fingerprint
from minprefix.prefix.bank import PrefixBank
from minprefix.prefix.parametrisations import token_activations
from minprefix.prefix.prefix import Prefix
from minprefix.training import loop
from minprefix.training.config import METHOD_NAMES, TrainConfig
from minprefix.training.interrupts import Interrupted
from minprefix.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
PREFIX = Prefix.random(small_model().config, 3, 0)


def log_of(folder: Path, key: str = "loss") -> dict[int, float]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry[key] for entry in entries if key in entry}


def gradient_of(run: Trainer) -> torch.Tensor:
    """The gradient that the next step uses: AdamW, seen through its first moment."""
    run.step()
    moments = [run.optimizer.state[p]["exp_avg"] for p in run.trained.parameters()]
    return torch.cat([m.flatten() for m in moments])


@pytest.mark.parametrize("loss", ["token", "sentence"])
def test_accumulation_equals_one_large_batch(tokenizer, tmp_path, loss):
    """The mean runs over the effective batch, not over means of its parts (fp64: rounding only)."""
    moments = []
    for size, accumulation in ((6, 1), (2, 3), (3, 2)):
        run = trainer(
            tokenizer, tmp_path, model=small_model(torch.float64), loss=loss, clip=1e9,
            batch_size=size, accumulation=accumulation,
        )  # fmt: skip
        rows = [0, 3, 5, 6, 8, 9]
        cut = [rows[i : i + size] for i in range(0, 6, size)]
        run.order.batch = lambda number, cut=cut: cut[number]
        moments.append(gradient_of(run))
    scale = moments[0].abs().max()
    assert scale > 0
    for other in moments[1:]:
        assert (other - moments[0]).abs().max() <= 1e-12 * scale


def test_losses_are_means_per_token_and_sums_per_sentence(tokenizer, tmp_path):
    """The gradient of both choices against the formula, from the logits of each pair alone."""
    for loss in ("token", "sentence"):
        run = trainer(tokenizer, tmp_path, model=small_model(torch.float64), loss=loss, clip=1e9)
        chosen = [run.rows[i] for i in run.order.batch(0)]
        total, targets = 0.0, 0
        for row in chosen:
            logits = run.model(torch.tensor([row.ids[:-1]]), prefix=run.prefix)[0]
            log_p = logits.log_softmax(-1)
            for place in range(row.prompt_len, len(row.ids)):
                total = total - log_p[place - 1, row.ids[place]]
                targets += 1
        divisor = targets if loss == "token" else len(chosen)
        (expected,) = torch.autograd.grad(total / divisor, [run.prefix.prefix_table])
        got = gradient_of(run) / 0.1  # first moment of the first step = (1 - 0.9) gradient
        assert (got - expected.flatten()).abs().max() <= 1e-10 * expected.abs().max()


def test_gradient_is_clipped_to_the_norm(tokenizer, tmp_path):
    run = trainer(tokenizer, tmp_path, clip=1e-3)
    assert gradient_of(run).norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_learning_rate_rises_then_falls_to_zero(tokenizer, tmp_path):
    run = trainer(tokenizer, tmp_path, steps=10, warmup_steps=4, lr=1.0)
    rates = [run.lr_at(step) for step in range(11)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])


def test_the_model_stays_frozen_and_the_prefix_learns(tokenizer, tmp_path):
    run = trainer(tokenizer, tmp_path, steps=30, eval_every=30, lr=0.3)
    before = fingerprint(run.model)
    run.run(progress=False)
    losses = log_of(tmp_path)
    assert fingerprint(run.model) == before == Prefix.load(tmp_path / "prefix.safetensors").base
    assert {(p.requires_grad, p.grad) for p in run.model.parameters()} == {(False, None)}
    assert losses[30] < losses[1] - 0.2  # nats; 0.0 if nothing were learned


def test_best_on_dev_is_kept(tokenizer, tmp_path):
    """Learned, then driven up the gradient: the file holds the table of the lowest dev loss."""
    run = trainer(tokenizer, tmp_path, steps=10, eval_every=2)
    run.lr_at = lambda step: 0.3 if step < 6 else -5.0
    tables, evaluate = {}, run.evaluate

    def evaluate_and_note():
        tables[run.step_done] = run.prefix.table().detach().clone()
        evaluate()

    run.evaluate = evaluate_and_note
    run.run(progress=False)
    dev = log_of(tmp_path, "dev_loss")
    best = min(dev, key=dev.get)
    assert best < 10 and run.best == dev[best]
    assert torch.equal(Prefix.load(tmp_path / "prefix.safetensors").prefix_table, tables[best])


def test_samples_are_written_at_evaluations(tokenizer, tmp_path):
    trainer(tokenizer, tmp_path, samples=2).run(progress=False)
    samples = log_of(tmp_path, "samples")
    assert sorted(samples) == [0, 3, 6]
    assert [sample["source"] for sample in samples[6]] == [e.source for e in pairs(2, 50)]


def test_without_dev_data_the_last_step_is_kept(tokenizer, tmp_path):
    run = trainer(tokenizer, tmp_path, dev=0)
    run.run(progress=False)
    kept = Prefix.load(tmp_path / "prefix.safetensors")
    assert torch.equal(kept.prefix_table, run.prefix.table().detach())


def test_gate_stays_non_negative(tokenizer, tmp_path):
    run = trainer(tokenizer, tmp_path, prefix_options={"gate": True}, lr=0.5)
    for _ in range(6):
        run.step()
        assert (run.prefix.gate >= 0).all()
    assert (run.prefix.gate > 0).any()


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_activation_checkpointing_changes_no_loss(tokenizer, tmp_path, method):
    """Dropout masks included: a step recomputes what it computed."""
    losses = []
    for on in (False, True):
        run = trainer(tokenizer, tmp_path, method=method, activation_checkpointing=on)
        losses.append([float(run.step()["nats"]) for _ in range(3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_change_no_step(tokenizer, tmp_path, checkpointing):
    """Losses of steps with several lengths, fp64 rounding; few graphs serve all nine layers."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # another test of this process may have compiled
    nats = []
    for compiled in (False, True):
        model = small_model(torch.float64, n_layer=9)
        run = trainer(
            tokenizer, tmp_path, model=model, compile=compiled,
            activation_checkpointing=checkpointing,
        )  # fmt: skip
        nats.append([float(run.step()["nats"]) for _ in range(4)])
    assert nats[1] == pytest.approx(nats[0], rel=1e-12)
    # the first layer's input has no gradient, the last layer reads `at`
    assert 3 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


def run_of_24_steps(tokenizer, out: Path, method: str) -> Trainer:
    options = {"parametrisation": "mlp", "mid_dim": 8}
    return trainer(tokenizer, out, steps=24, eval_every=5, method=method, prefix_options=options)


SLOWED = """
import sys
sys.path[:0] = sys.argv[1:4]
from conftest import ASSETS, Tokenizer
from test_training import *
run = run_of_24_steps(Tokenizer.from_folder(ASSETS / "mini"), Path(sys.argv[4]), sys.argv[5])
step = run.step
run.step = lambda: (time.sleep(0.2), step())[1]
run.run(progress=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_killed_run_continues_to_the_same_losses(tokenizer, tmp_path, method):
    """kill -9 in the middle; every later loss and the dev losses are those of an unbroken run."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_of_24_steps(tokenizer, whole, method).run(progress=False)
    paths = (ROOT, ROOT / "tests", ROOT / "tests" / "training", broken)
    process = subprocess.Popen([sys.executable, "-c", SLOWED, *map(str, paths), method])
    log = broken / "log.jsonl"
    limit = time.monotonic() + 120
    while not (log.exists() and len(log.read_text().splitlines()) >= 10):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 7 < len(log_of(broken)) < 24
    with open(log, "a") as file:  # what a kill in the middle of a line leaves
        file.write('{"step": 3')
    again = run_of_24_steps(tokenizer, broken, method)
    again.load_state()
    again.run(progress=False)
    assert log_of(broken) == log_of(whole)
    assert log_of(broken, "dev_loss") == log_of(whole, "dev_loss")
    if method == "prefix":
        tables = [Prefix.load(f / "prefix.safetensors").prefix_table for f in (whole, broken)]
        assert torch.equal(*tables)


def test_a_kill_before_the_first_saved_state_leaves_no_line_twice(tokenizer, tmp_path):
    trainer(tokenizer, tmp_path).evaluate()  # before the first step
    trainer(tokenizer, tmp_path).run(progress=False)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines].count(0) == 1


def test_a_second_ctrl_c_during_saving_names_the_last_saved_step(tokenizer, tmp_path, monkeypatch):
    """torch.save makes a RuntimeError of it."""

    twice = [signal.SIGINT, signal.SIGINT]

    class Interrupting(io.FileIO):
        def write(self, data):
            while twice and self.tell():  # not in the first piece, which torch.save takes better
                signal.raise_signal(twice.pop())
            return super().write(data)

    run = trainer(tokenizer, tmp_path)
    save = torch.save

    def interrupted_save(state, file):
        save(state, Interrupting(file.name, "wb") if run.step_done == 6 else file)

    monkeypatch.setattr(torch, "save", interrupted_save)
    with pytest.raises(Interrupted, match="stopped at once; the last saved step is 3"):
        run.run(progress=False)
    monkeypatch.undo()
    again = trainer(tokenizer, tmp_path)
    again.load_state()
    assert again.step_done == again.saved_step == 3


def fake_clock(monkeypatch, run: Trainer) -> None:
    """For the loop a step takes 2 s, and an evaluation 60 s."""
    now = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def timed(work, seconds):
        def later(*args):
            now[0] += seconds
            return work(*args)

        return later

    run.step, run.evaluate = timed(run.step, 2.0), timed(run.evaluate, 60.0)


def test_the_time_is_estimated_from_steps_alone(tokenizer, tmp_path, monkeypatch, capsys):
    """Not from log lines and evaluations between them, which come early after resuming."""
    settings = {"eval_every": 4, "log_every": 4}
    trainer(tokenizer, tmp_path, steps=3, **settings).run(progress=False)
    run = trainer(tokenizer, tmp_path, steps=20, **settings)
    run.load_state()
    fake_clock(monkeypatch, run)
    run.run()
    assert "about 24 s to step 20, not counting evaluations" in capsys.readouterr().err


def test_the_bar_has_the_evaluation_above_it(tokenizer, tmp_path, monkeypatch, capsys):
    run = trainer(tokenizer, tmp_path, log_every=3)
    shown = []
    monkeypatch.setattr(loop.tqdm, "write", lambda bar, *args, **more: shown.append(bar.postfix))
    run.run()
    last = f"best dev {run.best:.3f} (step {run.best_step})"
    assert run.best_step == 6 and last in shown[-1]


def test_a_run_by_the_clock_says_where_ctrl_c_stopped_it(tokenizer, tmp_path, monkeypatch):
    run = trainer(tokenizer, tmp_path, steps=None, time="3m", dev=0)
    monkeypatch.setattr(run, "eval_every", 1000)
    stopped = pytest.raises(Interrupted, match=r"after step 30 \(60 s of 3m\); state saved")
    with signalled(after=29), stopped:
        fake_clock(monkeypatch, run)
        run.run(progress=False)


def test_resuming_something_else_is_refused(tokenizer, tmp_path):
    run = trainer(tokenizer, tmp_path)
    run.run(progress=False)
    with pytest.raises(ValueError, match="differs in lr, seed"):
        trainer(tokenizer, tmp_path, lr=5e-3, seed=1).load_state()
    other = trainer(tokenizer, tmp_path)
    other.rows = other.rows[:-1]
    with pytest.raises(ValueError, match="differs in training data"):
        other.load_state()
    with pytest.raises(ValueError, match="no saved state"):
        trainer(tokenizer, tmp_path / "elsewhere").load_state()
    for state in (tmp_path / "state").iterdir():
        state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"state\.pt: damaged"):
        trainer(tokenizer, tmp_path).load_state()


def test_a_loss_that_is_not_finite_stops_the_run(tokenizer, tmp_path):
    run = trainer(tokenizer, tmp_path)
    with torch.no_grad():
        run.prefix.prefix_table[0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="smaller lr"):
        run.run(progress=False)
    assert not (tmp_path / "prefix.safetensors").exists()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"train": "restaurants"}, r"expected Example\(source, .*, got 'r'"),
        ({"train": [{"source": "a", "target": "b"}]}, r"expected Example\(.*, got {'source'"),
        ({"train": [Example("a", "boat")]}, r"expected Example\(source, \(target, .*'boat'"),
        ({"tuned": "prefix.safetensors"}, "a run trains one prefix, or a `Tuned`, got a str"),
        ({"tuned": PrefixBank([PREFIX])}, "a run trains one prefix, .*, got a PrefixBank"),
        ({"tokenizer": SimpleNamespace(family="bart")}, "a GPT-2, but the tokenizer is a BART's"),
    ],
)
def test_wrong_arguments_of_a_trainer_are_named(tokenizer, tmp_path, wrong, message):
    given = {"tokenizer": tokenizer, "train": pairs(3), "tuned": PREFIX} | wrong
    model, config = small_model(), TrainConfig(steps=1)
    with pytest.raises(ValueError, match=message):
        Trainer(model, config=config, dev=[], out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_bf16_works_on_a_copy_of_the_frozen_weights(tokenizer, tmp_path):
    """The model given stays as it is; the prefix is fp32; the run belongs to the same base."""
    model = small_model()
    run = trainer(tokenizer, tmp_path, model=model, precision="bf16")
    nats = run.step()["nats"]
    exact = trainer(tokenizer, tmp_path, model=small_model()).step()["nats"]
    assert {w.dtype for w in run.model.parameters()} == {torch.bfloat16}
    assert {w.dtype for w in model.parameters()} == {torch.float32}
    assert {w.dtype for w in run.prefix.parameters()} == {torch.float32}
    assert fingerprint(run.model) == fingerprint(model) == run.prefix.base
    assert nats == pytest.approx(exact, rel=2**-8) and nats != exact  # bf16 keeps 8 bits


def test_a_run_leaves_the_model_as_it_was_given(tokenizer, tmp_path):
    """In eval mode, all of its modules, and without the run's ways to save memory or time."""
    for method in ("prefix", "finetune", "ft-top"):
        model = small_model()
        run = trainer(
            tokenizer, tmp_path / method, model=model, method=method,
            activation_checkpointing=True,
        )  # fmt: skip
        run.run(progress=False)
        assert [module for module in model.modules() if module.training] == [], method
        assert [block for block in model.blocks() if "forward" in vars(block)] == [], method
        ids = [5, 6, 7]
        assert torch.equal(token_activations(model, ids), token_activations(model, ids))


def test_a_run_of_an_older_version_goes_on(tokenizer, tmp_path):
    """Its settings lack what could not be chosen then; another precision is still refused."""
    run = trainer(tokenizer, tmp_path)
    run.step()
    tmp_path.mkdir(exist_ok=True)
    ours = Trainer.settings
    older = {"compile", "prefix_dropout", "place", "bf16", "max_source"}
    run.settings = lambda: {k: v for k, v in ours(run).items() if k not in older}
    run.save_state()
    trainer(tokenizer, tmp_path).load_state()
    run.settings = lambda: ours(run) | {"bf16": True}
    run.save_state()
    with pytest.raises(ValueError, match="differs in bf16"):
        trainer(tokenizer, tmp_path).load_state()
