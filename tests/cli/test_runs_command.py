"""The command `runs`: settings and dev data; test_train_command.py has the rest."""

import errno
import json
import os

import pytest
from test_cli import only_json


@pytest.fixture
def run_of(tmp_path):
    """Makes a run folder with these settings and one dev loss."""

    def make(name: str, **settings):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "log.jsonl").write_text('{"step": 1, "dev_loss": 2.0}\n')
        return folder

    return make


def test_a_default_length_is_a_number(cli, run_of):
    first = run_of("a", data="x", prefix={"prefix_len": None, "init": "words"})
    second = run_of("b", data="x", prefix={"prefix_len": 20, "init": "words"})
    third = run_of("c", data="x", prefix={"prefix_len": 10, "init": "words"})
    rows = only_json(cli("runs", first, second, "--json")[0])["runs"]
    assert [row["prefix_len"] for row in rows] == ["10", "20"]
    assert "prefix_len" not in only_json(cli("runs", first, third, "--json")[0])["runs"][0]


def test_other_dev_data_is_noted(cli, run_of):
    first, second = run_of("a", data="x", dev="d"), run_of("b", data="y", dev="d")
    third = run_of("c", data="x", dev=None)
    assert cli("runs", first, second)[1] == ""
    assert "their dev losses cannot be compared" in cli("runs", first, third)[1]


def test_without_folders_it_asks_for_some(cli):
    assert "give run folders, such as runs/*" in cli("runs", code=2)[1]


def test_a_folder_that_cannot_be_deleted_is_named(cli, run_of, monkeypatch):
    def fail(folder):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "log.jsonl")

    monkeypatch.setattr("shutil.rmtree", fail)
    folder = run_of("a", data="x", dev="d")
    assert f"{folder}: cannot be deleted (Read-only" in cli("runs", "--delete", folder, code=1)[1]
