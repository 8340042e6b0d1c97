"""Settings that the user does not give, the end of a run, and the messages about it."""

import math

import pytest
import torch
from conftest import pairs, signalled, trainer

from minprefix.data.examples import Example
from minprefix.data.splits import hold_out
from minprefix.methods.paper import paper_settings
from minprefix.training.advice import data_warnings, nothing_learned, verdict
from minprefix.training.config import TrainConfig, seconds_of, settle, steps_so_far
from minprefix.training.interrupts import Interrupted
from minprefix.training.run_folder import read_log


@pytest.mark.parametrize("n_pairs", [2, 20, 50, 200, 1000, 42_000])
def test_the_rule_fills_in_everything(n_pairs):
    config = settle(TrainConfig(), n_pairs, lr=0.5)
    assert None not in (config.steps, config.batch_size, config.warmup_steps, config.eval_every)
    assert config.lr == 0.5 and config.epochs is None
    assert 0 < config.warmup_steps < config.steps / 2
    assert config.steps / config.eval_every <= 20
    assert settle(config, n_pairs, lr=0.1) == config  # settled settings stay


def test_more_pairs_take_more_steps_and_fewer_passes():
    runs = [(n, settle(TrainConfig(), n, lr=1.0)) for n in (20, 50, 200, 1000, 42_000)]
    steps = [run.steps for _, run in runs]
    passes = [run.steps * run.batch_size / n for n, run in runs]
    assert steps == sorted(steps) and passes == sorted(passes, reverse=True)


def test_what_the_user_gives_is_kept():
    given = {"batch_size": 3, "lr": 0.2, "warmup_steps": 0, "eval_every": 7}
    config = settle(TrainConfig(epochs=2, **given), n_pairs=10, lr=0.5)
    assert config.steps == 8  # 2 x ceil(10 / 3)
    assert {name: getattr(config, name) for name in given} == given
    shared = settle(TrainConfig(epochs=2, accumulation=2, **given), n_pairs=10, lr=0.5, ranks=2)
    assert shared.steps == 2


def test_only_the_rule_lets_a_run_grow():
    rule = settle(TrainConfig(), 200, lr=1.0)
    assert rule.most_steps == 4 * rule.steps
    for given in ({"steps": 9}, {"epochs": 1}, {"time": "1m"}):
        assert settle(TrainConfig(**given), 200, lr=1.0).most_steps is None
    short = settle(TrainConfig(most_steps=100), 200, lr=1.0)
    assert short.steps == short.most_steps == 100


def test_the_length_follows_the_dev_losses():
    """Doubled if the loss at half is lower by a fifth, and by 0.15, than at a quarter."""
    config = TrainConfig(steps=8, most_steps=20)
    for losses, steps in (
        ([(0, 9.0), (2, 1.0), (4, 0.81), (6, 0.1)], 8),
        ([(0, 9.0), (2, 1.0), (3, 0.1)], 8),  # half is not reached yet
        ([(0, 9.0), (2, 0.5), (4, 0.36)], 8),  # by 28 %, but the texts are nearly right
        ([(0, 9.0), (2, 1.0), (4, 0.79)], 16),
        ([(0, 9.0), (2, 1.0), (4, 0.79), (8, 0.7)], 16),
        ([(0, 9.0), (3, 1.0), (5, 0.7), (9, 0.5)], 20),  # the first ones from there on; the most
        ([], 8),
    ):
        assert steps_so_far(config, losses) == steps, losses
    assert steps_so_far(TrainConfig(steps=8), [(2, 1.0), (4, 0.1)]) == 8


@pytest.mark.slow
def test_a_run_that_grew_continues_as_if_it_had_not_been_interrupted(tokenizer, tmp_path, capsys):
    def started(folder):
        run = trainer(tokenizer, tmp_path / folder, steps=8, most_steps=24, eval_every=1)
        run._dev_sums = lambda: torch.tensor([9 / (1 + run.step_done), 1.0])
        return run

    def rates(folder):
        return [entry["lr"] for entry in read_log(tmp_path / folder) if "lr" in entry]

    whole = started("whole")
    whole.run()
    assert whole.step_done == whole.steps == 24 and whole.config.steps == 8
    said = capsys.readouterr().err
    assert said.count("the run is made longer: to step") == 2
    assert "to step 16 instead of 8 (--most-steps 8 would have prevented this)" in said
    for after in (6, 12):  # after the first and after the second time
        with pytest.raises(Interrupted), signalled(after):
            started(str(after)).run(progress=False)
        again = started(str(after))
        again.load_state()
        assert again.steps == (16 if after == 6 else 24)
        again.run(progress=False)
        assert rates(str(after)) == rates("whole")
    assert rates("whole")[3] < rates("whole")[4]
    assert rates("whole")[-1] == pytest.approx(whole.config.lr / 24)


def test_times_are_read():
    assert [seconds_of(t) for t in ("90s", "10m", "1.5h")] == [90, 600, 5400]
    for wrong in ("", "4", "ten", "10 days", "0m", "-5s", "m"):
        with pytest.raises(ValueError, match="time must have a unit, such as"):
            TrainConfig(time=wrong)
    with pytest.raises(ValueError, match="time replaces steps and epochs"):
        TrainConfig(time="1m", steps=3)


@pytest.mark.slow
def test_a_time_ends_the_run_at_rate_zero(tokenizer, tmp_path):
    run = trainer(tokenizer, tmp_path, steps=None, time="2s", dev=0, eval_every=10**6)
    result = run.run(progress=False)
    assert result["steps"] > 0 and run.seconds >= 2
    rates = [entry["lr"] for entry in read_log(tmp_path) if "lr" in entry]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 0.3 * run.config.lr
    assert run.lr_at(result["steps"]) == 0


