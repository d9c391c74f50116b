"""Losses and metrics of segmentation, depth and surface normals, as the field has them.

Pixels without a label count in nothing: label -1, depth 0, normal (0, 0, 0).
"""

from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.metrics import jaccard_score

from examples.models.segnet_mtan import TASKS, Predictions
from examples.studies.emtl.scenes import Scenes
from examples.studies.harness.report import Metric

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
