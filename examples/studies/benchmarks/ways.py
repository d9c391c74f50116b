"""All ways to a training step with UPGrad: time, and memory over the number of tasks.

    python -m examples.studies.benchmarks.ways [--quick] [--out FOLDER]

The tasks are heads of a dense network, or the examples of a batch. Where PyTorch and TorchJD are installed,
the same steps run there in turns with ours, for their time alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

import mtl_optax as mtl
from examples.studies.benchmarks.peers import installed, training_steps
from examples.studies.benchmarks.problems import TINY, Problem
from examples.studies.benchmarks.steps import steps
from examples.studies.harness.command import check_writable, make_parser, run_command
from examples.studies.harness.report import markdown, picture, show
from examples.studies.harness.timing import Training, interleaved, machine

# Gradients of 4 MiB and a small batch, so that the gradients are what memory holds.
_PROBLEM = Problem(tables=0, dense=512, bottom=(512,) * 4, head=(), batch=128)
_SIZES = {"heads": (2, 4, 8, 16, 64), "examples": (16, 64, 256)}
_MODES = {
    "heads": ("unroll", "vmap", "map", "products"),
    "examples": ("vmap", "map", "products", "examples"),
}


class Point(NamedTuple):
    """One measured step.

    Attributes:
      tasks: what the tasks are, "heads" or "examples".
      number: T.
      way: how the step is taken.
      milliseconds: the median time of a step.
      ratio: its median over the plain step in the same round.
      memory: its temporary memory in MiB; None for PyTorch's.
    """

    tasks: str
    number: int
    way: str
    milliseconds: float
    ratio: float
    memory: float | None


def ways(tasks: str, number: int, problem: Problem) -> dict[str, Training]:
    """Our steps by name, compiled."""

    def of(places: list[str], method: mtl.Method, mode: str = "auto") -> dict[str, Training]:
        return steps(problem, number, places, method, mode, by_example=tasks == "examples")

    made = of(["losses"], mtl.dwa(number))
    upgrad = mtl.upgrad(number)
    return made | {mode: of(["weighted"], upgrad, mode)["weighted"] for mode in _MODES[tasks]}


def measure(quick: bool) -> Iterator[Point]:
    """Every point, as soon as it is there."""
    cases = [(tasks, number) for tasks, sizes in _SIZES.items() for number in sizes]
    cases = [("heads", 2), ("examples", 4)] if quick else cases
    problem = TINY["dense"] if quick else _PROBLEM
    for tasks, number in track(cases, "measuring", console=Console(stderr=True), transient=True):
        made = ways(tasks, number, problem)
        calls: dict[str, Callable[[], Any]] = dict(made)
        if installed():
            calls |= training_steps(tasks, number, problem)
        seconds = interleaved(calls, 1 if quick else 5)
        for way, times in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(times, seconds["plain"], strict=True))
            memory = made[way].temporary_mebibytes if way in made else None
            yield Point(tasks, number, way, 1e3 * statistics.median(times), ratio, memory)


def lines_of(points: list[Point]) -> list[tuple[str, ...]]:
    """The header and the rows of the table."""
    lines = [("tasks", "T", "step", "time", "over plain", "temporary memory")]
    for point in points:
        memory = "" if point.memory is None else f"{point.memory:.1f} MiB"
        cells = f"{point.milliseconds:.1f} ms", f"{point.ratio:.2f} x", memory
        lines.append((point.tasks, str(point.number), point.way, *cells))
    return lines


def plot(points: list[Point], path: Path) -> None:
    """Memory over the number of tasks, one panel for heads and one for examples."""
    with picture(path, 1, 2, dpi=100, figsize=(9, 3.5), sharey=True) as (_, grid):
        for panel, tasks in zip(grid[0], _SIZES, strict=True):
            here = [p for p in points if p.tasks == tasks and p.memory is not None]
            for way in dict.fromkeys(point.way for point in here):
                chosen = [point for point in here if point.way == way]
                panel.plot([p.number for p in chosen], [p.memory for p in chosen], "o-", label=way)
            panel.set(xscale="log", yscale="log", xlabel="T", title=f"{tasks} as tasks")
            panel.set_xticks(_SIZES[tasks], [str(number) for number in _SIZES[tasks]])
            panel.minorticks_off()
            panel.legend(fontsize="small")
        grid[0, 0].set_ylabel("temporary memory of a step (MiB)")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = make_parser("examples.studies.benchmarks.ways", __doc__)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write the table and the picture into this folder",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args(arguments)
    if options.out:
        check_writable(options.out)
    return options


def work(options: argparse.Namespace) -> None:
    """Prints the table, and writes it with the picture."""
    points = list(measure(options.quick))
    title = f"UPGrad by all ways, on {machine()}"
    show(lines_of(points), title, left=3)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        table = markdown(lines_of(points), title, left=3)
        (options.out / "table.md").write_text(table, encoding="utf-8")
        plot(points, options.out / "memory.png")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; see `run_command` for what it returns."""
    return run_command("examples.studies.benchmarks.ways", lambda: parse(arguments), work)


if __name__ == "__main__":
    sys.exit(main())
