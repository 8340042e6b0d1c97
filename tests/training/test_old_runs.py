"""Files written by an older version: they load, and continued runs give that version's results.

`tests/data/old` holds a tiny random model, and runs of it that were stopped by Ctrl-C after half of
their steps. expected.json has the results that the old version reached from there. Other machines
sum in another order, so fp32 losses may differ by 1e-4 after six steps, far less than after one
different step.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from minprefix.methods.adapters import Adapter
from minprefix.methods.hard_prompt import TokenPrompt
from minprefix.models.weights import load
from minprefix.prefix.prefix import Prefix
from minprefix.training.run_folder import read_log

OLD = Path(__file__).resolve().parents[1] / "data" / "old"
EXPECTED = json.loads((OLD / "expected.json").read_text())
PRETRAIN = (
    "pretrain", "text", "--out", "pretrain", "--device", "cpu", "--samples", "0", "--tokenizer",
    "model", "--n-positions", "16", "--n-embd", "8", "--n-layer", "1", "--n-head", "2", "--steps",
    "6", "--batch-tokens", "64", "--eval-every", "3", "--log-every", "1", "--warmup-steps", "2",
    "--val-share", "0.1",
)  # fmt: skip
RESUME = {name: ("train", "--resume", name) for name in ("prefix", "adapter", "top")}
RESUME |= {"search": ("search", "--resume", "search"), "pretrain": PRETRAIN}


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A copy of the old files, in the working directory: their settings name relative paths."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def same(entry: dict, expected: dict) -> bool:
    """Whether a log line has all that the older version logged."""
    return all(
        entry[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
        for name, value in expected.items()
    )


@pytest.mark.parametrize("name", RESUME)
def test_an_old_run_goes_on_as_it_would_have(cli, old, name):
    cli(*RESUME[name])
    log = read_log(old / name)
    assert len(log) == len(EXPECTED[name])
    for entry, expected in zip(log, EXPECTED[name], strict=True):
        assert same(entry, expected), (entry, expected)


def test_an_old_run_is_exported(cli, old):
    cli(*RESUME["prefix"])
    cli("export", "prefix", "--out", "table.safetensors")
    table = Prefix.load("table.safetensors").prefix_table.flatten()
    assert table.tolist() == pytest.approx(EXPECTED["prefix table"], abs=1e-4)


@torch.no_grad()
def test_old_files_of_a_prefix_an_adapter_and_a_prompt_are_read(old):
    model, tokenizer = load("model")
    ids = torch.tensor([[*tokenizer.encode("place : dune"), tokenizer.bos_id]])
    logits = model(ids, prefix=Prefix.load("prefix/prefix.safetensors"))[0, -1, :8]
    assert logits.tolist() == pytest.approx(EXPECTED["prefix logits"], abs=1e-5)
    Adapter.load("adapter/adapter.safetensors").attach(model)
    logits = model(ids)[0, -1, :8]
    assert logits.tolist() == pytest.approx(EXPECTED["adapter logits"], abs=1e-5)
    found = json.loads(Path("search/prompt.json").read_text())
    prompt = TokenPrompt.load("search/prompt.json", tokenizer)
    assert (prompt.before, prompt.after) == (found["before"], found["behind"])
