"""Tests of the promises in RELIABILITY.md and SECURITY.md, and of the counts in them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks and reads /proc")
def test_what_reliability_counts(tmp_path):
    """A few of each; tests/reliability.py says what they are."""
    few = ["--kills", "4", "--flips", "5", "--races", "1", "--out", str(tmp_path / "rows.csv")]
    command = [sys.executable, "-m", "tests.reliability", *few]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert len(rows) == 7 and all("'failures': 0" in row for row in rows), done.stdout
    for row in rows[3:]:  # of several ranks
        summed, trained = map(int, re.findall(r"(\d+) bytes", row))
        assert 0 < summed - trained <= 16, row  # besides gradients: losses and the flag to stop


@pytest.mark.parametrize("name", ["RELIABILITY.md", "SECURITY.md"])
def test_the_tests_that_hold_the_promises_exist(name):
    """Each is named as path::function, and every promise names one."""
    text = (ROOT / name).read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 8
    for path, function in named:
        assert f"\ndef {function}(" in (ROOT / path).read_text("utf-8"), (path, function)
    promises = text.split("## What is not promised")[0].split("\n- ")[1:]
    assert [promise for promise in promises if "`tests/" not in promise] == []
