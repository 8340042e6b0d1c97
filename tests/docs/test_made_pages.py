"""The page of licences and the table of environments, which scripts generate."""

import subprocess
import sys

from tools import environments, licences


def test_the_licences_are_of_what_a_user_installs():
    """A new version in requirements.txt: run `make sbom`."""
    ours, others = licences.PAGE.read_text(encoding="utf-8").split(
        "## Additional packages for tests and docs"
    )
    rows = [line.split(" | ") for line in ours.splitlines() if line.startswith("| ")][1:]
    versions = {licences.plain(row[0].strip("| ")): row[1].split("+")[0] for row in rows}
    for line in (licences.ROOT / "requirements.txt").read_text().splitlines():
        if "==" in line:
            name, version = line.split(";")[0].split("==")
            assert versions[licences.plain(name)] == version
    assert "| pytest |" in others and "not named" not in ours


def test_an_environment_without_triton_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "LAYERS", tmp_path)
    folder, problem = environments.layer_of(environments.NONE)
    assert problem == ""
    done = subprocess.run(
        [sys.executable, "-c", "import triton"], env={"PYTHONPATH": str(folder)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "ModuleNotFoundError: No module named 'triton'" in done.stderr


def test_another_python_parses_the_sources(monkeypatch):
    here = "python " + ".".join(map(str, sys.version_info[:2]))
    assert environments.compiled("python 9.9") == {"note": "this Python is not on this machine"}
    monkeypatch.setattr(environments.shutil, "which", lambda name: sys.executable)
    assert " sources can be parsed;" in environments.compiled(here)["note"]
