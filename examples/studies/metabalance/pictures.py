"""One picture a table or figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from examples.studies.recommender.evaluation import COLUMNS
from examples.studies.recommender.report import Row, curve
from examples.studies.recommender.training import PARTS

matplotlib.use("Agg")

import matplotlib.pyplot as plt

NDCG = COLUMNS.index("ndcg@10, all")


def _ndcg(row: Row, target: str) -> np.ndarray:
    """NDCG@10 in per cent, `[seeds]`."""
    return 100 * np.nanmean(row.test[target][..., NDCG], axis=1)


def _save(figure: Any, path: Path | None) -> None:
    assert path is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def bars(rows: Sequence[Row], target: str, path: Path | None) -> None:
    """NDCG@10 of every row, with the seeds as dots."""
    figure, axes = plt.subplots(figsize=(7, 0.35 * len(rows) + 1.2), layout="constrained")
    for place, row in enumerate(rows):
        values = _ndcg(row, target)
        axes.barh(place, values.mean(), color="tab:blue", alpha=0.6)
        axes.plot(values, np.full(len(values), place), "k.", markersize=4)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"test NDCG@10 of {target!r} (%); a dot is a seed")
    _save(figure, path)


def relax(rows: Sequence[Row], factors: Sequence[float], target: str, path: Path | None) -> None:
    """NDCG@10 over the relax factor, beside the plain sum."""
    sum_row, *others = rows
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    values = np.stack([_ndcg(row, target) for row in others])
    error = values.std(axis=1, ddof=1) / values.shape[1] ** 0.5 if values.shape[1] > 1 else None
    axes.errorbar(factors, values.mean(axis=1), error, marker="o", capsize=3, label="MetaBalance")
    axes.axhline(_ndcg(sum_row, target).mean(), color="tab:orange", label=sum_row.label)
    axes.set(xlabel="relax factor r", ylabel=f"test NDCG@10 of {target!r} (%)")
    axes.legend()
    _save(figure, path)


def norms(rows: Sequence[Row], tasks: Sequence[str], path: Path | None) -> None:
    """Gradient norms of every task, a column per row of the table, a line of plots per part."""
    figure, grid = plt.subplots(
        len(PARTS), len(rows), figsize=(2.8 * len(rows), 2 * len(PARTS)), sharex=True, sharey="row",
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for column, row in enumerate(rows):
        values = row.history["norms"]  # [E, T, parts]
        for part, name in enumerate(PARTS):
            axes = grid[part, column]
            for task, title in enumerate(tasks):
                curve(axes, values[:, task, part], title)
            axes.set_yscale("log")
            if column == 0:
                axes.set_ylabel(f"gradient norm,\n{name}")
        grid[0, column].set_title(row.label, fontsize=9)
        grid[-1, column].set_xlabel("epoch")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    _save(figure, path)


def losses(rows: Sequence[Row], path: Path | None) -> None:
    """The target's training loss, epoch by epoch, of the first seed."""
    figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for row in rows:
        curve(axes, row.history["losses"][:, 0], row.label)
    axes.set(xlabel="epoch", ylabel="training loss of the target")
    axes.legend()
    _save(figure, path)
