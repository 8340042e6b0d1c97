"""The recipes of the docs: each block of Python runs, each command has the options it names."""

import importlib.util
import io
import re
import shlex
import sys

import pytest

import minprefix
from docs.pages import DOCS
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


def test_commands_have_the_options():
    """Words that a command does not know end it with a usage error."""
    lines = [line for blocks in BLOCKS.values() for kind, text in blocks if kind == "bash"
             for line in text.splitlines()]  # fmt: skip
    assert len(lines) > 5
    for line in lines:
        start, (name, *words) = line[:20], shlex.split(line)[3:]
        assert start == "python -m minprefix "
        COMMANDS[name].parse(tuple(words), "recipes.md", "")


def test_the_page_is_on_the_site():
    from docs import conf

    assert "recipes.md" in conf.include_patterns
    assert re.search(r"^recipes$", (DOCS / "index.md").read_text(), re.M)
