"""The byte-level BPE tokenizer of GPT-2 and BART, from tokens, ids and merges.

Text is split into words by a regular expression, and each word into UTF-8 bytes. Then neighbouring
tokens are merged, always the pair that comes first in merges.txt, until no pair is left [1].
tiktoken [2] is a fast implementation, but numbers tokens by merge priority ("rank"). A table maps
its ranks to the ids of the vocabulary, which are equal in GPT-2, but not in BART.

Read `Tokenizer`; `vocabulary.py` reads a checkpoint's files. They write a byte as one printable
character (`BYTE_CHARS`). A token that is neither a byte nor the result of a merge is either
special, and then never the encoding of text, or it was added by a user (`Added`) and is found in
text as a whole. `Tokenizer.train` finds merges in texts (Sennrich et al. 2016 [3]) with the library
[4].
[1] https://github.com/openai/gpt-2/blob/master/src/encoder.py   [2] https://github.com/openai/tiktoken
[3] https://arxiv.org/abs/1508.07909   [4] https://github.com/huggingface/tokenizers
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tiktoken

from minprefix.files import write_text
from minprefix.limits import BLANKS

ENDOFTEXT = "<|endoftext|>"
# the names of special tokens in tokenizer_config.json, the first three as in SPECIAL
ROLES = (
    "bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token",
)  # fmt: skip
# by family: the special tokens before a text, after it, and in padding
SPECIAL = {"gpt2": (ENDOFTEXT, ENDOFTEXT, ENDOFTEXT), "bart": ("<s>", "</s>", "<pad>")}

# 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ of [1], written as in
# tiktoken: the same words, but possessive (++), which avoids backtracking in long runs
WORD = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def _byte_chars() -> list[str]:
    """The character of each byte: itself if printable in Latin-1, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (b for b in range(256) if b not in printable)
    moved = {byte: 0x100 + n for n, byte in enumerate(others)}
    return [chr(moved.get(byte, byte)) for byte in range(256)]


BYTE_CHARS = _byte_chars()
BYTE_OF = {char: byte for byte, char in enumerate(BYTE_CHARS)}


def check_blanks(text: str) -> str:
    """The text; ValueError if it has more blanks in a row than tiktoken can split."""
    if len(text) > BLANKS.value:
        BLANKS.check(max(map(len, re.findall(r"\s+", text)), default=0), "a text")
    return text


