"""Makes the counts in RELIABILITY.md: kills, flipped bytes, two processes at once, several ranks.

    python -m tests.reliability                all counts, written to benchmarks/reliability.csv
    python -m tests.reliability --only kills --kills 100 --out kills.csv

Runs train a tiny random model. Their processes are forks of this one, which has imported PyTorch
but computed nothing, so that a fork starts in milliseconds. Read `killed_runs`. Needs Linux.
test_reliability.py makes a few of each; `python -m benchmarks.readme` copies the rows to the page.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # the optimizers need it: imported once, not by each fork
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from conftest import ASSETS, Tokenizer, small_model, tiny_with_words, trainer  # noqa: E402

from benchmarks.machine import add_row, machine  # noqa: E402
from minprefix.cli.main import main as command_line  # noqa: E402
from minprefix.models.weights import save_model  # noqa: E402
from minprefix.prefix.prefix import Prefix  # noqa: E402
from minprefix.training.run_folder import read_log, read_state, state_path  # noqa: E402
from minprefix.training.trainer import Trainer  # noqa: E402

CSV = HERE.parent / "benchmarks" / "reliability.csv"
TOKENIZER = Tokenizer.from_folder(ASSETS / "mini")


def fork(work: Callable[[], object], told: Path) -> int:
    """Start a process that does the work; its id. What it prints goes into the file `told`."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        os.dup2(2, 1)
        code = int(work() or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(pid: int, told: Path) -> bool:
    """Wait for a process; whether it was killed. RuntimeError if it has failed."""
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(told.read_text())
    return os.WIFSIGNALED(status)


# kills ------------------------------------------------------------------------------------------


def go_on(folder: Path) -> None:
    """A run of 16 steps with an MLP, saved after every other one; continued if it has begun."""
    options = {"parametrisation": "mlp", "mid_dim": 8}
    run = trainer(TOKENIZER, folder, steps=16, eval_every=2, samples=0, prefix_options=options)
    run.resume()
    run.run(progress=False)


def computed(pid: int) -> float:
    """CPU seconds of a process, which do not depend on other work."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def left_by(folder: Path) -> dict:
    """The results that equal runs share: losses, weights, moments, and the bytes of the prefix."""
    timed = ("seconds", "tokens_per_s")
    state = read_state(folder)
    moments = state["optimizer"]["state"].values()
    return {
        "log": [{k: x for k, x in line.items() if k not in timed} for line in read_log(folder)],
        "weights": [weight.tolist() for weight in state["trained"].values()],
        "moments": [{name: x.tolist() for name, x in one.items()} for one in moments],
        "prefix": (folder / "prefix.safetensors").read_bytes(),
    }


def killed_runs(kills: int, folder: Path, seed: int = 0) -> dict:
    """Kill training at random moments (SIGKILL), restart it until it ends, and compare.

    Returns:
        kills; the number of killed runs and how many of them differ from an uninterrupted run; how
        often a kill came before the first saved state, and how often it left a partial file.
    """
    rng, told, whole = random.Random(seed), folder / "told", folder / "whole"
    pid = fork(lambda: go_on(whole), told)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    seconds = computed(pid)
    ended(pid, told)
    expected = left_by(whole)
    found = {"kills": 0, "runs": 0, "failures": 0, "before a state": 0, "half written": 0}
    while found["kills"] < kills:
        run, hit, done = folder / f"run{found['runs']}", 0, False
        while not done:
            pid = fork(lambda run=run: go_on(run), told)
            if found["kills"] + hit < kills:
                at = rng.uniform(0, seconds)
                while computed(pid) < at and not os.waitid(
                    os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG
                ):
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.005))  # also while it waits for the disk
                os.kill(pid, signal.SIGKILL)
            done = not ended(pid, told)
            if not done:
                hit += 1
                found["before a state"] += not state_path(run).exists()
                found["half written"] += any(run.rglob(".*.tmp*"))
        found["kills"] += hit
        found["runs"] += hit > 0
        found["failures"] += left_by(run) != expected or any(run.rglob(".*.tmp*"))
        if not hit:  # it ended before it was killed, so another one replaces it
            for path in sorted(run.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
    return found


# flipped bytes ------------------------------------------------------------------------------------


def flipped_bytes(count: int, folder: Path, seed: int = 0) -> dict:
    """Change one byte of a prefix file and of a state, `count` times each; failures: undetected."""
    told = folder / "told"
    ended(fork(lambda: go_on(folder / "run"), told), told)
    (folder / "run" / "state" / "before.pt").unlink()  # it would replace the damaged one
    rng, found = random.Random(seed), {"flips": 0, "failures": 0}
    loaders: dict[Path, Callable] = {
        folder / "run" / "prefix.safetensors": Prefix.load,
        state_path(folder / "run"): lambda path: read_state(folder / "run"),
    }
    for path, load in loaders.items():
        whole = path.read_bytes()
        for _ in range(count):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] ^= rng.randrange(1, 256)
            path.write_bytes(damaged)
            found["flips"] += 1
            try:
                load(path)
                found["failures"] += 1
            except ValueError:
                pass
        path.write_bytes(whole)
        load(path)
    return found


# two processes ------------------------------------------------------------------------------------


def raced(count: int, folder: Path) -> dict:
    """Start train, search and pretrain twice at once, `count` times each.

    failures: both continue, one stops without naming the other, or the log has a step twice. One
    that starts late finds a finished run; pretrain then ends with the same result.
    """
    save_model(tiny_with_words(), TOKENIZER, folder / "model")
    rows = [{"source": f"boat {n}", "target": f"Gull {n} is a green boat."} for n in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("the cat sees the dog. " * 60)
    common = f"--model {folder}/model --data {folder}/data.jsonl --device cpu"
    commands = {
        "train": f"train {common} --steps 30 --prefix-len 2 --eval-every 5",
        "search": f"search {common} --steps 5 --prompt-len 2 --starts 4 --candidates 4",
        "pretrain": f"pretrain {folder}/text --vocab-size 300 --n-positions 16 --n-embd 8 --n-layer"
        " 1 --n-head 2 --batch-tokens 64 --steps 30 --device cpu",
    }
    found = {"pairs": 0, "failures": 0, "named the other": 0, "late": 0}
    for name, words in commands.items():
        for number in range(count):
            argv = [*words.split(), "--out", str(folder / f"{name}{number}")]
            told = [folder / f"told{i}" for i in range(2)]
            pids = [fork(lambda argv=argv: command_line(argv), path) for path in told]
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            said = [path.read_text().splitlines()[-1] for path in told]
            found["pairs"] += 1
            steps = [
                line["step"] for line in read_log(folder / f"{name}{number}") if "loss" in line
            ]
            named = [f"is in use by process {pids[1 - i]} on " in said[i] for i in range(2)]
            late = any("holds a run" in text or "another process has" in text for text in said)
            late |= codes == [0, 0] and name == "pretrain"
            found["named the other"] += any(named)
            found["late"] += late
            ended_well = (sorted(codes) == [0, 1] and (any(named) or late)) or (
                codes == [0, 0] and late
            )
            if not ended_well or len(set(steps)) < len(steps):
                found["failures"] += 1
                print(name, codes, said, flush=True)
    return found


# ranks --------------------------------------------------------------------------------------------


def rank_of(rank: int, count: int, dtype: torch.dtype, folder: Path) -> None:
    """Train as one of `count` ranks (gloo); the first rank writes its measures to sums.json."""
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=count)
    sent: list[int] = []
    reduce, step = dist.all_reduce, Trainer.step

    def counted(tensor, *args, **kwargs):
        sent[-1:] = [sent[-1] + tensor.nbytes] if sent else []
        return reduce(tensor, *args, **kwargs)

    def counted_step(self):
        sent.append(0)
        return step(self)

    dist.all_reduce, Trainer.step = counted, counted_step
    run = trainer(
        TOKENIZER, folder / "run", model=small_model(dtype), steps=12, eval_every=4,
        batch_size=1, accumulation=6 // count, log_every=12, samples=0,
    )  # fmt: skip
    run.log_every = 1
    evaluate = run.evaluate

    def evaluated():  # sums of an evaluation do not belong to the step before it
        before = list(sent)
        evaluate()
        sent[:] = before

    run.evaluate = evaluated
    run.run(progress=False)
    if run.ranks.first:
        trained = sum(weight.nbytes for weight in run.trained.parameters())
        (folder / "sums.json").write_text(json.dumps({"sent": sent[:-1], "trained": trained}))
    dist.destroy_process_group()


def ranks(count: int, dtype: torch.dtype, folder: Path) -> dict:
    """The same steps on `count` ranks and on one.

    Returns:
        the largest relative difference of a training or dev loss; bytes that each rank contributes
        to sums in a step, except the flags of the loop; bytes of the trained weights.
    """
    runs = []
    for n in (1, count):
        place = folder / f"{n} beside {count}, {dtype}"
        place.mkdir()
        told = [place / f"told{rank}" for rank in range(n)]
        pids = [
            fork(lambda r=r, n=n, place=place: rank_of(r, n, dtype, place), told[r])
            for r in range(n)
        ]
        for pid, path in zip(pids, told, strict=True):
            ended(pid, path)
        runs.append(read_log(place / "run"))
    both = [(a, b) for a, b in zip(*runs, strict=True)]
    gaps = [abs(a[k] - b[k]) / abs(a[k]) for a, b in both for k in ("loss", "dev_loss") if k in a]
    sums = json.loads((place / "sums.json").read_text())
    return {"losses": len(gaps), "difference": max(gaps), **sums}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["kills", "flips", "races", "ranks"])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--flips", type=int, default=200, help="of each kind of file")
    parser.add_argument("--races", type=int, default=10, help="of each command")
    parser.add_argument("--out", type=Path, default=CSV)
    args = parser.parse_args()
    torch.set_num_threads(1)
    here = {name: machine()[name] for name in ("torch", "commit")}

    def note(what: str, cases: int, failures: int, more: str) -> None:
        row = {"what": what, "cases": cases, "failures": failures, "more": more}
        add_row(args.out, row | here, ("what",))
        print(row, flush=True)

    with tempfile.TemporaryDirectory() as name:
        for part in args.only:
            folder = Path(name, part)
            folder.mkdir()
            if part == "kills":
                found = killed_runs(args.kills, folder)
                more = (
                    f"{found['runs']} runs; {found['before a state']} kills before the first saved "
                    f"state, {found['half written']} with a file half written"
                )
                note(
                    "training killed (SIGKILL) and resumed", found["kills"], found["failures"], more
                )
            elif part == "flips":
                found = flipped_bytes(args.flips, folder)
                more = "half in a prefix file, half in a state"
                note("one byte changed", found["flips"], found["failures"], more)
            elif part == "races":
                found = raced(args.races, folder)
                more = (
                    f"train, search and pretrain; {found['named the other']} named the other, "
                    f"{found['late']} came after it had ended"
                )
                note("two processes on one folder", found["pairs"], found["failures"], more)
            else:
                for count in (2, 3):
                    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
                        found = ranks(count, dtype, folder)
                        kind = str(dtype)[6:]
                        more = (
                            f"largest relative difference {found['difference']:.1e}; "
                            f"{max(found['sent'])} bytes to sum in a step, "
                            f"{found['trained']} bytes trained"
                        )
                        what = f"{count} ranks against one process, {kind}"
                        note(what, found["losses"], int(found["difference"] > bound), more)


if __name__ == "__main__":
    main()
