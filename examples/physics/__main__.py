"""Trains physics-informed networks with several balancing methods: `python -m examples.physics`.

Without options: all methods on the Helmholtz equation, and the shorter list of --help on the other two.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.benchmarks.timing import cores
from examples.physics import report
from examples.physics.picture import draw
from examples.physics.problems import PROBLEMS
from examples.physics.training import ROWS, Config, Run, time_steps, train

# Without --methods the first problem has all methods, and the others have these.
SHORT = (
    "plain sum",
    "fixed weights, 100",
    "inverse_norm, kept weights",
    "upgrad",
    "config",
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
    "config",
    "config, one gradient",
)


def main(arguments: list[str] | None = None) -> report.Runs:
    """Runs the comparison and prints its tables; returns the runs by problem and method."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    command = shlex.join(["python", "-m", "examples.physics", *arguments])
    config = Config(**{name: getattr(options, name) for name in SETTINGS})
    if options.quick:
        config = replace(config, steps=20, chunk=10, seeds=2, width=8, depth=2, interior=16, edge=8)
    config = replace(config, chunk=min(config.chunk, config.steps))
    out = Path(options.out) if options.out else None
    if out:
        out.mkdir(parents=True, exist_ok=True)
    if options.time:
        _time(options, config, command, out)
        return {}
    console = Console()
    cells = [(problem, name) for problem in options.problems for name in _names(options, problem)]
    runs = _train(cells, config, options.jobs, console)
    for problem in options.problems:
        console.print(report.rich_table(problem, runs, config))
    console.print(report.verdict(options.problems, runs))
    if out:
        report.write_csv(runs, out / "physics.csv")
        text = report.markdown(options.problems, runs, config, command)
        (out / "table.md").write_text(text, encoding="utf-8")
        for problem in options.problems:
            chosen = {name: run for (where, name), run in runs.items() if where == problem}
            draw(PROBLEMS[problem], chosen, config, out / f"{problem}.png")
    return runs


def _names(options: argparse.Namespace, problem: str) -> list[str]:
    if options.methods is None:
        return list(ROWS) if problem == "helmholtz" else list(SHORT)
    return list(ROWS) if options.methods == ["all"] else options.methods


def _train(
    cells: list[tuple[str, str]], config: Config, jobs: int, console: Console
) -> report.Runs:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with (
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
        ThreadPoolExecutor(jobs) as pool,
    ):
        bar = progress.add_task("", total=len(cells) * config.steps * config.seeds)

        def run(cell: tuple[str, str]) -> Run:
            problem, name = cell
            steps = train(PROBLEMS[problem], name, config)
            while isinstance(found := next(steps), int):
                progress.update(bar, advance=found, description=f"{problem}: {name}")
            return found

        return dict(zip(cells, pool.map(run, cells), strict=True))


def _time(options: argparse.Namespace, config: Config, command: str, out: Path | None) -> None:
    names = list(ROWS) if options.methods == ["all"] else options.methods or list(TIMED)
    for problem in options.problems:
        times = time_steps(PROBLEMS[problem], names, config, rounds=3 if options.quick else 20)
        Console().print(report.timing_table(problem, times))
        if out:
            text = report.timing_markdown(problem, times, command)
            (out / f"{problem}_time.md").write_text(text, encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.physics",
        description=__doc__.splitlines()[0],
        epilog=f"Methods: {'; '.join(ROWS)}. Without --methods helmholtz has all of them, and the other "
        f"problems have: {'; '.join(SHORT)}.",
    )
    parser.add_argument(
        "--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), metavar="PROBLEM",
        help=", ".join(PROBLEMS),
    )  # fmt: skip
    parser.add_argument(
        "--methods", nargs="+", choices=["all", *ROWS], metavar="METHOD", help="see below, or all"
    )
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
        "--out", metavar="DIR", help="write the tables and a picture a problem here"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny networks")
    parser.add_argument(
        "--time", action="store_true", help="only measure the time of a step, all methods in turns"
    )
    return parser


if __name__ == "__main__":
    main()
