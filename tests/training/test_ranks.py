"""Training on several processes: torchrun, a killed worker, two machines, communication."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import pairs, small_model
from test_training import log_of

from minprefix.models.weights import save_model

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
TABLE = (
    2 * 2 * 16 * 4
)  # bytes of a position of the prefix of `small_model`: L 2, keys and values, C


@pytest.fixture
def train(tokenizer, tmp_path) -> list[str]:
    """The command, but for --out, steps and what a pass reads."""
    save_model(small_model(), tokenizer, tmp_path / "model")
    lines = [{"source": e.source, "target": e.targets[0]} for e in pairs(10)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--model", tmp_path / "model", "--data", data, "--device", "cpu", "--log-every", 1,
               "--lr", 0.01, "--parametrisation", "table", "--samples", 0, "--precision", "fp32",
               "--json"]  # fmt: skip
    return ["-m", "minprefix", "train", *map(str, options)]


def worker(rank: int) -> int | None:
    """The process of torchrun with this rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"MINPREFIX_TEST=%d" % os.getpid() in environment and b"RANK=%d" % rank in environment:
            return int(folder.name)
    return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for a worker in /proc")
def test_a_killed_worker_is_restarted_and_nothing_changes(cli, train, tmp_path):
    """Two ranks, one of them killed in the middle, against one process with twice the accumulation.

    Bit for bit: each sum has two terms, and a + b is b + a. The dev loss is of other batches: fp32
    rounding (worst difference seen 1.2e-7, and the budget is eight times that).
    """
    train += ["--batch-size", "2", "--steps", "60", "--eval-every", "5"]
    alone, both = tmp_path / "alone", tmp_path / "both"
    cli(*train[2:], "--accumulation", 2, "--out", alone)
    words = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", *train]
    process = subprocess.Popen(
        [*words, "--out", str(both)], cwd=ROOT,
        env=ENV | {"MINPREFIX_TEST": str(os.getpid()), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (both / "state" / "before.pt").exists():  # two states were saved
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    os.kill(worker(1), signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["steps"] == 60  # one rank speaks
    assert "continuing after step" in err
    assert log_of(both) == log_of(alone)
    dev = [log_of(folder, "dev_loss") for folder in (both, alone)]
    assert dev[0] == pytest.approx(dev[1], rel=1e-6) and len(dev[0]) == 13
    files = [(folder / "prefix.safetensors").read_bytes() for folder in (both, alone)]
    assert files[0] == files[1]


def test_a_restart_goes_on_with_its_own_run_only(cli, train, tmp_path, monkeypatch):
    words, out = [*train[2:], "--batch-size", 2, "--steps", 2], ["--out", tmp_path / "run"]
    cli(*words, *out)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    _, err = cli(*words, *out)
    assert "continuing after step 2" in err
    for other in (["--seed", 1], ["--accumulation", 2], ["--prefix-len", 2]):
        assert "already holds a run" in cli(*words, *other, *out, code=1)[1]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert "already holds a run" in cli(*words, *out, code=1)[1]


# two network namespaces, each with one end of a cable


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def cable() -> Iterator[list[str]]:
    """The names of two network namespaces, 10.99.22.1 and 10.99.22.2; nothing else is reachable."""
    names = [f"minprefix-{os.getpid()}-{i}" for i in range(2)]
    if shutil.which("ip") is None:
        pytest.skip("two network namespaces need the program ip")
    try:
        for name in names:
            ip("netns", "add", name)
        ends = ("type", "veth", "peer", "name", "cable", "netns", names[1])
        ip("link", "add", "cable", "netns", names[0], *ends)
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.99.22.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        pytest.skip(f"network namespaces cannot be made: {error.stderr.strip()}")
    yield names
    for name in names:
        ip("netns", "del", name)


def sent(name: str) -> int:
    """Bytes that went over the cable from and to a namespace."""
    (link,) = json.loads(ip("-n", name, "-j", "-s", "link", "show", "cable"))
    return link["stats64"]["tx"]["bytes"] + link["stats64"]["rx"]["bytes"]


@pytest.mark.slow
def test_two_machines_send_twice_the_bytes_of_what_is_trained(cli, train, cable, tmp_path):
    """One worker in each namespace, and the same steps by one process."""
    steps, P, started = 60, 64, []
    words = [*train, "--batch-size", 1, "--prefix-len", P, "--steps", steps]
    for rank, name in enumerate(cable):
        here = ["--nnodes", 2, "--node-rank", rank, "--nproc-per-node", 1, "--master-addr"]
        inside = ["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=cable", *TORCHRUN]
        command = [*inside, *here, "10.99.22.1", *words, "--out", tmp_path / "both"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([str(w) for w in command], env=ENV, cwd=ROOT, **pipes))
    for process in started:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    per_step, trained = sent(cable[0]) / steps, TABLE * P
    cli(*words[2:], "--accumulation", 2, "--out", tmp_path / "alone")
    assert log_of(tmp_path / "both") == log_of(tmp_path / "alone")
    # headers, answers and the start of the processes come to 0.33 of what is trained
    print(f"{per_step:.0f} bytes a step on the wire, {trained} trained")
    assert 2 * trained < per_step < 2.7 * trained
