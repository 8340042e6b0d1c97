"""Generates pages of the site from files, and prepares the tutorials for it.

Before Sphinx reads its sources, `write_all` makes `docs/api/` (`reference.py`), `docs/results/`
(from the committed CSVs), `docs/solutions/` and `docs/tutorials/`, copies that end with how to run
the script. Git ignores all four. Links in tutorials and guides work in a checkout; `site_links`
converts them for the site.
"""

import csv
import hashlib
import os
import re
import shutil
from pathlib import Path

import jupytext
from docutils import nodes

from docs.reference import ROOT, api_pages, cell, modules

DOCS = ROOT / "docs"
TUTORIALS, BENCHMARKS = ROOT / "tutorials", ROOT / "benchmarks"

DRAWS, KEPT = re.compile(r"^\s*show\(", re.M), re.compile(r"^\s*(assert|def) ", re.M)
OFFERED = (("py", "script"), ("ipynb", "notebook with its output"))
MADE = ("api", "results", "solutions", "tutorials")  # folders of docs/
LONG = 16  # rows; a longer table of a CSV is folded


def library_hash() -> str:
    """A hash (16 hex digits) of all code that the tutorials use, besides their own."""
    paths = [p for folder in ("minprefix", "kernels") for p in (ROOT / folder).rglob("*.py")]
    paths += [*TUTORIALS.glob("[!0-9]*.py"), *(DOCS / "prefixes").glob("*.safetensors")]
    digest = hashlib.sha256()
    for path in sorted([*paths, *BENCHMARKS.rglob("*.csv"), ROOT / "requirements.txt"]):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def write_all() -> None:
    """Write all generated pages, and remove those whose files are gone."""
    pages = api_pages() | tutorial_pages() | solution_pages() | result_pages()
    for folder in MADE:
        for path in (DOCS / folder).glob("*.*"):
            if str(path.relative_to(DOCS)) not in pages:
                path.unlink()
    for name, text in pages.items():
        path = DOCS / name
        path.parent.mkdir(exist_ok=True)
        # leave unchanged files alone, because Sphinx looks at modification times
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


# results ------------------------------------------------------------------------------------------

KNOWN = {  # a description of each CSV
    "e2e.csv": "E2E with `mini`: all runs, dev and test",
    "e2e_select.csv": "E2E with `mini`: learning rates, chosen by dev loss in short runs",
    "e2e_hard_prompts.csv": "E2E with `mini`: hard prompts, chosen on the dev set",
    "bart_tasks.csv": "E2E and notes with `mini-bart`: all runs, dev and test",
    "bart_select.csv": "E2E and notes with `mini-bart`: learning rates, chosen by dev loss",
    "bart.csv": "bart-large's size: a training step and a text on two CPU cores",
    "cpu_attention.csv": "The attention operator's CPU path: fused attention against two products",
    "call_overhead.csv": "What a call of the operator costs in Python, µs",
    "compiled.csv": "Kernels compiled (not run) for four GPUs: registers, shared memory, spills",
    "copying.csv": "Facts that are missing or wrong in texts about the embedded restaurants",
    "cpu/bench.csv": "Training and generation, ours and PEFT: all measurements",
    "cpu/pairs.csv": "Two versions of the code, timed in turn on two CPU cores, ms",
    "cpu/profile.csv": "Where the time of one training step goes, ms",
    "defaults.csv": "The rule for default settings, compared with a grid around it: dev losses",
    "environments.csv": "Some tests with other versions of Python, PyTorch, Triton and NumPy",
    "gpu/attention-h200.csv": "On an H200: attention, ours and PyTorch's kernels, µs",
    "gpu/decode-h200.csv": "On an H200: one step of decoding, µs",
    "gpu/steps-h200.csv": "On an H200: training steps and generation, ours and PEFT",
    "gpu/steps-h200-5273a25.csv": "On an H200: the same with older code",
    "gpu/tokens-h200.csv": "On an H200: products of a token, and a step of decoding, µs",
    "gpu/parts-h200.csv": "On an H200: where the time of a step and of a token goes, ms",
    "gpu/tiles-h200.csv": "On an H200: each kernel alone with several tiles, µs",
    "gpu/peers-h200.csv": "On an H200: the best peer's time divided by ours",
    "launches.csv": "Launches of a training step and of a token, counted, and a time estimate",
    "reliability.csv": "Kills, flipped bytes, two processes and ranks: cases and failures",
    "threads.csv": "A training step with one and two threads that spin or sleep while they wait",
}
WIDE = {"cpu/bench.csv"}  # too wide to be read as a table: the file only
RESULTS = """# Results

The tables and figures on these pages are made from CSV files in the repository. Each file records
the machine, the versions and the commit of its numbers.

| question | page |
|---|---|
| What does a small frozen GPT-2 learn, and how close does it come to fine-tuning? | [E2E with `mini`](../guides/e2e.md) |
| What does an encoder-decoder learn? | [BART](../guides/bart.md) |
| Do the paper's claims hold here? | [The paper's tables and figures](paper.md) |
| How fast is it on a CPU, compared with PEFT? | [Speed on a CPU](../guides/speed_cpu.md) |
| How fast is it on a GPU, with the kernels? | [Results on a GPU](../guides/speed_gpu.md), [all findings](gpu.md) |
| What was verified? | [What was verified, and what was not](../guides/verification.md) |
| What did not work? | [The log](../log.md) |

```{toctree}
:hidden:

paper
gpu
```

## All files
"""  # noqa: E501


