"""The command `search`: a discrete prompt for a data set, in a run folder that can be gone on with.

    python -m minprefix search --data e2e-dataset/ --prompt-len 10 --steps 100 --out runs/prompt
    python -m minprefix search --resume runs/prompt

Read `run`. `prompt_search.py` says how it searches and what the folder holds; config.json is what
the command was started with.
"""

import json
import shlex
from dataclasses import asdict
from pathlib import Path

from minprefix.cli.options import add_fields, from_args
from minprefix.data.load import load_train_and_dev
from minprefix.data.splits import add_subset, choose, low_data
from minprefix.files import read_json, write_text
from minprefix.methods.search.search import PromptSearch, SearchConfig, saved_config
from minprefix.models import weights
from minprefix.training.loop import tells_how_to_go_on
from minprefix.training.run_folder import state_path

KEYS = ("model", "device", "data", "dev", "linearisation", "search")
ALLOWED = ("--resume", "--device", "--json", "--debug")  # with --resume


def add_options(parser) -> None:
    """Options of the command, beside those of model and data."""
    parser.add_argument("--dev", help="dev file, where --data is a file")
    parser.add_argument("--out", type=Path, help="run folder to make")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with this run folder")
    add_subset(parser)
    add_fields(parser, SearchConfig)


def run(args) -> dict | None:
    """Search; the prompt, its dev loss and that of no prompt and of the written templates."""
    out, settings = run_to_search(args)
    search = make_search(settings, out)
    if not search.resume():
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "config.json", json.dumps(settings, indent=1) + "\n")
    with tells_how_to_go_on(f"python -m minprefix search --resume {shlex.quote(str(out))}"):
        result = search.run()
    result["kept"] = str(out / ("prompt.json" if search.config.after else "prefix.safetensors"))
    if args.json:
        return result
    for name, value in result.items():  # a text as JSON: line breaks and the like escaped
        print(f"{name}: {json.dumps(value, ensure_ascii=False) if name == 'text' else value}")
    return None


def run_to_search(args) -> tuple[Path, dict]:
    """The run folder and the settings that the options name; ValueError if they do not fit."""
    if (args.out is None) == (args.resume is None):
        raise ValueError(
            "give either --out (a new search) or --resume (a run folder to go on with)"
        )
    if args.resume:
        given = [word.split("=")[0] for word in args.argv if word.startswith("--")]
        for option in given:
            if option not in ALLOWED:
                raise ValueError(
                    f"{args.resume}: a search keeps its settings, {option} cannot go with --resume"
                )
        path = args.resume / "config.json"
        if not path.is_file():
            raise ValueError(
                f"{args.resume}: no run of the command search (config.json is missing)"
            )
        settings = read_json(path)
        if not set(KEYS) <= set(settings):
            raise ValueError(f"{path}: not the settings of a search")
        return args.resume, settings | ({"device": args.device} if "--device" in given else {})
    if (args.out / "config.json").exists() or state_path(args.out).exists():
        raise ValueError(
            f"{args.out} holds a run: go on with --resume {args.out}, or choose another"
        )
    settings = {
        "model": args.model, "device": args.device, "data": args.data, "dev": args.dev,
        "linearisation": args.linearisation or "paper", "topics": args.topics,
        "subset": args.subset, "subset_seed": args.subset_seed,
        "search": asdict(from_args(SearchConfig, args)),
    }  # fmt: skip
    return args.out, settings


def make_search(settings: dict, out: Path) -> PromptSearch:
    """The search that the settings describe, at step 0."""
    model, tokenizer = weights.load(settings["model"], device=settings["device"])
    train, dev = load_train_and_dev(settings["data"], settings["dev"], settings["linearisation"])
    topics, given = settings.get("topics"), settings["search"]  # older searches have no topics
    train, dev = choose(train, topics, "train"), choose(dev, topics, "dev") if dev else dev
    if settings.get("subset") is not None:
        train, dev = low_data(train, dev, settings["subset"], settings["subset_seed"])
    return PromptSearch(
        model, tokenizer, saved_config(given), train, dev, out, settings["linearisation"]
    )
