"""How a step's time and memory grow: with tasks, representation width and table size.

python -m examples.studies.benchmarks.growth --out growth.png
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from examples.studies.benchmarks.problems import DENSE, RECSYS, TINY, Problem
from examples.studies.benchmarks.steps import steps
from examples.studies.harness.command import check_writable, make_parser, run_command
from examples.studies.harness.report import picture, show
from examples.studies.harness.timing import interleaved_ratios

# Smaller than the problems of the table: there are many points, and each compiles three steps.
_SMALL = DENSE._replace(bottom=(256, 256), dense=256, batch=1024)


class Point(NamedTuple):
    """One measured step.

    Attributes:
      axis: what grows.
      size: how far.
      place: "fork" or "split".
      ratio: its time over the plain step's.
      memory: its temporary memory beyond the plain step's, MiB.
    """

    axis: str
    size: int
    place: str
    ratio: float
    memory: float


def cases(quick: bool) -> dict[str, list[tuple[int, Problem, int, tuple[str, ...]]]]:
    """For every axis the sizes, each with its problem, its number of tasks and the places to try."""
    if quick:
        return {"tasks": [(2, TINY["dense"], 2, ("fork", "split"))]}
    both, fork = ("fork", "split"), ("fork",)
    return {
        "tasks": [(t, _SMALL, t, both) for t in (2, 4, 8, 16, 32, 64)],
        "representation width": [
            (w, _SMALL._replace(bottom=(256, w)), 4, both) for w in (64, 256, 1024, 4096)
        ],
        "rows of each table": [
            (rows, RECSYS._replace(rows=rows), 4, fork) for rows in (1000, 10_000, 50_000)
        ],
    }


def measure(quick: bool) -> Iterator[Point]:
    """Every point, as soon as it is there."""
    for axis, sizes in cases(quick).items():
        for size, problem, num_tasks, places in sizes:
            made = steps(problem, num_tasks, places)
            ratios = interleaved_ratios(made, "plain", 1 if quick else 9)
            for place in places:
                memory = made[place].temporary_mebibytes - made["plain"].temporary_mebibytes
                yield Point(axis, size, place, ratios[place], memory)


def lines_of(points: list[Point]) -> list[tuple[str, ...]]:
    """The header and the rows of the table."""
    lines = [("grows", "to", "place", "time / plain", "memory beyond plain")]
    for point in points:
        cells = f"{point.ratio:.3f} x", f"{point.memory:.1f} MiB"
        lines.append((point.axis, str(point.size), point.place, *cells))
    return lines


def plot(points: list[Point], path: Path) -> None:
    """Time above, memory below, one column for each thing that grows."""
    axes_names = list(dict.fromkeys(point.axis for point in points))
    size = (4 * len(axes_names), 6)
    with picture(path, 2, len(axes_names), dpi=100, figsize=size) as (_, grid):
        for column, axis in zip(grid.T, axes_names, strict=True):
            for place in dict.fromkeys(point.place for point in points if point.axis == axis):
                chosen = [point for point in points if (point.axis, point.place) == (axis, place)]
                sizes = [point.size for point in chosen]
                column[0].plot(sizes, [point.ratio for point in chosen], marker="o", label=place)
                column[1].plot(sizes, [point.memory for point in chosen], marker="o", label=place)
            column[0].set(xscale="log", yscale="log", ylabel="step time / plain", xlabel=axis)
            column[1].set(xscale="log", ylabel="memory beyond plain (MiB)", xlabel=axis)
            column[0].legend()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = make_parser("examples.studies.benchmarks.growth", __doc__)
    parser.add_argument(
        "--out",
        type=Path,
        dest="file",
        metavar="FILE",
        help="write the picture here (PNG, PDF, SVG)",
    )
    parser.add_argument("--quick", action="store_true", help="one tiny point, to see that it runs")
    options = parser.parse_args(arguments)
    if options.file:
        check_writable(options.file.parent)
    return options


def work(options: argparse.Namespace) -> None:
    """Prints the table and writes the picture."""
    points = list(measure(options.quick))
    show(lines_of(points), "Growth")
    if options.file:
        plot(points, options.file)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; see `run_command` for what it returns."""
    return run_command("examples.studies.benchmarks.growth", lambda: parse(arguments), work)


if __name__ == "__main__":
    sys.exit(main())
