"""The messages of the command `train`, extending a run, and the command `runs`."""

import json
import shutil

import pytest
from conftest import pairs
from test_cli import only_json, train

from minprefix.cli.train import read_settings
from minprefix.training.run_folder import read_log, read_state


@pytest.fixture
def run(cli, tiny_folder, tables, tmp_path):
    """The folder of a short, finished run, and what it said."""
    _, said = train(cli, tiny_folder, tables, tmp_path / "run")
    return tmp_path / "run", said


def test_a_run_says_what_it_does_and_what_it_kept(run):
    folder, said = run
    for words in (
        "training pairs", "tokens (the longest pair has", "to train: ", "run: 4 steps of 4 pairs",
        "peak learning rate 0.01",
        "% as many as in the model: an MLP that computes the prefix; only the prefix is kept, 640 ",
        "step 0 (before training): dev loss", "step 2: dev loss", "  source ",
        "  reference  ", "Kept: step", f"{folder / 'loss.png'}", "only for --resume",
        "next: python -m minprefix generate", "--num-beams 5",
        f"--prefix {folder / 'prefix.safetensors'}",
    ):  # fmt: skip
        assert words in said, words
    assert (folder / "loss.png").stat().st_size > 1000
    settings = json.loads((folder / "config.json").read_text())["train"]
    assert settings["eval_every"] == 2 and settings["precision"] in ("fp32", "bf16")


def test_a_finished_run_goes_on_to_more_steps(cli, run):
    folder, _ = run
    before = read_log(folder)
    out, said = cli("train", "--resume", folder, "--steps", 8, "--json")
    assert only_json(out)["steps"] == 8
    assert "continuing after step 4 until step 8: the learning rate starts at 0.0057" in said
    assert read_log(folder)[: len(before)] == before
    assert json.loads((folder / "config.json").read_text())["train"]["steps"] == 8
    out, _ = cli("train", "--resume", folder, "--json")  # its settings are the new ones
    assert only_json(out)["steps"] == 8
    _, said = cli("train", "--resume", folder, "--lr", 1, code=2)
    assert "a run keeps its settings, so --resume does not allow --lr" in said


def test_a_run_has_one_length(cli, tiny_folder, tables, run, tmp_path):
    lengths = ("--epochs", 3)  # in addition to --steps
    _, said = train(cli, tiny_folder, tables, tmp_path / "new", *lengths, code=2)
    assert "error: --steps and --epochs set the length of the run: give only one" in said
    assert not (tmp_path / "new").exists()
    _, said = cli("train", "--resume", run[0], "--steps", 8, *lengths, code=2)
    assert "--steps and --epochs" in said
    settings = json.loads((run[0] / "config.json").read_text())
    settings["train"] |= {"steps": None, "time": "600"}  # seconds, in a run of an older version
    (run[0] / "config.json").write_text(json.dumps(settings))
    assert read_settings(run[0])["train"]["time"] == "600s"


def test_a_run_that_ends_during_the_warm_up_says_so(cli, tiny_folder, tables, tmp_path):
    _, said = train(cli, tiny_folder, tables, tmp_path / "run", "--warmup-steps", 30)
    assert "warning: the run ended after 4 steps, before the learning rate reached its peak" in said


def test_without_dev_data_a_part_is_held_out(cli, tiny_folder, tmp_path):
    data = tmp_path / "mine.jsonl"
    rows = [{"source": e.source, "target": e.targets[0]} for e in pairs(20)]
    # ten different sources, two texts each
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, said = train(cli, tiny_folder, data, tmp_path / "run")
    assert "no dev data was given: 2 of the 10 examples are held out" in said
    assert "16 training pairs" in said and "4 dev pairs" in said
    assert "--data FILE\nReplace FILE with a file of pairs that were not used in training" in said
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    _, said = train(cli, tiny_folder, data, tmp_path / "few")
    assert "3 examples are too few to hold any out, so the last step is kept" in said


@pytest.mark.parametrize("how", ["slim", "no-keep-state", "by hand"])
def test_a_run_without_its_state_is_not_begun_again(cli, tiny_folder, tables, tmp_path, how):
    """It would overwrite the prefix with that of step 0."""
    folder = tmp_path / "run"
    train(
        cli, tiny_folder, tables, folder, *(["--no-keep-state"] if how == "no-keep-state" else [])
    )
    if how == "slim":
        cli("runs", "--slim", folder)
    elif how == "by hand":
        shutil.rmtree(folder / "state")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for more in ((), ("--steps", 8)):
        _, said = cli("train", "--resume", folder, *more, code=1)
        assert f"{folder} has no state" in said and "start a new run with --out" in said
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert only_json(cli("runs", folder, "--json")[0])["runs"][0]["steps done"] == 4


def test_a_preset_fills_in_what_is_not_given(cli, tiny_folder, tables, tmp_path):
    train(cli, tiny_folder, tables, tmp_path / "run", "--preset", "webnlg")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["prefix"]["prefix_len"] == 5 and settings["train"]["patience"] == 0
    assert settings["train"]["lr"] == 1e-2 and settings["train"]["steps"] == 4  # as given


def test_log_lines_go_to_tensorboard(cli, tiny_folder, tables, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(cli, tiny_folder, tables, tmp_path / "run", "--track")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    logged = [e["dev_loss"] for e in read_log(tmp_path / "run") if "dev_loss" in e]
    assert [e.value for e in events.Scalars("dev_loss")] == pytest.approx(logged, rel=1e-6)


def test_runs_are_compared_slimmed_and_deleted(cli, tiny_folder, tables, run, tmp_path):
    first, second = run[0], tmp_path / "second"
    train(cli, tiny_folder, tables, second, "--lr", 0.02, "--no-keep-state")
    assert not (second / "state").exists()
    out, _ = cli("runs", first, second, "--figure", tmp_path / "curves.png", "--json")
    rows = only_json(out)["runs"]
    assert [row["lr"] for row in rows] == ["0.01", "0.02"]
    assert [row["steps done"] for row in rows] == [4, 4]
    assert "seed" not in rows[0] and "clip" not in rows[0]  # the same in both
    best = min(e["dev_loss"] for e in read_log(first) if "dev_loss" in e)
    assert rows[0]["best dev loss"] == f"{best:.3f}"
    assert (tmp_path / "curves.png").stat().st_size > 1000

    assert not any("bleu" in name for name in rows[0])
    cli("evaluate", "--model", tiny_folder, "--data", tables, "--prefix", first, "--split", "dev",
        "--max-new-tokens", 4)  # fmt: skip
    rows = only_json(cli("runs", first, second, "--json")[0])["runs"]
    (name,) = [name for name in rows[0] if "dev bleu" in name]
    assert rows[0][name] >= 0 and rows[1][name] == "-"

    _, said = cli("runs", first, "--slim")
    assert "no longer resumed" in said and (first / "prefix.safetensors").exists()
    with pytest.raises(ValueError, match="no saved state"):
        read_state(first)
    cli("runs", first, "--delete")
    assert not first.exists()
    _, said = cli("runs", tables, code=1)
    assert "not a run folder (config.json or log.jsonl is missing)" in said