def test_a_time_that_is_over_while_a_step_is_logged_still_ends_in_an_evaluation(
    tokenizer, tmp_path, monkeypatch
):
    run = trainer(tokenizer, tmp_path, steps=None, time="100s", dev=0, eval_every=10**6)
    monkeypatch.setattr(run, "share_done", lambda: 0.0 if run.step_done < 3 else next(answers))
    answers = iter([0.0, *[1.0] * 99])
    run.run(progress=False)
    assert run.saved_step == run.step_done == 4


def test_a_run_stops_early_after_its_first_half(tokenizer, tmp_path):
    """Learned, then driven up the gradient: patience 2 ends the run, but not before step 15."""
    settings = {"steps": 30, "eval_every": 2, "patience": 2}
    run = trainer(tokenizer, tmp_path, **settings)
    run.lr_at = lambda step: 0.3 if step < 4 else -5.0
    run.run(progress=False)
    assert run.stopped and run.step_done == 16 and run.best_step < 8
    again = trainer(tokenizer, tmp_path, **settings)
    again.load_state()
    assert again.finished() and again.measured == run.measured


def test_a_finished_run_is_extended(tokenizer, tmp_path):
    """The losses so far stay, the rate is that of the new schedule, patience counts anew."""
    first = trainer(tokenizer, tmp_path, steps=6)
    first.run(progress=False)
    longer = trainer(tokenizer, tmp_path, steps=10)
    longer.load_state()
    assert not longer.finished() and longer.counted_from == 6
    assert longer.lr_at(6) == pytest.approx(longer.config.lr * 4 / 10)
    assert not longer.out_of_patience()
    longer.run(progress=False)
    assert [step for step, _ in longer.measured] == [0, 3, 6, 9, 10]
    assert longer.measured[:3] == first.measured
    other = trainer(tokenizer, tmp_path, steps=10, batch_size=3)
    with pytest.raises(ValueError, match="the saved run differs in batch_size"):
        other.load_state()


def test_held_out_examples_depend_on_the_sources_alone():
    examples = pairs(40)
    train, dev = hold_out(examples)
    assert len(dev) == 4 and len(train) == 36
    assert not {e.source for e in train} & {e.source for e in dev}
    assert {e.source for e in hold_out(examples[::-1])[1]} == {e.source for e in dev}
    assert hold_out(examples[:3]) == (examples[:3], [])


def test_warnings_about_the_data(tokenizer):
    train = [*pairs(4), pairs(1)[0], Example("place : dune", ("word " * 150,))]
    said = data_warnings(tokenizer, train, [pairs(2)[1], *pairs(1, 9)], 151, 3, "paper")
    assert [line.split(":")[0] for line in said] == [
        "1 of 6 training pairs repeats another one, and so counts more than the others",
        "1 of 2 dev pairs is also in the training data",
        "the longest target has 151 tokens, and texts end after 100 by default",
        f"{len(train)} of {len(train)} sources are cut to 3 tokens",
    ]
    twice = data_warnings(tokenizer, [*pairs(4), *pairs(2)], [], 20, None, "paper")
    assert twice[0].startswith("2 of 6 training pairs repeat another one")
    assert data_warnings(tokenizer, pairs(4), pairs(1, 9), 20, None, "paper") == []


@pytest.mark.parametrize(
    "measured, statement, warning",
    [
        ([(0, 3.0), (10, 1.0), (20, 1.4)], "rose by 40 % after it (overfitting)", ""),
        # the best comes in the last quarter: it rose, so that it is not "still falling" as well
        ([(0, 3.0), (10, 1.4), (18, 1.1), (20, 1.25)], "(with 9 dev pairs this may be chance)", ""),
        ([(0, 3.0), (10, 4.0), (20, 3.5)], "Kept: step 0", ""),
        (
            [(0, 3.0), (10, 2.0), (20, 1.5)],
            "Kept: step 20",
            "by 25 % in the last quarter: more steps may help: "
            "python -m minprefix train --resume runs/x --steps 40",
        ),
        ([(0, 3.0), (15, 1.51), (20, 1.5)], "Kept: step 20", ""),
        ([], "no dev data", ""),
    ],
)
def test_the_verdict(measured, statement, warning):
    resume_command = "python -m minprefix train --resume runs/x"
    said, warnings = verdict(measured, stopped=False, dev_pairs=9, resume_command=resume_command)
    assert statement in " ".join(said)
    assert (warning in warnings[0]) if warning else warnings == []


@pytest.mark.parametrize("steps, way", [(2, "2 steps are few, so try more"), (300, "smaller --lr")])
def test_the_way_out_when_nothing_was_learned(steps, way):
    reason = nothing_learned([(0, 3.0), (steps, 3.5)])
    assert "below the 3.000" in reason and way in reason
    assert nothing_learned([(0, 3.0), (steps, 2.5)]) == ""


def test_presets_are_the_paper_s():
    settings, prefix_len = paper_settings("prefix", "e2e")
    assert (settings["lr"], settings["epochs"], settings["batch_size"], prefix_len) == (
        8e-5,
        5,
        10,
        5,
    )
    with pytest.raises(ValueError, match="no preset xsum for method finetune"):
        paper_settings("finetune", "xsum")
    assert math.isclose(paper_settings("adapter", "dart")[0]["lr"], 5e-5)
