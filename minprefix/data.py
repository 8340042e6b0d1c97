"""Data: files of tables and texts -> examples. What becomes of them next is in `batches.py`.

Read `load_examples` (which files, which quirks). Two linearisations: "paper" writes a table as
appendix A.1 of [1] prints it; "original-code" keeps the spaces, bars and names that the code of [2]
feeds its model, for comparison with its results. Differs from [2]: nothing is dropped in silence.
[1] https://arxiv.org/abs/2101.00190   [2] https://github.com/XiangLi1999/PrefixTuning
[3] https://github.com/tuetschek/e2e-dataset   [4] https://gitlab.com/shimorina/webnlg-dataset
"""

import csv
import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minprefix.files import read_text
from minprefix.options import check_choice

LINEARISATIONS = ("paper", "original-code")


# Official field name [3] -> the name, and the order, that [1] and the text files of [2] use.
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

# What a folder may hold: E2E [3], WebNLG 2017 [4], the text files of [2], or JSONL.
SPLIT_FILES = {
    "train": ("trainset.csv", "train/*triples/*.xml", "src1_train.txt", "train.jsonl"),
    "dev": ("devset.csv", "dev/*triples/*.xml", "src1_valid.txt", "dev.jsonl"),
    "test": ("testset_w_refs.csv", "test/testdata_with_lex.xml", "src1_test.txt", "test.jsonl"),
}
RESTAURANTS = Path(__file__).parent / "assets" / "restaurants"


@dataclass(frozen=True)
class Example:
    """One input with all its texts. Only `source` and `targets` reach the model."""

    source: str  # the linearised input, as the model reads it
    targets: tuple[str, ...]  # reference texts: trained on one by one, scored against all
    table: tuple[tuple[str, str], ...] | None = None  # (field, value) pairs where the data has them
    where: str = ""  # file and line (XML: entry) of the first row, for messages
    group: str = ""  # WebNLG's category: scores are reported for seen and unseen ones


def checked_text(value: object, name: str, where: str) -> str:
    """`value`, checked to be a string that is not blank and can be written as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a string, got {value!r}")
    if not value.strip():
        raise ValueError(f"{where}: {name} is empty")
    if re.search("[\ud800-\udfff]", value):
        raise ValueError(f"{where}: {name} has half a surrogate pair, which is no character")
    return value


def _clean(text: str, linearisation: str) -> str:
    """White space of a target or a table's value: see `load_examples`."""
    if linearisation == "paper":
        return " ".join(text.split())
    return re.sub(r"\r\n|\r|\n", " ", text)


def _read_text(path: Path) -> str:
    """The text of a UTF-8 file (a byte order mark is dropped); line ends stay as they are."""
    text = read_text(path).removeprefix("\ufeff")
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file:number", line) of each line that is not blank, without its line end."""
    for number, line in enumerate(_read_text(path).split("\n"), 1):
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


def _read_csv(path: Path, linearisation: str) -> Iterator[Example]:
    """E2E's CSV, columns mr and ref; a text in quotes may contain line breaks."""
    names = E2E_FIELDS | ({"eatType": "Type"} if linearisation == "original-code" else {})
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
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
            table = [(names[f], _clean(fields[f], linearisation)) for f in names if f in fields]
            target = checked_text(row[header.index("ref")], "ref", where)
            yield _from_table(table, [_clean(target, linearisation)], where)
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: broken CSV: {error}") from None


def _read_txt(path: Path, linearisation: str) -> Iterator[Example]:
    """The text files of [2]: one `source||target` a line."""
    for where, line in _lines(path):
        source, *targets = line.split("||")
        if len(targets) != 1:
            raise ValueError(
                f"{where}: expected source||target, got {len(targets)} '||': {line[:80]!r}"
            )
        checked_text(source, "the source", where)
        target = _clean(checked_text(targets[0], "the target", where), linearisation)
        if linearisation == "paper":
            source = source.strip()
        yield Example(source, (target,), None, where)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The pairs of a JSON object as a dict; Python alone would keep the last of equal keys."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"the key {max(keys, key=keys.count)!r} stands twice in one object")
    return dict(pairs)


def _read_jsonl(path: Path, linearisation: str) -> Iterator[Example]:
    """One object a line: {"table": {...}, "text": ...} or {"source": ..., "target": ...}."""
    for where, line in _lines(path):
        try:
            row = json.loads(line, object_pairs_hook=_unique_keys)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: JSON, column {error.colno}: {error.msg}") from None
        except (ValueError, RecursionError) as error:  # equal keys; brackets thousands deep
            raise ValueError(f"{where}: JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, got {line[:80]!r}")
        has_table = {"table", "text"} <= set(row)
        if not has_table and not {"source", "target"} <= set(row):
            raise ValueError(
                f"{where}: needs the keys table and text, or source and target; has {list(row)}"
            )
        name = "text" if has_table else "target"
        texts = row[name] if isinstance(row[name], list) else [row[name]]
        if not texts:
            raise ValueError(f"{where}: {name} is an empty list")
        targets = [_clean(checked_text(text, name, where), linearisation) for text in texts]
        if has_table:
            if not isinstance(row["table"], dict) or not row["table"]:
                raise ValueError(f"{where}: table must be an object with fields, got {line[:80]!r}")
            cells = [(checked_text(f, "a field's name", where), v) for f, v in row["table"].items()]
            table = [
                (f, _clean(checked_text(v, f"table[{f!r}]", where), linearisation))
                for f, v in cells
            ]
            yield _from_table(table, targets, where)
        else:
            source = checked_text(row["source"], "source", where)
            source = source.strip() if linearisation == "paper" else source
            yield Example(source, tuple(targets), None, where)


