"""The whole demo, with few steps and tables, and the files that it writes."""

import dataclasses
import json
import signal

import pytest
from matplotlib.image import imread

from minprefix.cli import demo
from minprefix.prefix.prefix import Prefix
from minprefix.training.interrupts import Interrupted

FILES = {"prefix.safetensors", "metrics.json", "samples.txt", "loss.png", "comparison.png"}
METHODS = ["hard prompt", "3 examples in context", "prefix", "fine-tuning"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two steps, few tables, short texts."""
    load = demo.load_examples
    monkeypatch.setattr(demo, "load_examples", lambda *args: load(*args)[:4])
    train = dataclasses.replace(demo.TRAIN, steps=2, batch_size=2, eval_every=1, eval_pairs=2)
    monkeypatch.setattr(demo, "TRAIN", train)
    finetune = dataclasses.replace(train, method="finetune")
    monkeypatch.setattr(demo, "FINETUNE", finetune)
    monkeypatch.setattr(demo, "GENERATE", dataclasses.replace(demo.GENERATE, max_new_tokens=4))


@pytest.mark.slow
def test_demo_leaves_what_it_promises(tmp_path, capsys):
    out = tmp_path / "demo"
    metrics, rows = demo.run_demo(out)
    assert {path.name for path in out.iterdir()} >= FILES
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert [row["method"] for row in rows] == METHODS == list(metrics["methods"])
    kept = Prefix.load(out / "prefix.safetensors").prefix_table.numel()
    assert rows[2]["kept"] == kept == 61440 and rows[0]["trained"] == 0
    assert rows[3]["kept"] == rows[3]["trained"] > 10**7
    for name in ("loss.png", "comparison.png"):
        assert imread(out / name).std() > 0.01  # something is drawn
    samples = (out / "samples.txt").read_text()
    counts = {name: samples.count(f"  {name:<21} | ") for name in METHODS}
    assert counts == dict.fromkeys(METHODS, 4)
    assert samples.count("references:") == 4
    assert "continuing after step 2" not in capsys.readouterr().err

    again, _ = demo.run_demo(out)  # nothing is trained again
    assert "continuing after step 2" in capsys.readouterr().err
    assert again["methods"] == metrics["methods"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["make_prefix", "evaluate_method", "step"])
def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, where):
    """While loading, while writing and within a step; the same call then finishes."""
    if where == "step":
        step = demo.Trainer.step

        def stop(self):
            signal.raise_signal(signal.SIGINT)
            return step(self)

        target, name = demo.Trainer, "step"
    else:

        def stop(*args, **options):
            raise KeyboardInterrupt

        target, name = demo, where
    with monkeypatch.context() as patch:
        patch.setattr(target, name, stop)
        with pytest.raises(Interrupted, match="run the same command to continue"):
            demo.run_demo(tmp_path / "demo")
    assert where == "make_prefix" or Prefix.load(tmp_path / "demo" / "prefix.safetensors")
    demo.run_demo(tmp_path / "demo")
    assert {path.name for path in (tmp_path / "demo").iterdir()} >= FILES
