"""All bounds on the resources that a file, a stream or a server can make us use.

A file of a few bytes can demand much: through a length in its header, a compressed archive, or a
line that never ends. Each `Limit` is far above what honest data needs and far below what a machine
has. The error names the environment variable that changes the limit. Sizes that can be checked
exactly have no limit: the number of layers against the weights, a tensor against its storage, a
sequence of ids against the length of its file.
"""

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limit:
    """A bound that a user can set."""

    variable: str  # the environment variable
    usual: int
    unit: str  # completes "more than 5 ..."

    @property
    def value(self) -> int:
        """The limit; ValueError if the variable is not a whole number above 0."""
        text = os.environ.get(self.variable, "")
        if not text:
            return self.usual
        if not text.isdecimal() or len(text) > 18 or int(text) < 1:
            raise ValueError(f"{self.variable} must be a number >= 1, got {text[:40]!r}")
        return int(text)

    def check(self, found: float, where: object) -> None:
        """ValueError naming `where` and the variable if `found` exceeds the limit."""
        if found > (most := self.value):
            raise ValueError(
                f"{where}: more than {most:,} {self.unit} ({self.variable}=N allows N)"
            )


LINE = Limit("MINPREFIX_MAX_LINE", 2**24, "bytes in one line or cell")
TEXT = Limit("MINPREFIX_MAX_TEXT", 2**28, "bytes in a file that is read as a whole")
DATA = Limit("MINPREFIX_MAX_DATA", 2**32, "bytes of data")
RATIO = Limit("MINPREFIX_MAX_RATIO", 100, "bytes unpacked for each byte of the file")
BLANKS = Limit("MINPREFIX_MAX_BLANKS", 500_000, "blanks in a row")  # tiktoken fails at 1 million
BEAMS = Limit("MINPREFIX_MAX_BEAMS", 1000, "beams in a checkpoint's settings")
WIDTH = Limit("MINPREFIX_MAX_WIDTH", 2**16, "features or positions to train")
DOWNLOAD = Limit("MINPREFIX_MAX_DOWNLOAD", 2**34, "bytes from a server")
# for a pipe, or for each `PIECE` of a download: 1 KB/s
SILENCE = Limit("MINPREFIX_MAX_SILENCE", 60, "seconds of waiting for data")

PIECE = 2**16  # bytes
FREE = 2**26  # bytes that any archive may unpack to


def check_unpacked(path: Path, unpacked: int) -> None:
    """ValueError if an archive unpacks to too many bytes for its size."""
    if unpacked > FREE:
        RATIO.check(unpacked / max(1, path.stat().st_size), path)
