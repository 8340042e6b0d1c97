"""The figures of the README and the guides equal those in the committed CSVs."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_bart

from benchmarks import bart
from benchmarks.kernels import attention as bench_attention
from benchmarks.kernels import peers as bench_peers
from benchmarks.kernels.attention import ISSUE, PASSES, SMALL
from benchmarks.kernels.peers import Shape, Truth, make_sample
from benchmarks.machine import add_row, machine, read_rows
from benchmarks.readme import HERE, PAGES, README, draw, final_rows, with_tables
from kernels import assembler
from kernels.tools import sanitize


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_made_from_the_csvs(page: Path):
    text = page.read_text(encoding="utf-8")
    assert with_tables(page) == text, "run: python -m benchmarks.readme"
    assert text.count("<!-- table: ") == len(PAGES[page])
    assert len(final_rows()) >= 4


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_selection_was_on_the_dev_set_and_the_final_runs_follow_it():
    """The learning rate of each final run is the one with the best dev BLEU."""
    chosen = read_rows(HERE / "e2e_select.csv")
    for row in read_rows(HERE / "e2e.csv"):
        tried = [r for r in chosen if r["method"] == row["method"]]
        if tried:
            best = max(tried, key=lambda r: float(r["dev_bleu"]))
            assert float(best["lr"]) == float(row["lr"])


def test_picture_is_drawn(tmp_path: Path):
    draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_replaced_by_their_key(tmp_path: Path):
    path = tmp_path / "rows.csv"
    for n, value in (("a", 1), ("b", 2), ("a", 3)):
        add_row(path, {"name": n, "value": value} | machine(), ("name",))
    assert [(row["name"], row["value"]) for row in read_rows(path)] == [("b", "2"), ("a", "3")]
    with pytest.raises(KeyError):
        add_row(path, {"value": 1}, ("name",))


def test_rows_of_different_columns_keep_all(tmp_path: Path):
    """As from a machine with a GPU, then from one without."""
    path = tmp_path / "rows.csv"
    add_row(path, {"name": "a", "value": 1, "gpu": "H100"}, ("name",))
    add_row(path, {"name": "b", "value": 2, "note": "none"}, ("name",))
    add_row(path, {"name": "c", "value": 3}, ("name",))
    rows = read_rows(path)
    assert [row["name"] for row in rows] == ["a", "b", "c"]
    assert [row["gpu"] for row in rows] == ["H100", "", ""]
    assert [row["note"] for row in rows] == ["", "none", ""]


def test_a_gpu_is_named(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "some GPU")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    found = assembler.Assembler("/some/ptxas", (13, 0, 88), "of a test")
    monkeypatch.setattr(assembler, "choose", lambda arch: found if arch == 90 else None)
    row = machine.__wrapped__()
    assert (row["gpu"], row["cuda"], row["assembler"]) == ("some GPU", "13.0", "ptxas 13.0.88")
    assert row["triton"] and set(machine.__wrapped__()) > {"cpu", "threads", "torch", "commit"}


def test_without_git_the_commit_is_empty(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert machine.__wrapped__()["commit"] == ""


def rows_where(us) -> list[dict]:
    """Rows for all that the benchmark of attention measures, with us(shape, method) in µs."""
    rows = [
        {"B": 1, "T": 1, "H": 1, "P": 0, "N": 0, "pass": "forward", "method": name, "us": 1.0}
        | {"tflops": 700.0, "gbs": 3000.0}
        for name in ("matmul", "copy")
    ]
    for shape, names in bench_attention.plan("cuda", "all"):
        for which in PASSES:
            for name in names:
                row = shape._asdict() | {"pass": which, "method": name, "us": us(shape, name)}
                rows.append(row | {"note": ""})
    return rows


def test_targets_are_judged():
    fast = rows_where(lambda shape, name: 1.0 if name.startswith("ours") else 10.0)
    lines = bench_attention.verdicts(fast)
    assert [line for line in lines if " ok " not in line] == []
    assert "best peer flash, 10.0 times ours" in lines[0]
    slow = bench_attention.verdicts(
        rows_where(lambda shape, name: 12.0 + shape.N if name.startswith("ours") else 10.0)
    )
    # 12 us against 10 us, for 1.155 times the work: 1.04
    assert "1.04 <= 1.00  MISSED" in "\n".join(line for line in slow if "P=10" in line)
    assert sum("bank" in line and "MISSED" in line for line in slow) == 4
    none = bench_attention.verdicts(rows_where(lambda shape, name: ""))
    assert len(none) == len(lines) == sum("not measured" in line for line in none)


def test_the_best_peer_is_the_best_of_all():
    """Also of those that were measured elsewhere, or only for one pass."""
    rows = rows_where(lambda shape, name: 2.0 if name == "flex_merged" else 10.0)
    lines = bench_attention.verdicts(rows)
    assert "best peer flex_merged, 0.2 times ours" in lines[0]


def test_targets_by_length():
    aims = {shape: tuple(bench_attention.aims(shape).values()) for shape in ISSUE}
    assert list(aims.values()) == [(1, 0.75), (1, 0.75), (1, 0.85), (1.1, 1), (1.1, 1)]


def test_a_plan_goes_on_where_it_was_broken_off():
    steps = bench_attention.plan("cuda", "targets")
    rows = [row for row in rows_where(lambda shape, name: 1.0) if row["method"] == "ours"]
    left = bench_attention.steps_left(steps, [*rows, rows[0] | {"method": "eager", "note": "lost"}])
    tried = [(shape, name) for shape, names in left for name in names]
    assert len(tried) == len(set(tried)) and "ours" not in {name for _, name in tried}
    first = Shape(*(rows[0][name] for name in "BTHPN"))
    assert (first, "eager") not in tried and (first, "flash") in tried


def test_work_with_a_prefix_is_that_without_times_one_plus_2p_over_t_plus_1():
    for shape in ISSUE:
        for which in PASSES:
            with_prefix, without = (
                bench_attention.work(shape, which, prefixed)[0] for prefixed in (True, False)
            )
            factor = 1 + 2 * shape.P / (shape.T + 1)
            assert with_prefix == pytest.approx(factor * without, rel=1e-12)  # exact but for fp64


def test_pictures_of_times_are_drawn(tmp_path: Path):
    bench_attention.draw(rows_where(lambda shape, name: float(shape.T)), tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_methods_that_are_timed_agree_and_a_wrong_one_is_named(shape: Shape, monkeypatch):
    # FlexAttention refuses leaves on a CPU, where its uncompiled form has gradients nevertheless
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    truth = Truth(make_sample(shape, "cpu", 0))
    methods = bench_peers.METHODS
    for name in methods.keys() - bench_peers.missing():
        assert truth.problem(name, methods[name]) == "", name
    assert "wrong: error of o" in truth.problem("ours", lambda s: 1.1 * methods["ours"](s))
    assert "wrong: gives" in truth.problem("ours", methods["bare_flash"]) or shape.P == 0


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_two_merged_passes_are_exact(shape: Shape, monkeypatch):
    """o and all gradients, against the definition in fp64."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    sample = bench_peers.with_leaves(make_sample(shape, "cpu", 0), torch.float64)
    found, exact = (
        bench_peers.results(f.__name__, f, sample)
        for f in (bench_peers.flex_merged, bench_peers.eager)
    )
    for name, x in exact.items():
        assert (found[name] - x).abs().max() < 2e-14, name  # worst seen: 2e-15


