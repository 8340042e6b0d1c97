"""python -m benchmarks.paper"""

import sys
from collections.abc import Sequence

from benchmarks.paper import command
from minprefix.cli.main import execute


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    text = "A table or figure of the paper, run here: CSV, figure, and which claims hold."
    words = sys.argv[1:] if argv is None else argv
    return execute(command, words, "python -m benchmarks.paper", text)


if __name__ == "__main__":
    sys.exit(main())
