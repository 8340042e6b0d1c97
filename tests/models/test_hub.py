"""Downloads by the real huggingface_hub client from a small server on 127.0.0.1 that answers as the
hub does: HEAD and GET, commits, etags, redirects of large files to another host, byte ranges."""

import hashlib
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_gpt2
from huggingface_hub import constants, scan_cache_dir
from test_weights import TINY, official_names, write_weights

from minprefix.models.tokenizer import Tokenizer
from minprefix.models.weights import ASSETS, fetch, load, save_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tiny"


class Hub(ThreadingHTTPServer):
    """Serves one model, `someone/tiny`, from a dict of files; can be told to fail."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.commit = files, COMMIT
        self.etags = {}  # name: etag, instead of the sha256 or git hash of what it should be
        self.broken = {}  # name: the bytes that are sent in place of the file
        self.stop_after = None  # bytes after which the next large answer ends, once
        self.stalls = False  # ... and whether the connection then stays open
        self.refuses = None  # (status, X-Error-Code) of every answer
        self.seen = []  # (method, file name, Range)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def etag(self, name: str) -> str:
        data = self.files[name]
        if name in self.etags:
            return self.etags[name]
        if is_large(name):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def gets(self, name: str) -> list[str | None]:
        return [at for method, seen, at in self.seen if (method, seen) == ("GET", name)]


def is_large(name: str) -> bool:
    """Whether the hub keeps the file in LFS, on another host, under its sha256."""
    return name.endswith((".safetensors", ".bin"))


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def start(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def do_HEAD(self):
        hub = self.server
        match = re.fullmatch(rf"/{NAME}/resolve/(main|{hub.commit})/(.+)", self.path)
        if hub.refuses or not match or match[2] not in hub.files:
            missing = "EntryNotFound" if match else "RepoNotFound"
            status, code = hub.refuses or (404, missing)
            return self.start(status, {"X-Error-Code": code, "Content-Length": "0"})
        name, headers = match[2], {"X-Repo-Commit": hub.commit}
        hub.seen.append((self.command, name, self.headers.get("Range")))
        size = str(len(hub.files[name]))
        if not is_large(name):
            headers |= {"ETag": f'"{hub.etag(name)}"', "Content-Length": size}
            self.start(200, headers)
            return self.command == "GET" and self.wfile.write(hub.files[name])
        headers |= {"X-Linked-Etag": f'"{hub.etag(name)}"', "X-Linked-Size": size}
        # another host name, as the hub's store has: the client does not follow it for the headers
        store = f"http://localhost:{hub.server_port}/store/{name}"
        self.start(302, headers | {"Location": store, "Content-Length": "0"})

    def do_GET(self):
        if not self.path.startswith("/store/"):
            return self.do_HEAD()
        hub, name = self.server, self.path.removeprefix("/store/")
        data = hub.broken.get(name, hub.files[name])
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if start >= len(data):
            return self.start(416, {"Content-Length": "0"})
        headers = {"Content-Length": str(len(data) - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.start(206 if start else 200, headers)
        if hub.stop_after is None:
            return self.wfile.write(data[start:])
        self.wfile.write(data[start : start + hub.stop_after])
        self.wfile.flush()
        hub.stop_after, stalls = None, hub.stalls
        while stalls and hub.stalls:
            time.sleep(0.05)
        self.close_connection = True


@pytest.fixture(scope="module")
def model():
    return tiny_gpt2(seed=1, dtype=torch.float32, bos_token_id=8191, eos_token_id=8191, **TINY)


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """What the hub has: a complete checkpoint."""
    save_model(model, Tokenizer.from_folder(ASSETS / "mini"), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def serve(folder, tmp_path, monkeypatch):
    """Starts a hub with the files of `folder`; the client in this process uses it."""
    started = []

    def start() -> Hub:
        hub = Hub({path.name: path.read_bytes() for path in folder.iterdir()})
        started.append(hub)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # bytes; else 10 MB
        no_wait = SimpleNamespace(sleep=lambda seconds: None)  # between the client's attempts
        monkeypatch.setattr("huggingface_hub.file_download.time", no_wait)
        return hub

    yield start
    for hub in started:
        hub.stalls = False
        hub.shutdown()
        hub.server_close()


def stop(hub: Hub) -> None:
    hub.shutdown()
    hub.server_close()


def cached(tmp_path: Path, pattern: str) -> list[Path]:
    return sorted((tmp_path / "cache" / "models--someone--tiny").glob(pattern))


def error_of(kind=ValueError) -> str:
    with pytest.raises(kind) as caught:
        fetch(NAME)
    message = str(caught.value)
    assert NAME in message and "\n" not in message
    return message


@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("layout", ["safetensors", "safetensors shards", "bin", "bin shards"])
def test_every_layout_is_downloaded_and_loaded(folder, model, serve, tmp_path, layout, prefixed):
    (folder / "model.safetensors").unlink()
    tensors = official_names(model) if prefixed else model.state_dict()
    write_weights(folder, tensors, layout)
    (folder / "tf_model.h5").write_bytes(b"not wanted")
    hub = serve()
    loaded, tokenizer = load(NAME)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert tokenizer.vocab_size == 8192
    names = {path.name for path in folder.iterdir()} - {"tf_model.h5"}
    assert {path.name for path in cached(tmp_path, f"snapshots/{COMMIT}/*")} == names
    assert scan_cache_dir(tmp_path / "cache").warnings == []

    hub.seen.clear()
    fetch(NAME)
    assert not [seen for seen in hub.seen if seen[0] == "GET"]


def test_all_forms_of_a_tokenizer_and_the_settings_are_downloaded(folder, serve, tmp_path):
    """tokenizer.json instead of vocab.json and merges.txt; also generation_config.json."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "new")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tmp_path / "new" / name).read_bytes())
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    hub = serve()
    loaded, tokenizer = load(NAME)
    assert loaded.config.eos_ids == (5, 6) and tokenizer.vocab_size == 8192
    stop(hub)
    assert load(NAME)[0].config == loaded.config  # from the cache, which is whole


