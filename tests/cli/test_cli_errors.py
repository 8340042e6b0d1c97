"""Bad input to the commands: one clear line on stderr, an exit code, earlier files intact."""

import io
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import files_up_to, signalled, tiny_with_words

from minprefix.cli.options import KEPT, kept_file
from minprefix.methods.by_name import TUNED
from minprefix.prefix.prefix import Prefix
from minprefix.training.run_folder import append_log, earlier_path, write_state

QUICK = ("--batch-size", 4, "--steps", 4, "--eval-every", 2, "--log-every", 1, "--samples", 0,
         "--mid-dim", 8, "--device", "cpu")  # fmt: skip
PAIR = {"source": "a boat", "target": "It is a boat."}
TEXT_FILE = b"A file that was here before.\n"


@pytest.fixture
def refused(cli):
    """Run a command that must fail: gives the one line on stderr."""

    def run(*argv, code: int = 1) -> str:
        out, err = cli(*argv, code=code)
        assert out == "" and err.count("\n") == 1, f"stdout {out!r}, stderr {err!r}"
        assert "Traceback" not in err
        return err.rstrip("\n")

    return run


@pytest.fixture
def run(cli, tiny_folder, tables, tmp_path) -> Path:
    """The folder of a short, finished run."""
    argv = ("--model", tiny_folder, "--data", tables, "--out", tmp_path / "run", *QUICK)
    cli("train", *argv)
    return tmp_path / "run"


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def jsonl(path: Path, *rows: dict | bytes) -> Path:
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


# models ----------------------------------------------------------------------------------------


def test_missing_models_are_named(refused, checkpoint):
    folder = checkpoint / "none"
    assert f"{folder}: no such folder" in refused("info", "--model", folder)
    assert "'no name!'" in refused("download", "no name!")
    (checkpoint / "vocab.json").unlink()
    assert "vocab.json" in refused("generate", "a boat", "--model", checkpoint)


@pytest.mark.parametrize(
    "command", [("generate", "a"), ("info",), ("evaluate",), ("train", "--out")]
)
def test_unknown_devices_are_named(refused, tiny_folder, tables, tmp_path, command):
    argv = [*command, tmp_path / "run"] if command[0] == "train" else list(command)
    argv += ["--data", tables] if command[0] in ("train", "evaluate") else []
    assert "device nope cannot be used" in refused(
        *argv, "--model", tiny_folder, "--device", "nope"
    )


# prefixes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", KEPT)
@pytest.mark.parametrize("kept", KEPT)
def test_a_run_folder_gives_what_it_kept(tmp_path, option, kept):
    (tmp_path / KEPT[kept]).mkdir()  # a file or a folder
    if option == kept:
        assert kept_file(option, tmp_path) == tmp_path / KEPT[kept]
    else:
        message = f"--{option} {tmp_path}: the folder has no {KEPT[option]}, but {KEPT[kept]}: "
        with pytest.raises(ValueError, match=re.escape(message + f"give --{kept} {tmp_path}")):
            kept_file(option, tmp_path)


def test_what_a_run_folder_keeps_is_what_the_methods_name():
    assert {kind.kept for kind in TUNED.values()} == {*KEPT.values()} - {"prompt.json"}


def test_a_folder_without_anything_trained_is_named(refused, tiny_folder, tmp_path):
    message = refused("generate", "a boat", "--prefix", tmp_path, code=2)
    assert f"--prefix {tmp_path}: the folder has no prefix.safetensors" in message
    assert "no adapter.safetensors" in refused("info", "--adapter", tmp_path, code=2)
    assert f"{tmp_path / 'config.json'}: missing" in refused("info", "--model", tmp_path)
    (tmp_path / "adapter_config.json").touch()
    assert f"convert {tmp_path} --to minprefix" in refused("evaluate", "--prefix", tmp_path, code=2)
    assert kept_file("model", str(tiny_folder)) == str(tiny_folder)
    assert kept_file("model", "gpt2") == "gpt2"


def test_a_prefix_for_another_model_names_the_model_of_its_run(refused, tiny_folder, run):
    message = refused("generate", "a boat", "--prefix", run)  # with mini
    assert "another model" in message and f"its run was of --model {tiny_folder}" in message


