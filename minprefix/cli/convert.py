"""The command `convert`: prefix files from other systems, and to PEFT (`prefix/convert.py`)."""

from minprefix.cli.commands import ConvertOptions
from minprefix.cli.options import KEPT
from minprefix.prefix.convert import convert


def run(options: ConvertOptions) -> dict:
    offset, source = options.position_offset, options.source
    if (source / KEPT["prefix"]).is_file():  # a run folder
        source = source / KEPT["prefix"]
    return convert(source, options.to, options.out, options.model, offset)
