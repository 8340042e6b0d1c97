"""Finishes the site after Sphinx, and adds to the head of each page.

It copies the live page and the notebooks, removes pages whose source is gone, and writes
sitemap.xml for search engines and 404.html for the host. The addresses of the site and of the
repository are in [project.urls] in pyproject.toml; without them no page has one.
"""

import json
import re
import shutil
import tomllib
from contextlib import suppress
from html import escape
from pathlib import Path

import nbformat
from docutils import nodes
from jupyter_cache import get_cache

from docs import export_live
from docs.equations import write_font
from docs.pages import TUTORIALS, copy_live_page, read_tutorial, tutorial_page
from docs.reference import ROOT

KEYWORDS = {  # search words: the page that the search shows first
    "install": "guides/install",
    "setup": "guides/install",
    "lambda": "tutorials/02_equation_3",
    "λ": "tutorials/02_equation_3",
    "gate": "tutorials/02_equation_3",
}


def addresses(project: str = "") -> dict[str, str]:
    """{name in lower case: address} of [project.urls]; `project` is the text of pyproject.toml."""
    text = project or (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return {k.lower(): v for k, v in tomllib.loads(text)["project"].get("urls", {}).items()}


ADDRESSES = addresses()
SITE = ADDRESSES.get("documentation", "").rstrip("/")


def offers_files(paragraph: nodes.paragraph) -> bool:
    """Whether a paragraph is the line with a tutorial's downloads."""
    return any(" download>" in raw.astext() for raw in paragraph.findall(nodes.raw))


def describe(app, page: str, template: str, context: dict, doctree) -> None:
    """Sphinx's event `html-page-context`: makes the first paragraph the page's description."""
    if doctree is None:
        return
    said = (n for n in doctree.findall(nodes.paragraph) if not offers_files(n))
    text = " ".join(next((n.astext() for n in said), "").split())
    if len(text) > 160:  # search engines show 160 characters
        text = text[:157].rsplit(" ", 1)[0] + " ..."
    if text:
        context["metatags"] += f'\n<meta name="description" content="{escape(text)}">'


def copy_tutorials(out: Path, pages: set[str], cache: Path) -> None:
    """Copy the tutorials as scripts, and as notebooks with their output.

    The outputs come from the cache of the build, because MyST-NB omits them from its own notebooks
    when it uses the cache.
    """
    runs = get_cache(cache) if cache.exists() else None
    for path in TUTORIALS.glob("[0-9]*.py"):
        if f"tutorials/{path.stem}" not in pages:
            continue
        shutil.copyfile(path, out / "tutorials" / path.name)
        notebook = read_tutorial(tutorial_page(path))
        with suppress(KeyError):  # the site may have been built without running it
            notebook = runs.merge_match_into_notebook(notebook)[1] if runs else notebook
        title = notebook.cells[0]  # remove the downloads from the notebook itself
        title.source = re.sub(r"\n.* download>.*\n", "", title.source)
        nbformat.write(notebook, out / "tutorials" / f"{path.stem}.ipynb")


def remove_stale(out: Path, pages: set[str]) -> None:
    """Remove pages and notebooks of an earlier build whose source is gone."""
    for folder in ("api", "guides", "results", "solutions", "tutorials"):
        for path in [*(out / folder).glob("*.html"), *(out / folder).glob("*.ipynb")]:
            if f"{folder}/{path.stem}" not in pages:
                path.unlink()


def add_keywords(index: Path) -> None:
    """Add KEYWORDS as main index entries to searchindex.js; these come first in a search.

    An index directive is not enough: Sphinx 9.0 loses the entries of pages that have not changed.
    """
    before, data, after = re.fullmatch(
        r"(.*?\()(.*)(\).*)", index.read_text("utf-8"), re.S
    ).groups()
    found = json.loads(data)
    for word, page in KEYWORDS.items():
        if page in found["docnames"]:
            found["indexentries"][word] = [[found["docnames"].index(page), "", True]]
    index.write_text(before + json.dumps(found, separators=(",", ":")) + after, encoding="utf-8")


def sitemap(pages: set[str], site: str) -> str:
    """sitemap.xml: https://www.sitemaps.org/protocol.html"""
    urls = "".join(f"<url><loc>{site}/{page}.html</loc></url>\n" for page in sorted(pages))
    schema = "http://www.sitemaps.org/schemas/sitemap/0.9"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="{schema}">\n{urls}</urlset>\n'


def not_found(html: str, site: str) -> str:
    """404.html from Sphinx's page, with a base address, since a host shows it at any address."""
    return html.replace("<head>", f'<head><base href="{escape(site)}/">', 1) if site else html


def finish(app, error: Exception | None) -> None:
    """Sphinx's event `build-finished`."""
    if error is not None or app.builder.format != "html":
        return
    out, pages = Path(app.outdir), app.env.found_docs
    write_font(out / "_static" / "math.woff")
    copy_live_page(out / "interactive")
    export_live.write_site(out / "interactive")
    copy_tutorials(out, pages, Path(app.config.nb_execution_cache_path))
    remove_stale(out, pages)
    add_keywords(out / "searchindex.js")
    page = out / "404.html"
    page.write_text(not_found(page.read_text("utf-8"), SITE), encoding="utf-8")
    if SITE:
        (out / "sitemap.xml").write_text(sitemap(pages - {"404"}, SITE), encoding="utf-8")
