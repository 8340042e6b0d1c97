"""Training steps with static buffers equal plain ones; on a GPU, CUDA graphs never wait."""

import pytest
import torch
from conftest import assert_close, pairs, small_model, trainer

from minprefix.data.batches import collate, encode_examples
from minprefix.models.losses import IGNORE
from minprefix.training import graphs as fast_training
from minprefix.training import trainer as training
from minprefix.training.graphs import GraphedPasses, padded

FORMS = {
    "table": {},
    "mlp": {"parametrisation": "mlp", "mid_dim": 8},
    "gate": {"gate": True},
    "embedding": {"parametrisation": "embedding"},
    "infix": {"place": "infix"},
}
WAY = {"loss": "sentence", "accumulation": 2, "batch_size": 3, "steps": 8, "clip": 1e9}


@pytest.fixture
def recordings(monkeypatch):
    """Buckets on the CPU: like a recording, the first call takes effect and gives a replay."""
    made = []

    def capture(run, device, pool):
        run()
        made.append(run)
        return run

    monkeypatch.setattr(training, "uses_graphs", lambda device: True)
    monkeypatch.setattr(fast_training, "capture", capture)
    return made


def weights_after(steps: int, run) -> tuple[torch.Tensor, list[float]]:
    """What is trained, flat, and the summed losses of the steps."""
    nats = [float(run.step()["nats"]) for _ in range(steps)]
    return torch.cat([p.detach().flatten() for p in run.trained.parameters()]), nats


@pytest.mark.parametrize("form", [*FORMS, "dropout"])
def test_static_buffers_equal_plain_steps(tokenizer, tmp_path, recordings, monkeypatch, form):
    """Batches of several lengths, a short last one, two per step: fp64, rounding only."""
    options = {"prefix_options": FORMS.get(form), **WAY}
    options |= {"prefix_dropout": 0.3} if form == "dropout" else {}
    graphed = trainer(tokenizer, tmp_path, model=small_model(torch.float64), **options)
    got, got_nats = weights_after(8, graphed)
    monkeypatch.setattr(training, "uses_graphs", lambda device: False)
    plain = trainer(tokenizer, tmp_path, model=small_model(torch.float64), **options)
    expected, nats = weights_after(8, plain)
    assert isinstance(graphed.passes, GraphedPasses) and not isinstance(plain.passes, GraphedPasses)
    assert_close(got, expected, 1e-9)  # AdamW divides by the root of tiny squares
    assert got_nats == pytest.approx(nats, rel=1e-12)
    buckets = set(graphed.passes.replays)
    assert 1 < len(buckets) == len(recordings) < 16  # 16 batches share them


def test_padding_fills_the_bucket_and_weighs_nothing(tokenizer):
    rows = encode_examples(tokenizer, pairs(4))
    batch = collate(rows, tokenizer.eos_id)
    B, T = batch.input_ids.shape
    more = padded(batch, 1000)
    assert more.input_ids.shape[1] % fast_training.TOKENS == 0
    assert more.input_ids.shape[1] - T < fast_training.TOKENS
    assert torch.equal(more.input_ids[:, :T], batch.input_ids)
    assert more.labels.flatten()[more.at].ne(IGNORE).all()
    kept = more.weights.bool()
    assert torch.equal(more.labels.flatten()[more.at[kept]], batch.labels.flatten()[batch.at])
    assert int(kept.sum()) == len(batch.at) < len(more.at)
    assert padded(batch, T).input_ids.shape == (B, T)  # no longer than the model's positions


def test_a_trainer_fuses_what_it_replays(tokenizer, tmp_path, monkeypatch, recordings):
    """The same steps with the switch on; fine-tuning stays plain; the end gives the blocks back."""
    monkeypatch.setattr(training, "fuses", lambda x: True)
    on = trainer(tokenizer, tmp_path / "on", prefix_options=FORMS["mlp"])
    assert all(block.forward.fused for block in on.model.blocks())
    for method in ("finetune", "adapter"):
        other = trainer(tokenizer, tmp_path / method, method=method)
        assert not any(hasattr(block.forward, "fused") for block in other.model.blocks())
    monkeypatch.setattr(training, "fuses", lambda x: False)
    off = trainer(tokenizer, tmp_path / "off", prefix_options=FORMS["mlp"])
    nats = [[float(run.step()["nats"]) for _ in range(3)] for run in (on, off)]
    assert nats[0] == pytest.approx(nats[1], rel=1e-5)  # fp32, sums in another order
    assert recordings
    on.end()
    assert not any("forward" in vars(block) for block in on.model.blocks())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_equal_eager_steps(tokenizer, tmp_path, monkeypatch, form, precision):
    """The same kernels on the same numbers but for padding: bf16 moves by its rounding."""
    sizes = {"n_embd": 64, "n_head": 2, "n_layer": 2}
    results = []
    for graphs in ("0", "1"):
        monkeypatch.setenv("MINPREFIX_CUDA_GRAPHS", graphs)
        run = trainer(
            tokenizer, tmp_path, model=small_model(**sizes).cuda(), precision=precision,
            prefix_options=FORMS[form], **WAY,
        )  # fmt: skip
        results.append(weights_after(8, run)[1])
    assert isinstance(run.passes, GraphedPasses)
    assert results[1] == pytest.approx(results[0], rel=1e-5 if precision == "fp32" else 1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits are of a GPU")
@pytest.mark.parametrize("graphs", ["0", "1"])
def test_a_step_never_waits_for_the_gpu(tokenizer, tmp_path, monkeypatch, graphs):
    monkeypatch.setenv("MINPREFIX_CUDA_GRAPHS", graphs)
    run = trainer(tokenizer, tmp_path, model=small_model(n_embd=64, n_head=2).cuda(), **WAY)
    for _ in range(8):  # kernels are compiled, buckets recorded
        run.step()
    run.step_done = 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            run.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
