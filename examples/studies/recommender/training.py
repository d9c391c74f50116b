"""Training on the device: some steps of an epoch are one compiled `lax.scan`.

On a GPU or a TPU all runs of a choice (seeds, settings) go side by side under `vmap`. On a CPU a run has
a program of its own, since matrix products with one more axis are slower there; `compare` trains two runs
at a time in threads.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_optax as mtl
from examples.studies.harness.checkpoints import UnfinishedRun
from examples.studies.harness.choices import Choice
from examples.studies.harness.steps import Step, make_step
from examples.studies.recommender.data import REGRESSION, Dataset
from examples.studies.recommender.evaluation import (
    COLUMNS,
    TEST,
    VALIDATION,
    Tables,
    held_out_users,
    pair_tables,
    rank_users,
)
from examples.studies.recommender.network import Batch, Network, NetworkConfig, Parameters, Shared

EARLY_STOPPING = COLUMNS.index("ndcg@10, all")
STEPS_AT_ONCE = 25
SECONDS_BETWEEN_SAVES = 30.0
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
    decay_to_zero: bool = True
    validation_users: int | None = None
    network: NetworkConfig = field(default_factory=NetworkConfig)


class Setting(NamedTuple):
    """What may differ between runs of one compiled program.

    Attributes:
      learning_rate, weight_decay: of the optimizer.
      knobs: options of the method, numbers or arrays.
    """

    learning_rate: Any
    weight_decay: Any
    knobs: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """A run to be trained."""

    seed: int
    setting: Setting


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      validation: of the target, as `test`.
      test: by task name: `[users, len(COLUMNS)]` with NaN rows for users who have nothing held
        out (ranking), or the squared errors of the held-out pairs `[N]` (regression).
      best_epoch: of the validation NDCG@10 of the target; the metrics are of this epoch.
      seconds: of training and validation, without compilation.
      history: by epoch: validation `[E]`, losses and weights `[E, T]`, norms `[E, T, parts]`.
    """

    label: str
    seed: int
    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    best_epoch: int
    seconds: float
    history: dict[str, np.ndarray]

    @property
    def best_value(self) -> float:
        """The validation NDCG@10 of the epoch that was kept.

        Side by side, a run that ran out of patience goes on beside the others, but nothing of it is kept.
        """
        return float(self.history["validation"][self.best_epoch - 1])


class _Data(NamedTuple):
    """What stays on the device."""

    tables: Tables
    pairs: jax.Array  # of the training set [P, 2]
    values: jax.Array  # [P, T]


class _Best(NamedTuple):
    """The parameters with the best validation value so far, and what happened in each epoch."""

    params: Parameters
    value: jax.Array
    epoch: jax.Array
    history: dict[str, jax.Array]


class _Carry(NamedTuple):
    """All that goes from epoch to epoch: what a checkpoint holds."""

    params: Parameters
    state: Any
    best: _Best


