"""The command line: python -m minprefix COMMAND, with one function `run_COMMAND` for each below.

Options and their help come from the fields of the config dataclasses (`TrainConfig`,
`PrefixConfig`, `GenerationConfig`), see `options.py`.

Exit codes: 0 done; 1 an error, told in one line (the traceback comes with --debug); 2 wrong usage;
130 Ctrl-C. Results go to stdout, as one JSON object with --json; progress goes to stderr.
"""

import argparse
import json
import math
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from minprefix import convert, download_data, score_files, search_command, weights
from minprefix.baselines import Adapter, BaselineConfig, describe_baseline, make_baseline
from minprefix.batches import encode_prompt
from minprefix.bench import RANDOM, BenchConfig, run_bench
from minprefix.data import DATA_SETS, LINEARISATIONS, load_examples, load_train_and_dev
from minprefix.data_splits import TOPICS, choose, low_data
from minprefix.decoding import GenerationConfig
from minprefix.demo import run_demo
from minprefix.evaluation import METRICS, evaluate_method
from minprefix.files import load_tensors, read_json, write_text
from minprefix.generation import generate, stream
from minprefix.method_counts import OFFICIAL, method_rows, official_config, shapes_of
from minprefix.options import OneLineParser, add_fields, from_args
from minprefix.prefix import Prefix, PrefixConfig, make_prefix
from minprefix.prompting import TEMPLATES, HardPrompt, TokenPrompt, show_examples
from minprefix.ranks import joined
from minprefix.report import format_rows, parameter_rows
from minprefix.run_folder import read_state, state_path
from minprefix.training import KEPT, Interrupted, TrainConfig, Trainer


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
        help=f"'restaurants' (embedded), {', '.join(DATA_SETS)} (see the command data), a folder "
        "(their files, src1_*.txt, *.jsonl) or a file (.csv, .xml, .json, .parquet, .txt with "
        "src||tgt, .jsonl) (default: %(default)s)",
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
    text = "Prefix-tuning for GPT-2: tune, write, measure."
    parser = OneLineParser(prog="python -m minprefix", description=text)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, text: str, *parents) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[common, *parents])
        sub.set_defaults(run=run)
        return sub

    text = "Tune a prefix, or a baseline of the paper."
    train = command("train", run_train, text, with_model, with_data)
    train.add_argument("--dev", help="dev file, where --data is a file")
    train.add_argument("--subset", type=int, help="low data: this many pairs, 30 %% of it for dev")
    train.add_argument("--subset-seed", type=int, default=0, help="which (default: %(default)s)")
    train.add_argument("--out", type=Path, help="run folder to make")
    train.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run folder")
    add_fields(train, TrainConfig)
    add_fields(train, PrefixConfig)
    add_fields(train, BaselineConfig)

    text = "Search the discrete prompt of P tokens that lowers the loss most; the model is frozen."
    search_command.add_options(command("search", search_command.run, text, with_model, with_data))

    gen = command("generate", run_generate, "Write texts; one prompt is streamed.", with_model)
    gen.add_argument("prompts", nargs="*", help="without any: one per line from standard input")
    gen.add_argument("--prefix", type=Path, help="prefix file")
    gen.add_argument("--adapter", type=Path, help="adapter file")
    gen.add_argument(
        "--frame", choices=(*LINEARISATIONS, "none"),
        help="read a prompt as a table, as training with this --linearisation does, or 'none': as "
        "a text to be continued (default: as the prefix was trained; none without a prefix)",
    )  # fmt: skip
    add_fields(gen, GenerationConfig)

    evaluate = command(
        "evaluate", run_evaluate, "Write texts for a data set and score them.",
        with_model, with_data,
    )  # fmt: skip
    evaluate.add_argument("--split", default="test", choices=("train", "dev", "test"))
    evaluate.add_argument("--prefix", type=Path, help="prefix file")
    evaluate.add_argument("--adapter", type=Path, help="adapter file")
    evaluate.add_argument(
        "--hard-prompt", nargs="?", const=TEMPLATES[0], metavar="TEMPLATE",
        help="ask the frozen model in words, {table} stands for the table (default template: "
        f"{TEMPLATES[0]!r})",
    )  # fmt: skip
    evaluate.add_argument("--prompt", type=Path, help="prompt.json of the command search")
    evaluate.add_argument("--shots", type=int, default=0, help="examples in context, from train")
    evaluate.add_argument("--limit", type=int, help="only the first tables")
    evaluate.add_argument("--max-source", type=int, help="cut sources to their first tokens")
    evaluate.add_argument("--batch-size", type=int, default=64, help="tables at a time")
    evaluate.add_argument("--outputs", type=Path, help="write sources and texts, JSON lines")
    evaluate.add_argument(
        "--metrics", default="quick", choices=METRICS,
        help="quick (BLEU, ROUGE-L, slots), a data set's official scores, or auto: by the form of "
        "the data (default: %(default)s)",
    )  # fmt: skip
    add_fields(evaluate, GenerationConfig)

    text = "Official scores of a file of texts; no model is needed."
    score_files.add_options(command("score", score_files.run, text))

    export = command("export", run_export, "Write a run's latest prefix, without its MLP.")
    export.add_argument("run_folder", type=Path, metavar="RUN")
    export.add_argument("--out", type=Path, required=True, help="prefix file to write")

    text = "Turn a prefix of PEFT, the paper's code or adapter-hub into ours, or ours into PEFT's."
    convert.add_options(command("convert", convert.run, text))

    download = command("download", run_download, "Fetch an official model into the hub's cache.")
    download.add_argument("name", help="gpt2, gpt2-medium, ..., or any hub id of the family")

    data = command("data", download_data.run, "Fetch an official data set, or check a copy of it.")
    download_data.add_options(data)

    text = "Parameters of a model, of each method on it, and of a prefix or adapter."
    info = command("info", run_info, text, with_model)
    info.add_argument("--prefix", type=Path, help="prefix file")
    info.add_argument("--adapter", type=Path, help="adapter file")

    text = "Time training steps or generation, beside transformers + PEFT where installed."
    bench = command("bench", run_bench_command, text, with_model)
    bench.epilog = f"--model may also be {', '.join(RANDOM)}: official sizes, random weights."
    bench.add_argument("work", choices=("train", "generate"), help="what is timed")
    add_fields(bench, BenchConfig)

    demo = command("demo", run_demo_command, "The main job on embedded model and data.")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="run folder")
    return parser


