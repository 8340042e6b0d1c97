"""The benchmark: times training steps and generation, and transformers + PEFT if installed.

    python -m benchmarks.peft train --model random-medium --batch-size 10,64 --seq-len 128
    python -m benchmarks.peft generate --batch-size 1,16 --num-beams 1,5

Every method gets the same weights, batches, labels and dtype (`peers.py`). Results are first
compared with the plain model in fp64: the loss and gradient norm of a training step, the tokens of
a text. If ours is wrong, the command fails; if a peer is wrong, its row says so. Then blocks of
calls are timed in turn, so that other work on the machine affects all methods equally.

`limits.py` has the least cost of the work and the limits of the machine, for `percent`.
Read `BenchConfig`, `alternate`, `measure_train`, `measure_texts`, then `run_bench`.
"""

import importlib.metadata
import importlib.util
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path

import torch

from benchmarks.peft.limits import Peak, decode_limit, matmul_flops, read_speed, train_flops
from benchmarks.peft.peers import (
    DTYPES,
    SWITCHES,
    Numbers,
    Ours,
    OurTexts,
    Peft,
    PeftTexts,
    PlainSteps,
    Task,
    check_steps,
    check_texts,
    first_steps,
)
from benchmarks.peft.results import Results
from benchmarks.peft.traces import wait
from minprefix.checks import check_choice
from minprefix.data.batches import Encoded
from minprefix.data.examples import Example
from minprefix.data.load import load_examples
from minprefix.models import weights
from minprefix.models.config import GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.prefix.prefix import Prefix

RANDOM = {  # random weights of official sizes: layers, heads, width
    "random-gpt2": (12, 12, 768),
    "random-medium": (24, 16, 1024),
    "random-large": (36, 20, 1280),
}
OURS = ("compiled", *SWITCHES)  # this library in other ways
PEERS = ("none", *OURS, "peft", "peft-compiled", "peft-shuffled")
BOTH = {"none", "peft", *SWITCHES}  # for training and generation alike