@pytest.mark.parametrize("changes", [{"seed": 1}, {"n_layer": 3}, {"n_embd": 32}])
def test_a_prefix_for_another_model_is_refused(refused, tiny_folder, tables, tmp_path, changes):
    other, path = tiny_with_words(**changes), tmp_path / "p.safetensors"
    prefix = Prefix.random(other.config, 3, 0)
    prefix.bind(other)
    prefix.save(path)
    options = ("--model", tiny_folder, "--prefix", path, "--device", "cpu")
    for command in (("generate", "a boat"), ("evaluate", "--data", tables), ("info",)):
        assert "another model: its base is" in refused(*command, *options)


def test_a_prefix_that_names_no_model_must_have_the_shape(refused, tiny_folder, tmp_path):
    path = tmp_path / "p.safetensors"
    Prefix.random(tiny_with_words(n_layer=3).config, 3, 0).save(path)
    options = ("--model", tiny_folder, "--prefix", path, "--max-new-tokens", 3)
    assert "shape (3, 2, 2, 3, 8), the model needs" in refused("generate", "a boat", *options)


# data ------------------------------------------------------------------------------------------


def test_bad_data_is_named_by_file_and_line(refused, tiny_folder, tables, tmp_path):
    """Wherever it is given; tests/data/test_data.py has all that a file can lack."""
    expected = "d.jsonl:2: JSON, column 17"
    path, out = jsonl(tmp_path / "d.jsonl", PAIR, b'{"source": "a", '), tmp_path / "run"
    common = ("--model", tiny_folder, "--data")
    assert expected in refused("evaluate", *common, path)
    assert expected in refused("train", *common, path, "--out", out, *QUICK)
    good = tables / "train.jsonl"
    assert expected in refused("train", *common, good, "--dev", path, "--out", out, *QUICK)
    assert snapshot(out) == {}


def test_a_pair_too_long_for_the_model_is_named(refused, tiny_folder, tmp_path):
    long = {"source": "two", "target": "boat " * 100}
    path = jsonl(tmp_path / "d.jsonl", PAIR, long)
    message = refused("train", "--model", tiny_folder, "--data", path, "--out", tmp_path / "run")
    tokens = re.search(r"d\.jsonl:2: (\d+) tokens ", message)
    assert (
        int(tokens[1]) > 100 and "at most 87 are allowed" in message
    )  # 96 positions, 10 of offset, eos


def test_missing_data_is_named(refused, tiny_folder, tables, tmp_path):
    common = ("evaluate", "--model", tiny_folder, "--data")
    assert f"no such file or folder: {tmp_path / 'none'}" in refused(*common, tmp_path / "none")
    (tmp_path / "folder").mkdir()
    message = refused(*common, tmp_path / "folder")
    assert str(tmp_path / "folder") in message and "test.jsonl" in message
    out = ("--out", tmp_path / "run")
    dev = ("--dev", tables / "dev.jsonl")
    assert "--dev" in refused("train", "--model", tiny_folder, "--data", tables, *dev, *out)


