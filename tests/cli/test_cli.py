"""The commands: their results, output on stdout and stderr, exit codes, Ctrl-C."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ASSETS, an_adapter, few_tables, files_up_to, signalled

from minprefix.cli import evaluate as evaluate_command
from minprefix.cli import generate as generate_command
from minprefix.data.batches import encode_prompt
from minprefix.generation.texts import generate, stream, stripped
from minprefix.methods.config import TEMPLATES
from minprefix.models.config import MODELS
from minprefix.models.weights import load
from minprefix.prefix.prefix import Prefix
from minprefix.tensors import load_tensors
from minprefix.training.run_folder import read_state, write_state

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("--batch-size", 4, "--steps", 4, "--eval-every", 2, "--log-every", 1, "--samples", 1,
         "--lr", 1e-2)  # fmt: skip
TABLE = "boat : Gull 20 | colour : green"


def train(cli, model, data, out, *options, code: int = 0) -> tuple[str, str]:
    common = ("--model", model, "--data", data, "--out", out, "--device", "cpu")
    small = () if "finetune" in options else ("--mid-dim", 8)
    return cli("train", *common, *QUICK, *small, *options, code=code)


@pytest.fixture
def run(cli, tiny_folder, tables, tmp_path) -> Path:
    """The folder of a short, finished run."""
    fixed = ("--init", "random", "--warmup-steps", 0, "--precision", "fp32")
    train(cli, tiny_folder, tables, tmp_path / "run", *fixed)
    return tmp_path / "run"


def only_json(out: str) -> dict:
    """stdout is one JSON object in one line and nothing else; no NaN or Infinity in it."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    assert out.count("\n") == 1 and out.endswith("\n")
    return json.loads(out, parse_constant=refuse)


def steps_in_log(folder: Path) -> list[int]:
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry["step"] for entry in entries if "loss" in entry]


# every command on the embedded model ----------------------------------------------------------


@pytest.mark.slow
def test_every_command_on_mini(cli, tmp_path):
    run, files = tmp_path / "run", ("prefix.safetensors", "config.json", "log.jsonl")
    start = ("--init", "words", "--prefix-len", 4, "--eval-pairs", 4)
    few = few_tables(ASSETS / "restaurants", tmp_path)
    out, _ = train(cli, "mini", few, run, *start, "--json")
    assert only_json(out)["steps"] == 4
    assert [name for name in files if not (run / name).is_file()] == []

    out, _ = cli("export", run, "--out", tmp_path / "p.safetensors", "--json")
    kept = 8 * 2 * 384 * 4  # L 2 C P
    assert only_json(out)["kept_parameters"] == kept
    rows = only_json(cli("info", "--prefix", tmp_path / "p.safetensors", "--json")[0])["parameters"]
    numbers = {row["part"]: row["parameters"] for row in rows}
    assert (numbers["model"], numbers["prefix table"]) == (MODELS["mini"], kept)

    few = ("--max-new-tokens", 8, "--device", "cpu")
    out, _ = cli("generate", TABLE, "--prefix", tmp_path / "p.safetensors", *few)
    assert out.endswith("\n")
    for method in (("--prefix", tmp_path / "p.safetensors"), ("--hard-prompt", "--shots", 1)):
        out, _ = cli("evaluate", *method, "--limit", 2, "--json", *few)
        scores = only_json(out)
        assert scores["tables"] == 2
        found = [scores[name] for name in ("bleu", "rouge_l", "slot_coverage")]
        assert min(found) >= 0 and max(found) <= 100


# train and export ------------------------------------------------------------------------------


def test_train_reports_on_stdout_and_shows_progress_on_stderr(cli, tiny_folder, tables, tmp_path):
    out, err = train(cli, tiny_folder, tables, tmp_path / "run", "--json")
    result = only_json(out)
    assert result["steps"] == 4 and 0 < result["best_dev_loss"] < 20
    assert result["kept"] == str(tmp_path / "run" / "prefix.safetensors")
    assert "4/4" in err and "{" not in err

    out, err = train(cli, tiny_folder, tables, tmp_path / "plain")
    lines = out.splitlines()
    names = ["steps", "best_dev_loss", "best_step", "seconds", "kept"]
    assert len(lines) == 3 and lines[0].split() == names
    assert steps_in_log(tmp_path / "plain") == [1, 2, 3, 4]


