"""Text for training a GPT-2 from scratch: reads a folder into token streams and cuts windows.

A folder holds either UTF-8 text (.txt, .txt.gz, .txt.xz) or tokens (.npy, .npy.xz: one array of
integers per file, written by another tokeniser). A text file is one document, or several with
<|endoftext|> between them. All documents become one stream of ids with <|endoftext|> after each. A
training row is a window of T + 1 ids: T inputs and, shifted by one, T labels. Documents are packed
into windows without padding, and attention may cross their borders, as in the training of GPT-3
[1], appendix B.

Read `load_corpus`, then `Windows` (which rows step s sees).
[1] https://arxiv.org/abs/2005.14165
"""

import gzip
import io
import lzma
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from minprefix.files import brief, decode_text, names_file, read_bytes
from minprefix.limits import DATA, check_unpacked
from minprefix.models.tokenizer import ENDOFTEXT, Tokenizer

TEXTS = (".txt", ".txt.gz", ".txt.xz")
SHARDS = (".npy", ".npy.xz")
HELD_OUT = re.compile(r"(val|valid|validation)(?![a-z])", re.IGNORECASE)  # start of a file's name


@dataclass(frozen=True)
class Corpus:
    """The ids for training and for evaluation, and their tokenizer."""

    tokenizer: Tokenizer
    train: np.ndarray  # (n,), ids
    val: np.ndarray  # (n,), ids of held-out text


@names_file
def load_corpus(
    folder: str | Path, tokenizer: Tokenizer | None, vocab_size: int, val_share: float
) -> Corpus:
    """Read all files in the folder and its sub-folders, in the order of the paths.

    Files whose name begins with val (val.txt, val-0.npy.xz, validation.txt) are held out; without
    such a file the last documents are, see `held_out_from`.

    Args:
        tokenizer: None = train one on the text that is not held out.
        vocab_size: of a tokenizer that is trained here.
        val_share: the share of the text that is held out, between 0 and 1.
    Raises:
        ValueError: no text; both text and tokens; tokens without a tokenizer, or ids outside of its
            vocabulary; a file that is damaged or not UTF-8 (named, with its line).
        FileNotFoundError: no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts, shards = ([p for p in files if p.name.lower().endswith(s)] for s in (TEXTS, SHARDS))
    if bool(texts) == bool(shards):
        found = "both text and token shards" if texts else "no text"
        raise ValueError(
            f"{folder}: {found}; expected {', '.join(TEXTS)} or, with a tokenizer, "
            f"{', '.join(SHARDS)}"
        )
    if shards:
        return shard_corpus(shards, tokenizer, val_share)
    train, val = ([p for p in texts if bool(HELD_OUT.match(p.name)) == v] for v in (False, True))
    train, val = ([d for path in paths for d in read_documents(path)] for paths in (train, val))
    if not val:
        train, val = hold_out_documents(train, val_share)
    if not train:
        raise ValueError(f"{folder}: no text to train on in {len(texts)} files")
    tokenizer = tokenizer or Tokenizer.train(train, vocab_size)
    return Corpus(tokenizer, encode(tokenizer, train), encode(tokenizer, val))


def shard_corpus(paths: list[Path], tokenizer: Tokenizer | None, val_share: float) -> Corpus:
    """The tokens of all shards; those named val* are held out."""
    if tokenizer is None:
        raise ValueError(f"{paths[0]}: token ids need their tokenizer: give --tokenizer FOLDER")
    streams = {False: [np.zeros(0, np.uint16)], True: [np.zeros(0, np.uint16)]}
    for path in paths:
        held_out = bool(HELD_OUT.match(path.name))
        streams[held_out].append(read_shard(path, tokenizer.vocab_size))
    train, val = (np.concatenate(streams[v]) for v in (False, True))
    if not len(val) and len(train):
        ends = np.flatnonzero(train == tokenizer.eos_id) + 1
        cut = held_out_from(len(train), ends, val_share)
        train, val = train[:cut], train[cut:]
    return Corpus(tokenizer, train, val)


# files -------------------------------------------------------------------------------------------


@names_file
def read_unpacked(path: Path) -> bytes:
    """The unpacked contents of a file; ValueError if it is damaged or unpacks to too much."""
    unpack: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower())
    if unpack is None:
        return read_bytes(path, DATA)
    pieces, total = [], 0
    with unpack(path) as file:
        while piece := file.read(2**20):
            pieces.append(piece)
            check_unpacked(path, total := total + len(piece))
    return b"".join(pieces)


def read_documents(path: Path) -> list[str]:
    """The documents of a text file, stripped of white space at both ends; skips empty ones."""
    text = decode_text(read_unpacked(path), path).removeprefix("\ufeff")
    return [document for part in text.split(ENDOFTEXT) if (document := part.strip())]


def read_shard(path: Path, vocab_size: int) -> np.ndarray:
    """The ids of a .npy file: (n,), uint16, or int64 if the vocabulary is larger."""
    file = io.BytesIO(read_unpacked(path))
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}
        shape, _, dtype = read.get(version, np.lib.format.read_array_header_2_0)(file)
    except Exception as error:  # the header is a Python literal, which can be wrong in any way
        raise ValueError(f"{path}: damaged, or not a .npy file ({brief(error, str)})") from error
    if len(shape) != 1 or dtype.kind not in "iu":
        raise ValueError(f"{path}: expected one row of integer ids, found {dtype} {shape}")
    data = file.getbuffer()[file.tell() :]
    if len(data) != shape[0] * dtype.itemsize:
        raise ValueError(
            f"{path}: damaged, or not a .npy file ({len(data)} bytes for {shape[0]} ids)"
        )
    ids = np.frombuffer(data, dtype)
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        worst = ids.min() if ids.min() < 0 else ids.max()
        raise ValueError(f"{path}: id {worst}, but the tokenizer has 0 ... {vocab_size - 1}")
    return ids.astype(id_type(vocab_size))


def id_type(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 2**16 else np.int64


# documents and streams ---------------------------------------------------------------------------


def held_out_from(n: int, ends: Sequence[int] | np.ndarray, share: float) -> int:
    """Where the held-out part begins, in a text of length n whose documents end at `ends`.

    It begins at the first end of a document after (1 - share) n, or at (1 - share) n itself if that
    is inside the last document. No more than `share` is held out in either case.
    """
    start = max(1, round(n * (1 - share)))
    later = [end for end in ends if start <= end < n]
    return int(min(later, default=start))


def hold_out_documents(documents: list[str], share: float) -> tuple[list[str], list[str]]:
    """The documents to train on, and the last `share` of the text (in characters)."""
    ends = np.cumsum([0, *map(len, documents)])
    cut = held_out_from(int(ends[-1]), ends[1:], share)
    train, val = [], []
    for start, document in zip(ends, documents, strict=False):
        place = min(max(int(cut - start), 0), len(document))
        train += [document[:place]] if place else []
        val += [document[place:]] if place < len(document) else []
    return train, val


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """The stream of the documents' ids, <|endoftext|> after each: (n,)."""
    rows = []
    for document in tqdm(documents, unit="document", desc="tokens", delay=2, leave=False):
        ids = [*tokenizer.encode(document), tokenizer.eos_id]
        rows.append(np.array(ids, dtype=id_type(tokenizer.vocab_size)))
    return np.concatenate(rows) if rows else np.zeros(0, id_type(tokenizer.vocab_size))


