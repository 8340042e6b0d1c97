"""The command `convert`: prefix files from other systems, and to PEFT (`prefix/convert.py`)."""

from minprefix.cli.commands import ConvertOptions
from minprefix.cli.options import FOREIGN_FILE, KEPT
from minprefix.prefix.convert import convert


def run(options: ConvertOptions) -> dict:
    """Convert one prefix; nothing that exists is overwritten."""
    offset, source = options.position_offset, options.source
    for there in (options.out, options.out / FOREIGN_FILE):
        if there.is_file():
            raise ValueError(f"{there} already exists: choose another --out, or delete it first")
    if (source / KEPT["prefix"]).is_file():  # a run folder
        source = source / KEPT["prefix"]
    return convert(source, options.to, options.out, options.model, offset)
