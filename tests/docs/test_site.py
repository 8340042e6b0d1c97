"""Our additions to Sphinx for the site; skipped without the packages of `make docs`."""

import json
import re

import pytest

pytest.importorskip("myst_nb", reason="pip install -r requirements-docs.txt")
pytest.importorskip("ziamath", reason="pip install -r requirements-docs.txt")

import nbformat
from docutils import nodes
from jupyter_cache import get_cache

from docs import check_site, conf, equations, finish, pages


def test_configuration_imports_and_takes_every_tutorial():
    shown = {path.name for path in pages.tutorials()}
    assert set(pages.tutorial_pages()) == {f"tutorials/{name}" for name in shown}
    index = (pages.DOCS / "index.md").read_text()
    assert "tutorials/[0-9]*.py" in conf.include_patterns
    assert re.search(r":glob:\n\ntutorials/\[0-9\]\*\n", index)
    solutions = {p.name for p in (pages.TUTORIALS / "solutions").glob("[0-9]*.py")}
    assert {f"solutions/{name[:-3]}.md" for name in solutions} == set(pages.solution_pages())


def test_the_font_has_what_equations_are_made_of(tmp_path):
    from fontTools.ttLib import TTFont

    equations.write_font(tmp_path / "math.woff")
    font = TTFont(tmp_path / "math.woff")
    assert "MATH" in font and {ord(c) for c in "x∑λ≤√⟨𝑥𝜆𝔼ℓ⊤"} <= set(font.getBestCmap())
    assert (tmp_path / "math.woff").stat().st_size < 250_000  # bytes; MathJax was 2.3 MB


def test_equations_keep_their_marks_and_the_space_after_a_function():
    from docutils.core import publish_doctree

    doctree = publish_doctree("a :math:`x`, b (:math:`y`) :math:`z` c")
    equations.keep_marks(None, doctree)
    kept = [node.astext() for node in doctree.findall(nodes.inline)]
    assert kept == ["x,", "y)"] and doctree.astext() == "a x, b (y) z c"
    spaced = [r"\log p", r"\log p_x", r"\exp(x)", r"\log \sum_j x", r"\log_2 x", r"\log_p x"]
    assert ["mspace" in equations.mathml(tex) for tex in spaced] == [1, 1, 0, 0, 0, 0]


def test_pictures_much_wider_than_high_are_wide():
    doctree = nodes.document(None, None)
    names = ("readme.png", "defaults.png")  # 2.56 and 1.67 times as wide as high
    doctree += [nodes.image(uri=f"../benchmarks/{name}", alt="") for name in names]
    pages.name_pictures(None, doctree)
    assert [image["classes"] for image in doctree.children] == [["wide"], []]


def test_the_search_finds_keywords_first(tmp_path):
    index = tmp_path / "searchindex.js"
    text = '{"docnames":["a","guides/install"],"indexentries":{"x":[[0,"",false]]}}'
    index.write_text(f"Search.setIndex({text})")
    finish.add_keywords(index)
    found = json.loads(index.read_text("utf-8").removeprefix("Search.setIndex(")[:-1])
    assert found["indexentries"] == {
        "x": [[0, "", False]], "install": [[1, "", True]], "setup": [[1, "", True]],
    }  # fmt: skip
    assert {page[:-5] for page in check_site.SEARCHES.values()} <= set(finish.KEYWORDS.values())


def test_pages_and_notebooks_whose_source_is_gone_are_removed(tmp_path):
    for name in ("api/old.html", "api/kernels.html", "tutorials/9.ipynb"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    finish.remove_stale(tmp_path, {"api/kernels", "tutorials/1"})
    assert [path.name for path in tmp_path.rglob("*.*")] == ["kernels.html"]


def test_notebooks_have_the_outputs_of_the_cache(tmp_path):
    (script,) = pages.TUTORIALS.glob("02*.py")
    run = pages.read_tutorial(pages.tutorial_page(script))
    code = [cell for cell in run.cells if cell.cell_type == "code"]
    code[0].outputs = [nbformat.v4.new_output("stream", text="seen")]
    nbformat.write(run, tmp_path / "x.ipynb")
    get_cache(tmp_path / "cache").cache_notebook_file(tmp_path / "x.ipynb", check_validity=False)
    (tmp_path / "tutorials").mkdir()
    finish.copy_tutorials(tmp_path, {f"tutorials/{script.stem}"}, tmp_path / "cache")
    made = nbformat.read(tmp_path / "tutorials" / f"{script.stem}.ipynb", as_version=4)
    assert [c.outputs[0].text for c in made.cells if c.get("outputs")] == ["seen"]
    assert "download" not in made.cells[0].source and made.cells[0].source.startswith("# 2")
    assert {path.suffix for path in (tmp_path / "tutorials").iterdir()} == {".py", ".ipynb"}


def test_addresses_are_named_only_where_the_project_has_them():
    assert finish.addresses("[project]\nname = 'x'") == {}
    found = finish.addresses("[project.urls]\nDocumentation = 'https://a.b/c/'")
    assert found == {"documentation": "https://a.b/c/"}
    assert "<loc>https://a.b/c/api/x.html</loc>" in finish.sitemap({"api/x"}, "https://a.b/c")
    assert finish.not_found("<head><title>", "") == "<head><title>"
    assert finish.not_found("<head>", "https://a.b/c") == '<head><base href="https://a.b/c/">'


def test_a_page_is_described_by_its_first_paragraph():
    script = nodes.raw("", '<a href="x.py" download>', format="html")
    tree = nodes.section("", nodes.paragraph("", "", script))
    tree += nodes.paragraph("", 'Say "what"\nit is. ' + 40 * "word ")
    context = {"metatags": ""}
    finish.describe(None, "x", "page.html", context, tree)
    text = re.search(r'<meta name="description" content="(.*)">', context["metatags"])[1]
    assert text.startswith("Say &quot;what&quot; it is. word") and text.endswith("word ...")
    finish.describe(None, "genindex", "page.html", untouched := {"metatags": ""}, None)
    assert untouched == {"metatags": ""}


def test_no_key_turns_the_page_and_no_default_is_computed():
    options = getattr(conf, "html_theme_options", {})
    assert "navigation_with_keys" not in options  # keys scroll code and tables, nothing else
    assert conf.autodoc_preserve_defaults
