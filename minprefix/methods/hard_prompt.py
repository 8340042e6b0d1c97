"""Discrete prompting: the frozen model gets an instruction in words, and nothing is trained.

This is the baseline from which prefix-tuning starts (section 1 of Li & Liang 2021): an instruction
around the table, with or without solved examples before it ("in context"). The model's output up to
its first line break is the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minprefix.checks import check_choice
from minprefix.data.batches import Encoded, encode_prompt
from minprefix.data.examples import LINEARISATIONS, Example
from minprefix.files import read_json
from minprefix.generation.texts import generate
from minprefix.methods.config import TEMPLATES
from minprefix.models.gpt2 import GPT2
from minprefix.models.weights import check_base


@dataclass(frozen=True)
class HardPrompt:
    """An instruction and the examples shown before the table."""

    template: str = TEMPLATES[0]  # must hold {table}
    shown: tuple[tuple[str, str], ...] = ()  # (source, text) pairs, in order

    def __post_init__(self):
        if "{table}" not in self.template:
            raise ValueError(f"a hard prompt must contain {{table}}, got {self.template!r}")

    def render(self, source: str) -> str:
        """The text that the model continues."""
        solved = (self._ask(shown) + f" {text}\n\n" for shown, text in self.shown)
        return "".join(solved) + self._ask(source)

    def _ask(self, source: str) -> str:
        return self.template.replace("{table}", source)


def show_examples(template: str, train: list[Example], shots: int) -> HardPrompt:
    """A hard prompt with `shots` training examples in context, drawn with a fixed seed."""
    if not 0 <= shots <= len(train):
        raise ValueError(f"shots must lie in [0, {len(train)}], the training tables, got {shots}")
    drawn = np.random.default_rng(0).permutation(len(train))[:shots]
    return HardPrompt(template, tuple((train[i].source, train[i].targets[0]) for i in drawn))


def answer(
    model, tokenizer, prompt: "HardPrompt | TokenPrompt", sources: list[str], **options
) -> list[str]:
    """The frozen model's text for each table, cut at the first line break.

    Raises:
        ValueError: a TokenPrompt of another model; and the errors of `generation.generate`.
    """
    if isinstance(prompt, TokenPrompt):
        prompt.check_base(model)
    prompts = [prompt.render(source) for source in sources]
    texts = generate(model, tokenizer, prompts, **options)
    return [(text.strip().splitlines() or [""])[0].strip() for text in texts]


def template_rows(tokenizer, prompt: HardPrompt, examples: Sequence[Example]) -> list[Encoded]:
    """Every (source, target) pair in the frame of a prompt: enc(prompt), enc(" " + target), eos.

    The tokens with a loss are those of `batches.encode_pair`, so mean losses can be compared.
    """
    rows = []
    for example in examples:
        asked = tokenizer.encode(prompt.render(example.source))
        for target in example.targets:
            answer = tokenizer.encode(f" {target}") + [tokenizer.eos_id]
            rows.append(Encoded(asked + answer, len(asked), example.where))
    return rows


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt of token ids around the table, which need not be the tokens of any text (`search`).

    `answer` accepts it instead of a HardPrompt.
    """

    tokenizer: object
    before: list[int]
    after: list[int]
    linearisation: str = "paper"  # of the table between them, see `batches.encode_prompt`
    base: str = ""  # fingerprint of the model that it was searched for; "" = unknown

    @classmethod
    def load(cls, path, tokenizer) -> "TokenPrompt":
        """Read the prompt.json of a search.

        Raises:
            ValueError: another kind of file, or tokens that the tokenizer does not have.
        """
        found: Any = read_json(path)
        # older versions write "behind" for "after"
        parts = [found.get("before"), found.get("after", found.get("behind"))]
        for part in parts:
            if not isinstance(part, list) or not all(type(v) is int for v in part):
                raise ValueError(f"{path}: not a prompt of the command search")
        # older files have no base
        linearisation, base = found.get("linearisation"), found.get("base", "")
        if not isinstance(base, str):
            raise ValueError(f"{path}: base {base!r} is not a fingerprint")
        try:
            check_choice("linearisation", linearisation, LINEARISATIONS)
            tokenizer.decode(parts[0] + parts[1])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return cls(tokenizer, parts[0], parts[1], linearisation, base)

    def check_base(self, model: GPT2) -> None:
        """ValueError if this prompt was searched for another model than `model`."""
        check_base(self.base, model, "prompt")

    def render(self, source: str) -> list[int]:
        """The tokens that the model continues."""
        framed = encode_prompt(self.tokenizer, source, self.linearisation)
        return self.before + framed[:-1] + self.after  # if there is a bos, it is in `after`
