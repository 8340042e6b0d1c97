"""The count of a step's launches, without a GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import tiny_bart

from benchmarks.machine import read_rows
from kernels import INTERPRETED
from minprefix.models.config import GPT2Config
from minprefix.models.gpt2 import GPT2
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.prefix import Prefix

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.kernels import launches

ROOT = Path(launches.__file__).parents[2]
COUNTED = read_rows(ROOT / "benchmarks" / "launches.csv")
L, B, T, C, V = 3, 2, 16, 64, 101


@pytest.mark.skipif(INTERPRETED, reason="counts what would be launched on a GPU")
def test_launches_of_a_step_by_hand():
    """Of L layers: two norms each and the last, one by PyTorch; the first layer's first norm has no
    gradient. Sums left: embeddings, the last layer twice, the gradient at its places."""
    config = GPT2Config(vocab_size=V, n_positions=64, n_embd=C, n_layer=L, n_head=1)
    plain, plain_memory = launches.training_step(config, B, T, fused=False)
    fast, fast_memory = launches.training_step(config, B, T, fused=True)

    def count(of, *names):
        return [of.found[name][0] if name in of.found else 0 for name in names]

    own = "add_norm_kernel", "norm_grad_kernel", "cross_entropy_kernel", "fwd_kernel"
    theirs = "native_layer_norm", "native_layer_norm_backward", "add", "_log_softmax", "exp_"
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
    outside = fast.captured - plain.captured  # the same is launched around both graphs
    row, other = (launches.columns(x, graphed=True) for x in (fast, plain))
    assert row["launches"] - other["launches"] == outside and row["calls"] == other["calls"] < 50


@pytest.mark.skipif(INTERPRETED, reason="counts what would be launched on a GPU")
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
def test_a_token_is_five_launches_for_each_layer(options, monkeypatch):
    """No copies into the cache, no merging; the host only starts a replay and reads the tokens.
    With more rows there are eight, of which attention and the norms are ours, and one more for the
    last sum. Without graphs there are ten, of which attention alone is ours."""
    config = GPT2Config(n_layer=3, n_head=2, n_embd=32, n_inner=64, vocab_size=200)
    model, prefix = GPT2(config).init_weights(0).eval(), Prefix.random(config, 10, seed=0)
    B = 1 if "num_beams" in options else 2
    count = launches.token(model, prefix, B, True, **options)
    row = launches.columns(count, graphed=True)
    assert (row["triton"], row["waits"], row["calls"]) == (15, 0, 2)
    assert "index" not in row["most"] and "addmm" not in count.found
    with monkeypatch.context() as patch:
        patch.setattr(launches.kernels, "FEW_ROWS", 0)
        other = launches.token(model, prefix, B, True, **options)
        many = launches.columns(other, graphed=True)
    assert (many["triton"], many["waits"], many["calls"]) == (3 + 6, 0, 2)
    assert other.found["addmm"][0] == 12 and many["launches"] == row["launches"] + 10
    n, eK = B * options.get("num_beams", 1), 4 * 32  # positions, bytes of one; K = 32 but once
    weights = 4 * (96 * 33 + 32 * 33 + 64 * 33 + 32 * 65)
    # 24, 8, 16 and 8 programs of 4 outputs; each reads x, and the gain and shift of a norm
    read = eK * (n * (24 + 8 + 16 + 8 * 2) + 2 * (24 + 16))
    moved = n * 4 * (96 + 32 + 64 + 32) + 2 * n * eK  # y, residuals
    assert count.found["few_rows_kernel"][1] == 3 * (weights + read + moved)
    eager = launches.columns(launches.token(model, prefix, B, False, **options), graphed=False)
    assert eager["launches"] == eager["calls"] == row["launches"] + 15


@pytest.mark.skipif(INTERPRETED, reason="counts what would be launched on a GPU")
def test_a_token_of_some_rows_is_seven_launches_for_each_layer():
    """All are ours, and so is the norm before the first; in the last layer the second product of
    the MLP and the sum are PyTorch's."""
    config = GPT2Config(n_layer=3, n_head=2, n_embd=32, n_inner=64, vocab_size=200)
    model = GPT2(config).init_weights(0).eval().bfloat16()
    count = launches.token(model, Prefix.random(config, 10, seed=0), 6, True)
    found = {name: count.found[name][0] for name in count.found}
    ours = {"some_rows_kernel": 4 * 3 - 1, "add_norm_kernel": 2 * 3, "decode_kernel": 3}
    assert ours.items() <= found.items() and found["addmm"] == 1
    n, e = 8, 2  # positions, those of a bucket; bytes
    weights = 3 * (96 * 33 + 32 * 32 + 64 * 33) + 2 * 64 * 32
    # 3, 1 and 2 programs of 32 outputs read x; up to 64 inputs there is one part, in fp32
    read = n * (3 * (3 * 32 + 32 + 2 * 32) + 2 * 64)
    moved = n * (3 * (96 + 64 + 2 * 32) + 2 * 2 * 32)
    assert count.found["some_rows_kernel"][1] == e * (weights + read + moved)


@pytest.mark.skipif(INTERPRETED, reason="counts what would be launched on a GPU")
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_a_token_of_a_bart_is_a_replay(options):
    """The host starts it, reads the tokens, and waits for nothing. Ours are two attentions and
    three norms in each layer."""
    model = tiny_bart(n_embd=64, n_positions=160).bfloat16().eval()
    prefix = BARTPrefix.random(model.config, 3, 0)
    count = launches.token(model, prefix, 2, True, **options)
    row = launches.columns(count, graphed=True)
    assert (row["triton"], row["waits"], row["calls"]) == (5 * model.config.n_layer, 0, 2)


def test_the_committed_count_is_of_all_forms():
    rows = {(row["form"], row["work"], row["B"], row["beams"]): row
            for row in COUNTED if row["graphs"] == "1" and row["sampling"] != "1"}  # fmt: skip
    n = {sizes: float(row["launches"]) for sizes, row in rows.items()}
    for B in ("10", "64"):
        forms = [n[form, "train", B, ""] for form in ("fused", "plain", "before")]
        assert forms == sorted(set(forms))
    for sizes in (("1", "1"), ("32", "1"), ("16", "5")):
        assert n["fused", "generate", *sizes] < n["before", "generate", *sizes]
    few, other = (("few rows", "generate", "1", "1"), ("fused", "generate", "1", "1"))
    assert n[few] == n[other] - 3 * 24 - 1  # eight for each layer and one more, or five


def test_the_count_names_commits_of_this_history():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no history here")
    if git("rev-parse", "--is-shallow-repository").stdout.strip() == "true":
        pytest.skip("the history is cut off")
    for commit in {row["commit"] for row in COUNTED}:
        assert git("merge-base", "--is-ancestor", commit, "HEAD").returncode == 0, commit


def git(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