def test_a_prefix_of_the_hub_is_converted(folder, model, serve, tmp_path, capsys):
    """SOURCE of the command convert: a folder of PEFT, or ours, by its name there."""
    from minprefix.prefix.convert import convert
    from minprefix.prefix.peft import write_peft
    from minprefix.prefix.prefix import Prefix

    for path in list(folder.iterdir()):
        path.unlink()
    prefix = Prefix.random(model.config, 4, 0)
    write_peft(folder, prefix)
    hub = serve()
    convert(NAME, "minprefix", tmp_path / "a.safetensors")
    again = Prefix.load(tmp_path / "a.safetensors")
    assert torch.equal(again.prefix_table, prefix.prefix_table)
    hub.files = {"prefix.safetensors": (tmp_path / "a.safetensors").read_bytes()}
    hub.commit = COMMIT[::-1]
    convert(NAME, "minprefix", tmp_path / "b.safetensors")
    again = Prefix.load(tmp_path / "b.safetensors")
    assert torch.equal(again.prefix_table, prefix.prefix_table)
    hub.files = {"README.md": b"no prefix"}
    with pytest.raises(ValueError, match="has no adapter_config.json or"):
        convert(NAME, "minprefix", tmp_path / "c.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        convert("no/such.safetensors", "minprefix", tmp_path / "c.safetensors")


def test_safetensors_go_before_bin(folder, model, serve):
    write_weights(folder, model.state_dict(), "bin")
    hub = serve()
    fetch(NAME)
    assert len(hub.gets("model.safetensors")) == 1
    assert not hub.gets("pytorch_model.bin")


def test_a_new_version_is_downloaded(model, serve, tmp_path):
    hub = serve()
    old = fetch(NAME)
    hub.commit = COMMIT[::-1]
    hub.files["README.md"] = b"changed"
    new = fetch(NAME)
    assert new != old and new.name == hub.commit
    assert len(hub.gets("model.safetensors")) == 1  # the same file in both versions


def test_a_flipped_bit_is_detected(serve, tmp_path):
    hub = serve()
    data = bytearray(hub.files["model.safetensors"])
    data[-1000] ^= 4
    hub.broken["model.safetensors"] = bytes(data)
    assert re.search("model.safetensors is damaged .sha256 .* removed", error_of())
    assert not cached(tmp_path, "snapshots/*/model.safetensors")
    assert not cached(tmp_path, ".minprefix/*.partial")
    hub.broken.clear()
    assert load(NAME)


def test_a_file_that_others_damaged_in_the_cache_is_detected(serve, tmp_path):
    hub = serve()
    blob = fetch(NAME) / "model.safetensors"
    data = bytearray(blob.read_bytes())
    data[-1000] ^= 4
    blob.resolve().write_bytes(bytes(data))
    os.utime(blob, ns=(0, 0))
    assert "model.safetensors is damaged" in error_of()
    fetch(NAME)
    assert blob.read_bytes() == hub.files["model.safetensors"]


def test_a_hash_is_computed_once(serve, monkeypatch):
    serve()
    fetch(NAME)
    monkeypatch.setattr("minprefix.models.hub.hashlib.file_digest", None)  # calling it would fail
    fetch(NAME)


def test_a_whole_cache_may_be_read_only(serve, tmp_path, monkeypatch):
    serve()
    folder = fetch(NAME)
    for record in cached(tmp_path, ".minprefix/*.verified"):
        record.unlink()
    (main,) = cached(tmp_path, "refs/main")
    main.write_text("an older version")

    def refuse(path, text):
        raise OSError("Read-only file system")

    monkeypatch.setattr("minprefix.models.hub.write_text", refuse)
    assert fetch(NAME) == folder


def test_a_file_without_sha256_is_said_to_be_unverified(serve, caplog):
    hub = serve()
    data = bytearray(hub.files["model.safetensors"])
    data[-1000] ^= 4
    hub.broken["model.safetensors"] = bytes(data)
    hub.etags["model.safetensors"] = "abc-123"
    assert (fetch(NAME) / "model.safetensors").read_bytes() == bytes(data)
    assert [record.getMessage() for record in caplog.records] == [
        f"{NAME}: model.safetensors: the hub gives no sha256 of it, so only its size was checked"
    ]


def test_a_truncated_file_is_refused(serve, tmp_path):
    hub = serve()
    hub.broken["model.safetensors"] = hub.files["model.safetensors"][:-100]
    assert re.search("downloading model.safetensors .* size", error_of(OSError))
    assert not cached(tmp_path, "snapshots/*/model.safetensors")
    assert "answered 416" in error_of(OSError)  # nothing lies after the partial file
    assert not cached(tmp_path, ".minprefix/*.partial")
    hub.broken.clear()
    assert load(NAME)


def test_a_dropped_connection_is_resumed(serve):
    hub = serve()
    hub.stop_after = 100_000
    folder = fetch(NAME)
    assert hub.gets("model.safetensors") == [None, "bytes=100000-"]
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


def test_a_download_that_failed_is_resumed_by_the_next(serve, tmp_path, monkeypatch):
    hub = serve()

    def interrupt(seconds):
        raise KeyboardInterrupt

    hub.stop_after = 100_000
    with monkeypatch.context() as context:
        context.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=interrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch(NAME)
    assert [path.stat().st_size for path in cached(tmp_path, ".minprefix/*.partial")] == [100_000]
    folder = fetch(NAME)
    assert hub.gets("model.safetensors") == [None, "bytes=100000-"]
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert not cached(tmp_path, ".minprefix/*.partial")


def test_offline_takes_a_whole_cache_only(serve, tmp_path, monkeypatch):
    hub = serve()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cache = str(tmp_path / "cache")
    message = (
        f"{NAME}: offline, and not complete in {cache} (unset HF_HUB_OFFLINE or give a folder)"
    )
    assert error_of(OSError) == message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = fetch(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.seen.clear()
    assert fetch(NAME) == folder and load(NAME)
    assert not hub.seen
    (folder / "merges.txt").unlink()
    assert error_of(OSError) == message


def test_without_a_server_the_cache_is_used(serve):
    hub = serve()
    folder = fetch(NAME)
    stop(hub)
    assert fetch(NAME) == folder


def test_without_a_server_and_cache_the_error_says_what_to_do(serve):
    hub = serve()
    stop(hub)
    begin = f"{NAME}: no folder of this name, and requesting config.json from {hub.url}: "
    assert error_of(OSError).startswith(begin)
    assert "check the network" in error_of(OSError)


def test_a_name_that_the_hub_does_not_have(serve):
    hub = serve()
    with pytest.raises(ValueError) as caught:
        fetch("someone/else")
    assert str(caught.value) == (
        f"someone/else: neither a folder here nor a model on {hub.url} "
        "(check the name; a private model needs `hf auth login`)"
    )


@pytest.mark.parametrize(
    "status, code, kind, message",
    [
        (401, "RepoNotFound", ValueError, "neither a folder here nor a model"),
        (403, "GatedRepo", OSError, "access is restricted: accept its terms at"),
        (503, "", OSError, "answered 503"),
    ],
)
def test_refusals_of_the_hub_are_one_line(serve, status, code, kind, message):
    hub = serve()
    hub.refuses = (status, code)
    assert message in error_of(kind)


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "merges.txt", "model.safetensors"])
def test_a_model_without_a_file_is_refused(serve, name):
    hub = serve()
    del hub.files[name]
    assert f"has no {name}" in error_of()