def run_train(args) -> dict | None:
    out, settings = run_to_train(args)
    with joined(settings["device"]) as ranks:
        ranks.wait()  # all have looked into `out` before one writes there
        trainer = make_trainer(settings, out)
        if args.resume and state_path(out).exists():
            trainer.load_state()
        elif ranks.first:
            out.mkdir(parents=True, exist_ok=True)
            write_text(out / "config.json", json.dumps(settings, indent=1) + "\n")
        go_on = f"Go on with: python -m minprefix train --resume {shlex.quote(str(out))}"
        try:
            result = trainer.run()
        except Interrupted as stop:
            raise Interrupted(f"{stop}. {go_on}") from None
        except KeyboardInterrupt:  # before the first step, or the second one: the last saved state
            raise Interrupted(f"interrupted. {go_on}") from None
    if not ranks.first:
        return None
    if not math.isfinite(result["best_dev_loss"]):
        result["best_dev_loss"] = None  # without dev data; JSON has no infinity
    return result | {"kept": str(trainer.kept)}


def run_to_train(args) -> tuple[Path, dict]:
    """The run folder and the settings that the options name; ValueError if they do not fit."""
    if (args.out is None) == (args.resume is None):
        raise ValueError("give either --out (a new run) or --resume (a run folder to go on with)")
    if args.resume:
        allowed = ("--resume", "--device", "--json", "--debug")
        given = [word.split("=")[0] for word in args.argv if word.startswith("--")]
        for option in given:
            if option not in allowed:
                raise ValueError(
                    f"{args.resume}: a run keeps its settings, {option} cannot go with --resume"
                )
        settings = read_settings(args.resume)
        return args.resume, settings | ({"device": args.device} if "--device" in given else {})
    if (args.out / "config.json").exists() or state_path(args.out).exists():
        raise ValueError(
            f"{args.out} holds a run: go on with --resume {args.out}, or choose another"
        )
    settings = {
        "model": args.model, "device": args.device, "data": args.data, "dev": args.dev,
        "linearisation": args.linearisation or "paper", "topics": args.topics,
        "subset": args.subset, "subset_seed": args.subset_seed,
        "train": asdict(from_args(TrainConfig, args)),
        "prefix": asdict(from_args(PrefixConfig, args)),
        "baseline": asdict(from_args(BaselineConfig, args)),
    }  # fmt: skip
    return args.out, settings


