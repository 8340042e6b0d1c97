"""Official data sets from a small server on 127.0.0.1: downloads, checks, one-line errors."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import SHARED
from test_data import needs_shared
from test_data_articles import archive, ids, summary_file

from minprefix.data import download as download_data
from minprefix.data.articles import ARCHIVE, SPLIT_IDS
from minprefix.data.download import MADE, RECORD, SOURCES, Source, fetch, read_sums, sha256
from minprefix.data.load import DATA_SETS, data_folder, load_examples

E2E = {
    "trainset.csv": b"mr,ref\nname[A],A is a pub.\nname[B],B is a bar.\n",
    "devset.csv": b"mr,ref\nname[C],C is a cafe.\n",
    "testset_w_refs.csv": b"mr,ref\nname[D],D is a den.\n" * 2000,
}


class Site(ThreadingHTTPServer):
    """Serves a dict of files; can be told to break off."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {}
        self.stop_after = None  # bytes of a body after which it breaks off and answers 503
        self.seen = []  # names
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Site

    def log_message(self, *args):
        pass

    def do_GET(self):
        site, name = self.server, self.path.lstrip("/")
        site.seen.append(name)
        body = site.files.get(name, b"")
        self.send_response(503 if site.stop_after == 0 else 200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: site.stop_after])
        if site.stop_after is not None and len(body) > site.stop_after:
            site.stop_after, self.close_connection = 0, True


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A site in the place of the official ones, and a cache of its own."""
    site = Site()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(download_data, "SUMS", tmp_path / "sums")
    yield site
    site.shutdown()
    site.server_close()


@pytest.fixture
def offer(site, tmp_path, monkeypatch):
    """Makes the site the source of a data set whose files are known by sha256."""

    def start(name: str, files: dict[str, bytes], unseen: tuple[str, ...] = ()) -> Site:
        site.files |= files
        monkeypatch.setitem(SOURCES, name, Source("a licence", "a page", site.url, {}, unseen))
        lines = [f"{hashlib.sha256(data).hexdigest()}  {file}" for file, data in files.items()]
        (tmp_path / "sums").mkdir(exist_ok=True)
        (tmp_path / "sums" / f"{name}.txt").write_text("\n".join(["# from a test", *lines]))
        return site

    return start


def states(rows: list[dict]) -> dict[str, str]:
    return {row["file"]: row["state"] for row in rows}


def error_of(kind, *args) -> str:
    with pytest.raises(kind) as caught:
        fetch(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_data_set_is_fetched_once_and_then_checked(offer):
    site = offer("e2e", E2E)
    rows = fetch("e2e")
    assert set(states(rows).values()) == {"verified"}
    assert [row["bytes"] for row in rows] == [len(data) for data in E2E.values()]
    for file, data in E2E.items():
        assert (data_folder("e2e") / file).read_bytes() == data
    # what is known needs no record
    assert sorted(p.name for p in data_folder("e2e").iterdir() if p.name != ".lock") == sorted(E2E)
    assert len(load_examples("e2e", "train")) == 2
    site.seen.clear()
    assert fetch("e2e") == rows and not site.seen
    (data_folder("e2e") / "devset.csv").unlink()
    assert fetch("e2e") == rows and site.seen == ["devset.csv"]


def test_an_interrupted_download_leaves_nothing_and_is_begun_again(offer):
    site = offer("e2e", E2E)
    site.stop_after = 20_000  # of the 46 kB of the test set
    message = error_of(OSError, "e2e")
    path = data_folder("e2e") / "testset_w_refs.csv"
    assert f"{site.url}/{path.name} cannot be downloaded (" in message
    assert message.endswith(f"; run again, or put a copy at {path}")
    names = {p.name for p in path.parent.iterdir()} - {".lock"}
    assert names == {"trainset.csv", "devset.csv"}
    site.stop_after = None
    site.seen.clear()
    assert set(states(fetch("e2e")).values()) == {"verified"} and len(site.seen) == 1


def test_a_download_that_is_not_the_official_file_is_removed(offer):
    site = offer("e2e", E2E)
    site.files["devset.csv"] = b"mr,ref\nname[C],changed\n"
    message = error_of(ValueError, "e2e")
    assert message.startswith(f"{site.url}/devset.csv: not the official file: SHA256 hash of")
    names = {path.name for path in data_folder("e2e").iterdir()} - {".lock"}
    assert names == {"trainset.csv"}
    site.files["devset.csv"] = E2E["devset.csv"]
    assert set(states(fetch("e2e")).values()) == {"verified"}


def test_copies_at_hand_are_checked_and_left_as_they_are(offer, tmp_path):
    site = offer("e2e", E2E)
    folder = tmp_path / "copies"
    folder.mkdir()
    for file, data in E2E.items():
        (folder / file).write_bytes(data)
    assert set(states(fetch("e2e", folder)).values()) == {"verified"}
    assert {path.name for path in folder.iterdir()} == set(E2E) and not site.seen
    (folder / "devset.csv").write_bytes(b"mine")
    message = error_of(ValueError, "e2e", folder)
    assert message.startswith(f"{folder / 'devset.csv'}: not the official file")
    assert message.endswith("remove it to download it again")
    assert (folder / "devset.csv").read_bytes() == b"mine"
    (folder / "devset.csv").unlink()
    folder.chmod(0o555)
    assert error_of(OSError, "e2e", folder).endswith(
        "devset.csv is missing, and the folder is read-only"
    )
    assert {path.name for path in folder.iterdir()} == set(E2E) - {"devset.csv"}
    assert "not a folder" in error_of(ValueError, "e2e", folder / "trainset.csv")


def test_files_that_were_never_seen_are_said_to_be_unverified(offer):
    files = {"a.json": b"[1]", "b.json": b"[2]", "c.xml": b"<a/>"}
    site = offer("dart", files, unseen=("a.json", "b.json"))
    site.files["b.json"] = b"[3]"  # not what was published
    folder, (a, b, c) = data_folder("dart"), fetch("dart")
    published = hashlib.sha256(b"[2]").hexdigest()
    assert (a["state"], c["state"]) == ("as published", "verified")
    assert b["state"] == f"unverified (published was {published})"
    recorded = read_sums(folder / RECORD)
    assert recorded == {"a.json": a["sha256"], "b.json": b["sha256"]}
    assert b["sha256"] == hashlib.sha256(b"[3]").hexdigest()
    assert fetch("dart") == [a, b, c]
    (folder / "b.json").write_bytes(b"[4]")
    message = error_of(ValueError, "dart")
    assert f"b.json: changed since it was downloaded: sha256 {sha256(folder / 'b.json')}" in message


def test_other_line_ends_are_the_same_file(offer):
    """As DART's repository has them now; what is kept has the published sha256."""
    files = {"a.json": b"[\n1\n]\n", "b.json": b"[\n2\n]\n"}
    site = offer("dart", files, unseen=("a.json",))
    site.files |= {name: data.replace(b"\n", b"\r\n") for name, data in files.items()}
    rows = fetch("dart")
    assert states(rows) == {"a.json": "as published", "b.json": "verified"}
    folder = data_folder("dart")
    assert {name: (folder / name).read_bytes() for name in files} == files
    (folder / "b.json").unlink()
    site.files["b.json"] = b"[\r\n3\r\n]\r\n"
    assert "not the official file" in error_of(ValueError, "dart")


