"""Pretraining: it learns, resumes bit for bit, and writes models that other programs can read."""

import json
import math
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_until_killed, tiny_gpt2

import minprefix
from minprefix.models.weights import ASSETS, read_config
from minprefix.training.config import PRESETS, PretrainConfig
from minprefix.training.corpus import load_corpus
from minprefix.training.pretrain import BETAS, MOMENTUM, Pretrainer, make_optimizers, schedule
from minprefix.training.run_folder import read_log, read_state

ROOT = Path(__file__).resolve().parents[2]
TINY = PretrainConfig(
    vocab_size=300, n_positions=16, n_embd=32, n_layer=2, n_head=2, batch_tokens=128, steps=12,
    warmup_steps=4, eval_every=4, log_every=1, precision="fp32", dropout=0.1,
)  # fmt: skip
OPTIONS = ("--vocab-size", 300, "--n-positions", 16, "--n-embd", 32, "--n-layer", 2, "--n-head", 2,
           "--batch-tokens", 128, "--steps", 12, "--warmup-steps", 4, "--eval-every", 4,
           "--log-every", 1, "--device", "cpu")  # fmt: skip


def toy_text(documents: int = 60) -> str:
    """Sentences in which a word is a function of the one before: the context is worth a lot."""
    rng = random.Random(0)
    follows = {"the": "cat dog owl", "cat": "sees", "dog": "hears", "owl": "finds"}
    follows |= dict.fromkeys(("sees", "hears", "finds"), "the") | {".": "the"}
    texts = []
    for _ in range(documents):
        words = ["the"]
        while len(words) < 40:
            words.append(rng.choice(follows[words[-1]].split()))
        texts.append(" ".join(words) + ".")
    return "<|endoftext|>\n".join(texts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of text; no test changes it."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "toy.txt").write_text(toy_text())
    return folder


def run_of(folder: Path, out: Path, **changes) -> Pretrainer:
    config = replace(TINY, **changes)
    return Pretrainer(load_corpus(folder, None, config.vocab_size, config.val_share), config, out)


def losses(out: Path) -> list[tuple]:
    """The parts of log lines that a continued run must repeat bit for bit: all but times."""
    keys = ("step", "loss", "dev_loss", "grad_norm", "lr_share")
    return [tuple(entry.get(key) for key in keys) for entry in read_log(out)]


def test_the_loss_falls_below_the_entropy_of_single_tokens(folder, tmp_path):
    run = run_of(folder, tmp_path, steps=120, eval_every=40, warmup_steps=10, dropout=0.0)
    result = run.run(progress=False)
    first = read_log(tmp_path)[0]["loss"]
    # logits of variance 0.02^2 C = 0.013 at the start add half of that; 0.1 is ample
    assert abs(first - math.log(run.tokenizer.vocab_size)) < 0.1
    # the text has log 3 nats for three of its words at most, far below those of single tokens
    assert result["val_loss"] < 0.6 * result["unigram_entropy"]
    assert result["steps"] == 120 and result["tokens"] == 120 * 128
    n_bytes = len(run.tokenizer.decode_bytes(run.corpus.val))
    nats_per_byte = result["val_loss"] * len(run.corpus.val) / n_bytes
    assert result["bits_per_byte"] == pytest.approx(nats_per_byte / math.log(2))


def test_other_libraries_read_what_is_kept(folder, tmp_path):
    from transformers import GPT2LMHeadModel, GPT2Tokenizer

    run = run_of(folder, tmp_path)
    run.run(progress=False)
    model, tokenizer = minprefix.load(tmp_path, dtype=torch.float64)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    text = "the owl finds the dog. 1, 2 and naïve 👍"
    ids = GPT2Tokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert tokenizer.encode(text) == ids == run.tokenizer.encode(text)
    ids = torch.tensor([ids[:16]])
    with torch.no_grad():
        ours, other = model(ids), theirs(ids).logits
    assert (ours - other).abs().max() < 1e-12 * max(1, ours.abs().max())
    assert theirs.config.eos_token_id == tokenizer.eos_id
    assert model.config.embd_pdrop == 0.1  # for those who fine-tune it, not the run's


@pytest.mark.parametrize("micro", [None, 32])
def test_a_killed_run_goes_on_bit_for_bit(folder, tmp_path, micro):
    whole = run_of(folder, tmp_path / "whole", micro_tokens=micro)
    whole.run(progress=False)
    broken = run_of(folder, tmp_path / "broken", micro_tokens=micro)
    run_until_killed(broken, after=7)
    assert read_state(tmp_path / "broken")["step"] == 4
    with pytest.raises(ValueError, match="holds a run"):
        run_of(folder, tmp_path / "broken", micro_tokens=micro).run(progress=False)
    again = run_of(folder, tmp_path / "broken", micro_tokens=micro)
    again.load_state()
    assert again.step_done == 4
    again.run(progress=False)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


def test_going_on_with_something_else_is_refused(folder, tmp_path):
    run_of(folder, tmp_path, steps=1).run(progress=False)
    with pytest.raises(ValueError, match="differs in adamw_lr, seed"):
        run_of(folder, tmp_path, steps=1, seed=1, adamw_lr=1e-3).load_state()
    other = tmp_path / "other"
    other.mkdir()
    (other / "toy.txt").write_text(toy_text(61))
    with pytest.raises(ValueError, match="differs in held-out text, text"):
        run_of(other, tmp_path, steps=1).load_state()


def test_forward_passes_of_fewer_tokens_give_the_same_step(folder, tmp_path):
    runs = [run_of(folder, tmp_path, dropout=0.0, micro_tokens=m) for m in (None, 16, 48)]
    steps = [run.step() for run in runs]
    for run, step in zip(runs[1:], steps[1:], strict=True):
        assert float(step["nats"]) == pytest.approx(float(steps[0]["nats"]), rel=1e-6)
        assert float(step["norm"]) == pytest.approx(float(steps[0]["norm"]), rel=1e-5)
        assert run.windows.batch(0).shape == (8, 17)


def test_the_schedule():
    config = replace(TINY, steps=1000, warmup_steps=10, hold=0.3, lr_end=0.1)
    at = {step: schedule(step, step / 1000, config) for step in (0, 4, 9, 300, 650, 999)}
    assert at[0] == pytest.approx(0.1) and at[4] == pytest.approx(0.5)
    assert at[9] == at[300] == 1
    assert at[650] == pytest.approx(0.55) and at[999] == pytest.approx(0.1 + 0.9 / 700)


def test_a_time_ends_run_and_schedule(folder, tmp_path):
    run = run_of(folder, tmp_path, steps=1000, time="6s", hold=0.0)
    run.seconds_so_far = lambda: float(run.step_done)  # a clock that ticks once a step
    assert run.run(progress=False)["steps"] == 6
    shares = [entry["lr_share"] for entry in read_log(tmp_path) if "loss" in entry]
    assert len(shares) == 6 and shares[-1] == pytest.approx(1 - 0.97 * 5 / 6)
    assert read_state(tmp_path)["step"] == 6


def test_muon_moves_conv1d_matrices_as_it_moves_those_of_linear_layers():
    """The update of a [in, out] matrix is that of its transpose in the layout that Muon assumes."""
    model = tiny_gpt2(dtype=torch.float32)
    config = replace(TINY, muon_lr=0.1, weight_decay=0.5)
    muon, adamw = make_optimizers(model, config)
    names = [n for n, w in model.named_parameters() if n.startswith("h.") and w.dim() == 2]
    twins = {n: torch.nn.Parameter(model.get_parameter(n).detach().T.clone()) for n in names}
    twin = torch.optim.Muon(twins.values(), lr=0.1, weight_decay=0.5, momentum=0.95)
    for number, (name, weight) in enumerate(twins.items()):
        # far from singular: Muon's bf16 products blow up the noise of small singular values
        generator = torch.Generator().manual_seed(number)
        weight.grad = torch.nn.init.orthogonal_(torch.empty_like(weight), generator=generator)
        model.get_parameter(name).grad = weight.grad.T.clone()
    for group in muon.param_groups:
        group["lr"] = group["peak"]
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    muon.step()
    twin.step()
    for name, weight in model.named_parameters():
        if name in twins:  # its products are in bf16; a wrong orientation is off by 40 % or more
            change, wanted = weight - before[name], twins[name].T - before[name]
            assert (change - wanted).norm() < 0.05 * wanted.norm(), name
        else:
            assert torch.equal(weight, before[name]), name
    both = [id(w) for o in (muon, adamw) for g in o.param_groups for w in g["params"]]
    assert sorted(both) == sorted(map(id, model.parameters()))
    assert len(twins) == 4 * model.config.n_layer


def test_the_preset_mini_is_the_embedded_models_card():
    config, card = PRESETS["mini"], (ASSETS / "mini" / "MODEL_CARD.md").read_text()
    embedded = read_config(ASSETS / "mini")
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        assert getattr(config, name) == getattr(embedded, name), name
    rows = config.batch_tokens // config.n_positions
    said = (
        f"{config.steps:,} steps of {rows} x {config.n_positions} tokens",
        f"Muon (lr {config.muon_lr}, momentum {MOMENTUM}, decay {config.weight_decay})",
        f"betas {BETAS[0]}/{BETAS[1]}",
        f"warm-up {config.warmup_steps} steps, constant for {config.hold:.0%}".replace("%", " %"),
        f"then linear to {config.lr_end:.0%}".replace("%", " %"),
    )
    for text in said:
        assert text in card, text
    assert config.adamw_lr == 2e-3 and "lr 2e-3" in card


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path, monkeypatch):
    run = run_of(folder, tmp_path, eval_every=2)
    nats = run.nats
    run.nats = lambda rows: nats(rows) * (math.nan if run.step_done == 3 else 1)
    with pytest.raises(FloatingPointError, match="loss is nan in step 4: .* muon_lr 0.02"):
        run.run(progress=False)
    assert read_state(tmp_path)["step"] == 2


