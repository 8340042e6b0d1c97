"""What ends a text, and words that must not come: by tokens and by what they say.

A stop string may begin and end within tokens, so it is looked for in the text; a word that must not
come is forbidden as the tokens that it is written with. Read `Stopping`.
"""

from collections.abc import Iterator, Sequence

from minprefix.models.base import LanguageModel


def end_ids(model: LanguageModel, tokenizer, framed: bool) -> tuple[int, ...]:
    """The tokens that end a text: the model's, and in a frame that was trained the tokenizer's,
    with which the texts of training ended."""
    ids = [*model.config.eos_ids, *([tokenizer.eos_id] if framed else [])]
    return known_ids(ids, model.config.vocab_size)


def known_ids(ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Those that a model of so many tokens has, each once."""
    return tuple(dict.fromkeys(token_id for token_id in ids if 0 <= token_id < vocab_size))


def word_ids(tokenizer, words: Sequence[str]) -> list[list[int]]:
    """The tokens of words as they begin a text and as they follow a blank, which are others."""
    forms = [form for word in words for form in (word, f" {word}"[word[0].isspace() :])]
    return [tokenizer.encode(form) for form in dict.fromkeys(forms)]


class Stopping:
    """What ends a text, tokens and strings, and the texts of a batch so far."""

    def __init__(self, eos_ids: Sequence[int], tokenizer=None, strings: Sequence[str] = ()):
        self.eos_ids, self.tokenizer, self.strings = eos_ids, tokenizer, strings
        self.wanted = [string.encode() for string in strings]
        self.written: dict[int, bytes] = {}  # by the number of the prompt
        self.stopped: set[int] = set()  # prompts whose text holds one of the strings

    def read(self, b: int, token: int) -> None:
        """Text b goes on with this token."""
        if self.strings:
            longest = max(map(len, self.wanted))
            new = self.tokenizer.decode_bytes([token])
            text = self.written.get(b, b"") + new
            if any(string in text[-(longest + len(new)) :] for string in self.wanted):
                self.stopped.add(b)
            self.written[b] = text

    def found(self, tokens: list[int]) -> bool:
        """Whether the text of these tokens holds one of the strings."""
        if not self.strings:
            return False
        text = self.tokenizer.decode_bytes(tokens)
        return any(string in text for string in self.wanted)

    def cut(self, text: str) -> str:
        """What stands before the first of the strings."""
        return text[: min((at for s in self.strings if (at := text.find(s)) >= 0), default=None)]

    def cut_pieces(self, pieces: Iterator[str]) -> Iterator[str]:
        """`cut` of a text that comes in pieces: what may become one of the strings waits."""
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
