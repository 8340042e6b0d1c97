"""Saved states: checks before loading, damaged bytes, kills, kept files."""

import math
import os
import random
from pathlib import Path

import pytest
import torch
from conftest import pairs, trainer
from test_pretrain import folder, run_of  # noqa: F401 (a fixture)
from test_prompt_search import made
from test_training import log_of

from minprefix.files import FileNote
from minprefix.training.run_folder import (
    earlier_path,
    has_state,
    read_log,
    read_state,
    read_state_file,
    state_path,
    truncate_log,
    write_state,
)
from minprefix.training.trainer import Trainer


@pytest.fixture
def run(tokenizer, tmp_path) -> Trainer:
    """After two steps of six, with a state of each."""
    run = trainer(tokenizer, tmp_path)
    for _ in range(2):
        run.step()
        run.save_state()
    return run


def changed(state: dict, place: str, value) -> dict:
    """The state with another value at these keys; a function gets the old one, None deletes."""
    *way, last = [int(key) if key.isdecimal() else key for key in place.split("/")]
    inner = state
    for key in way:
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value(inner[last]) if callable(value) else value
    return state


MOMENT = "optimizer/state/0/exp_avg"
WRONG = [
    ("step", 10**9, "step is 1000000000, expected 0 to 6"),
    ("step", -1, "step is -1"),
    ("step", 1.0, "step is 1.0"),
    ("step", torch.tensor(2), r"step is tensor\(2\)"),
    ("step", 3, "has made 2 steps, the run 3"),
    ("seconds", math.nan, "seconds is nan"),
    ("seconds", "1", "seconds is 1"),
    ("counted_from", 5, "counted_from is 5, expected 0 to 2"),
    ("best", math.nan, "best is nan"),
    ("best", 0.5, "best is 0.5, but the lowest loss is inf"),
    ("measured", [(1, math.nan)], "measured has the loss nan"),
    ("measured", [(9, 1.0)], "a step of measured is 9"),
    ("measured", [1], "measured has 1"),
    ("measured", {}, "measured is not a list"),
    ("settings", [1], "settings are not those of a run"),
    ("settings/lr", torch.ones(2), "settings are not those of a run"),
    ("settings/lr", 1.0, "differs in lr"),
    ("trained", [], "trained is not a dictionary"),
    ("trained/prefix_table", None, "trained lacks prefix_table"),
    ("trained/more", torch.ones(1), "trained has an unknown more"),
    ("trained/prefix_table", torch.ones(1), r"prefix_table is \(1,\) float32, this run needs"),
    ("trained/prefix_table", lambda x: x.double(), "float64, this run needs"),
    ("trained/prefix_table", lambda x: x * math.inf, "not finite"),
    ("trained/prefix_table", lambda x: x.to_sparse(), "not a tensor with values"),
    ("trained/prefix_table", 1.0, "not a tensor with values"),
    ("optimizer", [], "optimizer lacks state"),
    ("optimizer/state", [], "optimizer is not a dictionary"),
    ("optimizer/state/0", None, "optimizer lacks 0"),
    ("optimizer/state/1", {}, "optimizer has an unknown 1"),
    (MOMENT, None, "lacks exp_avg"),
    (MOMENT, torch.ones(1), r"exp_avg is \(1,\) float32, this run needs"),
    (MOMENT, lambda x: x.half(), "float16, this run needs"),
    (MOMENT, lambda x: x * math.nan, "not finite"),
    (MOMENT + "_sq", lambda x: -x - 1, "values below 0"),
    ("optimizer/state/0/step", torch.tensor(1e9), "has made 1e"),
    ("optimizer/state/0/step", torch.tensor([2.0, 2.0]), r"step is \(2,\)"),
]


@pytest.mark.parametrize("place, value, message", WRONG)
def test_a_state_that_cannot_be_is_refused_before_anything_is_loaded(
    run, tokenizer, tmp_path, place, value, message
):
    write_state(tmp_path, changed(read_state(tmp_path), place, value))
    again = trainer(tokenizer, tmp_path)
    before = again.prefix.prefix_table.detach().clone()
    with pytest.raises(ValueError, match=message) as caught:
        again.load_state()
    assert str(state_path(tmp_path)) in str(caught.value) and "\n" not in str(caught.value)
    assert torch.equal(again.prefix.prefix_table, before)
    assert again.step_done == 0 and not again.optimizer.state


