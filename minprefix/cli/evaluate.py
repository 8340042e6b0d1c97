"""The command `evaluate`: a text for every table of a split, and their scores. Read `run`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.constructors import PrimitiveConstructorSpec

from minprefix.cli.options import Flat, WithData, WithTrained, load_trained
from minprefix.data.load import load_examples
from minprefix.data.splits import choose
from minprefix.files import write_text
from minprefix.generation.decoding import GenerationConfig
from minprefix.generation.texts import frame_of
from minprefix.methods.evaluate import METRICS, evaluate_method
from minprefix.methods.hard_prompt import TEMPLATES, HardPrompt, TokenPrompt, show_examples
from minprefix.models import weights


def template_of(words: list[str]) -> str:
    """The template that the words after --hard-prompt name: one, or the default."""
    if len(words) > 1:
        raise ValueError(f"expected one template, in quotes, got {len(words)} words")
    return words[0] if words else TEMPLATES[0]


Template = Annotated[
    str | None,
    PrimitiveConstructorSpec(
        nargs="*", metavar="[TEMPLATE]", instance_from_str=template_of,
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [str(value)],
    ),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options(WithTrained, WithData):
    split: Literal["train", "dev", "test"] = "test"  # which examples
    # ask the frozen model in words, in which {table} stands for the table; without a TEMPLATE: in
    # the first of its built-in ones
    hard_prompt: Template = None
    prompt: Path | None = None  # prompt.json of the command search
    shots: int = 0  # examples in context, from the training split
    limit: int | None = None  # only the first tables
    max_source: int | None = None  # cut sources to their first tokens; None = as in training
    batch_size: int = 64  # tables at a time
    outputs: Path | None = None  # write sources and texts to this file, as JSON lines
    # quick (BLEU, ROUGE-L, slots), a data set's official scores, or auto: by the form of the data
    metrics: Literal[*METRICS] = "quick"
    generation: Flat[GenerationConfig] = GenerationConfig()


def run(options: Options) -> dict:
    """Write a text for every table of a split and score them."""
    check(options)
    model, tokenizer = weights.load(options.model, device=options.where)
    prefix = load_trained(options, model)
    prompt = TokenPrompt.load(options.prompt, tokenizer) if options.prompt else None
    learned, cut = (prompt.linearisation, None) if prompt else frame_of(model, prefix)
    linearisation = check_frame(options, learned, cut)
    examples = load_examples(options.data, options.split, linearisation=linearisation)
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
            train = load_examples(options.data, "train", linearisation=linearisation)
            prompt = show_examples(options.hard_prompt, train, options.shots)
    scores, texts = evaluate_method(
        model, tokenizer, examples, prefix=prefix, prompt=prompt, config=options.generation,
        linearisation=linearisation, max_source=options.max_source, batch_size=options.batch_size,
        progress=True, metrics=options.metrics,
    )  # fmt: skip
    if options.outputs:
        rows = ({"source": e.source, "text": t} for e, t in zip(examples, texts, strict=True))
        write_text(options.outputs, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    return {"tables": len(examples)} | scores


def check(options: Options) -> None:
    """ValueError for options that do not go together, before anything is loaded."""
    methods = ("prefix", "adapter", "hard_prompt", "prompt")
    given = [f"--{m.replace('_', '-')}" for m in methods if getattr(options, m) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are different methods: choose one")
    if options.shots and options.hard_prompt is None:
        raise ValueError("--shots needs --hard-prompt")
    if options.shots and Path(options.data).is_file():
        raise ValueError(f"--shots takes examples from the train split; {options.data} is one file")
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}")
    if options.outputs and not options.outputs.parent.is_dir():
        raise ValueError(f"--outputs {options.outputs}: {options.outputs.parent} is no folder")


def check_frame(options: Options, learned: str | None, cut: int | None) -> str:
    """The linearisation to use; ValueError if training had another one, or another --max-source."""
    trained = options.prefix or options.adapter or options.prompt or options.model
    for option, given, known in (
        ("--linearisation", options.linearisation, learned),
        ("--max-source", options.max_source, cut),
    ):
        if known and given not in (None, known):
            raise ValueError(f"{trained} was trained with {option} {known}, not {given}")
    return options.linearisation or learned or "paper"
