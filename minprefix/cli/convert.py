"""The command `convert`: converts prefix files from other systems, or to PEFT's format."""

from minprefix.cli.commands import ConvertOptions
from minprefix.cli.options import FOREIGN_FILE, KEPT
from minprefix.prefix.convert import convert


def run(options: ConvertOptions) -> dict:
    """Convert one prefix; never overwrites anything."""
    offset, source = options.position_offset, options.source
    for there in (options.out, options.out / FOREIGN_FILE):
        if there.is_file():
            raise ValueError(f"{there} already exists: choose another --out, or delete it first")
    if (source / KEPT["prefix"]).is_file():  # a run folder
        source = source / KEPT["prefix"]
    return convert(source, options.to, options.out, options.model, offset)