def test_other_models_are_refused_before_their_weights_are_downloaded(serve):
    hub = serve()
    hub.files["config.json"] = b'{"model_type": "t5"}'
    with pytest.raises(ValueError, match="model_type is 't5'; supported: 'gpt2' or 'bart'"):
        fetch(NAME)
    assert not hub.gets("model.safetensors")


def test_a_bar_is_shown(serve, monkeypatch, capfd):
    monkeypatch.setenv("TQDM_POSITION", "-1")  # the client's bars, also without a terminal
    serve()
    fetch(NAME)
    assert re.search("model.safetensors: 100%", capfd.readouterr().err)


PROCESS = """
import sys
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 10_000
from minprefix.models.weights import fetch
print(fetch(sys.argv[1]))
"""


@pytest.mark.slow  # three processes
def test_the_environment_is_respected_and_a_killed_download_resumed(serve, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, each process with its own client."""
    hub = serve()
    home, partial = tmp_path / "home", "hub/*/.minprefix/*.partial"

    def process(**environment):
        return subprocess.Popen(
            [sys.executable, "-c", PROCESS, NAME],
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), **environment},
            cwd=Path(__file__).resolve().parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    hub.stop_after, hub.stalls = 200_000, True
    first, size, deadline = process(), 0, time.monotonic() + 30
    while not size:  # until a part of the weights is on the disk
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()
        time.sleep(0.02)
        if hub.gets("model.safetensors"):
            size = sum(path.stat().st_size for path in home.glob(partial))
    first.kill()
    first.communicate()
    hub.stalls = False
    size = sum(path.stat().st_size for path in home.glob(partial))

    out, err = process().communicate(timeout=60)
    assert hub.gets("model.safetensors") == [None, f"bytes={size}-"]
    data = (Path(out.strip()) / "model.safetensors").read_bytes()
    assert data == hub.files["model.safetensors"], err

    stop(hub)
    again, err = process(HF_HUB_OFFLINE="1").communicate(timeout=60)
    assert again == out, err
