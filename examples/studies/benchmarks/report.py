"""The rows of one table of everything that was measured."""

from collections.abc import Iterable
from typing import NamedTuple


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


HEADER = ("measured", "case", "result", "target", "met")


def lines_of(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """The header and the rows of the table."""
    return [HEADER, *(row.cells() for row in rows)]
