"""The site, without building it: its generated pages, and the live page's links."""

import importlib
import re
from pathlib import Path

import pytest

from docs import beside, check_site, docstrings, equations, export_live, formulas, pages, reference

CHECKOUT = pages.ROOT


def test_every_public_module_is_in_the_reference_once():
    listed = [name for members in reference.grouped().values() for name in members]
    assert sorted(listed) == reference.modules()
    assert {"minprefix", "minprefix.prefix.prefix", "kernels", "kernels.reference"} <= set(listed)
    assert not [name for name in listed if ".bench" in name or ".assets" in name]


def test_overviews_list_what_the_packages_export():
    for package, targets in reference.NAMES.items():
        exported = set(importlib.import_module(package).__all__)
        assert len(targets) == 10 and exported <= {target.rsplit(".", 1)[1] for target in targets}
        page = reference.module_page(package)
        for target in targets:
            assert f"<{target}>` | {reference.cell(reference.described(target))} |" in page
            assert len(reference.described(target)) > 20, target


def test_links_of_the_checkout_become_links_of_the_site():
    text = "# [a](../minprefix/models/gpt2.py), [b](solutions/02_equation_3.py), [c](04_x.py), "
    text += "[d](../README.md), [e](../benchmarks/e2e.py), [f](../benchmarks/gpu/README.md#what)"
    wanted = (
        "# [a](../api/minprefix.models.gpt2.md), [b](../solutions/02_equation_3.md), [c](04_x.py), "
        "[d](../index.md), [e](path:../../benchmarks/e2e.py), [f](../results/gpu.md#what)"
    )
    assert pages.site_links(text, "tutorials") == wanted
    assert pages.site_links("[k](../kernels/__init__.py)", "tutorials") == "[k](../api/kernels.md)"
    assert pages.site_links("[w](https://a.b/c.py)", "tutorials") == "[w](https://a.b/c.py)"
    guide = "![p](../../benchmarks/readme.png) [t](../../tutorials/09_speed.py) [r](../recipes.md)"
    wanted = "![p](../../benchmarks/readme.png) [t](../tutorials/09_speed.py) [r](../recipes.md)"
    assert pages.site_links(guide, "docs/guides", "guides") == wanted


def written() -> list[Path]:
    """The README and the pages of the site that are written by hand."""
    return [CHECKOUT / "README.md", *pages.DOCS.glob("*.md"), *pages.DOCS.glob("guides/*.md")]


@pytest.mark.parametrize("path", written(), ids=lambda path: path.name)
def test_links_hold_in_a_checkout(path: Path):
    """Links of index.md and 404.md to pages that are made hold on the site only."""
    targets = re.findall(r"\]\((?!https?:)([^)\s#]+)(?:#[^)\s]*)?\)", path.read_text("utf-8"))
    for target in targets:
        made = path.name in ("index.md", "404.md") and target.split("/")[0] in pages.MADE
        assert made or (path.parent / target).exists(), target


def test_the_layout_names_files_that_are_there():
    layout = (CHECKOUT / "README.md").read_text("utf-8").split("## Layout")[1].split("```")[1]
    known = {path.name for folder in ("minprefix", "kernels", "docs", "tutorials")
             for path in (CHECKOUT / folder).rglob("*")}  # fmt: skip
    names = set(re.findall(r"[\w.-]+\.(?:py|md)\b", layout))
    assert len(names) > 15
    assert names <= known, names - known


def test_every_guide_is_in_the_menu():
    index = (pages.DOCS / "index.md").read_text("utf-8")
    for path in pages.DOCS.glob("guides/*.md"):
        assert f"\nguides/{path.stem}\n" in index


def test_results_show_the_rows_of_the_files():
    page = pages.result_pages()["results/index.md"]
    names = {str(p.relative_to(pages.BENCHMARKS)) for p in pages.BENCHMARKS.rglob("*.csv")}
    for name in names:
        known = name in pages.KNOWN and f"(../../benchmarks/{name})" in page
        assert known or name.startswith("paper/"), name
    assert reference.cell("a|b *c* {d}\ne") == r"a\|b \*c\* &#123;d} e"


def test_docstrings_become_rest():
    lines = """One *line* of x|y in `a * b_`, a_.

    o = softmax(q_i * k)

Args:
    q: (B, H, T, D),
        on two lines.
Source: [1].
[1] https://a.b   [2] c
    goes on
[3] d""".splitlines()
    text = "\n".join(docstrings.rest_of(lines))
    assert r"One \*line\* of x\|y in `a * b_`, a\_." in text
    assert ".. math::\n\n    o\\; =\\; \\mathrm{softmax}(q_{i}" in text
    assert "Args:\n    q: (B, H, T, D),\n        on two lines." in text
    assert "**Source:** [1].\n\n| [1] https://a.b   [2] c\n    goes on\n| [3] d" in text


