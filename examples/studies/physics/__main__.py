"""Trains physics-informed networks with several balancing methods: `python -m examples.studies.physics`.

Without options: all methods on the Helmholtz equation, and the shorter list of --help on the other two.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import threading
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.studies.harness import tables
from examples.studies.harness.command import (
    OneLineParser,
    check_numbers,
    in_threads,
    one_of,
    run_command,
)
from examples.studies.harness.timing import cores
from examples.studies.physics import report
from examples.studies.physics.picture import draw
from examples.studies.physics.problems import PROBLEMS
from examples.studies.physics.training import ROWS, Config, Run, time_steps, train

# Without --methods the first problem has all methods, and the others have these.
SHORT = (
    "plain sum",
    "fixed weights, 100",
    "inverse_norm, kept weights",
    "upgrad",
    "conflict_free",
    "mgda",
    "residual attention",
)
SETTINGS = {
    "steps": "training steps",
    "seeds": "trainings of each row",
    "interior": "points of the interior a step",
    "width": "of the network",
    "depth": "of the network",
    "learning_rate": "of Adam at the start",
}
TIMED = (
    "plain sum",
    "inverse_norm, slow average",
    "inverse_norm, slow average, one gradient",
    "inverse_norm, kept weights",
    "conflict_free",
    "conflict_free, one gradient",
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; see `run_command` for what it returns."""
    return run_command("examples.studies.physics", lambda: parse(arguments), work)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    counts = [name for name in SETTINGS if type(getattr(Config, name)) is int]
    check_numbers(options, (*counts, "jobs"))
    options.line = shlex.join(["python", "-m", "examples.studies.physics", *arguments])
    return options


def work(options: argparse.Namespace) -> None:
    """Runs the comparison, prints its tables and writes them."""
    config = Config(**{name: getattr(options, name) for name in SETTINGS})
    if options.quick:
        config = replace(config, steps=20, chunk=10, seeds=2, width=8, depth=2, interior=16, edge=8)
    config = replace(config, chunk=min(config.chunk, config.steps))
    out: Path | None = options.out
    if options.time:
        _time(options, config, out)
        return
    cells = [(problem, name) for problem in options.problems for name in _names(options, problem)]
    runs = _train(cells, config, options.jobs)
    for problem in options.problems:
        tables.show(report.lines_of(problem, runs), report.title(problem, config))
    print(report.verdict(options.problems, runs))
    if out:
        report.write_csv(runs, out / "physics.csv")
        text = report.markdown(options.problems, runs, config, options.line)
        (out / "table.md").write_text(text, encoding="utf-8")
        for problem in options.problems:
            chosen = {name: run for (where, name), run in runs.items() if where == problem}
            draw(PROBLEMS[problem], chosen, config, out / f"{problem}.png")


def _names(options: argparse.Namespace, problem: str) -> list[str]:
    if options.methods is None:
        return list(ROWS) if problem == "helmholtz" else list(SHORT)
    return list(ROWS) if options.methods == ["all"] else options.methods


def _train(cells: list[tuple[str, str]], config: Config, jobs: int) -> report.Runs:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console, stopping = Console(stderr=True), threading.Event()
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task("", total=len(cells) * config.steps * config.seeds)

        def train_one(cell: tuple[str, str]) -> Run:
            problem, name = cell
            steps = train(PROBLEMS[problem], name, config)
            while isinstance(found := next(steps), int):
                if stopping.is_set():
                    raise KeyboardInterrupt
                progress.update(bar, advance=found, description=f"{problem}: {name}")
            return found

        names = [f"{problem}: {name}" for problem, name in cells]
        runs = in_threads(train_one, cells, names, jobs, stopping)
        return dict(zip(cells, runs, strict=True))


def _time(options: argparse.Namespace, config: Config, out: Path | None) -> None:
    names = list(ROWS) if options.methods == ["all"] else options.methods or list(TIMED)
    for problem in options.problems:
        times = time_steps(PROBLEMS[problem], names, config, rounds=3 if options.quick else 20)
        lines, note = report.timing_lines(times), f"{report.TIMING}\n\nMade by `{options.line}`."
        tables.show(lines, report.timing_title(problem), note)
        if out:
            text = tables.markdown(lines, report.timing_title(problem), note)
            (out / f"{problem}_time.md").write_text(text, encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m examples.studies.physics",
        description=__doc__.splitlines()[0],
        epilog=f"Methods: {'; '.join(ROWS)}. Without --methods helmholtz has all of them, and the other "
        f"problems have: {'; '.join(SHORT)}.",
    )
    parser.add_argument(
        "--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), metavar="PROBLEM",
        help=", ".join(PROBLEMS),
    )  # fmt: skip
    parser.add_argument(
        "--methods", nargs="+", type=one_of("method", ["all", *ROWS]), metavar="METHOD",
        help="see below, or all",
    )  # fmt: skip
    for name, text in SETTINGS.items():
        default = getattr(Config, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default,
            help=f"{text} (default %(default)s)",
        )  # fmt: skip
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(2, cores()),
        help="trainings at a time (default %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write the tables and a picture a problem here"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny networks")
    parser.add_argument(
        "--time", action="store_true", help="only measure the time of a step, all methods in turns"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