def read_settings(run_folder: Path) -> dict:
    """What config.json of a run says, checked: the options that `train` was started with."""
    path = run_folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{run_folder}: no run of the command train ({path.name} is missing)")
    settings = read_json(path)
    try:
        TrainConfig(**settings["train"]), PrefixConfig(**settings["prefix"])
        BaselineConfig(**settings.setdefault("baseline", {}))  # older runs have none
        missing = {"model", "device", "data", "dev", "linearisation"} - set(settings)
        if missing:
            raise KeyError(min(missing))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged, not the settings of a run ({error})") from error
    return settings


def make_trainer(settings: dict, out: Path) -> Trainer:
    """The run that the settings describe, at step 0."""
    config = TrainConfig(**settings["train"])
    model, tokenizer = weights.load(settings["model"], device=settings["device"])
    linearisation = settings["linearisation"]
    train, dev = load_train_and_dev(settings["data"], settings["dev"], linearisation)
    topics, size = settings.get("topics"), settings.get("subset")
    train, dev = choose(train, topics, "train"), choose(dev, topics, "dev") if dev else dev
    if size is not None:
        train, dev = low_data(train, dev, size, settings["subset_seed"])
    prefix = None
    if config.method == "prefix":
        prefix = make_prefix(model, tokenizer, PrefixConfig(**settings["prefix"]), config.seed)
        if prefix.init_residual:
            print(f"MLP fitted to the words, largest difference {prefix.init_residual:.1e}",
                  file=sys.stderr)  # fmt: skip
    choice = BaselineConfig(**settings["baseline"])
    baseline = make_baseline(model, config.method, choice, config.seed)
    if baseline is not None:
        print(describe_baseline(baseline, model), file=sys.stderr)
    return Trainer(model, tokenizer, config, train, dev, out, prefix, linearisation, baseline)


def run_generate(args) -> dict | None:
    config = from_args(GenerationConfig, args)
    prompts = args.prompts or read_prompts()
    if "" in prompts:
        raise ValueError(f"prompt {prompts.index('') + 1} is empty")
    model, tokenizer = weights.load(args.model, device=args.device)
    prefix = load_prefix(args, model)
    frame = args.frame or (prefix or model.config).linearisation or "none"
    if frame == "none":
        prompts = [tokenizer.encode(prompt) for prompt in prompts]
    else:
        prompts = [encode_prompt(tokenizer, prompt, frame) for prompt in prompts]
    options = {"prefix": prefix, "config": config}
    if len(prompts) == 1 and config.num_beams == 1 and not args.json:
        pieces, begun = stream(model, tokenizer, prompts[0], **options), frame == "none"
        for piece in pieces:
            piece = piece if begun else piece.lstrip()  # a framed text begins with a blank
            begun = begun or piece != ""
            print(piece, end="", flush=True)
        print()
        return None
    texts = generate(model, tokenizer, prompts, **options)
    if frame != "none":
        texts = [text.strip() for text in texts]
    if args.json:
        return {"texts": texts}
    print("\n".join(texts))
    return None


def load_prefix(args, model) -> Prefix | None:
    """The prefix that --prefix names, on the model's device and made for it.

    What --adapter names is attached to the model.
    """
    if args.adapter and args.prefix:
        raise ValueError("--prefix and --adapter are two methods: choose one")
    if args.adapter:
        Adapter.load(args.adapter).to(args.device).attach(model)
    if not args.prefix:
        return None
    prefix = Prefix.load(args.prefix).to(args.device)
    prefix.check_base(model)
    return prefix


