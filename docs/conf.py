"""Sphinx's settings: `make docs` builds the site with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

from convscale import __version__  # noqa: E402

project = "convscale"
author = "the convscale authors"
copyright = "the convscale authors, Apache-2.0"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "cli_reference",
    "house",
    "records",
    "repository_links",
]
exclude_patterns = ["_ext"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "convscale"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
# An empty list of languages would look for a font on the net; furo's own stack needs none.
pygments_style = "friendly"
pygments_dark_style = "monokai"

# One parameter a line, and short names of types: `choose` takes more than twenty.
maximum_signature_line_length = 88
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
