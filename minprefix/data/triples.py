"""Reads sets of triples, one example per set: WebNLG's XML and JSON [4], DART's rows and XML [5].

Read `read_xml`, then `dart_example`. The code of [2] writes the two data sets differently:

    WebNLG   " | s : relation : o | s : relation : o"   a bar before every triple
    DART     "s : relation : o | s : relation : o"      relations in lower case

[2] https://github.com/XiangLi1999/PrefixTuning   [4] https://gitlab.com/shimorina/webnlg-dataset
[5] https://github.com/Yale-LILY/dart
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minprefix.data.examples import (
    Example,
    Skipped,
    checked_text,
    normalise_space,
    text_of,
    texts_of,
)
from minprefix.files import brief, read_bytes

DART_CATEGORY = "MISC"  # of every entry in DART's XML (in WebNLG's schema), and of none in WebNLG
WEBNLG_LANGUAGE = "en"  # of texts without a language, and of all in DART


class Text(NamedTuple):
    """A text of a WebNLG entry."""

    text: str
    comment: str | None  # "good", or the text's defect
    language: str


def _linearise(triples: Sequence[Sequence[str]], linearisation: str, dart: bool) -> str:
    """The source text of a set of (subject, relation, object)."""
    exact = linearisation == "original-code"
    if exact and dart:
        triples = [(s, relation.lower(), o) for s, relation, o in triples]
    source = " | ".join(
        " : ".join(normalise_space(part, linearisation) for part in triple) for triple in triples
    )
    return " | " + source if exact and not dart else source


def _parse_triple(text: str | None, where: str) -> list[str]:
    """One <mtriple>, "Spain | capital | Madrid"."""
    parts = (text or "").split(" | ")
    if len(parts) != 3:
        raise ValueError(f"{where}: expected subject | relation | object, got {brief(text)}")
    for part in parts:
        checked_text(part, f"a part of the triple {brief(text)}", where)
    return parts


def read_xml(
    path: Path, linearisation: str, skipped: Skipped, only_good: bool
) -> Iterator[Example]:
    """WebNLG's XML: one example per <entry> and language, from its modified triples.

    The texts are in <lex>, or in <lex><text> in the enriched WebNLG. DART's entries are recognised
    by their category and get DART's linearisation.

    Args:
        only_good: leave out WebNLG's texts that are not marked good, and entries without a good
            text. (In DART this mark is replaced by the name of the text's source.)
    """
    data = read_bytes(path)
    if not data.strip():
        raise ValueError(f"{path}: the file is empty")
    try:
        root = ET.fromstring(data)
    except (ET.ParseError, LookupError, ValueError) as error:
        # An unknown encoding is a LookupError or ValueError without a position: it is in line 1.
        line = error.position[0] if isinstance(error, ET.ParseError) else 1
        raise ValueError(f"{path}:{line}: broken XML: {error}") from None
    named = re.search(r"[.-]([a-z]{2})\.xml$", path.name)  # Airport.de.xml, ...-with-refs-ru.xml
    usual = named[1] if named else WEBNLG_LANGUAGE
    for number, entry in enumerate(root.iter("entry"), 1):
        where = f"{path}:{entry.get('eid', number)}"
        chosen = entry.find("modifiedtripleset")
        found = list(entry.iter("mtriple")) if chosen is None else list(chosen)
        triples = [_parse_triple(triple.text, where) for triple in found]
        texts = [
            Text(lex.findtext("text", lex.text or ""), lex.get("comment"), lex.get("lang") or usual)
            for lex in entry.iter("lex")
        ]
        group = entry.get("category", "")
        yield from _entry(triples, texts, group, linearisation, where, skipped, only_good)


def is_webnlg(content: Any) -> bool:
    """Whether this is WebNLG's JSON, {"entries": [...]}."""
    return isinstance(content, dict) and isinstance(content.get("entries"), list)


def read_webnlg_json(
    path: Path, entries: list, linearisation: str, skipped: Skipped, only_good: bool
) -> Iterator[Example]:
    """The entries of WebNLG's JSON, {"1": {"modifiedtripleset": ..., "lexicalisations": ...}}."""
    for number, entry in enumerate(entries, 1):
        where = f"{path}:entry {number}"
        if isinstance(entry, dict) and len(entry) == 1:  # under its number
            (entry,) = entry.values()
        try:
            triples = [
                [
                    checked_text(triple[part], part, where)
                    for part in ("subject", "property", "object")
                ]
                for triple in entry["modifiedtripleset"]
            ]
            texts = [
                Text(
                    text_of(lex["lex"], "lex", where) or "",
                    lex.get("comment"),
                    lex.get("lang") or WEBNLG_LANGUAGE,
                )
                for lex in entry.get("lexicalisations", [])
            ]
            group = text_of(entry.get("category"), "category", where) or ""
        except (KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{where}: expected an object with modifiedtripleset (subject, property, object) "
                f"and lexicalisations (lex), got {brief(entry, most=40)}"
            ) from None
        yield from _entry(triples, texts, group, linearisation, where, skipped, only_good)


def _entry(
    triples: list, texts: list[Text], group: str, linearisation: str, where: str, skipped: Skipped,
    only_good: bool,
) -> Iterator[Example]:  # fmt: skip
    """One example for each language of an entry's texts; an entry without texts gives one too."""
    if not triples:
        skipped.add("rows without an input", where)
        return
    dart = group == DART_CATEGORY
    source = _linearise(triples, linearisation, dart)
    by_language: dict[str, list[str]] = {}
    for text in texts:
        if not text.text.strip():
            skipped.add("empty texts", where)
        elif dart or not only_good or text.comment == "good":
            by_language.setdefault(text.language, []).append(
                normalise_space(text.text, linearisation)
            )
    for language, targets in by_language.items():
        yield Example(source, tuple(targets), None, where, group, language=language)
    if not by_language and not (only_good and texts):
        yield Example(source, (), None, where, group)


def dart_example(
    triples: object, notes: object, linearisation: str, where: str, skipped: Skipped
) -> Example:
    """The example of a row of DART; its group is the category used in DART's XML.

    Args:
        triples: [[s, relation, o], ...].
        notes: [{"text": ...}, ...], or {"text": [...]} in the hub's format; None = no texts.
    Raises:
        ValueError: a value has a wrong type.
    """
    if not isinstance(triples, list) or not triples:
        raise ValueError(f"{where}: tripleset must be a list of triples, got {brief(triples)}")
    parts = []
    for triple in triples:
        if not isinstance(triple, list) or len(triple) != 3:
            raise ValueError(f"{where}: expected [subject, relation, object], got {brief(triple)}")
        name = f"a part of the triple {brief(triple)}"
        # the table that a triple comes from may have empty cells
        parts.append([text_of(part, name, where) or "" for part in triple])
    if isinstance(notes, dict):
        found = notes.get("text")
    elif notes is None:
        found = []
    elif isinstance(notes, list) and all(isinstance(note, dict) for note in notes):
        found = [note.get("text") for note in notes]
    else:
        raise ValueError(f"{where}: annotations must be a list of objects, got {brief(notes)}")
    texts = texts_of(found, "an annotation's text", linearisation, where, skipped)
    source = _linearise(parts, linearisation, dart=True)
    return Example(source, texts, None, where, DART_CATEGORY, language=WEBNLG_LANGUAGE)