class Program:
    """The compiled programs of one choice."""

    def __init__(self, trainer: "Trainer", choice: Choice):
        self._trainer, self.choice = trainer, choice
        donate = (1, 2)
        self.start = trainer.compiled(self._start)
        self.steps = trainer.compiled(self._steps, donate_argnums=donate)

    def check(self, setting: Setting) -> None:
        """Raise what is wrong with the choice's options, before anything is compiled."""
        self._make_step(setting)

    def _make_step(self, setting: Setting) -> Step:
        config, trainer = self._trainer.config, self._trainer
        # Flattened: one kernel in place of one per parameter, which compiles several times faster.
        scaler = optax.flatten(OPTIMIZERS[config.optimizer]())
        rate: Any = setting.learning_rate
        if config.decay_to_zero:
            falls = optax.cosine_decay_schedule(1.0, config.epochs * trainer.steps_per_epoch)
            rate = lambda count: setting.learning_rate * falls(count)  # noqa: E731
        descent = optax.chain(
            optax.add_decayed_weights(setting.weight_decay, mask=_is_table),
            optax.scale_by_learning_rate(rate),
        )
        return make_step(self.choice, trainer.network, scaler, descent, setting.knobs)

    def _start(self, common: None, params: Parameters, setting: Setting) -> Any:
        del common
        # Copied, since some states begin with arrays that they share, and all are given away later.
        return jax.tree.map(jnp.copy, self._make_step(setting).init(params))

    def _steps(
        self,
        data: _Data,
        params: Parameters,
        state: Any,
        order: jax.Array,
        key: jax.Array,
        setting: Setting,
    ) -> tuple[Parameters, Any, dict[str, jax.Array]]:
        """Some steps, on the training pairs `order` `[steps, batch]`."""
        step = self._make_step(setting)

        def one(carry: Any, slot: Any) -> Any:
            batch = self._trainer.batch(data, *slot)
            params, state, losses, weights = step.update(*carry, batch)
            return (params, state), (losses, weights)

        keys = jax.random.split(key, len(order))
        (params, state), rows = jax.lax.scan(one, (params, state), (order, keys))
        losses, weights = (entry.mean(axis=0) for entry in rows)
        return params, state, {"losses": losses, "weights": weights}


