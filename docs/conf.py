"""Sphinx: ``sphinx-build -W docs out/docs`` after ``pip install -e ".[docs]"``. Nothing is fetched."""

import sora_fast

project, author, release = "sora_fast", "sora_fast authors", sora_fast.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
napoleon_google_docstring, napoleon_numpy_docstring = True, False
autodoc_default_options = {"members": True, "member-order": "bysource", "undoc-members": False}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
html_static_path, html_css_files = ["_static"], ["tables.css"]
html_theme, html_title = "furo", f"sora_fast {release}"
html_show_sphinx, html_show_copyright = False, False
