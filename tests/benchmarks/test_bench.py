"""The benchmark: a run with tiny sizes, rejection of wrong results, FLOPs, bad options."""

import os
from dataclasses import fields

import pytest
import torch
from conftest import in_process, tiny_with_words
from tyro._docstrings import get_field_docstring

import kernels
from benchmarks.machine import read_rows
from benchmarks.peft import peers as bench_peers
from benchmarks.peft import run as bench
from benchmarks.peft.__main__ import main
from benchmarks.peft.limits import Peak, decode_limit, train_flops
from benchmarks.peft.pictures import longest_series
from benchmarks.peft.results import KEY
from benchmarks.peft.run import BenchConfig, make_task
from benchmarks.peft.traces import PARTS, REST, WAITING, kernel_rows, of_one, part_of
from minprefix.models.gpt2 import GPT2Config
from minprefix.training.trainer import Trainer

QUICK = ("--device", "cpu", "--seconds", 0, "--steps", 1, "--warm-up", 0)


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    monkeypatch.setattr(bench, "matmul_flops", lambda device, dtype: 1e9)
    monkeypatch.setattr(bench, "read_speed", lambda device: 1e9)


@pytest.fixture
def timed(capsys):
    """Run `python -m benchmarks.peft` in this process, as conftest's `cli`."""
    return in_process(capsys, main)


@pytest.fixture
def run(timed, tiny_folder, tmp_path):
    """Run it; the rows of its CSV."""

    def bench_it(work: str, *options, code: int = 0) -> list[dict[str, str]]:
        argv = ("--model", tiny_folder, "--out", tmp_path, *QUICK, *options)
        timed(work, *argv, code=code)
        return read_rows(tmp_path / "bench.csv")

    return bench_it


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_training_beside_peft(run, tmp_path, dtype):
    sizes = ("--batch-size", "2,3", "--seq-len", 8, "--prefix-len", 2, "--dtype", dtype)
    rows = run("train", *sizes, "--profile")
    assert [(r["B"], r["method"]) for r in rows] == [
        ("2", "minprefix"), ("2", "peft"), ("3", "minprefix"), ("3", "peft"),
    ]  # fmt: skip
    for row in rows:
        assert set(KEY) < set(row) and {"torch", "commit", "cpu", "peft", "threads"} < set(row)
        assert row["note"] == "" and row["dtype"] == dtype and row["labels"] == "all"
        tolerance = bench_peers.LOSS_TOLERANCE[dtype] + 1e-6  # as it is written: 6 digits
        assert float(row["loss"]) == pytest.approx(float(row["exact_loss"]), rel=tolerance)
        ms, tokens = float(row["ms"]), 8 * int(row["B"])
        assert float(row["tokens_per_s"]) == pytest.approx(1e3 * tokens / ms, abs=1)
        flops = train_flops(tiny_with_words().config, [8] * int(row["B"]), tokens, 2)
        assert float(row["gflops"]) == pytest.approx(flops / ms / 1e6, abs=0.1)
        assert (row["ratio"] != "") == (row["method"] == "peft")
        assert row["calls"] == "1"
    table = read_rows(tmp_path / "kernels.csv")
    assert {(r["work"], r["B"], r["method"]) for r in table} == {("train", "2", "minprefix")}
    assert table[-1]["kernel"] == WAITING and "aten::addmm" in {row["kernel"] for row in table}
    assert sum(float(row["share"]) for row in table) == pytest.approx(100, abs=0.05 * len(table))
    parts = read_rows(tmp_path / "profile.csv")
    assert [row["method"] for row in parts] == ["minprefix", "peft"]
    for row in parts:
        assert min(float(row[part]) for part in (*PARTS, REST)) > 0
    for name in ("bench", "profile"):
        (picture,) = tmp_path.glob(f"{name}-*-{dtype}.png")
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_training_on_real_batches_and_a_table(run, tables):
    peers = ("--peers", "peft,peft-shuffled")
    rows = run("train", "--data", tables, "--batch-size", 3, "--prefix-len", 2, "--no-mlp", *peers)
    assert [row["method"] for row in rows] == ["minprefix", "peft", "peft-shuffled"]
    assert {(row["labels"], row["mlp"], row["note"]) for row in rows} == {("targets", "False", "")}
    assert {row["data"] for row in rows} == {tables.name}
    ours, same, shuffled = (float(row["padding"]) for row in rows)
    assert ours == same <= shuffled
    rates = [float(row["examples_per_s"]) for row in rows]
    assert float(rows[2]["ratio"]) == pytest.approx(rates[0] / rates[2], abs=0.01)


