"""Training of tabular models on examples with features."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_optax as mtl
from examples.models.layers import Features
from examples.studies.harness import trainer
from examples.studies.harness.choices import Choice
from examples.studies.harness.runs import Setting
from examples.studies.harness.steps import Step, decayed, make_step
from examples.studies.ranking.data import Dataset, Examples
from examples.studies.ranking.metrics import by_task, measure_all, normalized_loss
from examples.studies.ranking.network import COUNTED, MakeModel, Network

EXAMPLES_AT_ONCE = 4096  # in the evaluation


@dataclass(frozen=True)
class TrainConfig:
    """How every run of a table is trained.

    Attributes:
      epochs: at most so many.
      patience: so many epochs in a row without a better validation value end training.
      batch: examples of a step.
      learning_rate: of Adam.
      weight_decay: of the embedding tables, times the learning rate (AdamW).
      mean_over: "counted" divides the loss of a task by the number of examples that count for it, "batch"
        by the size of the batch.
    """

    epochs: int = 6
    patience: int = 2
    batch: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 1.0
    mean_over: str = COUNTED


class Trainer(trainer.Trainer):
    """Trains choices on one dataset with one model.

    The value that stops is minus the mean over the tasks of the normalized entropy or, for a regression, of
    the squared error over the variance of the labels.
    """

    every_step = True

    def __init__(self, dataset: Dataset, make_model: MakeModel, config: TrainConfig):
        super().__init__()
        self.dataset, self.config = dataset, config
        self.batch_size = min(config.batch, dataset.train.size)
        self.network = Network(dataset, make_model, self.batch_size, config.mean_over)
        # An epoch shows every example; a few a second time, so that all batches have one size.
        self.steps_per_epoch = -(-dataset.train.size // self.batch_size)
        self.data = jax.tree.map(jnp.asarray, dataset.train)
        self._predict = jax.jit(self._predict_blocks)

    def make_step(self, choice: Choice, setting: Setting) -> Step:
        """See the base class."""
        # Flattened: one kernel in place of one per parameter, which compiles several times faster.
        scaler = optax.flatten(optax.scale_by_adam())
        descent = decayed(setting, {"tables"})
        return make_step(choice, self.network, scaler, descent, setting.knobs)

    def order(self, data: Examples, epoch: jax.Array, key: jax.Array) -> jax.Array:
        """Rows of the examples in random order, `[1, steps, batch]`."""
        order = jax.random.permutation(jax.random.fold_in(key, epoch), self.dataset.train.size)
        return jnp.resize(order, (1, self.steps_per_epoch, self.batch_size))

    def batch(self, data: Examples, slot: jax.Array) -> Examples:
        """The examples of the rows `[batch]`."""
        return jax.tree.map(lambda column: column[slot], data)

    def recorded(self, losses: Any, weights: jax.Array, state: Any) -> dict[str, jax.Array]:
        """With the norms of the task gradients, where the method has them, and MultiBalance's lambda."""
        found = super().recorded(losses, weights, state)
        norms = mtl.diagnostics(state).get("norms")
        if norms is not None and norms.ndim == 1:
            found["norms"] = norms
        simplex = optax.tree.get(state, "simplex_weights")
        if simplex is not None:
            found["simplex weights"] = simplex.reshape(-1)
        return found

    def result(self, params: Any) -> Any:
        """Both sets, all tasks."""
        return self.measure(params, self.dataset.validation), self.measure(
            params, self.dataset.test
        )

    def predict(self, params: Any, features: Features) -> np.ndarray:
        """Logits and numbers `[N, T]`."""
        size = len(features.numerical)
        at_once = min(EXAMPLES_AT_ONCE, size)
        rows = np.resize(np.arange(size), (-(-size // at_once), at_once))
        found = self._predict(params, jax.tree.map(lambda column: column[rows], features))
        return np.asarray(found).reshape(-1, len(self.dataset.tasks))[:size]

    def _predict_blocks(self, params: Any, features: Features) -> jax.Array:
        return jax.lax.map(lambda block: self.network.predict(params, block), features)

    def measure(self, params: Any, examples: Examples) -> dict[str, np.ndarray]:
        """The metrics of every task."""
        predicted = self.predict(params, examples.features)
        return measure_all(self.dataset.tasks, examples, predicted)

    def value(self, params: Any) -> float:
        """What early stopping looks at: see the class."""
        examples = self.dataset.validation
        predicted = self.predict(params, examples.features)
        if not np.isfinite(predicted).all():
            return -np.inf
        of_tasks = by_task(self.dataset.tasks, examples, predicted)
        losses = [normalized_loss(*entry) for entry in of_tasks]
        # A task whose validation labels are all equal says nothing.
        return -float(np.nanmean(losses)) if not np.isnan(losses).all() else 0.0