def test_what_is_not_installed_is_named():
    for name, reason in bench_peers.missing().items():
        assert name in bench_peers.NEWER and ":" in reason
    with bench_peers.implementation("flash"):
        pass  # PyTorch's own needs nothing


@pytest.mark.slow
def test_calls_for_the_sanitizer_run_and_repeat(monkeypatch):
    """The same calls as on a GPU, through the CPU path."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sanitize.main()


@pytest.mark.slow
def test_bart_benchmark_runs(capsys):
    sizes = ("--source", "9", "--target", "5", "--prefix-len", "2", "--num-beams", "2")
    rows = bart.main(["--model", "mini-bart", "--device", "cpu", "--peers", *sizes])
    assert [row["work"] for row in rows] == ["training step"] * 4 + ["text, 2 beams"] * 2
    assert [row["method"] for row in rows] == [*bart.METHODS, "minprefix", "transformers"]
    assert min(row["seconds"] for row in rows) > 0
    assert min(row["peak MiB"] for row in rows) > 50
    assert "14,462,720 parameters" in capsys.readouterr().out


def test_bart_peer_computes_what_ours_does_without_a_prefix():
    model = tiny_bart()
    source, inputs, labels = (torch.randint(3, 97, (2, n)) for n in (7, 5, 5))
    _, losses = bart.transformers_losses(model, None)
    exact = model.token_losses(inputs, labels, source_ids=source)
    theirs = losses(source, inputs, labels)
    assert (theirs - exact).abs().max() < 1e-5  # their losses are in fp32; worst seen: 4e-7
