"""Reads a checkpoint's tokenizer files, in both forms that exist on the hub.

tokenizer.json [1] holds everything: the vocabulary, the merges, the added tokens. The other form is
vocab.json and merges.txt, with added_tokens.json and tokenizer_config.json for added tokens. In
both forms, tokenizer_config.json or special_tokens_map.json names the tokens before and after a
text. Read `read`.
[1] https://huggingface.co/docs/tokenizers
"""

from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minprefix.files import brief, names_file, read_json, read_text
from minprefix.models.tokenizer import BYTE_CHARS, ROLES, SPECIAL, Added, Tokenizer

FLAGS = ("special", "lstrip", "rstrip", "single_word")
# in all families, text is never encoded as these
KEPT_OUT = {"<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>"}


@names_file
def read(folder: Path, family: str, ids: Sequence[int | None]) -> Tokenizer:
    """The tokenizer of a folder; errors and arguments are those of `Tokenizer.from_folder`."""
    named = _read_special_names(folder)
    path = folder / "tokenizer.json"
    if path.is_file():
        raw = read_json(path)
        vocab, lines = _byte_level_bpe(path, raw)
        listed = raw.get("added_tokens") or []
    else:
        path = folder / "vocab.json"
        if not path.is_file() and not (folder / "merges.txt").is_file():
            raise FileNotFoundError(
                f"{folder}: no tokenizer: neither tokenizer.json nor vocab.json and merges.txt"
            )
        vocab, lines = read_json(path), None
        listed = _read_added_tokens(folder)
    added, base = {}, set(vocab)
    for token in listed:
        if (
            not isinstance(token, dict)
            or type(token.get("id")) is not int
            or not isinstance(token.get("content"), str)
        ):
            raise ValueError(
                f"{path}: {brief(token)} is not an added token with an id and a content"
            )
        content = token["content"]
        if vocab.setdefault(content, token["id"]) != token["id"]:
            raise ValueError(
                f"{path}: {brief(content)} has the ids {brief(vocab[content])} and {token['id']}"
            )
        added[content] = Added(content, **{flag: bool(token.get(flag)) for flag in FLAGS})
    _check_vocab(path, vocab, added)
    special = _special(path, vocab, family, named, ids)
    if lines is None:
        merges = _read_merges(folder / "merges.txt", vocab)
    else:
        merges = _pairs(path, [(f"merge {n}", line) for n, line in enumerate(lines, 1)], vocab)
    out = {*KEPT_OUT, *special, *named.values()}
    tokens = [replace(t, control=t.content in out) for t in added.values() if t.content]
    tokens = [token for token in tokens if not (token.control and token.content in base)]
    as_usual = special == SPECIAL[family]
    return Tokenizer(vocab, merges, family, None if as_usual else special, tokens)


def _byte_level_bpe(path: Path, raw: dict[str, Any]) -> tuple[dict[str, int], list]:
    """Vocabulary and merges of tokenizer.json; ValueError if it is of another kind."""
    model, before = raw.get("model"), raw.get("pre_tokenizer") or {}
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "merges" not in model:
        kind = model.get("type") if isinstance(model, dict) else None
        raise ValueError(f"{path}: a tokenizer of type {brief(kind)}; supported: 'BPE'")
    if not isinstance(model.get("vocab"), dict) or not isinstance(model["merges"], list):
        raise ValueError(f"{path}: model has no vocab and merges")
    wanted = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    steps = before.get("pretokenizers", [before]) if isinstance(before, dict) else [before]
    for step in steps if isinstance(steps, list) and len(steps) == 1 else [steps]:
        odd = {k: step.get(k, v) if isinstance(step, dict) else None for k, v in wanted.items()}
        if odd != wanted:
            raise ValueError(f"{path}: pre_tokenizer is {brief(step)}; supported: {wanted}")
    if raw.get("normalizer") is not None:
        raise ValueError(f"{path}: normalizer is {brief(raw['normalizer'])}; supported: none")
    lines = [line.split(" ") if isinstance(line, str) else line for line in model["merges"]]
    return dict(model["vocab"]), lines


