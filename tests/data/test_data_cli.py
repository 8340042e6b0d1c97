"""The options of commands for data: names, topics, subsets, cut sources."""

import json

import pytest
from test_cli import only_json, train

from minprefix.cli import train as train_command
from minprefix.data.load import data_folder
from minprefix.generation.texts import generate
from minprefix.models.weights import load
from minprefix.prefix.prefix import Prefix


@pytest.fixture
def articles(tmp_path):
    """A folder of articles with URLs: in each split one of each topic, and a long one of news."""
    folder = tmp_path / "articles"
    folder.mkdir()
    for split in ("train", "dev", "test"):
        rows = [
            {
                "document": f"A text of {topic}. " + ("So. " * 300 if number == 3 else ""),
                "summary": f"{topic} {number}.",
                "url": f"http://www.bbc.co.uk/{topic}-{number}0000000",
            }
            for number, topic in enumerate(("sport/golf", "news/uk", "news/health", "news/world"))
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def trained_on(monkeypatch):
    """The sources of train and dev of each run that a command starts."""
    seen, trainer = [], train_command.Trainer

    def look(model, tokenizer, config, train, dev, *args):
        seen.append([[e.source.split(" So.")[0] for e in examples] for examples in (train, dev)])
        return trainer(model, tokenizer, config, train, dev, *args)

    monkeypatch.setattr(train_command, "Trainer", look)
    return seen


def test_topics_and_max_source_from_training_to_scores(
    cli, tiny_folder, articles, trained_on, tmp_path, caplog
):
    topics = ("--topics", "within-news")
    _, err = train(cli, tiny_folder, articles, tmp_path / "no", *topics, code=1)
    assert "at most 87 are allowed; 1 of 2 pairs is too long" in err  # by default nothing is cut
    run = tmp_path / "run"
    train(cli, tiny_folder, articles, run, *topics, "--max-source", 20)
    chosen = ["A text of news/uk.", "A text of news/world."]
    assert trained_on[-1] == [chosen, chosen]
    settings = json.loads((run / "config.json").read_text())
    assert (settings["topics"], settings["train"]["max_source"]) == ("within-news", 20)
    score = ("evaluate", "--model", tiny_folder, "--data", articles, "--max-new-tokens", 3)
    score += ("--prefix", run / "prefix.safetensors", "--json", "--device", "cpu")
    assert only_json(cli(*score, *topics)[0])["tables"] == 1  # news/health
    assert only_json(cli(*score)[0])["tables"] == 4  # the prefix knows that sources are cut
    assert Prefix.load(run / "prefix.safetensors").max_source == 20
    long = "A text of news. " * 40
    text, _ = cli("generate", *score[1:3], *score[7:9], *score[5:7], "--json", long)
    assert only_json(text)["texts"]
    assert caplog.messages[-1] == "note: 1 of 1 sources is cut, from 201 to 20 tokens (max_source)"
    caplog.clear()
    model, tokenizer = load(tiny_folder)
    prefix = Prefix.load(run / "prefix.safetensors")
    generate(model, tokenizer, ["short", long], prefix=prefix, max_new_tokens=2)
    assert caplog.messages == ["note: 1 of 2 sources is cut, from 201 to 20 tokens (max_source)"]
    _, err = cli(*score, "--max-source", 19, code=1)
    assert "was trained with --max-source 20, not 19" in err
    _, err = cli(*score, "--topics", "seen", code=1)
    assert "no examples for the topics seen" in err


def test_a_subset_of_a_downloaded_set_and_its_resumption(
    cli, tiny_folder, tables, trained_on, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data_folder("e2e").parent.mkdir(parents=True)
    data_folder("e2e").symlink_to(tables)
    for seed in (0, 1):
        out = tmp_path / f"run{seed}"
        train(cli, tiny_folder, "e2e", out, "--subset", 5, "--subset-seed", seed)
    first, second = trained_on
    assert [len(part) for part in first] == [5, 2]  # 30 % of 5 pairs for dev
    assert first[0] != second[0]
    cli("train", "--resume", tmp_path / "run1")
    assert trained_on[-1] == second
    _, err = train(cli, tiny_folder, "e2e", tmp_path / "no", "--subset", 9, code=1)
    assert "size must be 1 to 8" in err
