"""Example: what every data set becomes, and how a text of any of them is checked and cleaned.

[1] https://arxiv.org/abs/2101.00190   [2] https://github.com/XiangLi1999/PrefixTuning
"""

import re
from dataclasses import dataclass
from pathlib import Path

from minprefix import files

LINEARISATIONS = ("paper", "original-code")  # as [1] prints a table, or as the code of [2] has it


@dataclass(frozen=True)
class Example:
    """One input with all its texts. Only `source` and `targets` reach the model."""

    source: str  # the linearised input, as the model reads it
    targets: tuple[str, ...]  # reference texts: trained on one by one, scored against all
    table: tuple[tuple[str, str], ...] | None = None  # (field, value) pairs where the data has them
    where: str = ""  # file and line (XML: entry) of the first row, for messages
    group: str = ""  # WebNLG's category, an article's topic: see `splits.py`
    id: str = ""  # of an article: the BBC's number; "" for tables


def checked_text(value: object, name: str, where: str) -> str:
    """`value`, checked to be a string that is not blank and can be written as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a string, got {value!r}")
    if not value.strip():
        raise ValueError(f"{where}: {name} is empty")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{where}: {name} has half a surrogate pair, which is no character")
    return value


def clean(text: str, linearisation: str) -> str:
    """White space of a target or a table's value: see `load_examples`."""
    if linearisation == "paper":
        return " ".join(text.split())
    return re.sub(r"\r\n|\r|\n", " ", text)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file (a byte order mark is dropped); line ends stay as they are."""
    text = files.read_text(path).removeprefix("\ufeff")
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text