BAD_CONFIGS = [
    ({"n_positions": 0}, "n_positions must be at least 1"),
    ({"batch_tokens": 100}, "batch_tokens must be a multiple of n_positions 16, got 100"),
    ({"micro_tokens": 8}, "micro_tokens must be a multiple"),
    ({"n_head": 3}, "n_embd 32 is not a multiple of n_head 3"),
    ({"muon_lr": math.inf}, "muon_lr must be positive and finite"),
    ({"hold": 1.0}, "hold must lie in"),
    ({"val_share": 0.0}, "val_share in"),
    ({"precision": "fp8"}, "precision must be one of"),
    ({"seed": -1}, "seed must be >= 0"),
]


@pytest.mark.parametrize("changes, message", BAD_CONFIGS)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_the_command_makes_a_model_and_goes_on(cli, folder, tmp_path):
    out = tmp_path / "run"
    printed, err = cli("pretrain", folder, "--out", out, *OPTIONS, "--json")
    result = json.loads(printed)
    assert result["steps"] == 12 and result["kept"] == str(out) and len(result["samples"]) == 3
    assert "held out" in err and (out / "loss.png").stat().st_size > 1000
    note = json.loads((out / "pretrain.json").read_text())
    assert note["n_embd"] == 32 and note["result"]["val_loss"] == result["val_loss"]
    again, err = cli("pretrain", folder, "--out", out, *OPTIONS, "--json")
    assert json.loads(again) == result and "continuing after step 12" in err
    cli("generate", "--model", out, "the cat", "--max-new-tokens", 3, "--device", "cpu")
    cli("runs", "--slim", out)
    weights = (out / "model.safetensors").read_bytes()
    _, err = cli("pretrain", folder, "--out", out, *OPTIONS, code=1)  # not over the finished model
    assert f"{out} has no state" in err and (out / "model.safetensors").read_bytes() == weights
    printed, _ = cli("pretrain", folder, "--out", tmp_path / "b", *OPTIONS, "--samples", 1)
    assert "unigram_entropy" in printed and "\n[1] " in printed and "[2]" not in printed