def test_xsum_becomes_json_lines(offer, tmp_path):
    files = {n: summary_file(n) for n in ("11", "12", "13")}
    split_ids = ids(tmp_path, train=["12"], validation=["11"], test=["13"])
    contents = {ARCHIVE: archive(tmp_path, files).read_bytes(), SPLIT_IDS: split_ids.read_bytes()}
    site = offer("xsum", contents, unseen=(ARCHIVE, SPLIT_IDS))
    rows = fetch("xsum")
    assert states(rows) == {
        ARCHIVE: "as published", SPLIT_IDS: "as published"
    } | dict.fromkeys(MADE, f"made from {ARCHIVE}")  # fmt: skip
    assert [load_examples("xsum", split)[0].id for split in ("train", "dev", "test")] == [
        "12", "11", "13"
    ]  # fmt: skip
    folder = data_folder("xsum")
    assert read_sums(folder / RECORD) == {row["file"]: row["sha256"] for row in rows}
    site.seen.clear()
    assert fetch("xsum") == rows
    (folder / ARCHIVE).unlink()  # is not needed any more
    assert fetch("xsum") == rows[1:] and not site.seen
    (folder / "dev.jsonl").write_text("changed")
    message = error_of(ValueError, "xsum")
    assert f"{folder / 'dev.jsonl'}: changed since it was made" in message
    (folder / "dev.jsonl").unlink()
    assert fetch("xsum") == rows and site.seen == [ARCHIVE]


