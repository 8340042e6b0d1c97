"""The site (`make docs`): Sphinx with MyST-NB, which runs the tutorials and shows what they print.

`pages.py` writes the pages that are made from files (API reference, results, solutions) before
Sphinx reads; `docstrings.py` makes reST of our docstrings.
No page asks a network for anything: MathJax is copied from its package into the site.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "tutorials")]
)  # for the kernels that run the tutorials

os.environ["PYTHONWARNINGS"] = "ignore:IProgress"  # tqdm's, of widgets that a page does not need

from docs import docstrings, pages  # noqa: E402

project = author = "minprefix"
project_copyright = "the minprefix authors, MIT licence"
html_title = "minprefix"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
include_patterns = [
    "index.md", "guides/*.md", "recipes.md", "log.md", "tutorials/[0-9]*.py", "solutions/*.md",
    "results/*.md", "api/*.md",
]  # fmt: skip
suppress_warnings = ["ref.python"]  # `load` in a docstring is one of several: no link then
default_role = "py:obj"  # a link where the name is known, code elsewhere

# tutorials: run once, then again only when their code or the library has changed
nb_custom_formats = {".py": "docs.pages.read_tutorial"}
nb_execution_mode = os.environ.get("MINPREFIX_DOCS_EXECUTE", "cache")  # "off": text alone
nb_execution_cache_path = str(ROOT / "runs" / "docs" / "cache" / pages.library_hash())
nb_execution_timeout = 900  # s a cell, on a busy machine
nb_execution_raise_on_error = True
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "linkify", "deflist"]
myst_heading_anchors = 3
myst_linkify_fuzzy_links = False  # gpt2.py is no address in Paraguay
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True}
maximum_signature_line_length = 72
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False
viewcode_line_numbers = True
viewcode_follow_imported_members = False  # a name lives where it is written

mathjax_path = "mathjax/tex-svg-full.js"  # draws paths: no fonts to load
mathjax3_config = {"options": {"enableMenu": False}}  # the menu would load more files

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
pygments_style, pygments_dark_style = "friendly", "github-dark"
copybutton_exclude = ".linenos, .gp, .go"


def setup(app):
    pages.write_all()
    app.connect("source-read", pages.link_guides)
    app.connect("autodoc-process-docstring", docstrings.to_rest, priority=100)  # before napoleon
    app.connect("doctree-read", pages.name_pictures)
    app.connect("build-finished", pages.copy_extras)
