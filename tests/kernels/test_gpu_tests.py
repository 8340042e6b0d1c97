"""gpu.sh without a GPU: its test runner, its summaries, and what happens after a CUDA error.

A test that breaks its process must not make other tests fail.
"""

import argparse
import dataclasses
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from benchmarks import e2e, gpu_steps, gpu_summary, gpu_tests
from benchmarks.kernels import clock
from benchmarks.machine import add_row, machine, read_rows
from benchmarks.peft import run as peft_run
from benchmarks.peft.results import KEY
from minprefix.data.load import load_examples
from minprefix.generation.config import GenerationConfig

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


@pytest.mark.slow
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
    assert done.returncode == 2 and done.stderr.endswith("train; got all\n")


def write(path: Path, rows: list[dict], *more: str) -> None:
    for row in rows:
        add_row(path, dict.fromkeys(KEY, "") | {"note": ""} | machine() | row, (*KEY, *more))


def measured(method: str, ms: float, ratio: object = "", **sizes: object) -> dict:
    row = {"work": "train", "model": "random-medium", "data": "random", "B": 10, "T": 128}
    return row | {"method": method, "ms": ms, "ratio": ratio} | sizes


def test_steps_are_gathered_in_one_csv(tmp_path: Path, capsys):
    """Beside the rows of another run that the committed file has; a verdict for each aim."""
    work, path = tmp_path / "work", tmp_path / f"steps-{clock.device_name()}.csv"
    work.mkdir()
    shutil.copy(ROOT / "benchmarks" / "gpu" / "steps-h200.csv", path)
    before = len(read_rows(path))
    write(work / "bench.csv", [
        measured("minprefix", 4.0), measured("eager", 12.0, "3.0"), measured("peft", 36.0, "9.0"),
        measured("unfused", 3.0, "0.75"),
        measured("minprefix", 20.0, B=64, peak_mib=3000),
        measured("peft", 90.0, "4.5", B=64, peak_mib=10000),
        measured("minprefix", 8.0, data="restaurants"),
        measured("peft", 36.0, "4.5", data="restaurants"),
    ])  # fmt: skip
    kernel = {"share": "60.0", "count": 24, "us": 2400.0, "kernel": "_fwd_kernel"}
    write(work / "kernels.csv", [measured("minprefix", 4.0) | kernel], "kernel")
    (work / "profile-random-medium-bf16.png").touch()
    gpu_summary.main(["steps", str(tmp_path), "--work", str(work)])
    assert len(read_rows(path)) == before + 8
    lines = [" ".join(x.split()) for x in capsys.readouterr().out.split("\n\n")[1].splitlines()]
    assert lines[:5] == [
        "train random B 10: ours / peft 9.00 >= 7 (stretch 10) ok",
        "train random B 64: ours / peft 4.50 >= 3 (stretch 4) stretch",
        "train random B 64: ours / peft-compiled not measured >= 1.3 (stretch 1.8)",
        "train random B 64: peak memory, ours / peft 0.30 <= 0.4 (stretch 0.25) ok",
        "train texts B 10: ours / peft 4.50 >= 6 (stretch 10) MISSED",
    ]
    assert lines[5].endswith("ours / without graphs 3.0 >= 1 ok")
    assert lines[6].endswith("ours / without fused kernels 0.75 >= 1 MISSED") and len(lines) == 7
    assert len(list(tmp_path.glob("profile-*-medium-bf16.png"))) == 1
    assert len(list(tmp_path.glob("kernels-train-*.csv"))) == 1


def test_generation_has_verdicts_of_its_own(tmp_path: Path, capsys):
    (tmp_path / "work").mkdir()
    sizes = {"work": "generate", "B": 16, "beams": 5}
    rows = [measured("minprefix", 50, **sizes), measured("peft", 700, "14.0", **sizes)]
    few = sizes | {"B": 4}
    rows += [measured("minprefix", 20, **few), measured("many-rows", 30, "1.5", **few)]
    write(tmp_path / "work" / "bench.csv", rows)
    gpu_summary.main(["generate", str(tmp_path), "--work", str(tmp_path / "work")])
    lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert sum("not measured" in line for line in lines) == 2
    assert "generate random B 16 beams 5: ours / peft" in lines[2] and "  ok" in lines[2]
    assert lines[3].endswith("4 5: ours / with PyTorch's products 1.5 >= 1  ok")