def test_settings_of_a_run_are_those_given(cli, tiny_folder, tables, tmp_path):
    options = ("--weight-decay", 0.5, "--gate", "--prefix-len", 3, "--parametrisation", "table")
    train(cli, tiny_folder, few_tables(tables, tmp_path), tmp_path / "run", *options)
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["train"]["weight_decay"] == 0.5 and settings["train"]["lr"] == 1e-2
    prefix = Prefix.load(tmp_path / "run" / "prefix.safetensors")
    assert prefix.prefix_len == 3 and prefix.gate is not None and prefix.position_offset == 0


def test_progress_in_a_log_file_is_a_few_lines(cli, tiny_folder, tables, tmp_path):
    _, err = train(cli, tiny_folder, tables, tmp_path / "run", "--steps", 60, "--eval-every", 60)
    assert steps_in_log(tmp_path / "run")[-1] == 60
    bars = [line for line in re.split(r"[\r\n]+", err) if "step/s" in line]
    assert 1 <= len(bars) <= 8  # at the start, after each of two evaluations, at the end


def test_without_dev_data_the_result_is_still_json(cli, tiny_folder, tables, tmp_path):
    few = few_tables(tables, tmp_path)
    out, _ = train(cli, tiny_folder, few, tmp_path / "run", "--json")
    assert only_json(out)["best_dev_loss"] is None
    Prefix.load(tmp_path / "run" / "prefix.safetensors")


def test_a_dev_file_beside_a_train_file(cli, tiny_folder, tables, tmp_path):
    dev = ("--dev", tables / "dev.jsonl")
    out, _ = train(cli, tiny_folder, tables / "train.jsonl", tmp_path / "run", "--json", *dev)
    assert only_json(out)["best_dev_loss"] > 0


@pytest.mark.slow
def test_finetuning_leaves_a_model_that_the_other_commands_take(cli, tiny_folder, tables, tmp_path):
    out, _ = train(cli, tiny_folder, tables, tmp_path / "run", "--method", "finetune", "--json")
    folder = tmp_path / "run" / "model"
    assert only_json(out)["kept"] == str(folder)
    before, after = load(tiny_folder)[0], load(folder)[0]
    assert not torch.equal(before.wte.weight, after.wte.weight)
    assert after.config.linearisation == "paper"  # its frame: no option has to say it again
    few = ("--data", tables, "--max-new-tokens", 4, "--json")
    result = only_json(cli("evaluate", "--model", folder, *few)[0])
    assert result["tables"] == 3
    assert only_json(cli("evaluate", "--model", tmp_path / "run", *few)[0]) == result
    train(cli, tmp_path / "run", tables, tmp_path / "next")
    assert json.loads((tmp_path / "next" / "config.json").read_text())["model"] == str(folder)


def test_resume_of_a_finished_run_changes_nothing(cli, run):
    files = {name: (run / name).read_bytes() for name in ("prefix.safetensors", "log.jsonl")}
    out, _ = cli("train", "--resume", run, "--json")
    assert only_json(out)["steps"] == 4
    assert {name: (run / name).read_bytes() for name in files} == files


@pytest.mark.parametrize("folder_is_left", [False, True])  # True: the disk was full at the save
def test_resume_of_a_run_without_a_saved_state_starts_it(cli, run, folder_is_left):
    for state in (run / "state").iterdir():
        state.unlink()
    if not folder_is_left:
        (run / "state").rmdir()
    (run / "log.jsonl").unlink()
    cli("train", "--resume", run)
    assert steps_in_log(run) == [1, 2, 3, 4]


