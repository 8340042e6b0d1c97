"""Turns rows with named columns into examples, for every format of file.

    columns of the input and of the text(s)           the input
    mr, ref                                           E2E's meaning representation [1]
    meaning_representation, human_reference           the same under the hub's names
    table, text                                       an object: field -> value or values
    source, target                                    a text
    document, summary                                 an article (XSum's columns)
    article, highlights; dialogue, summary            the same under other sets' names
    tripleset, annotations                            a set of triples (DART's)
    text or target, and other columns                 the others are the fields of a table

Read `example_of`. A row needs the column of its input; the column of its texts may be missing. A
column language or lang gives the language of the texts.
[1] https://github.com/tuetschek/e2e-dataset
"""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from minprefix.data.articles import article
from minprefix.data.examples import (
    Example,
    Skipped,
    checked_text,
    normalise_space,
    text_of,
    texts_of,
)
from minprefix.data.triples import dart_example
from minprefix.files import brief

ARTICLES = (("document", "summary"), ("article", "highlights"), ("dialogue", "summary"))
MEANINGS = (("mr", "ref"), ("meaning_representation", "human_reference"))
TABLE, SOURCE, TRIPLES = ("table", "text"), ("source", "target"), ("tripleset", "annotations")
COLUMNS = (*MEANINGS, TABLE, SOURCE, *ARTICLES, TRIPLES)
OPTIONAL = ("id", "url", "topic", "language", "lang")  # other columns that are read

# Official field name [1] -> the name, and the order, that the paper and its authors' text files use
E2E_FIELDS = {
    "name": "name",
    "eatType": "type",  # "Type" in the authors' files
    "food": "food",
    "priceRange": "price",
    "customer rating": "customer rating",
    "area": "area",
    "familyFriendly": "family friendly",
    "near": "near",
}


def columns_of(names: Iterable[str], where: str) -> tuple[str, str]:
    """The columns of a row's input and texts; ValueError unless exactly one pair fits.

    The first is "" if each field has a column of its own (`fields_of`).
    """
    names = list(names)
    whole = [pair for pair in COLUMNS if set(pair) <= set(names)]
    found = whole or [pair for pair in COLUMNS if pair[0] in names]
    if len(found) == 1:
        return found[0]
    alone = [text for _, text in (TABLE, SOURCE) if text in names]
    if not found and len(alone) == 1 and fields_of(names):
        return "", alone[0]
    pairs = "; ".join(", ".join(pair) for pair in found or COLUMNS)
    pairs += "" if found else "; or text, and a column for each field"
    problem = "has more than one of" if found else "needs the columns of one of"
    raise ValueError(f"{where}: {problem}: {pairs}; has {brief(names, str)}")


def fields_of(names: Iterable[str]) -> list[str]:
    """The columns that are fields of the table, if each field has a column of its own."""
    others = ("", TABLE[1], SOURCE[1], *OPTIONAL)  # "": the column of pandas' row numbers
    return [name for name in names if name not in others]


def example_of(
    row: dict[str, Any], linearisation: str, where: str, skipped: Skipped
) -> Example | None:
    """The example of a row; None for a row without an input, which is counted in `skipped`.

    Raises:
        ValueError: the columns are unknown or ambiguous, or a value has a wrong type.
    """
    source, target = pair = columns_of(row, where)
    if pair == TRIPLES:
        return dart_example(row[source], row.get(target), linearisation, where, skipped)
    texts = texts_of(row[target], target, linearisation, where, skipped) if target in row else ()
    language = text_of(row.get("language") or row.get("lang"), "language", where) or ""
    if pair in ARTICLES:
        return article(row[source], texts, row, linearisation, where, language)
    if pair == SOURCE:
        text = text_of(row[source], source, where)
        if text is not None:
            text = text.strip() if linearisation == "paper" else text
            return Example(text, texts, None, where, language=language)
    else:
        make = _parse_mr if pair in MEANINGS else cells_of
        content = row[source] if source else {name: row[name] for name in fields_of(row)}
        if not source:
            skipped.fields |= dict.fromkeys(content)
        if table := make(content, linearisation, where, skipped):
            return Example(source_of(table), texts, tuple(table), where, language=language)
    skipped.add("rows without an input", where)
    return None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The pairs of a JSON object as a dict; ValueError for equal keys, which Python accepts."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"the key {brief(max(keys, key=keys.count))} occurs twice in one object")
    return dict(pairs)


