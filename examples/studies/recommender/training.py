"""Training the recommender: pairs with random items, every item ranked, the target's validation NDCG@10."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_optax as mtl
from examples.studies.harness import trainer
from examples.studies.harness.choices import Choice
from examples.studies.harness.data import REGRESSION
from examples.studies.harness.runs import Setting
from examples.studies.harness.steps import Parameters, Step, decayed, make_step
from examples.studies.harness.trainer import TEST, VALIDATION
from examples.studies.recommender.data import Dataset
from examples.studies.recommender.evaluation import (
    COLUMNS,
    Tables,
    held_out_users,
    pair_tables,
    rank_users,
)
from examples.studies.recommender.network import Batch, Network, NetworkConfig

EARLY_STOPPING = COLUMNS.index("ndcg@10, all")
STEPS_AT_ONCE = 25
PARTS = ("user embeddings", "item embeddings", "first layer", "other layers")
OPTIMIZERS = {
    "adam": optax.scale_by_adam,
    "adagrad": lambda: optax.scale_by_rss(initial_accumulator_value=0.1),
    "rmsprop": optax.scale_by_rms,
}


@dataclass(frozen=True)
class TrainConfig:
    """How every run of a table is trained."""

    epochs: int = 6
    patience: int = 3
    batch_pairs: int = 512
    negatives: int = 3
    optimizer: str = "adam"
    learning_rate: float = 1e-2
    weight_decay: float = 1.0
    validation_users: int | None = None
    network: NetworkConfig = field(default_factory=NetworkConfig)


class _Data(NamedTuple):
    """What stays on the device."""

    tables: Tables
    pairs: jax.Array  # of the training set [P, 2]
    values: jax.Array  # [P, T]


class Trainer(trainer.Trainer):
    """Trains choices on one dataset."""

    def __init__(self, dataset: Dataset, config: TrainConfig, *, probe_norms: bool = False):
        """`probe_norms` adds the tasks' gradient norms to the history: T backward passes an epoch."""
        super().__init__()
        self.dataset, self.config, self.probe_norms = dataset, config, probe_norms
        sizes, train = (dataset.num_users, dataset.num_items), dataset.train
        biases = initial_biases(dataset)
        self.network = Network(*sizes, dataset.tasks, biases, config.network, config.negatives)
        self.data = _Data(pair_tables(dataset), jnp.asarray(train.pairs), jnp.asarray(train.values))
        self.batch_pairs = min(config.batch_pairs, len(train))
        # An epoch shows every pair; a few pairs a second time, so that all its parts have one size.
        steps = -(-len(train) // self.batch_pairs)
        self.parts = max(1, round(steps / STEPS_AT_ONCE))
        self.steps_at_once = -(-steps // self.parts)
        self.steps_per_epoch = self.parts * self.steps_at_once
        # A fixed random choice of the users, where they are many.
        users = np.random.default_rng(0).permutation(held_out_users(dataset, 0, VALIDATION))
        self._validation_users = np.sort(users[: config.validation_users])
        self._rank = self.compiled(self._metrics_of_users)
        self._predict = self.compiled(lambda common, params: self.network.predict(params, *common))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a stored run must agree on."""
        return {**super().fingerprint, "norms": self.probe_norms}

    def make_step(self, choice: Choice, setting: Setting) -> Step:
        """See the base class."""
        config = self.config
        # Flattened: one kernel in place of one per parameter, which compiles several times faster.
        scaler = optax.flatten(OPTIMIZERS[config.optimizer]())
        descent = decayed(setting, {"tables"}, config.epochs * self.steps_per_epoch)
        return make_step(choice, self.network, scaler, descent, setting.knobs)

    def order(self, data: _Data, epoch: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The training pairs in random order `[parts, steps at once, batch]`, and a key for each step."""
        order_key, steps_key = jax.random.split(jax.random.fold_in(key, epoch))
        order = jax.random.permutation(order_key, len(data.pairs))
        order = jnp.resize(order, (self.parts, self.steps_at_once, self.batch_pairs))
        keys = jax.random.split(steps_key, self.parts)
        return order, jax.vmap(lambda key: jax.random.split(key, self.steps_at_once))(keys)

    def batch(self, data: _Data, slot: tuple[jax.Array, jax.Array]) -> Batch:
        """The chosen training pairs `[B]`, each with items drawn at random for the same user.

        All tasks see the same pairs. A drawn pair is looked up among the training pairs, so that one which
        is a positive counts as one. A positive of another task only is neither a positive nor a random
        negative of a ranking task: it is masked, or "rated but not 5" would be taught as worse than "never
        seen". A regression has a number for known pairs alone.
        """
        chosen, key = slot
        sample_key, dropout_key = jax.random.split(key)
        pairs, drawn = data.pairs[chosen], self.config.negatives
        users = jnp.repeat(pairs[:, 0], drawn)
        items = jax.random.randint(sample_key, users.shape, 0, self.dataset.num_items)
        values, known = data.tables[0].find(users, items)
        values = jnp.concatenate([data.values[chosen], values]).T
        is_drawn = jnp.arange(values.shape[1])[None] >= len(chosen)
        is_known = jnp.concatenate([jnp.ones(len(chosen), bool), known])[None]
        squared = jnp.array([task.kind == REGRESSION for task in self.dataset.tasks])[:, None]
        mask = jnp.where(squared, is_known, (values > 0) | (is_drawn & ~is_known))
        ids = jnp.concatenate([pairs[:, 0], users]), jnp.concatenate([pairs[:, 1], items])
        return Batch(*ids, values, mask.astype(jnp.float32), dropout_key)

    def norms(self, data: _Data, params: Parameters, key: jax.Array) -> jax.Array:
        """The gradient norms `[T, parts]` of each task on the parts of the shared bottom, on one batch.

        A probe that means the same for every method, also for those that never compute norms.
        """
        chosen_key, key = jax.random.split(key)
        chosen = jax.random.randint(chosen_key, (self.batch_pairs,), 0, len(data.pairs))
        batch = self.batch(data, (chosen, key))
        value_and_grad = mtl.split_value_and_grad(self.network.encode, self.network.decode)
        _, (grads, _) = value_and_grad(params.shared, params.heads, batch)
        bottom = grads.bottom
        parts = (*grads.tables, (bottom["from_user"], bottom["from_item"]), bottom["mlp"])  # PARTS
        return jnp.stack([jax.vmap(optax.tree.norm)(part) for part in parts], axis=1)

    def probe(
        self, data: _Data, epoch: jax.Array, params: Parameters, key: jax.Array
    ) -> dict[str, jax.Array]:
        """The gradient norms, where they are asked for."""
        if not self.probe_norms:
            return {}
        return {"norms": self.norms(data, params, jax.random.fold_in(key, epoch))}

    def validate(self, params: Parameters) -> np.ndarray:
        """The target's mean NDCG@10."""
        value = self.rank(params, 0, VALIDATION, self._validation_users)
        return np.asarray(jnp.nanmean(value[..., EARLY_STOPPING], axis=1))

    def results(self, params: Parameters) -> list[Any]:
        """Of the validation set the target alone."""
        target = [self.dataset.tasks[0].name]
        parts = self.measure(params, VALIDATION, target), self.measure(params, TEST)
        return list(zip(*parts, strict=True))

    def rank(self, params: Parameters, task: int, part: int, users: np.ndarray) -> jax.Array:
        """Metrics `[runs, users, len(COLUMNS)]` of a ranking task with every item ranked."""
        return self._rank((self.data, jnp.asarray(users), task, part), params)

    def _metrics_of_users(self, common: Any, params: Parameters) -> jax.Array:
        data, users, task, part = common
        predict = partial(self.network.predict, params, task)
        return rank_users(predict, data.tables, self.dataset.num_items, users, task, part)

    def measure(
        self, params: Parameters, part: int, tasks: Sequence[str] | None = None
    ) -> list[dict[str, np.ndarray]]:
        """The metrics of every task that has something held out, for each of the stacked `params`.

        `tasks` names some of them alone.
        """
        held_out = self.dataset.test if part == TEST else self.dataset.validation
        found: dict[str, np.ndarray] = {}
        for place, task in enumerate(self.dataset.tasks):
            if tasks is not None and task.name not in tasks:
                continue
            if task.kind == REGRESSION:
                predicted = np.asarray(self._predict((place, *held_out.pairs.T), params))
                found[task.name] = (predicted - held_out.values[:, place]) ** 2
                continue
            users = held_out_users(self.dataset, place, part)
            if not len(users):
                continue  # every pair of the task is for training
            metrics = np.asarray(self.rank(params, place, part, users))
            shape = len(metrics), self.dataset.num_users, len(COLUMNS)
            found[task.name] = np.full(shape, np.nan, np.float32)
            found[task.name][:, users] = metrics
        runs = len(next(iter(found.values())))
        return [{name: values[run] for name, values in found.items()} for run in range(runs)]


def initial_biases(dataset: Dataset) -> np.ndarray:
    """Where the towers' biases start, `[T, items]`, so that training learns what is beyond it.

    Ranking: the logits of popularity, but for a constant, the floor of the table. Regression: the mean.
    """
    biases = np.empty((len(dataset.tasks), dataset.num_items), np.float32)
    for place, task in enumerate(dataset.tasks):
        if task.kind == REGRESSION:
            biases[place] = dataset.train.values[:, place].mean()
        else:
            popular = np.log1p(popularity(dataset, place))
            biases[place] = popular - popular.mean()
    return biases


def popularity(dataset: Dataset, task: int = 0) -> np.ndarray:
    """How many training positives of a ranking task each item has, `[items]`."""
    return np.bincount(dataset.train.positives(task)[:, 1], minlength=dataset.num_items)
