"""Writes the page of results from `examples/studies/results`, whatever is there.

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
NOTHING = """\
This copy holds no results yet. `python -m examples.compare` and `python -m examples.studies.physics` make
their tables on your machine.
"""
PICTURES = {".png", ".svg"}


def _one_level_down(text: str) -> str:
    """The headings of a table's page, one level deeper; code blocks as they are."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    parts[::2] = [re.sub(r"^(#+ )", r"#\1", part, flags=re.M) for part in parts[::2]]
    return "".join(parts)


def _pages(folder: Path) -> list[Path]:
    """The tables and other texts of a folder, `table.md` first."""
    return sorted(folder.glob("*.md"), key=lambda page: (page.name != "table.md", page.name))


def _section(source: Path, results: Path, site: Path) -> str:
    """The texts of one folder with the pictures beside them, which are copied into the site."""
    text = "\n\n".join(_one_level_down(page.read_text("utf-8")) for page in _pages(source))
    name = source.relative_to(results).as_posix()
    if not text.startswith("## "):
        text = f"## {name}\n\n{text}"
    copies = site / "files" / name
    for picture in sorted(p for p in source.iterdir() if p.suffix in PICTURES):
        copies.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, copies)
        target = f"files/{name}/{picture.name}"
        shown = re.compile(rf"(!\[[^\]]*\]\()(?:\./)?{re.escape(picture.name)}(\))")
        text, count = shown.subn(rf"\g<1>{target}\g<2>", text)
        if not count:
            title = picture.stem.replace("_", " ")
            text += f"\n\n**{title}**\n\n![{title}]({target})\n"
    return text.rstrip() + "\n"


def write(site: Path, results: Path) -> None:
    """Writes `site/index.md` from every folder below `results` that holds a text."""
    folders = sorted({page.parent for page in results.rglob("*.md")}) if results.exists() else []
    site.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(site / "files", ignore_errors=True)
    sections = [_section(folder, results, site) for folder in folders] or [NOTHING]
    (site / "index.md").write_text("\n".join([INTRODUCTION, *sections]), "utf-8")
