"""Formulas as MathML, which browsers draw without a script or a network."""

from __future__ import annotations

import re
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)
# What the converter does not know, and has another command for.
REWRITES = (
    (re.compile(r"\\(?:tfrac|dfrac)(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\_"), "_"),
    (re.compile(r"\\textstyle(?![a-zA-Z])"), ""),
    (re.compile(r"\\ne(?![a-zA-Z])"), r"\\neq"),
    (re.compile(r"\\arg(?![a-zA-Z])"), r"\\operatorname{arg}"),
)
# Bars and slashes, around which MathML would put the space of a relation.
TIGHT = re.compile(r"<mo((?: [a-z]+=\"[^\"]*\")*)>(\||/|&#x0007C;|&#x0002F;|&#x02016;)</mo>")


def to_mathml(formula: str, display: str) -> str:
    """The MathML of a LaTeX formula."""
    for pattern, replacement in REWRITES:
        formula = pattern.sub(replacement, formula)
    found = latex2mathml.converter.convert(formula, display=display)
    # What the converter does not know stays in the text as a command.
    if unknown := re.findall(r"\\[a-zA-Z]+", found):
        logger.warning("mathml: no such command: %s", ", ".join(unknown), type="mathml")
    return TIGHT.sub(r'<mo\1 lspace="0" rspace="0">\2</mo>', found)


def visit_inline(translator: Any, node: nodes.math) -> None:
    """An inline formula."""
    translator.body.append(to_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_display(translator: Any, node: nodes.math_block) -> None:
    """A displayed formula."""
    translator.body.append(f'<div class="formula">{to_mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_display, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
