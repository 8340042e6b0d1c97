"""python -m benchmarks.peft"""

import sys
from collections.abc import Sequence

from benchmarks.peft import command
from minprefix.cli.main import execute


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    text = "Time training steps or generation, beside transformers + PEFT where installed."
    words = sys.argv[1:] if argv is None else argv
    return execute(command, words, "python -m benchmarks.peft", text)


if __name__ == "__main__":
    sys.exit(main())
