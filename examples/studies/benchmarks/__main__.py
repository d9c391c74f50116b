"""Measures time and memory of the library on this machine and prints one table.

    python -m examples.studies.benchmarks [--quick] [--only SECTION ...] [--peers] [--out FILE.md]

Ratios are medians over rounds in which what is compared runs in turns, times are medians of rounds, and
memory and floating-point operations are what XLA says of the compiled program.
`python -m examples.studies.benchmarks.growth`, `.tpu` and `.ways` have tables of their own.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import track

from examples.studies.benchmarks import methods, peers, places
from examples.studies.benchmarks.report import TITLE, Row, lines_of
from examples.studies.benchmarks.vocabulary import vocabulary
from examples.studies.harness.command import check_writable, make_parser, run_command
from examples.studies.harness.report import markdown, show

SECTIONS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "steps": places.step_times,
    "savings": places.savings,
    "map": places.map_memory,
    "vocabulary": vocabulary,
    "updates": methods.updates,
    "solvers": methods.solvers,
    "compile": methods.compile_times,
    "peers": peers.peers,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; see `run_command` for what it returns."""
    return run_command("examples.studies.benchmarks", lambda: parse(arguments), work)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = make_parser("examples.studies.benchmarks", __doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections alone")
    parser.add_argument("--peers", action="store_true", help="compare with TorchJD and PyTorch")
    parser.add_argument(
        "--out", type=Path, dest="file", metavar="FILE", help="write the table here as Markdown"
    )
    options = parser.parse_args(arguments)
    options.only = options.only or [name for name in SECTIONS if name != "peers"]
    if options.peers and "peers" not in options.only:
        options.only = [*options.only, "peers"]
    if "peers" in options.only and not peers.installed():
        parser.error("--peers needs TorchJD: pip install torch torchjd qpsolvers quadprog")
    if options.file:
        check_writable(options.file.parent)
    return options


def work(options: argparse.Namespace) -> None:
    """Measures the chosen sections, prints the table and writes it."""
    rows: list[Row] = []
    for name in track(options.only, "measuring", console=Console(stderr=True), transient=True):
        rows += SECTIONS[name](options.quick)
    order = list(dict.fromkeys(row.section for row in rows))
    rows.sort(key=lambda row: order.index(row.section))
    show(lines_of(rows), TITLE, left=2)
    if options.file:
        options.file.write_text(markdown(lines_of(rows), TITLE, left=2), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
