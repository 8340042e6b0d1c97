"""Many runs on several processes: each worker takes the next run that nobody has.

Read `work` (what a worker does) and `run_all`. A run is taken with the lock on its folder, which
the system releases when a process ends however it ends: nothing is left behind by
a kill, and two commands on the same folder share the work. A run that fails leaves its reason and
the others go on; the next command tries it again.
"""

import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.paper.run import Run, execute, failure_of, record_of
from minprefix.files import write_text
from minprefix.training.interrupts import Interrupted
from minprefix.training.lock import FolderInUse, alone_in


def settled(folder: Path) -> bool:
    """Whether the run is finished or has failed."""
    return (folder / "scores.json").exists() or (folder / "failure.json").exists()


def attempt(run: Run, folder: Path, data_dir: Path | None, device: str) -> None:
    """Execute the run; an error becomes failure.json."""
    try:
        execute(run, folder, data_dir, device)
    except KeyboardInterrupt:
        raise
    except Exception as error:  # whatever it is, the other runs go on
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        write_text(folder / "failure.json", json.dumps({"reason": reason}) + "\n")
    gc.collect()  # the model, before the next one is loaded


def work(
    runs: Sequence[Run], root: Path, data_dir: Path | None, device: str,
    done: Callable[[Run], object] = lambda run: None,
) -> None:  # fmt: skip
    """Take one run after the other until all are settled, at last waiting for those of others.

    Raises:
        Interrupted: Ctrl-C, the state of the run is saved.
    """
    for wait in (False, True):
        for run in runs:
            folder = root / run.id
            if settled(folder):
                continue
            with suppress(FolderInUse), alone_in(folder, wait):
                if not settled(folder):
                    attempt(run, folder, data_dir, device)
                    done(run)


def work_alone(runs, root: Path, data_dir: Path | None, device: str, threads: int) -> None:
    """`work` in a process of its own; it stops with its parent, and prints no progress."""
    os.setpgid(0, 0)  # Ctrl-C reaches the parent, which passes it on once
    parent = os.getppid()

    def check(run: Run) -> None:
        if os.getppid() != parent:
            raise Interrupted("the command that started this process is gone")

    torch.set_num_threads(threads)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    try:
        work(runs, root, data_dir, device, check)
    except KeyboardInterrupt:
        sys.exit(130)


def free_gpus() -> list[str]:
    """The GPUs that this process may use and that no other computes on, by number.

    Every one of them if the driver's tool is not there to ask, or if all are busy.
    """
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",")[:count] if visible else [str(i) for i in range(count)]
    if not names or shutil.which("nvidia-smi") is None:
        return names

    def ask(query: str) -> list[list[str]]:
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        return [[cell.strip() for cell in line.split(",")] for line in lines]

    busy = {uuid for (uuid, *_) in ask("--query-compute-apps=gpu_uuid")}
    taken = {row[0] for row in ask("--query-gpu=index,uuid") if row[-1] in busy} | busy
    return [name for name in names if name not in taken] or names


def run_all(
    runs: Sequence[Run], root: Path, data_dir: Path | None, device: str, jobs: int,
    gpus: Sequence[str], done: Callable[[Run], object],
) -> None:  # fmt: skip
    """Settle all runs with `jobs` processes; `done` is called for each that is newly settled.

    Args:
        jobs: 1 = in this process. Else worker i computes on gpus[i % n], or on its part of the
            CPU's threads.
    Raises:
        Interrupted: Ctrl-C; every worker has saved its state.
    """
    for run in runs:
        (root / run.id / "failure.json").unlink(missing_ok=True)
    if jobs == 1:
        work(runs, root, data_dir, device, done)
        return
    workers = start(jobs, runs, root, data_dir, device, gpus)
    waiting = {run.id: run for run in runs if not settled(root / run.id)}
    try:
        while any(worker.is_alive() for worker in workers):
            time.sleep(0.2)
            for name in [name for name in waiting if settled(root / name)]:
                done(waiting.pop(name))
    except KeyboardInterrupt:
        for worker in workers:
            if worker.is_alive():
                os.kill(worker.pid, signal.SIGINT)
        for worker in workers:
            worker.join()
        raise Interrupted("stopped; every run has saved its state") from None
    for run in waiting.values():
        folder = root / run.id
        if not settled(folder):  # a process that was killed, by the system for its memory perhaps
            codes = sorted({worker.exitcode for worker in workers if worker.exitcode})
            reason = f"its process ended with exit code {', '.join(map(str, codes)) or 'unknown'}"
            folder.mkdir(parents=True, exist_ok=True)  # where no process came to take the run
            write_text(folder / "failure.json", json.dumps({"reason": reason}) + "\n")
        done(run)


def start(jobs: int, runs, root: Path, data_dir, device: str, gpus: Sequence[str]) -> list:
    """Worker processes; a new one has its GPU and its threads from the environment."""
    threads = max(1, torch.get_num_threads() // (jobs if device == "cpu" else 1))
    context = multiprocessing.get_context("spawn")
    before = dict(os.environ)
    workers = []
    try:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        for number in range(jobs):
            if gpus:
                os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
            args = (list(runs), root, data_dir, device, threads)
            worker = context.Process(target=work_alone, args=args, daemon=True)
            worker.start()
            workers.append(worker)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return workers


def problem_of(run: Run, root: Path) -> str:
    """Why a run has no scores; "" if it has."""
    folder = root / run.id
    if record_of(folder) is not None:
        return ""
    return failure_of(folder) or "not finished"
