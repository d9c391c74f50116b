"""The Python programs of the documentation, and what they print.

`python docs/run_pages.py [PAGE ...]` runs the pages and stores their output in them.
"""

import contextlib
import importlib.util
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
# A program, and after it what it prints, if that is shown.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.M | re.S)
# The modules of other packages that a page's programs import: `<!-- needs: jinns, keras -->`.
NEEDS = re.compile(r"^<!-- needs: (.+) -->$", re.M)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?")


class Block(NamedTuple):
    """A Python block of a page."""

    code: str
    shown: str | None


def pages() -> list[Path]:
    """The pages that hold programs, without what the build wrote."""
    found = (page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts)
    return [page for page in found if blocks(page.read_text("utf-8"))]


def blocks(text: str) -> list[Block]:
    """The Python blocks of a page."""
    return [Block(*found) for found in BLOCK.findall(text)]


def missing(page: Path) -> list[str]:
    """The modules that the programs of a page need and that are not installed."""
    needs = [name for found in NEEDS.findall(page.read_text("utf-8")) for name in found.split(", ")]
    return [name for name in needs if importlib.util.find_spec(name) is None]


def outputs(page: Path) -> Iterator[tuple[Block, str]]:
    """Runs the blocks of a page in order, in one namespace; each with what it printed."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    for number, block in enumerate(blocks(page.read_text("utf-8")), 1):
        printed = io.StringIO()
        name = f"{page.relative_to(ROOT)}, python block {number}"
        with contextlib.redirect_stdout(printed):
            exec(compile(block.code, name, "exec"), namespace)
        yield block, printed.getvalue()


def stored(page: Path) -> str:
    """The text of a page with the present output of its programs."""
    printed = iter([text for _, text in outputs(page)])

    def renew(found: re.Match[str]) -> str:
        text = next(printed)
        shown = f"\n```text\n{text}```\n" if found[2] is not None or text else ""
        return f"```python\n{found[1]}```\n{shown}"

    return BLOCK.sub(renew, page.read_text("utf-8"))


if __name__ == "__main__":
    for page in [Path(name).resolve() for name in sys.argv[1:]] or pages():
        if missing(page):
            print(page.relative_to(ROOT), "is left as it is: it needs", *missing(page))
            continue
        page.write_text(stored(page), "utf-8")
        print(page.relative_to(ROOT))
