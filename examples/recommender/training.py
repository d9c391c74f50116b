"""Training on the device: an epoch is one jitted `lax.scan`, seeds run side by side under `vmap`."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_optax as mtl
from examples.recommender.checkpoints import UnfinishedRun
from examples.recommender.data import Dataset
from examples.recommender.metrics import METRICS, table_metrics
from examples.recommender.network import NetworkConfig
from examples.recommender.placements import (
    SINGLE,
    Batch,
    Network,
    Parameters,
    Step,
    make_step,
)

VALIDATION, TEST = 1, 2
EARLY_STOPPING = METRICS.index("ndcg@10")
PAIRS_SCORED_AT_ONCE = 2**14
RECORDED = ("losses", "weights", "norms")  # one number per task and epoch


@dataclass(frozen=True)
class TrainConfig:
    """How one run is trained; the same for every method."""

    epochs: int = 6
    patience: int = 3
    batch_positives: int = 512
    negatives: int = 3
    learning_rate: float = 1.5e-2
    weight_decay: float = 2.0
    validation_users: int = 256
    test_users: int | None = None
    max_steps_per_epoch: int | None = 50
    network: NetworkConfig = field(default_factory=NetworkConfig)


class Best(NamedTuple):
    """The parameters with the best validation value so far, and when they were found."""

    params: Parameters
    value: jax.Array
    epoch: jax.Array


class _Carry(NamedTuple):
    """All that goes from epoch to epoch, with a first axis of seeds: what a checkpoint holds."""

    params: Parameters
    state: Any
    best: Best
    history: dict[str, jax.Array]  # [S, E, ...]
    seconds: jax.Array


@dataclass(frozen=True)
class Run:
    """One finished (method, seed): test metrics of every user, and what happened on the way."""

    method: str
    seed: int
    test: np.ndarray  # [users, metrics], NaN for a user without test pairs
    best_epoch: int
    seconds: float
    history: dict[str, np.ndarray]  # by epoch: validation [E], losses, weights, norms [E, T]


class Trainer:
    """Trains methods on one dataset; what does not depend on the method is compiled once."""

    def __init__(self, dataset: Dataset, config: TrainConfig, *, probe_norms: bool = True):
        """`probe_norms` adds the tasks' gradient norms to the history: one more backward pass per task."""
        self.dataset, self.config = dataset, config
        self._recorded = RECORDED if probe_norms else tuple(n for n in RECORDED if n != "norms")
        self.network = Network(
            dataset.num_users, dataset.num_items, _log_popularity(dataset), config.network
        )
        self._labels = jnp.asarray(dataset.labels)
        self._held_out = jnp.asarray(dataset.held_out)
        # One entry per behaviour: a pair that is a positive of every task is drawn T times as often.
        positives = np.repeat(dataset.positives, _count_labels(dataset), axis=0)
        self._positives = jnp.asarray(positives)
        # Training for the target alone reads its pairs alone, as often as the others read theirs.
        own = positives[(dataset.labels[positives[:, 0], positives[:, 1]] & 1) > 0]
        self._target_positives = jnp.asarray(np.resize(own, positives.shape))
        self._batch_positives = min(config.batch_positives, len(positives))
        steps = len(positives) // self._batch_positives
        self.steps_per_epoch = min(steps, config.max_steps_per_epoch or steps)
        self._validation_users = self._users_to_rank(VALIDATION, config.validation_users)
        self._test_users = self._users_to_rank(TEST, config.test_users)
        self._evaluate = _jit(jax.vmap(self._evaluate_one, in_axes=(0, None, None)))
        self._init = _jit(jax.vmap(self.network.init), effort=0)  # runs once a method
        self._probe = _jit(jax.vmap(self._task_norms))
        self._keep_best = _jit(jax.vmap(_keep_best, in_axes=(0, 0, 0, None, None)))
        self._write_down = _jit(jax.vmap(_write_down, in_axes=(0, 0, None)))

    def make_step(self, method: str) -> Step:
        """The training step of a method, with Adam."""
        # Flattened: one kernel in place of one per parameter, which compiles several times faster.
        scaler = optax.flatten(optax.scale_by_adam())
        return make_step(method, self.network, scaler, self.descent())

    def descent(self) -> optax.GradientTransformation:
        """Decoupled weight decay of the embeddings, and a rate that falls to 0."""
        steps = self.config.epochs * self.steps_per_epoch
        rate = optax.cosine_decay_schedule(self.config.learning_rate, steps)
        return optax.chain(
            optax.add_decayed_weights(self.config.weight_decay, mask=_is_embedding),
            optax.scale_by_learning_rate(rate),
        )

    def train(
        self,
        method: str,
        seeds: list[int],
        on_epoch: Callable[[int, np.ndarray], None],
        unfinished: UnfinishedRun | None = None,
    ) -> list[Run]:
        """Train every seed with early stopping on the validation NDCG@10; return the finished runs.

        `on_epoch(epochs done, validation values [seeds])` is called after each epoch. Every random
        number comes from the seed and the epoch, so that a run which goes on from the epoch that
        `unfinished` holds ends with the bits of one that was never stopped.
        """
        started = time.perf_counter()
        step = self.make_step(method)
        positives = self._target_positives if method == SINGLE else self._positives
        epoch_fn = _jit(jax.vmap(partial(self._epoch, step), in_axes=(None, 0, 0, 0)))
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
        carry = self._start(step, keys)
        epoch, carry = unfinished.restore(carry) if unfinished else (0, carry)
        before = float(carry.seconds)
        while epoch < self.config.epochs and not self._out_of_patience(carry, epoch):
            epoch += 1
            epoch_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, epoch)
            params, state, record = epoch_fn(positives, carry.params, carry.state, epoch_keys)
            if "norms" in self._recorded:
                record["norms"] = self._probe(params, epoch_keys)
            value = self._mean(self._rank(params, self._validation_users, VALIDATION))
            record["validation"] = value
            best = self._keep_best(carry.best, params, value, epoch, self.config.patience)
            history = self._write_down(carry.history, record, epoch)
            seconds = jnp.asarray(before + time.perf_counter() - started)
            carry = _Carry(params, state, best, history, seconds)
            on_epoch(epoch, np.asarray(value))
            if unfinished:
                unfinished.save(epoch, carry)
        test = np.asarray(self._rank(carry.best.params, self._test_users, TEST))
        seconds = (before + time.perf_counter() - started) / len(seeds)
        history = {name: np.asarray(entry)[:, :epoch] for name, entry in carry.history.items()}
        return [
            self._finished(
                method,
                seed,
                test[row],
                int(carry.best.epoch[row]),
                seconds,
                {name: entry[row] for name, entry in history.items()},
            )
            for row, seed in enumerate(seeds)
        ]

    def _start(self, step: Step, keys: jax.Array) -> _Carry:
        """What every seed starts from; the history has a row for each epoch to come."""
        params = self._init(keys)
        state = _jit(jax.vmap(step.init))(params)
        seeds, epochs, tasks = len(keys), self.config.epochs, self.network.num_tasks
        history = {name: jnp.zeros((seeds, epochs, tasks)) for name in self._recorded}
        history["validation"] = jnp.zeros((seeds, epochs))
        never = Best(params, jnp.full(seeds, -jnp.inf), jnp.zeros(seeds, jnp.int32))
        return _Carry(params, state, never, history, jnp.zeros(()))

    def _out_of_patience(self, carry: _Carry, epoch: int) -> bool:
        return bool(np.all(epoch - np.asarray(carry.best.epoch) >= self.config.patience))

    def _epoch(
        self, step: Step, positives: jax.Array, params: Parameters, state: Any, key: jax.Array
    ) -> tuple[Parameters, Any, dict[str, jax.Array]]:
        """One pass over `positives` `[N, 2]`, in random order, all on the device."""

        def train_step(carry: Any, slot: Any) -> Any:
            chosen, key = slot
            batch = self._batch(positives[chosen], key)
            params, state, losses, weights = step.update(*carry, batch)
            return (params, state), (losses, weights)

        order_key, steps_key = jax.random.split(key)
        order = jax.random.permutation(order_key, len(positives))
        order = order[: self.steps_per_epoch * self._batch_positives]
        slots = order.reshape(self.steps_per_epoch, -1)
        keys = jax.random.split(steps_key, self.steps_per_epoch)
        (params, state), rows = jax.lax.scan(train_step, (params, state), (slots, keys))
        losses, weights = (entry.mean(axis=0) for entry in rows)
        return params, state, {"losses": losses, "weights": weights}

    def _batch(self, pairs: jax.Array, key: jax.Array) -> Batch:
        """Positive pairs `[N, 2]` of any behaviour, each with items drawn at random for the same user.

        All tasks see the same pairs. A pair is looked up in the label table, so that an item drawn by
        chance that is a positive counts as one. A positive of another behaviour only is neither a
        positive nor a random negative of the task: it is masked, or "rated but not 5" would be
        taught as worse than "never seen".
        """
        sample_key, dropout_key = jax.random.split(key)
        drawn = self.config.negatives
        users = jnp.repeat(pairs[:, :1], 1 + drawn, axis=1)
        shape = (pairs.shape[0], drawn)
        random_items = jax.random.randint(sample_key, shape, 0, self.dataset.num_items)
        items = jnp.concatenate([pairs[:, 1:], random_items], axis=1)
        bits = self._labels[users, items]
        tasks = jnp.arange(len(self.dataset.tasks), dtype=bits.dtype)
        labels = ((bits[None] >> tasks[:, None, None]) & 1).astype(jnp.float32)
        is_drawn = (jnp.arange(1 + drawn) > 0)[None, None]
        mask = ((labels > 0) | is_drawn).astype(jnp.float32)
        flat = (len(tasks), users.size)
        return Batch(
            users.ravel(), items.ravel(), labels.reshape(flat), mask.reshape(flat), dropout_key
        )

    def _task_norms(self, params: Parameters, key: jax.Array) -> jax.Array:
        """The gradient norm `[T]` of each task on the shared bottom, on one batch.

        A probe that means the same for every method, also for those that never compute norms.
        """
        chosen = jax.random.choice(
            key, self._positives.shape[0], (self._batch_positives,), replace=True
        )
        value_and_grad = mtl.split_value_and_grad(self.network.encode, self.network.decode)
        batch = self._batch(self._positives[chosen], key)
        _, (grads, _) = value_and_grad(params.shared, params.heads, batch)
        squares = [
            jnp.sum(leaf.reshape(leaf.shape[0], -1) ** 2, axis=1) for leaf in jax.tree.leaves(grads)
        ]
        return jnp.sqrt(sum(squares, jnp.zeros(len(self.dataset.tasks))))

    def _rank(self, params: Parameters, users: jax.Array, part: int) -> jax.Array:
        """Metrics `[S, users, metrics]`, in blocks of one size: one program for both parts."""
        size = len(self._validation_users)
        blocks = np.resize(users, (-(-len(users) // size), size))
        found = [self._evaluate(params, block, part) for block in blocks]
        return jnp.concatenate(found, axis=1)[:, : len(users)]

    def _evaluate_one(self, params: Parameters, users: jax.Array, part: jax.Array) -> jax.Array:
        """Metrics `[users, metrics]` with all items ranked, a few users at a time."""

        def of_chunk(chunk: jax.Array) -> jax.Array:
            items = jnp.arange(self.dataset.num_items)
            pairs = jnp.broadcast_arrays(chunk[:, None], items[None])
            scores = self.network.scores(params, *pairs)
            return table_metrics(scores, self._labels[chunk], self._held_out[chunk], part)

        at_once = max(1, PAIRS_SCORED_AT_ONCE // self.dataset.num_items)
        return jax.lax.map(lambda user: of_chunk(user[None])[0], users, batch_size=at_once)

    def _users_to_rank(self, part: int, at_most: int | None) -> jax.Array:
        """Users with something held out; a fixed random choice of them where that is many."""
        users = np.flatnonzero((self.dataset.held_out == part).any(axis=1))
        return jnp.asarray(np.sort(np.random.default_rng(0).permutation(users)[:at_most]))

    def _mean(self, metrics: jax.Array) -> jax.Array:
        return metrics[..., EARLY_STOPPING].mean(axis=1)

    def _finished(
        self,
        method: str,
        seed: int,
        test: np.ndarray,
        best_epoch: int,
        seconds: float,
        history: dict[str, np.ndarray],
    ) -> Run:
        table = np.full((self.dataset.num_users, len(METRICS)), np.nan)
        table[np.asarray(self._test_users)] = test
        return Run(method, seed, table, best_epoch, seconds, history)


def _jit(function: Callable[..., Any], effort: int = 1) -> Callable[..., Any]:
    """`jax.jit`; on a CPU with less work for LLVM: at 1 it compiles faster and runs as fast."""
    if jax.default_backend() != "cpu":
        return jax.jit(function)
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": effort})


def _count_labels(dataset: Dataset) -> np.ndarray:
    """How many tasks each of `dataset.positives` is a positive of."""
    bits = dataset.labels[dataset.positives[:, 0], dataset.positives[:, 1]]
    return sum((bits >> task) & 1 for task in range(len(dataset.tasks))).astype(np.int64)


def _log_popularity(dataset: Dataset) -> np.ndarray:
    """Where the items' biases start, `[T, items]`: the logits, but for a constant, of popularity.

    So every method starts from the floor of the table, and the network learns what is beyond it.
    """
    tasks = np.arange(len(dataset.tasks), dtype=dataset.labels.dtype)[:, None, None]
    counts = ((dataset.labels[None] >> tasks) & 1).sum(axis=1, dtype=np.float32)
    bias = np.log1p(counts)
    return (bias - bias.mean(axis=1, keepdims=True)).astype(np.float32)


def _is_embedding(params: Any) -> Any:
    """True for the user and item embeddings; biases and dense layers are not decayed."""

    def is_embedding(path: tuple[Any, ...], leaf: jax.Array) -> bool:
        names = [str(getattr(part, "key", getattr(part, "name", ""))) for part in path]
        return "embedding" in names and "item_bias" not in names

    return jax.tree.map_with_path(is_embedding, params)


def _keep_best(best: Best, params: Parameters, value: jax.Array, epoch: int, patience: int) -> Best:
    """The better of two; a seed that ran out of patience stays as it is while others go on."""
    better = (value > best.value) & (epoch - best.epoch <= patience)
    kept = Best(params, value, jnp.asarray(epoch, best.epoch.dtype))
    return jax.tree.map(lambda new, old: jnp.where(better, new, old), kept, best)


def _write_down(
    history: dict[str, jax.Array], record: dict[str, jax.Array], epoch: int
) -> dict[str, jax.Array]:
    return {name: rows.at[epoch - 1].set(record[name]) for name, rows in history.items()}
