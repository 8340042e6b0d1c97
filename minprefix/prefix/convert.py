"""Converts prefix files from and to other systems (`foreign.py`, `peft.py`).

Read `convert`. The system of a file is recognised from its contents.
"""

import re
import sys
from pathlib import Path
from typing import Any

from minprefix.checks import check_choice
from minprefix.files import read_json
from minprefix.models import hub, weights
from minprefix.models.bart import BART
from minprefix.models.gpt2 import GPT2
from minprefix.prefix.bart import BARTPrefix
from minprefix.prefix.card import PREFIX_FILE, write_card
from minprefix.prefix.config import SYSTEMS
from minprefix.prefix.files import load_prefix, save_prefix
from minprefix.prefix.foreign import (
    AuthorsTokens,
    read_adapters,
    read_authors,
    run_virtual_tokens,
)
from minprefix.prefix.peft import KINDS, read_peft, write_peft
from minprefix.prefix.prefix import Prefix
from minprefix.tensors import check_values

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def system_of(source: Path) -> str:
    """Which system made this file or folder: minprefix, peft, adapters or authors.

    Raises:
        ValueError: the folder belongs to none of them.
        OSError: it does not exist, or cannot be read.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if source.suffix == ".safetensors":
        return "minprefix"
    if not source.is_dir() or (source / "pytorch_model.bin").is_file():
        return "authors"
    path = source / "adapter_config.json"
    if not path.is_file() and (source / PREFIX_FILE).is_file():
        return "minprefix"
    if not path.is_file():
        raise ValueError(
            f"{source}: neither adapter_config.json (PEFT, adapter-hub) nor pytorch_model.bin "
            "(the authors' code) is in it"
        )
    return "peft" if "peft_type" in read_json(path) else "adapters"


def check_fit(source: Path, prefix: Prefix | BARTPrefix, model: Any) -> None:
    """ValueError naming the file if the model cannot use the prefix."""
    theirs = model.config.family
    if prefix.family != theirs:
        raise ValueError(f"{source}: a prefix of a {prefix.family}, but the model is a {theirs}")
    try:
        prefix.check_fit(model.config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def read_any(source: Path, model: GPT2 | BART | None = None) -> Prefix | BARTPrefix:
    """Read a prefix of any system, with `foreign.py` or `files.py`, and check it for `model`."""
    system = system_of(source)
    config: Any = None if model is None else model.config
    if system == "peft":
        prefix = read_peft(source)
    elif system == "adapters":
        prefix = read_adapters(source, config)
    elif system == "minprefix":
        prefix = load_prefix(source / PREFIX_FILE if source.is_dir() else source)
    else:
        prefix = read_authors(source, config)
    if isinstance(prefix, AuthorsTokens):
        if model is None and prefix.infix_table is None:
            raise ValueError(
                f"{source}: virtual tokens at the input (embedding-only): their keys and values "
                "come from the base model, which --model names"
            )
        try:
            prefix = run_virtual_tokens(model, prefix)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    check_values(source, prefix.tensors())  # an MLP may have computed them
    if model is not None:
        check_fit(source, prefix, model)
        prefix.check_base(model)
        prefix.bind(model)
    return prefix


def peft_frame_note(prefix: Prefix | BARTPrefix) -> str:
    """What a user of PEFT has to do, since PEFT puts no text into the frame that was trained."""
    source = '" " + source + " "' if prefix.linearisation == "original-code" else "source"
    cut = "" if prefix.max_source is None else f"[:{prefix.max_source}]"
    return (
        f"this prefix was trained on ids that PEFT does not make by itself: tokenizer({source})"
        f'["input_ids"]{cut} + [tokenizer.eos_token_id]; the text that follows begins with a blank'
        "; load the model with dtype=torch.float32 for the same texts as here (docs/recipes.md has "
        "the lines)"
    )


def find_source(source: str | Path) -> Path:
    """The file or folder of this name, or one from the hub, in its cache.

    Raises:
        OSError, ValueError: see `hub.download_prefix`.
    """
    path = Path(source).expanduser()
    if path.exists() or path.is_absolute() or not HUB_NAME.fullmatch(str(source)):
        return path
    if path.suffix in (".safetensors", ".bin", ".pt"):  # a file that is missing
        return path
    return hub.download_prefix(str(source))


def convert(
    source: str | Path, to: str, out: str | Path, model_name: str | None = None,
    position_offset: int | None = None,
) -> dict:  # fmt: skip
    """Read a prefix of any system and write it in the format `to`; returns a summary.

    Args:
        source: a file, a folder, or the name of such a folder on the hub.
        to: "minprefix" (a prefix file), "peft" or "cartridge" (PEFT's folders).
        model_name: base model with which the prefix is checked, and whose fingerprint it gets.
        position_offset: token t is at t + this; None = as in the source's system.
    """
    check_choice("to", to, SYSTEMS)
    if position_offset is not None and position_offset < 0:
        raise ValueError(f"position_offset must be >= 0, got {position_offset}")
    source, out = find_source(source), Path(out)
    model = None if model_name is None else weights.load(model_name)[0]
    prefix = read_any(source, model)
    notes = []
    if position_offset not in (None, prefix.position_offset):
        notes.append(
            f"token t is at t + {position_offset} instead of t + {prefix.position_offset}, so this "
            "is not what was trained"
        )
        prefix.position_offset = position_offset
        if model is not None:
            check_fit(source, prefix, model)
    if not prefix.base:
        notes.append(
            "without --model the prefix names no base model, so loading it checks only sizes"
        )
    if to in KINDS:
        # PEFT does not know the name mini, but can load its folder
        base = str(weights.find("mini")) if model_name == "mini" else model_name
        write_peft(out, prefix, base, KINDS[to])
        if not write_card(out, prefix, model_name, KINDS[to]):
            notes.append(f"{out} already has a README.md, which was not changed")
        if prefix.linearisation:
            notes.append(peft_frame_note(prefix))
    else:
        save_prefix(out, prefix)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return {
        "file": str(out), "prefix_len": prefix.prefix_len,
        "position_offset": prefix.position_offset, **prefix.sizes(), "base": prefix.base,
    }  # fmt: skip