def read_prompts() -> list[str]:
    """The lines of standard input."""
    if sys.stdin.isatty():
        print("one prompt per line, Ctrl-D ends:", file=sys.stderr)
    prompts = []
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            prompts.append(line.rstrip(b"\r\n").decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input:{number}: invalid UTF-8") from error
        if not prompts[-1]:
            raise ValueError(f"standard input:{number}: empty, but each line is a prompt")
    if not prompts:
        raise ValueError("no prompt: give one as an argument, or lines on standard input")
    return prompts


def run_evaluate(args) -> dict:
    asks = args.hard_prompt is not None
    methods = ("prefix", "adapter", "hard_prompt", "prompt")
    given = [f"--{m.replace('_', '-')}" for m in methods if getattr(args, m) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are different methods: choose one")
    if args.shots and not asks:
        raise ValueError("--shots needs --hard-prompt")
    if args.shots and Path(args.data).is_file():
        raise ValueError(f"--shots takes examples from the train split; {args.data} is one file")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {args.limit}")
    if args.outputs and not args.outputs.parent.is_dir():
        raise ValueError(f"--outputs {args.outputs}: {args.outputs.parent} is no folder")
    config = from_args(GenerationConfig, args)
    model, tokenizer = weights.load(args.model, device=args.device)
    prefix = load_prefix(args, model)
    prompt = TokenPrompt.load(args.prompt, tokenizer) if args.prompt else None
    learned = (prefix or prompt or model.config).linearisation
    if learned and args.linearisation not in (None, learned):
        raise ValueError(
            f"{args.prefix or args.adapter or args.prompt or args.model} was trained with "
            f"--linearisation {learned}, not {args.linearisation}"
        )
    linearisation = args.linearisation or learned or "paper"
    load = {"linearisation": linearisation}
    examples = load_examples(args.data, args.split, **load)
    examples = choose(examples, args.topics, args.split)[: args.limit]
    if not (prefix or asks or learned or args.linearisation):
        raise ValueError(
            f"{args.model} was not trained on tables: give --prefix, --adapter, --hard-prompt, a "
            "fine-tuned model, or the --linearisation that it knows"
        )
    if asks:
        prompt = HardPrompt(args.hard_prompt)
        if args.shots:
            train = load_examples(args.data, "train", **load)
            prompt = show_examples(args.hard_prompt, train, args.shots)
    scores, texts = evaluate_method(
        model, tokenizer, examples, prefix=prefix, prompt=prompt, config=config,
        linearisation=linearisation, max_source=args.max_source, batch_size=args.batch_size,
        progress=True, metrics=args.metrics,
    )  # fmt: skip
    if args.outputs:
        rows = ({"source": e.source, "text": t} for e, t in zip(examples, texts, strict=True))
        write_text(args.outputs, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return {"tables": len(examples)} | scores


def run_export(args) -> dict:
    settings = read_settings(args.run_folder)
    config = TrainConfig(**settings["train"])
    if config.method != "prefix":
        raise ValueError(
            f"{args.run_folder} is a run of method {config.method}: "
            f"{args.run_folder / KEPT[config.method]} is all that it keeps"
        )
    state = read_state(args.run_folder)
    model, tokenizer = weights.load(settings["model"])
    prefix = make_prefix(model, tokenizer, PrefixConfig(**settings["prefix"]), config.seed)
    if state["settings"].get("base model") != prefix.base:
        raise ValueError(f"{args.run_folder}: {settings['model']} is not the model of this run")
    try:
        prefix.load_state_dict(state["trained"])
    except RuntimeError as error:
        raise ValueError(f"{args.run_folder}: the state is of another model or prefix") from error
    prefix.linearisation = settings["linearisation"]
    prefix.save(args.out)
    tensors, _ = load_tensors(args.out)
    return {
        "file": str(args.out),
        "step": state["step"],
        "trained_parameters": sum(p.numel() for p in prefix.parameters()),
        "kept_parameters": sum(t.numel() for t in tensors.values()),
        "bytes": args.out.stat().st_size,
    }


def run_download(args) -> dict:
    return {"name": args.name, "folder": str(weights.fetch(args.name))}


def run_info(args) -> dict | None:
    if args.model in OFFICIAL and not (args.prefix or args.adapter or Path(args.model).is_dir()):
        model = shapes_of(official_config(args.model))  # no need to download the weights
    else:
        model, _ = weights.load(args.model, device=args.device)
    rows = parameter_rows(model, load_prefix(args, model))
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
