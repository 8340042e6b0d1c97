"""Runs a script in a process of its own. This file imports nothing of the tests."""

import os
import runpy


def run_script(path: str, told: str) -> None:
    """Run a file as `python PATH` does; what it prints goes into the file `told`."""
    with open(told, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    runpy.run_path(path, run_name="__main__")
