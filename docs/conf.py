"""How Sphinx makes the site of these pages: `make docs`."""

import os

import batchnorm

project = "batchnorm"
author = "the authors of batchnorm"
project_copyright = author
version = release = batchnorm.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "numpydoc",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "notebooks"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autosummary_generate = False
autodoc_typehints = "none"  # the docstrings say what a parameter is
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

html_theme = "furo"
html_title = f"batchnorm {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = ["_templates"]
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "versions.html",
        "sidebar/scroll-end.html",
    ]
}
# other versions that lie beside this one, as the release workflow names them
html_context = {"versions": os.environ.get("DOCS_VERSIONS", "").split()}


def _no_emphasis(app, what, name, obj, options, lines):
    """A star in a shape, such as (N, C, *S), begins no emphasis."""
    lines[:] = [line.replace(", *S)", ", \\*S)") for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", _no_emphasis, priority=400)  # before numpydoc's 500
