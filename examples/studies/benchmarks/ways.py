"""All ways to a training step with UPGrad: time, and memory over the number of tasks.

    python -m examples.studies.benchmarks.ways [--rows NAME:T ...] [--large] [--out FOLDER [--resume]]

A row is a network and a number of tasks, which are heads of the network, or the examples of a batch. Its
steps run in turns, and `--out` keeps it, so that `--resume` measures the others alone. Where PyTorch and
TorchJD are installed, the steps of the dense network run there too, for their time.

`--large` has the sizes for a GPU. With it, and for more than 8 tasks, the losses are one array: its
backward pass is compiled once, where losses that are kept apart have T.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import track

import mtl_optax as mtl
from examples.studies.benchmarks.peers import installed, training_steps
from examples.studies.benchmarks.problems import LARGE, SMALL, TINY, Problem, initial
from examples.studies.benchmarks.steps import training_step
from examples.studies.harness.command import CommandLine, write_atomically
from examples.studies.harness.report import picture, publish
from examples.studies.harness.timing import Training, cores, interleaved, machine, ratio

_NUMBERS = {
    "dense": (2, 4, 8, 16, 64),
    "transformer": (2, 4, 8, 16),
    "tables": (2, 4, 8, 16),
    "examples": (16, 64, 256),
}
WAYS = ("losses", "representation", "unroll", "vmap", "map", "products", "examples")
NOTE = "Time over the plain step's, whose own is in milliseconds, and temporary memory of the step."
_MANY = 8  # tasks whose losses are kept apart


class Point(NamedTuple):
    """One measured step.

    Attributes:
      network: "dense", "transformer", "tables", or "examples" of a batch for the dense network.
      number: T.
      way: how the step is taken.
      milliseconds: the median time of a step.
      ratio: its median over the plain step in the same round.
      memory: its temporary memory in MiB; None for PyTorch's.
      parameters: the size of the parameters in MiB.
      machine: what it ran on.
    """

    network: str
    number: int
    way: str
    milliseconds: float
    ratio: float
    memory: float | None
    parameters: float
    machine: str


def ways(
    network: str, number: int, problem: Problem, chosen: Sequence[str], as_array: bool
) -> dict[str, Training]:
    """Our steps by name, compiled: the plain one and the chosen ones that there are."""
    by_example, upgrad = network == "examples", mtl.upgrad(number)
    places = {"losses": "losses", "representation": "fork"}
    missing = {"representation", "unroll"} if by_example else {"examples"}
    missing |= {"unroll"} if as_array else set()
    made: dict[str, tuple[Any, ...]] = {"plain": ("plain", problem, upgrad)}
    for way in chosen:
        if way not in missing:
            method = mtl.dwa(number) if way == "losses" else upgrad
            mode = "auto" if way in places else way
            made[way] = (places.get(way, "weighted"), problem, method, mode)
    with ThreadPoolExecutor(cores()) as pool:
        compiled = pool.map(
            lambda step: training_step(*step, by_example=by_example, as_array=as_array),
            made.values(),
        )
        return dict(zip(made, compiled, strict=True))


def measure(row: tuple[str, int], options: argparse.Namespace) -> list[Point]:
    """The points of one row."""
    network, number = row
    sizes = TINY if options.quick else LARGE if options.large else SMALL
    by_example = network == "examples"
    problem = sizes["dense" if by_example else network]
    made = ways(network, number, problem, options.ways, options.large or number > _MANY)
    calls: dict[str, Callable[[], Any]] = dict(made)
    if installed() and network in ("dense", "examples"):
        calls |= training_steps(by_example, number, problem)
    seconds = interleaved(calls, options.rounds, warm_up=1)
    params = jax.eval_shape(lambda: initial(problem, 1 if by_example else number)[0])
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)) / 2**20
    return [
        Point(
            network,
            number,
            way,
            1e3 * statistics.median(times),
            ratio(seconds, way, "plain"),
            made[way].temporary_mebibytes if way in made else None,
            size,
            machine(),
        )
        for way, times in seconds.items()
    ]


def lines_of(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """The table of one network: a line for each way, a column for each T."""
    numbers = sorted({point.number for point in points})
    lines = [("step", *(f"T = {number}" for number in numbers))]
    for way in dict.fromkeys(point.way for point in points):
        cells = {point.number: _cell(point) for point in points if point.way == way}
        lines.append((way, *(cells.get(number, "") for number in numbers)))
    return lines


def _cell(point: Point) -> str:
    time = f"{point.milliseconds:.1f} ms" if point.way == "plain" else f"{point.ratio:.2f} x"
    return time if point.memory is None else f"{time}, {point.memory:.1f} MiB"


def draw(path: Path, points: Sequence[Point]) -> None:
    """Time above and memory below over T, a column for each network, a colour for each way."""
    names = list(dict.fromkeys(point.way for point in points))
    networks = list(dict.fromkeys(point.network for point in points))
    size, handles = (3 * len(networks) + 2, 6), {}
    with picture(path, 2, len(networks), dpi=100, figsize=size) as (figure, grid):
        for (above, below), network in zip(grid.T, networks, strict=True):
            here = [point for point in points if point.network == network]
            for way in dict.fromkeys(point.way for point in here):
                style = {"color": f"C{names.index(way)}", "marker": "o", "markersize": 4}
                of_way = [point for point in here if point.way == way]
                numbers = [point.number for point in of_way]
                (handles[way],) = above.plot(numbers, [p.ratio for p in of_way], **style)
                below.plot(numbers, [p.memory for p in of_way], **style)  # None is no point
            ticks = sorted({point.number for point in here})
            for panel in (above, below):
                panel.set(xscale="log", xlabel="T")
                panel.set_xticks(ticks, [str(number) for number in ticks])
                panel.minorticks_off()
            above.set(title=network, yscale="log")
            below.set(yscale="log")
        grid[0, 0].set_ylabel("step time / plain")
        grid[1, 0].set_ylabel("temporary memory (MiB)")
        figure.legend(handles.values(), handles, loc="outside right upper", fontsize="small")


def row(text: str) -> tuple[str, int]:
    """A network and T."""
    network, _, number = text.partition(":")
    if network not in _NUMBERS or not number.isdecimal() or not int(number):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME:T, NAME one of {', '.join(_NUMBERS)}"
        )
    return network, int(number)


OPTIONS = {
    "rows": {"nargs": "+", "metavar": "NAME:T", "type": row, "help": "these rows alone"},
    "ways": {"nargs": "+", "choices": WAYS, "default": WAYS, "help": "these ways alone"},
    "rounds": {"default": 5},
    "large": {"action": "store_true", "help": "sizes for a GPU"},
}


def work(options: argparse.Namespace) -> None:
    """Measures the rows that are missing, prints the table, and writes it with the picture."""
    rows = [(network, number) for network, numbers in _NUMBERS.items() for number in numbers]
    rows = options.rows or ([(network, 2) for network in _NUMBERS] if options.quick else rows)
    stored = options.out / "ways.json" if options.out else None
    points: list[Point] = []
    if options.resume and stored and stored.exists():
        points = [Point(**each) for each in json.loads(stored.read_text("utf-8"))]
    missing = [row for row in rows if row not in {point[:2] for point in points}]
    for row in track(missing, "measuring", console=Console(stderr=True), transient=True):
        points += measure(row, options)
        points.sort(key=lambda point: (list(_NUMBERS).index(point.network), point.number))
        if stored:
            write_atomically(stored, json.dumps([p._asdict() for p in points], indent=0).encode())
    for network in dict.fromkeys(point.network for point in points):
        here = [point for point in points if point.network == network]
        machines = ", ".join(dict.fromkeys(point.machine for point in here))
        title = f"{network}, {here[0].parameters:.1f} MiB of parameters, on {machines}"
        publish(options.out, f"ways_{network}", lines_of(here), title, NOTE)
    if options.out:
        draw(options.out / "ways.png", [point for point in points if point.way != "plain"])


main = CommandLine(
    "examples.studies.benchmarks.ways",
    __doc__,
    work,
    "rows ways rounds out resume large quick",
    OPTIONS,
)

if __name__ == "__main__":
    sys.exit(main())