def _read_added_tokens(folder: Path) -> list[dict[str, Any]]:
    """The added tokens of added_tokens.json, with their flags from tokenizer_config.json."""
    path, config = folder / "added_tokens.json", folder / "tokenizer_config.json"
    flags = read_json(config).get("added_tokens_decoder") if config.is_file() else {}
    listed: dict[Any, dict[str, Any]] = {
        token.get("content"): {"id": int(token_id) if token_id.isdecimal() else None} | token
        for token_id, token in (flags or {}).items()
        if isinstance(token, dict)
    }
    for content, token_id in (read_json(path) if path.is_file() else {}).items():
        listed.setdefault(content, {"content": content, "id": token_id})
    return list(listed.values())


def _read_special_names(folder: Path) -> dict[str, str]:
    """The special tokens that the files name, by their roles."""
    named = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second wins
        raw = read_json(folder / name) if (folder / name).is_file() else {}
        for role in ROLES:
            token = raw.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                named[role] = token
    return named


def _special(
    path: Path, vocab: dict[str, int], family: str, named: dict[str, str],
    ids: Sequence[int | None],
) -> tuple[str, ...]:  # fmt: skip
    """The tokens before a text, after it and in padding; a GPT-2 pads with the end token."""
    texts, special = {token_id: text for text, token_id in vocab.items()}, []
    for role, usual, token_id in zip(ROLES, SPECIAL[family], ids, strict=False):
        if role == "pad_token" and family == "gpt2":
            special.append(special[1])
            continue
        candidates = [named.get(role), usual, texts.get(token_id) if token_id is not None else None]
        there = [token for token in candidates if token is not None and token in vocab]
        if not there:
            raise ValueError(f"{path}: no token {brief(candidates[0] or usual)}")
        special.append(there[0])
    return tuple(special)


def _check_vocab(path: Path, vocab: dict[str, int], added: Container[str]) -> None:
    """ValueError for an invalid id, an id of two tokens, or a byte without a token."""
    owner: dict[int, str] = {}
    for token, token_id in vocab.items():
        # if a model was padded before tokens were added, these have larger ids
        size = 2 * len(vocab) + 1024 if token in added else len(vocab)
        if type(token_id) is not int or not 0 <= token_id < size:
            told = f"the file has {len(vocab)} tokens"
            raise ValueError(f"{path}: token {brief(token)} has id {brief(token_id)}, but {told}")
        if token_id in owner:
            raise ValueError(
                f"{path}: {brief(owner[token_id])} and {brief(token)} share the id {token_id}"
            )
        owner[token_id] = token
    for token in BYTE_CHARS:
        if token not in vocab:
            raise ValueError(f"{path}: no token {brief(token)}")


def _read_merges(path: Path, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The pairs of merges.txt in order."""
    lines = []
    for number, text in enumerate(read_text(path).split("\n"), start=1):
        line = text.removesuffix("\r")
        if line and not (number == 1 and line.startswith("#version")):
            lines.append((str(number), line.split(" ")))
    return _pairs(path, lines, vocab)


def _pairs(path: Path, lines: list[tuple[str, Any]], vocab: dict[str, int]):
    """Pairs of tokens, which may consist of bytes and the results of earlier pairs."""
    merges, known = [], set(BYTE_CHARS)
    for where, line in lines:
        pair = tuple(line) if isinstance(line, list) else ()
        if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            told = " ".join(map(str, line)) if isinstance(line, list) else line
            raise ValueError(
                f"{path}:{where}: expected two tokens and a space, found {brief(told)}"
            )
        for part in pair:
            if part not in known:
                raise ValueError(
                    f"{path}:{where}: {brief(part)} is neither a byte nor made by an earlier line"
                )
        token = pair[0] + pair[1]
        if token not in vocab:
            file = path.name.replace("merges.txt", "vocab.json")
            raise ValueError(f"{path}:{where}: {brief(token)} is not in {file}")
        known.add(token)
        merges.append(pair)
    return merges
