"""Articles and summaries: examples from XSum [1], in the hub's format or in the authors' archive.

Read `article` (one row), then `convert_xsum` (the authors' archive: one small text file per
article, with its URL). The splits for extrapolation need a topic, which comes from the URL
(`bbc_topic`). The archive has URLs; the hub's files [2] do not.

An article is one example with one summary. It is never cut here, because a limit of 512 BPE tokens
depends on the tokeniser: `batches.encode_prompt` cuts it if max_source is given.
[1] https://github.com/EdinburghNLP/XSum   [2] https://huggingface.co/datasets/EdinburghNLP/xsum
"""

import json
import re
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from minprefix.data.examples import Example, normalise_space, text_of
from minprefix.files import atomic_write, decode_text, read_json, reading
from minprefix.limits import DATA, LINE, check_unpacked

# Lines of the BBC's pages that are not part of the article; the hub's version omits them too.
PAGE_LINES = {
    "Share this with", "Email", "Facebook", "Messenger", "Twitter", "Pinterest", "WhatsApp",
    "Linkedin", "LinkedIn", "Copy this link",
    "These are external links and will open in a new window",
}  # fmt: skip

SPLIT_IDS = "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json"  # {split: ids of its articles}
SPLIT_NAMES = {"train": "train", "dev": "validation", "test": "test"}  # ours: theirs
ARCHIVE = "XSUM-EMNLP18-Summary-Data-Original.tar.gz"
SECTIONS = ("URL", "FIRST-SENTENCE", "RESTBODY")  # what is used of a file; its TITLE is not


def bbc_topic(url: str) -> str:
    """Section and topic of an article of the BBC: "news/world", "sport/football"; "" if unknown.

    The topic is the path without the article's number: /news/health-30216408 is news/health.
    Regions count as world or uk: /news/world-asia-india-32143053 is news/world. This is our choice:
    appendix A.1 of the prefix-tuning paper names the topics {world, UK, business} but no rule.
    """
    found = re.search(r"bbc\.(?:co\.uk|com)(?::\d+)?/([a-z]+)/(?:0/)?([^?#]*)", url)
    if found is None:
        return ""
    section, path = found.groups()
    topic = re.sub(r"-?\d+(\.stm)?$", "", path.split("/")[0])
    family = re.match(r"world|uk", topic) if section == "news" else None
    return f"{section}/{family[0] if family else topic}".removesuffix("/")


def article(
    document: object, summaries: tuple[str, ...], row: dict, linearisation: str, where: str,
    language: str = "",
) -> Example:  # fmt: skip
    """The example of a row with an article. The columns url, topic and id are optional.

    Without a topic, the topic of the URL is used. A document may be empty: some articles consist of
    a picture.
    """
    text = text_of(document, "the document", where) or ""
    url, topic = (text_of(row.get(name), name, where) or "" for name in ("url", "topic"))
    number = str(row.get("id") or where)
    source = normalise_space(text, linearisation)
    return Example(source, summaries, None, where, topic or bbc_topic(url), number, language)


def _parse_summary(text: str, where: str) -> dict[str, str]:
    """One file of the archive; each of its sections begins with a line such as [SN]URL[SN]."""
    parts = re.split(r"^\[SN\]([A-Z-]+)\[SN\]\s*$", text, flags=re.MULTILINE)[1:]
    found = dict(zip(parts[::2], parts[1::2], strict=True))
    if not set(SECTIONS) <= set(found):
        raise ValueError(f"{where}: needs the sections {', '.join(SECTIONS)}, has {[*found]}")
    url, summary, document = (
        "\n".join(
            line for line in found[name].split("\n") if line.strip() and line not in PAGE_LINES
        ).strip()
        for name in SECTIONS
    )
    return {"document": document, "summary": summary, "url": url}


def _split_ids(path: Path) -> dict[str, list[str]]:
    """The ids of each split, from the authors' file, under our names of the splits."""
    ids = read_json(path)
    for name in SPLIT_NAMES.values():
        listed = ids.get(name)
        if not isinstance(listed, list) or not all(isinstance(i, str) for i in listed):
            raise ValueError(f"{path}: expected a list of ids under {name!r}")
    return {ours: ids[theirs] for ours, theirs in SPLIT_NAMES.items()}


def convert_xsum(archive: Path, split_ids: Path, folder: Path) -> list[Path]:
    """Write train.jsonl, dev.jsonl and test.jsonl to `folder`, from the authors' archive.

    Rows have the keys document, summary, url and id, in the order of the split's ids, which is the
    hub's order. The archive has another order, so its articles go through a temporary file, and
    only their offsets are held in memory.

    Raises:
        ValueError: the archive is broken, or lacks an article that a split names.
    """
    splits = _split_ids(split_ids)
    wanted = {i for ids in splits.values() for i in ids}
    places = {}  # id: (begin, length) in the temporary file, bytes
    with reading(archive), tempfile.TemporaryFile(dir=folder) as rows:
        try:
            with tarfile.open(archive, "r|gz") as tar:
                for member in tar:
                    check_unpacked(archive, member.offset_data + member.size)
                    number = Path(member.name).name.removesuffix(".summary")
                    if not member.isfile() or number not in wanted:
                        continue
                    where = f"{archive}:{member.name}"
                    LINE.check(member.size, where)
                    DATA.check(rows.tell(), archive)
                    file: Any = tar.extractfile(member)
                    row = _parse_summary(decode_text(file.read(), where), where)
                    line = json.dumps(row | {"id": number}, ensure_ascii=False).encode() + b"\n"
                    places[number] = rows.tell(), len(line)
                    rows.write(line)
        except tarfile.TarError as error:
            raise ValueError(f"{archive}: broken archive ({error})") from error
        if missing := sorted(wanted - set(places)):
            raise ValueError(
                f"{archive}: {len(missing)} articles missing, such as {missing[0][:60]}"
            )
        made = []
        for split, ids in splits.items():
            made.append(folder / f"{split}.jsonl")
            with atomic_write(made[-1]) as temporary, temporary.open("wb") as file:
                for number in ids:
                    begin, length = places[number]
                    rows.seek(begin)
                    file.write(rows.read(length))
    return made
