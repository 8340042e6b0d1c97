"""`Example`, the form that every data set is read into, and how its texts are checked and cleaned.

`Skipped` counts the parts of the data that cannot be used. Every reader adds to it, and
`load_examples` reports it in one warning.
[1] https://arxiv.org/abs/2101.00190   [2] https://github.com/XiangLi1999/PrefixTuning
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from minprefix import files
from minprefix.files import brief

LINEARISATIONS = ("paper", "original-code")  # as [1] prints a table, or as the code of [2] does
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One input with all its texts. Only `source` and `targets` reach the model."""

    source: str  # the linearised input, as the model reads it
    targets: tuple[str, ...]  # reference texts: trained on one by one, scored against all
    table: tuple[tuple[str, str], ...] | None = None  # (field, value) pairs where the data has them
    where: str = ""  # file and line (XML: entry) of the first row, for messages
    group: str = ""  # WebNLG's category or an article's topic: see `splits.py`
    id: str = ""  # the BBC's number of an article; "" for tables
    language: str = field(default="", compare=False)  # of the targets, such as "en"; "" = not given


class Skipped:
    """Counts what cannot be used, by kind, with the place of the first of each kind.

    It also holds the columns that were taken as fields of a table without being declared as such.
    """

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, str]] = {}
        self.fields: dict[str, None] = {}

    def add(self, what: str, where: str) -> None:
        """One more of `what`, a plural such as "empty cells"."""
        count, first = self.found.get(what, (0, where))
        self.found[what] = count + 1, first

    def __str__(self) -> str:
        kinds = self.found.items()
        return "; ".join(f"{what}: {n} (the first: {first})" for what, (n, first) in kinds)

    def report(self, path: str | Path) -> None:
        """One warning about the columns, if there are any, and one about everything left out."""
        if self.fields:
            log.warning("%s: the columns %s are the table's fields", path, ", ".join(self.fields))
        if self.found:
            log.warning("%s: skipped: %s", path, self)


def checked_text(value: object, name: str, where: str) -> str:
    """`value`, checked to be a string that is not blank and can be written as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a string, got {brief(value)}")
    if not value.strip():
        raise ValueError(f"{where}: {name} is empty")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{where}: {name} has half of a surrogate pair, which is not a character")
    return value


def text_of(value: object, name: str, where: str) -> str | None:
    """A cell as text: a number as it is written, a boolean as in JSON.

    None for an empty cell: null, NaN (which pandas writes for null), or only blanks.
    """
    if isinstance(value, bool):
        value = "true" if value else "false"
    elif isinstance(value, int | float):
        value = str(value) if value == value else None
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    return checked_text(value, name, where)


def texts_of(
    value: object, name: str, linearisation: str, where: str, skipped: Skipped
) -> tuple[str, ...]:
    """The texts of a cell, which holds one text or a list; empty ones are left out."""
    texts = []
    for one in value if isinstance(value, list) else [value]:
        if (text := text_of(one, name, where)) is None:
            skipped.add("empty texts", where)
        else:
            texts.append(normalise_space(text, linearisation))
    return tuple(texts)


def normalise_space(text: str, linearisation: str) -> str:
    """Normalise the white space of a target or of a table's value: see `load_examples`."""
    if linearisation == "paper":
        return " ".join(text.split())
    return re.sub(r"\r\n|\r|\n", " ", text)


def in_language(
    examples: Iterable[Example], language: str | None, path: str | Path, skipped: Skipped
) -> list[Example]:
    """The examples whose texts are in `language`, and inputs without texts.

    Args:
        language: None = the only language that the data has.
    Raises:
        ValueError: no text is in `language`; or it is None and there are several languages.
    """
    examples = list(examples)
    found = sorted({example.language for example in examples if example.targets})
    names = ", ".join(name or "a language that is not named" for name in found)
    if language is None and len(found) > 1:
        raise ValueError(
            f"{path}: the texts are in {names}: choose one, such as --language {found[-1]}"
        )
    if language is not None and found and language not in found:
        raise ValueError(f"{path}: no texts are in {language!r}; the languages are {names}")
    kept = []
    for example in examples:
        if language is None or not example.targets or example.language == language:
            kept.append(example)
        else:
            skipped.add(f"examples in {example.language or 'no named language'}", example.where)
    return kept


def read_text(path: Path) -> str:
    """The text of a UTF-8 file without its byte order mark; line ends stay as they are."""
    text = files.read_text(path).removeprefix("\ufeff")
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text
