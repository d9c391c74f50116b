"""The results of finished runs: a table, a picture, and files that another program can read."""

import csv
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from examples.studies.harness.statistics import Difference, holm, paired_difference
from examples.studies.recommender.data import REGRESSION, Task
from examples.studies.recommender.download import write_atomically
from examples.studies.recommender.evaluation import COLUMNS, PROTOCOLS
from examples.studies.recommender.training import PARTS, Run

MARKS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
HEADLINE = "ndcg@10"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      label: what was trained.
      validation, test: by task: `[seeds, users, len(COLUMNS)]`, or squared errors `[seeds, N]`; a task
        that the row says nothing about is missing.
      runs: how many trainings the row took, None for a row without training.
      seconds: of all of them.
      step: time of a step over the plain sum's.
      history: of the first seed, see `Run`.
    """

    label: str
    validation: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]
    runs: int | None = None
    seconds: float | None = None
    step: float | None = None
    history: Mapping[str, np.ndarray] = field(default_factory=dict)


def row_of_runs(measured: Sequence[Run], tasks: Sequence[str], **rest: Any) -> Row:
    """Stack the runs of one choice; `tasks` are those that it trained."""

    def stacked(part: str) -> dict[str, np.ndarray]:
        known = [task for task in tasks if task in getattr(measured[0], part)]
        return {task: np.stack([getattr(run, part)[task] for run in measured]) for task in known}

    rest = {"runs": len(measured), "seconds": sum(run.seconds for run in measured)} | rest
    return Row(
        measured[0].label,
        stacked("validation"),
        stacked("test"),
        history=measured[0].history,
        **rest,
    )


@dataclass(frozen=True)
class Column:
    """One number of the table: a metric of a task."""

    task: Task
    metric: str = ""  # one of COLUMNS; empty for a regression

    @property
    def title(self) -> str:
        if self.task.kind == REGRESSION:
            return f"{self.task.name}: RMSE"
        metric, protocol = self.metric.split(", ")
        suffix = "" if protocol == "all" else f", {protocol} items"
        return f"{self.task.name}: {metric.replace('ndcg', 'NDCG')}{suffix}"

    def by_seed(self, values: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """The metric `[seeds]`."""
        found = values.get(self.task.name)
        if found is None:
            return None
        if self.task.kind == REGRESSION:
            return np.sqrt(found.mean(axis=1))
        return np.nanmean(found[..., COLUMNS.index(self.metric)], axis=1)


def headline_columns(tasks: Sequence[Task]) -> list[Column]:
    """What the table shows: both protocols for the target, one number for every other task."""
    return [
        *(Column(tasks[0], f"{HEADLINE}, {protocol}") for protocol in PROTOCOLS),
        *(Column(t, "" if t.kind == REGRESSION else f"{HEADLINE}, all") for t in tasks[1:]),
    ]


def differences(rows: Sequence[Row], baseline: Row, task: Task) -> dict[str, list[Difference]]:
    """Each trained row against the baseline, for every column of the target; Holm over all of them."""
    compared = [row for row in rows if row.runs and row.label != baseline.label]
    found = {
        row.label: [
            paired_difference(row.test[task.name][..., k], baseline.test[task.name][..., k])
            for k in range(len(COLUMNS))
        ]
        for row in compared
    }
    if not found:
        return {}
    corrected = holm(np.array([[d.p_value for d in entry] for entry in found.values()]))
    return {
        label: [d._replace(p_value=float(p)) for d, p in zip(entry, values, strict=True)]
        for (label, entry), values in zip(found.items(), corrected, strict=True)
    }


def _mark(p_value: float) -> str:
    return next((mark for limit, mark in MARKS if p_value < limit), "")


def cells(
    row: Row, columns: Sequence[Column], against: Mapping[str, list[Difference]]
) -> list[str]:
    """The numbers of a row: mean, standard error over seeds, and the mark of significance."""
    result = []
    for column in columns:
        values = column.by_seed(row.test)
        if values is None or np.isnan(values.mean()):  # nobody has anything held out
            result.append("-")
            continue
        digits = 2 if column.task.kind == REGRESSION else 4
        text = f"{values.mean():.{digits}f}"
        if len(values) > 1:
            text += f" ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}"
        if column.metric and row.label in against and column.task.name == columns[0].task.name:
            text += _mark(against[row.label][COLUMNS.index(column.metric)].p_value)
        result.append(text)
    result.append("-" if row.step is None else f"{row.step:.2f}")
    result.append("-" if row.runs is None else str(row.runs))
    result.append("-" if row.seconds is None else f"{row.seconds:.0f}")
    return result


EFFORT = ("step", "runs", "seconds")


def lines_of(
    rows: Sequence[Row], columns: Sequence[Column], against: Mapping[str, list[Difference]]
) -> list[tuple[str, ...]]:
    """The header and the rows of the table."""
    header = ("method", *(column.title for column in columns), *EFFORT)
    return [header, *((row.label, *cells(row, columns, against)) for row in rows)]


def metrics_csv(rows: Sequence[Row], tasks: Sequence[Task]) -> str:
    """Every metric of every task, seed and part, unrounded."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", "part", "task", "metric", "seed", "value"])
    columns = [
        Column(task, metric)
        for task in tasks
        for metric in ([""] if task.kind == REGRESSION else COLUMNS)
    ]
    for row in rows:
        for part in ("validation", "test"):
            for column in columns:
                values = column.by_seed(getattr(row, part))
                for seed, value in enumerate([] if values is None else values):
                    name = column.metric or "rmse"
                    writer.writerow([row.label, part, column.task.name, name, seed, f"{value:.6g}"])
    return stream.getvalue()


