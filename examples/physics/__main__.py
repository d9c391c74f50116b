"""Trains physics-informed networks with several balancing methods: `python -m examples.physics`."""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from examples.physics.picture import draw
from examples.physics.problems import PROBLEMS
from examples.physics.training import Config, Run, methods, train


def main(arguments: list[str] | None = None) -> dict[tuple[str, str], Run]:
    """Runs the comparison and prints its table; returns the runs by problem and method."""
    options = _parser().parse_args(arguments)
    config = replace(Config(), steps=options.steps, seeds=options.seeds)
    if options.quick:
        config = replace(config, steps=20, chunk=10, seeds=2, width=8, depth=2, interior=16, edge=8)
    cells = [(problem, name) for problem in options.problems for name in options.methods]
    runs: dict[tuple[str, str], Run] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn()) as progress:
        bar = progress.add_task("", total=len(cells) * config.steps)
        for problem, name in cells:
            progress.update(bar, description=f"{problem}: {name}")
            for found in train(PROBLEMS[problem], name, config):
                if isinstance(found, Run):
                    runs[problem, name] = found
                else:
                    progress.update(bar, advance=config.chunk)
    console = Console()
    for problem in options.problems:
        console.print(_table(problem, options.methods, runs, config))
    console.print(_verdict(options.problems, options.methods, runs))
    if options.out:
        _write(Path(options.out), options.problems, runs, config)
    return runs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.physics", description=__doc__)
    known = list(methods())
    parser.add_argument(
        "--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS), metavar="PROBLEM"
    )
    parser.add_argument("--methods", nargs="+", choices=known, default=known, metavar="METHOD")
    parser.add_argument("--steps", type=int, default=Config.steps, help="training steps")
    parser.add_argument("--seeds", type=int, default=Config.seeds)
    parser.add_argument("--out", metavar="DIR", help="write the table and a picture a problem here")
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny networks")
    return parser


def _table(
    problem: str, names: list[str], runs: dict[tuple[str, str], Run], config: Config
) -> Table:
    table = Table(title=f"{problem}: relative L2 error after {config.steps} steps")
    table.add_column("method")
    for column in ("median", "best", "worst", "ms a step", "to the sum"):
        table.add_column(column, justify="right")
    base = runs.get((problem, "plain sum"))
    for name in names:
        run = runs[problem, name]
        errors = (np.median(run.errors), run.errors.min(), run.errors.max())
        ratio = f"{run.step_ms / base.step_ms:.2f}" if base else "-"
        table.add_row(name, *(f"{e:.4f}" for e in errors), f"{run.step_ms:.2f}", ratio)
    return table


def _verdict(problems: list[str], names: list[str], runs: dict[tuple[str, str], Run]) -> str:
    lines = []
    for problem in problems:
        errors = {name: float(np.median(runs[problem, name].errors)) for name in names}
        best = min(errors, key=errors.__getitem__)
        line = f"{problem}: the smallest median error is that of {best}, {errors[best]:.4f}"
        if "plain sum" in errors and best != "plain sum":
            line += f", {errors['plain sum'] / errors[best]:.1f} times below the plain sum's"
        lines.append(line + ".")
    return "\n".join(lines)


def _write(
    folder: Path, problems: list[str], runs: dict[tuple[str, str], Run], config: Config
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "physics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["problem", "method", "seed", "relative_l2_error", "ms_per_step"])
        for (problem, name), run in runs.items():
            for seed, error in enumerate(run.errors):
                writer.writerow([problem, name, seed, f"{error:.6g}", f"{run.step_ms:.4g}"])
    for problem in problems:
        chosen = {name: run for (where, name), run in runs.items() if where == problem}
        draw(PROBLEMS[problem], chosen, config, folder / f"{problem}.png")


if __name__ == "__main__":
    main()
