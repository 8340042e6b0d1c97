"""The API reference: a page for each public module, made from its docstrings, and an overview."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
GROUPS = {  # heading: packages
    "Models": ["minprefix.models"],
    "Prefixes": ["minprefix.prefix"],
    "Data": ["minprefix.data"],
    "Training": ["minprefix.training"],
    "Texts": ["minprefix.generation"],
    "Scores": ["minprefix.metrics"],
    "What the paper compares with": ["minprefix.methods"],
    "Kernels": ["kernels"],
}
LEFT_OUT = re.compile(r"kernels\.tools|.*\.__main__")
NAMES = {  # the important names of the two packages, and the module that defines each
    "minprefix": [
        "minprefix.models.weights.load",
        "minprefix.generation.texts.generate",
        "minprefix.prefix.prefix.Prefix",
        "minprefix.prefix.bank.PrefixBank",
        "minprefix.prefix.bart.BARTPrefix",
        "minprefix.models.gpt2.GPT2",
        "minprefix.models.bart.BART",
        "minprefix.models.config.GPT2Config",
        "minprefix.models.config.BARTConfig",
        "minprefix.training.trainer.Trainer",
    ],
    "kernels": [
        "kernels.prefix_attention",
        "kernels.prefix_attention_qkv",
        "kernels.reference.prefix_attention_eager",
        "kernels.reference.prefix_attention_lean",
        "kernels.cross_entropy_",
        "kernels.add_norm",
        "kernels.fused_linear",
        "kernels.linear_parts",
        "kernels.fuses",
        "kernels.why_not",
    ],
}


def modules() -> list[str]:
    """The public modules, by name."""
    paths = [path for name in NAMES for path in (ROOT / name).rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    names = [name.removesuffix(".__init__") for name in names if ".assets" not in name]
    return sorted(name for name in names if not LEFT_OUT.match(name))


def grouped() -> dict[str, list[str]]:
    """{heading: modules}; modules that are not in GROUPS are in the last group."""
    names = [name for name in modules() if name not in NAMES]
    groups = {"Start": list(NAMES)}
    for heading, packages in GROUPS.items():
        inside = tuple(f"{package}." for package in packages)
        groups[heading] = [n for n in names if n in packages or n.startswith(inside)]
    taken = {name for members in groups.values() for name in members}
    groups["Command line and the rest"] = [name for name in names if name not in taken]
    return groups


def source_of(module: str) -> ast.Module:
    """The syntax tree of a module."""
    path = ROOT / Path(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))


def first_paragraph(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())


def described(target: str) -> str:
    """The first paragraph of the docstring of `target`, a function or class of a module."""
    module, name = target.rsplit(".", 1)
    return next(
        first_paragraph(n) for n in source_of(module).body if getattr(n, "name", "") == name
    )


def cell(text: str) -> str:
    """Text for a Markdown table: without bars, line ends, and Markdown other than code."""
    text = text.replace("\n", " ").replace("|", r"\|").replace("*", r"\*").replace("<", "&lt;")
    return text.replace("{", "&#123;").replace("[", r"\[").replace("$", r"\$")


def api_pages() -> dict[str, str]:
    """A page per module and one that lists them."""
    lines = ["# API reference", "", "Every public module, from its docstrings.", ""]
    lines += ["```{include} ../../CONTRIBUTING.md", ":start-after: '## Letters'"]
    lines += [":end-before: '## How a change is checked'", "```", ""]
    pages = {}
    for heading, members in grouped().items():
        lines += [f"## {heading}", ""]
        for name in members:
            lines.append(f"- [`{name}`]({name}.md): {cell(first_paragraph(source_of(name)))}")
        lines += [""]
        pages |= {f"api/{name}.md": module_page(name) for name in members}
    names = [name for members in grouped().values() for name in members]
    lines += ["```{toctree}", ":hidden:", "", *names, "```", ""]
    return pages | {"api/index.md": "\n".join(lines)}


def module_page(name: str) -> str:
    """A module's page: its docstring, then its public names in the order of the source.

    The two packages have a table of the important names, then the names that they define.
    """
    lines = [f"# {name}", "", "```{eval-rst}", f".. automodule:: {name}"]
    if name in NAMES:
        lines += ["   :no-members:", "```", "", "| name | what it is |", "|---|---|"]
        for target in NAMES[name]:
            short = target.rsplit(".", 1)[1]
            lines.append(f"| {{py:obj}}`{short} <{target}>` | {cell(described(target))} |")
        own = [target for target in NAMES[name] if target.count(".") == 1]
        lines += ["", "```{eval-rst}", *(f".. autofunction:: {target}" for target in own)]
    return "\n".join([*lines, "```", ""])
