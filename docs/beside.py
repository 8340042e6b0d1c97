"""Shows the tutorials' Triton kernels in two columns: the comments above lines, and the lines.

Comments at the end of a line stay there. In a narrow window each comment is above its lines.
"""

import re
from itertools import groupby

from docutils import nodes

COMMENT = re.compile(r"\s*# ?")


def chunks(code: str) -> list[tuple[str, str]]:
    """(comment, the lines below it) in order; the first comment may be empty."""
    found = [("", "")]
    for commented, lines in groupby(code.splitlines(), lambda line: bool(COMMENT.match(line))):
        text = list(lines)
        if commented:
            found.append((" ".join(COMMENT.sub("", line) for line in text), ""))
        else:
            found[-1] = found[-1][0], "\n".join(text).strip("\n")
    return [chunk for chunk in found if any(chunk)]


def place_beside(app, doctree) -> None:
    """Sphinx's event `doctree-read`: converts kernels that have comments above their lines."""
    if not app.env.docname.startswith("tutorials/"):
        return
    for block in list(doctree.findall(nodes.literal_block)):
        found = chunks(block.astext())
        if "@triton.jit" not in block.astext() or len(found) < 3:
            continue
        columns = nodes.container(classes=["beside"])
        for comment, code in found:
            note = nodes.container("", nodes.paragraph("", comment), classes=["note"])
            lines = nodes.literal_block(code, code, **block.attributes)
            columns += [note, lines]
        block.replace_self(columns)
