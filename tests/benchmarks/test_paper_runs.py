"""`python -m benchmarks.paper` from its runs to CSV, figure and claims, on a tiny model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.machine import machine
from benchmarks.paper import pool
from benchmarks.paper.experiments import (
    TABLE1,
    TABLE1_MINI,
    TABLE4,
    figure3,
    figure6,
    table1,
    table3,
    table4,
)
from benchmarks.paper.presets import Plan
from benchmarks.paper.results import read_rows
from benchmarks.paper.run import Run, failure_of, record_of, why_missing
from minprefix.models.weights import load, save_model
from minprefix.training.config import TrainConfig
from minprefix.training.lock import alone_in
from tests.conftest import tiny_with_words
from tests.paper_data import write_e2e, write_webnlg

CHANGING = ("train_seconds", "decode_seconds", "threads")  # what runs need not share


@pytest.fixture(autouse=True)
def without_meteor(monkeypatch):
    """METEOR starts a Java program for each score."""
    monkeypatch.setenv("MINPREFIX_METEOR", "/nowhere/meteor.jar")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_e2e(folder / "e2e")
    write_webnlg(folder / "webnlg")
    return folder


@pytest.fixture
def options(tiny_folder, data_dir, tmp_path) -> list[str]:
    words = ["--quick", "--steps", 3, "--model", tiny_folder, "--data-dir", data_dir]
    return [str(word) for word in [*words, "--device", "cpu", "--runs", tmp_path / "runs"]]


def unscored(rows: list[dict], *columns: str) -> list[tuple[str, str]]:
    """Names and problems of the rows that have no score in one of the columns."""
    columns = columns or ("BLEU",)
    return [(r["name"], r["problem"]) for r in rows if not all(r[name] for name in columns)]


def steady(path: Path) -> list[dict]:
    """The rows of a CSV without what runs need not share."""
    rows = read_rows(path)
    return [{k: v for k, v in row.items() if k not in CHANGING} for row in rows]


@pytest.mark.slow
def test_table4_gives_rows_figure_claims_and_report_and_is_not_run_twice(paper, options, tmp_path):
    out, err = paper("table4", *options)
    results = tmp_path / "runs" / "results"
    rows = read_rows(results / "table4-tiny-quick.csv")
    assert [row["name"] for row in rows] == list(TABLE4)
    assert unscored(rows) == []
    assert {row["commit"] for row in rows} == {machine()["commit"]}  # empty without git
    assert min(float(row["lr"]) for row in rows if row["method"] != "search") > 0
    assert {row["scale"] for row in rows} == {"quick, 3 steps"} and rows[0]["tables"] == "6"
    by = {row["name"]: row for row in rows}
    assert by["EMB-20"]["prefix_len"] == "20" and by["DISCRETE"]["trained"] == "0"
    assert (results / "table4-tiny-quick.png").read_bytes().startswith(b"\x89PNG")
    assert out.count("Table 4") >= 2 and "about" in err and "METEOR is left out" in err
    report = (results / "RESULTS.md").read_text()
    assert "paper 62.2" in report and "table4-tiny-quick.png" in report
    again = (results / "table4-tiny-quick.csv").read_bytes()
    _, err = paper("table4", *options)
    assert f"{len(TABLE4)} of them are done" in err and "to go" not in err
    assert (results / "table4-tiny-quick.csv").read_bytes() == again


@pytest.mark.slow
def test_table1_in_parts(paper, options, tmp_path):
    """On WebNLG without DART, then on E2E alone, then with a --data-dir that has nothing: finished
    rows stay."""
    path = tmp_path / "runs" / "results" / "table1-tiny-quick.csv"
    out, err = paper("table1", *options, "--only", "webnlg", "dart")
    rows = read_rows(path)
    assert [row["name"] for row in rows] == [*TABLE1, *TABLE1]
    done, lost = ([row for row in rows if row["data"] == name] for name in ("webnlg", "dart"))
    assert unscored(done, "BLEU S", "BLEU U", "BLEU A") == []
    counts = {row["name"]: int(row["trained"]) for row in done}
    assert counts["FT-FULL"] > counts["FT-TOP2"] > counts["ADAPTER (0.1%)"]
    assert {row["problem"] for row in lost} == {"not tested: dart is not available"}
    assert "not tested: dart is not available" in err and "DART" in out
    _, err = paper("table3", *options)  # the same runs
    assert f"{len(TABLE1)} of them are done" in err and "to go" not in err
    assert not list((tmp_path / "runs").glob("*finetune*/model")), "weights are deleted"
    assert not list((tmp_path / "runs").glob("*/state"))

    paper("table1", *options, "--only", "e2e")
    both = [row for row in read_rows(path) if row["data"] != "dart"]
    assert [row["data"] for row in both] == ["e2e"] * len(TABLE1) + ["webnlg"] * len(TABLE1)
    scores = [row["BLEU A"] for row in done]
    assert [row["BLEU A"] for row in both[len(TABLE1) :]] == scores
    (tmp_path / "empty").mkdir()
    paper("table1", *options, "--data-dir", tmp_path / "empty", "--only", "webnlg", "dart")
    after = [row for row in read_rows(path) if row["data"] == "webnlg"]
    assert [row["BLEU A"] for row in after] == scores
    assert {row["problem"] for row in after} == {""}
    _, err = paper("table4", *options, "--only", "webnlg", code=1)
    assert "table4 has no runs on webnlg" in err
    assert not path.with_name("table4-tiny-quick.csv").exists()


@pytest.mark.slow
def test_a_run_of_other_weights_or_data_is_not_taken_for_finished(paper, tmp_path, tiny_folder):
    """The same command, over a model or data that changed in its place."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    write_e2e(tmp_path / "data" / "e2e")
    words = ["--quick", "--steps", 2, "--device", "cpu", "--runs", tmp_path / "runs"]
    words += ["--model", tmp_path / "model", "--data-dir", tmp_path / "data"]
    paper("figure3", *words)
    model, tokenizer = load(tmp_path / "model")
    with torch.no_grad():
        model.wte.weight *= 1.5
    shutil.move(tmp_path / "model", tmp_path / "before")
    save_model(model, tokenizer, tmp_path / "model")
    _, err = paper("figure3", *words, code=1)
    assert "is a finished run with other weights: give another --runs" in err
    shutil.rmtree(tmp_path / "model")
    shutil.move(tmp_path / "before", tmp_path / "model")
    _, err = paper("figure3", *words)
    assert "4 of them are done" in err
    path = tmp_path / "data" / "e2e" / "trainset.csv"
    path.write_text(path.read_text().replace("serves", "sells"))
    _, err = paper("figure3", *words, code=1)
    assert "is a finished run with other data" in err


