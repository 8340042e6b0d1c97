"""The command `evaluate`: a text for every table of a split, and their scores. Read `run`."""

import json
from pathlib import Path
from typing import Any

from minprefix.cli.commands import EvaluateOptions
from minprefix.cli.trained import load_model, load_trained
from minprefix.data.load import load_examples
from minprefix.data.splits import choose
from minprefix.files import write_text
from minprefix.generation.texts import frame_of
from minprefix.methods.evaluate import evaluate_method
from minprefix.methods.hard_prompt import HardPrompt, TokenPrompt, show_examples
from minprefix.metrics.quick import check_tokenizer
from minprefix.training.run_folder import append_scores


def run(options: EvaluateOptions) -> dict:
    """Write a text for every table of a split and score them."""
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
            "a fine-tuned model, or the --linearisation that it knows"
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
    if options.outputs:
        rows = ({"source": e.source, "text": t} for e, t in zip(examples, texts, strict=True))
        write_text(options.outputs, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    result = {"tables": len(examples)} | scores
    for given in (options.prefix, options.adapter, options.prompt, Path(options.model)):
        if given is not None:  # a file of a run folder, perhaps
            what = {"data": str(options.data), "split": options.split}
            append_scores(given.parent, what | result)
    return result


def check(options: EvaluateOptions) -> None:
    """ValueError for options that do not go together, before anything is loaded."""
    methods = ("prefix", "adapter", "hard_prompt", "prompt")
    given = [f"--{m.replace('_', '-')}" for m in methods if getattr(options, m) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are different methods: choose one")
    if options.shots and options.hard_prompt is None:
        raise ValueError("--shots needs --hard-prompt")
    if options.shots and Path(options.data).is_file():
        raise ValueError(
            f"--shots takes examples from the training split, but {options.data} is one file"
        )
    if options.metrics != "auto":
        check_tokenizer(options.metrics, options.score_tokenizer)
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}")
    if options.outputs and not options.outputs.parent.is_dir():
        raise ValueError(f"--outputs {options.outputs}: {options.outputs.parent} is not a folder")


def check_frame(options: EvaluateOptions, learned: str | None, cut: int | None) -> str:
    """The linearisation to use; ValueError if training had another one, or another --max-source."""
    trained = options.prefix or options.adapter or options.prompt or options.model
    for option, given, known in (
        ("--linearisation", options.linearisation, learned),
        ("--max-source", options.max_source, cut),
    ):
        if known and given not in (None, known):
            raise ValueError(f"{trained} was trained with {option} {known}, not {given}")
    return options.linearisation or learned or "paper"