def test_export_gives_the_latest_prefix_and_leaves_the_run_alone(cli, run, tables, tmp_path):
    with open(run / "log.jsonl", "a") as log:  # a step after the state, as during training
        log.write('{"step": 5, "loss": 1.0}\n')
    files = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    out, _ = cli("export", run, "--out", tmp_path / "p.safetensors", "--json")
    result = only_json(out)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == files
    assert Prefix.load(tmp_path / "p.safetensors").linearisation == "paper"
    table = load_tensors(tmp_path / "p.safetensors")[0]["prefix_table"]
    assert table.shape == (2, 2, 2, 10, 8)  # L 2 H P D
    state = read_state(run)
    assert result == {
        "file": str(tmp_path / "p.safetensors"),
        "step": 4,
        "trained_parameters": sum(t.numel() for t in state["trained"].values()),
        "kept_parameters": table.numel(),
        "bytes": (tmp_path / "p.safetensors").stat().st_size,
    }
    state["trained"]["mlp.linear_out.bias"] += 1
    torch.save(state, run / "state" / "state.pt")
    cli("export", run, "--out", tmp_path / "p.safetensors")
    moved = load_tensors(tmp_path / "p.safetensors")[0]["prefix_table"]
    assert (moved - table - 1).abs().max() < 1e-6  # rounding of sums of order 1 in fp32


# generate, evaluate, info, download ------------------------------------------------------------


def test_generate_streams_lists_and_reads_stdin(cli, tiny_folder, monkeypatch):
    few = ("--model", tiny_folder, "--max-new-tokens", 5, "--device", "cpu")
    prompts = ["a green boat", "one more"]
    model, tokenizer = load(tiny_folder)
    texts = generate(model, tokenizer, prompts, max_new_tokens=5)
    assert cli("generate", prompts[0], *few) == (texts[0] + "\n", "")
    assert cli("generate", *prompts, *few) == ("\n".join(texts) + "\n", "")
    for end in ("\n", "\r\n", "\n\n \n"):  # blank lines are no prompts
        data = end.join(prompts).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert only_json(cli("generate", "--json", *few)[0]) == {"texts": texts}


def test_generate_says_how_a_table_is_written(cli, tiny_folder):
    few = ("--model", tiny_folder, "--frame", "paper", "--max-new-tokens", "1")
    assert "with spaces" in cli("generate", "name:The Eagle|food:French", *few)[1]
    for other in (TABLE, "see https://x.org | it says: yes", "at 10:30"):
        assert cli("generate", other, *few)[1] == ""