def test_xsum_in_the_hubs_format_is_unverified(offer, tmp_path):
    site = offer("xsum", {ARCHIVE: b"", SPLIT_IDS: b""}, unseen=(ARCHIVE, SPLIT_IDS))
    path = tmp_path / "copies/train/0000.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PAR1")
    (row,) = fetch("xsum", tmp_path / "copies")
    assert (row["file"], row["state"]) == ("train/0000.parquet", "unverified") and not site.seen
    assert read_sums(tmp_path / "copies" / RECORD) == {row["file"]: row["sha256"]}
    path.write_bytes(b"PAR2")
    assert "changed since it was downloaded" in error_of(ValueError, "xsum", tmp_path / "copies")


def test_without_a_network_one_line_says_what_to_do(site, offer, cli):
    offer("e2e", E2E)
    site.shutdown()
    site.server_close()
    _, err = cli("data", "e2e", code=1)
    *_, line = err.strip().splitlines()
    path = data_folder("e2e") / "trainset.csv"
    assert line.startswith(f"minprefix: error: {site.url}/trainset.csv cannot be downloaded (")
    assert line.endswith(f"or put a copy at {path}")
    assert len(err.strip().splitlines()) == 3  # the source, the licence, the error
    assert [p.name for p in path.parent.iterdir()] in ([], [".lock"])


def test_what_the_command_prints(offer, cli, tmp_path):
    offer("e2e", E2E)
    out, err = cli("data", "e2e", "--data-dir", tmp_path / "here", "--json")
    result = json.loads(out)
    assert (result["licence"], result["folder"]) == ("a licence", str(tmp_path / "here"))
    assert result["files"] == fetch("e2e", tmp_path / "here")
    assert "licence: a licence" in err
    out, _ = cli("data", "e2e", "--data-dir", tmp_path / "here")
    assert f"folder: {tmp_path / 'here'}" in out
    assert re.findall(r"(\w{64})  verified", out) == [row["sha256"] for row in result["files"]]
    many = {f"train/{n}triples/a.xml": b"<a/>" for n in range(12)}
    offer("webnlg", many)
    out, _ = cli("data", "webnlg")
    assert "12 files, all verified" in out
    _, err = cli("data", "e3e", code=2)
    assert "invalid choice: 'e3e'" in err


def test_names_before_their_download_name_the_command(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, *words in (
        ("e2e", "train", "--out", tmp_path / "run"),
        ("webnlg", "evaluate", "--linearisation", "paper"),
        ("dart", "search", "--out", tmp_path / "found"),
    ):
        _, err = cli(*words, "--data", name, code=1)
        assert f"{name} is not in {data_folder(name)}: run `python -m minprefix data {name}`" in err
        data_folder(name).mkdir(parents=True)  # what a download without a network leaves
        (data_folder(name) / ".lock").touch()
        _, err = cli(*words, "--data", name, code=1)
        split = "test" if words[0] == "evaluate" else "train"
        assert f"no {split} split of {name} is in {data_folder(name)}: run `python -m" in err
        assert f" data {name}`" in err and err.count("\n") == 1


def test_known_sums_name_official_files():
    for name, source in SOURCES.items():
        sums = read_sums(download_data.SUMS / f"{name}.txt")
        assert [x for x in sums.values() if not re.fullmatch(r"[0-9a-f]{64}", x)] == []
        assert set(source.unseen) <= set(sums) and set(source.urls) <= set(sums)
        assert [f for f in sums if not re.match(r"https?://\S+$", source.url(f))] == []
    assert set(SOURCES) == set(DATA_SETS)


@needs_shared
@pytest.mark.parametrize("name,count", [("e2e", 3), ("webnlg", 107), ("dart", 2)])
def test_known_sums_are_those_of_the_data(name, count):
    sums = read_sums(download_data.SUMS / f"{name}.txt")
    folder = SHARED / "data" / name
    here = {file: digest for file, digest in sums.items() if file not in SOURCES[name].unseen}
    assert len(here) == count
    assert {file: sha256(folder / file) for file in here} == here


def test_broken_records_are_refused(offer):
    offer("dart", {"a.json": b"[1]"}, unseen=("a.json",))
    fetch("dart")
    record = data_folder("dart") / RECORD
    Path(record).write_text("nonsense\n")
    assert f"{record}:1: expected a sha256 and a name, got 'nonsense'" in error_of(
        ValueError, "dart"
    )
