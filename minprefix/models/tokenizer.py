"""The byte-level BPE tokenizer of GPT-2 and BART, from a checkpoint's vocab.json and merges.txt.

Text is cut into words by a regular expression, each word becomes UTF-8 bytes, and neighbouring
tokens are merged, always the pair that stands first in merges.txt, until none of its pairs is left
[1]. tiktoken [2] does that fast, but numbers tokens by merge priority ("rank"), so its ranks go
through a table to the ids of vocab.json: in GPT-2 the two are equal, in BART they are not.

Read `Tokenizer`. In both files a byte is written as one printable character (`BYTE_CHARS`), and a
token that neither is a byte nor comes from a merge is special: text never turns into it.
`Tokenizer.train` finds the merges in texts (Sennrich et al. 2016 [3]); the library [4] does it.
[1] https://github.com/openai/gpt-2/blob/master/src/encoder.py   [2] https://github.com/openai/tiktoken
[3] https://arxiv.org/abs/1508.07909   [4] https://github.com/huggingface/tokenizers
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import tiktoken

from minprefix.files import read_json, read_text, write_text

ENDOFTEXT = "<|endoftext|>"
# by family: the special tokens that stand before a text, after it, and in padding
SPECIAL = {"gpt2": (ENDOFTEXT, ENDOFTEXT, ENDOFTEXT), "bart": ("<s>", "</s>", "<pad>")}

# 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ of [1], written as in
# tiktoken: the same words, but possessive (++), so that long runs cost no backtracking
WORD = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def _byte_chars() -> list[str]:
    """The character of each byte: itself if printable in Latin-1, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (b for b in range(256) if b not in printable)
    moved = {byte: 0x100 + n for n, byte in enumerate(others)}
    return [chr(moved.get(byte, byte)) for byte in range(256)]


