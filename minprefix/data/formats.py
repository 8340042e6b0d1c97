"""Reads the examples in files of rows: CSV, JSON and JSON lines, parquet, pairs of text files.

`rows.py` turns a row into an example. `triples.py` reads WebNLG's files; `load.py` chooses among
the readers and explains the two linearisations. Each reader takes the path, the linearisation and
the `Skipped` that counts rows that cannot be used.
[2] https://github.com/XiangLi1999/PrefixTuning
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from minprefix.data.examples import Example, Skipped, normalise_space, read_text, texts_of
from minprefix.data.rows import COLUMNS, OPTIONAL, columns_of, example_of, parse_json
from minprefix.data.triples import is_webnlg, read_webnlg_json
from minprefix.files import brief, need_file, read_lines
from minprefix.limits import DATA, LINE


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file:number", line) for each line that is not blank, without its line end."""
    empty = True
    for number, line in enumerate(read_lines(path, DATA), 1):
        if line.strip():
            empty = False
            yield f"{path}:{number}", line.removesuffix("\n").removesuffix("\r")
    if empty:
        raise ValueError(f"{path}: the file is empty")


def read_csv(path: Path, linearisation: str, skipped: Skipped) -> Iterator[Example]:
    """CSV with a header, such as E2E's; a text in quotes may contain line breaks."""
    csv.field_size_limit(LINE.value)  # the module's own limit is 2**17
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    line = 1  # of the file, where the row begins
    try:
        header = [name.strip() for name in next(reader)]
        known = {*OPTIONAL, *(name for pair in COLUMNS for name in pair)}
        # E2E's files without texts have the header MR
        header = [n.lower() if n.lower() in known else n for n in header]
        check_separator(header, f"{path}:1")
        columns_of(header, f"{path}:1")
        if len(set(header)) < len(header):
            raise ValueError(f"{path}:1: a column name occurs twice: {brief(header)}")
        line = reader.line_num + 1
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{where}: {len(header)} columns expected, got {len(cells)}: {brief(cells)}"
                )
            row = dict(zip(header, cells, strict=True))
            if (found := example_of(row, linearisation, where, skipped)) is not None:
                yield found
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: broken CSV: {error}") from None


def check_separator(header: list[str], where: str) -> None:
    """ValueError for a header of one column that another separator would split."""
    for separator, name in ((";", "';'"), ("\t", "a tab")):
        if len(header) == 1 and separator in header[0]:
            raise ValueError(
                f"{where}: the separator looks like {name}, but only commas are read: save the "
                f"file with commas, or as JSON lines; the first line is {brief(header[0])}"
            )


def read_txt(path: Path, linearisation: str, skipped: Skipped) -> Iterator[Example]:
    """The text files of [2], with `source||target` or an input alone in each line."""
    lines = list(_lines(path))
    pairs = any("||" in line for _, line in lines)
    for where, line in lines:
        source, *targets = line.split("||")
        if len(targets) != pairs:
            raise ValueError(
                f"{where}: expected source||target, got {len(targets)} '||': {brief(line)}"
            )
        if not source.strip():
            skipped.add("rows without an input", where)
            continue
        if linearisation == "paper":
            source = source.strip()
        texts = texts_of(targets, "the target", linearisation, where, skipped)
        yield Example(source, texts, None, where)


def read_line_pairs(path: Path, linearisation: str, skipped: Skipped) -> Iterator[Example]:
    """NAME.source and NAME.target, line by line: XSum in the format of [2].

    Rows with equal inputs are not merged, as for articles. NAME.target may be missing.
    """
    targets_path = path.with_suffix(".target")
    files = [path, targets_path] if targets_path.is_file() else [path]
    lines = [
        [line.removesuffix("\n").removesuffix("\r") for line in read_lines(file, DATA)]
        for file in files
    ]
    for file, part in zip(files, lines, strict=True):
        if not any(line.strip() for line in part):
            raise ValueError(f"{file}: the file is empty")
    if len({len(part) for part in lines}) > 1:
        raise ValueError(f"{path} has {len(lines[0])} lines, {targets_path} {len(lines[1])}")
    for number, (source, *targets) in enumerate(zip_longest(*lines), 1):
        where = f"{path}:{number}"
        texts = texts_of(targets, "the target", linearisation, where, skipped)
        yield Example(normalise_space(source, linearisation), texts, None, where, id=where)


def read_jsonl(path: Path, linearisation: str, skipped: Skipped) -> Iterator[Example]:
    """JSON lines: one object in each line."""
    yield from _json_rows(_lines(path), linearisation, skipped)


def _json_rows(
    lines: Iterable[tuple[str, str]], linearisation: str, skipped: Skipped
) -> Iterator[Example]:
    """The examples of lines (with their places) that hold one JSON object each."""
    for where, line in lines:
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: JSON, column {error.colno}: {error.msg}") from None
        except ValueError as error:
            raise ValueError(f"{where}: JSON: {error}") from None
        yield from _object(row, linearisation, where, skipped)


def _object(row: Any, linearisation: str, where: str, skipped: Skipped) -> Iterator[Example]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {brief(row)}")
    if (found := example_of(row, linearisation, where, skipped)) is not None:
        yield found


def read_json(
    path: Path, linearisation: str, skipped: Skipped, only_good: bool
) -> Iterator[Example]:
    """JSON: a list of rows (such as DART's), WebNLG's {"entries": ...}, or JSON lines.

    Args:
        only_good: as in `triples.read_xml`.
    """
    text = read_text(path)
    try:
        content = parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # more text after a complete value
            lines = ((f"{path}:{n}", line) for n, line in enumerate(text.split("\n"), 1))
            yield from _json_rows((x for x in lines if x[1].strip()), linearisation, skipped)
            return
        raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None
    except ValueError as error:
        raise ValueError(f"{path}: JSON: {error}") from None
    if is_webnlg(content):
        yield from read_webnlg_json(path, content["entries"], linearisation, skipped, only_good)
        return
    if isinstance(content, dict):  # JSON lines with a single line
        columns_of(content, str(path))
        content = [content]
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list of rows, got {type(content).__name__}")
    for number, row in enumerate(content, 1):
        yield from _object(row, linearisation, f"{path}:row {number}", skipped)


def read_parquet(path: Path, linearisation: str, skipped: Skipped) -> Iterator[Example]:
    """The hub's format, the only one that needs pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        todo = "pip install pyarrow, or give JSON lines"
        raise ValueError(f"{path}: reading parquet needs the package pyarrow ({todo})") from None
    need_file(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            input_column, texts = columns_of(names, str(path))
            read = {input_column, texts, *OPTIONAL} if input_column else {*names}
            number = 0
            for batch in file.iter_batches(columns=[name for name in names if name in read]):
                for row in batch.to_pylist():
                    number += 1
                    yield from _object(row, linearisation, f"{path}:{number}", skipped)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from None
