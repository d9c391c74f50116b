"""The results of finished runs as tables and files."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from examples.studies.harness import tables
from examples.studies.physics.training import Config, Run

Runs = dict[tuple[str, str], Run]  # by problem and row
BASE = "plain sum"
LEGEND = """Slow average: `ema_decay=0.999`. Kept weights: computed on every 100th step, one backward pass
in between, as jaxpi does. One gradient: one loss a step, with `remember`. Residual attention: one weight
for each of the points of a fixed pool; the losses are added. NTK traces: estimated on every 100th step.

Step times are those of the moment: another load of the machine changes them. `--time` measures in turns."""
HEADER = ("method", "median", "best", "worst", "ms a step", "to the sum's")


def lines_of(problem: str, runs: Runs) -> list[tuple[str, ...]]:
    """The header and the rows of a problem's table: relative L2 errors, and the time of a step."""
    base = runs.get((problem, BASE))
    rows = [HEADER]
    for (where, name), run in runs.items():
        if where == problem:
            errors = (np.median(run.errors), run.errors.min(), run.errors.max())
            ratio = f"{run.step_ms / base.step_ms:.2f}" if base else "-"
            rows.append((name, *(f"{e:.4f}" for e in errors), f"{run.step_ms:.2f}", ratio))
    return rows


def title(problem: str, config: Config) -> str:
    """What the numbers are."""
    return f"{problem}: relative L2 error after {config.steps} steps, {config.seeds} seeds"


def markdown(problems: list[str], runs: Runs, config: Config, command: str) -> str:
    """All tables and the verdict for a page."""
    parts = ["# Physics-informed networks", f"Made by `{command}` with\n`{config}`.", LEGEND]
    parts += verdict(problems, runs).splitlines()
    for problem in problems:
        parts.append(tables.markdown(lines_of(problem, runs), title(problem, config)).rstrip())
    return "\n\n".join(parts) + "\n"


def verdict(problems: list[str], runs: Runs) -> str:
    """One line a problem: the best row beside the plain sum."""
    lines = []
    for problem in problems:
        errors = {
            name: float(np.median(run.errors))
            for (where, name), run in runs.items()
            if where == problem
        }
        best = min(errors, key=errors.__getitem__)
        line = f"{problem}: the smallest median error is that of {best}, {errors[best]:.4f}"
        if BASE in errors and best != BASE:
            line += f", {errors[BASE] / errors[best]:.1f} times below the plain sum's"
        lines.append(line + ".")
    return "\n".join(lines)


def write_csv(runs: Runs, path: Path) -> None:
    """The error of every seed."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["problem", "method", "seed", "relative_l2_error", "ms_per_step"])
        for (problem, name), run in runs.items():
            for seed, error in enumerate(run.errors):
                writer.writerow([problem, name, seed, f"{error:.6g}", f"{run.step_ms:.4g}"])


TIMING = "Medians over rounds, of the times and of each round's ratio."
TIMING_HEADER = ("method", "ms a step", "to the sum's")


def timing_title(problem: str) -> str:
    """What the times are."""
    return f"{problem}: milliseconds a step, all methods in turns"


def timing_lines(times: dict[str, list[float]]) -> list[tuple[str, str, str]]:
    """The median time of each row and the median ratio to the first one's time of the same round."""
    base = np.array(next(iter(times.values())))
    rows = [
        (name, f"{np.median(taken):.3f}", f"{np.median(np.array(taken) / base):.2f}")
        for name, taken in times.items()
    ]
    return [TIMING_HEADER, *rows]
