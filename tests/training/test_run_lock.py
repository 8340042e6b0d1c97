"""One process per run folder, and what the folder may contain."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import trainer
from test_cli import train

from minprefix.cli import train as train_command
from minprefix.files import FileNote
from minprefix.training import lock
from minprefix.training.lock import FolderInUse, alone_in

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys
import threading
from pathlib import Path
from minprefix.training.lock import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that works in tmp_path/run."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_process_in_a_folder_is_told_who_is_there(
    cli, tiny_folder, tables, tmp_path, holder
):
    out, text = tmp_path / "run", tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("the cat sees the dog. " * 60)
    common = ("--model", tiny_folder, "--data", tables, "--device", "cpu", "--out", out)
    small = ("--vocab-size", 300, "--n-positions", 16, "--n-embd", 8, "--n-layer", 1, "--n-head", 2,
             "--batch-tokens", 64, "--steps", 1, "--device", "cpu", "--out", out)  # fmt: skip
    commands = {
        "train": ("train", *common, "--steps", 2, "--prefix-len", 2),
        "search": ("search", *common, "--steps", 1, "--prompt-len", 2, "--starts", 2),
        "pretrain": ("pretrain", text, *small),
        "demo": ("demo", "--out", out),
    }
    for name, words in commands.items():
        _, err = cli(*words, code=1)
        told = f"error: {out} is in use by process {holder.pid} on {os.uname().nodename} since 2"
        assert told in err.splitlines()[-1], (name, err)
        assert os.listdir(out) == [".lock"], name
    holder.send_signal(signal.SIGKILL)  # a stale lock is no trap
    holder.wait()
    cli(*commands["train"])


def test_a_folder_that_was_free_is_looked_at_again_under_the_lock(
    cli, tiny_folder, tables, tmp_path, monkeypatch
):
    """Another command finishes a run there while this one loads its model."""
    out, make = tmp_path / "run", train_command.make_trainer

    def make_and_lose(settings, folder):
        made = make(settings, folder)
        folder.mkdir()
        (folder / "config.json").write_text("settings of the other")
        return made

    monkeypatch.setattr(train_command, "make_trainer", make_and_lose)
    _, err = train(cli, tiny_folder, tables, out, code=1)
    assert f"{out} already holds a run: continue it with --resume" in err
    assert (out / "config.json").read_text() == "settings of the other"


def test_a_running_run_is_neither_slimmed_nor_deleted(cli, tmp_path, holder):
    out = tmp_path / "run"
    for name in ("config.json", "log.jsonl"):
        (out / name).write_text("{}")
    for option in ("--slim", "--delete"):
        assert "is in use by process" in cli("runs", out, option, code=1)[1]
    assert (out / "config.json").exists()


def test_a_file_system_without_locks_is_no_failure(tokenizer, tmp_path, monkeypatch):
    def none(*args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "locked", none)
    with pytest.warns(FileNote, match="cannot be locked: start only one process"):
        trainer(tokenizer, tmp_path).run(progress=False)
    assert (tmp_path / "prefix.safetensors").exists()


def test_a_thread_may_ask_twice_and_a_lock_file_may_hold_anything(tmp_path):
    (tmp_path / ".lock").write_text('{"pid": "x", "host": 3}')
    with alone_in(tmp_path), alone_in(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        (tmp_path / ".lock").write_text("[")
        lock.HELD.clear()  # as in another thread
        with pytest.raises(FolderInUse, match=f"{tmp_path} is in use: wait"), alone_in(tmp_path):
            pass
    with alone_in(tmp_path):
        pass


def test_a_holder_that_has_not_written_yet_is_waited_for(tmp_path):
    """It takes the lock, and then writes who it is."""
    with alone_in(tmp_path):
        said = (tmp_path / ".lock").read_text()
        (tmp_path / ".lock").write_text("")
        lock.HELD.clear()  # as in another process
        writer = threading.Timer(0.1, (tmp_path / ".lock").write_text, [said])
        writer.start()
        with pytest.raises(FolderInUse, match=f"process {os.getpid()} on"), alone_in(tmp_path):
            pass
        writer.join()


def test_left_overs_of_a_kill_are_swept_and_nothing_else(tokenizer, tmp_path):
    left = f".{'0af' * 10}12.tmp"
    (tmp_path / "state").mkdir()
    (tmp_path / "elsewhere").mkdir()
    gone = [tmp_path / f"{left}.safetensors", tmp_path / "state" / f"{left}.pt", tmp_path / left]
    stay = [tmp_path / ".mine.tmp", tmp_path / "state" / "notes.tmp.txt", tmp_path / f"{left}.a.b"]
    for path in (*gone, *stay):
        path.write_text("half")
    trainer(tokenizer, tmp_path).run(progress=False)
    assert [path.exists() for path in (*gone, *stay)] == [False] * 3 + [True] * 3


@pytest.mark.parametrize("name", ["state", "log.jsonl", "prefix.safetensors", ".lock"])
def test_a_run_never_writes_through_a_link_out_of_its_folder(tokenizer, tmp_path, name):
    outside, out = tmp_path / "outside", tmp_path / "run"
    out.mkdir()
    outside.mkdir()
    (outside / "file").write_text("precious")
    (out / name).symlink_to(outside if name == "state" else outside / "file")
    with pytest.raises(ValueError, match=f"{name} is a symbolic link out of the run folder"):
        trainer(tokenizer, out).run(progress=False)
    assert (outside / "file").read_text() == "precious" and os.listdir(outside) == ["file"]


def test_relative_data_is_found_from_another_folder(
    cli, tiny_folder, tables, tmp_path, monkeypatch
):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    for name, target in (("model", tiny_folder), ("data", tables)):
        (tmp_path / "here" / name).symlink_to(target)
    monkeypatch.chdir(tmp_path / "here")
    train(cli, Path("model"), Path("data"), tmp_path / "run")
    monkeypatch.chdir(tmp_path / "there")
    cli("train", "--resume", tmp_path / "run", "--steps", 6)
    (tmp_path / "here").rename(tmp_path / "moved")  # then from where the command is started
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    settings |= {"model": "model", "data": "data"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path / "moved")
    cli("train", "--resume", tmp_path / "run")


def test_a_run_that_learned_nothing_is_no_success(cli, tiny_folder, tables, tmp_path):
    _, err = train(cli, tiny_folder, tables, tmp_path / "run", "--lr", 200, code=1)
    last = err.splitlines()[-1]
    assert "error: training never brought the dev loss below" in last, err
    assert "nothing was learned" in last and "next: python" not in err
    _, err = cli("train", "--resume", tmp_path / "run", code=1)
    assert "nothing was learned" in err
