"""EMTL's experiments (Yuan and Zhang, 2023, section 5): `python -m examples.emtl COMMAND`.

    python -m examples.emtl figure1 --out results
    python -m examples.emtl table1 --data ../data/census_income_kdd --out results
    python -m examples.emtl table3 --quick

Each command prints a table and writes it as Markdown and CSV, most with a picture, to `--out`.
"""

import argparse
import importlib
import shlex
import sys
from pathlib import Path

from examples.compare import OneLineParser
from examples.recommender.errors import UserError

# A command is a function of its own name in a module that is imported when it is asked for.
COMMANDS = {
    "figure1": ("figure1", "a toy problem with two losses: five starting points, eight methods"),
    "table1": ("tables", "MMoE and PLE with all methods on two binary tasks"),
    "table2": ("dense", "segmentation, depth and normals of rendered scenes"),
    "table3": ("tables", "a click, a watch time and a completion rate of a synthetic log"),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """What the command line asks for; an option that was not given is None, and the command's own."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = OneLineParser(
        prog="python -m examples.emtl",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        add = commands.add_parser(name, help=text, description=text).add_argument
        add("--data", help="a folder, or the name of a source; figure1 has no data")
        add("--seeds", type=int, help="training seeds of each row")
        add("--steps", type=int, help="training steps")
        add("--epochs", type=int, help="at most, where training counts in epochs")
        add("--trials", type=int, help="validation trials of each row, where there is a search")
        add("--out", type=Path, help="folder for the tables and pictures")
        add("--resume", action="store_true", help="go on from the finished runs in --out")
        add("--quick", action="store_true", help="tiny data and few steps, to see that it works")
    options = parser.parse_args(arguments)
    for name in ("seeds", "steps", "epochs", "trials"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if options.resume and options.out is None:
        raise UserError("--resume needs --out DIR, where the finished runs are kept")
    options.line = shlex.join(["python", "-m", "examples.emtl", *arguments])
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 on success, 2 when the user can mend what went wrong."""
    try:
        options = parse(arguments)
        module = importlib.import_module(f"examples.emtl.{COMMANDS[options.command][0]}")
        getattr(module, options.command)(options)
    except UserError as error:
        print(f"examples.emtl: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("examples.emtl: stopped; --resume goes on from what --out holds", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
