"""The benchmark of the kernels other than attention."""

import csv

import pytest
import torch

from benchmarks.kernels import fused
from kernels import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="plain PyTorch on a CPU")
def test_benchmark_of_the_kernels_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fused", "--out", str(tmp_path)])
    fused.main()
    rows = list(csv.DictReader((tmp_path / "fused-cpu.csv").open()))
    names = {"head", "cross_entropy", "add_norm", "norm_grad", "products"}
    assert {row["what"] for row in rows} == names
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
