"""Loads the examples of a data set from its files; `batches.py` then encodes them.

Read `load_examples` (which files, which quirks). There are two linearisations: "paper" writes a
table as appendix A.1 of [1] prints it; "original-code" keeps the spaces, bars and names that the
code of [2] feeds to its model, for comparison with its results. Unlike [2], we drop nothing
silently.

The readers are in `formats.py` (files of rows, whose rows `rows.py` interprets), `triples.py`
(WebNLG, DART) and `articles.py` (XSum's archive). `splits.py` makes topic splits and small subsets;
`download.py` fetches the official files.
[1] https://arxiv.org/abs/2101.00190   [2] https://github.com/XiangLi1999/PrefixTuning
[3] https://github.com/tuetschek/e2e-dataset   [4] https://gitlab.com/shimorina/webnlg-dataset
[5] https://github.com/Yale-LILY/dart   [6] https://huggingface.co/datasets/EdinburghNLP/xsum
[7] https://github.com/tuetschek/e2e-cleaning
"""

import os
from pathlib import Path
from typing import Any

from minprefix.checks import check_choice
from minprefix.data.examples import LINEARISATIONS, Example, Skipped, in_language
from minprefix.data.formats import (
    read_csv,
    read_json,
    read_jsonl,
    read_line_pairs,
    read_parquet,
    read_txt,
)
from minprefix.data.rows import merge_equal_sources
from minprefix.data.triples import read_xml
from minprefix.files import names_file

# What a folder may hold: E2E [3] and its cleaned form [7], WebNLG 2017 and 2020 [4], the text files
# of [2], DART [5], parquet in the hub's layout [6], JSON lines, JSON, CSV. Among patterns joined by
# "or", the first that matches is used; files with texts come before files with inputs alone.
SPLIT_FILES = {
    "train": (
        "trainset.csv", "train-fixed.no-ol.csv or train-fixed.csv", "train/*triples/*.xml",
        "*webnlg*_train.json", "src1_train.txt", "train.source",
        "dart-*-train.json or dart-*-train.xml",
        "default/train/*.parquet or train/*.parquet or data/train-*.parquet or train-*.parquet",
        "train.jsonl", "train.json", "train.csv",
    ),
    "dev": (
        "devset.csv", "devel-fixed.no-ol.csv or devel-fixed.csv", "dev/*triples/*.xml",
        "*webnlg*_dev.json", "src1_valid.txt", "val.source",
        "dart-*-dev.json or dart-*-dev.xml",
        "default/validation/*.parquet or validation/*.parquet or data/validation-*.parquet "
        "or validation-*.parquet",
        "dev.jsonl or validation.jsonl", "dev.json or validation.json or val.json",
        "dev.csv or validation.csv or val.csv",
    ),
    "test": (
        "testset_w_refs.csv or testset.csv", "test-fixed.csv",
        "test/testdata_with_lex.xml or test/rdf-to-text-generation-test-data-with-refs-*.xml "
        "or test/*triples/*.xml or test/testdata_no_lex.xml "
        "or test/rdf-to-text-generation-test-data-without-refs-*.xml",
        "*webnlg*_test.json", "src1_test.txt", "test.source",
        "dart-*-test.json or dart-*-test.xml",
        "default/test/*.parquet or test/*.parquet or data/test-*.parquet or test-*.parquet",
        "test.jsonl", "test.json", "test.csv",
    ),
}  # fmt: skip
ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED = ("restaurants", "notes")  # folders in it: tables and texts, articles and summaries
DATA_SETS = ("e2e", "webnlg", "dart", "xsum")  # names that `python -m minprefix data` downloads


def data_folder(name: str) -> Path:
    """The folder of a downloaded data set: XDG_CACHE_HOME (~/.cache)/minprefix/data/NAME."""
    check_choice("the data set", name, DATA_SETS)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "minprefix" / "data" / name


ROWS = {".csv": read_csv, ".txt": read_txt, ".source": read_line_pairs, ".jsonl": read_jsonl,
        ".parquet": read_parquet}  # fmt: skip


@names_file
def _read_file(
    path: Path, split: str | None, linearisation: str, skipped: Skipped
) -> list[Example]:
    suffix = path.suffix.lower()
    # [2] trains only on texts that are marked good, but decodes every entry
    only_good = linearisation == "original-code" and split == "train"
    if suffix == ".xml":
        return list(read_xml(path, linearisation, skipped, only_good))
    if suffix == ".json":
        return merge_equal_sources(read_json(path, linearisation, skipped, only_good))
    if suffix in ROWS:
        return merge_equal_sources(ROWS[suffix](path, linearisation, skipped))
    raise ValueError(
        f"{path}: unknown type of file; accepted are .jsonl, .json, .csv and .parquet (rows with "
        "named columns), .xml and .json (WebNLG, DART), .txt (source||target) and .source (with "
        ".target next to it)"
    )


class MissingSplit(ValueError):
    """A folder of data has no file for the split."""