def test_a_preset_gives_way_to_options(cli, folder, tmp_path, monkeypatch):
    seen = []

    class Stopped(Exception):
        pass

    def look(corpus, config, *args):
        seen.append(config)
        raise Stopped

    monkeypatch.setattr("minprefix.cli.pretrain.Pretrainer", look)
    argv = ("pretrain", folder, "--out", tmp_path, "--preset", "mini", "--tokenizer", "mini")
    cli(*argv, "--steps=5", "--compile", code=1)
    assert seen == [replace(PRESETS["mini"], steps=5, compile=True)]


def command_errors(folder: Path, tmp_path: Path) -> dict[str, tuple]:
    """{name: (argv, message)}"""
    empty, short, bad, both, ids = (tmp_path / n for n in ("empty", "short", "bad", "both", "ids"))
    for made in (empty, short, bad, both, ids):
        made.mkdir()
    (empty / "notes.md").write_text("no text here")
    (short / "a.txt").write_text("two words")
    (bad / "a.txt").write_bytes(b"fine\nnot \xff fine")
    (both / "a.txt").write_text("text")
    np.save(both / "b.npy", np.arange(9))
    np.save(ids / "b.npy", np.arange(8190, 8200))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "config.json").write_text("{}")
    return {
        "no folder": ((tmp_path / "none",), "none: no such folder"),
        "no text": ((empty,), "empty: no text; expected .txt"),
        "too little": ((short, *OPTIONS), "too little text: .* a window needs 17"),
        "encoding": ((bad,), r"bad/a.txt:2: invalid UTF-8 \(byte 0xff\)"),
        "both": ((both,), "both text and token shards"),
        "no tokenizer": ((ids,), "b.npy: token ids need their tokenizer"),
        "ids": ((ids, "--tokenizer", "mini"), "b.npy: id 8199, but the tokenizer has 0 ... 8191"),
        "small V": ((folder, "--vocab-size", 200), "vocab_size must be at least 257"),
        "two V": ((folder, "--vocab-size", 300, "--tokenizer", "mini"), "--vocab-size is for"),
        "device": ((folder, "--device", "abacus"), "device abacus cannot be used"),
        "taken": (
            (folder, "--out", tmp_path / "taken"),
            "holds a model that was not made by pretrain",
        ),
    }


