"""Limits on data: lines, pipes, devices, archives, downloads; and errors of libraries."""

import gzip
import io
import lzma
import os
import tarfile
import threading
import zlib

import pytest

from minprefix import limits
from minprefix.data.articles import convert_xsum
from minprefix.data.load import load_examples
from minprefix.files import brief, names_file, read_json, read_lines, reading
from minprefix.training.corpus import load_corpus
from minprefix.transfer import download_within_limits

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
ROW = b'{"source": "a boat", "target": "It is a boat."}\n'


def test_each_limit_has_its_variable_which_its_error_names(monkeypatch):
    found = [limit for limit in vars(limits).values() if isinstance(limit, limits.Limit)]
    assert len({limit.variable for limit in found}) == len(found) >= 8
    for limit in found:
        limit.check(limit.usual, "a file")
        with pytest.raises(ValueError, match=f"a file: more than .*{limit.variable}=N"):
            limit.check(limit.usual + 1, "a file")
        monkeypatch.setenv(limit.variable, str(limit.usual + 1))
        limit.check(limit.usual + 1, "a file")
        monkeypatch.setenv(limit.variable, "many")
        with pytest.raises(ValueError, match=f"{limit.variable} must be a number >= 1, got 'many'"):
            limit.check(1, "a file")


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt", "d.source", "d.csv"])
def test_lines_and_files_are_bounded(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(b"mr,ref\n" * name.endswith("csv") + b"a" * 1000 + b",b\n")
    monkeypatch.setenv("MINPREFIX_MAX_LINE", "100")
    with pytest.raises(ValueError, match=rf"{name}.*(MINPREFIX_MAX_LINE|larger than field limit)"):
        load_examples(path)
    monkeypatch.delenv("MINPREFIX_MAX_LINE")
    for variable in ("MINPREFIX_MAX_DATA", "MINPREFIX_MAX_TEXT"):
        monkeypatch.setenv(variable, "500")
    with pytest.raises(ValueError, match=rf"{name}: more than 500 bytes"):
        load_examples(path)


@needs_pipes
def test_a_pipe_is_read_as_it_is_written(tmp_path):
    path = tmp_path / "d.jsonl"
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb", buffering=0) as pipe:
            for _ in range(3):
                pipe.write(ROW)

    thread = threading.Thread(target=write)
    thread.start()
    (example,) = load_examples(path)
    thread.join()
    assert example.targets == ("It is a boat.",) * 3


@needs_pipes
def test_a_pipe_that_nobody_writes_to_is_left(tmp_path, monkeypatch):
    monkeypatch.setenv("MINPREFIX_MAX_SILENCE", "1")
    os.mkfifo(tmp_path / "d.jsonl")
    with pytest.raises(ValueError, match=r"d.jsonl: more than 1 seconds of waiting for data"):
        load_examples(tmp_path / "d.jsonl")


def test_devices_are_no_data(tmp_path):
    (tmp_path / "d.jsonl").symlink_to(os.devnull)
    with pytest.raises(ValueError, match=r"d.jsonl: a device; expected a file or a pipe"):
        load_examples(tmp_path / "d.jsonl")


@pytest.mark.parametrize("pack", [gzip, lzma])
def test_packed_texts_are_bounded(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(limits, "FREE", 2**20)
    path = tmp_path / ("a.txt.gz" if pack is gzip else "a.txt.xz")
    path.write_bytes(pack.compress(bytes(2**22)))
    with pytest.raises(ValueError, match=r"a.txt...: more than 100 bytes unpacked for each byte"):
        load_corpus(tmp_path, None, 300, 0.1)


def test_archives_of_data_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "FREE", 2**20)
    (tmp_path / "ids").write_text('{"train": ["1"], "validation": [], "test": []}')
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("1.summary")
        member.size = 2**22
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(ValueError, match=r"a.tar.gz: more than 100 bytes unpacked"):
        convert_xsum(tmp_path / "a.tar.gz", tmp_path / "ids", tmp_path)


class PanicException(BaseException):
    """As pyo3 names a panic of Rust."""


@pytest.mark.parametrize(
    "error", [KeyError("x"), zlib.error("x"), RecursionError(), MemoryError(), PanicException("x"),
              KeyError("x" * 999), EOFError(), gzip.BadGzipFile("x")]
)  # fmt: skip
def test_errors_of_libraries_name_the_file(tmp_path, error):
    path = tmp_path / "a.bin"

    @names_file
    def read(path):
        raise error

    with pytest.raises(ValueError, match="a.bin: damaged, or of another kind") as found:
        read(path)
    assert len(str(found.value)) < len(str(path)) + 130


def test_other_errors_stay(tmp_path):
    for error in (KeyboardInterrupt(), SystemExit(2), FileNotFoundError(2, "None", "name")):
        with pytest.raises(type(error)) as found, reading(tmp_path):
            raise error
        assert found.value is error
    for message in ("a.json:3: wrong", "wrong"):
        with pytest.raises(ValueError, match=r"^a.json(:3)?: wrong$"), reading("a.json"):
            raise ValueError(message)


def test_deep_json_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ' * 100_000)
    with pytest.raises(ValueError, match=r"a.json: damaged, or of another kind \(RecursionError"):
        read_json(tmp_path / "a.json")


def test_long_values_are_shown_in_part():
    assert brief("a") == "'a'" and brief([1, 2]) == "[1, 2]"
    assert len(brief("a" * 10**6)) < 90 and len(brief({"a": "b" * 10**6})) < 90


def test_a_line_that_is_no_utf_8_is_named(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfa\nb\n\xff\n")
    lines = read_lines(tmp_path / "a", limits.DATA)
    assert [next(lines), next(lines)] == ["a\n", "b\n"]
    with pytest.raises(ValueError, match=r"a:3: invalid UTF-8 \(byte 0xff\): save it as UTF-8"):
        next(lines)


def test_a_download_without_an_end_is_given_up(monkeypatch):
    monkeypatch.setenv("MINPREFIX_MAX_DOWNLOAD", "100")

    def endless(file) -> None:
        while True:
            file.write(b"x" * 10)

    with pytest.raises(ValueError, match=r"a.bin: more than 100 bytes from a server"):
        download_within_limits(endless, target := io.BytesIO(), "a.bin")
    assert target.tell() == 100


def test_a_download_that_drips_is_given_up(monkeypatch):
    monkeypatch.setenv("MINPREFIX_MAX_SILENCE", "1")
    go_on, late = threading.Event(), []

    def dripping(file) -> None:
        file.write(b"x")
        go_on.wait()
        try:
            file.write(b"y")
        except OSError as error:
            late.append(str(error))
        late.append("done")

    with pytest.raises(OSError, match=r"a.bin: less than 65536 bytes in 1 s"):
        download_within_limits(dripping, target := io.BytesIO(), "a.bin")
    go_on.set()
    while "done" not in late:
        pass
    assert target.getvalue() == b"x" and late[0] == "the download was abandoned"


def test_a_download_s_own_errors_come_through():
    def fails(file) -> None:
        file.write(b"x")
        raise ConnectionError("reset")

    with pytest.raises(ConnectionError, match="reset"):
        download_within_limits(fails, io.BytesIO(), "a.bin")
    download_within_limits(lambda file: file.write(b"x"), target := io.BytesIO(), "a.bin")
    assert target.getvalue() == b"x"
