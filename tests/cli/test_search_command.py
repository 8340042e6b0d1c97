"""The command `search`: its output and files, its errors, Ctrl-C."""

import json
import re
import signal

from minprefix.cli import search as search_command
from minprefix.cli.search import print_verdict
from minprefix.methods.search.search import PromptSearch
from minprefix.training.run_folder import read_state

QUICK = ("--prompt-len", 3, "--steps", 2, "--candidates", 6, "--batch-size", 4, "--starts", 4,
         "--device", "cpu")  # fmt: skip


def test_the_command_searches_and_others_use_what_it_found(cli, tiny_folder, tables, tmp_path):
    common = ("--model", tiny_folder, "--data", tables)
    front, around = tmp_path / "front", tmp_path / "around"
    out, err = cli("search", *common, "--out", front, *QUICK)
    assert 'text: "' in out and "dev_loss_without_prompt" in out and "2/2" in err
    out, _ = cli("search", *common, "--out", around, *QUICK, "--after", 2, "--json")
    found = json.loads(out)
    assert found["kept"] == str(around / "prompt.json") and "{table}" in found["text"]
    again, _ = cli("search", "--resume", around, "--json")
    assert json.loads(again) == found
    scored = ("evaluate", *common, "--max-new-tokens", 4, "--device", "cpu", "--json")
    for given in (("--prefix", front), ("--prompt", around)):
        assert json.loads(cli(*scored, *given)[0])["tables"] == 3
    cli("generate", "--model", tiny_folder, "--prefix", front / "prefix.safetensors",
        "--device", "cpu", "--max-new-tokens", 3, "boat : Gull")  # fmt: skip


def test_topics_choose_the_examples_and_are_kept(cli, tiny_folder, tmp_path, monkeypatch):
    data, seen, search = tmp_path / "data", [], search_command.PromptSearch
    data.mkdir()
    topics = ("sport/golf", "news/uk", "news/world", "news/health")
    articles = [
        {"document": f"Of {t}.", "summary": "So.", "url": f"http://www.bbc.co.uk/{t}-10000000"}
        for t in topics
    ]
    for split in ("train", "dev"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(a) + "\n" for a in articles))

    def look(model, tokenizer, config, train, dev, *args):
        seen.append([[example.source for example in part] for part in (train, dev)])
        return search(model, tokenizer, config, train, dev, *args)

    monkeypatch.setattr(search_command, "PromptSearch", look)
    run = ("--out", tmp_path / "run", *QUICK)
    cli("search", "--model", tiny_folder, "--data", data, "--topics", "within-news", *run)
    cli("search", "--resume", tmp_path / "run")
    assert seen == [[["Of news/uk.", "Of news/world."]] * 2] * 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["topics"] == "within-news"
    few = ("--subset", 2, "--subset-seed", 3, "--out", tmp_path / "few", *QUICK)
    cli("search", "--model", tiny_folder, "--data", data, *few)
    cli("search", "--resume", tmp_path / "few")
    assert [len(part) for part in seen[-1]] == [2, 1] and seen[-1] == seen[-2]


def test_the_command_names_what_is_wrong(cli, tiny_folder, tables, tmp_path):
    common = ("--model", tiny_folder, "--data", tables)
    cases = [
        ((), "give either --out"),
        (("--out", tmp_path / "a", "--after", 11), "after must lie in [0, 10], got 11"),
        (("--out", tmp_path / "a", "--start", " "), "start must be a text, got an empty one"),
        (("--resume", tmp_path), "--resume does not allow"),
    ]
    for options, expected in cases:
        _, err = cli("search", *common, *options, code=2)
        assert expected in err and err.count("\n") == 1
    _, err = cli("search", "--resume", tmp_path, code=1)
    assert "not a run of the command search" in err and err.count("\n") == 1
    (tmp_path / "config.json").write_text("{}")
    _, err = cli("search", "--resume", tmp_path, code=1)
    assert "not the settings of a search" in err
    _, err = cli("search", *common, "--out", tmp_path, code=1)
    assert "already holds a run: continue it with --resume" in err
    assert not (tmp_path / "a").exists()


