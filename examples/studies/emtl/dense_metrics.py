"""Losses and metrics of segmentation, depth and surface normals, as the field has them.

Pixels without a label count in nothing: label -1, depth 0, normal (0, 0, 0).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.models.segnet_mtan import TASKS, Predictions
from examples.studies.emtl.scenes import Scenes


@dataclass(frozen=True)
class Metric:
    """A column of the table."""

    name: str
    task: str
    higher_is_better: bool
    digits: int = 2


METRICS = (
    Metric("mIoU", "segmentation", True),
    Metric("pixel accuracy", "segmentation", True),
    Metric("absolute error", "depth", False, 4),
    Metric("relative error", "depth", False, 4),
    Metric("mean angle", "normals", False),
    Metric("median angle", "normals", False),
    Metric("within 11.25", "normals", True),
    Metric("within 22.5", "normals", True),
    Metric("within 30", "normals", True),
)
ANGLES = (11.25, 22.5, 30.0)


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
    labels, kinds = np.asarray(scenes.labels), np.argmax(predictions.segmentation, axis=-1)
    there = labels >= 0
    classes = predictions.segmentation.shape[-1]
    confusion = np.bincount(labels[there] * classes + kinds[there], minlength=classes**2).reshape(
        classes, classes
    )
    right, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    # A class that is neither in the labels nor in the predictions has no intersection over union.
    found = union > 0
    known = scenes.depths != 0
    error = np.abs(np.asarray(predictions.depth) - scenes.depths)[known]
    directed = np.any(scenes.normals != 0, axis=-1)
    cosines = np.sum(np.asarray(predictions.normals) * scenes.normals, axis=-1)[directed]
    angles = np.degrees(np.arccos(np.clip(cosines, -1, 1)))
    return np.array(
        [
            100 * np.mean(right[found] / union[found]),
            100 * right.sum() / confusion.sum(),
            error.mean(),
            np.mean(error / scenes.depths[known]),
            angles.mean(),
            np.median(angles),
            *(100 * np.mean(angles < limit) for limit in ANGLES),
        ]
    )


def delta_m(metrics: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Mean relative loss against the base over the last axis, in percent; below 0 is better than it."""
    signs = np.array([-1 if metric.higher_is_better else 1 for metric in METRICS])
    return 100 * np.mean(signs * (metrics - base) / base, axis=-1)
