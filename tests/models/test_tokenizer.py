"""The tokenizer against transformers' GPT-2 tokenizer, and its other guarantees."""

import json
import random
import re

import pytest
from transformers import GPT2Tokenizer

from minprefix.models.tokenizer import BYTE_CHARS, Tokenizer
from minprefix.models.weights import ASSETS

MINI = ASSETS / "mini"
NASTY = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n\t \r\n x\u00a0y\u3000z\u0085",
    "I'll we've he's they'd I'M 'S ''s don't",
    "123456 ١٢٣ ½ 四五",
    "name : The Eagle | food : Chinese",
    "naïve café e\u0301 ﬁ ß İi",
    "👩‍👩‍👧‍👦 🏳️‍🌈 \u200d\ufe0f",
    "日本語テキスト العربية हिन्दी ไทย",
    "\x00\x01\x7f\u0080\ufeff\ufffd\uffff\U0010ffff",
    "a" * 3000 + " " * 3000 + "!" * 3000 + "\n" * 3000,
    "<|endoftext", "|endoftext|>", "<s></s><pad>",
]  # fmt: skip


def random_text(rng: random.Random) -> str:
    """Up to 30 characters of the whole of Unicode, with ASCII and spaces more often."""
    spaces = [0x20, 0x0A, 0x09, 0x85, 0xA0, 0x3000, 0x27]
    points = (
        rng.choice([rng.randrange(limit) for limit in (0x80, 0x800, 0x10000, 0x110000)] + spaces)
        for _ in range(rng.randint(0, 30))
    )
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    return NASTY + [random_text(rng) for _ in range(count)]


def permuted(tokenizer: Tokenizer, folder) -> Tokenizer:
    """The same tokens under other ids, with special tokens in between, as in BART."""
    vocab = json.loads(tokenizer.files()["vocab.json"])
    tokens = [*vocab, "<s>", "<pad>"]
    random.Random(1).shuffle(tokens)
    files = tokenizer.files() | {"vocab.json": json.dumps({t: i for i, t in enumerate(tokens)})}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return Tokenizer.from_folder(folder)


def test_ids_equal_those_of_transformers(tokenizer):
    strings = texts(10_000)
    expected = GPT2Tokenizer.from_pretrained(MINI)(strings)["input_ids"]
    for text, ids in zip(strings, expected, strict=True):
        assert tokenizer.encode(text) == ids, ascii(text)
        assert tokenizer.decode(ids) == text


def test_ids_that_differ_from_merge_order_equal_those_of_transformers(tokenizer, tmp_path):
    ours = permuted(tokenizer, tmp_path)
    strings = [text for text in texts(2_000) if "<" not in text]  # <s> is special to both
    expected = GPT2Tokenizer.from_pretrained(tmp_path)(strings)["input_ids"]
    for text, ids in zip(strings, expected, strict=True):
        assert ours.encode(text) == ids, ascii(text)
        assert ours.decode(ids) == text
    assert ours.encode("the food") != tokenizer.encode("the food")
    assert ours.vocab_size == tokenizer.vocab_size + 2
    assert ours.eos_id == json.loads((tmp_path / "vocab.json").read_text())["<|endoftext|>"]


def test_special_tokens_in_text_are_text(tokenizer):
    text = "a<|endoftext|>b"
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_id == tokenizer.eos_id == 8191
    assert tokenizer.decode([tokenizer.eos_id, *ids, tokenizer.eos_id]) == text


def test_a_stream_holds_back_half_characters(tokenizer):
    for text in texts(200):
        ids = tokenizer.encode(text)
        pieces = list(tokenizer.decode_stream(iter(ids)))
        assert "".join(pieces) == text
        assert "" not in pieces
        assert tokenizer.decode_bytes(ids) == text.encode()


def test_broken_bytes_are_replaced(tokenizer):
    ids = tokenizer.encode("👍")[:-1]
    assert tokenizer.decode(ids) == "".join(tokenizer.decode_stream(ids)) == "\ufffd"


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(ValueError, match="lone surrogate U\\+DC80 at character 2"):
        tokenizer.encode("ab\udc80")


