"""The commands `generate` and `evaluate`: texts of a model, and what was trained for it.

Read `load_prefix` (what --prefix and --adapter name), then `run_generate` and `run_evaluate`.
"""

import argparse
import json
import sys
from pathlib import Path

from minprefix.cli.options import add_fields, from_args
from minprefix.data.batches import encode_prompt, for_bart
from minprefix.data.load import LINEARISATIONS, load_examples
from minprefix.data.splits import choose
from minprefix.files import write_text
from minprefix.generation.decoding import GenerationConfig
from minprefix.generation.texts import generate, stream
from minprefix.methods.adapters import Adapter
from minprefix.methods.evaluate import METRICS, evaluate_method
from minprefix.methods.hard_prompt import TEMPLATES, HardPrompt, TokenPrompt, show_examples
from minprefix.models import weights
from minprefix.models.attached import frame_of
from minprefix.prefix.prefix import Prefix


def load_prefix(args, model) -> Prefix | None:
    """The prefix that --prefix names, on the model's device and made for it.

    What --adapter names is attached to the model.
    """
    if args.adapter and args.prefix:
        raise ValueError("--prefix and --adapter are different methods: choose one")
    if args.adapter:
        Adapter.load(args.adapter).to(args.device).attach(model)
    if not args.prefix:
        return None
    prefix = Prefix.load(args.prefix).to(args.device)
    prefix.check_base(model)
    return prefix


def add_generate_options(parser: argparse.ArgumentParser) -> None:
    """Options of `generate`, beside those of the model."""
    parser.add_argument("prompts", nargs="*", help="without any: one per line from standard input")
    parser.add_argument("--prefix", type=Path, help="prefix file")
    parser.add_argument("--adapter", type=Path, help="adapter file")
    parser.add_argument(
        "--frame", choices=(*LINEARISATIONS, "none"),
        help="read a prompt as a table, as training with this --linearisation does, or 'none': as "
        "a text to be continued (default: as the prefix was trained; none without a prefix)",
    )  # fmt: skip
    add_fields(parser, GenerationConfig)


def run_generate(args) -> dict | None:
    """Write texts; one is streamed to stdout."""
    config = from_args(GenerationConfig, args)
    prompts = args.prompts or read_prompts()
    if "" in prompts:
        raise ValueError(f"prompt {prompts.index('') + 1} is empty")
    model, tokenizer = weights.load(args.model, device=args.device)
    prefix = load_prefix(args, model)
    frame, cut = frame_of(model, prefix)
    frame = args.frame or frame or "none"
    if frame == "none" and not for_bart(tokenizer):
        prompts = [tokenizer.encode(prompt) for prompt in prompts]
    else:
        style = "paper" if frame == "none" else frame
        prompts = [encode_prompt(tokenizer, prompt, style, cut) for prompt in prompts]
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


def add_evaluate_options(parser: argparse.ArgumentParser) -> None:
    """Options of `evaluate`, beside those of model and data."""
    parser.add_argument("--split", default="test", choices=("train", "dev", "test"))
    parser.add_argument("--prefix", type=Path, help="prefix file")
    parser.add_argument("--adapter", type=Path, help="adapter file")
    parser.add_argument(
        "--hard-prompt", nargs="?", const=TEMPLATES[0], metavar="TEMPLATE",
        help="ask the frozen model in words, {table} stands for the table (default template: "
        f"{TEMPLATES[0]!r})",
    )  # fmt: skip
    parser.add_argument("--prompt", type=Path, help="prompt.json of the command search")
    parser.add_argument("--shots", type=int, default=0, help="examples in context, from train")
    parser.add_argument("--limit", type=int, help="only the first tables")
    cut = "cut sources to their first tokens (default: as in training)"
    parser.add_argument("--max-source", type=int, help=cut)
    parser.add_argument("--batch-size", type=int, default=64, help="tables at a time")
    parser.add_argument("--outputs", type=Path, help="write sources and texts, JSON lines")
    parser.add_argument(
        "--metrics", default="quick", choices=METRICS,
        help="quick (BLEU, ROUGE-L, slots), a data set's official scores, or auto: by the form of "
        "the data (default: %(default)s)",
    )  # fmt: skip
    add_fields(parser, GenerationConfig)


def run_evaluate(args) -> dict:
    """Write a text for every table of a split and score them."""
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
    learned, cut = (prompt.linearisation, None) if prompt else frame_of(model, prefix)
    trained = f"{args.prefix or args.adapter or args.prompt or args.model} was trained with"
    if learned and args.linearisation not in (None, learned):
        raise ValueError(f"{trained} --linearisation {learned}, not {args.linearisation}")
    if cut and args.max_source not in (None, cut):
        raise ValueError(f"{trained} --max-source {cut}, not {args.max_source}")
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