@pytest.mark.parametrize(
    "line, tex",
    [
        ("lse_i = log sum_j exp(x_ij)", r"\mathrm{lse}_{i}= \log \sum _{j}\exp (x_{ij})"),
        ("d = <q_i, k_j> * 2", r"d= \langle q_{i},k_{j} \rangle \cdot 2"),
        ("K_visible(i)]^T", r"K_{\mathrm{visible}(i)}]^\top "),
        ("sum_(j in C) W_up h_<i", r"\sum _{j\in C}W_{\mathrm{up}}h_{\lt i}"),
        ("beta   (*), sum of all", r"\beta \qquad (\ast),\mathrm{sum}\mathrm{of}\mathrm{all}"),
    ],
)
def test_formulas_of_docstrings_become_tex(line, tex):
    assert formulas.tex_of(line).replace(r"\; ", "").replace(" ", "") == tex.replace(" ", "")
    assert equations.mathml(formulas.tex_of(line), "block").startswith("<math")


def test_code_and_tables_of_docstrings_are_no_formulas():
    text = "\n".join(docstrings.rest_of(["    x = f(\"a\")", "", "a", "", "    python -m x", "a",
                                         "", "    short   B, read", "    dq   B = 1"]))  # fmt: skip
    assert "math" not in text
    assert text.count("code-block:: python") == 1 and text.count("code-block:: text") == 2


def test_every_equation_of_the_tutorials_is_known_to_the_translator():
    for path in pages.tutorials():
        for cell in pages.read_tutorial(path.read_text("utf-8")).cells:
            if cell.cell_type == "markdown":
                text = re.sub(r"`[^`]*`", "", cell.source)
                for block, inline in re.findall(r"\$\$(.+?)\$\$|\$([^$]+?)\$", text, re.DOTALL):
                    assert "<math" in equations.mathml(block or inline)
    with pytest.raises(ValueError, match=r"\\unheardof is not known .* 'a \\\\unheardof b'"):
        equations.mathml(r"a \unheardof b")


def test_a_tutorial_offers_its_files_and_folds_what_only_draws():
    page = pages.tutorial_page(pages.TUTORIALS / "02_equation_3.py")
    top = page.split("# %%")[1]
    assert 'href="02_equation_3.ipynb"' in top and 'href="02_equation_3.py"' in top
    cells = ["show(figure)", "assert a\nshow(figure)", "def show():", "print(1)"]
    read = pages.read_tutorial("".join(f"# %%\n{cell}\n\n" for cell in cells))
    assert [cell.metadata.get("tags", []) for cell in read.cells] == [["hide-input"], [], [], []]


def test_kernels_stand_beside_their_comments():
    code = "@triton.jit\ndef f():\n    # one\n    # two\n    a = 1  # b\n\n    # three\n    c = 2"
    assert beside.chunks(code) == [
        ("", "@triton.jit\ndef f():"), ("one two", "    a = 1  # b"), ("three", "    c = 2"),
    ]  # fmt: skip


def test_the_build_copies_the_live_page_with_all_that_it_loads(tmp_path):
    live, out = tmp_path / "live", tmp_path / "out"
    (live / "data").mkdir(parents=True)
    for name in ("index.html", "page.js", "data/mini.safetensors", "merges.txt", "notes.md"):
        (live / name).write_text('<a href="../../tutorials/02_equation_3.py">')
    out.mkdir()
    (out / "gone.js").write_text("")
    pages.copy_live_page(out, live)
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {"index.html", "page.js", "data/mini.safetensors", "merges.txt"}
    assert (out / "index.html").read_text() == '<a href="../tutorials/02_equation_3.html">'
    links = '"../../README.md" "../../minprefix/models/gpt2.py" "../../docs/guides/e2e.md"'
    pages_of = '"../index.html" "../api/minprefix.models.gpt2.html" "../guides/e2e.html"'
    assert pages.on_site(links) == pages_of


def test_figures_share_one_palette():
    from minprefix import palette

    assert palette.colour_of("FT-FULL") == palette.colour_of("fine-tuning") == palette.OTHER
    assert palette.colour_of("prefix (10 positions)") == palette.PREFIX
    assert palette.colour_of("hard prompt") == palette.TEXT
    for path in [*pages.BENCHMARKS.rglob("*.py"), *(CHECKOUT / "minprefix").rglob("*.py")]:
        colours = re.findall(r"\"#[0-9a-f]{6}\"", path.read_text("utf-8"))
        assert path.name in ("palette.py", "readme.py") or not colours, path