@pytest.mark.parametrize("token_id", [-1, 8192])
def test_unknown_ids_are_refused(tokenizer, token_id):
    with pytest.raises(ValueError, match=f"token id {token_id} is not in 0 ... 8191"):
        tokenizer.decode([1, token_id])


def test_save_writes_what_transformers_loads(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    theirs = GPT2Tokenizer.from_pretrained(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    assert theirs.eos_token_id == again.eos_id == tokenizer.eos_id
    for text in texts(100):
        assert tokenizer.encode(text) == again.encode(text) == theirs(text)["input_ids"]
    (tmp_path / "merges.txt").write_bytes(
        (MINI / "merges.txt").read_bytes().replace(b"\n", b"\r\n")
    )
    assert Tokenizer.from_folder(tmp_path).encode("the food") == tokenizer.encode("the food")


@pytest.mark.parametrize("vocab_size", [257, 258, 600])
def test_a_trained_tokenizer_gives_the_ids_of_transformers(tmp_path, vocab_size):
    """On all of Unicode, and on what it was trained on."""
    rng = random.Random(2)
    known = [random_text(rng) for _ in range(300)] + ["the pub by the river, " * n for n in (1, 9)]
    trained = Tokenizer.train(known, vocab_size)
    assert trained.files() == Tokenizer.train(iter(known), vocab_size).files()
    trained.save(tmp_path)
    again, theirs = Tokenizer.from_folder(tmp_path), GPT2Tokenizer.from_pretrained(tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert vocab["!"] == 0 and again.eos_id == theirs.eos_token_id == vocab_size - 1
    strings = known + texts(700)
    for text, ids in zip(strings, theirs(strings)["input_ids"], strict=True):
        assert trained.encode(text) == again.encode(text) == ids, ascii(text)
        assert again.decode(ids) == text
    if vocab_size == 600:
        assert len(again.encode(" river")) == 1


def test_too_few_or_too_many_tokens_to_train(tmp_path):
    with pytest.raises(ValueError, match="vocab_size must be at least 257 .* got 256"):
        Tokenizer.train(["text"], 256)
    assert Tokenizer.train(["ab ab ab"], 1000).vocab_size == 256 + 2 + 1  # "ab", " ab"


BYTES = {char: n for n, char in enumerate(BYTE_CHARS)}
GOOD = {**BYTES, "ab": 256, "<|endoftext|>": 257}
BAD_FILES = {
    "no JSON": ('{"a": 0,\n', "a b\n", "vocab.json:2: not valid JSON"),
    "no object": ("[]", "a b\n", "vocab.json: holds a JSON list"),
    "no number": ({**GOOD, "ab": "x"}, "a b\n", "vocab.json: token 'ab' has id 'x'"),
    "gap": ({**GOOD, "ab": 300}, "a b\n", "vocab.json: token 'ab' has id 300, .* 258 tokens"),
    "twice": ({**GOOD, "ab": 0}, "a b\n", "vocab.json: 'Ā' and 'ab' share the id 0"),
    "no byte": ({"a": 0, "<|endoftext|>": 1}, "", "vocab.json: no token 'Ā'"),
    "no end": (BYTES, "", "vocab.json: no token '<|endoftext|>'"),
    "three": (GOOD, "#version: 0.2\na b\na b c\n", "merges.txt:3: expected two tokens"),
    "one": (GOOD, "ab\n", "merges.txt:1: expected two tokens .* found 'ab'"),
    "later": (GOOD, "a b\nabc a\n", "merges.txt:2: 'abc' is neither a byte nor made by an"),
    "no id": (GOOD, "a b\nb a\n", "merges.txt:2: 'ba' is not in vocab.json"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_malformed_files_are_named_with_their_line(tmp_path, case):
    vocab, merges, message = BAD_FILES[case]
    vocab = vocab if isinstance(vocab, str) else json.dumps(vocab)
    (tmp_path / "vocab.json").write_text(vocab, encoding="utf-8")
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    with pytest.raises(ValueError, match=message.replace("|", re.escape("|"))) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_files_with_invalid_utf8_or_missing_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="vocab.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(GOOD), encoding="utf-8")
    (tmp_path / "merges.txt").write_bytes(b"a b\n\xff c\n")
    with pytest.raises(ValueError, match="merges.txt:2: invalid UTF-8"):
        Tokenizer.from_folder(tmp_path)
