"""Losses, metrics and the table of segmentation, depth and surface normals, as the field has them.

Pixels without a label count in nothing: label -1, depth 0, normal (0, 0, 0).
"""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.metrics import jaccard_score

from examples.models.segnet_mtan import TASKS, Predictions
from examples.studies.emtl.scenes import CLASSES, Scenes
from examples.studies.harness.report import Metric, mean_cell, metrics_csv, picture, publish
from examples.studies.harness.runs import Run

TESTED = "metrics"  # what a run calls the numbers of `measure`
ANGLES = (11.25, 22.5, 30.0)
# The columns of the table; an arrow says what is better.
NAMES = (
    "mIoU ↑", "pixel accuracy ↑", "absolute error ↓", "relative error ↓", "mean angle ↓",
    "median angle ↓", *(f"within {angle:g} ↑" for angle in ANGLES),
)  # fmt: skip
SIGNS = np.array([1 if name.endswith("↑") else -1 for name in NAMES])
METRICS = [
    Metric(TESTED, name, itemgetter(place), digits=4 if "error" in name else 2)
    for place, name in enumerate(NAMES)
]
Runs = Mapping[str, Sequence[Run]]  # by row; the first row is the base of delta-m
NOTE = """Arrows: higher (↑) or lower (↓) is better. Errors of depth are in units of the scene, angles in
degrees, the rest in percent. Mean ± standard error over seeds of the last step's metrics on the test
images. delta-m: mean relative loss over the nine metrics against STL, the mean over its seeds. Less LS:
delta-m less that of the plain sum with the same seed, which starts from the same parameters and sees the
same batches. STL: one SegNet a task without attention. Trials are compared by the mean logarithm of the
losses of held-out images; nothing is selected on the test images. Methods on gradients stand on the shared
parameters, the others on the losses.""".replace("\n", " ")
BASE = "LS"


def loss(task: int, prediction: jax.Array, scenes: Scenes) -> jax.Array:
    """The loss of one of `TASKS`: cross-entropy, absolute error, or 1 - cosine, over labelled pixels."""
    if TASKS[task] == "segmentation":
        there = scenes.labels >= 0
        labels = jnp.where(there, scenes.labels, 0)
        each = optax.softmax_cross_entropy_with_integer_labels(prediction, labels)
    elif TASKS[task] == "depth":
        there = scenes.depths[..., 0] != 0
        each = jnp.abs(prediction - scenes.depths)[..., 0]
    else:
        there = jnp.any(scenes.normals != 0, axis=-1)
        each = 1 - jnp.sum(prediction * scenes.normals, axis=-1)
    return jnp.sum(jnp.where(there, each, 0)) / jnp.maximum(jnp.sum(there), 1)


def measure(predictions: Predictions, scenes: Scenes) -> np.ndarray:
    """The `METRICS` over all labelled pixels of all images; shares in percent, angles in degrees."""
    there = scenes.labels >= 0
    labels, found = scenes.labels[there], np.argmax(predictions.segmentation, axis=-1)[there]
    # A class that is neither in the labels nor in the predictions has no intersection over union.
    overlap = 100 * jaccard_score(labels, found, average="macro")
    right = 100 * np.mean(labels == found)
    known = scenes.depths != 0
    error = np.abs(predictions.depth - scenes.depths)[known]
    directed = np.any(scenes.normals != 0, axis=-1)
    cosines = np.sum(predictions.normals * scenes.normals, axis=-1)[directed]
    angles = np.degrees(np.arccos(np.clip(cosines, -1, 1)))
    depth = error.mean(), np.mean(error / scenes.depths[known])
    within = [100 * np.mean(angles < limit) for limit in ANGLES]
    return np.array([overlap, right, *depth, angles.mean(), np.median(angles), *within])


def delta_m(metrics: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Mean relative loss against the base over the last axis, in percent; below 0 is better than it."""
    return -100 * np.mean(SIGNS * (metrics - base) / base, axis=-1)


def write(runs: Runs, data: str, made: str, out: Path | None, scenes: Scenes | None = None) -> None:
    """Print the table, and write table2.md, table2.csv and a picture of rendered scenes."""
    base = np.mean([run.test[TESTED] for run in next(iter(runs.values()))], axis=0)
    delta = Metric(TESTED, "delta-m ↓", lambda values: delta_m(values, base), digits=2)
    columns = [*METRICS, delta]
    lines = [("method", *(column.name for column in columns), f"less {BASE} ↓")]
    for label, row in runs.items():
        less = delta.by_seed(row) - delta.by_seed(runs[BASE])
        lines.append((label, *(column.cell(row) for column in columns), mean_cell(less, 2)))
    training = np.mean([run.history["validation"] for run in runs[BASE]], axis=0)
    trained = (
        f"The mean logarithm of the held-out losses of {BASE} is "
        f"{-training[(len(training) - 1) // 2]:.3f} half-way and {-training[-1]:.3f} at the end."
    )
    title = f"EMTL, Table 2: segmentation, depth and surface normals; {data}"
    files = {"table2.csv": metrics_csv(runs, columns)}
    publish(out, "table2", lines, title, f"{NOTE} {trained}\n\n{made}", files)
    if out is not None and scenes is not None:
        _draw_scenes(scenes, out / "table2_scenes.png")


def _draw_scenes(scenes: Scenes, path: Path, number: int = 4) -> None:
    """Some images and what is to be predicted for them."""
    number = min(number, len(scenes.images))
    shown = {
        "image": scenes.images,
        "segmentation": scenes.labels,
        "depth": scenes.depths[..., 0],
        "normals": (1 - scenes.normals) / 2,
    }
    with picture(path, 4, number, dpi=70, figsize=(2 * number, 6.4)) as (figure, grid):
        for axes, (name, part) in zip(grid, shown.items(), strict=True):
            axes[0].set_ylabel(name)
            for k in range(number):
                axes[k].imshow(part[k], interpolation="nearest")
                axes[k].set(xticks=[], yticks=[])
        figure.suptitle(f"SYNTHETIC SCENES; classes: {', '.join(CLASSES)}", fontsize=8)
