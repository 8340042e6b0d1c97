"""Evaluation: generate a text for every table of a data set with one method, and score them."""

import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from minprefix.checks import check_choice
from minprefix.data.batches import encode_prompt, warn_of_cuts
from minprefix.data.examples import Example
from minprefix.generation.config import GenerationConfig
from minprefix.generation.texts import frame_of, generate
from minprefix.methods.hard_prompt import HardPrompt, TokenPrompt, answer
from minprefix.metrics.official import METRICS, official_scores, suite_of
from minprefix.metrics.quick import check_tokenizer, score, script_note
from minprefix.models.bart import BART
from minprefix.models.gpt2 import GPT2
from minprefix.prefix.prefix import Prefix


def measure(
    texts: Sequence[str], examples: Sequence[Example], metrics: str = "quick",
    score_tokenizer: str = "13a",
) -> dict[str, float]:  # fmt: skip
    """Scores of the texts: `quick.score`, or a suite of `official.official_scores`.

    Args:
        metrics: one of METRICS; "auto" takes the suite that fits the form of the examples
            (`official.suite_of`), or "quick" if none fits.
        score_tokenizer: the tokenizer of the quick scores, one of `quick.TOKENIZERS`.
    """
    check_choice("metrics", metrics, METRICS)
    suite = suite_of(examples) if metrics == "auto" else metrics
    check_tokenizer(suite, score_tokenizer)
    references = (text for example in examples for text in example.targets)
    if note := script_note(references, suite, score_tokenizer):
        print(note, file=sys.stderr)
    if suite == "quick":
        return score(texts, examples, score_tokenizer)
    grouped = suite == "webnlg" and all(example.group for example in examples)
    groups = [example.group for example in examples] if grouped else None
    return official_scores(texts, [example.targets for example in examples], suite, groups)


def evaluate_method(  # noqa: PLR0913
    model: GPT2 | BART, tokenizer, examples: list[Example], *, prefix: Prefix | None = None,
    prompt: HardPrompt | TokenPrompt | None = None, config: GenerationConfig | None = None,
    linearisation: str = "paper", max_source: int | None = None, batch_size: int = 64,
    progress: bool = False, metrics: str = "quick", score_tokenizer: str = "13a",
) -> tuple[dict[str, float], list[str]]:  # fmt: skip
    """Scores (see `measure`) and texts, in the order of the examples.

    The method is the hard prompt if one is given. Otherwise it is the model in the frame of its
    training (`batches.encode_prompt`), with the prefix or, if fine-tuned, without one. Sources are
    cut to max_source tokens; None = as in training. `progress` draws a bar on stderr.

    Raises:
        ValueError: max_source with a prompt, which always uses the whole source; and the errors of
            `measure` and `generation.generate`.
    """
    check_choice("metrics", metrics, METRICS)
    if prompt is not None and max_source is not None:
        raise ValueError(f"max_source {max_source} has no effect on a prompt")
    config = config or GenerationConfig()
    if config.num_return_sequences > 1:
        n = config.num_return_sequences
        raise ValueError(f"scores need one text for each example, got num_return_sequences {n}")
    sources = [example.source for example in examples]
    with tqdm(total=len(sources), unit="text", disable=not progress, delay=1) as bar:
        options: Any = {"config": config, "batch_size": batch_size}
        options["progress"] = lambda done, _: bar.update(done - bar.n)
        if prompt is not None:
            texts = answer(model, tokenizer, prompt, sources, **options)
        else:
            if max_source is None:
                max_source = frame_of(model, prefix)[1]
            frame = (linearisation, max_source)
            warn_of_cuts(tokenizer, [(source, *frame) for source in sources])
            prompts = [encode_prompt(tokenizer, source, *frame) for source in sources]
            texts = generate(model, tokenizer, prompts, prefix=prefix, **options)
    texts = [text.strip() for text in texts]
    return measure(texts, examples, metrics, score_tokenizer), texts
