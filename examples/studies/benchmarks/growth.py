"""How a step's time and memory grow: with tasks, representation width and table size.

python -m examples.studies.benchmarks.growth [--quick] [--out FOLDER]
"""

import argparse
import sys
from collections.abc import Iterator
from typing import NamedTuple

from examples.studies.benchmarks.problems import DENSE, RECSYS, TINY, Problem
from examples.studies.benchmarks.report import curves_of, draw
from examples.studies.benchmarks.steps import steps
from examples.studies.harness.command import CommandLine
from examples.studies.harness.report import publish
from examples.studies.harness.timing import interleaved_ratios, machine

# Smaller than the problems of the table: there are many points, and each compiles three steps.
_SMALL = DENSE._replace(bottom=(256, 256), dense=256, batch=1024)


class Point(NamedTuple):
    """One measured step.

    Attributes:
      axis: what grows.
      place: "fork" or "split".
      size: how far it has grown.
      ratio: its time over the plain step's.
      memory: its temporary memory beyond the plain step's, MiB.
    """

    axis: str
    place: str
    size: int
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
                yield Point(axis, place, size, ratios[place], memory)


def lines_of(points: list[Point]) -> list[tuple[str, ...]]:
    """The header and the rows of the table."""
    lines = [("grows", "to", "place", "time / plain", "memory beyond plain")]
    for point in points:
        cells = f"{point.ratio:.3f} x", f"{point.memory:.1f} MiB"
        lines.append((point.axis, str(point.size), point.place, *cells))
    return lines


def work(options: argparse.Namespace) -> None:
    """Prints the table, and writes it with the picture."""
    points = list(measure(options.quick))
    publish(options.out, "growth", lines_of(points), f"Growth, on {machine()}")
    if options.out:
        draw(options.out / "growth.png", curves_of(points), "size", "memory beyond plain (MiB)")


main = CommandLine("examples.studies.benchmarks.growth", __doc__, work, "out quick")

if __name__ == "__main__":
    sys.exit(main())
