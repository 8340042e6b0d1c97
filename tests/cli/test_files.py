"""Files are written whole or not at all, and each error is one line that names the file."""

import errno
import os
import stat

import pytest
import torch
from conftest import files_up_to

from minprefix import files
from minprefix.files import atomic_write, read_json, read_text, write_text
from minprefix.tensors import load_tensors, save_tensors


@pytest.mark.parametrize(
    "write, content", [(save_tensors, {"x": torch.ones(100_000)}), (write_text, "x" * 400_000)]
)
def test_full_disk_leaves_the_earlier_file(tmp_path, write, content):
    """It ends a write in the middle."""
    path = tmp_path / "earlier"
    path.write_bytes(b"what was there")
    with files_up_to(100_000), pytest.raises(OSError, match="File too large") as error:
        write(path, content)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == b"what was there"
    assert os.listdir(tmp_path) == ["earlier"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError("no space")])
def test_an_interrupted_write_leaves_the_earlier_file(tmp_path, error):
    path = tmp_path / "earlier.json"
    write_text(path, "first")
    kind = error if isinstance(error, type) else type(error)
    with pytest.raises(kind), atomic_write(path) as temporary:  # noqa: PT012
        assert temporary.suffix == ".json" and temporary.parent == tmp_path
        temporary.write_text("half")
        raise error
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["earlier.json"]


def test_who_reads_the_earlier_file_still_can(tmp_path):
    path = tmp_path / "file"
    write_text(path, "first")
    with path.open() as reader:
        write_text(path, "second")
        assert reader.read() == "first"
    assert read_text(path) == "second"


def test_unwritable_places_are_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing" / "a.txt", tmp_path / "file" / "a.txt", tmp_path):
        with pytest.raises(OSError) as caught:
            write_text(path, "x")
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_text(tmp_path / "link", "new ü")
    assert (tmp_path / "link").is_symlink()
    assert read_text(tmp_path / "target") == "new ü"


def test_what_was_left_over_long_ago_is_swept_by_the_next_write(tmp_path):
    names = [f".{'a' * 32}.tmp", f".{'b' * 32}.tmp.json", ".other.tmp", "c.tmp"]
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / f".{'d' * 32}.tmp").touch()  # of a process that writes now, perhaps
    write_text(tmp_path / "a", "text")
    assert {path.name for path in tmp_path.iterdir()} == {*names[2:], f".{'d' * 32}.tmp", "a"}


def test_tensors_come_back_with_their_metadata(tmp_path):
    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(3, dtype=torch.bfloat16)}
    save_tensors(path, tensors, {"base": "mini"})
    back, metadata = load_tensors(path)
    assert metadata == {"base": "mini"}
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
    save_tensors(path, tensors)
    assert load_tensors(path)[1] == {}


def test_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    save_tensors(tmp_path / "tensors", {"a": torch.ones(1)})
    write_text(tmp_path / "text", "a")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def refusing(monkeypatch, module, name: str, number: int, times: int = 10**6, when=None) -> None:
    """Let a call fail with this errno, so often, where when(path or handle) says so."""
    call, left = getattr(module, name), [times]

    def refuse(first, *args, **kwargs):
        if left[0] and (when is None or when(first)):
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return call(first, *args, **kwargs)

    monkeypatch.setattr(module, name, refuse)


def is_folder(of) -> bool:
    return stat.S_ISDIR(os.fstat(of).st_mode) if isinstance(of, int) else os.path.isdir(of)


@pytest.mark.parametrize(
    "name, number, options",
    [
        ("fsync", errno.EINVAL, {"when": is_folder}),  # CIFS, FUSE
        ("fsync", errno.EIO, {"when": is_folder}),
        ("open", errno.EACCES, {"when": is_folder}),  # Windows
        ("fsync", errno.EINVAL, {}),
        ("fsync", errno.ENOTSUP, {}),
        ("replace", errno.EACCES, {"times": 3}),  # another program has the file open for a moment
        ("replace", errno.EBUSY, {"times": 3}),
        ("replace", errno.ENOSYS, {}),
        ("chmod", errno.EPERM, {}),
        ("chmod", errno.ENOTSUP, {}),
    ],
)
def test_what_a_file_system_lacks_is_no_failure(tmp_path, monkeypatch, name, number, options):
    monkeypatch.setattr(files, "WAITS", (0, 0, 0))
    text, tensors = tmp_path / "text", tmp_path / "tensors"
    text.write_text("old")
    refusing(monkeypatch, os, name, number, **options)
    write_text(text, "new")
    save_tensors(tensors, {"a": torch.ones(3)})
    assert text.read_text() == "new" and load_tensors(tensors)[0]["a"].sum() == 3
    assert sorted(os.listdir(tmp_path)) == ["tensors", "text"]


@pytest.mark.parametrize(
    "name, number",
    [("fsync", errno.EIO), ("fsync", errno.ENOSPC), ("replace", errno.EACCES),
     ("replace", errno.EIO)],
)  # fmt: skip
def test_what_was_not_written_is_a_failure(tmp_path, monkeypatch, name, number):
    monkeypatch.setattr(files, "WAITS", (0, 0, 0))
    (tmp_path / "text").write_text("old")
    refusing(monkeypatch, os, name, number)
    with pytest.raises(OSError, match=f"text: cannot be written .{os.strerror(number)}"):
        write_text(tmp_path / "text", "new")
    assert (tmp_path / "text").read_text() == "old" and os.listdir(tmp_path) == ["text"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"a": 1,\n "b": }', ":2: not valid JSON"),
        (b"", ":1: not valid JSON"),
        (b"[1]", "holds a JSON list"),
        (b'{\n\n"a": "\xff"}', ":3: invalid UTF-8 \\(byte 0xff\\)"),
    ],
)
def test_bad_json_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"x.json.*{message}"):
        read_json(path)