def test_generate_from_nothing_several_texts_stop_strings_and_short_dtypes(cli, tiny_folder):
    few = ("--model", tiny_folder, "--max-new-tokens", 5, "--device", "cpu")
    model, tokenizer = load(tiny_folder)
    options = {"max_new_tokens": 5}
    (text,) = generate(model, tokenizer, [[tokenizer.bos_id]], **options)
    assert cli("generate", "", *few)[0] == text + "\n"
    sampled = generate(
        model, tokenizer, ["a boat"], do_sample=True, num_return_sequences=3, **options
    )
    argv = ("--do-sample", "--num-return-sequences", 3, "--json")
    assert only_json(cli("generate", "a boat", *few, *argv)[0]) == {"texts": sampled}
    assert len(set(sampled)) == 3
    stop = text[len(text) // 2 :][:2]
    out, _ = cli("generate", "", *few, "--stop", stop, "--stop", "never", "--json")
    assert only_json(out) == {"texts": [text.split(stop)[0]]}
    loud = ("--repetition-penalty", 1.5)
    (text,) = generate(model, tokenizer, ["a boat"], repetition_penalty=1.5, **options)
    assert cli("generate", "a boat", *few, *loud)[0] == text + "\n"
    for dtype in ("bfloat16", "float16"):
        short, _ = load(tiny_folder, dtype=getattr(torch, dtype))
        (text,) = generate(short, tokenizer, ["a boat"], **options)
        assert cli("generate", "a boat", *few, "--dtype", dtype)[0] == text + "\n"


def test_export_to_a_folder_has_a_model_card(cli, run, tmp_path):
    """Ready for the hub: the prefix file and README.md, with front matter that the hub reads."""
    from huggingface_hub import ModelCard

    out, _ = cli("export", run, "--out", tmp_path / "mine", "--json")
    file = tmp_path / "mine" / "prefix.safetensors"
    assert only_json(out)["file"] == str(file)
    prefix = Prefix.load(file)
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.tags == ["prefix-tuning", "minprefix"]
    assert card.data.library_name == "minprefix" and card.data.metrics
    assert prefix.base in card.text and "Prefix.load" in card.text
    loss = read_state(run)["measured"][-1][1]
    assert f"nats per token | {round(loss, 4)} |" in card.text
    (tmp_path / "mine" / "README.md").write_text("my own words")
    _, told = cli("export", run, "--out", tmp_path / "mine")
    assert "already has a README.md, which was not changed" in told
    assert (tmp_path / "mine" / "README.md").read_text() == "my own words"
    cli("convert", tmp_path / "mine", "--to", "minprefix", "--out", tmp_path / "b.safetensors")
    assert Prefix.load(tmp_path / "b.safetensors").base == prefix.base


def test_the_card_has_the_loss_of_the_exported_prefix_not_the_best_one(cli, run, tmp_path):
    write_state(run, read_state(run) | {"measured": [(2, 0.5), (4, 9.25)], "best": 0.5})
    cli("export", run, "--out", tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "nats per token | 9.25 |" in card and "0.5" not in card


def test_scores_are_kept_when_the_texts_cannot_be_written(cli, tiny_folder, tables, run, tmp_path):
    common = ("evaluate", "--model", tiny_folder, "--data", tables, "--prefix", run)
    with files_up_to(250):
        _, err = cli(*common, "--max-new-tokens", 4, "--outputs", tmp_path / "t.jsonl", code=1)
    assert "t.jsonl: cannot be written (File too large)" in err
    assert len((run / "scores.jsonl").read_text().splitlines()) == 1


def test_many_texts_have_a_progress_bar(cli, tiny_folder, tables, monkeypatch):
    bar = generate_command.tqdm
    monkeypatch.setattr(generate_command, "tqdm", lambda **how: bar(**(how | {"delay": 0})))
    how = ("--model", tiny_folder, "--max-new-tokens", 2)
    assert "3/3" in cli("generate", *how, "--data", tables)[1]


def test_a_short_dtype_takes_prefixes_and_adapters(cli, tiny_folder, run, tmp_path):
    """What was trained for the model in fp32 goes with its copies."""

    an_adapter(load(tiny_folder)[0]).save(tmp_path / "a.safetensors")
    few = ("--model", tiny_folder, "--max-new-tokens", 3, "--device", "cpu")
    for dtype in ("bfloat16", "float16"):
        for trained in (
            ("--prefix", run / "prefix.safetensors"),
            ("--adapter", tmp_path / "a.safetensors"),
        ):
            cli("generate", "a boat", *few, "--dtype", dtype, *trained)


@pytest.mark.parametrize("frame", ["paper", "original-code", None])
def test_python_and_the_commands_give_the_same_texts(cli, tiny_folder, tables, tmp_path, frame):
    """A framed text, and only that, has lost the blank that the frame puts before it."""
    model, tokenizer = load(tiny_folder)
    prefix, path = Prefix.random(model.config, 3, 0), tmp_path / "p.safetensors"
    prefix.linearisation = frame or ""
    prefix.bind(model)
    prefix.save(path)
    prompts = ["boat : Gull 11 | colour : green", "boat : Gull 12 | colour : green"]
    how = {"prefix": prefix, "max_new_tokens": 12, "do_sample": True, "seed": 5}
    texts = generate(model, tokenizer, prompts, **how)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    if frame:
        ids = [encode_prompt(tokenizer, prompt, frame) for prompt in prompts]
    whole = generate(model, tokenizer, ids, **how)  # of token ids: nothing is taken away
    assert texts == ([text.strip() for text in whole] if frame else whole)
    assert "".join(stream(model, tokenizer, prompts[0], **how)) == texts[0]
    argv = ("--model", tiny_folder, "--prefix", path, "--device", "cpu", "--max-new-tokens", 12)
    argv += ("--do-sample", "--seed", 5)
    assert cli("generate", prompts[0], *argv)[0] == texts[0] + "\n"  # streamed
    assert cli("generate", *prompts, *argv)[0] == "\n".join(texts) + "\n"
    assert only_json(cli("generate", *prompts, *argv, "--json")[0])["texts"] == texts
    if frame:
        rows = tmp_path / "rows.jsonl"
        cli("evaluate", *argv, "--data", tables, "--limit", 2, "--outputs", rows)
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        again = generate(model, tokenizer, [row["source"] for row in found], **how)
        assert [row["text"] for row in found] == again


def test_pieces_of_a_stripped_text_are_the_stripped_text():
    for pieces in (["", " ", "a", " ", "\n", "b c", "  ", ""], [" ", "\n"], [], ["a b "], [" a"]):
        assert "".join(stripped(pieces)) == "".join(pieces).strip()


def test_with_a_prefix_a_prompt_is_framed_as_in_training(cli, tiny_folder, run):
    """Training shows source, bos, text: without the bos the model would go on with the table."""
    few = ("--model", tiny_folder, "--max-new-tokens", 6, "--device", "cpu")
    prefix = ("--prefix", run / "prefix.safetensors")
    model, tokenizer = load(tiny_folder)
    loaded = Prefix.load(prefix[1])
    framed = {
        "paper": tokenizer.encode(TABLE) + [tokenizer.bos_id],
        "original-code": tokenizer.encode(f" {TABLE} ") + [tokenizer.bos_id],
        "none": tokenizer.encode(TABLE),
    }
    texts = {}
    for frame, prompt in framed.items():
        (text,) = generate(model, tokenizer, [prompt], prefix=loaded, max_new_tokens=6)
        texts[frame] = text if frame == "none" else text.strip()
        out, _ = cli("generate", TABLE, *prefix, "--frame", frame, "--json", *few)
        assert only_json(out) == {"texts": [texts[frame]]}
    assert len(set(texts.values())) == 3
    assert cli("generate", TABLE, *prefix, *few)[0].rstrip() == texts["paper"]
    with_code = Prefix.load(prefix[1])
    with_code.linearisation = "original-code"
    with_code.save(prefix[1])
    assert cli("generate", TABLE, *prefix, *few)[0].rstrip() == texts["original-code"]
    unframed = generate(model, tokenizer, [TABLE], max_new_tokens=6)
    assert cli("generate", TABLE, *few)[0] == unframed[0] + "\n"


def test_evaluate_writes_the_texts_that_it_scores(cli, tiny_folder, tables, run, tmp_path):
    few = ("--model", tiny_folder, "--data", tables, "--max-new-tokens", 5, "--device", "cpu")
    method = ("--prefix", run / "prefix.safetensors")
    outputs = tmp_path / "texts.jsonl"
    out, _ = cli("evaluate", *method, *few, "--outputs", outputs, "--limit", 2, "--json")
    scores = only_json(out)
    assert set(scores) == {"tables", "bleu", "rouge_l", "slot_coverage"} and scores["tables"] == 2
    rows = [json.loads(line) for line in outputs.read_text().splitlines()]
    assert [row["source"] for row in rows] == [
        "boat : Gull 11 | colour : green",
        "boat : Gull 12 | colour : green",
    ]
    assert rows[0]["references"] == ["Gull 11 is a green boat."]
    assert rows[0]["missing"] == [["boat", "Gull 11"], ["colour", "green"]]  # of a random model
    assert rows[0]["wrong"] == []
    prompt = (row["source"] for row in rows)
    out, _ = cli("generate", *prompt, *method, *few[:2], *few[4:], "--json")
    assert [row["text"] for row in rows] == only_json(out)["texts"]
    table = cli("evaluate", *method, *few, "--split", "dev")[0].splitlines()
    assert table[0].split() == ["tables", "bleu", "rouge_l", "slot", "values", "%"]
    assert table[2].split()[0] == "3"


def test_scores_of_the_training_data_are_named_as_such(cli, tiny_folder, tables, run, monkeypatch):
    common = ("evaluate", "--model", tiny_folder, "--prefix", run, "--max-new-tokens", 2)
    common += ("--device", "cpu", "--data", tables)
    note = f"was trained on these texts of {tables}"
    assert note not in cli(*common)[1]
    assert note in cli(*common, "--split", "train")[1]
    monkeypatch.chdir(tables.parent)
    assert "was trained on these texts" in cli(*common[:-1], tables.name, "--split", "train")[1]
    file = json.loads((run / "config.json").read_text()) | {"data": str(tables / "train.jsonl")}
    (run / "config.json").write_text(json.dumps(file))
    assert (
        "was trained on" in cli(*common[:-1], tables / "train.jsonl")[1]
    )  # called test by default
    assert "was trained on" not in cli(*common[:-1], tables / "test.jsonl")[1]
    splits = [json.loads(line)["split"] for line in (run / "scores.jsonl").read_text().splitlines()]
    assert splits == ["test", "train", "train", "train", "test"]


def test_a_table_as_json_is_a_prompt(cli, tiny_folder, run):
    """It reads as in training; without a frame it is a text like any other."""
    few = ("--model", tiny_folder, "--max-new-tokens", 6, "--device", "cpu", "--json")
    table = json.dumps({"boat": "Gull 20", "colour": ["green"]})
    prefix = ("--prefix", run)
    assert cli("generate", table, *few, *prefix) == cli("generate", TABLE, *few, *prefix)
    assert cli("generate", table, *few)[0] != cli("generate", TABLE, *few)[0]
    broken = "{boat : Gull 20}"
    assert only_json(cli("generate", broken, *few, *prefix)[0])["texts"]


def test_evaluate_asks_in_words_with_and_without_examples(cli, tiny_folder, tables, monkeypatch):
    seen = []

    def look(model, tokenizer, examples, **options):
        seen.append(options["prompt"])
        return {"bleu": 0.0}, []

    monkeypatch.setattr(evaluate_command, "evaluate_method", look)
    few = ("evaluate", "--model", tiny_folder, "--data", tables)
    cli(*few, "--linearisation", "paper")
    cli(*few, "--hard-prompt")
    cli(*few, "--hard-prompt", "{table} in short:", "--shots", 2)
    assert seen[0] is None
    assert seen[1].template == TEMPLATES[0] and seen[1].shown == ()
    assert seen[2].template == "{table} in short:" and len(seen[2].shown) == 2
    trained = {
        (f"boat : Gull {n} | colour : green", f"Gull {n} is a green boat.") for n in range(8)
    }
    assert set(seen[2].shown) <= trained


def test_info_prints_the_parameter_table(cli, tiny_folder, run):
    options = ("--model", tiny_folder, "--prefix", run / "prefix.safetensors")
    out, err = cli("info", *options)
    assert err == "" and out.splitlines()[0].split() == ["part", "shape", "parameters", "percent"]
    rows = only_json(cli("info", *options, "--json")[0])["parameters"]
    total = sum(p.numel() for p in load(tiny_folder)[0].parameters())
    numbers = {row["part"]: row["parameters"] for row in rows}
    assert numbers["model"] == total and numbers["prefix table"] == 2 * 2 * 16 * 10  # L 2 C P
    assert f"{total:,}" in out


def test_download_prints_the_folder(cli, tiny_folder, monkeypatch):
    monkeypatch.setattr("minprefix.models.weights.fetch", lambda name: tiny_folder)
    result = only_json(cli("download", "someone/tiny", "--json")[0])
    assert result == {"name": "someone/tiny", "folder": str(tiny_folder)}


# processes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_ends_with_the_exit_code(tmp_path):
    command = [sys.executable, "-m", "minprefix", "info", "--model", tmp_path / "none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"minprefix: error: {tmp_path / 'none'}: no such folder\n"


def in_a_process(argv, **streams) -> subprocess.CompletedProcess:
    argv = [sys.executable, "-m", "minprefix", *map(str, argv)]
    return subprocess.run(argv, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=100, **streams)


@pytest.mark.parametrize(
    "argv, closed",
    [
        (("--help",), "stdout"),
        (("train", "--help"), "stdout"),
        (("train", "--help"), "both"),
        (("nope",), "stderr"),
        (("train", "--learning-rate", 1), "both"),
        pytest.param(
            ("generate", "a boat", "--model", "TINY", "--max-new-tokens", 5), "stdout",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_a_closed_pipe_is_no_error(argv, closed, tiny_folder):
    """As with `| head -1` and `2>&1 | head -1`; test_streams.py has one of a training."""
    end, start = os.pipe()
    os.close(end)
    streams = {name: start if closed in (name, "both") else subprocess.PIPE
               for name in ("stdout", "stderr")}  # fmt: skip
    done = in_a_process([tiny_folder if word == "TINY" else word for word in argv], **streams)
    os.close(start)
    usage = "nope" in argv or "--learning-rate" in argv  # an error, whoever reads of it
    assert done.returncode == 2 * usage and not done.stdout and not done.stderr


def test_ctrl_c_outside_of_training(cli, tiny_folder, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_command, "generate", interrupted)
    out, err = cli("generate", "a", "b", "--model", tiny_folder, code=130)
    assert (out, err) == ("", "minprefix: interrupted\n")


def test_a_second_ctrl_c_stops_at_once_and_the_run_can_go_on(cli, tiny_folder, tables, tmp_path):
    with signalled(after=3, times=2):
        _, err = train(cli, tiny_folder, tables, tmp_path / "run", code=130)
    assert "stopped at once; the last saved step is 2. Continue with: " in err
    assert f"train --resume {tmp_path / 'run'}\n" in err
    assert read_state(tmp_path / "run")["step"] == 2
    cli("train", "--resume", tmp_path / "run")
    assert steps_in_log(tmp_path / "run") == [1, 2, 3, 4]


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_leaves_a_run_that_can_be_used_and_resumed(
    cli, tiny_folder, tables, tmp_path, name, code
):
    if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        pytest.skip(f"{name} is ignored here, as below nohup")
    out, before = tmp_path / "my run", signal.getsignal(getattr(signal, name))
    with signalled(after=2, number=getattr(signal, name)):
        stdout, stderr = train(cli, tiny_folder, tables, out, code=code)
    assert signal.getsignal(getattr(signal, name)) is before
    assert stdout == "" and "Traceback" not in stderr
    assert stderr.splitlines()[-1] == (
        "minprefix: stopped after step 3 of 4; state saved. "
        f"Continue with: python -m minprefix train --resume '{out}'"
    )
    assert read_state(out)["step"] == 3
    prefix = ("--prefix", out / "prefix.safetensors", "--max-new-tokens", 3)
    cli("generate", TABLE, "--model", tiny_folder, *prefix)
    assert only_json(cli("train", "--resume", out, "--json")[0])["steps"] == 4
    assert steps_in_log(out) == [1, 2, 3, 4]


def test_a_prompt_that_is_almost_json_is_noted(cli, tiny_folder):
    options = ("--model", tiny_folder, "--frame", "paper", "--max-new-tokens", 2)
    assert cli("generate", '{"name": "Gull"}', *options)[1] == ""
    _, err = cli("generate", '{"name": "Gull}', *options)
    assert "is not valid JSON; it is read as text" in err
    assert "is not valid JSON" not in cli("generate", "{1} boat", *options)[1]
