"""Evaluation: write a text for every table of a data set with one method, then score the texts."""

from tqdm import tqdm

from minprefix.batches import encode_prompt
from minprefix.decoding import GenerationConfig
from minprefix.examples import Example
from minprefix.generation import generate
from minprefix.gpt2 import GPT2
from minprefix.metrics import score
from minprefix.prefix import Prefix
from minprefix.prompting import HardPrompt, answer


def evaluate_method(
    model: GPT2, tokenizer, examples: list[Example], *, prefix: Prefix | None = None,
    prompt: HardPrompt | None = None, config: GenerationConfig | None = None,
    linearisation: str = "paper", max_source: int | None = None, batch_size: int = 64,
    progress: bool = False,
) -> tuple[dict[str, float], list[str]]:  # fmt: skip
    """Scores (see `metrics.score`) and texts, in the order of the examples.

    The method is the hard prompt if there is one, else the model in the frame it was trained in
    (`batches.encode_prompt`, which max_source goes to), with the prefix or, for a fine-tuned model,
    without. `progress` draws a bar on stderr.
    """
    config = config or GenerationConfig()
    sources = [example.source for example in examples]
    with tqdm(total=len(sources), unit="text", disable=not progress, delay=1) as bar:
        options = {"config": config, "batch_size": batch_size}
        options["progress"] = lambda done, _: bar.update(done - bar.n)
        if prompt is not None:
            texts = answer(model, tokenizer, prompt, sources, **options)
        else:
            frame = (linearisation, max_source)
            prompts = [encode_prompt(tokenizer, source, *frame) for source in sources]
            texts = generate(model, tokenizer, prompts, prefix=prefix, **options)
    texts = [text.strip() for text in texts]
    return score(texts, examples), texts
