"""Writes the page of licences: python -m tools.licences (part of `make sbom`).

docs/guides/licences.md lists the packages that requirements.txt installs for every user, and those
that are also installed here for tests and docs. Licences are taken from the packages' metadata.
"""

import importlib.metadata as metadata
import re
from pathlib import Path

from packaging.requirements import Requirement

from minprefix.files import write_text

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "guides" / "licences.md"
HEAD = """# Licences

The licence of minprefix is in the file [LICENSE](../../LICENSE). Its models and data have
licences of their own, in their folders. This page lists the packages on which minprefix depends,
with the licences that they state. `make sbom` writes it, and also runs/sbom.json, which lists the
same packages for other programs (CycloneDX).
"""


def plain(name: str) -> str:
    """The name of a package as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def licence_of(package: metadata.Distribution) -> str:
    """The licence in a few words; "not named" if the package's metadata lack it."""
    said = package.metadata
    classed = [
        name.split("::")[-1].strip() for name in said.get_all("Classifier") or ()
        if name.startswith("License ::")
    ]  # fmt: skip
    all_said = (said.get("License-Expression"), said.get("License"), ", ".join(classed))
    texts = [one for one in all_said if one]  # some packages give the whole text of the licence
    short = [one for one in texts if len(one) <= 200 and "\n" not in one]
    return (short + [one.split("\n")[0] for one in texts] + ["not named"])[0]


def needed(requirements: Path) -> set[str]:
    """The packages that a file of requirements names, and all their requirements."""
    lines = (line.split("#")[0].strip() for line in requirements.read_text().splitlines())
    todo, found = [Requirement(line) for line in lines if line], set()
    while todo:
        one = todo.pop()
        if plain(one.name) in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        try:
            more = metadata.requires(one.name) or ()
        except metadata.PackageNotFoundError:
            continue
        found.add(plain(one.name))
        todo += map(Requirement, more)
    return found


def table(packages: list[metadata.Distribution]) -> str:
    """Name, version and licence of each."""
    rows = [
        f"| {one.name} | {one.version} | {licence_of(one)} |"
        for one in sorted(packages, key=lambda one: plain(one.name))
    ]
    return "\n".join(["| package | version | licence |", "|---|---|---|", *rows]) + "\n"


def page() -> str:
    """The whole page."""
    users = needed(ROOT / "requirements.txt")
    installed = {plain(one.name): one for one in metadata.distributions()}
    ours = table([one for name, one in installed.items() if name in users])
    others = table([one for name, one in installed.items() if name not in users])
    first = f"{HEAD}\n## Packages that a user installs\n\n{ours}"
    return f"{first}\n## Additional packages for tests and docs\n\n{others}"


if __name__ == "__main__":
    write_text(PAGE, page())
