"""The main task on the embedded model and data: tune a prefix, generate texts, score them.

Four methods describe restaurants that are not in the training data: a hard prompt, a hard prompt
with examples in context and a prefix of 10 positions, all with the frozen model, and fine-tuning,
which changes a copy of the model. `make demo` runs it.
"""

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from minprefix.cli.commands import DemoOptions
from minprefix.cli.report import format_rows, plot_comparison, plot_loss, say, write_samples
from minprefix.data.load import load_examples
from minprefix.files import write_text
from minprefix.generation.config import GenerationConfig
from minprefix.methods.adapters import count
from minprefix.methods.config import TEMPLATES
from minprefix.methods.evaluate import evaluate_method
from minprefix.methods.hard_prompt import HardPrompt, show_examples
from minprefix.models.weights import load
from minprefix.prefix.config import PrefixConfig
from minprefix.prefix.make import make_prefix
from minprefix.prefix.prefix import Prefix
from minprefix.training.config import TrainConfig
from minprefix.training.interrupts import Interrupted
from minprefix.training.lock import alone_in
from minprefix.training.precision import cpu_has_bf16
from minprefix.training.run_folder import read_log
from minprefix.training.trainer import Trainer

# fewer steps without bf16: fp32 takes more than twice the time, and the demo should take 4 minutes
BF16 = cpu_has_bf16()
TRAIN = TrainConfig(
    steps=700 if BF16 else 280, batch_size=16, lr=1e-3, warmup_steps=20,
    precision="bf16" if BF16 else "fp32", eval_every=100, eval_pairs=160,
)  # fmt: skip
# few steps, so that the demo takes four minutes; benchmarks/copying.py fine-tunes for longer
FINETUNE = replace(TRAIN, method="finetune", steps=(TRAIN.steps or 0) // 7, eval_every=50)
PREFIX = PrefixConfig(prefix_len=10, init="words")
GENERATE = GenerationConfig(max_new_tokens=60)
SHOTS = 3  # examples in context


def run(options: DemoOptions) -> dict | None:
    metrics, rows = run_demo(options.out)
    if options.json:
        return metrics
    print(format_rows(rows))
    return None


def run_demo(out: Path) -> tuple[dict, list[dict]]:
    """Run the demo in the folder `out`; returns the contents of metrics.json and the table's rows.

    A finished or interrupted training in `out` is continued.

    Raises:
        Interrupted: a signal came; the message says how to continue.
    """
    advice = f"run the same command to continue ({out} keeps what is done)"
    try:
        with alone_in(out):
            return tune_write_measure(out)
    except Interrupted as stop:
        raise Interrupted(
            f"{stop}; {out / 'prefix.safetensors'} can be used; {advice}", stop.number
        ) from None
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {advice}") from None


def tune_write_measure(out: Path) -> tuple[dict, list[dict]]:
    """The work of `run_demo`."""
    began = time.perf_counter()
    model, tokenizer = load("mini")
    train, dev, test = (load_examples("restaurants", split) for split in ("train", "dev", "test"))
    say(f"model mini, {count(model):,} parameters")
    say(f"{sum(len(e.targets) for e in train):,} training pairs, {len(test)} unseen test tables")
    prefix = make_prefix(model, tokenizer, PREFIX, TRAIN.seed)
    trainer = Trainer(model, tokenizer, TRAIN, train, dev, out, prefix)
    say("training a prefix; the model is frozen")
    training = tune(trainer, out)
    kept = Prefix.load(out / "prefix.safetensors")
    n_trained, n_kept = count(prefix), kept.prefix_table.numel()
    say("fine-tuning a copy of the model, for comparison")
    copy = Trainer(load("mini")[0], tokenizer, FINETUNE, train, dev, out / "finetuned")
    tune(copy, copy.out)
    finetuned, _ = load(copy.kept)

    methods: dict[str, tuple[Any, dict[str, Any], int, int]] = {  # model, method, trained, kept
        "hard prompt": (model, {"prompt": HardPrompt()}, 0, 0),
        f"{SHOTS} examples in context":
            (model, {"prompt": show_examples(TEMPLATES[0], train, SHOTS)}, 0, 0),
        "prefix": (model, {"prefix": kept}, n_trained, n_kept),
        "fine-tuning": (finetuned, {}, count(model), count(model)),
    }  # fmt: skip
    rows, texts, scores = [], {}, {}
    for name, (writer, method, trained, shipped) in methods.items():
        say(f"generating {len(test)} texts: {name}")
        scores[name], texts[name] = evaluate_method(
            writer, tokenizer, test, config=GENERATE, progress=True, **method
        )
        rows.append(row(name, scores[name], trained, shipped, model))
    metrics = {
        "methods": scores,
        "parameters_trained": n_trained,
        "parameters_kept": n_kept,
        "training": training | asdict(TRAIN),
        "prefix": asdict(PREFIX),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
    }
    write_text(out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    write_samples(out / "samples.txt", test, texts)
    plot_loss(read_log(out), out / "loss.png", "Tuning a prefix on restaurant tables")
    plot_comparison(rows, out / "comparison.png", "Unseen restaurants, frozen mini GPT-2")
    say(f"{out}: prefix.safetensors, metrics.json, samples.txt, loss.png, comparison.png")
    return metrics, rows


def tune(trainer: Trainer, out: Path) -> dict:
    """Train to the end, from the last state in `out` if there is one."""
    if trainer.resume():
        say(
            f"{out} holds a run: continuing after step {trainer.step_done} (delete the folder to "
            "start again)"
        )
    result = trainer.run()
    trainer.check_result()
    return result


def row(name: str, scores: dict[str, float], n_trained: int, n_kept: int, model) -> dict:
    """One line of the printed table. Trained parameters include the MLP; kept ones do not."""
    total = count(model)
    return {
        "method": name,
        "BLEU": scores["bleu"],
        "ROUGE-L": scores["rouge_l"],
        "slots %": scores["slot_coverage"],
        "trained": n_trained,
        "% of model": 100 * n_trained / total,
        "kept": n_kept,
        "kept %": 100 * n_kept / total,
    }
