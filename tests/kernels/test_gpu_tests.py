"""gpu.sh without a GPU: its runner of tests, its summaries, and what happens where CUDA is lost.

In the runner one test's broken process fails no other test.
"""

import argparse
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from benchmarks import gpu_summary, gpu_tests
from benchmarks.kernels import clock
from benchmarks.machine import add_row, machine, read_rows
from benchmarks.peft.results import KEY

ROOT = Path(gpu_tests.__file__).parents[1]

SOURCE = """
import os
import pathlib
import pytest

HERE = pathlib.Path(__file__).parent
ERROR = "CUDA error: an illegal memory access was encountered"


def first_time(name):
    path = HERE / name
    if path.exists():
        return False
    path.touch()
    return True


@pytest.mark.parametrize("n", range(5))
def test_good(n):
    pass


def test_loses_the_gpu_once():  # as where an earlier test was to blame
    if first_time("once"):
        raise RuntimeError(ERROR)


def test_after():
    assert not (HERE / "gone").exists()


def test_loses_the_gpu_always():
    raise RuntimeError(ERROR)


def test_ends_its_process():
    os._exit(11)


def test_wrong():
    assert 1 == 2


def test_skipped():
    pytest.skip("not here")
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch, capsys):
    """Runs a source of tests; returns what is printed. Something in each of them fails."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)

    def call(source: str, *options: str) -> str:
        Path("test_some.py").write_text(source)
        assert gpu_tests.main([*options, "test_some.py"]) == 1
        return capsys.readouterr().out

    return call


@pytest.mark.slow
def test_each_test_has_its_own_result(run):
    out = run(SOURCE, "--workers", "2", "--seconds", "60")
    assert "tests: 7 passed, 3 failed, 1 skipped, 0 not run of 11; 3 were run alone" in out
    failed = {line.split("::")[1].split()[0] for line in out.splitlines() if "verdict" in line}
    assert failed == {"test_loses_the_gpu_always", "test_ends_its_process", "test_wrong"}


def test_files_take_turns():
    tests = ["a::1", "a::2", "a::3", "b::1", "c::1", "c::2"]
    parts = gpu_tests.chunks(tests, 2)
    assert parts == [["a::1", "a::2"], ["b::1"], ["c::1", "c::2"], ["a::3"]]


@pytest.mark.slow
def test_a_test_without_end_fails_alone(run, monkeypatch):
    monkeypatch.setattr(gpu_tests, "TEST_SECONDS", 6)  # the process's start is in it
    source = "import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\ndef test_c(): pass\n"
    out = run(source, "--workers", "1", "--seconds", "60")
    assert "tests: 2 passed, 1 failed, 0 skipped, 0 not run of 3" in out
    assert "no end after 6 s" in out


def test_what_there_was_no_time_for_is_said(run):
    assert "1 not run of 1" in run("import time\ndef test_a(): time.sleep(60)\n", "--seconds", "4")


def test_without_pytest_one_line_says_so(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", None)
    monkeypatch.setattr(gpu_tests.importlib.util, "find_spec", lambda name: None)
    assert gpu_tests.main([]) == 1
    assert capsys.readouterr().out == "tests: pytest is not installed, so none was run\n"


def test_gpu_sh_says_in_one_line_what_it_lacks():
    script = ROOT / "benchmarks" / "gpu.sh"
    env = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([script, "decode"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "gpu.sh: no GPU\n")
    done = subprocess.run([script, "attention", "all"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.endswith("generate; got all\n")


def test_steps_are_gathered_in_one_csv(tmp_path: Path, capsys):
    common = dict.fromkeys(KEY, "") | {"work": "train", "B": 10, "T": 128} | machine()
    for folder, method, ms in (("graphs", "minprefix", 9.0), ("graphs", "peft", 36.0),
                               ("eager", "minprefix", 20.0), ("compiled", "minprefix", 9.1),
                               ("compiled", "compiled", 8.7)):  # fmt: skip
        row = common | {"method": method, "ms": ms, "tokens_per_s": 1, "peak_mib": 2, "ratio": ""}
        path = tmp_path / "work" / folder / "bench.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        add_row(path, row | {"note": ""}, KEY)
    for folder, method, ms, ratio in (
        ("graphs", "minprefix", 50, ""), ("eager", "minprefix", 90, ""),
        ("graphs", "peft", 700, "14.0"),
    ):  # fmt: skip
        row = common | {"work": "generate", "B": 1, "T": "", "beams": 1, "method": method, "ms": ms}
        add_row(tmp_path / "work" / folder / "bench.csv", row | {"ratio": ratio, "note": ""}, KEY)
    (tmp_path / "work" / "graphs" / "profile-random-medium-bf16.png").touch()
    gpu_summary.main(["steps", str(tmp_path), "--work", str(tmp_path / "work")])
    rows = read_rows(tmp_path / f"steps-{clock.device_name()}.csv")
    found = [(row["method"], row["graphs"], row["ms"]) for row in rows if row["work"] == "train"]
    assert found == [("minprefix", "1", "9.0"), ("peft", "1", "36.0"), ("minprefix", "0", "20.0"),
                     ("compiled", "1", "8.7")]  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[len(rows) + 1] == "" and len(lines) == len(rows) + 6
    assert lines[-4].endswith("ours / PEFT   14.0 >= 15 (35)  MISSED")
    assert lines[-3].endswith("without graphs / with   1.80 >= 1  ok")
    assert lines[-2:] == ["", "the kernels beside attention: not measured"]
    assert len(list(tmp_path.glob("profile-*-medium-bf16.png"))) == 1


def test_summary_of_the_tests(tmp_path: Path, capsys):
    log = tmp_path / "log.txt"
    log.write_text("....\ntests: 3 passed\nverdict: a FAILED\n========= ERROR SUMMARY: 0 errors\n")
    gpu_summary.main(["tests", str(tmp_path), "--log", str(log)])
    assert capsys.readouterr().out.splitlines() == log.read_text().splitlines()[1:]


def test_other_parts_say_what_was_not_measured(tmp_path: Path, capsys):
    for part in ("attention", "decode"):
        gpu_summary.main([part, str(tmp_path)])
        lines = capsys.readouterr().out.splitlines()
        assert sum("not measured" in line for line in lines) > 5


def test_a_benchmark_goes_on_in_a_new_process_where_cuda_is_lost(tmp_path: Path, monkeypatch):
    begun = []

    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    args = argparse.Namespace(out=tmp_path, seconds=50.0)
    clock.go_on_if_lost(args, time.monotonic())  # no GPU: nothing to lose
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("os.execv", lambda program, words: begun.append(words))
    monkeypatch.setattr(sys, "argv", ["x", "--out", "y", "--seconds", "50"])
    spec = types.SimpleNamespace(name="benchmarks.kernels.tiles")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    clock.go_on_if_lost(args, time.monotonic())
    assert not begun
    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    clock.go_on_if_lost(args, time.monotonic() - 20)
    assert begun[0][1:3] == ["-m", "benchmarks.kernels.tiles"]
    assert begun[0][-3:] == ["--resume", "--seconds", "30"]