def test_a_state_gives_neither_rates_nor_memory_to_the_optimizer(run, tokenizer, tmp_path):
    """One element stretched over a whole moment has its shape, but not its memory."""

    def stretched(x):
        return torch.zeros(1).expand(x.shape)

    state = changed(read_state(tmp_path), MOMENT, stretched)
    state["optimizer"]["param_groups"] = [{"lr": 1e9, "params": [7]}]
    write_state(tmp_path, state)
    again = trainer(tokenizer, tmp_path)
    again.load_state()
    (weight,) = again.trained.parameters()
    assert again.optimizer.state[weight]["exp_avg"].is_contiguous()
    assert again.optimizer.param_groups[0]["lr"] == again.config.lr
    again.step()
    assert torch.isfinite(weight).all()


def test_a_state_of_pretraining_is_checked_too(folder, tmp_path):  # noqa: F811
    run_of(folder, tmp_path, steps=1).run(progress=False)
    for place, value, message in (
        ("step", 10**9, "step is 1000000000"),
        ("optimizer", [], "optimizer must be a list of 2"),
        ("optimizer/0/state/0/momentum_buffer", torch.ones(1), r"momentum_buffer is \(1,\)"),
        ("optimizer/1/state/0/exp_avg_sq", torch.ones(1), r"exp_avg_sq is \(1,\)"),
        ("trained/wte.weight", torch.ones(1), r"wte.weight is \(1,\)"),
    ):
        whole = read_state(tmp_path)
        write_state(tmp_path, changed(read_state(tmp_path), place, value))
        with pytest.raises(ValueError, match=message):
            run_of(folder, tmp_path, steps=1).load_state()
        write_state(tmp_path, whole)
    run_of(folder, tmp_path, steps=1).load_state()


def test_a_state_of_a_search_is_checked_too(tokenizer, tmp_path):
    search = made(tokenizer, tmp_path, steps=1)
    search.run(progress=False)
    for place, value, message in (
        ("step", 2, "step is 2, expected 0 to 1"),
        ("spent", -1, "spent is -1"),
        ("level", 60, "level is 60, expected 0 to 3"),
        ("refused", "x", "refused is x"),
        ("chains", [], "chains must be a list"),
        ("chains/0", ([1, 2], 1.0), "the prompt of a chain is not a list of 4 token ids"),
        ("chains/0", ([1, 2, 3, 8192], 1.0), "a token id of the prompt of a chain is 8192"),
        ("chains/0", ([1, 2, 3, 4], math.nan), "the loss of a chain is nan"),
        ("best_prompt", [], "best_prompt is not a list"),
        ("before", {"dev_loss": "x"}, "dev_loss is x"),
    ):
        whole = read_state(tmp_path, keys=search.state_keys)
        wrong = changed(read_state(tmp_path, keys=search.state_keys), place, value)
        write_state(tmp_path, wrong)
        with pytest.raises(ValueError, match=message):
            made(tokenizer, tmp_path, steps=1).load_state()
        write_state(tmp_path, whole)
    made(tokenizer, tmp_path, steps=1).load_state()


def flipped(path: Path, seed: int, place: int | None = None) -> None:
    """One byte becomes another one."""
    rng, data = random.Random(seed), bytearray(path.read_bytes())
    data[rng.randrange(len(data)) if place is None else place] ^= rng.randrange(1, 256)
    path.write_bytes(data)


def test_every_flipped_byte_of_a_state_is_seen(run, tmp_path):
    path = state_path(tmp_path)
    whole = path.read_bytes()
    ends = [None] * 200 + list(range(len(whole) - 100, len(whole)))  # and all around the checksum
    for seed, place in enumerate(ends):
        flipped(path, seed, place)
        with pytest.raises(ValueError, match=r"state\.pt: damaged"):
            read_state_file(path, "cpu", ())
        path.write_bytes(whole)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"state\.pt: damaged"):
        read_state_file(path, "cpu", ())
    path.write_bytes(whole)
    assert read_state_file(path, "cpu", ())["step"] == 2


