"""The documentation: `python -m sphinx -W --keep-going -b html docs docs/_build/html`."""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "_ext"), str(HERE.parent)]

import method_pages  # noqa: E402
import result_pages  # noqa: E402

import mtl_optax  # noqa: E402

project = "mtl_optax"
author = "The mtl_optax authors"
copyright = "The mtl_optax authors, Apache-2.0"
version = release = mtl_optax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "mathml",
]
exclude_patterns = ["_build"]
# Pages of results are written by the examples, with headings of their own.
suppress_warnings = ["myst.header"]
# `name` in a docstring is a link where it is a public name, else code.
default_role = "py:obj"
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 60

myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_preserve_defaults = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_use_admonition_for_examples = False

html_theme = "furo"
html_title = f"mtl_optax {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True, "top_of_page_buttons": []}
pygments_style = "friendly"

method_pages.write(HERE / "methods")
result_pages.write(HERE / "results", HERE.parent / "examples" / "studies" / "results")


def keep_colons_of_returns(app, what, name, obj, options, lines):
    """Napoleon takes what stands before a colon after `Returns:` for a type; no type is given here."""
    for number, line in enumerate(lines[:-1]):
        if line.strip() == "Returns:":
            text = lines[number + 1]
            indent = len(text) - len(text.lstrip())
            lines[number + 1] = f"{text[:indent]}: {text[indent:]}"


def copy_math_font(app, exception):
    """The font of the formulas comes with a package of the `docs` extra; the site carries a copy."""
    if exception or app.builder.name not in ("html", "dirhtml"):
        return
    import ziamath

    font = Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf"
    shutil.copy(font, Path(app.outdir) / "_static" / font.name)


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", keep_colons_of_returns, priority=400)
    app.connect("build-finished", copy_math_font)
