"""Trains physics-informed networks with several balancing methods: `python -m examples.studies.physics`.

Without options: all methods on the Helmholtz equation, and the shorter list of --help on the other two.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from examples.studies.harness.command import CommandLine, one_of
from examples.studies.harness.report import Metric, metrics_csv, picture, publish
from examples.studies.harness.runner import Job, Runner
from examples.studies.harness.runs import Plan, Run
from examples.studies.harness.timing import cores, step_times
from examples.studies.physics.problems import PROBLEMS
from examples.studies.physics.training import ERROR, FIELD, ROWS, Config, Trainer, choose
from mtl_optax.plotting import plot_weights

BASE = "plain sum"
# Without --methods the first problem has all methods, and the others have these.
SHORT = (
    BASE, "fixed weights, 100", "inverse_norm, kept weights", "upgrad", "conflict_free", "mgda",
    "residual attention",
)  # fmt: skip
TIMED = (
    BASE, "inverse_norm, slow average", "inverse_norm, slow average, one gradient",
    "inverse_norm, kept weights", "conflict_free", "conflict_free, one gradient",
)  # fmt: skip
SETTINGS = ("steps", "seeds", "interior", "width", "depth")  # of `Config`
OPTIONS = {
    name: {"type": int, "default": value, "help": "default %(default)s"}
    for name, value in vars(Config()).items() if name in SETTINGS
} | {
    "problems": {"nargs": "+", "choices": list(PROBLEMS), "default": list(PROBLEMS)},
    "methods": {"nargs": "+", "type": one_of("method", ["all", *ROWS]), "metavar": "METHOD"},
    "quick": {"help": "a few steps of tiny networks"},
    "time": {"action": "store_true", "help": "only measure the time of a step, in turns"},
}  # fmt: skip
EPILOG = (
    f"Methods: {'; '.join(ROWS)}. Without --methods helmholtz has all of them, and the other problems "
    f"have: {'; '.join(SHORT)}."
)
LEGEND = (
    "Slow average: `ema_decay=0.999`. Kept weights: computed on every 100th step, one backward pass in "
    "between, as jaxpi does. One gradient: one loss a step, with `remember`. Residual attention: one "
    "weight for each of the points of a fixed pool; the losses are added. NTK traces: estimated on every "
    "100th step."
)
L2 = Metric(ERROR, ERROR, float)
Runs = Mapping[str, Sequence[Run]]  # by row


def complete(options: argparse.Namespace) -> None:
    """The sizes of the network and of the training."""
    config = Config(**{name: getattr(options, name) for name in SETTINGS})
    if options.quick:
        config = replace(config, steps=20, chunk=10, seeds=2, width=8, depth=2, interior=16, edge=8)
    options.config = replace(config, chunk=min(config.chunk, config.steps))


def work(options: argparse.Namespace) -> None:
    """Run the comparison, print a table a problem and write it."""
    for problem in options.problems:
        (measure_times if options.time else compare)(problem, options)


def compare(problem: str, options: argparse.Namespace) -> None:
    """The errors of all methods on one problem."""
    config, out, names = options.config, options.out, options.methods
    names = names or (["all"] if problem == "helmholtz" else list(SHORT))
    names = list(ROWS) if names == ["all"] else names
    trainer = Trainer(PROBLEMS[problem], config)
    runner = Runner(trainer, trainer.fingerprint, out, options.resume, min(2, cores()))
    plans = [Plan(seed, trainer.default_setting()) for seed in range(config.seeds)]
    found = runner.train([Job(choose(name), plans) for name in names])
    runs = dict(zip(names, found, strict=True))
    title = f"{problem}: relative L2 error after {config.steps} steps, {config.seeds} seeds"
    note = f"{LEGEND}\n\nMade by `{options.line}` with `{config}`."
    files = {f"{problem}.csv": metrics_csv(runs, [L2])}
    publish(out, problem, lines_of(runs), title, note, files)
    if out is not None:
        draw(trainer, runs, out / f"{problem}.png")


def lines_of(runs: Runs) -> list[tuple[str, ...]]:
    """The header and the rows of a problem's table: relative L2 errors."""
    lines = [("method", "median", "best", "worst", "sum / median")]
    errors = {name: L2.by_seed(row) for name, row in runs.items()}
    for name, values in errors.items():
        shown = np.median(values), values.min(), values.max()
        less = f"{np.median(errors[BASE]) / np.median(values):.1f}" if BASE in errors else "-"
        lines.append((name, *(f"{error:.4f}" for error in shown), less))
    return lines


def draw(trainer: Trainer, runs: Runs, path: Path) -> None:
    """The exact solution, the error of the plain sum and of the best method, and its weights."""
    best = min(runs, key=lambda name: float(np.median(L2.by_seed(runs[name]))))
    panels = {"exact solution": trainer.exact} | {
        f"error: {name}": runs[name][0].test[FIELD] - trainer.exact
        for name in (BASE, best)
        if name in runs
    }
    problem, grid = trainer.problem, trainer.config.grid
    extent = (problem.low[1], problem.high[1], problem.low[0], problem.high[0])
    with picture(path, 1, 4, dpi=90, figsize=(16, 3.6)) as (figure, (axes,)):
        for axis, (title, field) in zip(axes, panels.items(), strict=False):
            limit = np.abs(field).max()
            shown = {"origin": "lower", "aspect": "auto", "cmap": "RdBu", "extent": extent}
            image = axis.imshow(field.reshape(grid, grid), vmin=-limit, vmax=limit, **shown)
            axis.set(title=title, xlabel="second coordinate", ylabel="first coordinate")
            figure.colorbar(image, ax=axis)
        plot_weights(runs[best][0].history["weights"], task_names=problem.terms, ax=axes[3])
        steps = f"training, in {trainer.config.chunk} steps"
        axes[3].set(title="its weights", xlabel=steps, yscale="log")


def measure_times(problem: str, options: argparse.Namespace) -> None:
    """The time of a step of every row, in turns, so that all see the same load of the machine."""
    names = list(ROWS) if options.methods == ["all"] else options.methods or list(TIMED)
    chunk = min(100, options.config.steps)
    trainer = Trainer(PROBLEMS[problem], replace(options.config, chunk=chunk))
    calls = trainer.step_calls([choose(name) for name in names])
    rows = step_times(calls, chunk, names[0], 3 if options.quick else 20)
    lines = [
        ("method", "ms a step", "to the sum's"),
        *((name, f"{time:.3f}", f"{share:.2f}") for name, time, share in rows),
    ]
    note = "Medians over rounds, of the times and of each round's ratio."
    title = f"{problem}: milliseconds a step, all methods in turns"
    publish(options.out, f"{problem}_time", lines, title, f"{note}\n\nMade by `{options.line}`.")


main = CommandLine(
    "examples.studies.physics",
    __doc__,
    work,
    f"{' '.join(OPTIONS)} out resume",
    OPTIONS,
    complete,
    epilog=EPILOG,
)

if __name__ == "__main__":
    sys.exit(main())