def test_the_command_says_what_will_run_and_about_how_long(cli, tiny_folder, tables, tmp_path):
    """With E2E the defaults take hours, and nothing said so for the first minutes."""
    train, common = tables / "train.jsonl", ("search", "--model", tiny_folder, "--json", *QUICK)
    run = ("--out", tmp_path / "run")
    _, err = cli(*common, "--data", train, "--steps", 4, "--after", 3, *run)
    begin, end = err.split("first: compare 4 starting prompts")
    assert "examples are held out" in begin and "others that judge prompts" in begin
    assert "run: 4 steps, each with up to 6 prompts on up to 3 pairs" in begin
    assert re.search(r"dev loss \d+\.\d{3} without a prompt, .* written template", end)
    assert "step 0: dev loss" in end and re.search(r"about \d+ s to step 4, not counting", end)
    _, err = cli("search", "--resume", tmp_path / "run", "--json")
    assert "continuing after step 4" in err and "first: compare" not in err
    budget = ("--steps", 99, "--budget", 200, "--out", tmp_path / "budget")
    _, err = cli(*common, "--data", train, *budget)
    assert "run: 99 steps or 200 evaluations of pairs, each" in err
    assert re.search(r"about \d+ s to the end of the budget, not counting", err)


def test_a_slimmed_search_is_not_started_again(cli, tiny_folder, tables, tmp_path):
    out = tmp_path / "run"
    cli("search", "--model", tiny_folder, "--data", tables, "--out", out, *QUICK)
    cli("runs", "--slim", out)
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    _, err = cli("search", "--resume", out, code=1)
    assert f"{out} has no state" in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_a_better_written_template_is_named(capsys):
    print_verdict({"dev_loss": 2.0, "dev_loss_template": 1.5})
    assert (
        "the best written template is better, with a dev loss of 1.500" in capsys.readouterr().err
    )
    print_verdict({"dev_loss": 2.0, "dev_loss_template": 2.5})
    print_verdict({"dev_loss": 2.0})  # no dev data, or no template fits into the model
    assert capsys.readouterr().err == ""


def test_ctrl_c_before_the_first_step_keeps_the_starts(
    cli, tiny_folder, tables, tmp_path, monkeypatch
):
    race, out = PromptSearch.race_starts, tmp_path / "run"

    def interrupted(self):
        signal.raise_signal(signal.SIGINT)
        race(self)

    common = ("search", "--model", tiny_folder, "--data", tables, *QUICK, "--out")
    whole = json.loads(cli(*common, tmp_path / "whole", "--json")[0])
    with monkeypatch.context() as patch:
        patch.setattr(PromptSearch, "race_starts", interrupted)
        _, err = cli(*common, out, code=130)
    assert "stopped after step 0 of 2; state saved. Continue with" in err
    monkeypatch.delattr(PromptSearch, "race_starts")  # it is not done again
    found = json.loads(cli("search", "--resume", out, "--json")[0])
    assert (found["tokens"], found["dev_loss"]) == (whole["tokens"], whole["dev_loss"])


def test_ctrl_c_ends_after_a_step_and_says_how_to_go_on(
    cli, tiny_folder, tables, tmp_path, monkeypatch
):
    step = PromptSearch.step

    def interrupted(self):
        signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(PromptSearch, "step", interrupted)
    common = ("--model", tiny_folder, "--data", tables, "--out", tmp_path / "run")
    _, err = cli("search", *common, *QUICK, code=130)
    assert f"Continue with: python -m minprefix search --resume {tmp_path / 'run'}" in err
    assert read_state(tmp_path / "run", keys=PromptSearch.state_keys)["step"] == 1
