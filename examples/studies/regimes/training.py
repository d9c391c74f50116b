"""Training the item-item network: batches of users, all items scored, the target's validation NDCG@10."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_optax as mtl
from examples.studies.harness import trainer
from examples.studies.harness.choices import Choice
from examples.studies.harness.runs import Setting
from examples.studies.harness.steps import Parameters, Step, decayed, make_step
from examples.studies.harness.trainer import TEST, VALIDATION
from examples.studies.recommender.data import Dataset
from examples.studies.recommender.training import initial_biases
from examples.studies.regimes.network import Batch, Network, Shared, predict
from examples.studies.regimes.ranking import held_out, ndcg
from examples.studies.regimes.regimes import Regime, label_tables

TINY = 1e-12  # the logarithm of a weight of 0


@dataclass(frozen=True)
class TrainConfig:
    """How every run is trained; `learning_rate` and `weight_decay` are where the tuning starts."""

    epochs: int = 20
    patience: int | None = (
        20  # the best epoch is kept, but none is left out: the rate falls to the end
    )
    batch_users: int = 512
    embedding: int = 128
    dropout: float = 0.3
    learning_rate: float = 1e-2
    weight_decay: float = 0.3


class _Data(NamedTuple):
    """What stays on the device: who touched what, bool `[U, I]`, and `label_tables`."""

    known: jax.Array
    labels: jax.Array


class Trainer(trainer.Trainer):
    """Trains choices on one dataset, each under the regime that is among its knobs."""

    def __init__(self, dataset: Dataset, config: TrainConfig):
        super().__init__()
        self.dataset, self.config = dataset, config
        labels = label_tables(dataset)
        known = jnp.asarray(labels[0].any(axis=0))
        self.data = _Data(known, jnp.asarray(labels))
        self._held_out = {part: held_out(dataset, part) for part in (VALIDATION, TEST)}
        self.batch_users = min(config.batch_users, dataset.num_users)
        self.steps_per_epoch = -(-dataset.num_users // self.batch_users)
        self._bias = initial_biases(dataset)
        self._rank = self.compiled(self._ndcg_of_users)

    def setting(self, regime: Regime, rate: float, decay: float, **knobs: Any) -> Setting:
        """The setting of a run."""
        share = self.batch_users / self.dataset.num_users
        positives = len(self.dataset.train.positives(0)) * share
        numbers = regime.knobs(len(self.dataset.tasks), positives)
        return Setting(rate, decay, {"regime": numbers, **knobs})

    def _network(self, knobs: Any = None) -> Network:
        config = self.config
        return Network(self._bias, config.embedding, self.batch_users, config.dropout, knobs)

    def init(self, key: jax.Array) -> Parameters:
        """See the base class."""
        return self._network().init(key)

    def make_step(self, choice: Choice, setting: Setting) -> Step:
        """The step of a choice, which also gives the tasks' gradient norms on the shared parameters."""
        knobs = dict(setting.knobs)
        network = self._network(knobs.pop("regime"))
        steps = self.config.epochs * self.steps_per_epoch
        descent = decayed(setting, Shared._fields, steps)
        step = make_step(choice, network, optax.scale_by_adam(), descent, knobs)
        value_and_grad = mtl.split_value_and_grad(network.encode, network.decode)

        def update(params: Parameters, state: Any, batch: Batch) -> Any:
            # XLA merges this with the same gradients of a method on the parameters.
            _, (grads, _) = value_and_grad(params.shared, params.heads, batch)
            norms = jax.vmap(optax.tree.norm)(grads)
            params, state, losses, weights = step.update(params, state, batch)
            return params, state, (losses, norms), weights

        return Step(step.init, update)

    def recorded(self, losses: Any, weights: jax.Array, state: Any) -> dict[str, jax.Array]:
        """The losses, and the logarithms of weights and norms over the target's, whose mean counts."""
        del state
        losses, norms = losses
        found = {"log_weights": weights, "log_norms": norms}
        relative = {name: jnp.log(jnp.maximum(v, TINY)) for name, v in found.items()}
        return {"losses": losses, **{name: v[1:] - v[0] for name, v in relative.items()}}

    def order(self, data: _Data, epoch: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """All users in random order `[1, steps, batch]`, a few of them twice, and a key for each step."""
        order_key, steps_key = jax.random.split(jax.random.fold_in(key, epoch))
        order = jax.random.permutation(order_key, self.dataset.num_users)
        order = jnp.resize(order, (1, self.steps_per_epoch, self.batch_users))
        return order, jax.random.split(steps_key, (1, self.steps_per_epoch))

    def batch(self, data: _Data, slot: tuple[jax.Array, jax.Array]) -> Batch:
        """The chosen users."""
        users, key = slot
        return Batch(data.known[users].astype(jnp.float32), data.labels[:, :, users], key)

    def validate(self, params: Parameters) -> np.ndarray:
        """The target's mean NDCG@10."""
        return self.ndcg(params, VALIDATION)[..., 0].mean(axis=1)

    def results(self, params: Parameters) -> list[Any]:
        """The target's NDCG@10 of users `[held-out users, 2]`, under both protocols."""
        name = self.dataset.tasks[0].name
        parts = (self.ndcg(params, part) for part in (VALIDATION, TEST))
        return [({name: one}, {name: other}) for one, other in zip(*parts, strict=True)]

    def ndcg(self, params: Parameters, part: int) -> np.ndarray:
        """The target's NDCG@10 `[runs, held-out users, 2]`, under both protocols."""
        return np.asarray(self._rank((self.data.known, self._held_out[part]), params))

    def _ndcg_of_users(self, common: Any, params: Parameters) -> jax.Array:
        known, pairs = common
        return ndcg(predict(params, known[pairs.users].astype(jnp.float32), 0), pairs)


def sparse(values: np.ndarray) -> list[list[float]]:
    """Numbers of users as `[place, value]` of those that are not 0, for a file."""
    return [[int(place), round(float(values[place]), 4)] for place in np.flatnonzero(values)]


def dense(pairs: list[list[float]], users: int) -> np.ndarray:
    """What `sparse` wrote."""
    found = np.zeros(users, np.float32)
    for place, value in pairs:
        found[int(place)] = value
    return found