@dataclass(frozen=True)
class BenchConfig:
    """What `bench` measures. Lists have commas, 1,8,32; each combination is one measurement."""

    dtype: str = "auto"  # "fp32", "bf16", "auto" = bf16 on CUDA and fp32 on a CPU
    batch_size: str = "10"  # B, rows of a step or prompts of a call; a list
    seq_len: str = "128"  # T, tokens of a row, or of a prompt; a list
    prefix_len: str = "10"  # P; a list
    mlp: bool = True  # train: the prefix comes out of an MLP (PEFT: prefix_projection)
    labels: str = "all"  # train: loss at "all" positions, or at "targets", the second half of each
    data: str | None = None  # train: batches of real tables, as `train --data` makes them
    num_beams: str = "1"  # generate: 1 = greedy; a list
    new_tokens: int = 64  # generate: of each text
    warm_up: int = 2  # train: steps of each method before those that are timed
    steps: int = 3  # blocks of calls of each method, at least
    seconds: float = 5.0  # of each method in a measurement, at least
    peers: str = "peft"  # "none", "peft", ours by SWITCHES; train: all of PEERS; a list
    profile: bool = False  # where the time of a step or a token goes, of the first combination
    out: Path = Path("runs/bench")  # folder for bench.csv, its picture, and those of a profile

    def __post_init__(self):
        check_choice("dtype", self.dtype, ("auto", "fp32", "bf16"))
        check_choice("labels", self.labels, ("all", "targets"))
        for name, low in (("batch_size", 1), ("seq_len", 4), ("prefix_len", 1), ("num_beams", 1)):
            numbers(name, getattr(self, name), low)
        for peer in self.peers.split(","):
            check_choice("peers", peer, PEERS)
        for name, low in (("new_tokens", 1), ("steps", 1), ("warm_up", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if not 0 <= self.seconds < math.inf:
            raise ValueError(f"seconds must be >= 0 and finite, got {self.seconds}")


def numbers(name: str, text: str, low: int) -> list[int]:
    """The numbers of a list such as 1,8,32; ValueError for anything else."""
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < low:
        raise ValueError(
            f"{name} must be whole numbers >= {low} with commas between them, got {text!r}"
        )
    return found


# time ------------------------------------------------------------------------------------------


def alternate(
    methods: dict[str, Callable[[], object]], config: BenchConfig, device: str
) -> tuple[dict[str, list[float]], int]:
    """Seconds per call of each method in each block, and the number of calls in a block.

    On a CPU a block has one call. On a GPU it has enough calls for a fifth of a second, unless the
    slowest method would then need more than one second; as in training, it ends with a single wait.
    The methods run in turn and make the same calls.
    """

    def turn(size: int) -> dict[str, float]:
        seconds = {}
        for name, call in methods.items():
            wait(device)
            start = time.perf_counter()
            for _ in range(size):
                call()
            wait(device)
            seconds[name] = (time.perf_counter() - start) / size
        return seconds

    size = 1
    if device.startswith("cuda"):
        once = turn(1).values()
        size = max(1, min(math.ceil(0.2 / min(once)), int(1 / max(once))))
    turns, began = [], time.perf_counter()
    while len(turns) < config.steps or (
        time.perf_counter() - began < config.seconds * len(methods)
    ):
        turns.append(turn(size))
    return {name: [seconds[name] for seconds in turns] for name in methods}, size


def quantiles(times: list[float], mean: bool) -> dict:
    """Milliseconds of a call, and those of the fastest and slowest fifth."""
    ordered = sorted(1e3 * t for t in times)
    middle = statistics.fmean(ordered) if mean else statistics.median(ordered)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
    return {"ms": round(middle, 3), "ms_20": round(low, 3), "ms_80": round(high, 3)}


# one measurement -------------------------------------------------------------------------------


def make_task(model, tokenizer, config: BenchConfig, dtype: str, device: str, B, T, P) -> Task:
    """Weights, prefix and data of one measurement."""
    mlp = {"parametrisation": "mlp" if config.mlp else "table"}
    prefix = Prefix.random(model.config, P, seed=0, **mlp)
    if config.data is not None:
        examples = load_examples(config.data, "train")
    else:
        tokenizer = Numbers(model.config.eos_token_id)
        n_source = 0 if config.labels == "all" else T // 2
        examples = []
        for ids in random_ids(model.config, 4 * B, T - 1):  # with a bos, T tokens are read
            source, target = ids[:n_source], ids[n_source:]
            examples.append(Example(tokenizer.decode(source), (tokenizer.decode(target),)))
    return Task(model, prefix, tokenizer, examples, dtype, device, B)


def mean_len(task: Task) -> int:
    """The mean number of tokens of a row of real data."""
    return round(statistics.fmean(len(row.ids) - 1 for row in task.encoded))


def random_ids(config: GPT2Config, n: int, length: int) -> list[list[int]]:
    """n rows of random tokens, none of them the end of text."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size - 1, (n, length), generator=generator)
    return (ids + (ids >= config.eos_token_id)).tolist()


def built(makers: dict[str, Callable], device: str, check: Callable) -> tuple[dict, dict]:
    """Build and check each method; returns the columns of all and the methods that are right.

    Raises:
        any error of ours; an error of a peer becomes its note.
    """
    methods, rows = {}, {}
    for name, make in makers.items():
        peak, began, method = Peak(device), time.perf_counter(), None
        try:
            method = make()
            rows[name] = check(method)
            methods[name] = method
        except Exception as error:
            if name == "minprefix":
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            rows[name] = {"note": reason[:200]}
        wait(device)
        rows[name] |= peak.row() | {"warm_s": round(time.perf_counter() - began, 2)}
    return methods, rows


def measure_train(task: Task, config: BenchConfig, peers: list[str], peak_flops: float) -> tuple:
    """Rows of training steps by method, and the methods; `calls` is the number of timed steps."""
    tasks = {name: task for name in ("minprefix", *peers)}
    if "peft-shuffled" in tasks:
        tasks["peft-shuffled"] = replace(task, shuffled=True)
    exact = {t.shuffled: first_steps(PlainSteps(t)) for t in tasks.values()}
    with tempfile.TemporaryDirectory() as folder:
        makers = {"minprefix": lambda: Ours(task, folder)}
        makers |= {name: partial(Ours, task, folder, switch=name) for name in SWITCHES}
        makers |= {
            "compiled": lambda: Ours(task, folder, compiled=True),
            "peft": lambda: Peft(task),
            "peft-compiled": lambda: Peft(task, compiled=True),
            "peft-shuffled": lambda: Peft(tasks["peft-shuffled"]),
        }
        makers = {name: makers[name] for name in ("minprefix", *peers)}

        def check(method) -> dict:
            columns = check_steps(task.dtype, first_steps(method), exact[method.task.shuffled])
            method.warm_up(config.warm_up)
            return columns

        methods, rows = built(makers, task.device, check)
        times, size = alternate({name: m.step for name, m in methods.items()}, config, task.device)
    for name, seen in times.items():
        rows[name] |= quantiles(seen, mean=config.data is not None) | {"calls": size * len(seen)}
        done = methods[name].done
        steps = [tasks[name].rows(step) for step in range(done - size * len(seen), done)]
        rows[name] |= throughput(tasks[name], steps, rows[name]["ms"], peak_flops)
    return rows, methods


def throughput(task: Task, steps: list[list[Encoded]], ms: float, peak_flops: float) -> dict:
    """Columns for these training steps, which take `ms` each on average."""
    lengths = [[len(row.ids) - 1 for row in rows] for rows in steps]
    labels = [sum(len(row.ids) - row.prompt_len for row in rows) for rows in steps]
    flops = sum(
        train_flops(task.model.config, *sizes, task.prefix.prefix_len)
        for sizes in zip(lengths, labels, strict=True)
    )
    tokens, computed = (sum(f(row) for row in lengths) for f in (sum, lambda r: len(r) * max(r)))
    per_s = 1e3 / (ms * len(steps))
    return {
        "tokens_per_s": round(per_s * tokens),
        "examples_per_s": round(per_s * sum(map(len, lengths)), 2),
        "gflops": round(per_s * flops / 1e9, 1),
        "matmul_gflops": round(peak_flops / 1e9, 1),
        "percent": round(100 * per_s * flops / peak_flops, 1),
        "padding": round(100 * (1 - tokens / computed), 1),
    }


def measure_texts(
    task: Task, prompts: list[list[int]], config: BenchConfig, peers: list[str], beams: int,
    limits: tuple,
) -> tuple:  # fmt: skip
    """Rows by method of generation, and the methods: all tokens, and one, the prompt's share."""
    n = config.new_tokens
    reference = OurTexts(task, beams, exact=True).texts(prompts, n)
    makers = {"minprefix": lambda: OurTexts(task, beams)}
    makers |= {name: partial(OurTexts, task, beams, switch=name) for name in SWITCHES}
    makers |= {"peft": lambda: PeftTexts(task, beams)}
    makers = {name: makers[name] for name in ("minprefix", *peers)}
    methods, rows = built(
        makers,
        task.device,
        lambda m: check_texts(task, prompts, m.texts(prompts, n), reference, beams),
    )

    def timed(n_new: int) -> tuple[dict[str, list[float]], int]:
        calls = {name: (lambda m=m: m.texts(prompts, n_new)) for name, m in methods.items()}
        return alternate(calls, config, task.device)

    (whole, size), (first, _) = timed(n), timed(1)
    for name, seen in whole.items():
        rows[name] |= quantiles(seen, mean=False) | {"calls": size * len(seen)}
        ms, prefill = rows[name]["ms"], quantiles(first[name], mean=False)["ms"]
        rows[name] |= {"tokens_per_s": round(1e3 * task.batch_size * n / ms, 1)}
        rows[name] |= {"prefill_ms": prefill}
        if n > 1 and ms > prefill:
            steps_per_s = 1e3 * (n - 1) / (ms - prefill)
            limit = decode_limit(task.model, task.batch_size * beams, *limits)
            rows[name] |= {
                "decode_tokens_per_s": round(task.batch_size * steps_per_s, 1),
                "percent": round(100 * limit * steps_per_s, 1),
                "read_gb_per_s": round(limits[0] / 1e9, 1),
                "matmul_gflops": round(limits[1] / 1e9, 1),
            }
    return rows, methods


# the command -----------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def random_model(name: str, dtype: torch.dtype) -> GPT2:
    """A model of `RANDOM`. It is cached for other measurements, which all copy it."""
    n_layer, n_head, n_embd = RANDOM[name]
    config = GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    return GPT2(config).init_weights(0).to(dtype).eval()


def load_model(name: str, dtype: torch.dtype, device: str) -> tuple[GPT2, object]:
    """A model, on the CPU, and a tokenizer: of `RANDOM` (then mini's), or as `weights.load`."""
    known = "mini" if name in RANDOM else name
    model, tokenizer = weights.load(known, dtype=dtype, device=device)  # names a wrong device
    weights.need_gpt2(model, "the benchmark")
    return random_model(name, dtype) if name in RANDOM else model.cpu(), tokenizer


def peers_here(config: BenchConfig) -> list[str]:
    """The requested peers that are installed."""
    names = [name for name in dict.fromkeys(config.peers.split(",")) if name != "none"]
    missing = [m for m in ("transformers", "peft") if importlib.util.find_spec(m) is None]
    theirs = set(names) - set(OURS)
    if missing and theirs:
        print(f"{' and '.join(missing)} not installed (requirements-dev.txt): only ours is "
              "measured", file=sys.stderr)  # fmt: skip
        return [name for name in names if name in OURS]
    if theirs:
        importlib.import_module("peft")  # and transformers: not in the memory of the first peer
    return names


def measure(
    results: Results, model: GPT2, tokenizer, config: BenchConfig, device: str, peers: list[str]
) -> None:
    """Measure each combination of `config`, and profile the first one if requested."""
    dtype, train = results.common["dtype"], results.common["work"] == "train"
    flops, speed = 0.0, 0.0
    lists = [numbers(n, getattr(config, n), 1) for n in ("batch_size", "seq_len", "prefix_len")]
    lists.append([1] if train else numbers("num_beams", config.num_beams, 1))
    if config.data is not None:
        lists[1] = [0]  # lengths are those of the data
    profiled = not config.profile
    for B, T, P, beams in product(*lists):
        task = make_task(model, tokenizer, config, dtype, device, B, T, P)
        sizes = {"B": B, "T": T or mean_len(task), "P": P}
        # other work on the machine can only slow it down, so keep the best so far
        flops = max(flops, matmul_flops(device, DTYPES[dtype]))
        if train:
            rows, methods = measure_train(task, config, peers, flops)
            labels = config.labels if config.data is None else "targets"
            sizes |= {"labels": labels, "mlp": config.mlp}
        else:
            speed = max(speed, read_speed(device))
            prompts = random_ids(model.config, B, T)
            rows, methods = measure_texts(task, prompts, config, peers, beams, (speed, flops))
            sizes |= {"beams": beams, "new": config.new_tokens}
        for method, columns in rows.items():
            if method != "minprefix" and "ms" in columns:
                rate = "examples_per_s" if train else "tokens_per_s"
                columns["ratio"] = round(rows["minprefix"][rate] / columns[rate], 2)
            results.add(sizes, method, columns)
        if not profiled and train:
            results.profile_steps(task, sizes, methods, rows)
        elif not profiled and config.new_tokens > 1:
            ours = methods["minprefix"], prompts, rows["minprefix"]
            results.profile_token(task, sizes, *ours)
        profiled = True


def run_bench(work: str, name: str, device: str, config: BenchConfig) -> list[dict]:
    """Measure each combination of `config`; returns short rows. The folder config.out has more.

    Args:
        work: "train" or "generate".
        name: of a model, see `load_model`.
    Raises:
        WrongResult: our own losses, gradients or tokens are not those of the plain model.
        ValueError: options that contradict each other.
    """
    if config.data is not None and work != "train":
        raise ValueError(f"--data {config.data} goes with train; prompts are random tokens")
    only_train = set(config.peers.split(",")) - BOTH
    if only_train and work != "train":
        raise ValueError(f"--peers {min(only_train)} goes with train")
    if "peft-shuffled" in only_train and config.data is None:
        raise ValueError("--peers peft-shuffled needs --data: random rows are all of one length")
    auto = "bf16" if device.startswith("cuda") else "fp32"
    dtype = auto if config.dtype == "auto" else config.dtype
    model, tokenizer = load_model(name, DTYPES[dtype], device)
    peers = peers_here(config)
    installed = ("transformers", "peft") if set(peers) - set(OURS) else ()
    versions = {name: importlib.metadata.version(name) for name in installed}
    common = {"work": work, "model": name, "device": device, "dtype": dtype}
    common |= {"data": Path(config.data or "random").name}
    common |= dict.fromkeys(("labels", "mlp", "B", "T", "P", "beams", "new"), "")
    results = Results(config.out, common, versions)
    measure(results, model, tokenizer, config, device, peers)
    results.draw()
    return results.rows
