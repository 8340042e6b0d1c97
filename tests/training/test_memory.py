"""Out of memory: one line that says what to lower, or smaller passes with the same steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_model, trainer
from test_cli import train
from test_pretrain import folder, run_of  # noqa: F401
from test_training import log_of

from minprefix.training.memory import (
    ONEDNN_PROGRAMS,
    OutOfMemory,
    is_out_of_memory,
    keep_freed_memory,
)
from minprefix.training.pretrain import Pretrainer
from minprefix.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
CPU = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    RuntimeError(CPU),
    MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
]


def limited(run: Trainer, most: int, error: Exception, *, training=True) -> Trainer:
    """The run on a machine whose memory holds `most` rows in a pass, from step 3 on."""
    losses = run.losses

    def too_large(batch, acts):
        asked = run.step_done >= 2 and torch.is_grad_enabled() == training
        if asked and len(batch.input_ids) > most:
            if training:  # the pass has left gradients
                (acts.leaves()[0] * 2).sum().backward()
            raise error
        return losses(batch, acts)

    run.losses = too_large
    return run


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_one_line_says_what_needs_the_memory(tokenizer, tmp_path, error):
    run = limited(trainer(tokenizer, tmp_path), 3, error)
    longest = max(row.length for row in run.rows)
    with pytest.raises(OutOfMemory) as caught:
        run.run(progress=False)
    assert str(caught.value) == (
        f"out of memory after step 2, with 4 pairs in a pass, {longest} tokens in the longest pair "
        "and P = 3: give --auto-batch, lower --batch-size, or give --activation-checkpointing"
    )


def test_pretraining_goes_on_with_smaller_passes(folder, tmp_path, monkeypatch):  # noqa: F811
    run, nats = run_of(folder, tmp_path), Pretrainer.nats

    def too_large(self, windows):
        if self.step_done == 5 and len(windows) > 2:
            raise RuntimeError(CPU)
        return nats(self, windows)

    monkeypatch.setattr(Pretrainer, "nats", too_large)
    with pytest.raises(OutOfMemory, match=r"with 8 windows of 16 tokens in a pass: lower --micro-"):
        run.run(progress=False)
    smaller = run_of(folder, tmp_path, micro_tokens=32)
    smaller.load_state()
    assert smaller.step_done == 4
    smaller.run(progress=False)


def test_other_errors_stay_what_they_are(tokenizer, tmp_path):
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    for auto in (False, True):
        run = limited(
            trainer(tokenizer, tmp_path / str(auto), auto_batch=auto), 3, RuntimeError("")
        )
        with pytest.raises(RuntimeError):
            run.run(progress=False)


@pytest.mark.parametrize(
    "options", [{"parametrisation": "mlp", "mid_dim": 8}, {"gate": True}, {"place": "infix"}]
)
def test_halved_passes_make_the_same_steps(tokenizer, tmp_path, options):
    """fp64: rounding only. From step 3 on at most one row fits, so that 4 are halved twice."""
    losses = []
    for name, most in (("whole", 4), ("halved", 1)):
        run = trainer(
            tokenizer, tmp_path / name, model=small_model(torch.float64), prefix_options=options,
            auto_batch=True, prefix_dropout=0.1,
        )  # fmt: skip
        limited(run, most, ERRORS[0]).run(progress=False)
        assert run.pass_rows == {"step": most, "evaluation": 32}
        losses.append([*log_of(run.out).values(), *log_of(run.out, "dev_loss").values()])
    # worst relative difference seen 2e-16; 1e-13 leaves room for other processors
    assert losses[1] == pytest.approx(losses[0], rel=1e-13)


def test_an_evaluation_is_halved_too_and_resuming_keeps_it(tokenizer, tmp_path):
    run = limited(trainer(tokenizer, tmp_path, auto_batch=True), 2, ERRORS[1], training=False)
    run.run(progress=False)
    assert run.pass_rows == {"step": 4, "evaluation": 2}
    again = trainer(tokenizer, tmp_path)  # auto_batch may be given and left out
    again.load_state()
    assert again.pass_rows == run.pass_rows


@pytest.mark.parametrize("wrong", [{"step": 8, "evaluation": 2}, {"step": 0, "evaluation": 2}, 4])
def test_a_state_with_passes_that_cannot_be_is_refused(tokenizer, tmp_path, wrong):
    run = trainer(tokenizer, tmp_path)
    run.run(progress=False)
    run.pass_rows = wrong
    run.save_state()
    with pytest.raises(ValueError, match="pass_rows"):
        trainer(tokenizer, tmp_path).load_state()


def test_a_run_out_of_memory_goes_on_with_auto_batch(
    cli, tiny_folder, tables, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        make = Trainer._passes
        patch.setattr(
            Trainer, "_passes", lambda self, acts: make(limited(self, 1, MemoryError()), acts)
        )
        _, err = train(cli, tiny_folder, tables, tmp_path / "run", "--batch-size", 2, code=1)
        last = err.splitlines()[-1]
        assert last.startswith("minprefix: error: out of memory after step 2, with 2 pairs in a ")
        _, err = cli("train", "--resume", tmp_path / "run", "--auto-batch")
        assert "pass (step)" in err
    cli("train", "--resume", tmp_path / "run", "--steps", 5)


LITTLE = """
import resource, sys
sys.path[:0] = {path!r}
from pathlib import Path
from conftest import ASSETS, Tokenizer, trainer, pairs
from minprefix.training.memory import OutOfMemory
from minprefix.training.trainer import Trainer
import conftest, torch
torch.set_num_threads(1)
tokenizer = Tokenizer.from_folder(ASSETS / "mini")
def run(auto):
    conftest.pairs = lambda n, start=0: pairs(100 * n, start)
    made = trainer(tokenizer, Path({out!r}) / str(auto), batch_size=512, auto_batch=auto, steps=1)
    made.begin = lambda: None  # the evaluation before the first step
    return made
runs = [run(False), run(True)]
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {more}, used + {more}))
try:
    runs[0].run(progress=False)
except OutOfMemory as error:
    print(str(error).split(",")[0])
runs[1].run(progress=False)
print(runs[1].pass_rows["step"] < 512, runs[1].step_done)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_process_with_little_memory_says_so_and_goes_on(tmp_path):
    """A real failure of the CPU's allocator, by a limit of the address space."""
    path = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "training")]
    code = LITTLE.format(path=path, out=str(tmp_path), more=150 * 2**20)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["out of memory after step 0", "True 1"]


FAULTS = """
import resource
import torch
from minprefix.training.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB, 16,384 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(min(faults() for _ in range(40)))  # at first small blocks are between those that are freed
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_memory_of_a_freed_tensor_is_taken_again():
    """Without asking the system, which gives memory page by page, each time with a fault. In a new
    process, since other tests leave holes in the memory of this one."""
    count = subprocess.check_output([sys.executable, "-c", FAULTS], cwd=ROOT, text=True)
    assert int(count) < 1000


@pytest.mark.parametrize("given", [None, "7"])
def test_programs_of_onednn_are_few(given, monkeypatch):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.delenv(name, raising=False)
    if given:
        monkeypatch.setenv(name, given)
    keep_freed_memory()
    assert os.environ.pop(name) == (given or str(ONEDNN_PROGRAMS))
