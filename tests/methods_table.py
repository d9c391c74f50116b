"""The README's table of methods, written from `METHODS`: `python tests/methods_table.py` renews it."""

import re
from pathlib import Path

import mtl_optax as mtl

README = Path(__file__).resolve().parent.parent / "README.md"
SECTION = re.compile(r"(<!-- methods -->\n).*?(<!-- /methods -->)", re.S)
LOOKS_AT = {
    "losses": "losses",
    "norms": "norms",
    "gram": "Gram matrix",
    "gradients": "full gradients",
}
FAMILIES = {
    "losses": "Losses or nothing: all three places, one backward pass is enough",
    "norms": "Norms of the task gradients",
    "gram": "Gram matrix of the task gradients",
    "gradients": "Gradients element by element, or with buffers of their size",
}


def table() -> str:
    """All methods by family, as Markdown."""
    lines = ["| method | looks at | scale | reference |", "|---|---|---|---|"]
    for family, title in FAMILIES.items():
        lines.append(f"| **{title}** | | | |")
        rows = [row for row in mtl.METHODS.values() if row.family == family]
        for row in sorted(rows, key=lambda row: row.name):
            looks_at = ", ".join(LOOKS_AT[need] for need in row.needs) or "nothing"
            lines.append(f"| `{row.name}` | {looks_at} | {row.scale} | {row.reference} |")
    return "\n".join(lines) + "\n"


def renewed(text: str) -> str:
    """A README with the present table."""
    return SECTION.sub(lambda found: f"{found[1]}{table()}{found[2]}", text)


if __name__ == "__main__":
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")
