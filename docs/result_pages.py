"""Writes the page of results from `examples/results`, whatever is there.

`conf.py` calls `write` before each build; the pages are not under version control.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

INTRODUCTION = """# Results

Tables and pictures that the examples of this library wrote, with the commands that made them, over several
seeds and beside the plain sum of the losses. A disappointing number stands here like any other.
"""
NOTHING = """
This copy holds no results yet. `python -m examples.compare` and `python -m examples.physics` make their
tables on your machine.
"""
PICTURES = {".png", ".svg"}


def _one_level_down(text: str) -> str:
    """The headings of a table's page, one level deeper; code blocks as they are."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    parts[::2] = [re.sub(r"^(#+ )", r"#\1", part, flags=re.M) for part in parts[::2]]
    return "".join(parts)


def _section(table: Path, source: Path, folder: Path) -> str:
    """One table with the pages and pictures that lie beside it; pictures are copied into the site."""
    beside = sorted(page for page in table.parent.glob("*.md") if page != table)
    text = "\n\n".join(_one_level_down(page.read_text("utf-8")) for page in [table, *beside])
    name = table.parent.relative_to(source).as_posix() or "results"
    if not text.startswith("## "):
        text = f"## {name}\n\n{text}"
    copies = folder / "files" / name
    for picture in sorted(p for p in table.parent.iterdir() if p.suffix in PICTURES):
        copies.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, copies)
        target = f"files/{name}/{picture.name}"
        shown = re.compile(rf"(!\[[^\]]*\]\()(?:\./)?{re.escape(picture.name)}(\))")
        text, count = shown.subn(rf"\g<1>{target}\g<2>", text)
        if not count:
            title = picture.stem.replace("_", " ")
            text += f"\n\n**{title}**\n\n![{title}]({target})\n"
    return text.rstrip() + "\n"


def write(folder: Path, source: Path) -> None:
    """Writes `folder/index.md` from every `table.md` below `source`."""
    tables = sorted(source.rglob("table.md")) if source.exists() else []
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "files", ignore_errors=True)
    sections = [_section(table, source, folder) for table in tables] or [NOTHING.lstrip()]
    (folder / "index.md").write_text("\n".join([INTRODUCTION, *sections]), "utf-8")