def parse_json(text: str) -> Any:
    """Parse JSON; numbers stay as they are written ("4.50"), and pandas' NaN is read as null.

    Raises:
        ValueError: invalid JSON, equal keys in an object, or brackets nested thousands deep.
    """
    constants = {"NaN": None}
    try:
        return json.loads(
            text, object_pairs_hook=_unique_keys, parse_int=str, parse_float=str,
            parse_constant=lambda name: constants.get(name, name),
        )  # fmt: skip
    except RecursionError as error:
        raise ValueError(str(error)) from None


def cells_of(
    table: object, linearisation: str, where: str, skipped: Skipped
) -> list[tuple[str, str]]:
    """The (field, value) pairs of an object, in its order; a list gives a field several values.

    The object may also be a string of JSON, as in a cell of a CSV.
    """
    if isinstance(table, str) and table.lstrip().startswith("{"):
        try:
            table = parse_json(table)
        except ValueError as error:
            raise ValueError(
                f"{where}: table is not valid JSON ({error}): {brief(table)}"
            ) from None
    if table is None or (isinstance(table, str) and not table.strip()):
        return []
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{where}: table must be an object with fields, got {brief(table)}")
    found = []
    for name, value in table.items():
        checked_text(name, "a field's name", where)
        for one in value if isinstance(value, list) else [value]:
            if (text := text_of(one, f"table[{brief(name)}]", where)) is None:
                skipped.add("empty cells", where)
            else:
                found.append((name, normalise_space(text, linearisation)))
    return found


def source_of(cells: Iterable[tuple[str, str]]) -> str:
    """The text of a table."""
    return " | ".join(f"{name} : {value}" for name, value in cells)


def read_prompt(prompt: str, linearisation: str) -> str:
    """The source of a prompt: that of the table if it is a JSON object, else the prompt itself."""
    try:
        table = parse_json(prompt) if prompt.lstrip().startswith("{") else None
    except ValueError:
        return prompt
    return source_of(cells_of(table, linearisation, "the prompt", Skipped())) if table else prompt


def _parse_mr(
    mr: object, linearisation: str, where: str, skipped: Skipped
) -> list[tuple[str, str]]:
    """The pairs of "name[The Eagle], eatType[pub]", under our names and in our order.

    A field that occurs twice, as in the cleaned E2E, has two values, in their order.
    """
    if (text := text_of(mr, "the meaning representation", where)) is None:
        return []
    values: dict[str, list[str]] = {name: [] for name in E2E_FIELDS}
    for part in re.split(r",\s*(?=[^\[\],]+\[)", text):
        match = re.fullmatch(r"\s*([^\[\]]+)\[([^\[\]]*)\]\s*", part)
        if match is None:
            raise ValueError(
                f"{where}: expected field[value], field[value], ..., got {brief(text)}"
            )
        if match[1] not in E2E_FIELDS:
            known = f"E2E has {', '.join(E2E_FIELDS)}"
            field, text = brief(match[1], most=30), brief(text, most=30)
            raise ValueError(f"{where}: the unknown field {field} in {text}; {known}")
        if match[2].strip():
            values[match[1]].append(normalise_space(match[2], linearisation))
        else:
            skipped.add("empty cells", where)
    names = E2E_FIELDS | ({"eatType": "Type"} if linearisation == "original-code" else {})
    return [(names[field], value) for field in names for value in values[field]]


def merge_equal_sources(rows: Iterable[Example]) -> list[Example]:
    """One example per distinct input, with the targets of all its rows, in order of appearance.

    Articles and sets of triples are not merged: two with the same text count twice, as in all
    published results on XSum, WebNLG and DART.
    """
    first: dict[tuple, Example] = {}
    targets: dict[tuple, list[str]] = {}
    for row in rows:
        key = (row.source, row.table, row.where if row.group else row.id, row.language)
        first.setdefault(key, row)
        targets.setdefault(key, []).extend(row.targets)
    return [replace(row, targets=tuple(targets[key])) for key, row in first.items()]
