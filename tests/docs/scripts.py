"""Runs a script in a process of its own. This file imports nothing of the tests."""

import os
import runpy


def run_script(path: str, output: str) -> None:
    """Run a file as `python PATH` does; its output goes into the file `output`."""
    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    runpy.run_path(path, run_name="__main__")