def test_the_training_run_is_told_with_its_data(tmp_path: Path, capsys):
    row = {"data": "restaurants", "steps": 2500, "train_seconds": 40, "bleu": 61.5, "seed": 0}
    row |= {"split": "test", "decoding": "greedy", "score_seconds": 3}
    (tmp_path / "work").mkdir()
    add_row(tmp_path / "work" / "e2e.csv", row, ("split",))
    gpu_summary.main(["train", str(tmp_path), "--work", str(tmp_path / "work")])
    out = capsys.readouterr().out
    assert "mini, 2500 steps on restaurants in 40 s: test, greedy: BLEU 61.5 (3 s)" in out
    assert "the kernels other than attention: not measured" in out
    assert read_rows(tmp_path / f"train-{clock.device_name()}.csv")[0]["bleu"] == "61.5"


def test_whole_steps_go_on_after_a_failure_and_stop_in_time(tmp_path: Path, monkeypatch, capsys):
    def run_bench(work, model, device, config):
        done.append((work, model, device, config.batch_size, config.data, config.peers))
        if config.batch_size == "64":
            raise RuntimeError("out of memory")

    done: list[tuple] = []
    monkeypatch.setattr(gpu_steps, "run_bench", run_bench)
    argv = ["train", "--out", str(tmp_path), "--data", "tables"]
    assert gpu_steps.main(argv) == 1
    assert len(done) == len(gpu_steps.RUNS["train"])
    assert [run[3:5] for run in done if run[4]] == [("10", "tables")]
    assert (
        done[-1][5] == "eager,compiled,peft-compiled" and "out of memory" in capsys.readouterr().err
    )
    done.clear()
    assert gpu_steps.main([*argv, "--seconds", "-1"]) == 0 and not done
    assert capsys.readouterr().out.count("not measured") == len(gpu_steps.RUNS["train"])


@pytest.mark.slow
def test_the_training_run_writes_where_it_is_told(tmp_path: Path, monkeypatch):
    """With its settings but for the number of steps, on a few tables."""
    short = dataclasses.replace(e2e.TRAIN["prefix"], steps=1, batch_size=2, eval_pairs=2)
    monkeypatch.setitem(e2e.TRAIN, "prefix", short)
    monkeypatch.setitem(e2e.DECODING, "greedy", GenerationConfig(max_new_tokens=4))
    monkeypatch.setitem(e2e.DECODING, "beam 5", GenerationConfig(max_new_tokens=4, num_beams=5))
    few = {s: load_examples("restaurants", s)[:3] for s in ("train", "dev", "test")}
    monkeypatch.setattr(e2e, "load_examples", lambda data, split: few[split])
    path = tmp_path / "e2e.csv"
    argv = ["prefix", "--data", "restaurants", "--csv", str(path), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["e2e", *argv, "--device", "cpu"])
    committed = (ROOT / "benchmarks" / "e2e.csv").read_bytes()
    e2e.main()
    rows = [(row["split"], row["decoding"], row["data"], row["device"]) for row in read_rows(path)]
    assert rows == [(split, decoding, "restaurants", "cpu") for split, decoding in
                    (("test", "greedy"), ("test", "beam 5"), ("dev", "greedy"))]  # fmt: skip
    assert (ROOT / "benchmarks" / "e2e.csv").read_bytes() == committed


@pytest.mark.slow
@pytest.mark.parametrize("work", ["train", "generate"])
def test_whole_steps_run_on_a_cpu(tmp_path: Path, monkeypatch, tiny_folder, work):
    """The first run of the list with small sizes, through the benchmark to the summary."""
    pytest.importorskip("peft", reason="peft is not installed")
    small = {"batch_size": "2", "prefix_len": "2", "steps": 1, "warm_up": 0, "new_tokens": 2}
    options = gpu_steps.RUNS[work][0][1] | small | {"seq_len": "8", "profile": True}
    monkeypatch.setitem(gpu_steps.RUNS, work, [(str(tiny_folder), options)])
    monkeypatch.setattr(
        gpu_steps, "BenchConfig", lambda **o: peft_run.BenchConfig(**o | {"seconds": 0})
    )
    monkeypatch.setattr(peft_run, "matmul_flops", lambda device, dtype: 1e9)
    monkeypatch.setattr(peft_run, "read_speed", lambda device: 1e9)
    assert gpu_steps.main([work, "--out", str(tmp_path / "work"), "--device", "cpu"]) == 0
    part = "steps" if work == "train" else work
    gpu_summary.main([part, str(tmp_path), "--work", str(tmp_path / "work")])
    methods = {row["method"] for row in read_rows(tmp_path / f"steps-{clock.device_name()}.csv")}
    few = {"many-rows"} if work == "generate" else set()
    assert methods == {"minprefix", "unfused", "peft"} | few
    assert read_rows(tmp_path / f"kernels-{work}-{clock.device_name()}.csv")


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
