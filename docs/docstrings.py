"""Converts our docstrings to reST, just before napoleon reads their Args, Returns and Raises.

They are written to be read as plain text: names in single backticks, formulas indented, shapes such
as (B, H, T, D). Outside of backticks, reST's special characters are therefore escaped. Indented
blocks that begin like a formula become equations; all others, such as commands and small tables,
are unchanged.
"""

import dataclasses
import re

from tyro._docstrings import get_field_docstring

from docs.formulas import FORMULA, tex_of

SECTION = re.compile(r"(Args|Returns|Yields|Raises|Attributes):$")
REFERENCE = re.compile(r"\[\d+\] ")
SOURCE = re.compile(r"Source: ")
FREE_SIGNS = re.compile(r"([*|\\])|(?<=\w)_(?!\w)")  # emphasis, substitution, reference


def escaped(line: str) -> str:
    """A line with reST's special characters escaped outside of backticks."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(
        part if part.startswith("`") else FREE_SIGNS.sub(r"\\\g<0>", part) for part in parts
    )


def kind(line: str) -> str:
    """The language of a literal block, by its first line: Python is a call or an assignment."""
    return "python" if re.match(r"\s*\w+(, \w+)* = |\s*[\w.]+\(", line) else "text"


def rest_of(lines: list[str]) -> list[str]:
    """The lines of one docstring, for napoleon and reST."""
    found, block = [], ""  # the kind of an indented block: section, formula, literal, reference
    for before, line in zip(["", *lines], lines, strict=False):
        text = SOURCE.sub("**Source:** ", escaped(line))
        if not line.strip():
            found.append("")
        elif REFERENCE.match(line):
            found += ["| " + text] if block == "reference" else ["", "| " + text]
            block = "reference"
        elif not line.startswith(" "):
            found += ["", text] if block == "reference" and before.strip() else [text]
            block = "section" if SECTION.match(line) else ""
        elif block in ("section", "reference") or (block == "" and before.strip()):
            found.append(text)
        elif block == "formula" or (block != "literal" and FORMULA.match(line)):
            found += ["", ".. math::", "", f"    {tex_of(line)}", ""]
            block = "formula"
        else:
            found += [line] if block == "literal" else [f".. code-block:: {kind(line)}", "", line]
            block = "literal"
    return found


def to_rest(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    """Sphinx's event `autodoc-process-docstring`: changes `lines` in place."""
    lines[:] = rest_of(lines)
    if what == "class" and dataclasses.is_dataclass(obj):
        found = {f.name: get_field_docstring(obj, f.name, ()) for f in dataclasses.fields(obj)}
        fields = {name: " ".join(text.split()) for name, text in found.items() if text}
        if fields:
            lines += ["", ".. rubric:: Fields", ""]
            lines += [
                line for k, text in fields.items() for line in (f"``{k}``", f"    {escaped(text)}")
            ]
            lines.append("")
