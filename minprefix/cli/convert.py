"""The command `convert`: prefix files from other systems, and to PEFT (`prefix/convert.py`)."""

from minprefix.cli.commands import ConvertOptions
from minprefix.prefix.convert import convert


def run(options: ConvertOptions) -> dict:
    offset = options.position_offset
    return convert(options.source, options.to, options.out, options.model, offset)