@dataclass(frozen=True)
class Added:
    """A token that was added to a vocabulary: its text is always this one token."""

    content: str
    special: bool = False  # left out of decoded text
    lstrip: bool = False  # blanks before it belong to it
    rstrip: bool = False  # blanks after it
    single_word: bool = False  # not within a word
    control: bool = False  # begins, ends or pads texts: not found in text, and not decoded

    def pattern(self) -> str:
        text = re.escape(self.content)
        text = rf"(?<!\w){text}(?!\w)" if self.single_word else text
        return rf"\s*{text}" * self.lstrip + text * (not self.lstrip) + r"\s*" * self.rstrip


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: one more than the largest id, special and added tokens included.
        family: "gpt2" or "bart".
        bos_id, eos_id, pad_id: in GPT-2 all are <|endoftext|>, which separates documents, unless
            its files name others; in BART they are <s>, </s> and <pad>.
        start_id: the first token for a BART's decoder, usually its eos.
        text_ids: ids of text are below it; special and added tokens may be above.
    """

    def __init__(
        self, vocab: dict[str, int], merges: list[tuple[str, str]], family: str = "gpt2",
        special: Sequence[str] | None = None, added: Sequence[Added] = (),
    ):  # fmt: skip
        """
        Args:
            vocab: the id of each token, including every byte and the result of every merge.
            merges: pairs of tokens in order of priority. `from_folder` checks both.
            special: the tokens before a text, after it and in padding; None = the family's.
            added: tokens of `vocab` that are found in text as a whole.
        """
        self._vocab, self._merges, self._special = vocab, merges, special
        self.vocab_size, self.family = max(vocab.values()) + 1, family
        self.bos_id, self.eos_id, self.pad_id = (vocab[t] for t in special or SPECIAL[family])
        self.start_id = self.eos_id
        # a dict keeps the first place of a token, so its rank is that of its best merge
        by_id = sorted(BYTE_CHARS, key=vocab.__getitem__)
        ranked = list(dict.fromkeys([*by_id, *(a + b for a, b in merges)]))
        as_bytes = [bytes(BYTE_OF[char] for char in token) for token in ranked]
        self._id_of_rank = [vocab[token] for token in ranked]
        self.text_ids = max(self._id_of_rank) + 1
        self._bytes_of_id = [b""] * self.vocab_size  # special tokens have none
        for token_id, token_bytes in zip(self._id_of_rank, as_bytes, strict=True):
            self._bytes_of_id[token_id] = token_bytes
        for token in added:
            if not (token.special or token.control):
                self._bytes_of_id[vocab[token.content]] = token.content.encode()
        self._added = tuple(added)
        self._find(self._added)
        ranks = {token: rank for rank, token in enumerate(as_bytes)}
        self._encoding = tiktoken.Encoding(
            "minprefix", pat_str=WORD, mergeable_ranks=ranks, special_tokens={}
        )

    def _find(self, added: Sequence[Added]) -> None:
        """Find these tokens in text from now on, the longest first."""
        found = [token for token in added if not token.control]
        by_length = sorted(found, key=lambda token: -len(token.content))
        patterns = "|".join(f"({token.pattern()})" for token in by_length)
        self._added_pattern = re.compile(patterns) if patterns else None
        self._added_ids = [self._vocab[token.content] for token in by_length]

    def fit(self, vocab_size: int) -> list[str]:
        """Adapt to a model with `vocab_size` tokens. Returns the tokens beyond it, which are no
        longer found in text; ids that only the model has decode to nothing."""
        lost = [token for token in self._added if self._vocab[token.content] >= vocab_size]
        self._find([token for token in self._added if token not in lost])
        self._bytes_of_id += [b""] * (vocab_size - len(self._bytes_of_id))
        return [token.content for token in lost if not token.control]

    @classmethod
    def from_folder(
        cls, folder: str | Path, family: str = "gpt2",
        ids: Sequence[int | None] = (None, None, None),
    ) -> "Tokenizer":  # fmt: skip
        """Read tokenizer.json, or vocab.json and merges.txt; see `vocabulary.read`.

        Args:
            ids: of the special tokens, in case the files name tokens that they do not have.
        Raises:
            FileNotFoundError: there is neither.
            ValueError: malformed, or parts disagree; names the file and the line or token.
        """
        from minprefix.models.vocabulary import read  # it makes a Tokenizer

        return read(Path(folder), family, ids)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train byte-level BPE on these texts, repeatedly merging the most frequent pair.

        Ids are ordered as in GPT-2: the bytes, the merges in their order, <|endoftext|>.
        The same texts give the same tokenizer.

        Args:
            vocab_size: tokens, the 256 bytes and <|endoftext|> included. There are fewer where no
                pair is left that occurs twice.
        Raises:
            ValueError: vocab_size below 257; more blanks in a row than `limits.BLANKS`.
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
        bpe.train_from_iterator(map(check_blanks, texts), trainer)
        merges = [(a, b) for a, b in json.loads(bpe.to_str())["model"]["merges"]]
        # in GPT-2 bytes stand in the order of their characters; two merges may give one token
        tokens = dict.fromkeys([*sorted(BYTE_CHARS), *(a + b for a, b in merges), ENDOFTEXT])
        return cls({token: token_id for token_id, token in enumerate(tokens)}, merges)

    def encode(self, text: str) -> list[int]:
        """Token ids of ordinary text: "<|endoftext|>" inside it is text like any other; an added
        token is one token.

        Raises:
            ValueError: a lone surrogate, which no UTF-8 text holds (tiktoken would replace it);
                more blanks in a row than `limits.BLANKS`.
        """
        check_blanks(text)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            bad = f"U+{ord(text[error.start]):04X} at character {error.start}"
            raise ValueError(f"text is not valid Unicode: lone surrogate {bad}") from error
        if self._added_pattern is None:
            return self._encode_plain(text)
        ids, end = [], 0
        for match in self._added_pattern.finditer(text):
            ids += self._encode_plain(text[end : match.start()])
            ids.append(self._added_ids[(match.lastindex or 1) - 1])
            end = match.end()
        return ids + self._encode_plain(text[end:])

    def _encode_plain(self, text: str) -> list[int]:
        return [self._id_of_rank[rank] for rank in self._encoding.encode_ordinary(text)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 of the tokens, special ones skipped; may begin or end inside a character.

        Raises:
            ValueError: an id that the vocabulary does not have.
        """
        ids = [int(token_id) for token_id in ids]
        for token_id in ids:
            if not 0 <= token_id < len(self._bytes_of_id):
                last = len(self._bytes_of_id) - 1
                raise ValueError(f"token id {token_id} is not in 0 ... {last}")
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
        found = {token.content: token for token in self._added}
        vocab = {token: token_id for token, token_id in self._vocab.items() if token not in found}
        files = {
            "vocab.json": json.dumps(vocab, ensure_ascii=False),
            "merges.txt": "#version: 0.2\n" + merges,
        }
        if found or self._special:
            named = zip(ROLES, self._special or SPECIAL[self.family], strict=False)
            added = {self._vocab[text]: asdict(token) for text, token in found.items()}
            for token in added.values():
                token["special"] |= token.pop("control")
            kind = "GPT2Tokenizer" if self.family == "gpt2" else "BartTokenizer"
            config = {"tokenizer_class": kind, **dict(named), "added_tokens_decoder": added}
            files["tokenizer_config.json"] = json.dumps(config, indent=1) + "\n"
            ids = {token: self._vocab[token] for token in found}
            files["added_tokens.json"] = json.dumps(ids, ensure_ascii=False)
        return files

    def save(self, folder: str | Path) -> None:
        """Write vocab.json and merges.txt (and what names added tokens), as `transformers` has
        them."""
        for name, text in self.files().items():
            write_text(Path(folder) / name, text)