def caption(columns: Sequence[Column], seeds: int, baseline: str | None) -> str:
    """What the numbers of the table are."""
    text = f"Test set; mean ± standard error over {seeds} training seed{'s' * (seeds != 1)}."
    text += f" Held-out positives are ranked among {PROTOCOLS['all']}"
    if any(column.metric.endswith("new") for column in columns):
        text += f"; columns 'new items': among {PROTOCOLS['new']}"
    text += "."
    if baseline is None:
        return text
    marks = ", ".join(f"{mark} p < {limit}" for limit, mark in reversed(MARKS))
    scope = "seeds and users" if seeds > 1 else "users, for this one seed,"
    return (
        f"{text} {marks}: against {baseline}, two-sided test over {scope} at random, Holm-corrected "
        f"over methods and {len(COLUMNS)} metrics of the target. step: time of a training step over that "
        f"of {baseline}, measured in turns. seconds: of all runs together, without compilation; two rows "
        "train at a time."
    )


def curve(axes: Any, values: np.ndarray, label: str) -> None:
    """Draw values over the epochs 1, 2, ...; a single one is a point."""
    marker = "o" if len(values) == 1 else None
    axes.plot(np.arange(1, len(values) + 1), values, marker=marker, label=label)


def draw(rows: Sequence[Row], tasks: Sequence[Task], path: Path) -> None:
    """Gradient norms and, below them, task weights over training, for every method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "weights" in row.history]
    shown = {"weights": "weight of the task"}
    if rows and "norms" in rows[0].history:
        shown = {"norms": f"gradient norm,\n{PARTS[0]}", **shown}
    columns = min(5, len(rows))
    lines = -(-len(rows) // columns) * len(shown)
    figure, grid = plt.subplots(
        lines, columns, figsize=(2.4 * columns + 1, 1.9 * lines), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for place, row in enumerate(rows):
        line, column = divmod(place, columns)
        for offset, (name, label) in enumerate(shown.items()):
            axes = grid[line * len(shown) + offset, column]
            values = row.history[name]  # the first seed: an average would hide the movement
            values = values[..., 0] if name == "norms" else values
            for number, task in enumerate(tasks):
                # A weight of 0 has no place on a logarithmic axis.
                positive = np.where(values[:, number] > 0, values[:, number], np.nan)
                curve(axes, positive, task.name)
            axes.set(yscale="log", ylim=(1e-6, 1e4))
            if column == 0:
                axes.set_ylabel(label, fontsize=8)
            if offset == 0:
                axes.set_title(row.label.replace("(", "\n(", 1), fontsize=8)
            if offset + 1 == len(shown):
                axes.set_xlabel("epoch", fontsize=8)
    for axes in grid.ravel():
        if not axes.lines:
            axes.set_visible(False)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    figure.savefig(path, dpi=70)
    plt.close(figure)


def store_run(run: Run, path: Path, fingerprint: dict[str, Any]) -> None:
    """Keep a finished run, whole or not at all, with what it was trained with."""
    about = {
        "fingerprint": fingerprint,
        "label": run.label,
        "seed": run.seed,
        "best_epoch": run.best_epoch,
        "seconds": run.seconds,
    }
    arrays = {
        f"{part}/{name}": values
        for part in ("validation", "test", "history")
        for name, values in getattr(run, part).items()
    }
    stream = io.BytesIO()
    np.savez_compressed(stream, about=json.dumps(about), **arrays)
    write_atomically(path, stream.getvalue())


def load_run(path: Path, fingerprint: dict[str, Any]) -> Run | None:
    """A stored run, or None where there is none that was trained in the same way.

    On the main thread only: numpy parses the header of an array with `ast.literal_eval`, which fails at
    random in threads of Python 3.11.

    Raises:
      Exception: of any class for a damaged file, as zip, zlib, numpy and json all read from it.
    """
    if not path.exists():
        return None
    content = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(content) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
    content.seek(0)
    with np.load(content) as stored:
        about = json.loads(str(stored["about"]))
        if about.pop("fingerprint") != fingerprint:
            return None
        parts: dict[str, dict[str, np.ndarray]] = {"validation": {}, "test": {}, "history": {}}
        for name in stored.files:
            part, _, rest = name.partition("/")
            if part in parts:
                parts[part][rest] = stored[name]
        return Run(**about, **parts)
