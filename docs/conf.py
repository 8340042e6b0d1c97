"""The site (`make docs`): Sphinx with MyST-NB, which runs the tutorials and shows their output.

`pages.py` and `reference.py` write generated pages before Sphinx reads its sources. `docstrings.py`
converts our docstrings to reST, `equations.py` renders equations, and `finish.py` copies further
files. No page needs a network.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "tutorials")]
)  # for the kernels that run the tutorials

os.environ["PYTHONWARNINGS"] = "ignore:IProgress"  # from tqdm, about widgets

from docs import beside, docstrings, equations, finish, pages  # noqa: E402

project = author = "minprefix"
project_copyright = "the minprefix authors, MIT licence"
html_title = "minprefix"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
include_patterns = [
    "index.md", "404.md", "guides/*.md", "recipes.md", "log.md", "tutorials/[0-9]*.py",
    "solutions/*.md", "results/*.md", "api/*.md",
]  # fmt: skip
suppress_warnings = ["ref.python"]  # an ambiguous name, such as `load`, becomes no link
default_role = "py:obj"  # a link if the name is known, otherwise code

# tutorials are run again only when their code or the library has changed
nb_custom_formats = {".py": "docs.pages.read_tutorial"}
nb_execution_mode = os.environ.get("MINPREFIX_DOCS_EXECUTE", "cache")  # "off": only text
nb_execution_cache_path = str(ROOT / "runs" / "docs" / "cache" / pages.library_hash())
nb_execution_timeout = 900  # s a cell, on a busy machine
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_code_prompt_show = "Show the code of this figure"
nb_code_prompt_hide = "Hide the code of this figure"
myst_enable_extensions = ["dollarmath", "amsmath", "linkify", "deflist", "colon_fence"]
myst_heading_anchors = 3
myst_linkify_fuzzy_links = False  # gpt2.py is not an address in Paraguay
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True  # as in the source, because values contain paths of this machine
maximum_signature_line_length = 72
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False
viewcode_line_numbers = True
viewcode_follow_imported_members = False  # a name belongs to the module that defines it

html_math_renderer = "mathml"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_favicon = "_static/favicon.svg"
html_baseurl = finish.SITE  # the canonical address of each page, if one is known
if "repository" in finish.ADDRESSES:
    html_theme_options = {
        "footer_icons": [{
            "name": "Repository", "url": finish.ADDRESSES["repository"], "html": "Repository",
            "class": "",
        }]
    }  # fmt: skip
highlight_language = "text"  # of blocks without a language: commands and their output
pygments_style, pygments_dark_style = "a11y-light", "github-dark"  # contrast above 4.5
copybutton_exclude = ".linenos, .gp, .go"


def setup(app):
    pages.write_all()
    app.connect("source-read", pages.link_guides)
    app.connect("autodoc-process-docstring", docstrings.to_rest, priority=100)  # before napoleon
    app.connect("doctree-read", pages.name_pictures)
    app.connect("doctree-read", beside.place_beside)
    app.connect("doctree-read", equations.keep_marks)
    app.connect("html-page-context", finish.describe)
    app.connect("build-finished", finish.finish)
    app.add_html_math_renderer(
        "mathml", (equations.visit_inline, None), (equations.visit_block, None)
    )
