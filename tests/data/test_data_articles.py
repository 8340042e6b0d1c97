"""Articles: topics of URLs, the hub's rows and files, the authors' archive."""

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

from minprefix.data.articles import SPLIT_IDS, bbc_topic, convert_xsum
from minprefix.data.examples import Example
from minprefix.data.load import load_examples

WAYBACK = "http://web.archive.org/web/20160101224007/http://www.bbc."


def summary_file(
    number: str, section: str = "news", body: str = "First line.\n\nEmail\nE-mails."
) -> str:
    return (
        f"[SN]URL[SN]\n{WAYBACK}co.uk/{section}/{number}\n\n[SN]TITLE[SN]\nA title\n\n"
        f"[SN]FIRST-SENTENCE[SN]\nA boat ({number}).\n\n[SN]RESTBODY[SN]\n{body}\n"
    )


def archive(folder: Path, files: dict[str, str | bytes]) -> Path:
    path = folder / "xsum.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(f"bbc-summary-data/{name}.summary")
            content = text if isinstance(text, bytes) else text.encode()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def ids(folder: Path, **splits) -> Path:
    path = folder / SPLIT_IDS
    path.write_text(json.dumps({"train": [], "validation": [], "test": []} | splits))
    return path


@pytest.mark.parametrize(
    "end,topic",
    [
        ("co.uk/news/world-asia-india-32143053", "news/world"),
        ("co.uk/news/uk-wales-south-east-wales-33002541", "news/uk"),
        ("com/news/uk-30891145", "news/uk"),
        ("co.uk/news/business-33261110", "news/business"),
        ("co.uk/news/entertainment-arts-29604402", "news/entertainment-arts"),
        ("co.uk/news/10138849", "news"),
        ("com:80/sport/football/37543139", "sport/football"),
        ("co.uk/sport/0/rugby-union/22021705", "sport/rugby-union"),
        ("co.uk/newsround/40062271", "newsround"),
    ],
)
def test_the_topic_stands_in_the_url(end, topic):
    assert bbc_topic(WAYBACK + end) == topic


def test_other_urls_have_no_topic():
    assert bbc_topic("") == bbc_topic("http://somelink") == bbc_topic(WAYBACK + "co.uk/") == ""


def test_rows_stay_apart_and_are_never_cut(tmp_path):
    long = "word " * 5000
    rows = [{"document": long + "\nend", "summary": "One  line.", "id": i} for i in (7, "8")]
    rows.append({"document": "", "summary": "A picture."})
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second, picture = load_examples(path)
    assert first.source == (long + "end").strip() and first.targets == ("One line.",)
    assert (first.id, second.id, second.source) == ("7", "8", first.source)
    assert (picture.source, picture.id, picture.group) == ("", f"{path}:3", "")
    exact = load_examples(path, linearisation="original-code")[0]
    assert (exact.source, exact.targets) == (long + " end", ("One  line.",))


def test_archive_becomes_json_lines_in_the_order_of_the_splits(tmp_path):
    files = {n: summary_file(n) for n in ("11", "12", "13", "99")}
    files["12"] = summary_file("12", "sport/football")
    split_ids = ids(tmp_path, train=["13", "11"], validation=["12"], test=["11"])
    made = convert_xsum(archive(tmp_path, files), split_ids, tmp_path)
    assert [path.name for path in made] == ["train.jsonl", "dev.jsonl", "test.jsonl"]
    train = load_examples(tmp_path, "train", linearisation="original-code")
    assert [example.id for example in train] == ["13", "11"]
    # the line "Email" is the page's, not the article's; blank lines go, too
    expected = Example(
        "First line. E-mails.", ("A boat (13).",), None, f"{made[0]}:1", "news", "13"
    )
    assert train[0] == expected
    assert json.loads(made[0].read_text().splitlines()[0])["document"] == "First line.\nE-mails."
    assert load_examples(tmp_path, "dev")[0].group == "sport/football"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["xsum.tar.gz", SPLIT_IDS, "train.jsonl", "dev.jsonl", "test.jsonl"]
    )


@pytest.mark.parametrize(
    "files,message",
    [
        ({"11": summary_file("11")}, r"xsum.tar.gz: 1 articles missing, such as 12"),
        ({"12": "[SN]URL[SN]\nx\n"}, r"12.summary: needs the sections .* has \['URL'\]"),
        ({"12": b"\xff"}, "xsum.tar.gz:.*12.summary:1: invalid UTF-8 .*0xff"),
    ],
)
def test_broken_archives_leave_nothing(tmp_path, files, message):
    path = archive(tmp_path, files)
    split_ids = ids(tmp_path, train=["12"])
    with pytest.raises(ValueError, match=message):
        convert_xsum(path, split_ids, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_cut_archives_and_other_files_are_refused(tmp_path):
    path = archive(tmp_path, {"12": summary_file("12", body="\n".join(map(str, range(9999))))})
    split_ids = ids(tmp_path, train=["12"])
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"no archive", b"", whole[:40] + b"x" * 40):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="xsum.tar.gz: (broken archive|1 articles missing)"):
            convert_xsum(path, split_ids, tmp_path)
    path.write_bytes(whole)
    split_ids.write_text('{"train": ["12"]}')
    with pytest.raises(ValueError, match="expected a list of ids under 'validation'"):
        convert_xsum(path, split_ids, tmp_path)


PARQUET = [
    "default/train/0000.parquet", "train/0000.parquet", "data/train-00000-of-00001.parquet",
    "train-00000-of-00001.parquet",
]  # fmt: skip


@pytest.mark.parametrize("name", PARQUET)
def test_parquet_of_the_hub(tmp_path, name):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"document": ["a\nb", "a b"], "summary": ["c", "d"], "id": ["1", "2"]}
    parquet.write_table(pyarrow.table(rows), path)
    assert load_examples(tmp_path, "train") == [
        Example("a b", ("c",), None, f"{path}:1", "", "1"),
        Example("a b", ("d",), None, f"{path}:2", "", "2"),
    ]
    parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(ValueError, match=r"needs the columns of one of: .*; has \['text'\]"):
        load_examples(path)
    path.write_bytes(b"PAR1 no parquet")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        load_examples(path)


def test_parquet_without_pyarrow_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="a.parquet: .* needs the package pyarrow .pip install"):
        load_examples(path)
