"""The command `pretrain`: trains a GPT-2 on a folder of text; the same command continues its run.

    python -m minprefix pretrain books/ --out runs/books
    python -m minprefix pretrain shards/ --tokenizer mini --preset mini --out runs/mini
    python -m minprefix generate --model runs/books "Once upon a time"

Read `run`. `training/corpus.py` describes the folder and `training/pretrain.py` the training;
pretrain.json holds the options of the command and, at the end, its results.
"""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minprefix.cli.commands import PretrainOptions
from minprefix.cli.parse import WrongUsage
from minprefix.cli.report import format_rows, plot_loss, say
from minprefix.files import write_text
from minprefix.generation.texts import generate
from minprefix.models import weights
from minprefix.models.tokenizer import Tokenizer
from minprefix.training.config import PRESETS, PretrainConfig
from minprefix.training.corpus import load_corpus
from minprefix.training.interrupts import resume_hint
from minprefix.training.lock import alone_in
from minprefix.training.pretrain import Pretrainer
from minprefix.training.run_folder import has_lost_state, has_state, read_log

NOTE = "pretrain.json"  # marks a folder of this command
SAMPLE_TOKENS = 60


def config_of(options: PretrainOptions) -> PretrainConfig:
    """The settings of the run; ValueError if they do not fit the tokenizer."""
    if options.tokenizer and options.pretrain.vocab_size != PRESETS[options.preset].vocab_size:
        raise WrongUsage(
            "--vocab-size is for a tokenizer that is trained here; the one of --tokenizer has its "
            "own"
        )
    return options.pretrain


def run(options: PretrainOptions) -> dict | None:
    """Train and generate samples; returns the results and the folder of the model."""
    config, out = config_of(options), options.out
    weights.check_device(options.where)
    if (out / "config.json").exists() and not (out / NOTE).exists():
        raise ValueError(f"{out} holds a model that was not made by pretrain: choose another --out")
    if has_lost_state(out, config.eval_every):
        raise ValueError(
            f"{out} has no state (runs --slim removes it), so it cannot be resumed: choose another "
            "--out"
        )
    resuming = has_state(out)
    tokenizer = None
    if resuming:
        tokenizer = Tokenizer.from_folder(out)
    elif options.tokenizer:
        tokenizer = Tokenizer.from_folder(weights.find(options.tokenizer))
    with resume_hint(f"python -m minprefix {shlex.join(['pretrain', *options.words])}"):
        corpus = load_corpus(options.text, tokenizer, config.vocab_size, config.val_share)
        trainer = Pretrainer(corpus, config, out, options.where)
        say(describe(trainer))
        with alone_in(out):
            result = pretrain(options, trainer, resuming)
    texts = samples(out, options.samples, options.where)
    result |= {"kept": str(out)}
    if options.json:
        return result | {"samples": texts}
    print(format_rows([result]), *(f"\n[{n}] {text}" for n, text in enumerate(texts, 1)), sep="\n")
    return None


def pretrain(options: PretrainOptions, trainer: Pretrainer, resuming: bool) -> dict:
    """Train, once the run folder is locked; returns the results."""
    out, corpus = trainer.out, trainer.corpus
    if has_state(out) != resuming:  # what was read before the lock was taken
        raise ValueError(f"another process was working in {out}: run this command again")
    note = {"text": str(options.text), "tokenizer": options.tokenizer, **asdict(trainer.config)}
    if resuming:
        trainer.load_state()
        say(f"{out} holds this run: continuing after step {trainer.step_done}")
    else:
        write_text(out / NOTE, json.dumps(note, indent=1) + "\n")
        corpus.tokenizer.save(out)
    result = trainer.run()
    entropy = {"unigram entropy": result["unigram_entropy"]}
    plot_loss(read_log(out), out / "loss.png", f"Pretraining, {options.text.name}", entropy)
    write_text(out / NOTE, json.dumps(note | {"result": result}, indent=1) + "\n")
    return result


def describe(trainer: Pretrainer) -> str:
    """The sizes of the text and the model, in one line."""
    corpus, config = trainer.corpus, trainer.config
    n = sum(weight.numel() for weight in trainer.model.parameters())
    epochs = config.steps * config.batch_tokens / len(corpus.train)
    return (
        f"{len(corpus.train):,} tokens to train on, {len(corpus.val):,} held out, vocabulary "
        f"{corpus.tokenizer.vocab_size:,}; {n:,} parameters; {config.steps:,} steps are "
        f"{epochs:.1f} epochs"
    )


def samples(folder: Path, count: int, device: str) -> list[str]:
    """Texts that the kept model generates from nothing, sampled with seeds 0, 1, ..."""
    model, tokenizer = weights.load(folder, device=device)
    prompts = [[tokenizer.bos_id]] * count
    room = min(SAMPLE_TOKENS, model.config.n_positions - 1)
    options: Any = {"max_new_tokens": room, "do_sample": True, "top_p": 0.9}
    return [text.strip() for text in generate(model, tokenizer, prompts, **options)]
