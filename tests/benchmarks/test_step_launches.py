"""The count of launches, and the benchmark of the kernels beside attention, at small shapes."""

import csv

import pytest
import torch

from benchmarks.kernels import fused
from benchmarks.kernels import step as launches
from kernels import INTERPRETED
from minprefix.models.config import GPT2Config

pytest.importorskip("triton", reason="Triton is not installed")
L, B, T, C, V = 3, 2, 16, 64, 101
CONFIG = GPT2Config(vocab_size=V, n_positions=64, n_embd=C, n_layer=L, n_head=1)


@pytest.mark.skipif(INTERPRETED, reason="counts what would be launched on a GPU")
def test_launches_of_a_step_by_hand():
    """Of L layers: two norms each and the last, one by PyTorch; the first layer's first norm has no
    gradient. Sums left: embeddings, the last layer twice, the gradient at its places."""
    found = {form: launches.training_step(CONFIG, B, T, form == "fused") for form in FORMS}
    (plain, plain_memory), (fast, fast_memory) = found["plain"], found["fused"]

    def count(of, *names):
        return [of.found[name][0] if name in of.found else 0 for name in names]

    own = "add_norm_kernel", "norm_grad_kernel", "cross_entropy_kernel", "fwd_kernel"
    theirs = "native_layer_norm", "native_layer_norm_backward", "add", "logsumexp", "exp_"
    assert count(fast, *own) == [2 * L, 2 * L - 1, 1, L]
    assert count(fast, *theirs) == [1, 1, 4, 0, 0]
    assert count(plain, *own) == [0, 0, 0, L]
    assert count(plain, *theirs) == [2 * L + 1, 2 * L, 4 * L + 1, 1, 1]
    assert count(plain, "select_backward", "stack") == [0, 1]  # one table of all layers' gradients
    n_bytes = 2 * B * T * C  # of one tensor of the stream in bf16
    assert fast.found["norm_grad_kernel"][1] == (2 * L - 1) * (4 * n_bytes + 2 * C)
    assert fast.found["cross_entropy_kernel"][1] == 2 * B * T * 128 * 2 + 12 * B * T
    kept = "kept for the backward pass"
    assert fast_memory[kept] <= plain_memory[kept] and fast_memory["logits"] == B * T * 128 * 2


FORMS = ("plain", "fused")


@pytest.mark.skipif(INTERPRETED, reason="counts what would be launched on a GPU")
def test_the_committed_count_is_of_all_forms():
    with open("benchmarks/step_launches.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["kernel"] == "all"]
    by_form = {row["form"]: int(row["launches"]) for row in rows if row["B"] == "10"}
    assert by_form["fused"] < by_form["plain"] < by_form["before"]


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="plain PyTorch on a CPU")
def test_benchmark_of_the_kernels_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fused", "--out", str(tmp_path)])
    fused.main()
    rows = list(csv.DictReader((tmp_path / "fused-cpu.csv").open()))
    assert {row["what"] for row in rows} == {"head", "cross_entropy", "add_norm", "norm_grad"}
    assert "add_norm: plain / ours  not measured" in capsys.readouterr().out


def test_verdicts_by_hand():
    rows = [
        {"what": what, "method": method, "n": "1280", "us": us}
        for what, method, us in (
            ("head", "plain", "3520"), ("head", "ours", "510"), ("head", "products", "300"),
            ("add_norm", "plain", "8"), ("add_norm", "ours", "4"),
            ("cross_entropy", "ours", "100"), ("cross_entropy", "8192 x 16 warps", "90"),
        )
    ]  # fmt: skip
    lines = fused.verdicts(rows)
    assert [line.split()[-1] for line in lines[:3]] == ["ok", "MISSED", "ok"]
    assert "not measured" in lines[3] and "fastest (8192 x 16 warps) 90.0 us" in lines[4]


def test_methods_that_differ_are_refused():
    x = torch.randn(8).bfloat16()
    fused.agree(x, x, "the same")
    with pytest.raises(AssertionError, match="they differ"):
        fused.agree(x + 1, x, "others")
