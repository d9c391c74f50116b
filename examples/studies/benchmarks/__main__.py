"""Measures time and memory of the library on this machine.

    python -m examples.studies.benchmarks [--quick] [--only SECTION ...] [--peers] [--out FOLDER]

A section is a table of its own, printed and written as soon as it is measured. Ratios are medians over
rounds in which what is compared runs in turns, times are medians of rounds, and memory and floating-point
operations are what XLA says of the compiled program.
`python -m examples.studies.benchmarks.tpu`, `.ways` and `.clients` measure the rest.
"""

import argparse
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import track

from examples.studies.benchmarks import methods, peers, places
from examples.studies.benchmarks.report import Row, lines_of
from examples.studies.harness.command import CommandLine
from examples.studies.harness.errors import UserError
from examples.studies.harness.report import publish
from examples.studies.harness.timing import machine

SECTIONS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "steps": places.step_times,
    "savings": places.savings,
    "products": places.products_memory,
    "updates": methods.updates,
    "solvers": methods.solvers,
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
    """Measures the chosen sections, prints their tables and writes them."""
    for name in track(options.only, "measuring", console=Console(stderr=True), transient=True):
        rows = SECTIONS[name](options.quick)
        publish(options.out, name, lines_of(rows), f"{name}, on {machine()}", left=2)


main = CommandLine(
    "examples.studies.benchmarks", __doc__, work, "only peers out quick", OPTIONS, complete
)

if __name__ == "__main__":
    sys.exit(main())
