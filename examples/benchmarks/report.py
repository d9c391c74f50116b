"""One table of everything that was measured, on the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Row(NamedTuple):
    """One measured number.

    Attributes:
      section: which measurement it belongs to.
      case: what was measured.
      value: the number.
      unit: of `value`; "x" for a ratio.
      target: what it should not exceed; None where there is no target.
    """

    section: str
    case: str
    value: float
    unit: str
    target: float | None = None

    @property
    def verdict(self) -> str:
        """Whether the target is met."""
        if self.target is None:
            return ""
        return "yes" if self.value <= self.target else "no"

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        target = "" if self.target is None else f"<= {self.target:g}"
        return self.section, self.case, f"{self.value:.3f} {self.unit}", target, self.verdict


HEADER = ("section", "case", "measured", "target", "met")


def show(rows: Iterable[Row], console: Console) -> None:
    """Prints the table."""
    table = Table(*HEADER, title="mtl_optax: time and memory")
    previous = None
    for row in rows:
        section, *cells = row.cells()
        if previous not in (None, section):
            table.add_section()
        table.add_row("" if section == previous else section, *cells)
        previous = section
    console.print(table)


def markdown(rows: Iterable[Row]) -> str:
    """The table as Markdown."""
    lines = [HEADER, ("---",) * len(HEADER), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
