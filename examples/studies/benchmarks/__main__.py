"""Measures time and memory of the library on this machine and prints one table.

    python -m examples.studies.benchmarks [--quick] [--only SECTION ...] [--peers] [--out FOLDER]

Ratios are medians over rounds in which what is compared runs in turns, times are medians of rounds, and
memory and floating-point operations are what XLA says of the compiled program.
`python -m examples.studies.benchmarks.growth`, `.tpu` and `.ways` have tables of their own.
"""

import argparse
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import track

from examples.studies.benchmarks import methods, peers, places
from examples.studies.benchmarks.report import TITLE, Row, lines_of
from examples.studies.harness.command import CommandLine
from examples.studies.harness.errors import UserError
from examples.studies.harness.report import publish
from examples.studies.harness.timing import machine

SECTIONS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "steps": places.step_times,
    "savings": places.savings,
    "map": places.map_memory,
    "updates": methods.updates,
    "solvers": methods.solvers,
    "compile": methods.compile_times,
    "peers": peers.peers,
}
OPTIONS = {
    "only": {"nargs": "+", "choices": SECTIONS, "help": "these sections alone"},
    "peers": {"action": "store_true", "help": "compare with TorchJD and PyTorch"},
}


def complete(options: argparse.Namespace) -> None:
    """Choose the sections."""
    options.only = options.only or [name for name in SECTIONS if name != "peers"]
    if options.peers and "peers" not in options.only:
        options.only = [*options.only, "peers"]
    if "peers" in options.only and not peers.installed():
        raise UserError("--peers needs TorchJD: pip install torch torchjd qpsolvers quadprog")


def work(options: argparse.Namespace) -> None:
    """Measures the chosen sections, prints the table and writes it."""
    rows: list[Row] = []
    for name in track(options.only, "measuring", console=Console(stderr=True), transient=True):
        rows += SECTIONS[name](options.quick)
    order = list(dict.fromkeys(row.section for row in rows))
    rows.sort(key=lambda row: order.index(row.section))
    publish(options.out, "table", lines_of(rows), f"{TITLE}, on {machine()}", left=2)


main = CommandLine(
    "examples.studies.benchmarks", __doc__, work, "only peers out quick", OPTIONS, complete
)

if __name__ == "__main__":
    sys.exit(main())
