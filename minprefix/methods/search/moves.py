"""The prompts that a search proposes, and the race that selects among them.

Read `PromptForm` (ids as text, and which prompts are allowed), `starting_prompts` (the starts of
chains), `neighbours` (prompts one move away) and `race` (many prompts on few rows, then few prompts
on many rows). `search.py` uses them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from minprefix.data.batches import Encoded
from minprefix.methods.config import TEMPLATES
from minprefix.methods.search.scores import target_tokens
from minprefix.models.tokenizer import Tokenizer

INSTRUCTIONS = (
    "table-to-text:",
    "Write a description of the table in words.",
    "Each table is followed by a text that says the same in full sentences.\n\n",
    *(template.replace("{table}", "") for template in TEMPLATES),  # before the source
)
QUARTER = 4  # in a race the best 1/QUARTER continue, on QUARTER times as many rows
REPLACE = 0.85  # share of neighbours with one token replaced; the others remove and insert one
TRIES = 20  # draws per requested prompt: some draws are equal, some not allowed

Prompt = list[int]
Allowed = Callable[[Prompt], bool]  # whether a prompt may be proposed
Nats = Callable[[Sequence[Prompt], Sequence[Encoded]], np.ndarray]  # summed losses, (N,)


@dataclass(frozen=True)
class PromptForm:
    """The parts of a prompt of ids, and which prompts may be proposed."""

    tokenizer: Tokenizer
    A: int  # tokens after the source
    printable: bool  # only prompts that can be typed
    sources: Sequence[str]  # sources for checking that a prompt with a part after them can be typed

    def parts(self, prompt: Prompt) -> tuple[Prompt, Prompt]:
        """The parts before and after the source."""
        return prompt[: len(prompt) - self.A], prompt[len(prompt) - self.A :]

    def text(self, prompt: Prompt) -> str:
        """The prompt's text, with {table} between its parts if there are two."""
        before, after = map(self.tokenizer.decode, self.parts(prompt))
        return before + ("{table}" + after if self.A else "")

    def is_usable(self, token: int) -> bool:
        """Whether a token may be in a prompt: any, or with `printable` one that can be typed."""
        if token >= self.tokenizer.vocab_size:  # an embedding without a token
            return False
        text = self.tokenizer.decode([token])
        typed = text.replace("\n", "").isprintable() and self.tokenizer.encode(text) == [token]
        return typed or not self.printable

    def is_allowed(self, prompt: Prompt) -> bool:
        """Whether a prompt may be proposed: any, or with `printable` one whose text gives the same
        tokens, also around a source."""
        if not self.printable:
            return True
        before, after = self.parts(prompt)
        text, end = self.tokenizer.decode(before), self.tokenizer.decode(after)
        if not (text + end).replace("\n", "").isprintable():
            return False
        encode = self.tokenizer.encode
        if not self.A:
            return encode(text) == prompt
        return all(encode(text + x + end) == before + encode(x) + after for x in self.sources)


def starting_prompts(
    tokenizer, texts: Sequence[str], rows: Sequence[Encoded], usable: Sequence[int],
    is_allowed: Allowed, prompt_len: int, A: int, count: int, rng: np.random.Generator,
) -> list[Prompt]:  # fmt: skip
    """About `count` different prompts of P tokens, the last A of them after the source; at least 1.

    They are the texts and `INSTRUCTIONS`, cut or repeated to the length of their part; windows of
    rows, which contain a piece of a solved example; and random tokens. If a text fills only the
    part before or after the source, the other part is a window or random.

    Raises:
        ValueError: no token is usable.
    """
    if not usable:
        raise ValueError("no token of this vocabulary can be typed: search without printable")

    def draw(n: int) -> Prompt:  # every fourth is random
        row = rows[int(rng.integers(len(rows)))].ids
        at = rng.integers(max(1, len(row) - n + 1))
        return (
            rng.choice(usable, n).tolist() if rng.random() < 0.25 else cut_or_repeat(row[at:], n, 0)
        )

    def part(text: str, n: int, end: int) -> Prompt:
        ids = tokenizer.encode(text)
        return cut_or_repeat(ids, n, end) if ids else draw(n)

    texts = (*texts, *INSTRUCTIONS, *TEMPLATES)
    found: dict[tuple[int, ...], None] = {}
    for number in range(TRIES * count):
        if len(found) >= count:
            break
        text = texts[number % len(texts)]
        if number >= len(texts) and (A == 0 or number % 2):  # a text after the source: each time
            text = ""
        before, _, after = text.partition("{table}")
        prompt = part(before, prompt_len - A, 0) + part(after, A, A)
        if is_allowed(prompt):
            found[tuple(prompt)] = None
    if not found:  # if random tokens merge when typed, one repeated token may still be allowed
        found = {(token,) * prompt_len: None for token in usable[:1]}
    return [list(prompt) for prompt in found]


