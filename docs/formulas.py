"""Converts formulas in docstrings to TeX: `o_i = sum_j exp(x_ij - lse_i) v_j`.

They are written to be read as text. `tex_of` supports subscripts of letters, words and brackets,
sums, Greek letters and functions by name, and scalar products in angle brackets.
"""

import re

FORMULA = re.compile(r"\s*[^=:,]{1,20}= [^\"]*$")  # how one begins; code has quotes
GREEK = {"alpha", "beta", "delta", "lambda", "theta"}
FUNCTIONS = {"exp", "log", "ln", "max", "min"}
TOKEN = re.compile(
    r"(?P<sub>[_^](?:<=?\w+|\([^()]*\)|\{[^{}]*\}|[A-Za-z]\w*\(\w\)|[A-Za-z0-9]+))"
    r"|(?P<sum>sum(?=_))|(?P<inner><\w+, \w+>)|(?P<star>\(\*\))|(?P<space>\s{2,})"
    r"|(?P<word>[A-Za-z]{2,}\d?)|(?P<rest>.)"
)


def word(text: str) -> str:
    """A name of several letters: a Greek letter, a function, or upright text."""
    if text == "in":
        return r"\in "
    return rf"\{text} " if text in GREEK | FUNCTIONS else rf"\mathrm{{{text}}}"


def subscript(text: str) -> str:
    """A subscript or superscript: `_ij`, `_(j in C)`, `_visible(i)`, `^T`."""
    sign, inside = text[0], text[1:]
    if inside[0] in "({":
        inside = inside[1:-1]
    if sign == "^":
        return r"^\top " if inside == "T" else f"^{{{tex_of(inside)}}}"
    return f"_{{{inside if re.fullmatch('[h-n]{2,3}', inside) else tex_of(inside)}}}"  # x_ij


def tex_of(line: str) -> str:
    """One line of a formula."""
    found = []
    for match in TOKEN.finditer(line.strip()):
        text = match[0]
        if match["sub"]:
            found.append(subscript(text))
        elif match["sum"]:
            found.append(r"\sum ")
        elif match["star"]:
            found.append(r"(\ast)")
        elif match["inner"]:
            found.append(rf"\langle {tex_of(text[1:-1])} \rangle ")
        elif match["space"]:
            found.append(r"\qquad ")
        elif match["word"]:
            found.append(word(text))
        else:
            found.append({"*": r"\cdot ", " ": r"\; ", "<": r"\lt ", ">": r"\gt "}.get(text, text))
    return "".join(found)
