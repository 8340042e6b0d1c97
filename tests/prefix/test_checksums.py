"""Checksums of prefix and adapter files: every damaged byte is detected, and equal contents give
equal files."""

import random

import pytest
import torch
from conftest import an_adapter, tiny_bart, tiny_gpt2

from minprefix.files import FileNote
from minprefix.methods.adapters import Adapter
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.prefix import Prefix
from minprefix.tensors import load_tensors, save_tensors


def saved(path, kind: str):
    """A small file of each kind, and its loader."""
    if kind == "adapter":
        an_adapter(tiny_gpt2()).save(path)
        return Adapter.load
    make, model = (Prefix, tiny_gpt2()) if kind == "prefix" else (BARTPrefix, tiny_bart())
    prefix = make.random(model.config, 2, 0)
    prefix.bind(model)
    prefix.save(path)
    return Prefix.load


@pytest.mark.parametrize("kind", ["prefix", "bart", "adapter"])
def test_every_flipped_byte_is_seen(tmp_path, kind, recwarn):
    path, rng = tmp_path / "x.safetensors", random.Random(0)
    load = saved(path, kind)
    whole = path.read_bytes()
    seal = whole.index(b'"checksum"')
    places = [rng.randrange(len(whole)) for _ in range(200)]  # then the header, and the checksum
    places += list(range(seal + 90))
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= rng.randrange(1, 256)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            load(path)
    path.write_bytes(whole)
    load(path)
    assert not [w for w in recwarn if w.category is FileNote]


@pytest.mark.parametrize("kind", ["prefix", "adapter"])
def test_equal_contents_give_equal_bytes(tmp_path, kind):
    files = [tmp_path / f"{i}.safetensors" for i in range(6)]
    for path in files:
        saved(path, kind)
    assert len({path.read_bytes() for path in files}) == 1


def test_a_file_without_a_checksum_is_read_with_a_note(tmp_path):
    path = tmp_path / "x.safetensors"
    load = saved(path, "prefix")
    tensors, metadata = load_tensors(path)
    assert "checksum" not in metadata
    save_tensors(path, tensors, metadata)
    with pytest.warns(FileNote, match=r"x\.safetensors: it has no checksum"):
        table = load(path).prefix_table
    assert torch.equal(table, tensors["prefix_table"])


def test_a_header_may_hold_any_text(tmp_path):
    metadata = {"b": 'ü "x" \\ \x01\x1f\n\t\x7f\u2028', "a": "", "checked": "sha256"}
    save_tensors(tmp_path / "x", {"t": torch.ones(3, 2)}, metadata, checksum=True)
    tensors, found = load_tensors(tmp_path / "x")
    assert found == metadata and torch.equal(tensors["t"], torch.ones(3, 2))
