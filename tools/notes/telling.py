"""Writes a note from random facts and sentence templates, and defines what a summary may claim.

Read `Story` (the result of a scenario), then `tell`, which makes a document and a summary from it.
A template is a sentence with {facts} and [one way|another way] to express a part of it; brackets
may be nested. Numbers up to twelve are written as words ({n:d}: as digits), larger ones with
commas. A person has the full name once and then the surname, as in newspapers.
"""

import ast
import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field

from tools.notes.names import HE, MONTHS, SHE, SURNAMES, TOWNS

SMALL = "no one two three four five six seven eight nine ten eleven twelve".split()
Ways = str | tuple[str, ...]  # a sentence, or several ways to say the same


@dataclass(frozen=True)
class Person:
    """`{p}` is the full name; a template may also use {p.last}, {p.he}, {p.his} and {p.him}."""

    first: str
    last: str

    def __str__(self) -> str:
        return f"{self.first} {self.last}"

    @property
    def he(self) -> str:
        return "he" if self.first in HE else "she"

    @property
    def his(self) -> str:
        return "his" if self.first in HE else "her"

    @property
    def him(self) -> str:
        return "him" if self.first in HE else "her"


class Draw:
    """Random facts for one note, with towns and surnames of its split. No name occurs twice."""

    def __init__(self, rng: random.Random, split: str):
        self.rng = rng
        self._towns = rng.sample(TOWNS[split], len(TOWNS[split]))
        self._first_names: set[str] = set()
        self._surnames = rng.sample(SURNAMES[split], len(SURNAMES[split]))

    def town(self) -> str:
        return self._towns.pop()

    def surname(self) -> str:
        return self._surnames.pop()

    def person(self, first_names: Sequence[str] = HE + SHE) -> Person:
        free = [name for name in first_names if name not in self._first_names]
        self._first_names.add(first := self.rng.choice(free))
        return Person(first, self.surname())

    def pick(self, values: Sequence):
        return self.rng.choice(values)

    def some(self, values: Sequence, count: int) -> list:
        return self.rng.sample(values, count)

    def number(self, least: int, most: int, step: int = 1) -> int:
        return self.rng.randrange(least, most + 1, step)

    def chance(self, probability: float = 0.5) -> bool:
        return self.rng.random() < probability

    def months(self, gap: int) -> tuple[str, str]:
        """A month, and the month `gap` months later in the same year."""
        first = self.number(0, 11 - gap)
        return MONTHS[first], MONTHS[first + gap]


@dataclass(frozen=True)
class Story:
    """The material of one note. Facts that the summary needs are in parts, not in extras."""

    topic: str
    facts: dict  # name: str, int or Person
    parts: dict[str, Ways]  # name: a sentence or two; the parts of one order are used
    orders: Sequence[str]  # names of parts, in orders that read well
    extras: Sequence[Ways]  # one to three of them are inserted after the second sentence
    summary: Ways
    derived: dict[str, str] = field(default_factory=dict)  # facts computed from others: formula
    claims: tuple[str, ...] = ()  # statements of the summary without numbers, as formulas of facts


class _Telling(string.Formatter):
    """Formats facts; records which were used and which persons have been introduced."""

    def __init__(self):
        self.used: set[str] = set()
        self.known: set[Person] = set()

    def get_field(self, field_name, args, kwargs):
        self.used.add(field_name.split(".")[0])
        return super().get_field(field_name, args, kwargs)

    def format_field(self, value, format_spec):
        if isinstance(value, int):
            return f"{value:d}" if format_spec == "d" else spell(value)
        if isinstance(value, Person) and value in self.known:
            return value.last
        if isinstance(value, Person):
            self.known.add(value)
        return super().format_field(value, format_spec)


def spell(number: int) -> str:
    return SMALL[number] if number < len(SMALL) else f"{number:,}"


def names_in(formula: str) -> list[str]:
    """The facts in a formula of `derived` or `claims`."""
    nodes = ast.walk(ast.parse(formula))
    return [node.id for node in nodes if isinstance(node, ast.Name) and node.id != "month"]


def evaluate(formula: str, facts: dict):
    """The value of a formula such as "this - last" or "month(now) - month(planned)"."""
    return eval(formula, {"__builtins__": {}, "month": MONTHS.index}, facts)


def choose_ways(text: Ways, rng: random.Random) -> str:
    """One random wording, with all brackets resolved, innermost first."""
    text = text if isinstance(text, str) else rng.choice(text)
    while match := re.search(r"\[([^\[\]]*)\]", text):
        text = text[: match.start()] + rng.choice(match[1].split("|")) + text[match.end() :]
    return text


def polish(text: str) -> str:
    """Correct blanks, capitals after full stops, "an" before a vowel, "Lions'" for "Lions's"."""
    text = re.sub(r" +", " ", text).replace(" ,", ",").replace(" .", ".").strip()
    text = re.sub(r"(?<=[a-z]s)'s\b", "'", text)
    text = re.sub(r"\b([Aa]) (?=[aeiouAEIOU]|8\b|1[18]\b|8\d\b)", r"\1n ", text)
    return re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def sentences(text: str) -> list[str]:
    """The sentences of a document, in which no abbreviation has a full stop."""
    return re.split(r"(?<=[.?!]) ", text)


def _say(text: Ways, facts: dict, telling: _Telling, rng: random.Random) -> str:
    """A filled template; facts may contain brackets too."""
    return polish(choose_ways(telling.format(choose_ways(text, rng), **facts), rng))


def tell(story: Story, rng: random.Random) -> tuple[str, str, set[str]]:
    """The document, the summary, and the names of the facts that the summary states."""
    facts = dict(story.facts)
    for name, formula in story.derived.items():
        facts[name] = evaluate(formula, facts)
    plan = [story.parts[name] for name in rng.choice(story.orders).split()]
    count = rng.choice((1, 1, 2, 2, 3)[: 2 * len(story.extras)])
    for extra in rng.sample(story.extras, count):
        plan.insert(rng.randint(2, len(plan)), extra)
    telling = _Telling()
    document = " ".join(_say(part, facts, telling, rng) for part in plan)
    telling = _Telling()
    summary = _say(story.summary, facts, telling, rng)
    return document, summary, telling.used
