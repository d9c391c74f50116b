"""MultiBalance's experiments (He et al., 2024, section 5) on data of your own.

    python -m examples.studies.multibalance table3 --data synthetic --out results
    python -m examples.studies.multibalance table3 --data ../data/hillstrom --seeds 5 --out results
    python -m examples.studies.multibalance table2 --rounds 20

What is run: `tune` (the optimizer's settings for the plain sum), `table2` (the speed of training with the
representation balanced, or the parameters of a module), `table3` (gains in normalized entropy over the
plain sum, all methods on the representation), `table4` (the learning rate of MultiBalance's weights),
`figure2` (gradient magnitudes and weights over the steps). Each prints a table and writes CSV, Markdown and
a picture to `--out`; `--resume` goes on from the finished runs there.

--data: a folder that holds Hillstrom's or the census file, or train and test files in the form of
AliExpress or Ali-CCP; or `synthetic`, a generated log of `--size` impressions.
"""

import argparse
import importlib
import shlex
import sys
from pathlib import Path

from examples.studies.harness.command import OneLineParser, check_numbers, run_command

# In modules that are imported when they are asked for: the speed alone needs neither rich nor pandas.
COMMANDS = {
    "tune": "study",
    "table2": "speed",
    "table3": "study",
    "table4": "study",
    "figure2": "study",
}
AT_LEAST_ONE = ("size", "seeds", "trials", "epochs", "batch", "rounds", "jobs")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line asks for; an option that was not given is None, and the command's own."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = OneLineParser(
        prog="python -m examples.studies.multibalance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("--data", default="synthetic", help="see above (default: synthetic)")
    add("--size", type=int, help="impressions of the generated log; table2: rows of all tables")
    add("--seeds", type=int, help="training seeds of each row (default 5; figure2: 1)")
    add("--trials", type=int, help="table3: validation trials of each row (default 4)")
    add("--epochs", type=int, help="at most")
    add("--batch", type=int, help="examples of a step")
    add(
        "--mean-over",
        choices=("batch", "counted"),
        default="batch",
        help="what a loss is divided by: the size of the batch (default, as in the paper), or the "
        "number of examples that count for the task",
    )
    add("--rounds", type=int, help="table2: measurements of each row, in turns")
    add("--jobs", type=int, default=2, help="trainings at a time (default 2)")
    add("--out", type=Path, help="folder for the tables and pictures")
    add("--resume", action="store_true", help="go on from the finished runs in --out")
    add("--quick", action="store_true", help="tiny data and few steps, to see that it works")
    options = parser.parse_args(arguments)
    check_numbers(options, AT_LEAST_ONE)
    options.line = shlex.join(["python", "-m", "examples.studies.multibalance", *arguments])
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command; see `run_command` for what it returns."""

    def work(options: argparse.Namespace) -> None:
        module = importlib.import_module(
            f"examples.studies.multibalance.{COMMANDS[options.command]}"
        )
        getattr(module, options.command)(options)

    return run_command("examples.studies.multibalance", lambda: parse(arguments), work)


if __name__ == "__main__":
    sys.exit(main())