def test_what_all_runs_need_is_said_once_before_the_first(paper, options, tmp_path):
    rest = ["--data-dir", tmp_path, "--runs", tmp_path / "runs"]
    _, err = paper("table4", *options, *rest, "--model", "mini-bart", code=1)
    assert "for GPT-2 only" in err and not list((tmp_path / "runs").glob("*/failure.json"))
    _, err = paper("table4", *options, "--model", tmp_path / "none", code=1)
    assert err.count("none") == 1
    _, err = paper("table4", *options, "--data-dir", tmp_path / "none", code=1)
    assert "there is no such folder" in err


@pytest.mark.slow
def test_rows_with_scores_are_not_lost(paper, options, tmp_path, monkeypatch):
    """To fewer seeds, to a --runs folder without them where all fails, or to other settings."""
    path = tmp_path / "results" / "figure3-tiny-quick.csv"
    words = [*options, "--out", tmp_path / "results"]
    paper("figure3", *words, "--seeds", 2)
    two = read_rows(path)
    assert len(two) == 8 and unscored(two) == []
    paper("figure3", *words)
    assert sorted(row["run"] for row in read_rows(path)) == sorted(row["run"] for row in two)

    def fails(*_):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(pool, "execute", fails)
        _, err = paper("figure3", *words, "--runs", tmp_path / "other", code=1)
    assert "4 runs failed: figure3: OSError: the disk is full" in err
    assert sorted(row["run"] for row in read_rows(path)) == sorted(row["run"] for row in two)
    assert unscored(read_rows(path)) == []
    _, err = paper("figure3", *words, "--steps", 2)
    assert "8 rows of" in err and "kept as figure3-tiny-quick.csv.1" in err
    kept = read_rows(path.with_suffix(".csv.1"))
    assert {row["run"] for row in two} <= {row["run"] for row in kept}
    assert len(read_rows(path)) == 4


