"""One picture a table or figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from examples.studies.harness.statistics import Difference
from mtl_optax.plotting import plot_norms, plot_weights

matplotlib.use("Agg")

import matplotlib.pyplot as plt

PANELS = {
    "c": "original gradient magnitude",
    "d": "learned weight",
    "e": "weighted gradient magnitude",
}
POINTS = 200  # of a curve


def gains(
    found: Mapping[str, Sequence[Difference]], columns: Sequence[str], path: Path, title: str
) -> None:
    """The gain of every row, a plot per task, with standard errors."""
    figure, grid = plt.subplots(
        1, len(columns), figsize=(2.1 * len(columns) + 1.8, 0.3 * len(found) + 1.1), sharey=True,
        layout="constrained",
    )  # fmt: skip
    labels = list(found)
    for place, (axes, name) in enumerate(zip(grid, columns, strict=True)):
        means = [found[label][place].mean for label in labels]
        errors = np.nan_to_num([found[label][place].error for label in labels])
        axes.barh(labels, means, xerr=errors, color="tab:blue", alpha=0.7)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(name, fontsize=9)
    grid[0].invert_yaxis()
    figure.supxlabel(f"NE gain (× 100) {title}", fontsize=9)
    _save(figure, path)


def bins(curves: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Means over as many steps as leave at most `POINTS` points, and the last step of each."""
    steps = len(next(iter(curves.values())))
    size = -(-steps // POINTS)
    ends = np.arange(size, steps + 1, size)
    means = {
        name: values[: len(ends) * size].reshape(len(ends), size, -1).mean(axis=1)
        for name, values in curves.items()
    }
    return ends, means


def magnitudes(
    steps: np.ndarray, curves: Mapping[str, np.ndarray], names: Sequence[str], path: Path
) -> None:
    """Figure 2's panels c, d and e."""
    figure, grid = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    for axes, (panel, title) in zip(grid, PANELS.items(), strict=True):
        draw: Any = plot_weights if panel == "d" else plot_norms
        draw(curves[panel], task_names=names, ax=axes)
        for line in axes.get_lines():
            line.set_xdata(steps)
        axes.relim()
        axes.autoscale_view()
        axes.set_title(f"({panel}) {title}", fontsize=9)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
