"""EMTL's experiments (Yuan and Zhang, 2023, section 5): `python -m examples.studies.emtl COMMAND`.

    python -m examples.studies.emtl figure1 --out results
    python -m examples.studies.emtl table1 --data ../data/census_income_kdd --out results
    python -m examples.studies.emtl table3 --quick

Each command prints a table and writes it as Markdown and CSV, most with a picture, to `--out`.
"""

import argparse
import importlib
import shlex
import sys
from pathlib import Path
from typing import Any

from examples.studies.harness.command import OneLineParser, check_numbers, run_command

# A command is a function of its own name in a module that is imported when it is asked for.
COMMANDS = {
    "figure1": ("figure1", "a toy problem with two losses: five starting points, eight methods"),
    "table1": ("tables", "MMoE and PLE with all methods on two binary tasks"),
    "table2": ("dense", "segmentation, depth and normals of rendered scenes"),
    "table3": ("tables", "a click, a completion rate and a watch time of a synthetic log"),
}
ONLY = {  # the options of some commands alone; all others are everybody's
    "data": ("table1", "table2"),
    "seeds": ("table1", "table2", "table3"),
    "steps": ("figure1", "table2"),
    "epochs": ("table1", "table3"),
    "trials": ("table1", "table3"),
    "examples": ("table1", "table3"),
    "resume": ("table1", "table2", "table3"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "data": {"help": "a folder, or synthetic where the command can generate data"},
    "seeds": {"type": int, "help": "training seeds of each row"},
    "steps": {"type": int, "help": "training steps"},
    "epochs": {"type": int, "help": "at most so many"},
    "trials": {"type": int, "help": "validation trials of each row"},
    "examples": {"type": int, "help": "at most so many for training, and as many for validation"},
    "out": {"type": Path, "help": "folder for the tables and pictures"},
    "resume": {"action": "store_true", "help": "go on from the finished runs in --out"},
    "quick": {"action": "store_true", "help": "tiny data and few steps, to see that it works"},
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line asks for; an option that was not given is None, and the command's own."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = OneLineParser(
        prog="python -m examples.studies.emtl",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, (_, text) in COMMANDS.items():
        made = commands.add_parser(command, help=text, description=text)
        for name, how in OPTIONS.items():
            if command in ONLY.get(name, COMMANDS):
                made.add_argument(f"--{name}", **how)
    options = parser.parse_args(arguments)
    numbers = [name for name, how in OPTIONS.items() if how.get("type") is int]
    check_numbers(options, numbers)
    options.line = shlex.join(["python", "-m", "examples.studies.emtl", *arguments])
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command; see `run_command` for what it returns."""

    def work(options: argparse.Namespace) -> None:
        module = importlib.import_module(f"examples.studies.emtl.{COMMANDS[options.command][0]}")
        getattr(module, options.command)(options)

    return run_command("examples.studies.emtl", lambda: parse(arguments), work)


if __name__ == "__main__":
    sys.exit(main())
