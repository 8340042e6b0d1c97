"""The command `download`: an official model into the hub's cache."""

from dataclasses import dataclass

from tyro.conf import Positional

from minprefix.cli.options import Common
from minprefix.models import weights


@dataclass(frozen=True, kw_only=True)
class Options(Common):
    name: Positional[str]  # gpt2, gpt2-medium, ..., or the name of any model of the two families


def run(options: Options) -> dict:
    return {"name": options.name, "folder": str(weights.fetch(options.name))}