@pytest.fixture
def site(tmp_path):
    (tmp_path / "b.html").write_text("<h1 id='top'>b</h1>")
    (tmp_path / "a.html").write_text('<a href="b.html#top">b</a><script src="b.html"></script>')
    return tmp_path


def test_a_sound_site_has_no_errors(site):
    assert check_site.link_errors(site) == []
    assert check_site.link_errors(site / "none") == [f"{site / 'none'}: no pages there"]


@pytest.mark.parametrize(
    "html, error",
    [
        ('<a href="c.html">', "no c.html"),
        ('<a href="b.html#bottom">', "no place b.html#bottom"),
        ('<script src="https://cdn.x/y.js">', "loads https://cdn.x/y.js"),
        ('<img src="//cdn.x/y.png">', "loads //cdn.x/y.png"),
    ],
)
def test_link_errors_are_found(site, html, error):
    (site / "a.html").write_text(html)
    assert check_site.link_errors(site) == [f"a.html: {error}"]


def test_fonts_from_elsewhere_are_found(site):
    (site / "x.css").write_text("@import 'https://fonts.x/y.css'; a { b: url(local.png) }")
    assert check_site.link_errors(site) == ["x.css: loads https://fonts.x/y.css"]


NO_BROWSER = check_site.browser_missing()


@pytest.mark.skipif(NO_BROWSER != "", reason=NO_BROWSER)
def test_looks_that_a_reader_would_stumble_over_are_found(site):
    faults = {
        "<p style='width: 3000px; height: 1px'>": "px wider than the window",
        "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>": "nothing describes data:image",
        "<h3>deep</h3>": "h1 before deep",
        "<p style='color: #888'>faint": "contrast 3.5 of P.: rgb(136, 136, 136)",
        "<p style='background: rgba(0, 0, 0, 0.5); color: #000'>half": "",
        "<p style='background: color-mix(in srgb, #000 40%, #fff)'>mixed": "",
    }
    with check_site.open_browser() as browser, check_site.watched_page(browser) as (page, _):
        for html, fault in faults.items():
            (site / "a.html").write_text(f"<!doctype html><h1>a</h1>{html}")
            page.goto((site / "a.html").as_uri())
            found = page.evaluate(check_site.LOOKS)
            assert len(found) == bool(fault) and fault in "".join(found), (html, found)


# the live page ------------------------------------------------------------------------------------


def test_live_page_links_into_the_checkout_and_into_the_site():
    html = (pages.DOCS / "interactive" / "index.html").read_text()
    links = [a for a in check_site.Page(html).links if a.startswith("../../")]
    assert len(links) == 3  # README, tutorial 2, gpt2.py
    there = {path.name for path in pages.tutorials()}
    for link in links:
        name = link.rsplit("/", 1)[1]
        if not name.endswith(".py") or name[:2] in {n[:2] for n in there}:
            assert (pages.DOCS / "interactive" / link).exists()
    changed = check_site.Page(pages.on_site(html))
    assert "../index.html" in changed.links and "../tutorials/02_equation_3.html" in changed.links
    assert not [a for a in changed.links + changed.loaded if a.startswith("../../")]


def test_site_has_the_live_page_with_what_its_worker_loads(tmp_path):
    there = tmp_path / "interactive"
    pages.copy_live_page(there)
    export_live.write_site(there)
    worker = (there / "worker.js").read_text()
    assert all(f'"{name}"' in worker for name in export_live.LOADED)
    assert all((there / name).exists() for name in export_live.LOADED)
    assert sum(path.stat().st_size for path in there.iterdir()) < 40e6  # bytes
    assert "../../" not in (there / "index.html").read_text()


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it: https://www.w3.org/TR/WCAG21/#dfn-relative-luminance"""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_of_the_live_page_can_be_read():
    css = (pages.DOCS / "interactive" / "page.css").read_text()
    blocks = re.findall(r":root[^{]*\{([^}]*)\}", css)
    assert len(blocks) == 2  # light and dark
    for block in blocks:
        colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for front, back in [
            ("ink", "ground"), ("ink", "raised"), ("ink", "prefix-fill"), ("ink", "kept"),
            ("ink", "invented"), ("ink", "lost"), ("ink", "written"), ("faint", "raised"),
            ("faint", "ground"), ("link", "ground"),
        ]:  # fmt: skip
            low, high = sorted([luminance(colour[front]), luminance(colour[back])])
            assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back)  # WCAG 2, level AA