PAPER = "```{include} ../../benchmarks/paper/RESULTS.md\n:relative-images:\n```\n"


def result_pages() -> dict[str, str]:
    """The page of results, that of the GPU, and that of the paper's experiments."""
    lines = [RESULTS]
    for path in sorted(BENCHMARKS.rglob("*.csv")):
        name = str(path.relative_to(BENCHMARKS))
        if not name.startswith("paper/"):
            lines += csv_section(path, KNOWN[name])
    gpu = (BENCHMARKS / "gpu" / "README.md").read_text(encoding="utf-8")
    return {
        "results/index.md": "\n".join(lines),
        "results/paper.md": PAPER,
        "results/gpu.md": site_links(gpu, "benchmarks/gpu", "results"),
    }


def csv_section(path: Path, title: str) -> list[str]:
    """A heading, the file to download, and its rows; long tables are folded."""
    name = str(path.relative_to(BENCHMARKS))
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    wide = name in WIDE or len(header) > 25
    end = ", and is too wide to be shown here" if wide else ""
    file = f"[{name}](../../benchmarks/{name})"
    lines = [f"### {name}", "", f"{title}. {file} has {len(rows)} rows{end}.", ""]
    if wide:
        return lines
    table = ["| " + " | ".join(map(cell, header)) + " |", "|" + "---|" * len(header)]
    table += ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    if len(rows) > LONG:
        table = ["<details><summary>The table</summary>", "", *table, "", "</details>"]
    return lines + table + [""]


# tutorials ----------------------------------------------------------------------------------------


def tutorials() -> list[Path]:
    return sorted(TUTORIALS.glob("[0-9]*.py"))


def solution_pages() -> dict[str, str]:
    """A page for each file of solutions, with the name of its tutorial."""
    pages = {}
    for path in sorted((TUTORIALS / "solutions").glob("[0-9]*.py")):
        pages[f"solutions/{path.stem}.md"] = (
            f"---\norphan: true\n---\n\n# Solutions of {path.stem}\n\n"
            f"To the exercises of [the tutorial](../tutorials/{path.name}). Run them with "
            f"`python tutorials/solutions/{path.name}`.\n\n"
            f"```{{literalinclude}} ../../tutorials/solutions/{path.name}\n"
            f":language: python\n```\n"
        )
    return pages


def tutorial_pages() -> dict[str, str]:
    """The pages of the tutorials, for running and showing them."""
    return {f"tutorials/{path.name}": tutorial_page(path) for path in tutorials()}


def tutorial_page(path: Path) -> str:
    """One tutorial, with downloads below its title and how to run it at its end."""
    text = site_links(path.read_text(encoding="utf-8"), "tutorials")
    title = re.search(r"^# # .*\n", text, re.MULTILINE)
    files = " or a ".join(
        f'<a href="{path.stem}.{end}" download>{what}</a>' for end, what in OFFERED
    )
    top = f"#\n# Download it as a {files}, to run in `tutorials/` of a checkout.\n#\n"
    return text[: title.end()] + top + text[title.end() :] + last_cell(path.stem)


