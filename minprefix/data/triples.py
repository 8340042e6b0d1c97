"""Sets of triples: WebNLG's XML [4], DART's JSON and XML [5] -> examples, one per set.

Read `read_xml`, then `read_dart`. What the code of [2] feeds its model differs between the two:

    WebNLG   " | s : relation : o | s : relation : o"   a bar before every triple
    DART     "s : relation : o | s : relation : o"      relations in lower case

[2] https://github.com/XiangLi1999/PrefixTuning   [4] https://gitlab.com/shimorina/webnlg-dataset
[5] https://github.com/Yale-LILY/dart
"""

import json
import logging
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path

from minprefix.data.examples import Example, checked_text, clean, read_text

DART_CATEGORY = "MISC"  # of every entry of DART's XML, which has WebNLG's schema, and of none there
log = logging.getLogger(__name__)


def _linearise(triples: Sequence[Sequence[str]], linearisation: str, dart: bool) -> str:
    """The source that a set of (subject, relation, object) becomes."""
    exact = linearisation == "original-code"
    if exact and dart:
        triples = [(s, relation.lower(), o) for s, relation, o in triples]
    source = " | ".join(
        " : ".join(clean(part, linearisation) for part in triple) for triple in triples
    )
    return " | " + source if exact and not dart else source


def _parse_triple(text: str | None, where: str) -> list[str]:
    """One <mtriple>, "Spain | capital | Madrid"."""
    parts = (text or "").split(" | ")
    if len(parts) != 3:
        raise ValueError(f"{where}: expected subject | relation | object, got {text!r}")
    for part in parts:
        checked_text(part, f"a part of the triple {text!r}", where)
    return parts


def read_xml(path: Path, linearisation: str, only_good: bool) -> Iterator[Example]:
    """WebNLG's XML: one example per <entry>, from its modified triples; an empty <lex> is no text.

    DART's entries are known by their category, and get DART's linearisation.

    Args:
        only_good: leave out WebNLG's texts that are not marked good, and entries which then have
            none. (DART's have the name of their source in the place of such marks.)
    """
    data = path.read_bytes()
    if not data.strip():
        raise ValueError(f"{path}: the file is empty")
    try:
        root = ET.fromstring(data)
    except (ET.ParseError, LookupError, ValueError) as error:
        # Not all have a position: an unknown encoding is a LookupError or ValueError of line 1.
        line = error.position[0] if isinstance(error, ET.ParseError) else 1
        raise ValueError(f"{path}:{line}: broken XML: {error}") from None
    for number, entry in enumerate(root.iter("entry"), 1):
        where = f"{path}:{entry.get('eid', number)}"
        triples = [_parse_triple(m.text, where) for m in entry.iter("mtriple")]
        texts = [lex for lex in entry.iter("lex") if (lex.text or "").strip()]
        if not triples or not texts:
            raise ValueError(f"{where}: the entry has no {'text' if triples else 'mtriple'}")
        group = entry.get("category", "")
        dart = group == DART_CATEGORY
        if only_good and not dart:
            texts = [lex for lex in texts if lex.get("comment") == "good"]
        if texts:
            targets = tuple(clean(lex.text or "", linearisation) for lex in texts)
            source = _linearise(triples, linearisation, dart)
            yield Example(source, targets, None, where, group)


def _is_blank(value: object) -> bool:
    return isinstance(value, str) and not value.strip()


def _checked_set(item: object, where: str) -> tuple[list, list[str]]:
    """Triples and texts of one object of DART's JSON."""
    if not isinstance(item, dict) or not {"tripleset", "annotations"} <= set(item):
        has = list(item) if isinstance(item, dict) else repr(item)[:80]
        raise ValueError(f"{where}: expected an object with tripleset and annotations, got {has}")
    triples, notes = item["tripleset"], item["annotations"]
    if not isinstance(triples, list) or not triples:
        raise ValueError(f"{where}: tripleset must be a list of triples, got {triples!r}")
    for triple in triples:
        if not isinstance(triple, list) or len(triple) != 3:
            raise ValueError(f"{where}: expected [subject, relation, object], got {triple!r}")
        for part in triple:
            if not _is_blank(part):  # a table's cell may be empty
                checked_text(part, f"a part of the triple {triple!r}", where)
    if not isinstance(notes, list) or not all(isinstance(note, dict) for note in notes):
        raise ValueError(f"{where}: annotations must be a list of objects, got {notes!r}")
    texts = [note.get("text") for note in notes]
    texts = [text for text in texts if not _is_blank(text)]
    for text in texts:
        checked_text(text, "an annotation's text", where)
    return triples, texts


def read_dart(path: Path, linearisation: str) -> Iterator[Example]:
    """DART's JSON: a list of {"tripleset": [[s, relation, o], ...], "annotations": [...]}.

    A text is annotations[i]["text"]; an empty one is no text. The group is the category that DART's
    XML has. Sets without any text are left out and counted in a warning.
    """
    try:
        items = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    except RecursionError as error:  # brackets thousands deep
        raise ValueError(f"{path}: JSON: {error}") from None
    if not isinstance(items, list):
        raise ValueError(f"{path}: expected a list of triple sets, got {type(items).__name__}")
    without = 0
    for number, item in enumerate(items, 1):
        where = f"{path}:set {number}"
        triples, texts = _checked_set(item, where)
        without += not texts
        if texts:
            targets = tuple(clean(text, linearisation) for text in texts)
            source = _linearise(triples, linearisation, dart=True)
            yield Example(source, targets, None, where, DART_CATEGORY)
    if without:
        log.warning("%s: %d triple sets without a text are left out", path, without)
