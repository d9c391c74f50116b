"""How good predictions are, by task: normalized entropy and AUC, or the errors of a regression."""

from collections.abc import Iterator, Sequence
from operator import itemgetter

import numpy as np

from examples.studies.harness.data import BINARY, REGRESSION, Task
from examples.studies.harness.report import Metric
from examples.studies.ranking.data import Dataset, Examples

METRICS = {BINARY: ("NE", "AUC"), REGRESSION: ("RMSE", "MAE")}


def normalized_entropy(labels: np.ndarray, logits: np.ndarray) -> float:
    """The mean cross-entropy over that of the labels' own mean (MultiBalance, equation 13).

    1 is what a constant reaches, lower is better; NaN where all labels are equal.
    """
    labels, logits = np.asarray(labels, np.float64), np.asarray(logits, np.float64)
    rate = labels.mean() if len(labels) else 0.0
    if not 0 < rate < 1:
        return float("nan")
    entropy = np.mean(np.logaddexp(0, logits) - labels * logits)
    return float(entropy / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """The area under the ROC curve; NaN where all labels are equal, or a score is."""
    from sklearn.metrics import roc_auc_score

    if len(np.unique(labels)) < 2 or np.isnan(scores).any():
        return float("nan")
    return float(roc_auc_score(labels, scores))


def normalized_loss(task: Task, labels: np.ndarray, predicted: np.ndarray) -> float:
    """The normalized entropy, or the squared error over the variance of the labels; NaN without one."""
    if task.kind == BINARY:
        return normalized_entropy(labels, predicted)
    variance = float(np.var(labels)) if len(labels) else 0.0
    error = np.asarray(predicted, np.float64) - labels
    return float(np.mean(error**2)) / variance if variance > 0 else float("nan")


def measure(task: Task, labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """The metrics `[len(METRICS[kind])]` of a task's logits or numbers."""
    if task.kind == BINARY:
        return np.array([normalized_entropy(labels, predicted), auc(labels, predicted)])
    error = np.asarray(predicted, np.float64) - labels
    return np.array([np.sqrt(np.mean(error**2)), np.mean(np.abs(error))])


def by_task(
    tasks: Sequence[Task], examples: Examples, predicted: np.ndarray
) -> Iterator[tuple[Task, np.ndarray, np.ndarray]]:
    """Every task with the labels and predictions of the examples that count for it."""
    for place, task in enumerate(tasks):
        counts = examples.mask[:, place] > 0
        yield task, examples.labels[counts, place], predicted[counts, place]


def measure_all(
    tasks: Sequence[Task], examples: Examples, predicted: np.ndarray
) -> dict[str, np.ndarray]:
    """The metrics by task of predictions `[N, T]`."""
    return {entry[0].name: measure(*entry) for entry in by_task(tasks, examples, predicted)}


def of_truth(dataset: Dataset) -> dict[str, np.ndarray] | None:
    """The metrics of the best possible model on the test set, where it is known."""
    if dataset.truth is None:
        return None
    return measure_all(dataset.tasks, dataset.test, dataset.truth)


def metric(task: Task, name: str) -> Metric:
    """A number of a run by its name in `METRICS`."""
    return Metric(task.name, name, itemgetter(METRICS[task.kind].index(name)))


def all_metrics(tasks: Sequence[Task]) -> list[Metric]:
    """Every number of every task."""
    return [metric(task, name) for task in tasks for name in METRICS[task.kind]]