def test_labels_at_targets_are_the_second_half(tiny_folder):
    config = BenchConfig(labels="targets", mlp=False)
    task = make_task(tiny_with_words(), None, config, "fp32", "cpu", 2, 9, 1)
    for row in task.rows(0):
        assert len(row.ids) - 1 == 9 and len(row.ids) - row.prompt_len == 5


@pytest.mark.slow
def test_generation_beside_peft(run, tmp_path):
    rows = run("generate", "--seq-len", 5, "--new-tokens", 4, "--batch-size", 2,
               "--num-beams", "1,3", "--prefix-len", 3, "--profile")  # fmt: skip
    assert [(r["beams"], r["method"], r["note"], r["differ"]) for r in rows] == [
        ("1", "minprefix", "", "0"), ("1", "peft", "", "0"),
        ("3", "minprefix", "", "0"), ("3", "peft", "", "0"),
    ]  # fmt: skip
    for row in rows:
        ms = float(row["ms"])
        assert float(row["tokens_per_s"]) == pytest.approx(1e3 * 2 * 4 / ms, abs=0.1)
        assert float(row["prefill_ms"]) > 0
    assert [row["near_ties"] for row in rows] == ["0", "0", "", ""]
    table = {row["kernel"]: row for row in read_rows(tmp_path / "kernels.csv")}
    layers = tiny_with_words().config.n_layer
    assert float(table["aten::gelu"]["count"]) == layers and table["aten::gelu"]["beams"] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("work", ["train", "generate"])
def test_ours_with_a_switch_off_is_a_method_of_its_own(run, monkeypatch, work):
    """Variables, and the number of few rows, are set while that method runs, and only then."""
    seen = []
    for kind, name in ((bench_peers.Trainer, "step"), (bench_peers, "generate")):
        plain = getattr(kind, name)

        def noted(*args, plain=plain, **kwargs):
            variables = ("MINPREFIX_CUDA_GRAPHS", "MINPREFIX_FUSED")
            seen.append((*(os.environ.get(x) for x in variables), kernels.FEW_ROWS))
            return plain(*args, **kwargs)

        monkeypatch.setattr(kind, name, noted)
    sizes = ("--batch-size", 2, "--seq-len", 8, "--prefix-len", 2, "--new-tokens", 2)
    rows = run(work, *sizes, "--peers", "eager,unfused,many-rows")
    assert [row["method"] for row in rows] == ["minprefix", "eager", "unfused", "many-rows"]
    most = kernels.FEW_ROWS
    assert set(seen) == {(None, None, most), ("0", None, most), (None, "0", most), (None, None, 0)}
    assert all(row["peft"] == "" for row in rows if "peft" in row)


def test_a_slow_peer_makes_blocks_short(monkeypatch):
    """On a GPU a block is a fifth of a second of the fastest, and a second of the slowest."""
    now = [0.0]
    monkeypatch.setattr(bench, "wait", lambda device: None)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def takes(seconds):
        return lambda: now.__setitem__(0, now[0] + seconds)

    config = BenchConfig(steps=3, seconds=0)
    for fast, slow, size in ((0.01, 0.04, 20), (0.01, 0.25, 4), (0.05, 3.0, 1)):
        times, found = bench.alternate({"a": takes(fast), "b": takes(slow)}, config, "cuda")
        assert found == size and [len(seen) for seen in times.values()] == [3, 3]
        assert times["a"] == pytest.approx([fast] * 3) and times["b"] == pytest.approx([slow] * 3)


def test_table_of_kernels_by_hand():
    """Two more tokens: 2 calls of a, 6 us, and 3 of b; nothing runs in the rest of 10 us."""
    fewer = {"a": (3, 10.0), "c": (1, 8.0)}
    each = of_one({"a": (5, 16.0), "b": (3, 4.0), "c": (1, 9.0)}, fewer, 2)
    assert each == {"a": (1, 3.0), "b": (1.5, 2.0)}
    assert [tuple(row.values()) for row in kernel_rows(each, 10.0)] == [
        ("a", 1, 3.0, 30.0), ("b", 1.5, 2.0, 20.0), (WAITING, "", 5.0, 50.0),
    ]  # fmt: skip
    assert kernel_rows(each)[-1]["us"] == 0


# what is wrong is not timed -------------------------------------------------------------------


