"""Text, token streams and windows: reading, held-out text, the rows of a step."""

import gzip
import lzma

import numpy as np
import pytest
from conftest import byte_tokenizer

from minprefix.training.corpus import (
    Windows,
    encode,
    held_out_from,
    load_corpus,
    read_documents,
    read_shard,
    unigram_entropy,
    validation_windows,
)

DOCUMENTS = [f"Document {n} says what it is. " * 3 for n in range(20)]


def text_of(corpus, ids) -> list[str]:
    """The documents of a stream, checked to end with <|endoftext|>."""
    eos = corpus.tokenizer.eos_id
    ends = np.flatnonzero(ids == eos)
    assert ends[-1] == len(ids) - 1
    return [corpus.tokenizer.decode(part) for part in np.split(ids, ends + 1)[:-1]]


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.xz"])
def test_a_file_is_one_document_or_several(tmp_path, suffix):
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(suffix[4:], bytes)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pack(b"\xef\xbb\xbf one\r\ntwo \n<|endoftext|>\n\n<|endoftext|>three"))
    assert read_documents(path) == ["one\r\ntwo", "three"]
    if suffix != ".txt":
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match=f"a{suffix}: damaged"):
            read_documents(path)


def test_streams_are_the_documents_in_order_with_an_end_behind_each(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text(DOCUMENTS[1])
    (tmp_path / "a.txt").write_text(DOCUMENTS[0])
    (tmp_path / "b" / "val.txt").write_text(DOCUMENTS[2])
    (tmp_path / "c.md").write_text("not read")
    corpus = load_corpus(tmp_path, byte_tokenizer(), 300, 0.5)
    assert text_of(corpus, corpus.train) == [DOCUMENTS[0].strip(), DOCUMENTS[1].strip()]
    assert text_of(corpus, corpus.val) == [DOCUMENTS[2].strip()]
    assert corpus.train.dtype == np.uint16


def test_the_last_documents_are_held_out_and_not_in_the_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("<|endoftext|>".join([*DOCUMENTS, "qqq zzz qqq zzz"]))
    corpus = load_corpus(tmp_path, None, 400, 0.12)
    train, val = text_of(corpus, corpus.train), text_of(corpus, corpus.val)
    assert train + val == [d.strip() for d in DOCUMENTS] + ["qqq zzz qqq zzz"]
    assert len(val) == 3  # a share of 0.12 would be 2.5 of the long ones and the last
    assert len(corpus.tokenizer.encode("qqq")) == 3


def test_a_valley_is_not_held_out(tmp_path):
    for name in ("valley.txt", "VAL-1.txt", "validation.txt"):
        (tmp_path / name).write_text(name)
    corpus = load_corpus(tmp_path, byte_tokenizer(), 300, 0.1)
    assert text_of(corpus, corpus.train) == ["valley.txt"] and len(text_of(corpus, corpus.val)) == 2


@pytest.mark.parametrize(
    "n, ends, share, place",
    [(100, [50, 92, 100], 0.1, 92), (100, [50, 100], 0.1, 90), (100, [90, 100], 0.1, 90),
     (3, [3], 0.01, 3), (3, [3], 0.99, 1)],
)  # fmt: skip
def test_where_the_held_out_part_begins(n, ends, share, place):
    assert held_out_from(n, ends, share) == place


def test_one_document_is_divided(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 80 + "y" * 20)
    corpus = load_corpus(tmp_path, byte_tokenizer(), 300, 0.2)
    assert text_of(corpus, corpus.train) == ["x" * 80]
    assert text_of(corpus, corpus.val) == ["y" * 20]


@pytest.mark.parametrize("suffix", [".npy", ".npy.xz"])
def test_shards_give_what_their_text_gives(tmp_path, suffix):
    tokenizer = byte_tokenizer()
    ids = encode(tokenizer, DOCUMENTS)
    for number, part in enumerate(np.split(ids, [len(ids) // 3])):
        path = tmp_path / f"train-{number}{suffix}"
        np.save(tmp_path / "x", part.astype(np.uint32))
        data = (tmp_path / "x.npy").read_bytes()
        (tmp_path / "x.npy").unlink()
        path.write_bytes(lzma.compress(data) if suffix.endswith("xz") else data)
    corpus = load_corpus(tmp_path, tokenizer, 300, 0.12)
    assert np.array_equal(np.concatenate([corpus.train, corpus.val]), ids)
    assert len(text_of(corpus, corpus.val)) == 2
    assert text_of(corpus, corpus.train)[0] == DOCUMENTS[0]
    np.save(tmp_path / "val.npy", ids[:50])
    corpus = load_corpus(tmp_path, tokenizer, 300, 0.12)
    assert np.array_equal(corpus.train, ids) and np.array_equal(corpus.val, ids[:50])


def test_files_that_are_no_shards_are_named(tmp_path):
    path = tmp_path / "a.npy"
    for value, message in (
        (np.zeros((2, 2), np.uint16), "expected one row of integer ids, found uint16"),
        (np.zeros(3), ".*, found float64"),
        (np.array([1, -1]), "id -1, but the tokenizer has 0 ... 9"),
        (np.array([{}]), ".*, found object"),
    ):
        np.save(path, value, allow_pickle=True)
        with pytest.raises(ValueError, match=f"a.npy: {message}"):
            read_shard(path, 10)
    path.write_bytes(b"no numbers")
    with pytest.raises(ValueError, match="a.npy: damaged"):
        read_shard(path, 10)


def test_an_epoch_has_every_token_as_a_label_once_and_its_neighbours_as_inputs():
    ids = np.arange(103, dtype=np.uint16)
    windows = Windows(ids, 10, 5, seed=3)
    labels = []
    for step in range(2):  # 10 windows
        batch = windows.batch(step)
        assert batch.shape == (5, 11)
        assert ((batch[:, 1:] - batch[:, :-1]) % 103 == 1).all()
        labels += batch[:, 1:].flatten().tolist()
    assert len(labels) == len(set(labels)) == 100  # 3 are left over
    assert sorted(windows.starts(0).tolist()) != sorted(windows.starts(1).tolist())


def test_a_batch_depends_on_its_step_alone():
    ids = np.arange(95, dtype=np.uint16)
    one, other = Windows(ids, 10, 4, seed=0), Windows(ids, 10, 4, seed=0)
    there = {step: one.batch(step) for step in range(9)}  # 9 windows an epoch: batches cross it
    for step in (8, 2, 5, 2):
        assert (other.batch(step) == there[step]).all()
    assert (Windows(ids, 10, 4, seed=1).batch(0) != there[0]).any()


def test_validation_windows_have_every_label_once():
    ids = np.arange(47)
    labels = [x for window in validation_windows(ids, 10, 1000) for x in window[1:]]
    assert labels == list(range(1, 47))
    some = validation_windows(ids, 10, 20)
    assert [window[0] for window in some] == [0, 40]
    with pytest.raises(ValueError, match="1 tokens are held out"):
        validation_windows(ids[:1], 10, 20)


def test_unigram_entropy():
    assert unigram_entropy(np.array([0, 1, 2, 3]), 9) == pytest.approx(np.log(4))
    assert unigram_entropy(np.array([5, 5, 5]), 9) == 0


def test_the_held_out_shard_of_the_embedded_models_text(shared, tokenizer):
    ids = read_shard(shared / "corpus" / "val.npy.xz", tokenizer.vocab_size)
    assert len(ids) == 1_207_339 and ids[-1] == tokenizer.eos_id  # as its SOURCES.md says
    first = tokenizer.decode(ids[:200])
    assert "\ufffd" not in first and len(first) > 400
