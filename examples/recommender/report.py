"""The results of finished runs: a table, a picture, and files that another program can read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy import stats

from examples.recommender.download import write_atomically
from examples.recommender.metrics import CUTOFFS, METRICS
from examples.recommender.training import Run

POPULARITY = "popularity"
MARKS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))


@dataclass(frozen=True)
class Row:
    """One line of the table; `None` where a number does not exist (one seed, no baseline)."""

    method: str
    mean: np.ndarray  # [metrics]
    error: np.ndarray | None  # [metrics], standard error of the mean over seeds
    p_value: np.ndarray | None  # [metrics], corrected for the number of methods
    best_epoch: float | None
    seconds: float | None


def caption(seeds: int, baseline: str | None) -> str:
    """What the numbers of the table are."""
    text = f"mean ± standard error over {seeds} training seed{'s' * (seeds != 1)}"
    if baseline is None:
        return text
    marks = ", ".join(f"{mark} p < {limit}" for limit, mark in reversed(MARKS))
    return (
        f"{text}; {marks}: against {baseline}, two-sided t-test paired over users (each user's "
        "metric averaged over seeds), Holm-corrected over methods"
    )


def make_rows(runs: Mapping[str, list[Run]], floor: np.ndarray, baseline: str | None) -> list[Row]:
    """The popularity floor and one row per method, compared with the baseline user by user."""
    by_user = {method: np.mean([run.test for run in done], axis=0) for method, done in runs.items()}
    # The floor of the users that were ranked: the test may be on a part of them.
    floor = np.where(np.isnan(next(iter(by_user.values()))), np.nan, floor)
    others = [method for method in runs if method != baseline]
    corrected: dict[str, np.ndarray] = {}
    if baseline is not None and others:
        raw = [paired_p_values(by_user[method], by_user[baseline]) for method in others]
        corrected = dict(zip(others, holm(np.array(raw)), strict=True))
    rows = [Row(POPULARITY, np.nanmean(floor, axis=0), None, None, None, None)]
    for method, done in runs.items():
        means = np.array([np.nanmean(run.test, axis=0) for run in done])
        error = means.std(axis=0, ddof=1) / np.sqrt(len(done)) if len(done) > 1 else None
        epoch = float(np.mean([run.best_epoch for run in done]))
        seconds = float(np.sum([run.seconds for run in done]))
        rows.append(Row(method, means.mean(axis=0), error, corrected.get(method), epoch, seconds))
    return rows


def paired_p_values(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The p-value of each metric; 1 where the two do not differ for any user."""
    difference = (one - other)[~np.isnan(one).any(axis=1)]
    values = np.ones(difference.shape[1])
    for column in np.flatnonzero(np.ptp(difference, axis=0) > 0):
        values[column] = stats.ttest_1samp(difference[:, column], 0.0).pvalue
    return values


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down correction along the first axis (the methods)."""
    order = np.argsort(p_values, axis=0)
    left = len(p_values) - np.arange(len(p_values))
    scaled = np.take_along_axis(p_values, order, axis=0) * left[:, None]
    ordered = np.minimum(np.maximum.accumulate(scaled, axis=0), 1.0)
    result = np.empty_like(ordered)
    np.put_along_axis(result, order, ordered, axis=0)
    return result


def _cell(row: Row, column: int) -> str:
    text = f"{row.mean[column]:.4f}"
    if row.error is not None:
        text += f" ± {row.error[column]:.4f}"
    if row.p_value is not None:
        text += next((mark for limit, mark in MARKS if row.p_value[column] < limit), "")
    return text


def rich_table(rows: list[Row], title: str, note: str) -> Table:
    """The table for the terminal: one section per cutoff, so that it fits into 80 columns."""
    table = Table(title=title, caption=note)
    for name in ("method", "NDCG", "recall", "precision"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for k in CUTOFFS:
        columns = [column for column, name in enumerate(METRICS) if name.endswith(f"@{k}")]
        table.add_row(f"[bold]at {k}[/bold]")
        for row in rows:
            table.add_row(row.method, *(_cell(row, column) for column in columns))
        table.add_section()
    return table


HEADER = ("method", *METRICS, "best epoch", "seconds")


def markdown_table(rows: list[Row], title: str, note: str) -> str:
    """The same table for a page."""
    lines = [HEADER, ("---",) + ("---:",) * (len(HEADER) - 1)]
    for row in rows:
        effort = ("", "")
        if row.best_epoch is not None:
            effort = (f"{row.best_epoch:.1f}", f"{row.seconds:.0f}")
        lines.append((row.method, *(_cell(row, column) for column in range(len(METRICS))), *effort))
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"**{title}**\n\n{body}\n\n{note}.\n"


def json_results(rows: list[Row], settings: dict[str, Any]) -> str:
    """Settings and unrounded numbers."""

    def by_metric(values: np.ndarray | None) -> dict[str, float] | None:
        return None if values is None else dict(zip(METRICS, map(float, values), strict=True))

    results = [
        {
            "method": row.method,
            "mean": by_metric(row.mean),
            "standard_error": by_metric(row.error),
            "p_value": by_metric(row.p_value),
            "best_epoch": row.best_epoch,
            "seconds": row.seconds,
        }
        for row in rows
    ]
    return json.dumps({"settings": settings, "results": results}, indent=1) + "\n"


def draw(runs: Mapping[str, list[Run]], tasks: tuple[str, ...], path: Path) -> None:
    """Gradient norms (top) and task weights (bottom) over training, one column per method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {"norms": "gradient norm on\nthe shared bottom", "weights": "weight of the task"}
    figure, grid = plt.subplots(
        len(rows), len(runs), figsize=(2.6 * len(runs) + 1, 5), sharex=True, sharey="row",
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for column, (method, done) in enumerate(runs.items()):
        for axes, (name, label) in zip(grid[:, column], rows.items(), strict=True):
            values = done[0].history[name]  # the first seed: an average would hide the movement
            for task, title in enumerate(tasks):
                axes.plot(np.arange(1, len(values) + 1), values[:, task], label=title)
            axes.set_title(method if name == "norms" else "")
            if column == 0:
                axes.set_ylabel(label)
            if name == "norms":
                axes.set_yscale("log")
            else:
                axes.set_xlabel("epoch")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def store_run(run: Run, path: Path, fingerprint: dict[str, Any]) -> None:
    """Keep a finished run, whole or not at all, with what it was trained with."""
    record = {
        "fingerprint": fingerprint,
        "method": run.method,
        "seed": run.seed,
        "best_epoch": run.best_epoch,
        "seconds": run.seconds,
        "test": np.where(np.isnan(run.test), -1.0, run.test).tolist(),
        "history": {name: values.tolist() for name, values in run.history.items()},
    }
    write_atomically(path, json.dumps(record).encode())


def load_run(path: Path, fingerprint: dict[str, Any]) -> Run | None:
    """A stored run, or None where there is none that was trained in the same way."""
    try:
        record = json.loads(path.read_bytes())
        if record["fingerprint"] != fingerprint:
            return None
        test = np.array(record["test"], dtype=np.float64)
        history = {name: np.array(values) for name, values in record["history"].items()}
        return Run(
            record["method"],
            record["seed"],
            np.where(test < 0, np.nan, test),
            record["best_epoch"],
            record["seconds"],
            history,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
