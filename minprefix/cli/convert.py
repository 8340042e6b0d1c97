"""The command `convert`: prefix files from other systems, and to PEFT (`prefix/convert.py`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from minprefix.cli.options import Common
from minprefix.prefix.convert import TARGETS, convert


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    # prefix file of ours, folder of PEFT or adapter-hub, folder or state dict of the authors' code
    # (GPT-2, BART)
    source: Positional[Path]
    to: Literal[*TARGETS]  # prefix file, or PEFT folder
    out: Path  # file or folder to write
    # base model, a name or a folder: the prefix is checked with it and bound to it (adapter-hub's
    # files and virtual tokens cannot be read without)
    model: str | None = None
    # token t stands at t + this; None = as it was trained: P with PEFT and the authors' code for
    # GPT-2, 0 with adapter-hub and for BART
    position_offset: int | None = None


def run(options: Options) -> dict:
    offset = options.position_offset
    return convert(options.source, options.to, options.out, options.model, offset)
