"""The rows of one table of everything that was measured, and pictures of what grows."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeAlias

from examples.studies.harness.report import picture

# By what a column shows, and by the name of a curve: how far it has grown, time and memory.
Curves: TypeAlias = dict[str, dict[str, list[tuple[float, float, float | None]]]]


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


def curves_of(points: Iterable[tuple[str, str, float, float, float | None]]) -> Curves:
    """The curves of points: a column, a name, how far it has grown, time and memory."""
    curves: Curves = {}
    for column, name, size, ratio, memory in points:
        curves.setdefault(column, {}).setdefault(name, []).append((size, ratio, memory))
    return curves


def draw(path: Path, curves: Curves, what: str, memory: str) -> None:
    """Time above and memory below, a column for each network or axis, a colour for each curve.

    Args:
      path: of the picture.
      curves: what to draw.
      what: the label of what grows.
      memory: the label of the memory.
    """
    names = list(dict.fromkeys(name for column in curves.values() for name in column))
    handles = {}
    with picture(path, 2, len(curves), dpi=100, figsize=(3 * len(curves) + 2, 6)) as (figure, grid):
        for panels, (title, column) in zip(grid.T, curves.items(), strict=True):
            for name, points in column.items():
                style = {"color": f"C{names.index(name)}", "marker": "o", "markersize": 4}
                sizes, ratios, memories = zip(*points, strict=True)
                (handles[name],) = panels[0].plot(sizes, ratios, **style)
                if None not in memories:
                    panels[1].plot(sizes, memories, **style)
            ticks = sorted({size for points in column.values() for size, *_ in points})
            for panel in panels:
                panel.set(xscale="log", xlabel=what)
                panel.set_xticks(ticks, [f"{size:g}" for size in ticks])
                panel.minorticks_off()
            panels[0].set(title=title, yscale="log")
            least = min(
                (m for points in column.values() for *_, m in points if m is not None), default=0
            )
            panels[1].set(yscale="log" if least > 0 else "symlog")  # beyond plain it may be below 0
        grid[0, 0].set_ylabel("step time / plain")
        grid[1, 0].set_ylabel(memory)
        figure.legend(handles.values(), handles, loc="outside right upper", fontsize="small")