def read_tutorial(text: str):
    """A percent script as a notebook for this Python; cells that only draw are folded."""
    notebook = jupytext.reads(text, fmt="py:percent")
    for one in notebook.cells:
        if one.cell_type == "code" and DRAWS.search(one.source) and not KEPT.search(one.source):
            one.metadata["tags"] = [*one.metadata.get("tags", []), "hide-input"]
    notebook.metadata["kernelspec"] = {
        "name": "python3", "display_name": "Python 3", "language": "python",
    }  # fmt: skip
    return notebook


def site_links(text: str, folder: str, page: str | None = None) -> str:
    """Convert Markdown links to files of the checkout into links of the site.

    Args:
        folder: folder of the text, relative to the root of the checkout.
        page: folder of its page, relative to `docs/`; None = `folder`.
    """
    page = folder if page is None else page

    def link(match: re.Match) -> str:
        path = os.path.normpath(Path(folder) / match[1])
        if not (ROOT / path).exists():  # Python code such as `x[i](y)`
            return match[0]
        there = target(path)
        offered = "path:" if there.startswith("../") and there.endswith((".py", ".md")) else ""
        return f"]({offered}{os.path.relpath(there, page)}{match[2] or ''})"

    return re.sub(r"\]\((?!https?:)([^)\s#]+)(#[^)\s]*)?\)", link, text)


def target(path: str) -> str:
    """The page of the site (relative to `docs/`) for a file of the checkout (relative to its root).

    A file without a page is offered as a download ("path:" tells MyST not to look for a page).
    """
    module = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    if module in modules():
        return f"api/{module}.md"
    if path.startswith("tutorials/solutions/"):
        return path.removeprefix("tutorials/").replace(".py", ".md")
    if path.startswith("tutorials/"):
        return path
    pages = {
        "README.md": "index.md",
        "benchmarks/gpu/README.md": "results/gpu.md",
        "benchmarks/paper/RESULTS.md": "results/paper.md",
    }
    return pages.get(path, os.path.relpath(path, "docs"))


def link_guides(app, name: str, source: list[str]) -> None:
    """Sphinx's event `source-read`: converts the links of pages that are written by hand."""
    folder = os.path.dirname(name)
    if folder not in MADE:
        source[0] = site_links(source[0], os.path.join("docs", folder), folder)


def last_cell(name: str) -> str:
    """A Markdown cell that says how to run this page and where the solutions are."""
    lines = [
        "",
        "# %% [markdown]",
        "# ---",
        f"# This page is `tutorials/{name}.py`; its output was ",
    ]
    lines += [f"# made when the site was built. Run it with `python tutorials/{name}.py`."]
    if (TUTORIALS / "solutions" / f"{name}.py").exists():
        lines += [f"# [Solutions of the exercises](../solutions/{name}.md)."]
    return "\n".join(lines) + "\n"


def name_pictures(app, doctree) -> None:
    """Sphinx's event `doctree-read`: the alt text of a figure drawn by a cell is its section.

    Figures much wider than high get a class of their own: a phone must not shrink them.
    """
    import imagesize  # Sphinx brings it along; tests without Sphinx import this module

    for image in doctree.findall(nodes.image):
        section = image.parent
        while section is not None and not isinstance(section, nodes.section):
            section = section.parent
        if "alt" not in image and section is not None:
            image["alt"] = f"Figure of: {section[0].astext()}"
        width, height = imagesize.get(DOCS / image["uri"].lstrip("/"))
        if width > 1.7 * height:
            image["classes"].append("wide")


# the live page ------------------------------------------------------------------------------------

LIVE = DOCS / "interactive"
NOT_COPIED = (".py", ".md")


def on_site(html: str) -> str:
    """Convert the live page's links, which point to files of the checkout, to pages of the site."""

    def link(match: re.Match) -> str:
        page = target(match[1])
        return f'"../{Path(page).with_suffix(".html")}"' if page[:2] != ".." else match[0]

    return re.sub(r'"\.\./\.\./([\w./]+)"', link, html)


def copy_live_page(out: Path, live: Path = LIVE) -> None:
    """Copy the live page with all of its files, including those that were made for this build."""
    shutil.rmtree(out, ignore_errors=True)
    for path in live.rglob("*"):
        if path.is_file() and path.suffix not in NOT_COPIED:
            there = out / path.relative_to(live)
            there.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".html":  # in the checkout it links to the scripts
                there.write_text(on_site(path.read_text(encoding="utf-8")), encoding="utf-8")
            else:
                shutil.copyfile(path, there)
