"""Tables of finished runs: metrics by task, and differences to a row over the seeds."""

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np

from examples.studies.harness.statistics import Difference, holm, paired_over_seeds
from examples.studies.ranking.data import Task
from examples.studies.ranking.metrics import METRICS
from examples.studies.recommender.report import MARKS
from examples.studies.recommender.training import Run

Runs = Mapping[str, Sequence[Run]]  # by the label of the row


def by_seed(runs: Sequence[Run], task: Task, metric: str, part: str = "test") -> np.ndarray:
    """A metric of a task, `[seeds]`."""
    place = METRICS[task.kind].index(metric)
    return np.array([getattr(run, part)[task.name][place] for run in runs])


def gains(
    rows: Runs,
    baseline: str,
    tasks: Sequence[Task],
    metric: str = "NE",
    *,
    lower_is_better: bool = True,
) -> dict[str, list[Difference]]:
    """How much better each row is than the baseline, for every task and on average, in per cent points.

    A paired t-test over the seeds, Holm-corrected over all rows, tasks and the average.
    """
    sign = -100.0 if lower_is_better else 100.0
    values = {}
    for label, runs in rows.items():
        found = [sign * by_seed(runs, task, metric) for task in tasks]
        values[label] = np.stack([*found, np.mean(found, axis=0)])
    return compare(values, baseline)


def compare(values: Mapping[str, np.ndarray], baseline: str) -> dict[str, list[Difference]]:
    """What each row `[columns, seeds]` has more than the baseline, column by column.

    A paired t-test over the seeds, Holm-corrected over all rows and columns.
    """
    found = {
        label: [
            paired_over_seeds(one, other) for one, other in zip(rows, values[baseline], strict=True)
        ]
        for label, rows in values.items()
        if label != baseline
    }
    p_values = np.array([[d.p_value for d in entry] for entry in found.values()])
    if not found:
        return found
    # One seed says nothing of differences.
    corrected = np.where(np.isnan(p_values), np.nan, holm(np.nan_to_num(p_values, nan=1.0)))
    return {
        label: [d._replace(p_value=float(p)) for d, p in zip(entry, row, strict=True)]
        for (label, entry), row in zip(found.items(), corrected, strict=True)
    }


def gain_cell(difference: Difference) -> str:
    """A gain with its standard error and the mark of significance; a dash where there is none."""
    if np.isnan(difference.mean):
        return "-"
    text = f"{difference.mean:+.3f}"
    if not np.isnan(difference.error):
        text += f" ± {difference.error:.3f}"
    return text + next((mark for limit, mark in MARKS if difference.p_value < limit), "")


def mean_cell(values: np.ndarray, digits: int = 4) -> str:
    """A mean over seeds, with its standard error where there are several; a dash for NaN.

    A metric may have no value: the AUC of a task without a positive in the test set.
    """
    if np.isnan(values.mean()):
        return "-"
    text = f"{values.mean():.{digits}f}"
    if len(values) > 1:
        text += f" ± {values.std(ddof=1) / len(values) ** 0.5:.{digits}f}"
    return text


def metrics_csv(rows: Runs, tasks: Sequence[Task]) -> str:
    """Every metric of every task that a row has, of every seed and part, unrounded."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", "part", "task", "metric", "seed", "value"])
    for label, runs in rows.items():
        for part in ("validation", "test"):
            for task in (t for t in tasks if t.name in getattr(runs[0], part)):
                for metric in METRICS[task.kind]:
                    for run, value in zip(runs, by_seed(runs, task, metric, part), strict=True):
                        writer.writerow([label, part, task.name, metric, run.seed, f"{value:.6g}"])
    return stream.getvalue()