def test_the_state_before_stands_in_for_a_damaged_one(tokenizer, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    trainer(tokenizer, whole).run(progress=False)
    run = trainer(tokenizer, broken)
    run.run(progress=False)
    assert read_state(broken)["step"] == 6
    flipped(state_path(broken), 0)
    again = trainer(tokenizer, broken)
    with pytest.warns(FileNote, match=r"state\.pt: damaged.*before it, at step 3"):
        again.load_state()
    assert again.step_done == 3
    save, sound = again.save_state, []

    def save_and_look():
        # a kill now must find a whole state, whatever is renamed in which order
        sound.append(read_state_file(earlier_path(broken), "cpu", ())["step"] if sound else None)
        save()

    again.save_state = save_and_look
    again.run(progress=False)
    assert log_of(broken) == log_of(whole)
    assert read_state_file(earlier_path(broken), "cpu", ())["step"] == 3
    for path in (state_path(broken), earlier_path(broken)):
        flipped(path, 1)
    with pytest.raises(ValueError, match=r"state\.pt: damaged"):
        trainer(tokenizer, broken).load_state()


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_kill_at_any_point_of_saving_leaves_a_whole_state(run, tmp_path, monkeypatch, call):
    state, real = read_state(tmp_path), getattr(os, call)

    class Killed(BaseException):
        pass

    for last in range(10):
        calls = []

        def killed(*args, last=last, calls=calls):
            if len(calls) == last:
                raise Killed
            calls.append(args)
            return real(*args)

        state["step"] += 1
        with monkeypatch.context() as patch:
            patch.setattr(os, call, killed)
            try:
                write_state(tmp_path, state)
                break
            except Killed:
                pass
        assert has_state(tmp_path)
        assert read_state(tmp_path)["step"] in (state["step"] - 1, state["step"])
        write_state(tmp_path, state)
    assert last > 1


def test_a_state_of_an_older_version_has_no_checksum_and_a_note(run, tmp_path):
    state = read_state(tmp_path)
    torch.save(state, state_path(tmp_path))
    with pytest.warns(FileNote, match="no checksum"):
        assert read_state(tmp_path)["step"] == 2


def test_other_dev_data_is_refused(run, tokenizer, tmp_path):
    other = trainer(tokenizer, tmp_path)
    other.dev_rows = other.dev_rows[1:]
    with pytest.raises(ValueError, match="the saved run differs in dev data"):
        other.load_state()


def test_what_was_kept_is_written_again_or_missed(tokenizer, tmp_path):
    run = trainer(tokenizer, tmp_path)
    run.run(progress=False)
    kept = (tmp_path / "prefix.safetensors").read_bytes()
    (tmp_path / "prefix.safetensors").unlink()
    again = trainer(tokenizer, tmp_path)
    again.load_state()
    assert again.best_step == again.step_done == 6
    again.run(progress=False)
    assert (tmp_path / "prefix.safetensors").read_bytes() == kept
    (tmp_path / "prefix.safetensors").unlink()
    again.measured = [(0, 99.0), (3, again.best - 1), (6, again.best)]
    again.save_state()
    last = trainer(tokenizer, tmp_path)
    last.load_state()
    with pytest.raises(ValueError, match=r"prefix\.safetensors is gone.* it was from step 3"):
        last.run(progress=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_rows_and_keeps_the_state(
    tokenizer, tmp_path, monkeypatch, value
):
    def placed(n, start=0):
        return [
            type(e)(e.source, e.targets, where=f"train.jsonl:{i}")
            for i, e in enumerate(pairs(n, start), 1)
        ]

    monkeypatch.setattr("conftest.pairs", placed)
    run = trainer(tokenizer, tmp_path, log_every=10, eval_every=2, batch_size=3, accumulation=2)
    losses = run.losses
    run.losses = lambda *args: (
        losses(*args) * (value if torch.is_grad_enabled() and run.step_done == 2 else 1)
    )
    with pytest.raises(FloatingPointError) as caught:
        run.run(progress=False)
    rows = [run.rows[i].where for batch in run.batches(2) for i in batch]
    told = f"(rows {', '.join(rows[:4])} and {len(rows) - 4} more)"
    assert f"is {value} in step 3 {told}: try a smaller lr" in str(caught.value)
    assert read_state(tmp_path)["step"] == 2
    assert torch.isfinite(read_state(tmp_path)["trained"]["prefix_table"]).all()


def test_a_log_with_odd_lines_does_not_stop_a_run(run):
    run.run(progress=False)
    path, whole = run.out / "log.jsonl", read_log(run.out)
    odd = [b"7", b"[]", b'{"loss": 1}', b'{"step": "x"}', b'{"step": 1, "loss": []}', b"\xff", b"["]
    path.write_bytes(b"\n".join([*odd[:3], path.read_bytes(), *odd, b'{"a": "\xe2']))
    assert read_log(run.out) == whole
    truncate_log(run.out, 4)
    assert read_log(run.out) == [entry for entry in whole if entry["step"] <= 4]
