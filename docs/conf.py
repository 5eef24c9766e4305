"""Sphinx configuration of the documentation site; `make docs` builds it into docs/_build/html."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_ext")]

project = "esm2kit"
author = "the esm2kit authors"
copyright = "the esm2kit authors"
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_nb",
    "sphinx_design",
    "sphinx_copybutton",
    "api_reference",
    "cli_reference",
    "static_content",
    "tutorials",
]
exclude_patterns = ["_build"]

# Markdown and notebooks; notebooks are shown as they were executed and never run by the build
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False
html_math_renderer = "mathml"
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}

# docstrings are Google style, with single backticks around code
default_role = "literal"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

# types in signatures that have no entry here: other packages' classes, and esm2kit's internal ones
nitpick_ignore_regex = [("py:(class|exc)", r"(?!esm2kit\.).*"), ("py:(class|exc)", r"esm2kit\.\w+\..*")]

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = "esm2kit"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_use_index = False
html_domain_indices = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
