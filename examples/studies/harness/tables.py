"""Tables for a terminal, in its width, and as Markdown for everything else."""

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest

Lines = Sequence[Sequence[str]]  # the header first
WIDTH = 80  # of the notes in a file


def show(
    lines: Lines, title: str, note: str = "", *, first: Sequence[str] = (), left: int = 1
) -> None:
    """Print a table: all of it as Markdown, or on a terminal the columns that fit.

    Args:
      lines: the header and the rows.
      title: above them.
      note: below them; an empty line separates paragraphs.
      first: the names of the columns that a narrow terminal shows first; the others follow from the left.
      left: how many columns are aligned to the left.
    """
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        print(for_terminal(lines, title, note, width, first=first, left=left))
    else:
        print(markdown(lines, title, note, left=left))


def say(text: str) -> None:
    """Print a text, broken between words."""
    print(_wrapped(text, shutil.get_terminal_size().columns))


def markdown(lines: Lines, title: str, note: str = "", *, left: int = 1) -> str:
    """The table for a page."""
    wrapped = _wrapped(note, WIDTH)
    # A line may begin with what Markdown takes for an item of a list: "* p < 0.05", or the end of "is 1."
    escaped = re.sub(r"^(\d*)([-+*#>.)])(?= )", r"\1\\\2", wrapped, flags=re.MULTILINE)
    parts = (f"**{title}**", pipe_table(lines, left=left), escaped)
    return "\n\n".join(part for part in parts if part) + "\n"


def pipe_table(lines: Lines, *, left: int = 1) -> str:
    """Cells as Markdown, header first; the columns after the first `left` are aligned to the right."""
    rule = ["---" if place < left else "---:" for place in range(len(lines[0]))]
    # The name of a task may hold a bar, which would end a cell.
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in (lines[0], rule, *lines[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def for_terminal(
    lines: Lines, title: str, note: str, width: int, *, first: Sequence[str] = (), left: int = 1
) -> str:
    """The table with the columns that fit into a width, and the names of those that do not."""
    widths = _widths(lines, width, first)
    chosen = [[line[place] for place in widths] for line in lines]
    aligned = [str.ljust if place < left else str.rjust for place in widths]
    rule = "─" * (sum(widths.values()) + 2 * (len(widths) - 1))
    body = [_wrapped(title, width), rule]
    for number, line in enumerate(chosen):
        for parts in _broken(line, list(widths.values())):
            cells = zip(aligned, parts, widths.values(), strict=True)
            body.append("  ".join(align(part, size) for align, part, size in cells).rstrip())
        body += [rule] * (number in (0, len(chosen) - 1))
    missing = [name for place, name in enumerate(lines[0]) if place not in widths]
    if missing:
        more = f"Without {', '.join(missing)}: a wider terminal or a file shows all columns."
        body.append(_wrapped(more, width))
    return "\n".join([*body, *([_wrapped(note, width)] if note else [])])


def _widths(lines: Lines, width: int, first: Sequence[str]) -> dict[int, int]:
    """The widths of the columns that fit, by place; those of the label and of one number always do."""
    header = lines[0]
    cells = [max((len(row[place]) for row in lines[1:]), default=1) for place in range(len(header))]
    least = [max(c, *map(len, name.split())) for c, name in zip(cells, header, strict=True)]
    least[0] = min(least[0], max(18, width // 3))  # labels are broken
    ranked = [header.index(name) for name in first]
    ranked = list(dict.fromkeys([0, *ranked, *range(len(header))]))
    found: dict[int, int] = {}
    for place in ranked:
        if len(found) < 2 or sum(found.values()) + least[place] + 2 * len(found) <= width:
            found[place] = least[place]
    room = width - sum(found.values()) - 2 * (len(found) - 1)
    for place in ranked:
        if place in found:
            more = min(max(cells[place], len(header[place])) - found[place], max(room, 0))
            found[place] += more
            room -= more
    return dict(sorted(found.items()))


def _broken(line: Sequence[str], widths: Sequence[int]) -> Iterator[tuple[str, ...]]:
    """The lines of a row whose cells are broken to their widths."""
    cells = [textwrap.wrap(cell, size) for cell, size in zip(line, widths, strict=True)]
    return zip_longest(*cells, fillvalue="")


def _wrapped(text: str, width: int) -> str:
    return "\n\n".join(
        textwrap.fill(paragraph, width, break_long_words=False, break_on_hyphens=False)
        for paragraph in text.split("\n\n")
    )