@pytest.mark.slow
def test_figure3_killed_and_gone_on_with_gives_the_rows_of_an_unbroken_one(
    paper, options, tmp_path
):
    long = [*options, "--steps", "60"]
    command = [sys.executable, "-m", "benchmarks.paper", "figure3", *long]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    runs = tmp_path / "runs"
    for _ in range(6000):  # until a run is finished and the next has saved a state
        if list(runs.glob("*/scores.json")) and list(runs.glob("*/state/state.pt")):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.read_bytes() for path in runs.glob("*/scores.json")}
    assert 1 <= len(kept) < 4, "killed in the middle"
    paper("figure3", *long)
    assert {path: path.read_bytes() for path in kept} == kept, "not run again"
    name = "results/figure3-tiny-quick.csv"
    whole = [*long[:-4], "--runs", str(tmp_path / "whole"), "--steps", "60"]
    paper("figure3", *whole)
    assert steady(runs / name) == steady(tmp_path / "whole" / name)


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(paper, options, tmp_path):
    paper("figure3", *options)
    both = [*options[:-1], str(tmp_path / "both"), "--jobs", "2"]
    paper("figure3", *both)
    name = "results/figure3-tiny-quick.csv"
    one, two = steady(tmp_path / "runs" / name), steady(tmp_path / "both" / name)
    assert one == two and unscored(one) == []


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_which_save(options, tmp_path):
    words = [*options, "--steps", "100000", "--jobs", "2"]
    command = [sys.executable, "-m", "benchmarks.paper", "figure3", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    runs = tmp_path / "runs"
    try:
        for _ in range(6000):
            if len(list(runs.glob("*/state/state.pt"))) == 2:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    except BaseException:  # its workers would go on for hours
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 130 and "Run the same command to continue" in err
    for lock in runs.glob("*/.lock"):
        with alone_in(lock.parent):  # no process has it any more
            pass
    assert len(list(runs.glob("*/state/state.pt"))) == 2 and not list(runs.glob("*/scores.json"))


def runs_of(n: int) -> list[Run]:
    return [Run("e2e", "mini", TrainConfig(seed=seed)) for seed in range(n)]


@pytest.mark.slow
def test_two_workers_never_take_the_same_run(monkeypatch, tmp_path):
    taken = []

    def execute(run, folder, data_dir, device):
        taken.append(run.id)
        time.sleep(0.01)  # long enough for the other worker to come by
        (folder / "scores.json").write_text("{}")

    monkeypatch.setattr(pool, "execute", execute)
    runs = runs_of(12)
    workers = [
        threading.Thread(target=pool.work, args=(runs, tmp_path, None, "cpu")) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(taken) == sorted(run.id for run in runs)


def test_a_run_that_another_process_has_is_waited_for(monkeypatch, tmp_path):
    (run,) = runs_of(1)
    monkeypatch.setattr(pool, "execute", lambda *_: pytest.fail("the other one has done it"))
    with alone_in(tmp_path / run.id):
        worker = threading.Thread(target=pool.work, args=([run], tmp_path, None, "cpu"))
        worker.start()
        time.sleep(0.05)
        assert worker.is_alive()
        (tmp_path / run.id / "scores.json").write_text("{}")
    worker.join(timeout=10)
    assert not worker.is_alive() and not (tmp_path / run.id / "failure.json").exists()


def test_a_process_that_dies_before_its_first_run_is_named(monkeypatch, tmp_path):
    """Killed by the system for its memory, say: no folder is there yet."""
    dead = SimpleNamespace(is_alive=lambda: False, exitcode=-9)
    monkeypatch.setattr(pool, "start", lambda *_: [dead, dead])
    (run,) = runs_of(1)
    named = []
    pool.run_all([run], tmp_path / "runs", None, "cpu", 2, [], named.append)
    assert named == [run]
    assert failure_of(tmp_path / "runs" / run.id) == "its process ended with exit code -9"


@pytest.mark.slow
def test_a_failed_run_is_a_row_and_is_tried_again(paper, options, tmp_path, monkeypatch):
    execute = pool.execute

    def fails(run, *args):
        if run.method == "finetune" and run.size == 50:
            raise FloatingPointError("the loss is nan\nafter step 2")
        return execute(run, *args)

    monkeypatch.setattr(pool, "execute", fails)
    _, err = paper("figure3", *options, code=1)
    assert "1 runs failed" in err and "FloatingPointError: the loss is nan after step 2" in err
    path = tmp_path / "runs" / "results" / "figure3-tiny-quick.csv"
    rows = read_rows(path)
    assert [bool(row["problem"]) for row in rows] == [True, False, False, False]
    assert unscored(rows) == [(rows[0]["name"], rows[0]["problem"])]
    monkeypatch.setattr(pool, "execute", execute)
    _, err = paper("figure3", *options)
    assert "3 of them are done" in err
    assert {row["problem"] for row in read_rows(path)} == {""}


def test_an_interrupted_command_says_that_it_goes_on(paper, options, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "execute", stopped)
    _, err = paper("figure3", *options, code=130)
    assert "Run the same command to continue" in err


def test_names_are_digests_of_the_whole_definition():
    plan = Plan(seeds=(0, 1))
    names = {cell.run.id for cell in table1(plan)}
    assert len(names) == len(table1(plan)) == 3 * len(TABLE1_MINI) * 2
    assert {cell.run.id for cell in table3(plan)} < names
    assert len({c.run.id for c in table4(plan)} & names) == 2, "PREFIX of both tables is one run"
    assert len({c.run.id for c in figure6(plan)} & names) == 4, "all of the data"
    (a, b) = (Plan(precision=p).run("e2e", "PREFIX", 0) for p in ("fp32", "bf16"))
    assert a.id != b.id and a.id == Plan(precision="fp32").run("e2e", "PREFIX", 0).id
    few = figure3(Plan())
    assert len(few) == 4 * 2 * 5 * 2 == len({cell.run.id for cell in few})


@pytest.mark.slow
def test_quick_looks_around_without_any_data(paper, tokenizer, tmp_path, monkeypatch):
    """The embedded tables, named as what they are."""
    save_model(tiny_with_words(n_positions=256), tokenizer, tmp_path / "tiny")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["--quick", "--steps", "2", "--model", tmp_path / "tiny", "--runs", tmp_path / "runs"]
    _, err = paper("figure3", *words, "--device", "cpu", "--json")
    assert "the embedded restaurant tables stand in" in err
    rows = read_rows(tmp_path / "runs" / "results" / "figure3-tiny-quick.csv")
    assert {row["data"] for row in rows} == {"restaurants"} and unscored(rows) == []


@pytest.mark.parametrize("option", ["--seeds", "--steps", "--jobs", "--subsets"])
def test_numbers_that_make_no_sense_are_named(paper, options, option):
    _, err = paper("table4", *options, option, "0", code=1)
    assert f"{option} must be at least 1, got 0" in err


def test_a_name_that_is_no_data_set_is_named(paper, options):
    _, err = paper("table1", *options, "--only", "xsum", code=1)
    assert "got xsum" in err


@pytest.mark.slow
def test_texts_are_kept_for_every_table(paper, options, tmp_path):
    paper("figure3", *options)
    (folder,) = (tmp_path / "runs").glob("e2e-prefix6-n50*")
    lines = [json.loads(line) for line in (folder / "texts.jsonl").read_text().splitlines()]
    assert len(lines) == record_of(folder)["tables"] == 6
    assert {"source", "text"} == set(lines[0])
    record = record_of(folder)
    assert record["pairs"] == 50 and record["dev_pairs"] == 15 and record["steps"] == 3


def test_data_without_a_training_split_is_missing(tmp_path):
    (tmp_path / "dart").mkdir()
    (tmp_path / "dart" / "dart-v1-dev.json").write_text("[]")
    assert why_missing("dart", tmp_path) == "the train split of dart is not available"
    assert why_missing("webnlg", tmp_path) == "webnlg is not available"
    assert why_missing("restaurants", tmp_path) == ""
