"""Formats of tables and texts: E2E's CSV, text lines, JSON lines -> examples.

`triples.py` and `articles.py` have the others; `load.py` chooses among them and says what
the two linearisations are.
[2] https://github.com/XiangLi1999/PrefixTuning   [3] https://github.com/tuetschek/e2e-dataset
"""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from minprefix.data.articles import ARTICLE, article
from minprefix.data.examples import Example, checked_text, clean, read_text

# Official field name [3] -> the name, and the order, that the paper and the text files of [2] use.
E2E_FIELDS = {
    "name": "name",
    "eatType": "type",  # "Type" in [2]
    "food": "food",
    "priceRange": "price",
    "customer rating": "customer rating",
    "area": "area",
    "familyFriendly": "family friendly",
    "near": "near",
}


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file:number", line) of each line that is not blank, without its line end."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line.removesuffix("\r")


def _from_table(table: Sequence[tuple[str, str]], targets, where: str) -> Example:
    source = " | ".join(f"{field} : {value}" for field, value in table)
    return Example(source, tuple(targets), tuple(table), where)


def _parse_mr(mr: str, where: str) -> dict[str, str]:
    """E2E's meaning representation, "name[The Eagle], eatType[pub]" -> official field: value."""
    fields = {}
    for part in re.split(r",\s*(?=[^\[\],]+\[)", mr):
        match = re.fullmatch(r"\s*([^\[\]]+)\[([^\[\]]*)\]\s*", part)
        if match is None or not match[2].strip():
            raise ValueError(f"{where}: expected field[value], field[value], ..., got {mr!r}")
        if match[1] not in E2E_FIELDS or match[1] in fields:
            problem = "twice the" if match[1] in fields else "the unknown"
            raise ValueError(
                f"{where}: {problem} field {match[1]!r} in {mr!r}; E2E has {', '.join(E2E_FIELDS)}"
            )
        fields[match[1]] = match[2]
    return fields


def read_csv(path: Path, linearisation: str) -> Iterator[Example]:
    """E2E's CSV, columns mr and ref; a text in quotes may contain line breaks."""
    names = E2E_FIELDS | ({"eatType": "Type"} if linearisation == "original-code" else {})
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    line = 1  # of the file, where the row begins
    try:
        header = next(reader)
        if not {"mr", "ref"} <= set(header):
            raise ValueError(f"{path}:1: E2E's CSV has the columns mr and ref, got {header}")
        line = reader.line_num + 1
        for row in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(f"{where}: {len(header)} columns expected, got {len(row)}: {row}")
            fields = _parse_mr(row[header.index("mr")], where)
            table = [(names[f], clean(fields[f], linearisation)) for f in names if f in fields]
            target = checked_text(row[header.index("ref")], "ref", where)
            yield _from_table(table, [clean(target, linearisation)], where)
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: broken CSV: {error}") from None


def read_txt(path: Path, linearisation: str) -> Iterator[Example]:
    """The text files of [2]: one `source||target` a line."""
    for where, line in _lines(path):
        source, *targets = line.split("||")
        if len(targets) != 1:
            raise ValueError(
                f"{where}: expected source||target, got {len(targets)} '||': {line[:80]!r}"
            )
        checked_text(source, "the source", where)
        target = clean(checked_text(targets[0], "the target", where), linearisation)
        if linearisation == "paper":
            source = source.strip()
        yield Example(source, (target,), None, where)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The pairs of a JSON object as a dict; Python alone would keep the last of equal keys."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"the key {max(keys, key=keys.count)!r} stands twice in one object")
    return dict(pairs)


def read_jsonl(path: Path, linearisation: str) -> Iterator[Example]:
    """One object a line: {"table": {...}, "text": ...}, {"source": ..., "target": ...}, an article.

    A text may be a list of several. An article has the keys document and summary, see `article`.
    """
    for where, line in _lines(path):
        try:
            row = json.loads(line, object_pairs_hook=_unique_keys)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: JSON, column {error.colno}: {error.msg}") from None
        except (ValueError, RecursionError) as error:  # equal keys; brackets thousands deep
            raise ValueError(f"{where}: JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, got {line[:80]!r}")
        if set(ARTICLE) <= set(row):
            yield article(row, linearisation, where)
            continue
        has_table = {"table", "text"} <= set(row)
        if not has_table and not {"source", "target"} <= set(row):
            raise ValueError(
                f"{where}: needs the keys table and text, or source and target, or document and "
                f"summary; has {list(row)}"
            )
        name = "text" if has_table else "target"
        texts = row[name] if isinstance(row[name], list) else [row[name]]
        if not texts:
            raise ValueError(f"{where}: {name} is an empty list")
        targets = [clean(checked_text(text, name, where), linearisation) for text in texts]
        if has_table:
            if not isinstance(row["table"], dict) or not row["table"]:
                raise ValueError(f"{where}: table must be an object with fields, got {line[:80]!r}")
            cells = [(checked_text(f, "a field's name", where), v) for f, v in row["table"].items()]
            table = [
                (f, clean(checked_text(v, f"table[{f!r}]", where), linearisation)) for f, v in cells
            ]
            yield _from_table(table, targets, where)
        else:
            source = checked_text(row["source"], "source", where)
            source = source.strip() if linearisation == "paper" else source
            yield Example(source, tuple(targets), None, where)


def merge_equal_sources(rows: Iterator[Example]) -> list[Example]:
    """One example per distinct input, with the targets of all its rows, in order of appearance.

    Articles stay apart: two with the same text are two rows, as in all that is reported on XSum.
    """
    first, targets = {}, {}
    for row in rows:
        key = (row.source, row.table, row.id)
        first.setdefault(key, row)
        targets.setdefault(key, []).extend(row.targets)
    return [dataclasses.replace(row, targets=tuple(targets[key])) for key, row in first.items()]