class Trainer:
    """Trains choices on one dataset; what does not depend on the choice is compiled once."""

    def __init__(self, dataset: Dataset, config: TrainConfig, *, probe_norms: bool = False):
        """`probe_norms` adds the tasks' gradient norms to the history: T backward passes an epoch."""
        self.dataset, self.config, self.probe_norms = dataset, config, probe_norms
        self.network = Network(
            dataset.num_users, dataset.num_items, dataset.tasks, _biases(dataset), config.network
        )
        train = dataset.train
        self.data = _Data(pair_tables(dataset), jnp.asarray(train.pairs), jnp.asarray(train.values))
        self.batch_pairs = min(config.batch_pairs, len(train))
        # An epoch shows every pair; a few pairs a second time, so that all its parts have one size.
        steps = -(-len(train) // self.batch_pairs)
        self.parts = max(1, round(steps / STEPS_AT_ONCE))
        self.steps_at_once = -(-steps // self.parts)
        self.steps_per_epoch = self.parts * self.steps_at_once
        self._validation_users = self._users(0, VALIDATION, config.validation_users)
        self._on_cpu = jax.default_backend() == "cpu"
        self._programs: dict[Any, Program] = {}
        self._lock = threading.Lock()
        self._rank = self.compiled(self._metrics_of_users)
        self._errors = self.compiled(self._squared_errors)
        self._order = self.compiled(self._shuffled)
        self._begin = self.compiled(self._fresh)
        self._keep = self.compiled(self._keep_best)
        self._probe = self.compiled(self._norms)

    def compiled(
        self, function: Callable[..., Any], donate_argnums: Any = ()
    ) -> Callable[..., Any]:
        """Jit `function(common, ...)` over a first axis of runs of every argument but `common`."""

        def over_runs(common: Any, *args: Any) -> Any:
            if not self._on_cpu:
                return jax.vmap(function, in_axes=(None, *[0] * len(args)))(common, *args)
            one_run = jax.tree.map(lambda leaf: leaf[0], args)  # alone, so without the axis
            return jax.tree.map(lambda leaf: leaf[None], function(common, *one_run))

        # On a CPU with less work for LLVM: it compiles faster and runs as fast.
        options = {"xla_backend_optimization_level": 1} if self._on_cpu else None
        return jax.jit(over_runs, donate_argnums=donate_argnums, compiler_options=options)

    def program(self, choice: Choice, knobs: tuple[str, ...] = ()) -> Program:
        """The program of a choice, made once."""
        key = repr((choice.parts, choice.place, knobs))  # options may be lists
        with self._lock:
            if key not in self._programs:
                self._programs[key] = Program(self, choice)
            return self._programs[key]

    @property
    def epochs(self) -> int:
        """The most epochs of a run."""
        return self.config.epochs

    @property
    def side_by_side(self) -> bool:
        """Whether the runs of a choice are trained in one program."""
        return not self._on_cpu

    def check(self, choice: Choice, setting: Setting) -> None:
        """Raise what is wrong with a choice, before anything is compiled."""
        self.program(choice, tuple(setting.knobs)).check(setting)

    def default_setting(self, **knobs: Any) -> Setting:
        """The configuration's learning rate and decay."""
        return Setting(self.config.learning_rate, self.config.weight_decay, knobs)

    def train(
        self,
        choice: Choice,
        plans: list[Plan],
        on_epoch: Callable[[int, np.ndarray], None] = lambda epoch, values: None,
        unfinished: UnfinishedRun | None = None,
        *,
        measure: bool = True,
    ) -> list[Run]:
        """Train every plan with early stopping on the target's validation NDCG@10.

        `on_epoch(epochs done, validation values [plans])` is called after each epoch. Every random number
        comes from the seed and the epoch, so that a run which goes on from the epoch that `unfinished`
        holds ends with the bits of one that was never stopped. `measure=False` leaves the test set alone.
        """
        if self._on_cpu and len(plans) > 1:
            runs = [self.train(choice, [plan], on_epoch, measure=measure) for plan in plans]
            return [run for found in runs for run in found]
        program = self.program(choice, tuple(plans[0].setting.knobs))
        settings = [jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), p.setting) for p in plans]
        setting = jax.tree.map(lambda *leaves: jnp.stack(leaves), *settings)
        keys = jax.vmap(jax.random.key)(jnp.asarray([plan.seed for plan in plans]))
        params, best = self._begin(None, keys)
        carry = _Carry(params, program.start(None, params, setting), best)
        epoch, carry = unfinished.restore(carry) if unfinished else (0, carry)
        seconds: list[float] = []
        saved = time.perf_counter()
        while epoch < self.config.epochs and not self._out_of_patience(carry, epoch):
            epoch += 1
            began = time.perf_counter()
            carry = jax.block_until_ready(self._epoch(program, carry, keys, setting, epoch))
            seconds.append(time.perf_counter() - began)
            on_epoch(epoch, np.asarray(carry.best.history["validation"])[:, epoch - 1])
            if unfinished and time.perf_counter() >= saved + SECONDS_BETWEEN_SAVES:
                saved = time.perf_counter()
                unfinished.save(epoch, carry)
        # The first epoch may compile: the others stand for it.
        usual = np.mean(seconds[1:] or seconds or [0.0]) * epoch / len(plans)
        return self._finish(choice, plans, carry, epoch, float(usual), measure=measure)

    def initial(self, keys: jax.Array) -> Parameters:
        """The parameters of runs that have not begun."""
        return self._begin(None, keys)[0]

    def fresh(self, program: Program, keys: jax.Array, setting: Setting) -> tuple[Any, Any]:
        """Parameters and state of runs that have not begun."""
        params = self.initial(keys)
        return params, program.start(None, params, setting)

    def shuffled(self, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Training pairs in random order `[runs, parts, steps, batch]`, and keys `[runs, parts]`."""
        return self._order(self.data, keys)

    def _epoch(
        self, program: Program, carry: _Carry, keys: jax.Array, setting: Setting, epoch: int
    ) -> _Carry:
        epoch_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, epoch)
        order, step_keys = self.shuffled(epoch_keys)
        params, state, records = carry.params, carry.state, []
        for part in range(self.parts):
            params, state, record = program.steps(
                self.data, params, state, order[:, part], step_keys[:, part], setting
            )
            records.append(record)
        record = jax.tree.map(lambda *entries: sum(entries) / len(entries), *records)
        if self.probe_norms:
            record["norms"] = self._probe(self.data, params, epoch_keys)
        value = self.rank(params, 0, VALIDATION, self._validation_users)
        record["validation"] = jnp.nanmean(value[..., EARLY_STOPPING], axis=1)
        return _Carry(params, state, self._keep(jnp.asarray(epoch), carry.best, params, record))

    def _out_of_patience(self, carry: _Carry, epoch: int) -> bool:
        return bool(np.all(epoch - np.asarray(carry.best.epoch) >= self.config.patience))

    def _fresh(self, common: None, key: jax.Array) -> tuple[Parameters, _Best]:
        """What every run of a seed starts from; the history has a row for each epoch to come."""
        del common
        params = self.network.init(key)
        epochs, tasks = self.config.epochs, self.network.num_tasks
        history = {name: jnp.zeros((epochs, tasks)) for name in ("losses", "weights")}
        history["validation"] = jnp.zeros(epochs)
        if self.probe_norms:
            history["norms"] = jnp.zeros((epochs, tasks, len(PARTS)))
        return params, _Best(params, jnp.array(-jnp.inf), jnp.array(0), history)

    def _keep_best(
        self, epoch: jax.Array, best: _Best, params: Parameters, record: dict[str, jax.Array]
    ) -> _Best:
        """The better parameters; a run that ran out of patience stays as it is while others go on."""
        going = epoch - best.epoch <= self.config.patience
        better = (record["validation"] > best.value) & going
        history = {
            name: rows.at[epoch - 1].set(record[name]) for name, rows in best.history.items()
        }
        return _Best(
            jax.tree.map(lambda new, old: jnp.where(better, new, old), params, best.params),
            jnp.where(better, record["validation"], best.value),
            jnp.where(better, epoch, best.epoch),
            history,
        )

    def _shuffled(self, data: _Data, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The training pairs in random order `[parts, steps at once, batch]`, and a key per part."""
        order_key, steps_key = jax.random.split(key)
        order = jax.random.permutation(order_key, len(data.pairs))
        order = jnp.resize(order, (self.parts, self.steps_at_once, self.batch_pairs))
        return order, jax.random.split(steps_key, self.parts)

    def batch(self, data: _Data, chosen: jax.Array, key: jax.Array) -> Batch:
        """The chosen training pairs `[B]`, each with items drawn at random for the same user.

        All tasks see the same pairs. A drawn pair is looked up among the training pairs, so that one which
        is a positive counts as one. A positive of another task only is neither a positive nor a random
        negative of a ranking task: it is masked, or "rated but not 5" would be taught as worse than "never
        seen". A regression has a number for known pairs alone.
        """
        sample_key, dropout_key = jax.random.split(key)
        pairs, drawn = data.pairs[chosen], self.config.negatives
        users = jnp.repeat(pairs[:, 0], drawn)
        items = jax.random.randint(sample_key, users.shape, 0, self.dataset.num_items)
        values, known = data.tables.train.find(users, items)
        values = jnp.concatenate([data.values[chosen], values]).T
        is_drawn = jnp.arange(values.shape[1])[None] >= len(chosen)
        is_known = jnp.concatenate([jnp.ones(len(chosen), bool), known])[None]
        squared = jnp.array([task.kind == REGRESSION for task in self.dataset.tasks])[:, None]
        mask = jnp.where(squared, is_known, (values > 0) | (is_drawn & ~is_known))
        ids = jnp.concatenate([pairs[:, 0], users]), jnp.concatenate([pairs[:, 1], items])
        return Batch(*ids, values, mask.astype(jnp.float32), dropout_key, ids)

    def _norms(self, data: _Data, params: Parameters, key: jax.Array) -> jax.Array:
        """The gradient norms `[T, parts]` of each task on the parts of the shared bottom, on one batch.

        A probe that means the same for every method, also for those that never compute norms.
        """
        chosen_key, key = jax.random.split(key)
        chosen = jax.random.randint(chosen_key, (self.batch_pairs,), 0, len(data.pairs))
        batch = self.batch(data, chosen, key)
        value_and_grad = mtl.split_value_and_grad(self.network.encode, self.network.decode)
        _, (grads, _) = value_and_grad(params.shared, params.heads, batch)

        def norm(leaves: list[jax.Array]) -> jax.Array:
            flat = [leaf.reshape(leaf.shape[0], -1) for leaf in leaves]
            return jnp.linalg.norm(jnp.concatenate(flat, axis=1), axis=1)

        parts = (*grads.tables, *(_layer(grads.bottom, name) for name in PARTS[2:]))
        return jnp.stack([norm(jax.tree.leaves(part)) for part in parts], axis=1)

    def rank(self, params: Parameters, task: int, part: int, users: np.ndarray) -> jax.Array:
        """Metrics `[runs, users, len(COLUMNS)]` of a ranking task with every item ranked."""
        return self._rank((self.data, jnp.asarray(users), task, part), params)

    def _metrics_of_users(self, common: Any, params: Parameters) -> jax.Array:
        data, users, task, part = common
        predict = partial(self.network.predict, params, task)
        return rank_users(predict, data.tables, self.dataset.num_items, users, task, part)

    def _squared_errors(self, common: Any, params: Parameters) -> jax.Array:
        """The squared errors `[N]` of a regression's held-out pairs."""
        pairs, numbers, task = common
        predicted = self.network.predict(params, task, pairs[:, 0], pairs[:, 1])
        return optax.squared_error(predicted, numbers)

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
                common = jnp.asarray(held_out.pairs), jnp.asarray(held_out.values[:, place]), place
                found[task.name] = np.asarray(self._errors(common, params))
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

    def _users(self, task: int, part: int, at_most: int | None) -> np.ndarray:
        """Users with something held out; a fixed random choice of them where that is many."""
        users = held_out_users(self.dataset, task, part)
        return np.sort(np.random.default_rng(0).permutation(users)[:at_most])

    def _finish(
        self,
        choice: Choice,
        plans: list[Plan],
        carry: _Carry,
        epoch: int,
        seconds: float,
        *,
        measure: bool,
    ) -> list[Run]:
        nothing: list[dict[str, np.ndarray]] = [{} for _ in plans]
        target = [self.dataset.tasks[0].name]
        validation = self.measure(carry.best.params, VALIDATION, target) if measure else nothing
        test = self.measure(carry.best.params, TEST) if measure else nothing
        history = {name: np.asarray(entry)[:, :epoch] for name, entry in carry.best.history.items()}
        best_epochs = np.asarray(carry.best.epoch)
        return [
            Run(
                choice.label,
                plan.seed,
                validation[row],
                test[row],
                int(best_epochs[row]),
                seconds,
                {name: entry[row] for name, entry in history.items()},
            )
            for row, plan in enumerate(plans)
        ]


PARTS = ("user embeddings", "item embeddings", "first layer", "other layers")


def _layer(bottom: Any, name: str) -> Any:
    if name == "first layer":
        return {key: bottom[key] for key in ("from_user", "from_item")}
    return bottom["mlp"]


def _biases(dataset: Dataset) -> np.ndarray:
    """Where the towers' biases start, `[T, items]`, so that training learns what is beyond it.

    Ranking: the logits of popularity, but for a constant, the floor of the table. Regression: the mean.
    """
    rows = []
    for place, task in enumerate(dataset.tasks):
        values = dataset.train.values[:, place]
        if task.kind == REGRESSION:
            rows.append(np.full(dataset.num_items, values.mean()))
            continue
        popular = np.log1p(popularity(dataset, place))
        rows.append(popular - popular.mean())
    return np.stack(rows).astype(np.float32)


def popularity(dataset: Dataset, task: int = 0) -> np.ndarray:
    """How many training positives of a ranking task each item has, `[items]`."""
    return np.bincount(dataset.train.positives(task)[:, 1], minlength=dataset.num_items)


def _is_table(params: Any) -> Any:
    """True for the embedding tables; biases and dense layers are not decayed."""
    flags = jax.tree.map(lambda leaf: False, params)
    if isinstance(params, Parameters):
        tables = jax.tree.map(lambda leaf: True, params.shared.tables)
        return flags._replace(shared=flags.shared._replace(tables=tables))
    if isinstance(params, Shared):
        return flags._replace(tables=jax.tree.map(lambda leaf: True, params.tables))
    return flags
