"""Equations as MathML, which browsers display without a script, in one font for the whole site.

latex2mathml [1] translates the TeX while the site is built. The font is STIX Two Math (SIL Open
Font License), which ziamath [2] contains; `write_font` keeps only mathematical characters.
[1] https://github.com/roniemartinez/latex2mathml   [2] https://github.com/cdelker/ziamath
"""

import logging
import re
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from fontTools import subset
from latex2mathml.converter import convert

SIGNS = (  # ranges of code points, ends included
    (0x20, 0x7E), (0xA0, 0xFF), (0x370, 0x3FF),  # Latin, Greek
    (0x2010, 0x2044), (0x2061, 0x2064), (0x2102, 0x2135), (0x2190, 0x22FF),  # operators
    (0x2308, 0x230B), (0x23DC, 0x23DF), (0x27E6, 0x27EF), (0x2A7D, 0x2A7E),  # brackets
    (0x1D400, 0x1D467), (0x1D49C, 0x1D4CF), (0x1D538, 0x1D56B), (0x1D6A4, 0x1D71B),  # letters
)  # fmt: skip
FUNCTION = re.compile(  # log x, not logx; before a bracket or a sum nothing is missing
    r"(?<!<msub>)<mi>(log|ln|exp)</mi>(?=<m[in]>|<mfrac>|<msub><mi>)"
)
MARKS = re.compile(r"[.,;:!?)]+")


def mathml(tex: str, display: str = "inline") -> str:
    """The <math> element of an equation; `display` is "inline" or "block".

    Raises:
        ValueError: a command that latex2mathml does not know.
    """
    found = convert(tex, display=display)
    if unknown := re.search(r"\\[A-Za-z]*", found):
        raise ValueError(f"{unknown[0]} is not known to latex2mathml, in the equation {tex!r}")
    return FUNCTION.sub(r'\g<0><mspace width="0.17em"/>', found)


def keep_marks(app, doctree: nodes.document) -> None:
    """Sphinx's event `doctree-read`: no line begins with the comma after an equation."""
    for node in list(doctree.findall(nodes.math)):
        text = node.next_node(descend=False, siblings=True)
        if isinstance(text, nodes.Text) and (marks := MARKS.match(text)):
            text.parent.replace(text, nodes.Text(text[marks.end() :]))
            together = nodes.inline(classes=["together"])
            node.replace_self(together)
            together += [node, nodes.Text(marks[0])]


def visit_inline(self, node: nodes.math) -> None:
    self.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def visit_block(self, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{mathml(node.astext(), "block")}</div>\n')
    raise nodes.SkipNode


def write_font(path: Path) -> None:
    """STIX Two Math with the characters of SIGNS, as WOFF: 0.2 MB."""
    logging.getLogger("fontTools").setLevel(logging.WARNING)  # else it lists every glyph
    options = subset.Options(flavor="woff", hinting=False, layout_features=["ssty", "dtls", "ccmp"])
    source = Path(find_spec("ziamath").origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"
    font = subset.load_font(source, options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=[c for a, b in SIGNS for c in range(a, b + 1)])
    subsetter.subset(font)
    subset.save_font(font, str(path), options)
