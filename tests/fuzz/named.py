"""Attacks with a name, each of which must be rejected in one line, or read correctly."""

import functools
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from minprefix.data.articles import ARCHIVE
from minprefix.limits import FREE, LINE
from minprefix.tensors import load_tensors, save_tensors
from minprefix.training.run_folder import write_state

MANY = 10**9
BOMB = FREE + 2**22  # bytes: just beyond what any archive may unpack to
Case = tuple[str, str, Callable[[Path], None], bool]  # name, kind of file, damage, must be refused


def setting(name: str, value: object) -> Callable[[Path], None]:
    """Change the value of one key in a JSON file."""

    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return change


def contents(data: bytes | Callable[[], bytes]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.write_bytes(data if isinstance(data, bytes) else data())

    return change


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Replace the file by something that is not a file."""

    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def expanded(path: Path) -> None:
    """A tensor of 400 GB over a storage of 4 bytes."""
    torch.save({"wte.weight": torch.zeros(1).expand(10**11)}, path)


def deflated(path: Path) -> None:
    """A compressed archive of torch.save, a thousandth of its contents in size."""
    torch.save({"wte.weight": torch.zeros(BOMB // 4)}, raw := io.BytesIO())
    with zipfile.ZipFile(raw) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))


def with_code(path: Path) -> None:
    class Code:
        def __reduce__(self):
            return os.system, ("touch ran",)

    path.write_bytes(pickle.dumps({"wte.weight": Code()}))


def huge_values(path: Path) -> None:
    """A prefix with a correct checksum, full of 3e38."""
    tensors, metadata = load_tensors(path)
    save_tensors(path, {n: torch.full_like(x, 3e38) for n, x in tensors.items()}, metadata,
                 checksum=True)  # fmt: skip


def state(**changes) -> Callable[[Path], None]:
    """A state with a correct checksum and other values."""

    def change(path: Path) -> None:
        whole = torch.load(path, weights_only=True)
        for name, value in changes.items():
            if name == "moment":
                whole["optimizer"]["state"][0]["exp_avg"] = value
            else:
                whole[name] = value
        write_state(path.parent.parent, whole)
        path.with_name("before.pt").unlink()

    return change


def tar_bomb(path: Path) -> None:
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo("bbc/2.summary")
        member.size = BOMB
        tar.addfile(member, io.BytesIO(bytes(member.size)))


def npy_header(path: Path) -> None:
    """A header that promises a trillion ids."""
    data = path.read_bytes()
    end = 10 + int.from_bytes(data[8:10], "little")
    header = data[10:end].replace(b"(40,)", b"(1000000000000,)").rstrip()[: end - 11]
    path.write_bytes(data[:10] + header.ljust(end - 11) + b"\n" + data[end:])


LAUGHS = "".join(f'<!ENTITY a{n} "{10 * f"&a{n - 1};"}">' for n in range(1, 10))
XML = f'<!DOCTYPE x [<!ENTITY a0 "ha">{LAUGHS}]><benchmark><entry>&a9;</entry></benchmark>'


def named() -> Iterator[Case]:
    """All of them."""
    config, bart = "gpt2 config.json", "bart config.json"
    for name in ("n_layer", "vocab_size", "n_embd", "n_positions", "n_head", "n_inner"):
        yield f"config: {name}", config, setting(name, MANY), True
    for name in ("encoder_layers", "decoder_layers", "vocab_size", "max_position_embeddings"):
        yield f"bart config: {name}", bart, setting(name, MANY), True
    yield "config: eps", config, setting("layer_norm_epsilon", float("nan")), True
    yield "config: eos", "gpt2 generation_config.json", setting("eos_token_id", MANY), True
    yield "config: beams", "gpt2 generation_config.json", setting("num_beams", MANY), True
    yield "config: depth", config, contents(b'{"a": ' * 100_000), True
    yield "tokenizer: depth", "gpt2-bin tokenizer.json", contents(b'{"a": ' * 100_000), True
    for kind in ("pickle", "authors", "peft-bin adapter_model.bin"):
        yield f"{kind}: expanded", kind, expanded, True
        yield f"{kind}: deflated", kind, deflated, True
        yield f"{kind}: code", kind, with_code, True
    yield "pickle: pipe", "pickle", instead(os.mkfifo), True
    yield "prefix: 3e38", "prefix", huge_values, True
    yield "prefix: header", "prefix", contents(b"\xff" * 7 + b"\x7f{}"), True
    yield "prefix: pipe", "prefix", instead(os.mkfifo), True
    yield "state: step", "state", state(step=MANY), True
    yield "state: best", "state", state(best=float("nan")), True
    yield "state: moment", "state", state(moment=torch.zeros(1)), True
    yield "state: rubbish", "state", contents(b"PK\3\4" + bytes(1000)), True
    yield "text: gz", "a.txt.gz", contents(lambda: gzip.compress(bytes(BOMB))), True
    xz = functools.cache(lambda: lzma.compress(bytes(BOMB), preset=0))
    yield "text: xz", "a.txt.xz", contents(xz), True
    yield "text: npy", "a.npy", npy_header, True
    yield "text: npy in xz", "a.npy.xz", contents(xz), True
    yield "xsum: bomb", f"xsum {ARCHIVE}", tar_bomb, True
    for name in ("rows.jsonl", "pairs.txt", "news.source", "e2e.csv"):
        yield f"{name}: long line", name, contents(b"a" * (2 * LINE.usual)), True
        yield f"{name}: pipe", name, instead(os.mkfifo), True
        yield f"{name}: device", name, instead(lambda path: path.symlink_to("/dev/zero")), True
    yield "rows.parquet: pipe", "rows.parquet", instead(os.mkfifo), True
    yield "rows.json: depth", "rows.json", contents(b"[" * 100_000), True
    yield "rows.jsonl: depth", "rows.jsonl", contents(b"[" * 100_000), True
    yield "xml: laughs", "webnlg.xml", contents(XML.encode()), True
    yield (
        "log: torn",
        "log",
        lambda path: path.write_bytes(path.read_bytes() + b'{"a": "\xe2'),
        False,
    )
    odd = b'7\n[]\nnull\n{"step": "x"}\n{"loss": 1}\n{"step": 1, "dev_loss": []}\n{"st'
    yield "log: odd lines", "log", lambda path: path.write_bytes(path.read_bytes() + odd), False
    yield "a.txt: blanks", "a.txt", contents(b"a" + b" " * 1_200_000 + b"b"), True
    yield "settings: model", "settings", setting("model", ["gpt2"]), True
