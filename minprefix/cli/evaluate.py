"""The command `evaluate`: generates and scores a text for every table of a split. Read `run`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minprefix.cli.commands import EvaluateOptions
from minprefix.cli.parse import WrongUsage
from minprefix.cli.report import format_rows, say
from minprefix.cli.trained import load_model, load_trained
from minprefix.data.examples import Example
from minprefix.data.load import load_examples
from minprefix.data.splits import choose
from minprefix.files import read_json, write_text
from minprefix.generation.texts import frame_of
from minprefix.methods.evaluate import evaluate_method
from minprefix.methods.hard_prompt import HardPrompt, TokenPrompt, show_examples
from minprefix.metrics.quick import check_tokenizer, facts, known_values
from minprefix.training.run_folder import append_scores


def run(options: EvaluateOptions) -> dict | None:
    """Generate a text for every table of a split and score the texts."""
    check(options)
    model, tokenizer = load_model(options)
    prefix = load_trained(options, model)
    prompt = TokenPrompt.load(options.prompt, tokenizer) if options.prompt else None
    learned, cut = (prompt.linearisation, None) if prompt else frame_of(model, prefix)
    linearisation = check_frame(options, learned, cut)
    how: Any = {"linearisation": linearisation, "language": options.language}
    examples = load_examples(options.data, options.split, **how)
    examples = choose(examples, options.topics, options.split)[: options.limit]
    asks = options.hard_prompt is not None
    if not (prefix or asks or learned or options.linearisation):
        raise ValueError(
            f"{options.model} was not trained on tables: give --prefix, --adapter, --hard-prompt, "
            "a fine-tuned model, or the --linearisation of its training"
        )
    if options.hard_prompt is not None:
        prompt = HardPrompt(options.hard_prompt)
        if options.shots:
            train = load_examples(options.data, "train", **how)
            prompt = show_examples(options.hard_prompt, train, options.shots)
    scores, texts = evaluate_method(
        model, tokenizer, examples, prefix=prefix, prompt=prompt, config=options.generation,
        linearisation=linearisation, max_source=options.max_source, batch_size=options.batch_size,
        progress=True, metrics=options.metrics, score_tokenizer=options.score_tokenizer,
    )  # fmt: skip
    result = {"tables": len(examples)} | scores
    for given in (options.prefix, options.adapter, options.prompt, Path(options.model)):
        if given is not None:  # it may be a file in a run folder
            split = options.split
            if was_trained_on(given.parent, options.data, split):
                split = "train"
                say(
                    f"note: {given} was trained on these texts of {options.data}, so the "
                    "scores say nothing about unseen inputs"
                )
            append_scores(given.parent, {"data": str(options.data), "split": split} | result)
    if options.outputs:  # after scores.jsonl, which then has the scores if this fails
        rows = outputs_of(examples, texts)
        write_text(options.outputs, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    if options.json:
        return result
    print(format_rows([result]))
    return None


def outputs_of(examples: Sequence[Example], texts: Sequence[str]) -> Iterator[dict]:
    """The entry of --outputs for each text; for a table, with the facts that are missing or wrong,
    as (field, value)."""
    known = known_values(examples)
    for example, text in zip(examples, texts, strict=True):
        row: dict[str, Any] = {"source": example.source, "text": text}
        row["references"] = example.targets
        if example.table:
            found = facts(text, example.table, known)
            row |= {"missing": found.missing, "wrong": found.wrong}
        yield row


def was_trained_on(folder: Path, data: str, split: str) -> bool:
    """Whether a run folder was trained on `data` (a file) or on this split of it (a folder)."""
    if not ((folder / "config.json").is_file() and (folder / "log.jsonl").is_file()):
        return False
    settings = read_json(folder / "config.json")
    trained, here = str(settings.get("data")), Path(data)
    there = Path(str(settings.get("from") or "."), trained)
    same = trained == data or (there.exists() and here.exists() and there.samefile(here))
    return same and (here.is_file() or split == "train")


def check(options: EvaluateOptions) -> None:
    """WrongUsage for options that contradict each other, before anything is loaded."""
    methods = ("prefix", "adapter", "hard_prompt", "prompt")
    given = [f"--{m.replace('_', '-')}" for m in methods if getattr(options, m) is not None]
    if len(given) > 1:
        raise WrongUsage(f"{' and '.join(given)} are different methods: choose one")
    if options.shots and options.hard_prompt is None:
        raise WrongUsage("--shots needs --hard-prompt")
    if options.shots and Path(options.data).is_file():
        raise WrongUsage(
            f"--shots takes examples from the training split, but {options.data} is one file"
        )
    if options.metrics != "auto":
        check_tokenizer(options.metrics, options.score_tokenizer)
    if options.limit is not None and options.limit < 1:
        raise WrongUsage(f"--limit must be at least 1, got {options.limit}")
    if options.outputs and options.outputs.is_dir():
        raise ValueError(f"--outputs {options.outputs}: a folder; give a file")
    if options.outputs and not options.outputs.parent.is_dir():
        raise ValueError(f"--outputs {options.outputs}: {options.outputs.parent} is not a folder")


def check_frame(options: EvaluateOptions, learned: str | None, cut: int | None) -> str:
    """The linearisation to use; ValueError if training used another one, or another
    --max-source."""
    trained = options.prefix or options.adapter or options.prompt or options.model
    for option, given, known in (
        ("--linearisation", options.linearisation, learned),
        ("--max-source", options.max_source, cut),
    ):
        if known and given not in (None, known):
            raise ValueError(f"{trained} was trained with {option} {known}, not {given}")
    return options.linearisation or learned or "paper"
