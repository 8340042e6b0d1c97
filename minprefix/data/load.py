"""Data: files of tables and texts -> examples. What becomes of them next is in `batches.py`.

Read `load_examples` (which files, which quirks). Two linearisations: "paper" writes a table as
appendix A.1 of [1] prints it; "original-code" keeps the spaces, bars and names that the code of [2]
feeds its model, for comparison with its results. Differs from [2]: nothing is dropped in silence.

The readers are in `formats.py` (tables, texts), `triples.py` (WebNLG, DART) and
`articles.py` (XSum); `splits.py` makes topic splits and small subsets of what they read;
`download.py` fetches the official files.
[1] https://arxiv.org/abs/2101.00190   [2] https://github.com/XiangLi1999/PrefixTuning
[3] https://github.com/tuetschek/e2e-dataset   [4] https://gitlab.com/shimorina/webnlg-dataset
[5] https://github.com/Yale-LILY/dart   [6] https://huggingface.co/datasets/EdinburghNLP/xsum
"""

import os
from pathlib import Path

from minprefix.checks import check_choice
from minprefix.data.articles import read_parquet
from minprefix.data.examples import LINEARISATIONS, Example
from minprefix.data.formats import merge_equal_sources, read_csv, read_jsonl, read_txt
from minprefix.data.triples import read_dart, read_xml

# What a folder may hold: E2E [3], WebNLG 2017 [4], the text files of [2], DART [5], parquet as the
# hub lays it out [6], JSONL. Of patterns joined by "or" the first that matches is taken.
SPLIT_FILES = {
    "train": (
        "trainset.csv", "train/*triples/*.xml", "src1_train.txt",
        "dart-*-train.json or dart-*-train.xml",
        "default/train/*.parquet or train/*.parquet or data/train-*.parquet or train-*.parquet",
        "train.jsonl",
    ),
    "dev": (
        "devset.csv", "dev/*triples/*.xml", "src1_valid.txt",
        "dart-*-dev.json or dart-*-dev.xml",
        "default/validation/*.parquet or validation/*.parquet or data/validation-*.parquet "
        "or validation-*.parquet",
        "dev.jsonl or validation.jsonl",
    ),
    "test": (
        "testset_w_refs.csv", "test/testdata_with_lex.xml", "src1_test.txt",
        "dart-*-test.json or dart-*-test.xml",
        "default/test/*.parquet or test/*.parquet or data/test-*.parquet or test-*.parquet",
        "test.jsonl",
    ),
}  # fmt: skip
ASSETS = Path(__file__).parents[1] / "assets"
EMBEDDED = ("restaurants", "notes")  # folders in it: tables and texts, articles and summaries
DATA_SETS = ("e2e", "webnlg", "dart", "xsum")  # names that `python -m minprefix data` downloads


def data_folder(name: str) -> Path:
    """Where a data set lies that was downloaded: XDG_CACHE_HOME (~/.cache)/minprefix/data/NAME."""
    check_choice("the data set", name, DATA_SETS)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "minprefix" / "data" / name


def _read_file(path: Path, split: str | None, linearisation: str) -> list[Example]:
    suffix = path.suffix.lower()
    if suffix == ".xml":
        # [2] trains on texts marked good only, and decodes every entry.
        only_good = linearisation == "original-code" and split == "train"
        return list(read_xml(path, linearisation, only_good))
    if suffix == ".json":
        return list(read_dart(path, linearisation))
    if suffix == ".parquet":
        return list(read_parquet(path, linearisation))
    if suffix == ".csv":
        return merge_equal_sources(read_csv(path, linearisation))
    if suffix == ".txt":
        return merge_equal_sources(read_txt(path, linearisation))
    if suffix == ".jsonl":
        return merge_equal_sources(read_jsonl(path, linearisation))
    raise ValueError(
        f"{path}: unknown kind of file; accepted are .jsonl, .csv (E2E), .xml (WebNLG, DART), "
        ".json (DART), .parquet (XSum) and .txt (source||target)"
    )


class MissingSplit(ValueError):
    """A folder of data has no file of the split."""


def _find_files(folder: Path, split: str | None) -> list[Path]:
    """The files of one split: those of the only pattern in SPLIT_FILES that the folder matches."""
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
        kind = ValueError if found else MissingSplit
        raise kind(
            f"{folder}: for the split {split} a folder has one of {', '.join(SPLIT_FILES[split])}; "
            f"this one has {problem}"
        )
    return next(iter(found.values()))


def load_examples(
    path: str | Path, split: str | None = None, *, linearisation: str = "paper"
) -> list[Example]:
    """The examples of a data set, of a file or of one split of a folder; no row is dropped.

    Rows with the same input become one example with several targets, in order of appearance;
    WebNLG and DART have one example per set of triples, XSum one per article.

        linearisation   table (E2E, JSONL)      triples (WebNLG; DART)
        "paper"         name : X | type : pub   Spain : capital : Madrid | Madrid : MAYOR : ...
        "original-code" name : X | Type : pub    | Spain : capital : Madrid | Madrid : MAYOR : ...
                                                Spain : capital : Madrid | Madrid : mayor : ...

    White space under "paper": runs of it, line breaks included, become one blank in targets, values
    and articles, and their ends, like those of a source given as text, are stripped.
    "original-code" keeps all of it, but a line break in a target, a value or an article becomes a
    blank. ([2] trains on tokenised E2E texts, its src1_*.txt; the official CSVs hold the
    untokenised ones.)
    Texts of WebNLG that are not marked "good" are kept, as [1] mentions no selection; under
    "original-code" the training split leaves them out, as [2] does. Empty texts are no texts.

    Args:
        path: one of DATA_SETS if `python -m minprefix data` has fetched it, one of EMBEDDED, a
            file (.jsonl, .csv, .xml, .json, .parquet, .txt) or a folder with the
            files that SPLIT_FILES lists. (A folder of such a name: ./e2e.)
        split: "train", "dev" or "test". A folder needs it; of a single file it says what the file
            is, which matters only for the selection above.
        linearisation: one of LINEARISATIONS.
    Raises:
        ValueError: an unknown kind of file or folder, or a broken row, named as file:line.
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
        if name:  # the command `data` has not fetched all of it
            raise MissingSplit(f"no {split} split of {name} is in {path}: {todo}") from error
        raise
    examples = [example for file in files for example in _read_file(file, split, linearisation)]
    if not examples:
        raise ValueError(f"{path}: no example in it")
    return examples


def load_train_and_dev(
    data: str, dev: str | None, linearisation: str = "paper"
) -> tuple[list[Example], list[Example]]:
    """Both splits of a folder; or a train file and, if there is one, a dev file.

    The dev examples are [] where there are none.
    """
    train = load_examples(data, "train", linearisation=linearisation)
    if Path(data).is_file():
        return train, load_examples(dev, "dev", linearisation=linearisation) if dev else []
    if dev:
        raise ValueError(f"--dev goes with a file as --data; {data} has its own dev split")
    try:
        return train, load_examples(data, "dev", linearisation=linearisation)
    except MissingSplit:
        if data in DATA_SETS:  # fetched in part
            raise
        return train, []
