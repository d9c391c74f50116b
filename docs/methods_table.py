"""The README's list of methods, written from `METHODS`: `python docs/methods_table.py` renews it."""

import re
import textwrap
from pathlib import Path

import mtl_optax as mtl

README = Path(__file__).resolve().parent.parent / "README.md"
SECTION = re.compile(r"(<!-- methods -->\n).*?(<!-- /methods -->)", re.S)
FAMILIES = {
    "losses": "Losses or nothing: all three places, one backward pass is enough",
    "norms": "Norms of the task gradients",
    "gram": "Gram matrix of the task gradients",
    "gradients": "Gradients element by element, or with buffers of their size",
}


def listed() -> str:
    """The names of all methods by family, as Markdown."""
    lines = []
    for family, title in FAMILIES.items():
        names = sorted(row.name for row in mtl.METHODS.values() if row.family == family)
        text = f"**{title}:** " + ", ".join(f"`{name}`" for name in names) + "."
        lines.append(textwrap.fill(text, 116, initial_indent="- ", subsequent_indent="  "))
    return "\n".join(lines) + "\n"


def renewed(text: str) -> str:
    """A README with the present list."""
    return SECTION.sub(lambda found: f"{found[1]}{listed()}{found[2]}", text)


if __name__ == "__main__":
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")
