"""The command `search`: searches for a discrete prompt, in a run folder that can be continued.

    python -m minprefix search --data e2e-dataset/ --prompt-len 10 --steps 100 --out runs/prompt
    python -m minprefix search --resume runs/prompt

Read `run`. `methods/search/search.py` describes the search and the files of the folder; config.json
holds the options of the command.
"""

import json
import math
import shlex
from dataclasses import asdict
from pathlib import Path

from minprefix.cli.commands import SearchOptions
from minprefix.cli.options import examples_of, resolve_paths
from minprefix.cli.report import say
from minprefix.files import read_json, reading, write_text
from minprefix.methods.config import saved_config
from minprefix.methods.search.search import PromptSearch
from minprefix.models import weights
from minprefix.training.interrupts import resume_hint
from minprefix.training.lock import alone_in
from minprefix.training.run_folder import has_lost_state, has_state

KEYS = ("model", "device", "data", "dev", "linearisation", "search")


def run(options: SearchOptions) -> dict | None:
    """Search; prints or returns the prompt, and the dev losses with it, without a prompt and with
    the written templates."""
    out, settings = folder_and_settings(options)
    search, note = make_search(settings, out)
    with alone_in(out):
        options.check_folder(has_state)  # another process may have finished a search there
        if not search.resume():
            if has_lost_state(out, 0):
                raise ValueError(
                    f"{out} has no state (runs --slim removes it), so it cannot be resumed: start "
                    "a new search with --out"
                )
            write_text(out / "config.json", json.dumps(settings, indent=1) + "\n")
        print_start(search, note)
        with resume_hint(f"python -m minprefix search --resume {shlex.quote(str(out))}"):
            result = search.run()
    print_verdict(result)
    result["kept"] = str(out / ("prompt.json" if search.config.after else "prefix.safetensors"))
    if options.json:
        return result
    for name, value in result.items():  # a text as JSON, so that line breaks are escaped
        print(f"{name}: {json.dumps(value, ensure_ascii=False) if name == 'text' else value}")
    return None


def folder_and_settings(options: SearchOptions) -> tuple[Path, dict]:
    """The run folder and the settings that the options name; ValueError if they do not fit."""
    options.check_folder(has_state)
    if not options.resume:
        assert options.out is not None
        return options.out, options.settings() | {"search": asdict(options.search)}
    path = options.resume / "config.json"
    if not path.is_file():
        raise ValueError(f"{path.parent}: not a run of the command search (config.json is missing)")
    settings = read_json(path)
    if not set(KEYS) <= set(settings):
        what = "; it is a run of the command train" if "train" in settings else ""
        raise ValueError(f"{path}: not the settings of a search{what}")
    with reading(path):
        settings = resolve_paths(settings)
        saved_config(settings["search"])
    return options.resume, settings | ({"device": options.device} if options.device else {})


def make_search(settings: dict, out: Path) -> tuple[PromptSearch, str]:
    """The search that the settings describe, at step 0, and a note about its dev data, or ""."""
    model, tokenizer = weights.load(settings["model"], device=settings["device"])
    train, dev, note = examples_of(settings)
    search = PromptSearch(
        model, tokenizer, saved_config(settings["search"]), train, dev, out,
        settings["linearisation"],
    )  # fmt: skip
    return search, note


def print_start(search: PromptSearch, note: str) -> None:
    """Print the data and what will run; `note` is about the dev data, or ""."""
    config, judges = search.config, len(search.judge_rows)
    if search.has_begun():
        say(f"continuing after step {search.step_done}")
    if note:
        say(note)
    say(
        f"data: {len(search.rows):,} training pairs, {judges:,} others that judge prompts, "
        f"{len(search.dev_rows):,} dev pairs"
    )
    budget = "" if config.budget is None else f" or {config.budget:,} evaluations of pairs"
    say(
        f"run: {config.steps:,} steps{budget}, each with up to {config.candidates} prompts on up "
        f"to {min(config.batch_size, len(search.rows))} pairs"
    )
    if not search.has_begun():
        say(
            f"first: compare {config.starts} starting prompts, and measure the dev loss without a "
            "prompt and with the written templates; an estimate of the time follows after step 1"
        )


def print_verdict(result: dict) -> None:
    """Say so if a written template has a lower dev loss than the prompt that was found."""
    if (written := result.get("dev_loss_template", math.inf)) < result["dev_loss"]:
        say(
            f"note: the best written template is better, with a dev loss of {written:.3f}: search "
            "longer (--steps), or put a part of the prompt after the source (--after)"
        )