def _triple(text: str | None, linearisation: str, where: str) -> str:
    """One <mtriple>, "Spain | capital | Madrid" -> "Spain : capital : Madrid"."""
    parts = (text or "").split(" | ")
    if len(parts) != 3:
        raise ValueError(f"{where}: expected subject | relation | object, got {text!r}")
    for part in parts:
        checked_text(part, f"a part of the triple {text!r}", where)
    return " : ".join(_clean(part, linearisation) for part in parts)


def _read_xml(path: Path, linearisation: str, only_good: bool) -> Iterator[Example]:
    """WebNLG's XML: one example per <entry>, from its modified triples; an empty <lex> is no text.

    only_good: leave out the texts that are not marked good, and entries which then have none.
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
        triples = [_triple(m.text, linearisation, where) for m in entry.iter("mtriple")]
        texts = [lex for lex in entry.iter("lex") if (lex.text or "").strip()]
        if not triples or not texts:
            raise ValueError(f"{where}: the entry has no {'text' if triples else 'mtriple'}")
        if only_good:
            texts = [lex for lex in texts if lex.get("comment") == "good"]
        if texts:
            # The code of [2] puts a bar before every triple, also before the first.
            source = " | ".join(triples)
            source = " | " + source if linearisation == "original-code" else source
            targets = tuple(_clean(lex.text, linearisation) for lex in texts)
            yield Example(source, targets, None, where, entry.get("category", ""))


def _merge_equal_sources(rows: Iterator[Example]) -> list[Example]:
    """One example per distinct input, with the targets of all its rows, in order of appearance."""
    first, targets = {}, {}
    for row in rows:
        key = (row.source, row.table)
        first.setdefault(key, row)
        targets.setdefault(key, []).extend(row.targets)
    return [dataclasses.replace(row, targets=tuple(targets[key])) for key, row in first.items()]


def _read_file(path: Path, split: str | None, linearisation: str) -> list[Example]:
    suffix = path.suffix.lower()
    if suffix == ".xml":
        # [2] trains on texts marked good only, and decodes every entry.
        only_good = linearisation == "original-code" and split == "train"
        return list(_read_xml(path, linearisation, only_good))
    if suffix == ".csv":
        return _merge_equal_sources(_read_csv(path, linearisation))
    if suffix == ".txt":
        return _merge_equal_sources(_read_txt(path, linearisation))
    if suffix == ".jsonl":
        return _merge_equal_sources(_read_jsonl(path, linearisation))
    raise ValueError(
        f"{path}: unknown kind of file; accepted are .jsonl, .csv (E2E), .xml (WebNLG) and "
        ".txt (source||target)"
    )


def _find_files(folder: Path, split: str | None) -> list[Path]:
    """The files of one split: those of the only pattern in SPLIT_FILES that the folder matches."""
    if split is None:
        raise ValueError(f"{folder} is a folder: give a split, one of {', '.join(SPLIT_FILES)}")
    found = {pattern: sorted(folder.glob(pattern)) for pattern in SPLIT_FILES[split]}
    found = {pattern: files for pattern, files in found.items() if files}
    if len(found) != 1:
        problem = f"more than one of them: {', '.join(found)}" if found else "none of them"
        raise ValueError(
            f"{folder}: for the split {split} a folder has one of {', '.join(SPLIT_FILES[split])}; "
            f"this one has {problem}"
        )
    return next(iter(found.values()))


def load_examples(
    path: str | Path, split: str | None = None, *, linearisation: str = "paper"
) -> list[Example]:
    """The examples of a file or of one split of a folder; no row is dropped.

    Rows with the same input become one example with several targets, in order of appearance;
    WebNLG has one example per entry.

        linearisation   table (E2E, JSONL)      triples (WebNLG)
        "paper"         name : X | type : pub   Spain : capital : Madrid | Madrid : mayor : ...
        "original-code" name : X | Type : pub    | Spain : capital : Madrid | Madrid : mayor : ...

    White space under "paper": runs of it, line breaks included, become one blank in targets and
    values, and their ends, like those of a source given as text, are stripped. "original-code"
    keeps all of it, but a line break in a target or a value becomes a blank. ([2] trains on
    tokenised E2E texts, its src1_*.txt; the official CSVs hold the untokenised ones.)
    Texts of WebNLG that are not marked "good" are kept, as [1] mentions no selection; under
    "original-code" the training split leaves them out, as [2] does. DART's XML, which has WebNLG's
    schema, is read like WebNLG.

    Args:
        path: "restaurants" for the embedded data, a file (.jsonl, .csv, .xml, .txt) or a folder
            with the files that SPLIT_FILES lists.
        split: "train", "dev" or "test". A folder needs it; of a single file it says what the file
            is, which matters only for the selection above.
        linearisation: one of LINEARISATIONS.
    Raises:
        ValueError: an unknown kind of file or folder, or a broken row, named as file:line.
        FileNotFoundError: `path` does not exist.
    """
    check_choice("linearisation", linearisation, LINEARISATIONS)
    if split is not None and split not in SPLIT_FILES:
        raise ValueError(f"split must be one of {', '.join(SPLIT_FILES)}, got {split!r}")
    path = RESTAURANTS if str(path) == "restaurants" else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    files = _find_files(path, split) if path.is_dir() else [path]
    examples = [example for file in files for example in _read_file(file, split, linearisation)]
    if not examples:
        raise ValueError(f"{path}: no example in it")
    return examples
