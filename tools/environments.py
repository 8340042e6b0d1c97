"""Runs a few tests with other versions of minprefix's requirements: `make environments`.

    python -m tools.environments                                 all that are available here
    python -m tools.environments --only "triton 3.8.0" --out environments.csv

A layer is another version of one package, in a separate folder (runs/environments/NAME) that comes
first on PYTHONPATH. An existing layer is used as it is; otherwise pip installs it. Another PyTorch
or Python needs a wheel of PyTorch without CUDA, which pip may not find; other Pythons on this
machine then only compile the sources. `TESTS` are run, with the Triton kernels in Triton's
interpreter. Each environment is a row of benchmarks/environments.csv, with the reason if nothing
was run; `python -m benchmarks.readme` copies the table to the guides.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.machine import add_row, machine

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ROOT / "runs" / "environments"
CSV = ROOT / "benchmarks" / "environments.csv"
TESTS = (
    "tests/kernels/test_layer_norm.py", "tests/kernels/test_few_rows.py",
    "tests/kernels/test_merge.py", "tests/data/test_batches.py", "tests/prefix/test_checksums.py",
    "tests/models/test_losses.py",
)  # fmt: skip
HERE, NONE = "requirements.txt", "without triton"
# the interpreter of Triton 3.6.0 uses an array of one element as a number, which NumPy 2.4 rejects
PACKAGES = (
    "triton 3.6.0, numpy 1.26.4", "triton 3.7.1", "triton 3.8.0", "triton 3.9.0", "numpy 1.26.4",
)  # fmt: skip
TORCH, PYTHONS = "torch 2.11.0", ("python 3.12", "python 3.13")
VERSIONS = """
import platform, torch, numpy
try:
    import triton
    version = triton.__version__
except ImportError:
    version = "none"
print(platform.python_version(), torch.__version__, version, numpy.__version__)
"""


def pip(*words: str) -> str:
    """Run pip; returns the last line of its error, or ""."""
    command = [sys.executable, "-m", "pip", *words, "--no-deps", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"pip: {done.stderr.strip().splitlines()[-1]}"


def layer_of(package: str) -> tuple[Path, str]:
    """The folder of a layer, created if necessary, and why it could not be created, or ""."""
    folder = LAYERS / package.replace(" ", "-")
    if folder.is_dir():
        return folder, ""
    if package == NONE:
        folder.mkdir(parents=True)
        missing = "raise ModuleNotFoundError(\"No module named 'triton'\", name='triton')\n"
        (folder / "triton.py").write_text(missing)
        return folder, ""
    wanted = package.replace(" ", "==") + ("+cpu" if package == TORCH else "")
    if problem := pip("install", wanted, "--target", str(folder)):
        shutil.rmtree(folder, ignore_errors=True)
        return folder, f"pip has no wheel {wanted}" if package == TORCH else problem
    return folder, ""


def tested(layers: list[Path]) -> dict[str, str | int]:
    """Run the tests with layers; returns versions and the numbers of passed, failed and skipped."""
    path = os.pathsep.join(map(str, (*layers, ROOT)))
    interpreted = "0" if LAYERS / NONE.replace(" ", "-") in layers else "1"
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": interpreted}

    def run(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *words]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)

    versions = run("-c", VERSIONS)
    if versions.returncode:
        return {"note": versions.stderr.strip().splitlines()[-1]}
    row: dict[str, str | int] = dict(
        zip(("python", "torch", "triton", "numpy"), versions.stdout.split(), strict=True)
    )
    report = run("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *TESTS).stdout
    for what in ("passed", "failed", "skipped", "error"):
        found = re.search(rf"(\d+) {what}", report.splitlines()[-1])
        row[what] = int(found[1]) if found else 0
    return row


def compiled(name: str) -> dict[str, str | int]:
    """Compile the sources with another Python."""
    version = name.split()[1]
    found = [shutil.which(f"python{version}")]
    found += map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for interpreter in filter(None, found):
        command = [interpreter, "-c", "import platform; print(platform.python_version())"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode == 0:  # a shim of pyenv may not work
            break
    else:
        return {"note": "this Python is not on this machine"}
    row: dict[str, str | int] = {"python": answer.stdout.strip()}
    code = (
        "import ast, pathlib, sys; [ast.parse(pathlib.Path(p).read_bytes()) for p in sys.argv[1:]]"
    )
    files = [str(p) for name in ("kernels", "minprefix") for p in (ROOT / name).rglob("*.py")]
    done = subprocess.run([interpreter, "-W", "error", "-c", code, *files], capture_output=True)
    can = "can be parsed" if done.returncode == 0 else "cannot be parsed"
    return row | {"note": f"{len(files)} sources {can}; no tests: it has no PyTorch here"}


def main() -> None:
    names = (HERE, *PACKAGES, NONE, TORCH, *PYTHONS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=names, default=names, metavar="NAME")
    parser.add_argument("--out", type=Path, default=CSV)
    args = parser.parse_args()
    failed = 0
    for name in args.only:
        row: dict[str, str | int] = {"environment": name}
        row |= dict.fromkeys(("python", "torch", "triton", "numpy"), "")
        row |= dict.fromkeys(("passed", "failed", "skipped", "error", "note"), "")
        if name in PYTHONS:
            row |= compiled(name)
        else:
            layers = [layer_of(one) for one in name.split(", ") if name != HERE]
            problems = [problem for _, problem in layers if problem]
            row |= {"note": problems[0]} if problems else tested([layer for layer, _ in layers])
        add_row(args.out, row | {"commit": machine()["commit"]}, ("environment",))
        print(row, flush=True)
        failed += bool(row["failed"] or row["error"])
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