BYTE_CHARS = _byte_chars()
BYTE_OF = {char: byte for byte, char in enumerate(BYTE_CHARS)}


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: number of tokens, special ones included; ids are 0 ... vocab_size - 1.
        family: "gpt2" or "bart".
        bos_id, eos_id, pad_id: in GPT-2 all are <|endoftext|>, which stands between documents; in
            BART they are <s>, </s> and <pad>.
        text_ids: ids of text are below it; special tokens may lie beyond.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], family: str = "gpt2"):
        """
        Args:
            vocab: the id of each token; every byte and the result of every merge has one.
            merges: pairs of tokens in order of priority. `from_folder` checks both.
        """
        self._vocab, self._merges = vocab, merges
        self.vocab_size, self.family = len(vocab), family
        self.bos_id, self.eos_id, self.pad_id = (vocab[token] for token in SPECIAL[family])
        # dicts keep the first place of a token: its rank is its best merge's
        by_id = sorted(BYTE_CHARS, key=vocab.__getitem__)
        ranked = list(dict.fromkeys([*by_id, *(a + b for a, b in merges)]))
        as_bytes = [bytes(BYTE_OF[char] for char in token) for token in ranked]
        self._id_of_rank = [vocab[token] for token in ranked]
        self.text_ids = max(self._id_of_rank) + 1
        self._bytes_of_id = [b""] * len(vocab)  # special tokens have none
        for token_id, token_bytes in zip(self._id_of_rank, as_bytes, strict=True):
            self._bytes_of_id[token_id] = token_bytes
        ranks = {token: rank for rank, token in enumerate(as_bytes)}
        self._encoding = tiktoken.Encoding(
            "minprefix", pat_str=WORD, mergeable_ranks=ranks, special_tokens={}
        )

    @classmethod
    def from_folder(cls, folder: str | Path, family: str = "gpt2") -> "Tokenizer":
        """Read vocab.json and merges.txt.

        Raises:
            FileNotFoundError: one of them is missing.
            ValueError: malformed, or the two disagree; names the file and the line or token.
        """
        vocab = _read_vocab(Path(folder) / "vocab.json", SPECIAL[family])
        return cls(vocab, _read_merges(Path(folder) / "merges.txt", vocab), family)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE of these texts: again and again the most frequent pair is merged.

        Ids are in the order of GPT-2's: the bytes, the merges as they were found, <|endoftext|>.
        The same texts give the same tokenizer.

        Args:
            vocab_size: tokens, the 256 bytes and <|endoftext|> included. There are fewer where no
                pair is left that occurs twice.
        Raises:
            ValueError: vocab_size below 257.
        """
        if vocab_size < len(BYTE_CHARS) + 1:
            raise ValueError(
                f"vocab_size must be at least 257 (256 bytes, {ENDOFTEXT}), got {vocab_size}"
            )
        import tokenizers  # only training needs it

        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=BYTE_CHARS,
            show_progress=False,
        )  # fmt: skip
        bpe.train_from_iterator(texts, trainer)
        merges = [(a, b) for a, b in json.loads(bpe.to_str())["model"]["merges"]]
        # in GPT-2 bytes stand in the order of their characters; two merges may give one token
        tokens = dict.fromkeys([*sorted(BYTE_CHARS), *(a + b for a, b in merges), ENDOFTEXT])
        return cls({token: token_id for token_id, token in enumerate(tokens)}, merges)

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text: "<|endoftext|>" inside it is text like any other.

        Raises:
            ValueError: a lone surrogate, which no UTF-8 text holds (tiktoken would replace it).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            bad = f"U+{ord(text[error.start]):04X} at character {error.start}"
            raise ValueError(f"text is not valid Unicode: lone surrogate {bad}") from error
        return [self._id_of_rank[rank] for rank in self._encoding.encode_ordinary(text)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 of the tokens, special ones skipped; may begin or end inside a character.

        Raises:
            ValueError: an id that the vocabulary does not have.
        """
        ids = [int(token_id) for token_id in ids]
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(f"token id {token_id} is not in 0 ... {self.vocab_size - 1}")
        return b"".join(self._bytes_of_id[token_id] for token_id in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens, special ones skipped; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """`decode`, piece by piece as the tokens come: a character waits for its last byte."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in ids:
            if piece := decoder.decode(self.decode_bytes([token_id])):
                yield piece
        if piece := decoder.decode(b"", final=True):
            yield piece

    def files(self) -> dict[str, str]:
        """What `save` writes: the text of each file by name."""
        merges = "".join(f"{a} {b}\n" for a, b in self._merges)
        return {
            "vocab.json": json.dumps(self._vocab, ensure_ascii=False),
            "merges.txt": "#version: 0.2\n" + merges,
        }

    def save(self, folder: str | Path) -> None:
        """Write vocab.json and merges.txt, which `transformers` also loads."""
        for name, text in self.files().items():
            write_text(Path(folder) / name, text)


def _read_vocab(path: Path, special: tuple[str, ...]) -> dict[str, int]:
    """The id of each token; ids are 0 ... len - 1 in any order."""
    vocab = read_json(path)
    owner = {}
    for token, token_id in vocab.items():
        if type(token_id) is not int or not 0 <= token_id < len(vocab):
            size = f"the file has {len(vocab)} tokens"
            raise ValueError(f"{path}: token {token!r} has id {token_id!r}, but {size}")
        if token_id in owner:
            raise ValueError(f"{path}: {owner[token_id]!r} and {token!r} share the id {token_id}")
        owner[token_id] = token
    for token in (*BYTE_CHARS, *special):
        if token not in vocab:
            raise ValueError(f"{path}: no token {token!r}")
    return vocab


def _read_merges(path: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs in order; a pair may use bytes and the results of earlier lines."""
    merges, known = [], set(BYTE_CHARS)
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        pair = tuple(line.removesuffix("\r").split(" "))
        if pair == ("",) or (number == 1 and line.startswith("#version")):
            continue
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"{path}:{number}: expected two tokens and a space, found {line!r}")
        for part in pair:
            if part not in known:
                raise ValueError(f"{path}:{number}: {part!r} is no byte and from no earlier line")
        token = pair[0] + pair[1]
        if token not in vocab:
            raise ValueError(f"{path}:{number}: {token!r} is not in vocab.json")
        known.add(token)
        merges.append(pair)
    return merges
