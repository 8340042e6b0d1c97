"""METEOR 1.5, computed by the original program, which needs Java; nothing is downloaded.

Read `meteor`. The program is the jar of the official evaluations [1]. The package pycocoevalcap [2]
contains the same file with its tables, and is used for nothing else. Without Java or the jar,
`why_unavailable` says so in one line, and METEOR is left out.
[1] https://www.cs.cmu.edu/~alavie/METEOR/   [2] https://github.com/salaniz/pycocoevalcap
"""

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


def _jar() -> Path | None:
    """MINPREFIX_METEOR if it is set, else the jar in pycocoevalcap if that is installed."""
    if named := os.environ.get("MINPREFIX_METEOR"):
        return Path(named)
    package = importlib.util.find_spec("pycocoevalcap")
    folders = (package and package.submodule_search_locations) or []
    return next((Path(f, "meteor", "meteor-1.5.jar") for f in folders), None)


def why_unavailable() -> str | None:
    """What METEOR needs but this machine does not have, in one line; None if it can run."""
    lacks = []
    if shutil.which("java") is None:
        lacks.append("Java (the command java)")
    jar = _jar()
    if jar is None:
        lacks.append("its jar (pip install -r requirements-meteor.txt)")
    elif not jar.is_file():
        lacks.append(f"its jar: {jar} is not a file")
    return f"METEOR is left out: it needs {' and '.join(lacks)}" if lacks else None


def _line(text: str) -> str:
    return re.sub(r"[\r\n]+", " ", text)


def meteor(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR of the corpus, from 0 to 1: English, exact, stem, synonym and paraphrase matches.

    Each output is compared with its best reference. The score is computed from the sums of all
    matches; it is not the mean of the outputs' scores. Options as in the official scripts: -l en
    -norm.

    Args:
        outputs, references: tokenised as in the script of the data set (METEOR adds its own -norm).
    Raises:
        OSError: Java or the jar is missing, or the program failed (2 GB of memory are needed).
    """
    if problem := why_unavailable():
        raise OSError(problem)
    jar = _jar().resolve()  # type: ignore[union-attr]
    most = max(len(texts) for texts in references)
    # The program reads `most` references for each output; empty ones match nothing.
    padded = [text for texts in references for text in [*texts, *[""] * (most - len(texts))]]
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "outputs"), Path(folder, "references")
        for path, texts in zip(files, (outputs, padded), strict=True):
            path.write_text("".join(_line(text) + "\n" for text in texts), encoding="utf-8")
        command = ["java", "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(jar), *map(str, files)]
        command += ["-l", "en", "-norm", "-r", str(most)]
        done = subprocess.run(command, cwd=jar.parent, capture_output=True, text=True)
    score = re.search(r"^Final score:\s+(\S+)", done.stdout, re.MULTILINE)
    if done.returncode or score is None:
        said = _line(done.stderr.strip())[-300:] or f"exit code {done.returncode}"
        raise OSError(f"METEOR ({jar}) failed: {said}")
    value = float(score[1])
    return value if value == value else 0.0  # NaN if there is no match at all
