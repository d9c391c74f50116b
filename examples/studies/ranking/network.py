"""A model of `examples.models` as functions of its parameters: what the harness trains."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.models.layers import Features, TabularModel, head_task, is_head
from examples.studies.harness import steps
from examples.studies.harness.data import BINARY
from examples.studies.harness.steps import Parameters
from examples.studies.ranking.data import Dataset, Examples

# The loss of a conversion rate: a mean over the clicks of a batch, or their sum over the batch's size.
COUNTED, BATCH = "counted", "batch"
MakeModel = Callable[..., TabularModel]  # (features, num_tasks, rngs=) -> model


class Network(steps.Network):
    """The model, and constants at which its outputs start.

    To the logits of a task the log odds of its training labels are added, and to a number their mean, so
    that training learns what is beyond the base rate.
    """

    def __init__(
        self, dataset: Dataset, make_model: MakeModel, batch: int, mean_over: str = COUNTED
    ):
        """`mean_over` is what a loss that some examples do not count for is divided by."""
        self._over_batch = mean_over == BATCH
        self.num_tasks = len(dataset.tasks)
        self._tasks = dataset.tasks
        self._make = lambda key: make_model(dataset.features, self.num_tasks, rngs=nnx.Rngs(key))
        abstract = nnx.eval_shape(self._make, jax.random.key(0))
        self._graph, heads, shared = nnx.split(abstract, is_head, ...)
        # The half of the parameters that a function does not read.
        self._no_heads, self._no_shared = heads, shared
        self._starts = jnp.asarray(_starts(dataset))
        spec = dataset.features
        like = Features(
            jax.ShapeDtypeStruct((batch, spec.num_numerical), jnp.float32),
            jax.ShapeDtypeStruct((batch, len(spec.vocabulary_sizes)), jnp.int32),
        )
        self.representation: Any = jax.eval_shape(
            lambda shared, features: self._bottom(shared).represent(features), shared, like
        )

    def init(self, key: jax.Array) -> Parameters:
        """Fresh parameters."""
        _, heads, shared = nnx.split(self._make(key), is_head, ...)
        return Parameters(shared, heads)

    def _bottom(self, shared: Any) -> TabularModel:
        return nnx.merge(self._graph, self._no_heads, shared)

    def _towers(self, heads: Any) -> TabularModel:
        return nnx.merge(self._graph, heads, self._no_shared)

    def encode(self, shared: Any, batch: Examples) -> Any:
        """The shared representation."""
        return self._bottom(shared).represent(batch.features)

    def losses(self, heads: Any, copies: tuple[Any, ...], batch: Examples) -> tuple[jax.Array, ...]:
        """The T losses: the mean over the examples that count for the task, or over the batch."""
        model, losses = self._towers(heads), []
        for place, (task, copy) in enumerate(zip(self._tasks, copies, strict=True)):
            found = model.head(place, copy, batch.features) + self._starts[place]
            labels, mask = batch.labels[:, place], batch.mask[:, place]
            losses.append(task.loss(found, labels, mask, len(labels) if self._over_batch else None))
        return tuple(losses)

    def weigh_heads(self, head_grads: Any, weights: jax.Array) -> Any:
        """The gradients of the towers, each times the weight of its task."""

        def weigh(path: Any, grad: jax.Array) -> jax.Array:
            task = head_task(tuple(getattr(key, "key", None) for key in path))
            assert task is not None
            return grad * weights[task]

        return jax.tree_util.tree_map_with_path(weigh, head_grads)

    def predict(self, params: Parameters, features: Features) -> jax.Array:
        """Logits and numbers `[batch, T]`."""
        model = nnx.merge(self._graph, params.heads, params.shared)
        return model(features).T + self._starts[None]


def _starts(dataset: Dataset) -> np.ndarray:
    found = []
    for place, task in enumerate(dataset.tasks):
        labels = dataset.train.labels[:, place][dataset.train.mask[:, place] > 0]
        mean = labels.mean() if len(labels) else 0.5
        if task.kind == BINARY:
            # With half a positive and half a negative more: one label alone has no finite log odds.
            mean = (labels.sum() + 0.5) / (len(labels) + 1)
            mean = np.log(mean) - np.log1p(-mean)
        found.append(mean)
    return np.asarray(found, np.float32)
