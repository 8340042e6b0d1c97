"""The command `pretrain`: a GPT-2 from a folder of text; the same command goes on with its run.

    python -m minprefix pretrain books/ --out runs/books
    python -m minprefix pretrain shards/ --tokenizer mini --preset mini --out runs/mini
    python -m minprefix generate --model runs/books "Once upon a time"

Read `run`. `pretrain_data.py` says what the folder may hold and `pretrain.py` how it is trained;
pretrain.json says what the command was started with and, at the end, what was reached.
"""

import argparse
import json
import shlex
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from minprefix.cli.options import add_fields
from minprefix.cli.report import format_rows, plot_loss
from minprefix.files import write_text
from minprefix.generation.texts import generate
from minprefix.models import weights
from minprefix.models.tokenizer import Tokenizer
from minprefix.training.corpus import load_corpus
from minprefix.training.loop import tells_how_to_go_on
from minprefix.training.pretrain import PRESETS, PretrainConfig, Pretrainer
from minprefix.training.run_folder import read_log, state_path

NOTE = "pretrain.json"  # a folder with it is one of this command's
SAMPLE_TOKENS = 60


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "text", type=Path, metavar="FOLDER",
        help=".txt, .txt.gz, .txt.xz; or token ids, .npy, .npy.xz; names that begin with val: "
        "held out",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="run folder and model to make")
    parser.add_argument(
        "--tokenizer", help="mini, a hub id or a folder with vocab.json and merges.txt (default: "
        "one is trained on the text)",
    )  # fmt: skip
    parser.add_argument(
        "--preset", choices=PRESETS, default="small",
        help="sizes and settings where no other is given: small, with the defaults below, or mini, "
        "the recipe of the embedded model, for a GPU (default: %(default)s)",
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=3, help="texts to write at the end")
    add_fields(parser, PretrainConfig)


def config_of(args) -> PretrainConfig:
    """The preset with what the command line gives."""
    given = {word.split("=")[0] for word in args.argv}
    changes = {}
    for field in fields(PretrainConfig):
        flag = field.name.replace("_", "-")
        if given & {f"--{flag}", f"--no-{flag}"}:  # the latter of a bool
            changes[field.name] = getattr(args, field.name)
    if args.tokenizer and "vocab_size" in changes:
        raise ValueError("--vocab-size is for a tokenizer trained here, --tokenizer has its own")
    return replace(PRESETS[args.preset], **changes)


def run(args) -> dict | None:
    """Train and write samples; what was reached and where the model is."""
    config, out = config_of(args), args.out
    weights.check_device(args.device)
    if (out / "config.json").exists() and not (out / NOTE).exists():
        raise ValueError(f"{out} holds a model that pretrain did not make: choose another --out")
    going_on = state_path(out).exists()
    tokenizer = None
    if going_on:
        tokenizer = Tokenizer.from_folder(out)
    elif args.tokenizer:
        tokenizer = Tokenizer.from_folder(weights.find(args.tokenizer))
    with tells_how_to_go_on(f"python -m minprefix {shlex.join(args.argv)}"):
        corpus = load_corpus(args.text, tokenizer, config.vocab_size, config.val_share)
        trainer = Pretrainer(corpus, config, out, args.device)
        say(describe(trainer))
        note = {"text": str(args.text), "tokenizer": args.tokenizer, **asdict(config)}
        if going_on:
            trainer.load_state()
            say(f"{out} holds this run: going on after step {trainer.step_done}")
        else:
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / NOTE, json.dumps(note, indent=1) + "\n")
            corpus.tokenizer.save(out)
        result = trainer.run()
    entropy = {"unigram entropy": result["unigram_entropy"]}
    plot_loss(read_log(out), out / "loss.png", f"Pretraining, {args.text.name}", entropy)
    write_text(out / NOTE, json.dumps(note | {"result": result}, indent=1) + "\n")
    texts = samples(out, args.samples, args.device)
    result |= {"kept": str(out)}
    if args.json:
        return result | {"samples": texts}
    print(format_rows([result]), *(f"\n[{n}] {text}" for n, text in enumerate(texts, 1)), sep="\n")
    return None


def describe(trainer: Pretrainer) -> str:
    """Sizes of text and model, in one line."""
    corpus, config = trainer.corpus, trainer.config
    n = sum(weight.numel() for weight in trainer.model.parameters())
    epochs = config.steps * config.batch_tokens / len(corpus.train)
    return (
        f"{len(corpus.train):,} tokens to train on, {len(corpus.val):,} held out, vocabulary "
        f"{corpus.tokenizer.vocab_size:,}; {n:,} parameters; {config.steps:,} steps are "
        f"{epochs:.1f} epochs"
    )


def samples(folder: Path, count: int, device: str) -> list[str]:
    """Texts that the kept model begins and writes by itself, drawn with seeds 0, 1, ..."""
    model, tokenizer = weights.load(folder, device=device)
    prompts = [[tokenizer.bos_id]] * count
    room = min(SAMPLE_TOKENS, model.config.n_positions - 1)
    options = {"max_new_tokens": room, "do_sample": True, "top_p": 0.9}
    return [text.strip() for text in generate(model, tokenizer, prompts, **options)]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
