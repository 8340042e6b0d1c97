"""The command line: python -m minprefix COMMAND. The larger commands are in files of their own.

Options and their help come from the fields of the config dataclasses (`TrainConfig`,
`PrefixConfig`, `GenerationConfig`), see `options.py`.

Exit codes: 0 done; 1 an error, told in one line (the traceback comes with --debug); 2 wrong usage;
130 Ctrl-C. Results go to stdout, as one JSON object with --json; progress goes to stderr.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from benchmarks.paper import command as paper
from benchmarks.peft.run import RANDOM, BenchConfig, run_bench
from kernels.assembler import report
from minprefix.cli import pretrain, score, search, texts
from minprefix.cli import train as train_command
from minprefix.cli.demo import run_demo
from minprefix.cli.options import OneLineParser, add_fields, from_args
from minprefix.cli.report import format_rows, parameter_rows
from minprefix.data import download as download_data
from minprefix.data.load import DATA_SETS, LINEARISATIONS
from minprefix.data.splits import TOPICS
from minprefix.methods.counts import method_rows
from minprefix.models import weights
from minprefix.models.config import OFFICIAL
from minprefix.prefix import convert
from minprefix.training.loop import Interrupted


def shared_options() -> tuple[argparse.ArgumentParser, ...]:
    """Options that commands share: of all, of those with a model, of those with data."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as one JSON object")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    with_model = argparse.ArgumentParser(add_help=False)
    with_model.add_argument(
        "--model", default="mini", help=f"{', '.join(weights.MODELS)}, a hub id or a folder"
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with_model.add_argument("--device", default=device, help="(default: %(default)s)")
    with_data = argparse.ArgumentParser(add_help=False)
    with_data.add_argument(
        "--data", default="restaurants",
        help=f"'restaurants' or 'notes' (embedded), {', '.join(DATA_SETS)} (see the command data), "
        "a folder (their files, src1_*.txt, *.jsonl) or a file (.csv, .xml, .json, .parquet, .txt "
        "with src||tgt, .jsonl) (default: %(default)s)",
    )  # fmt: skip
    with_data.add_argument(
        "--topics", choices=TOPICS,
        help="only these: seen, unseen (WebNLG), or a split of XSum for extrapolation",
    )  # fmt: skip
    with_data.add_argument(
        "--linearisation", choices=LINEARISATIONS,
        help="how a table becomes text: as the paper prints it, or as its code does (default: as "
        "the prefix or the fine-tuned model was trained; paper for a new run)",
    )  # fmt: skip
    return common, with_model, with_data


def build_parser() -> argparse.ArgumentParser:
    """One sub-command per `run_COMMAND`."""
    common, with_model, with_data = shared_options()
    text = "Prefix-tuning for GPT-2 and BART: tune, write, measure."
    parser = OneLineParser(prog="python -m minprefix", description=text)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, text: str, *parents) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[common, *parents])
        sub.set_defaults(run=run)
        return sub

    text = "Tune a prefix, or a baseline of the paper."
    train = command("train", train_command.run, text, with_model, with_data)
    train_command.add_options(train)

    text = "Search the discrete prompt of P tokens that lowers the loss most; the model is frozen."
    search.add_options(command("search", search.run, text, with_model, with_data))

    gen = command(
        "generate", texts.run_generate, "Write texts; one prompt is streamed.", with_model
    )
    texts.add_generate_options(gen)

    evaluate = command(
        "evaluate", texts.run_evaluate, "Write texts for a data set and score them.",
        with_model, with_data,
    )  # fmt: skip
    texts.add_evaluate_options(evaluate)

    text = "Official scores of a file of texts; no model is needed."
    score.add_options(command("score", score.run, text))

    export = command(
        "export", train_command.run_export, "Write a run's latest prefix, without its MLP."
    )
    export.add_argument("run_folder", type=Path, metavar="RUN")
    export.add_argument("--out", type=Path, required=True, help="prefix file to write")

    text = "Turn a prefix of PEFT, the paper's code or adapter-hub into ours, or ours into PEFT's."
    convert.add_options(command("convert", convert.run, text))

    text = "Train a GPT-2 from scratch on a folder of text, tokenizer included."
    pretrain.add_options(command("pretrain", pretrain.run, text))

    download = command("download", run_download, "Fetch an official model into the hub's cache.")
    download.add_argument("name", help="gpt2, gpt2-medium, ..., or any hub id of the family")

    data = command("data", download_data.run, "Fetch an official data set, or check a copy of it.")
    download_data.add_options(data)

    text = "Parameters of a model, of each method on it, and of a prefix or adapter."
    info = command("info", run_info, text, with_model)
    info.add_argument("--prefix", type=Path, help="prefix file")
    info.add_argument("--adapter", type=Path, help="adapter file")
    text = "only: GPU, versions, assembler, and whether attention runs through the kernels"
    info.add_argument("--gpu", action="store_true", help=text)

    text = "Time training steps or generation, beside transformers + PEFT where installed."
    bench = command("bench", run_bench_command, text, with_model)
    bench.epilog = f"--model may also be {', '.join(RANDOM)}: official sizes, random weights."
    bench.add_argument("work", choices=("train", "generate"), help="what is timed")
    add_fields(bench, BenchConfig)

    text = "A table or figure of the paper, run here: CSV, figure, and which claims hold."
    paper.add_options(command("paper", paper.run, text, with_model))

    demo = command("demo", run_demo_command, "The main job on embedded model and data.")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder")
    return parser


def run_download(args) -> dict:
    return {"name": args.name, "folder": str(weights.fetch(args.name))}


def run_info(args) -> dict | None:
    if args.gpu:
        rows = report()
        if args.json:
            return rows
        print("\n".join(f"{name + ':':10} {text}" for name, text in rows.items()))
        return None
    if args.model in OFFICIAL and not (args.prefix or args.adapter or Path(args.model).is_dir()):
        model = weights.shapes_of(OFFICIAL[args.model][0])  # no need to download the weights
    else:
        model, _ = weights.load(args.model, device=args.device)
    rows = parameter_rows(model, texts.load_prefix(args, model))
    methods = method_rows(model.config)
    if args.json:
        return {"parameters": rows, "methods": methods}
    print(format_rows(rows), format_rows(methods), sep="\n\n")
    return None


def run_bench_command(args) -> dict | None:
    rows = run_bench(args.work, args.model, args.device, from_args(BenchConfig, args))
    if args.json:
        return {"rows": rows}
    print(format_rows(rows))
    return None


def run_demo_command(args) -> dict | None:
    metrics, rows = run_demo(args.out)
    if args.json:
        return metrics
    print(format_rows(rows))
    return None


def describe(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    message = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError, FloatingPointError)) and message:
        return message
    return f"{type(error).__name__}: {message}"


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    args = build_parser().parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    try:
        result = args.run(args)
    except Interrupted as stop:
        print(f"minprefix: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("minprefix: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        print(f"minprefix: error: {describe(error)}", file=sys.stderr)
        return 1
    if result is not None:
        print(json.dumps(result) if args.json else format_rows([result]))
    return 0