# options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        (("--prefix-len", 0), "prefix_len must be at least 1, got 0"),
        (("--prefix-len", -3), "prefix_len must be at least 1, got -3"),
        (("--mid-dim", 0), "mid_dim must be at least 1, got 0"),
        (("--parametrisation", "x"), "parametrisation must be one of table, mlp, "),
        (("--place", "x"), "place must be one of prefix, infix, got 'x'"),
        (
            ("--place", "infix", "--parametrisation", "embedding"),
            "parametrisation 'embedding' needs place 'prefix'",
        ),
        (("--place", "infix", "--init", "prompt"), "init 'prompt' needs place 'prefix'"),
        (("--prefix-dropout", 1), "prefix_dropout must lie in [0, 1), got 1.0"),
        (
            ("--prefix-dropout", 0.1, "--method", "finetune"),
            "prefix_dropout needs method 'prefix', got 'finetune'",
        ),
        (("--init", "x"), "init must be one of random, words, prompt, got 'x'"),
        (("--method", "x"), "method must be one of prefix, finetune, ft-top, adapter, got 'x'"),
        (("--precision", "x"), "precision must be one of auto, fp32, bf16, got 'x'"),
        (("--loss", "x"), "loss must be one of token, sentence, got 'x'"),
        (("--lr", 0), "lr must be positive and finite, got 0.0"),
        (("--lr", "nan"), "lr must be positive and finite, got nan"),
        (("--lr", "inf"), "lr must be positive and finite, got inf"),
        (("--lr", -1e-3), "lr must be positive and finite, got -0.001"),
        (("--weight-decay", "nan"), "weight_decay must be >= 0 and finite, got nan"),
        (("--epochs", "nan"), "epochs must be positive and finite, got nan"),
        (("--steps", 0), "steps must be at least 1, got 0"),
        (("--steps", -1), "steps must be at least 1, got -1"),
        (("--steps", 10**18), "steps must be at most 2**53, got 1000"),
        (("--seed", 2**60), "seed must be at most 2**53, got 1152"),  # it could not be resumed
        (("--batch-size", 0), "batch_size must be at least 1, got 0"),
        (("--warmup-steps", -1), "warmup_steps must be >= 0 and finite, got -1"),
        (("--clip", -1), "clip must be positive and finite, got -1.0"),
    ],
)
def test_impossible_training_options_are_named(
    refused, tiny_folder, tables, tmp_path, options, expected
):
    out = tmp_path / "run"
    common = ("--model", tiny_folder, "--data", tables, "--out", out, "--device", "cpu")
    assert expected in refused("train", *common, *options, code=2)
    assert snapshot(tmp_path) == {}


def test_training_options_that_do_not_fit_the_model_are_named(
    refused, tiny_folder, tables, tmp_path
):
    common = ("--model", tiny_folder, "--data", tables, "--out", tmp_path / "run")
    message = refused("train", *common, "--prefix-len", 96)
    assert "position_offset 96 (prefix length 96)" in message
    message = refused("train", *common, "--init", "words", "--init-text", "")
    assert "the text has no words" in message
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    "argv, expected",
    [
        (("train", "--linearisation", "x"), "invalid choice: 'x' (choose from"),
        (("train", "--steps", "few"), "--steps: invalid literal for int() with base 10: 'few'"),
        (("train", "--stepz", 3), "unrecognized arguments: --stepz; did you mean --steps?"),
        (("export", "run"), "required: --out"),
        (("evaluate", "--split", "x"), "--split: invalid choice: 'x'"),
        (("paint",), "invalid choice: 'paint'"),
        (("demoo",), "did you mean demo?"),
        (("generate", "--max-tokens", 5, "a"), "unrecognized arguments: --max-tokens; did you"),
        ((), "required: COMMAND"),
        (("generate", "a", "--num-beams", 0), "num_beams must be at least 1, got 0"),
        (("generate", "a", "--data", "notes"), "--data provides the prompts"),
        (("generate", "a", "--prefix", "p", "--adapter", "a"), "are different methods"),
        (("score", "texts.txt"), "give the references of texts.txt"),
    ],
)
def test_wrong_usage_is_exit_code_2(refused, argv, expected):
    assert expected in refused(*argv, code=2)


def test_a_prompt_too_long_beside_the_prefix(refused, tiny_folder, run):
    options = ("--prefix", run / "prefix.safetensors", "--max-new-tokens", 84)
    for prompts in (["a boat"], ["a boat", "two"]):  # streamed, and as a batch
        message = refused("generate", *prompts, "--model", tiny_folder, *options)
        assert "3 prompt tokens + position offset 10 + max_new_tokens 84 > 96" in message


@pytest.mark.parametrize(
    "data, expected",
    [
        (b"", "no prompt"),
        (b"\n \n", "no prompt"),
        (b"a boat\nb\xff\n", "standard input:2: invalid UTF-8"),
    ],
)
def test_bad_standard_input_is_named(refused, tiny_folder, monkeypatch, data, expected):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert expected in refused("generate", "--model", tiny_folder)


