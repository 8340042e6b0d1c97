"""Official data sets, fetched by pooch [1] and checked: the command `python -m minprefix data`.

Read `SOURCES`, then `fetch`. Each file has one of three states:

    verified      its sha256 is the one in assets/sha256/, computed here from the file itself
    as published  we never had the file; its sha256 is the one that others published
    unverified    neither; its sha256 is printed, recorded in SHA256SUMS and compared from then on

It is an error if a file differs from its verified sha256, or from the one in SHA256SUMS. A file
gets its name once it is complete and checked. XSum's archive is then converted to JSON lines
(`articles.convert_xsum`): three files instead of one per article.
[1] https://www.fatiando.org/pooch
"""

import hashlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pooch
from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock
from tqdm import tqdm

from minprefix.checks import check_choice
from minprefix.data.articles import ARCHIVE, SPLIT_IDS, SPLIT_NAMES, convert_xsum
from minprefix.data.load import DATA_SETS, data_folder
from minprefix.files import brief, read_text, write_text
from minprefix.limits import PIECE
from minprefix.transfer import download_within_limits

SUMS = Path(__file__).parents[1] / "assets" / "sha256"  # NAME.txt: sha256sum's format
RECORD = "SHA256SUMS"  # in the folder of the data, for `sha256sum -c`
MADE = tuple(f"{split}.jsonl" for split in SPLIT_NAMES)  # of XSum
GITHUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class Source:
    """Where a data set comes from."""

    licence: str
    home: str  # its home page
    base: str  # URL to which a file's name is appended
    urls: dict[str, str] = field(default_factory=dict)  # of files that are elsewhere
    unseen: tuple[str, ...] = ()  # files for which we only have a sha256 that others published

    def url(self, name: str) -> str:
        return self.urls.get(name) or f"{self.base}/{name}"


SOURCES = {
    "e2e": Source(
        "CC BY-SA 4.0",
        "https://github.com/tuetschek/e2e-dataset",
        f"{GITHUB}/tuetschek/e2e-dataset/master",
    ),
    # gitlab.com/shimorina/webnlg-dataset also holds later releases; the paper's authors keep the
    # files of the 2017 challenge that they used.
    "webnlg": Source(
        "CC BY-NC-SA 4.0 (not for commercial use)",
        "https://github.com/XiangLi1999/PrefixTuning/tree/cleaned/data/webnlg_challenge_2017",
        f"{GITHUB}/XiangLi1999/PrefixTuning/6519d30e69b15a180f23e2cd41b766d3f62b8e82/"
        "data/webnlg_challenge_2017",
    ),
    "dart": Source(
        "MIT (texts from E2E and WebNLG: CC BY-SA 4.0 and CC BY-NC-SA 4.0)",
        "https://github.com/Yale-LILY/dart",
        f"{GITHUB}/Yale-LILY/dart/master/data/v1.1.1",
        unseen=("dart-v1.1.1-full-train.json",),
    ),
    # A copy of http://bollin.inf.ed.ac.uk/public/direct/ on the hub, at a revision that has it.
    "xsum": Source(
        "none stated for the BBC's texts (the card of GEM/xsum on the hub says CC BY-SA 4.0)",
        "https://github.com/EdinburghNLP/XSum",
        f"{constants.ENDPOINT}/datasets/EdinburghNLP/xsum/resolve/"
        "0f3ea2f2b55fcb11e71fb1e3aec6822e44ddcb0f/data",
        urls={SPLIT_IDS: f"{GITHUB}/EdinburghNLP/XSum/master/XSum-Dataset/{SPLIT_IDS}"},
        unseen=(ARCHIVE, SPLIT_IDS),
    ),
}


def read_sums(path: Path) -> dict[str, str]:
    """File name -> sha256, from a file in sha256sum's format; skips lines that begin with #."""
    sums = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line and not line.startswith("#"):
            digest, _, name = line.partition("  ")
            if len(digest) != 64 or not name:
                raise ValueError(
                    f"{path}:{number}: expected a sha256 and a name, got {brief(line)}"
                )
            sums[name] = digest
    return sums


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(url: str, path: Path, known: str | None, published: str | None, silent: bool) -> None:
    """Fetch a file. It gets its name only if it is complete and has the sha256 `known`, if that is
    given; otherwise nothing of it remains."""
    fetch_to = pooch.HTTPDownloader(progressbar=not silent, chunk_size=PIECE)

    def with_unix_ends(url: str, temporary: str, _) -> None:
        with open(temporary, "w+b") as file:
            download_within_limits(lambda target: fetch_to(url, target, None), file, path.name)
        if published:
            _make_unix_ends(Path(temporary), published)

    pooch.get_logger().setLevel("WARNING")  # it tells of each file
    sha = known and f"sha256:{known}"
    try:
        pooch.retrieve(url, sha, path.name, path.parent, downloader=with_unix_ends)
    except OSError as error:  # includes errors of the network
        answer = getattr(error, "response", None)
        reason = type(error).__name__ if answer is None else f"status {answer.status_code}"
        reason = str(error) if type(error) is OSError else reason
        raise OSError(
            f"{url} cannot be downloaded ({error.strerror or reason}); run again, or put a copy at "
            f"{path}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{url}: not the official file: {error}") from error


