"""The named cases, and that the fuzzing run detects each kind of failure."""

import time
from pathlib import Path

import pytest

import tests.fuzz.__main__ as fuzzing
from tests.fuzz.__main__ import Child, Fuzz
from tests.fuzz.valid import Valid

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    (folder := tmp_path_factory.mktemp("fuzz") / "valid").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # `make` goes there, too
        patch.setenv("MINPREFIX_MAX_SILENCE", "1")
        yield Fuzz(folder, 0)


def test_all_named_cases_are_refused_in_one_line(fuzz):
    worker = Child(fuzz)
    results = [worker.run(number) for number in range(len(fuzz.named))]
    assert not [result for result in results if result[1] not in ("refused", "read")]
    assert not Path("ran").exists()  # the code in a pickle


def test_flipped_bits_are_seen(fuzz):
    numbers = range(len(fuzz.named), fuzz.fixed, 10)
    assert {fuzz.run(number)[1] for number in numbers} == {"refused"}


def broken(error: BaseException):
    def read():
        raise error

    return read


def too_large() -> None:
    blocks = []
    while True:
        blocks.append(b"x" * 2**24)
        time.sleep(0.005)


@pytest.mark.parametrize(
    "read, outcome",
    [
        (broken(KeyError("x")), "traceback"),
        (broken(SystemExit(1)), "traceback"),
        (broken(ValueError("a value")), "unnamed"),
        (lambda: 0, "silent"),
        (lambda: time.sleep(60), "hang"),
        (too_large, "memory"),
    ],
)
def test_each_kind_of_failure_is_found(fuzz, monkeypatch, read, outcome):
    monkeypatch.setattr(fuzzing, "MOST_SECONDS", 3 if outcome == "hang" else 30)
    monkeypatch.setattr(fuzzing, "MOST_MEMORY", 2**28)
    valid = Valid(fuzz.valid["prefix"].path, read, has_checksum=True)
    monkeypatch.setattr(fuzz, "valid", fuzz.valid | {"prefix": valid})
    assert Child(fuzz).run(len(fuzz.named))[1] == outcome