@pytest.fixture
def refused(timed, tiny_folder, tmp_path):
    """Run it; it must fail with one line."""

    def bench_it(work: str, *options, code: int = 1) -> str:
        argv = ("--model", tiny_folder, "--out", tmp_path, *QUICK, "--peers", "none", *options)
        out, err = timed(work, *argv, code=code)
        line = err.splitlines()[-1]
        assert out == "" and line.startswith("minprefix: error: ") and "Traceback" not in err
        assert read_rows(tmp_path / "bench.csv") == []
        return line

    return bench_it


@pytest.mark.parametrize("entry, named", [("nats", "loss"), ("norm", "gradient norm")])
@pytest.mark.parametrize("wrong_step", [1, 2])
def test_a_wrong_step_of_ours_is_refused(refused, monkeypatch, entry, named, wrong_step):
    step = Trainer.step

    def wrong(self):
        found = step(self)
        if self.step_done == wrong_step:
            found[entry] = found[entry] * 1.01
        return found

    monkeypatch.setattr(Trainer, "step", wrong)
    sizes = ("--batch-size", 2, "--seq-len", 8, "--prefix-len", 2)
    assert f"{named} of step {wrong_step} is" in refused("train", *sizes)


@pytest.mark.parametrize("beams, named", [(1, "nats less likely"), (2, "less likely by")])
def test_a_wrong_text_of_ours_is_refused(refused, monkeypatch, beams, named):
    texts = bench_peers.OurTexts.texts

    def wrong(self, prompts, n):
        found = texts(self, prompts, n)
        if self.model.wte.weight.dtype != torch.float64:
            found[1][2] = (found[1][2] + 1) % 8000
        return found

    monkeypatch.setattr(bench_peers.OurTexts, "texts", wrong)
    sizes = ("--batch-size", 2, "--seq-len", 8, "--prefix-len", 2, "--new-tokens", 4)
    assert named in refused("generate", *sizes, "--num-beams", beams)


def test_a_text_that_ends_early_is_refused(refused, monkeypatch):
    monkeypatch.setattr(bench_peers.OurTexts, "texts", lambda self, p, n: [[1] * 3, [2] * 4])
    sizes = ("--batch-size", 2, "--seq-len", 8, "--prefix-len", 2, "--new-tokens", 4)
    assert "texts of [3, 4] tokens" in refused("generate", *sizes)


def test_a_failing_peer_is_a_row_with_its_reason(run, monkeypatch):
    def fail(self):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(bench_peers.Peft, "step", fail)
    rows = run("train", "--batch-size", 2, "--seq-len", 8, "--prefix-len", 2)
    assert [(r["method"], r["ms"] != "", r["note"]) for r in rows] == [
        ("minprefix", True, ""),
        ("peft", False, "RuntimeError: out of memory"),
    ]


def test_without_peft_ours_is_measured_alone(timed, tiny_folder, tmp_path, monkeypatch):
    find = bench.importlib.util.find_spec
    monkeypatch.setattr(
        bench.importlib.util, "find_spec", lambda name: None if name == "peft" else find(name)
    )
    sizes = ("--batch-size", 2, "--seq-len", 8, "--prefix-len", 2)
    argv = ("--model", tiny_folder, "--out", tmp_path, *QUICK, *sizes)
    out, err = timed("train", *argv, "--json")
    assert "peft not installed" in err and '"method": "peft"' not in out
    assert [row["method"] for row in read_rows(tmp_path / "bench.csv")] == ["minprefix"]
    assert not list(tmp_path.glob("bench-*.png"))  # nothing varies


# numbers ----------------------------------------------------------------------------------------


def test_flops_by_hand():
    """One layer, C = 2, n_inner = 8, V = 5; rows of 3 and 1 tokens, 2 labels, P = 4.

    N = 2 * 6 + 2 * 2 + 2 * 8 + 8 * 2 = 48; 4 tokens: 4 * 48 * 4 = 768. Head: 4 * 2 * 5 * 2 = 80.
    Pairs: 3 rows of queries see 5 + 6 + 7 = 18, one sees 5: 23; attention: 12 * 2 * 23 = 552.
    """
    config = GPT2Config(vocab_size=5, n_embd=2, n_head=1, n_layer=1)
    assert train_flops(config, [3, 1], 2, 4) == 768 + 80 + 552
    deeper = GPT2Config(vocab_size=5, n_embd=2, n_head=1, n_layer=3, n_inner=8)
    assert train_flops(deeper, [3, 1], 2, 4) == 3 * (768 + 552) + 80