def cut_or_repeat(ids: Prompt, n: int, end: int) -> Prompt:
    """n tokens: ids cut or repeated, so that they begin at place 0 or (end = n) end at place n."""
    return [ids[(i - end) % len(ids)] for i in range(n)]


def neighbours(
    present: Prompt, gradient: Tensor, usable: Tensor, is_allowed: Allowed, *,
    top_k: int, count: int, rng: np.random.Generator,
) -> list[Prompt]:  # fmt: skip
    """Distinct prompts that differ from `present` by one move; fewer if there are not enough.

    A move replaces a token, or removes one and inserts one at another place. The new token is drawn
    from the top_k tokens that, to first order, lower the loss most at that place.

    Args:
        gradient: (P, V), see `scores.one_hot_gradient`.
        usable: (V,) bool, tokens to draw from.
    """
    k = min(top_k, int(usable.sum()))
    blocked = gradient.cpu().masked_fill(~usable, math.inf)
    top = blocked.topk(k, largest=False).indices.numpy()  # (P, k)
    P, found = len(present), {tuple(present): None}
    for _ in range(TRIES * count):
        if len(found) > count:
            break
        place, gone = rng.integers(P, size=2)
        token = int(top[place, rng.integers(k)])
        if rng.random() < REPLACE:
            gone = place
        prompt = present[:gone] + present[gone + 1 :]
        prompt.insert(place, token)
        if tuple(prompt) not in found and is_allowed(prompt):
            found[tuple(prompt)] = None
    return [list(prompt) for prompt in found][1:]


def changed_places(prompt: Prompt, present: Prompt) -> list[int]:
    """The places at which they differ."""
    return [i for i, token in enumerate(prompt) if token != present[i]]


def race(
    nats_of: Nats, prompts: Sequence[Prompt], rows: Sequence[Encoded], last: int,
    present: Prompt | None = None,
) -> list[tuple[Prompt, float]]:  # fmt: skip
    """At most `last` prompts, best first, with their mean loss over all rows, in nats.

    All prompts are scored on the first rows. In each round the best quarter (but at least `last`)
    is scored on four times as many rows, including the earlier ones. `present` takes part to the
    end, and only prompts that beat it are returned.
    """
    if not prompts:
        return []
    rounds, left = 1, len(prompts)
    while left > last and len(rows) >= QUARTER**rounds:
        rounds, left = rounds + 1, math.ceil(left / QUARTER)
    first = 0 if present is None else 1
    runners = [*prompts] if present is None else [present, *prompts]
    nats, done = np.zeros(len(runners)), 0
    for number in range(1, rounds + 1):
        until = len(rows) // QUARTER ** (rounds - number)
        nats, done = nats + nats_of(runners, rows[done:until]), until
        order = first + np.argsort(nats[first:], kind="stable")
        if number < rounds:
            going = max(last, math.ceil(len(prompts) / QUARTER**number))
            kept = [*range(first), *order[:going]]
            runners, nats = [runners[i] for i in kept], nats[kept]
    bar = nats[0] if first else math.inf
    losses = nats / target_tokens(rows)
    return [(runners[i], float(losses[i])) for i in order[:last] if nats[i] < bar]
