"""One picture a problem: the solution, the errors of two methods, and weights over training."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from examples.studies.physics.problems import Problem
from examples.studies.physics.training import Config, Run
from mtl_optax.plotting import plot_weights

matplotlib.use("Agg")

import matplotlib.pyplot as plt


def draw(problem: Problem, runs: dict[str, Run], config: Config, path: Path) -> None:
    """Draws the exact solution, the error of the plain sum and of the best method, and its weights."""
    best = min(runs, key=lambda name: float(np.median(runs[name].errors)))
    exact = problem.solution(problem.grid(config.grid)).reshape(config.grid, config.grid)
    extent = (problem.low[1], problem.high[1], problem.low[0], problem.high[0])
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    panels = [("exact solution", exact)]
    panels += [(f"error: {n}", runs[n].field - exact) for n in ("plain sum", best) if n in runs]
    for axis, (title, field) in zip(axes, panels, strict=False):
        limit = np.abs(field).max()
        image = axis.imshow(
            field,
            extent=extent,
            origin="lower",
            aspect="auto",
            cmap="RdBu",
            vmin=-limit,
            vmax=limit,
        )
        axis.set(title=title, xlabel="second coordinate", ylabel="first coordinate")
        figure.colorbar(image, ax=axis)
    run = runs[best]
    plot_weights(run.weights, task_names=run.names, ax=axes[3])
    axes[3].set(title="its weights", xlabel=f"training, in {config.chunk} steps", yscale="log")
    figure.savefig(path, dpi=90)
    plt.close(figure)