def _state(name: str, digest: str, source: Source, known: str | None, recorded: str | None) -> str:
    """The state of a file, see the header; ValueError if it is not the official file."""
    if known == digest:
        return "as published" if name in source.unseen else "verified"
    if known and name not in source.unseen:
        raise ValueError(f"not the official file: sha256 {digest}, expected {known}")
    if recorded and recorded != digest:
        raise ValueError(
            f"changed since it was downloaded: sha256 {digest}, {RECORD} has {recorded}"
        )
    return "unverified" + (f" (published was {known})" if known else "")


def _make_unix_ends(path: Path, known: str) -> None:
    """Replace each \\r\\n by \\n if the file then has the sha256 `known`.

    DART's repository changed its files to Windows line ends (commit 34b3c872, May 2021) after
    others had published their sha256. For the dev file, the rest was found to be equal.
    """
    data = path.read_bytes()
    unix = data.replace(b"\r\n", b"\n")
    if unix != data and hashlib.sha256(unix).hexdigest() == known:
        path.write_bytes(unix)


def _check_or_fetch(
    name: str, folder: Path, source: Source, known: str | None, recorded: str | None, silent: bool
) -> tuple[str, str]:
    """One official file: (sha256, state)."""
    path = folder / name
    if not path.is_file():
        must = None if name in source.unseen else known
        _download(source.url(name), path, must, known, silent)
        recorded = None
    digest = sha256(path)
    try:
        return digest, _state(name, digest, source, known, recorded)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; remove it to download it again") from None


def _is_made(folder: Path, recorded: dict[str, str]) -> bool:
    """Whether XSum's JSON lines exist and are recorded."""
    return all((folder / name).is_file() and name in recorded for name in MADE)


def _make(folder: Path, recorded: dict[str, str]) -> dict[str, str]:
    """File name -> sha256 of XSum's JSON lines; makes them from the archive if one is missing."""
    if not _is_made(folder, recorded):
        print(f"{folder / ARCHIVE} -> {', '.join(MADE)}", file=sys.stderr)
        convert_xsum(folder / ARCHIVE, folder / SPLIT_IDS, folder)
        return {name: sha256(folder / name) for name in MADE}
    sums = {name: sha256(folder / name) for name in MADE}
    for name in MADE:
        if sums[name] != recorded[name]:
            raise ValueError(
                f"{folder / name}: changed since it was made: sha256 {sums[name]}, {RECORD} has "
                f"{recorded[name]}; remove it to make it again"
            )
    return sums


def _hub_files(name: str, folder: Path) -> list[str]:
    """XSum's files in the hub's format, if a user has put them there; their sha256 is unknown."""
    files = sorted(folder.rglob("*.parquet")) if name == "xsum" else []
    return [file.relative_to(folder).as_posix() for file in files]


def _missing(name: str, folder: Path, recorded: dict[str, str]) -> list[str]:
    """The files that must be fetched or made."""
    if name == "xsum":
        if _is_made(folder, recorded) or _hub_files(name, folder):  # needs no archive
            return []
        return [*SOURCES[name].unseen, *MADE]
    return [file for file in read_sums(SUMS / f"{name}.txt") if not (folder / file).is_file()]


def fetch(name: str, folder: str | Path | None = None) -> list[dict]:
    """Check every file of a data set in `folder`, and fetch those that are missing.

    If no file is missing, nothing is written except the sha256 of unverified files.

    Args:
        name: one of DATA_SETS.
        folder: None means `data.data_folder`.
    Returns:
        for each file a dict with file, bytes, sha256 and state.
    Raises:
        ValueError: a file differs from what is expected.
        OSError: a file cannot be fetched or written.
    """
    check_choice("the data set", name, DATA_SETS)
    folder = Path(folder or data_folder(name))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: not a folder")
    record = folder / RECORD
    missing = _missing(name, folder, read_sums(record) if record.is_file() else {})
    if not missing:
        return _fetch(name, folder)
    if folder.exists() and not _is_writable(folder):
        raise OSError(f"{folder}: {missing[0]} is missing, and the folder is read-only")
    folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder / ".lock"):  # a second process waits and uses what the first fetched
        return _fetch(name, folder)


def _is_writable(folder: Path) -> bool:
    """Whether the folder's mode allows writing; root could ignore the mode, but should not."""
    return bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)


def _fetch(name: str, folder: Path) -> list[dict]:
    """The work of `fetch`."""
    source, record = SOURCES[name], folder / RECORD
    recorded = read_sums(record) if record.is_file() else {}
    hub, sums, states = _hub_files(name, folder), {}, {}
    known = dict.fromkeys(hub) or read_sums(SUMS / f"{name}.txt")
    made, many = name == "xsum" and _is_made(folder, recorded), len(known) > 9
    try:
        for file in tqdm(known, desc=name, unit="file", disable=not many, delay=1):
            if (folder / file).is_file() or not made:
                sums[file], states[file] = _check_or_fetch(
                    file, folder, source, known[file], recorded.get(file), many
                )
        if name == "xsum" and not hub:
            for file, digest in _make(folder, recorded).items():
                sums[file], states[file] = digest, f"made from {ARCHIVE}"
    finally:  # record the finished files, even if the next one fails
        new = recorded | {file: sums[file] for file in states if states[file] != "verified"}
        if new != recorded and _is_writable(folder):
            lines = (f"{digest}  {file}\n" for file, digest in sorted(new.items()))
            write_text(record, "".join(lines))
    sizes = {file: (folder / file).stat().st_size for file in states}
    return [
        {"file": file, "bytes": sizes[file], "sha256": sums[file], "state": states[file]}
        for file in states
    ]
