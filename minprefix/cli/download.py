"""The command `download`: downloads an official model into the hub's cache."""

from minprefix.cli.commands import DownloadOptions
from minprefix.models import weights


def run(options: DownloadOptions) -> dict:
    return {"name": options.name, "folder": str(weights.fetch(options.name))}