def test_impossible_evaluations_are_named(refused, tiny_folder, tables, run, tmp_path):
    common = ("evaluate", "--model", tiny_folder, "--data", tables, "--device", "cpu")
    prefix = ("--prefix", run / "prefix.safetensors")
    assert "{table}, got 'Describe:'" in refused(*common, "--hard-prompt", "Describe:")
    assert "{table}, got ''" in refused(*common, "--hard-prompt", "")
    assert "[0, 8], the training tables, got 9" in refused(*common, "--hard-prompt", "--shots", 9)
    assert "got -1" in refused(*common, "--hard-prompt", "--shots", -1)
    assert "--shots needs --hard-prompt" in refused(*common, "--shots", 1, code=2)
    tokens = tmp_path / "prompt.json"
    tokens.write_text('{"before": [1], "behind": [2], "linearisation": "paper"}')
    for prompt, cut in itertools.product((("--hard-prompt",), ("--prompt", tokens)), (0, 5)):
        message = refused(*common, *prompt, "--max-source", cut, "--max-new-tokens", 2)
        assert f"max_source {cut} has no effect on a prompt" in message
    other = ("--linearisation", "original-code")
    assert "trained with --linearisation paper, not" in refused(*common, *prefix, *other)
    assert "choose one" in refused(*common, *prefix, "--hard-prompt", code=2)
    assert "--limit must be at least 1, got 0" in refused(*common, "--limit", 0, code=2)
    assert "batch_size must be at least 1, got 0" in refused(*common, *prefix, "--batch-size", 0)
    assert "was not trained on tables" in refused(*common)
    outputs = tmp_path / "none" / "texts.jsonl"
    assert str(outputs) in refused(*common, "--outputs", outputs)


def test_examples_in_context_never_come_from_the_file_that_is_scored(refused, tiny_folder, tables):
    path = tables / "test.jsonl"
    argv = ("evaluate", "--model", tiny_folder, "--data", path, "--hard-prompt", "--shots", 1)
    assert f"{path} is one file" in refused(*argv, code=2)


# run folders -----------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_not_overwritten(refused, tiny_folder, tables, run):
    before = snapshot(run)
    argv = ("train", "--model", tiny_folder, "--data", tables, "--out", run)
    assert f"{run} already holds a run: continue it with --resume {run}" in refused(*argv)
    shutil.rmtree(run / "state")  # killed before its first saved state
    assert f"{run} already holds a run" in refused(*argv)
    assert {path: before[path] for path in snapshot(run)} == snapshot(run)


def test_what_to_resume_must_be_clear(refused, tiny_folder, run, tmp_path):
    assert "either --out" in refused("train", "--model", tiny_folder, code=2)
    both = ("--resume", run, "--out", tmp_path / "new")
    assert "either --out" in refused("train", *both, code=2)
    for option, value in (("--lr", 9), ("--data", "x")):
        message = refused("train", "--resume", run, option, value, code=2)
        assert f"--resume does not allow {option}" in message
    for folder in (tmp_path, tmp_path / "none"):
        assert f"{folder}: not a run" in refused("train", "--resume", folder)
        assert f"{folder}: not a run" in refused("export", folder, "--out", tmp_path / "p")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    "damage, expected",
    [
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: "[]", "holds a JSON list"),
        (lambda text: "{}", "damaged, not the settings of a run ('train')"),
        (lambda text: text.replace('"lr"', '"rate"'), "damaged, not the settings of a run"),
        (lambda text: text.replace('"steps": 4', '"steps": "four"'), "damaged, not the settings"),
        (lambda text: text.replace('"data"', '"date"'), "damaged, not the settings of a run"),
    ],
)
def test_damaged_settings_are_named(refused, run, tmp_path, damage, expected):
    path = run / "config.json"
    path.write_text(damage(path.read_text()))
    before = snapshot(run)
    for command in (("train", "--resume", run), ("export", run, "--out", tmp_path / "p")):
        message = refused(*command)
        assert str(path) in message and expected in message
    assert snapshot(run) == before


