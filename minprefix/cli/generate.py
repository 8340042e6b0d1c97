"""The command `generate`: texts from a model, with a prefix or adapter. Read `run`."""

import re
import sys
from typing import Any

from tqdm import tqdm

from minprefix.cli.commands import GenerateOptions
from minprefix.cli.parse import WrongUsage
from minprefix.cli.report import say
from minprefix.cli.trained import load_model, load_trained
from minprefix.data.batches import encode_prompt, for_bart, warn_of_cuts
from minprefix.data.load import load_examples
from minprefix.data.rows import read_prompt
from minprefix.files import lines_of
from minprefix.generation.texts import bos_prompt, frame_of, generate, stream, stripped
from minprefix.limits import TEXT

CELL = r"[\w ]+:(?!//)[^:|]+"
UNSPACED = re.compile(rf"{CELL}(\|{CELL})+")  # "name: The Eagle|food: Chinese"


def run(options: GenerateOptions) -> dict | None:
    """Generate texts; a single one is streamed to stdout."""
    if options.data and options.prompts:
        raise WrongUsage("--data provides the prompts, so give no others")
    prompts = list(options.prompts) or ([] if options.data else read_prompts())
    model, tokenizer = load_model(options)
    prefix = load_trained(options, model)
    frame, cut = frame_of(model, prefix)
    frame = options.frame or frame or model.config.default_frame or "none"
    style = "paper" if frame == "none" else frame
    if options.data:
        data: Any = {"linearisation": style, "references": False}
        prompts = [e.source for e in load_examples(options.data, options.split, **data)]
    if frame == "none" and not for_bart(tokenizer):
        prompts = [tokenizer.encode(prompt) or bos_prompt(model, tokenizer) for prompt in prompts]
    else:
        prompts = [read_prompt(prompt, style) for prompt in prompts]
        if any(UNSPACED.fullmatch(prompt) and " : " not in prompt for prompt in prompts):
            say(
                'note: a table is written with spaces, "name : The Eagle | food : Chinese"; without'
                " them the model reads other tokens than in training"
            )
        if any(prompt.startswith('{"') for prompt in prompts):
            say(
                "note: a prompt that looks like a JSON object is not valid JSON; it is read as text"
            )
        warn_of_cuts(tokenizer, [(prompt, style, cut) for prompt in prompts])
        prompts = [encode_prompt(tokenizer, prompt, style, cut) for prompt in prompts]
    config = options.generation.for_model(model)
    how: Any = {"prefix": prefix, "config": config}
    single = len(prompts) == config.num_beams == config.num_return_sequences == 1
    if single and not (options.json or options.data):
        pieces = stream(model, tokenizer, prompts[0], **how)
        for piece in pieces if frame == "none" else stripped(pieces):
            print(piece, end="", flush=True)
        print()
        return None
    with tqdm(total=len(prompts), unit="text", delay=5) as bar:
        how["progress"] = lambda done, _: bar.update(done - bar.n)
        texts = generate(model, tokenizer, prompts, **how)
    if frame != "none":
        texts = [text.strip() for text in texts]
    if options.data:  # one text per line, as `score` reads them
        texts = [" ".join(text.splitlines()) for text in texts]
    if options.json:
        return {"texts": texts}
    print("\n".join(texts))
    return None


def read_prompts() -> list[str]:
    """The lines of standard input that are not blank."""
    if sys.stdin.isatty():
        print("enter one prompt per line; Ctrl-D ends the input", file=sys.stderr)
    lines = lines_of(sys.stdin.buffer, "standard input", TEXT)
    prompts = [line.rstrip("\r\n") for line in lines if line.strip()]
    if not prompts:
        raise ValueError(
            "no prompt was given: pass one as an argument, or one per line on standard input"
        )
    return prompts
