"""The comparison's columns, the test over seeds and users, and the picture of weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from examples.studies.harness.data import REGRESSION, Task
from examples.studies.harness.report import MARKED, Metric, Row, curve, mean_cell, picture
from examples.studies.harness.statistics import Difference, compare
from examples.studies.recommender.evaluation import COLUMNS, PROTOCOLS

HEADLINE = "ndcg@10"
EFFORT = ("step", "runs", "seconds")


def metric(task: Task, column: str = f"{HEADLINE}, all") -> Metric:
    """A column of a ranking task, as a mean over the users; of a regression the root of its squares."""
    if task.kind == REGRESSION:
        return Metric(task.name, "rmse", lambda squares: np.sqrt(squares.mean()), digits=3)
    place = COLUMNS.index(column)
    return Metric(task.name, column, lambda users: np.nanmean(users[:, place]))


def metrics(tasks: Sequence[Task]) -> list[Metric]:
    """Every metric of every task."""
    known = {t: ("rmse",) if t.kind == REGRESSION else COLUMNS for t in tasks}
    return [metric(task, column) for task, columns in known.items() for column in columns]


def headline(tasks: Sequence[Task]) -> list[Metric]:
    """What the table shows: both protocols for the target, one number for every other task."""
    target = [metric(tasks[0], f"{HEADLINE}, {protocol}") for protocol in PROTOCOLS]
    return [*target, *map(metric, tasks[1:])]


def title(shown: Metric) -> str:
    """The head of a column."""
    name, _, protocol = shown.name.partition(", ")
    suffix = f", {protocol} items" if protocol == "new" else ""
    return f"{shown.task}: {name.replace('ndcg', 'NDCG').replace('rmse', 'RMSE')}{suffix}"


def of_users(row: Row, target: str) -> np.ndarray:
    """All metrics of a ranking task, `[columns, seeds, users]`."""
    return np.stack([run.test[target].T for run in row.runs], axis=1)


def differences(rows: Mapping[str, Row], baseline: str, target: str) -> dict[str, list[Difference]]:
    """Each trained row against the baseline, for every column of the target; Holm over all of them."""
    if baseline not in rows:
        return {}
    trained = {label: of_users(row, target) for label, row in rows.items() if row.trainings}
    return compare(trained, baseline)


def lines_of(
    rows: Mapping[str, Row], columns: Sequence[Metric], against: Mapping[str, list[Difference]]
) -> list[tuple[str, ...]]:
    """The header and the rows: mean, standard error over seeds, the mark of significance, the effort."""

    def cell(label: str, row: Row, shown: Metric) -> str:
        p_value = 1.0
        if label in against and shown.task == columns[0].task:
            p_value = against[label][COLUMNS.index(shown.name)].p_value
        return mean_cell(shown.by_seed(row.runs), shown.digits, p_value)

    def effort(row: Row) -> tuple[str, ...]:
        step = "-" if row.step is None else f"{row.step:.2f}"
        trained = (str(row.trainings), f"{row.seconds:.0f}") if row.trainings else ("-", "-")
        return step, *trained

    return [
        ("method", *map(title, columns), *EFFORT),
        *((label, *(cell(label, row, c) for c in columns), *effort(row))
          for label, row in rows.items()),
    ]  # fmt: skip


def caption(columns: Sequence[Metric], seeds: int, baseline: str | None) -> str:
    """What the numbers of the table are."""
    text = f"Test set; mean ± standard error over {seeds} training seed{'s' * (seeds != 1)}."
    text += f" Held-out positives are ranked among {PROTOCOLS['all']}"
    if any(column.name.endswith("new") for column in columns):
        text += f"; columns 'new items': among {PROTOCOLS['new']}"
    text += "."
    if baseline is None:
        return text
    scope = "seeds and users" if seeds > 1 else "users, for this one seed,"
    return (
        f"{text} {MARKED}: against {baseline}, two-sided test over {scope} at random, Holm-corrected "
        f"over methods and {len(COLUMNS)} metrics of the target. step: time of a training step over that "
        f"of {baseline}, measured in turns. seconds: of all runs together, without compilation; two rows "
        "train at a time."
    )


def draw(rows: Mapping[str, Row], tasks: Sequence[Task], path: Path) -> None:
    """The weights of the tasks over training, for every method."""
    # The first seed: an average would hide the movement.
    weights = {name: row.runs[0].history["weights"] for name, row in rows.items() if row.trainings}
    columns = min(5, len(weights))
    lines = -(-len(weights) // columns)
    size = (2.4 * columns + 1, 1.9 * lines + 0.5)
    with picture(path, lines, columns, dpi=70, figsize=size, sharex=True) as (figure, grid):
        for axes, (label, values) in zip(grid.flat, weights.items(), strict=False):
            for task, of_task in zip(tasks, values.T, strict=True):
                # A weight of 0 has no place on a logarithmic axis.
                curve(axes, np.where(of_task > 0, of_task, np.nan), task.name)
            axes.set(xlabel="epoch", yscale="log", ylim=(1e-6, 1e4))
            axes.set_title(label.replace("(", "\n(", 1), fontsize=8)
        for axes in grid.flat:
            axes.set_visible(bool(axes.lines))
        figure.supylabel("weight of the task", fontsize=8)
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=8)
