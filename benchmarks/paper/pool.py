"""Runs many runs on several processes: each worker takes the next run that is not taken.

Read `work` (the loop of a worker) and `run_all`. A worker takes a run by locking its folder. The
system releases the lock however the process ends, so a killed process leaves no lock, and two
commands on the same folder share the work. A failed run writes its reason, and the others continue;
the next command tries it again.
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
    except Exception as error:  # whatever the error is, the other runs continue
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        write_text(folder / "failure.json", json.dumps({"reason": reason}) + "\n")
    gc.collect()  # free the model before the next one is loaded


def work(
    runs: Sequence[Run], root: Path, data_dir: Path | None, device: str,
    done: Callable[[Run], object] = lambda run: None,
) -> None:  # fmt: skip
    """Take one run after the other until all are settled; finally wait for those of others.

    Raises:
        Interrupted: Ctrl-C; the state of the run is saved.
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
    """`work` in a separate process, which stops with its parent and prints no progress."""
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
    """The numbers of the GPUs that this process may use and that no other process is using.

    All of them if the driver's tool is missing, or if all are busy.
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
    """Settle all runs with `jobs` processes; calls `done` for each run that gets settled.

    Args:
        jobs: 1 = in this process. Otherwise worker i uses gpus[i % n], or its share of the CPU's
            threads.
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
        if not settled(folder):  # its process was killed, perhaps by the system for its memory
            codes = sorted({worker.exitcode for worker in workers if worker.exitcode})
            reason = f"its process ended with exit code {', '.join(map(str, codes)) or 'unknown'}"
            folder.mkdir(parents=True, exist_ok=True)  # missing if no process has taken the run
            write_text(folder / "failure.json", json.dumps({"reason": reason}) + "\n")
        done(run)


def start(jobs: int, runs, root: Path, data_dir, device: str, gpus: Sequence[str]) -> list:
    """Start worker processes, whose GPU and number of threads are set in their environment."""
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