def test_errors_are_one_line(cli, folder, tmp_path):
    for name, (argv, message) in command_errors(folder, tmp_path).items():
        out = () if "--out" in argv else ("--out", tmp_path / "out")
        _, err = cli("pretrain", *argv, *out, code=2 if name == "two V" else 1)
        assert re.fullmatch(f"minprefix: error: .*{message}.*\n", err), (name, err)
        assert not (tmp_path / "out").exists(), name


SLOWED = """
import sys, time
from minprefix.cli.main import main
from minprefix.training.pretrain import Pretrainer
step = Pretrainer.step
Pretrainer.step = lambda self: (time.sleep(0.1), step(self))[1]
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ctrl_c_leaves_a_model_and_the_same_command_goes_on(cli, folder, tmp_path):
    out = tmp_path / "my run"
    argv = ["pretrain", folder, "--out", out, *OPTIONS, "--steps", 40, "--eval-every", 40]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWED, *map(str, argv)],
        cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    limit = time.monotonic() + 240  # s
    log = out / "log.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stdout == "" and "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    found = re.fullmatch(
        r"minprefix: stopped after step (\d+) of 40; state saved\. Continue with: "
        rf"python -m minprefix pretrain {re.escape(str(folder))} --out '{out}' .*",
        last,
    )
    assert found and 0 < int(found[1]) < 40, last
    minprefix.load(out)  # can be used as it is
    cli(*argv)
    whole = tmp_path / "whole"
    cli(*(whole if word is out else word for word in argv))
    assert losses(out) == losses(whole)
    assert [step for step, loss, *_ in losses(out) if loss] == list(range(1, 41))
    resumed, exact = (minprefix.load(folder)[0].state_dict() for folder in (out, whole))
    assert [name for name in exact if not torch.equal(resumed[name], exact[name])] == []
