"""The recipes: each block of Python runs. In all guides, each command has the named options."""

import importlib.util
import io
import re
import shlex
import sys

import pytest

import minprefix
from docs.pages import DOCS, ROOT
from minprefix.cli.commands import COMMANDS

PAGE = (DOCS / "recipes.md").read_text(encoding="utf-8")
BLOCKS = {
    title: re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for title, text in (part.split("\n", 1) for part in PAGE.split("\n## ")[1:])
}
PACKAGES = ("peft", "transformers", "fastapi", "httpx")  # that a recipe may need
NEEDS = {"An endpoint with FastAPI": ("fastapi", "httpx")}  # httpx: of FastAPI's test client


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder in which runs/NAME holds a prefix; the words that it starts from do for a text."""
    model, tokenizer = minprefix.load("mini")
    folder = tmp_path_factory.mktemp("recipes")
    for name, words in {"mine": "table-to-text:", "ada": "brief:", "ben": "a long text:"}.items():
        prefix = minprefix.Prefix.from_words(model, tokenizer, words)
        prefix.linearisation = "paper"
        (folder / "runs" / name).mkdir(parents=True)
        prefix.save(folder / "runs" / name / "prefix.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("title", [t for t, blocks in BLOCKS.items() if "python" in dict(blocks)])
def test_a_recipe_runs(title, runs, monkeypatch, capsys):
    code = [text for kind, text in BLOCKS[title] if kind == "python"]
    used = {
        name for name in PACKAGES if re.search(rf"^(from|import) {name}\b", "".join(code), re.M)
    }
    for name in sorted(used | {*NEEDS.get(title, ())}):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (requirements-dev.txt)")
    monkeypatch.chdir(runs)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Do you have fish?\nHow much is it?\n"))
    names = {"__name__": "recipe"}
    for number, text in enumerate(code):
        exec(compile(text, f"recipes.md: {title}, block {number + 1}", "exec"), names)
    assert capsys.readouterr().out.strip() or "KV cache" in title


@pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", *DOCS.glob("*.md"), *DOCS.glob("guides/*.md")],
    ids=lambda p: p.name,
)
def test_commands_have_the_options(path):
    """Words that a command does not know end it with a usage error."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [line.split(" -m minprefix ")[1] for line in lines if " -m minprefix " in line]
    assert len(commands) > 5 or path.name not in ("README.md", "recipes.md", "official_models.md")
    for command in commands:
        name, *words = shlex.split(command, comments=True)
        if name != "--help":
            COMMANDS[name].parse(tuple(words), path.name, "")


def test_the_page_is_on_the_site():
    pytest.importorskip("jupyter_cache", reason="needs requirements-docs.txt")
    from docs import conf

    assert "recipes.md" in conf.include_patterns
    assert re.search(r"^recipes$", (DOCS / "index.md").read_text(), re.M)
