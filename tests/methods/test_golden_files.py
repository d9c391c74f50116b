"""Every file of reference numbers is whole, and read by a test."""

from __future__ import annotations

import ast
from pathlib import Path

from golden_cases import GOLDEN, load

TESTS = Path(__file__).resolve().parents[1]


FILES = {path.relative_to(GOLDEN).with_suffix("").as_posix() for path in GOLDEN.rglob("*.json")}


def test_every_golden_file_has_cases_with_different_names() -> None:
    assert len(FILES) >= 46
    for name in FILES:
        cases = load(name)
        assert cases and len({case["name"] for case in cases}) == len(cases), name


def test_every_golden_file_is_read_by_a_test() -> None:
    """Tests name the files that they read in full: "gradient/mgda"."""
    strings = {
        node.value
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert strings >= FILES
