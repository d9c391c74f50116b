"""Training the item-item network: batches of users, all items scored, the target's validation NDCG@10."""

from dataclasses import dataclass
from typing import Any

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
from examples.studies.regimes.network import Network, Shared, item_vectors, predict
from examples.studies.regimes.ranking import held_out, ndcg
from examples.studies.regimes.regimes import Knobs, Regime, label_codes

TINY = 1e-12  # the logarithm of a weight of 0


@dataclass(frozen=True)
class TrainConfig:
    """How every run is trained; `learning_rate` and `weight_decay` are where the tuning starts."""

    epochs: int = 3
    patience: int = 3  # the best epoch is kept, but none is left out: the rate falls to the end
    batch_users: int = 512
    embedding: int = 128
    learning_rate: float = 3e-3
    weight_decay: float = 3.0


class Trainer(trainer.Trainer):
    """Trains choices on one dataset, each under the regime that is among its knobs, with these losses."""

    def __init__(self, dataset: Dataset, config: TrainConfig, kinds: tuple[str, str]):
        super().__init__()
        self.dataset, self.config, self._kinds = dataset, config, kinds
        codes = label_codes(dataset)
        self.data = jnp.asarray(codes)
        self._held_out = {part: held_out(dataset, part) for part in (VALIDATION, TEST)}
        self.batch_users = min(config.batch_users, dataset.num_users)
        self.steps_per_epoch = -(-dataset.num_users // self.batch_users)
        known = codes & (2 ** len(dataset.tasks) - 1) > 0
        self._start = item_vectors(known, config.embedding), initial_biases(dataset)
        self._rank = self.compiled(self._ndcg_of_users)

    def setting(self, regime: Regime, rate: float, decay: float, **knobs: Any) -> Setting:
        """The setting of a run."""
        share = self.batch_users / self.dataset.num_users
        positives = len(self.dataset.train.positives(0)) * share
        return Setting(rate, decay, {"regime": regime.knobs(positives), **knobs})

    def _network(self, knobs: Knobs | None = None) -> Network:
        return Network(*self._start, self.batch_users, self._kinds, knobs)

    def init(self, key: jax.Array) -> Parameters:
        """See the base class."""
        return self._network().init(key)

    def make_step(self, choice: Choice, setting: Setting) -> Step:
        """The step of a choice, which also measures the tasks' gradients on the shared parameters.

        Their norms, and their cosines with the target's, of the first step of an epoch; elsewhere 0.
        """
        knobs = dict(setting.knobs)
        network = self._network(knobs.pop("regime"))
        steps = self.config.epochs * self.steps_per_epoch
        descent = decayed(setting, Shared._fields, steps)
        step = make_step(choice, network, optax.scale_by_adam(), descent, knobs)
        value_and_grad = mtl.split_value_and_grad(network.encode, network.decode)

        def measure(params: Parameters, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
            _, (grads, _) = value_and_grad(params.shared, params.heads, codes)
            target = jax.tree.map(lambda rows: rows[0], grads)
            products = jax.vmap(optax.tree.vdot, in_axes=(0, None))(grads, target)
            norms = jax.vmap(optax.tree.norm)(grads)
            return norms, products / (norms * norms[0])

        def update(params: Parameters, state: Any, batch: tuple[jax.Array, jax.Array]) -> Any:
            codes, first = batch
            none = jnp.zeros(network.num_tasks)
            measured = jax.lax.cond(first, measure, lambda *_: (none, none), params, codes)
            params, state, losses, weights = step.update(params, state, codes)
            return params, state, (losses, measured), weights

        return Step(step.init, update)

    def recorded(self, losses: Any, weights: jax.Array, state: Any) -> dict[str, jax.Array]:
        """The losses, the cosines, and the logarithms of weights and norms over the target's.

        Their mean over an epoch counts, to which only the first step adds cosines and norms.
        """
        del state
        losses, (norms, cosines) = losses
        weights, norms = (jnp.log(jnp.maximum(values, TINY)) for values in (weights, norms))
        return {
            "losses": losses,
            "log_weights": weights[1:] - weights[0],
            "log_norms": self.steps_per_epoch * (norms[1:] - norms[0]),
            "cosines": self.steps_per_epoch * cosines[1:],
        }

    def order(
        self, data: jax.Array, epoch: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """All users in random order `[1, steps, batch]`, a few of them twice, and which step is first."""
        order = jax.random.permutation(jax.random.fold_in(key, epoch), self.dataset.num_users)
        first = jnp.arange(self.steps_per_epoch)[None] == 0
        return jnp.resize(order, (1, self.steps_per_epoch, self.batch_users)), first

    def batch(self, data: jax.Array, slot: tuple[jax.Array, jax.Array]) -> Any:
        """The labels of the chosen users, and whether the step is the first of its epoch."""
        users, first = slot
        return data[users], first

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
        return np.asarray(self._rank((self.data, self._held_out[part]), params))

    def _ndcg_of_users(self, common: Any, params: Parameters) -> jax.Array:
        codes, pairs = common
        return ndcg(predict(params, codes[pairs.users], 0), pairs)


def sparse(values: np.ndarray) -> list[list[float]]:
    """Numbers of users as `[place, value]` of those that are not 0, for a file."""
    return [[int(place), round(float(values[place]), 4)] for place in np.flatnonzero(values)]


def dense(pairs: list[list[float]], users: int) -> np.ndarray:
    """What `sparse` wrote."""
    found = np.zeros(users, np.float32)
    for place, value in pairs:
        found[int(place)] = value
    return found
