"""End tokens, stop strings and forbidden words.

A stop string may begin and end within tokens, so it is searched for in the text. A forbidden word
is forbidden as a sequence of tokens. Read `Stopping`.
"""

from collections.abc import Iterator, Sequence

from minprefix.models.base import LanguageModel


def end_ids(model: LanguageModel, tokenizer, framed: bool) -> tuple[int, ...]:
    """The tokens that end a text: the model's, and in a trained frame also the tokenizer's, with
    which the training texts ended."""
    ids = [*model.config.eos_ids, *([tokenizer.eos_id] if framed else [])]
    return known_ids(ids, model.config.vocab_size)


def known_ids(ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """The distinct ids that are in a vocabulary of this size."""
    return tuple(dict.fromkeys(token_id for token_id in ids if 0 <= token_id < vocab_size))


def word_ids(tokenizer, words: Sequence[str]) -> list[list[int]]:
    """The tokens of each word at the start of a text and after a blank, which differ."""
    forms = [form for word in words for form in (word, f" {word}"[word[0].isspace() :])]
    return [tokenizer.encode(form) for form in dict.fromkeys(forms)]


class Stopping:
    """The tokens and strings that end a text, and the texts of a batch so far."""

    def __init__(self, eos_ids: Sequence[int], tokenizer=None, strings: Sequence[str] = ()):
        self.eos_ids, self.tokenizer, self.strings = eos_ids, tokenizer, strings
        self.wanted = [string.encode() for string in strings]
        self.written: dict[int, bytes] = {}  # by the number of the prompt
        self.stopped: set[int] = set()  # prompts whose text contains one of the strings

    def read(self, b: int, token: int) -> None:
        """Append this token to text b."""
        if self.strings:
            longest = max(map(len, self.wanted))
            new = self.tokenizer.decode_bytes([token])
            text = self.written.get(b, b"") + new
            if any(string in text[-(longest + len(new)) :] for string in self.wanted):
                self.stopped.add(b)
            self.written[b] = text

    def found(self, tokens: list[int]) -> bool:
        """Whether the text of these tokens contains one of the strings."""
        if not self.strings:
            return False
        text = self.tokenizer.decode_bytes(tokens)
        return any(string in text for string in self.wanted)

    def cut(self, text: str) -> str:
        """The text before the first of the strings."""
        return text[: min((at for s in self.strings if (at := text.find(s)) >= 0), default=None)]

    def cut_pieces(self, pieces: Iterator[str]) -> Iterator[str]:
        """`cut` for a text in pieces; holds back an end that may become one of the strings."""
        if not self.strings:
            yield from pieces
            return
        held, wait = "", max(map(len, self.strings)) - 1
        for piece in pieces:
            held += piece
            if len(self.cut(held)) < len(held):
                break
            if ready := held[: max(0, len(held) - wait)]:
                yield ready
                held = held[len(ready) :]
        if rest := self.cut(held):
            yield rest