def unigram_entropy(ids: np.ndarray, vocab_size: int) -> float:
    """H = - sum_v p_v log p_v with p_v = share of id v, in nats per token.

    A model that ignores the context cannot have a lower loss on these ids.
    """
    p = np.bincount(ids, minlength=vocab_size) / len(ids)
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


# windows -----------------------------------------------------------------------------------------


class Windows:
    """The endless order of training windows: `batch(step)` depends on the arguments and step alone.

    In each epoch the stream is treated as a ring and cut, from a random place, into windows of T
    labels, which come in random order. Every token is a label once, and its window contains other
    tokens than in the epoch before. (The last window, shorter than T, is left out.)
    """

    def __init__(self, ids: np.ndarray, seq_len: int, batch_size: int, seed: int):
        """
        Args:
            ids: (n,), the stream; n > seq_len.
            seq_len: T, inputs per window.
            batch_size: windows per batch; a batch may reach into the next epoch.
        """
        if len(ids) <= seq_len:
            raise ValueError(
                f"too little text: {len(ids)} tokens to train on, but a window needs {seq_len + 1}"
            )
        self.ids, self.seq_len, self.batch_size, self.seed = ids, seq_len, batch_size, seed
        self.per_epoch = len(ids) // seq_len
        self._epoch, self._starts = -1, np.zeros(0, np.int64)

    def starts(self, epoch: int) -> np.ndarray:
        """Where the windows of this epoch begin in the stream, in order: (per_epoch,)."""
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            shift = rng.integers(len(self.ids))
            self._starts = shift + self.seq_len * rng.permutation(self.per_epoch)
            self._epoch = epoch
        return self._starts

    def batch(self, step: int) -> torch.Tensor:
        """(B, T + 1), int64: inputs are [:, :-1], labels [:, 1:]."""
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        starts = [self.starts(n // self.per_epoch)[n % self.per_epoch] for n in numbers]  # (B,)
        at = np.array(starts)[:, None] + np.arange(self.seq_len + 1)  # (B, T + 1)
        return torch.from_numpy(self.ids[at % len(self.ids)].astype(np.int64))


def validation_windows(ids: np.ndarray, seq_len: int, most: int) -> list[np.ndarray]:
    """Consecutive windows of T labels, or evenly spaced ones if there are more than `most` tokens.

    Each window is read alone, so its first tokens have little context. The last may be shorter.
    """
    if len(ids) < 2:
        raise ValueError(f"too little text: {len(ids)} tokens are held out, but a loss needs 2")
    starts = np.arange(0, len(ids) - 1, seq_len)
    keep = max(1, most // seq_len)
    if len(starts) > keep:
        starts = starts[np.linspace(0, len(starts) - 1, keep).astype(int)]
    return [ids[start : start + seq_len + 1] for start in starts]
