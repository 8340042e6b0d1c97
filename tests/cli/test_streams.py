"""Standard output and error that are closed, full, or support only ASCII."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minprefix.cli.main import describe
from minprefix.cli.streams import LONGEST, Messages, one_line
from minprefix.training.run_folder import read_log

ROOT = Path(__file__).resolve().parents[2]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


def start(argv, before: str = "", **streams):
    """The command line in a process that first does `before`."""
    code = f"import os, sys; {before}\nos.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    argv = [sys.executable, "-c", code, "-m", "minprefix", *map(str, argv)]
    return subprocess.run(argv, cwd=ROOT, timeout=200, check=False, **streams)


def score(tmp_path) -> list:
    (tmp_path / "texts").write_text("a b\n")
    return ["score", tmp_path / "texts", tmp_path / "texts"]


def test_messages_are_one_line_of_printable_characters():
    assert one_line("a\n b\tc\x1b[31m\x00") == "a b c\\x1b[31m\\x00"
    assert one_line("\udcff é") == "\\udcff é"
    long = one_line("file: " + "x" * 9999 + " what to do")
    assert len(long) <= LONGEST and long.startswith("file: x") and long.endswith(" what to do")
    assert describe(FileNotFoundError(2, "No such file", "a\nb")) == "a b: No such file"


def test_messages_that_cannot_be_written_are_lost():
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

        def flush(self):
            raise OSError(28, "No space left on device")

    print("hello", file=Messages(Broken()), flush=True)
    (closed := io.StringIO()).close()
    print("hello", file=Messages(closed), flush=True)
    Messages(kept := io.StringIO()).write("hello")
    assert kept.getvalue() == "hello"


@pytest.mark.slow
@needs_full
def test_a_result_that_cannot_be_written_is_an_error(tmp_path):
    with FULL.open("w") as full:
        done = start(score(tmp_path), stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1
    assert b"minprefix: error: " in done.stderr and b"No space left" in done.stderr


@pytest.mark.slow
@needs_full
def test_a_message_that_cannot_be_written_is_no_error(tmp_path):
    with FULL.open("w") as full:
        done = start(score(tmp_path), stdout=subprocess.PIPE, stderr=full)
    assert done.returncode == 0 and b"bleu" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["0, 3", "1, 3"], ids=["all", "stdout and stderr"])
def test_streams_that_are_closed_are_no_file_s(tmp_path, closed):
    """The first file that a process opens takes the place of a closed stream."""
    done = start(score(tmp_path), f"os.closerange({closed})", stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert (tmp_path / "texts").read_text() == "a b\n"


def test_without_stderr_stdout_is_the_result_alone(tmp_path):
    """Python prints what is for a closed stderr to stdout."""
    done = start([*score(tmp_path)[:2], tmp_path / "none"], "os.close(2)", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.mark.slow
@needs_full
@pytest.mark.parametrize("stream", ["full", "pipe"])
def test_a_training_goes_on_without_its_terminal(tiny_folder, tables, tmp_path, stream):
    end, write = os.pipe()
    os.close(end)  # there is no reader
    target = FULL.open("w") if stream == "full" else os.fdopen(write, "w")
    argv = ["train", "--model", tiny_folder, "--data", tables, "--out", tmp_path / "run",
            "--mid-dim", 8, "--steps", 4, "--log-every", 1, "--device", "cpu"]  # fmt: skip
    done = start(argv, stdout=target, stderr=target)
    assert done.returncode == (1 if stream == "full" else 0)  # of the result, at the end
    assert max(entry["step"] for entry in read_log(tmp_path / "run")) == 4
    assert (tmp_path / "run" / "prefix.safetensors").is_file()


def test_a_text_survives_an_ascii_terminal():
    code = (
        "from minprefix.cli.streams import with_streams\nwith_streams(lambda: print('é €') or 0)()"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, b"? ?\n")