def _find_files(folder: Path, split: str | None) -> list[Path]:
    """The files of one split: exactly one pattern in SPLIT_FILES must match."""
    if split is None:
        raise ValueError(f"{folder} is a folder: give a split, one of {', '.join(SPLIT_FILES)}")
    found = {}
    for patterns in SPLIT_FILES[split]:
        for pattern in patterns.split(" or "):
            if files := sorted(folder.glob(pattern)):
                found[pattern] = files
                break
    if len(found) != 1:
        problem = f"more than one of them: {', '.join(found)}" if found else "none of them"
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (*ROWS, ".json"))
        if others and not found:
            problem += f", but {others[0]}: give a file itself, or rename it"
        *official, lines, rows, table = SPLIT_FILES[split]
        kind = ValueError if found else MissingSplit
        raise kind(
            f"{folder}: for the split {split} a folder has one of {lines}, {rows}, {table}, or of "
            f"the official files {', '.join(official)}; this one has {problem}"
        )
    return next(iter(found.values()))


def load_examples(
    path: str | Path, split: str | None = None, *, linearisation: str = "paper",
    references: bool = True, language: str | None = None,
) -> list[Example]:  # fmt: skip
    """The examples of a data set, of a file or of one split of a folder.

    Rows with the same input become one example with several targets, in order of appearance;
    WebNLG and DART have one example per set of triples, XSum one per article. Rows without an input
    or a text, and empty cells, are left out and counted in one warning.

        linearisation   table (E2E, JSONL)      triples (WebNLG; DART)
        "paper"         name : X | type : pub   Spain : capital : Madrid | Madrid : MAYOR : ...
        "original-code" name : X | Type : pub    | Spain : capital : Madrid | Madrid : MAYOR : ...
                                                Spain : capital : Madrid | Madrid : mayor : ...

    "paper" replaces each run of white space in targets, values and articles (line breaks included)
    by one blank, and strips it at both ends; a source that is given as text is only stripped.
    "original-code" keeps white space, except that a line break in a target, value or article
    becomes a blank. ([2] trains on tokenised E2E texts, its src1_*.txt; the official CSVs hold the
    untokenised ones.)
    WebNLG's texts that are not marked "good" are kept, because [1] mentions no selection;
    "original-code" leaves them out of the training split, as [2] does. Empty texts are ignored.

    Args:
        path: one of DATA_SETS if `python -m minprefix data` has fetched it, one of EMBEDDED, a
            file (.jsonl, .json, .csv, .parquet, .xml, .txt, .source) or a folder with the
            files that SPLIT_FILES lists. (Write ./e2e for a folder with the name of a data set.)
        split: "train", "dev" or "test". A folder needs it; for a single file it matters only for
            the selection of WebNLG's texts.
        linearisation: one of LINEARISATIONS.
        references: leave out inputs without a text; False keeps them, to generate texts for them.
        language: keep the texts in this language, such as "ru"; None = the data has only one.
    Raises:
        ValueError: an unknown kind of file or folder; a broken row, named as file:line; no usable
            row; texts in several languages.
        FileNotFoundError: `path` does not exist, or a data set was not downloaded.
    """
    check_choice("linearisation", linearisation, LINEARISATIONS)
    if split is not None and split not in SPLIT_FILES:
        raise ValueError(f"split must be one of {', '.join(SPLIT_FILES)}, got {split!r}")
    name = str(path) if path in DATA_SETS else ""
    todo = f"run `python -m minprefix data {name}`, or give a folder"
    if name:
        path = data_folder(name)
        if not path.is_dir():
            raise FileNotFoundError(f"{name} is not in {path}: {todo}")
    path = ASSETS / path if str(path) in EMBEDDED else Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    try:
        files = _find_files(path, split) if path.is_dir() else [path]
    except MissingSplit as error:
        if name:  # the command `data` has not fetched all files
            raise MissingSplit(f"no {split} split of {name} is in {path}: {todo}") from error
        raise
    skipped = Skipped()
    read = (
        example for file in files for example in _read_file(file, split, linearisation, skipped)
    )
    if references:
        examples = _with_texts(in_language(read, language, path, skipped), path, skipped)
    else:  # each input once, even if it has texts in several languages
        examples = list({example.where: example for example in read}.values())
    if not examples:
        raise ValueError(
            f"{path}: the file has no examples" + (f"; skipped: {skipped}" if skipped.found else "")
        )
    skipped.report(path)
    return examples


def _with_texts(examples: list[Example], path: Path, skipped: Skipped) -> list[Example]:
    """The examples that have a text; ValueError if none has."""
    found = [example for example in examples if example.targets]
    if examples and not found:
        raise ValueError(
            f"{path}: {len(examples)} inputs without a text (a reference): training and evaluation "
            "need texts; `generate --data` writes one for each input"
        )
    for example in examples:
        if not example.targets:
            skipped.add("inputs without a text", example.where)
    return found


def load_train_and_dev(
    data: str, dev: str | None, linearisation: str = "paper", language: str | None = None
) -> tuple[list[Example], list[Example]]:
    """Both splits of a folder, or a train and a dev file; without dev data, the second is []."""
    how: Any = {"linearisation": linearisation, "language": language}
    train = load_examples(data, "train", **how)
    if data not in (*DATA_SETS, *EMBEDDED) and not Path(data).is_dir():  # a file or a pipe
        return train, load_examples(dev, "dev", **how) if dev else []
    if dev:
        raise ValueError(f"--dev needs a file as --data; {data} has its own dev split")
    try:
        return train, load_examples(data, "dev", **how)
    except MissingSplit:
        if data in DATA_SETS:  # partly fetched
            raise
        return train, []