def test_damaged_states_are_named(refused, run, tmp_path):
    path = run / "state" / "state.pt"
    whole = path.read_bytes()
    state = torch.load(path)
    contents = [whole[: len(whole) // 2], whole[:10], b"", b"no state at all"]
    for other in ({"step": 3}, [1], state | {"trained": {}}):
        write_state(run, other)
        contents.append(path.read_bytes())
    earlier_path(run).unlink()  # which would be used instead
    for content in contents:
        path.write_bytes(content)
        before = snapshot(run)
        for command in (("train", "--resume", run), ("export", run, "--out", tmp_path / "p")):
            assert str(run) in refused(*command)
        assert snapshot(run) == before and not (tmp_path / "p").exists()


def test_export_does_not_replace_the_best_prefix_of_the_run(refused, run):
    before = snapshot(run)
    for out in (run, run / "prefix.safetensors", run / "state" / ".." / "prefix.safetensors"):
        message = refused("export", run, "--out", out)
        assert f"the run keeps its best prefix in {run / 'prefix.safetensors'}" in message
    assert snapshot(run) == before  # and no README.md


def test_a_run_of_the_other_command_is_named(refused, run, tmp_path):
    searched = tmp_path / "searched"
    searched.mkdir()
    (searched / "config.json").write_text('{"search": {}}')
    for command in (("export", searched, "--out", tmp_path / "p"), ("train", "--resume", searched)):
        assert "a run of the command search, not of train" in refused(*command)
    assert "it is a run of the command train" in refused("search", "--resume", run)


# disks -----------------------------------------------------------------------------------------


def test_unwritable_places_are_named(refused, tiny_folder, tables, run, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(TEXT_FILE)
    common = ("--model", tiny_folder, "--data", tables)
    assert str(file / "run") in refused("train", *common, "--out", file / "run")
    assert str(file) in refused("train", *common, "--out", file)
    assert str(file / "p") in refused("export", run, "--out", file / "p")
    assert str(file / "t") in refused("evaluate", *common, "--outputs", file / "t")
    assert file.read_bytes() == TEXT_FILE


def on_a_full_disk(cli, limit: int, *argv) -> str:
    """Run a command that can write `limit` bytes to a file; its last line on stderr."""
    with files_up_to(limit):
        out, err = cli(*argv, code=1)
    assert out == "" and "Traceback" not in err and err.count("minprefix: error") == 1
    return err.splitlines()[-1]


@pytest.fixture
def begun(cli, tiny_folder, tables, tmp_path) -> Path:
    """A run that Ctrl-C stopped after step 3 of 4."""
    argv = ("--model", tiny_folder, "--data", tables, "--out", tmp_path / "run", *QUICK)
    with signalled(after=2):
        cli("train", *argv, "--lr", 1e-2, code=130)
    return tmp_path / "run"


@pytest.mark.parametrize("fails", ["prefix.safetensors", "state.pt"])
def test_full_disk_in_training_leaves_the_earlier_files(cli, begun, fails):
    prefix, state = begun / "prefix.safetensors", begun / "state" / "state.pt"
    small, large = prefix.stat().st_size, state.stat().st_size
    before = snapshot(begun)
    assert small > 2000 and large > small + 400
    limit = (
        small - 500 if fails == "prefix.safetensors" else large - 200
    )  # a later state may be a little smaller
    message = on_a_full_disk(cli, limit, "train", "--resume", begun)
    assert message.startswith("minprefix: error: ") and fails in message
    assert "File too large" in message
    assert state.read_bytes() == before[state]
    if fails == "prefix.safetensors":
        assert prefix.read_bytes() == before[prefix]
    assert set(snapshot(begun)) == set(before)  # no temporary file stays
    Prefix.load(prefix)
    cli("train", "--resume", begun)  # with room on the disk it continues


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(bytes(2000))
    with (
        files_up_to(1000),
        pytest.raises(OSError, match=r"log.jsonl: cannot be written \(File too"),
    ):
        append_log(tmp_path, {"step": 1})


def test_outputs_that_are_a_folder_are_refused_before_any_work(refused, tables, tmp_path):
    argv = ("evaluate", "--model", tmp_path / "none", "--data", tables, "--outputs", tmp_path)
    assert f"--outputs {tmp_path}: a folder; give a file" in refused(*argv)


# the traceback ---------------------------------------------------------------------------------


def test_debug_shows_the_traceback(cli, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        cli("info", "--model", tmp_path / "none", "--debug")


def test_unforeseen_errors_are_one_line_with_their_kind(refused, tiny_folder, monkeypatch):
    def fail(*args):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("minprefix.cli.info.parameter_rows", fail)
    assert refused("info", "--model", tiny_folder).endswith("RuntimeError: two lines")