def test_a_decoding_step_reads_all_weights_or_multiplies_by_them():
    model = tiny_with_words()
    n = sum(w.numel() for w in model.parameters()) - model.wpe.weight.numel()
    size = model.wte.weight.element_size()
    assert decode_limit(model, 1, read_speed=10.0, flops=1e12) == n * size / 10
    assert decode_limit(model, 7, read_speed=1e12, flops=10.0) == 2 * 7 * n / 10


def test_peak_memory_of_the_cpu_is_seen():
    peak = Peak("cpu")
    if peak.before is None:
        pytest.skip("this system does not tell")
    block = torch.ones(64, 2**18)  # 64 MiB
    del block
    assert 60 <= peak.row()["peak_mib"] <= 80


@pytest.mark.parametrize(
    "names, shapes, part",
    [
        (["aten::addmm"], [[384], [80, 384], [384, 1152]], "matrix products"),
        (["aten::mm"], [[80, 384], [384, 97]], "head + loss"),
        (["aten::_log_softmax"], [], "head + loss"),
        (["aten::_scaled_dot_product_flash_attention_for_cpu"], [], "attention"),
        (["aten::bmm", "aten::matmul"], [], "attention"),
        (["aten::embedding"], [[97, 384], [2, 8]], "norms, GELU, sums, copies"),
        (["aten::native_layer_norm"], [], "norms, GELU, sums, copies"),
        (["aten::add_", "Optimizer.step#AdamW.step"], [], "optimizer"),
        (["AddmmBackward0"], [], "matrix products"),
        (["cudaGraphLaunch"], [], REST),
        (["void at::native::vectorized_elementwise_kernel<4>"], [], "norms, GELU, sums, copies"),
        (["triton_poi_fused_gelu_3"], [], "norms, GELU, sums, copies"),
        (["nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT"], [], "matrix products"),
        (["_bwd_dkdv_kernel"], [], "attention"),
    ],
)
def test_events_have_their_part(names, shapes, part):
    assert part_of(names, shapes, 97) == part


def test_a_panel_holds_the_series_with_most_points():
    def row(B, T, P=10, **more):
        common = {"data": "random", "labels": "all", "mlp": "True", "new": "", "beams": ""}
        return common | {"B": str(B), "T": str(T), "P": str(P), "method": "minprefix"} | more

    rows = [row(1, 8), row(2, 8), row(2, 16), row(2, 32), row(4, 8, data="tables")]
    common, series = longest_series(rows, "T")
    assert common["B"] == "2" and [r["T"] for r in series] == ["8", "16", "32"]
    assert [r["B"] for r in longest_series(rows, "B")[1]] == ["1", "2"]


# options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "work, option, value, named",
    [
        ("train", "--batch-size", "2,x", "batch_size must be whole numbers >= 1 with commas"),
        ("train", "--prefix-len", "0", "prefix_len must be whole numbers >= 1"),
        ("train", "--seq-len", "3", "seq_len must be whole numbers >= 4"),
        ("train", "--seq-len", "96", "offset 10 + 96 tokens > 96 positions"),
        ("generate", "--seq-len", "90", "96 positions"),
        ("train", "--dtype", "fp8", "dtype must be one of auto, fp32, bf16, got 'fp8'"),
        ("train", "--labels", "some", "labels must be one of all, targets"),
        ("train", "--peers", "vllm", "peers must be one of none, compiled, eager,"),
        ("train", "--steps", "0", "steps must be at least 1"),
        ("train", "--seconds", "-1", "seconds must be >= 0"),
        ("train", "--device", "nope", "device nope cannot be used"),
        ("generate", "--data", "restaurants", "goes with train"),
        ("generate", "--peers", "peft-compiled", "goes with train"),
        ("train", "--peers", "peft,peft-shuffled", "peft-shuffled needs --data"),
    ],
)
def test_bad_options_are_one_line(refused, work, option, value, named):
    usage = " must be " in named  # wrong for every model, and on every machine
    assert named in refused(work, option, value, code=2 if usage else 1)


def test_every_field_is_an_option_with_help(timed):
    text = " ".join(timed("--help")[0].replace("│", "").split())
    for field in fields(BenchConfig):
        comment = " ".join(get_field_docstring(BenchConfig, field.name, ()).split())
        assert f" {comment} (default: {field.default})" in text
