"""Training on the device: an epoch is one compiled `lax.scan` of steps."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_optax as mtl
from examples.models.layers import Features
from examples.studies.harness.checkpoints import UnfinishedRun
from examples.studies.harness.choices import Choice
from examples.studies.harness.steps import Step, make_step
from examples.studies.ranking.data import Dataset, Examples
from examples.studies.ranking.metrics import measure_all, normalized_loss
from examples.studies.ranking.network import COUNTED, MakeModel, Network
from examples.studies.recommender.training import SECONDS_BETWEEN_SAVES, Plan, Run, Setting

EXAMPLES_AT_ONCE = 4096  # in the evaluation


@dataclass(frozen=True)
class TrainConfig:
    """How every run of a table is trained.

    Attributes:
      epochs: at most so many.
      patience: how many epochs in a row may bring no better validation value; one more ends training.
      batch: examples of a step.
      learning_rate: of Adam.
      weight_decay: of the embedding tables, times the learning rate (AdamW).
      mean_over: "counted" divides the loss of a task by the number of examples that count for it, "batch"
        by the size of the batch.
    """

    epochs: int = 6
    patience: int = 1
    batch: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 1.0
    mean_over: str = COUNTED


class _Carry(NamedTuple):
    """All that goes from epoch to epoch: what a checkpoint holds."""

    params: Any
    state: Any
    best: Any
    value: np.ndarray
    best_epoch: np.ndarray
    history: dict[str, np.ndarray]


class _Program:
    """The compiled programs of one choice."""

    def __init__(self, trainer: "Trainer", choice: Choice):
        self._trainer, self._choice = trainer, choice
        self.start = jax.jit(self._start)
        # On a CPU with less work for LLVM: it compiles faster and runs as fast.
        cpu = jax.default_backend() == "cpu"
        options = {"xla_backend_optimization_level": 1} if cpu else None
        self.epoch = jax.jit(self._epoch, donate_argnums=(1, 2), compiler_options=options)

    def step(self, setting: Setting) -> Step:
        """The step of the choice; raises what is wrong with its options."""
        # Flattened: one kernel in place of one per parameter, which compiles several times faster.
        scaler = optax.flatten(optax.scale_by_adam())
        descent = optax.chain(
            optax.add_decayed_weights(setting.weight_decay, mask=_is_table),
            optax.scale_by_learning_rate(setting.learning_rate),
        )
        return make_step(self._choice, self._trainer.network, scaler, descent, setting.knobs)

    def _start(self, params: Any, setting: Setting) -> Any:
        # Copied, since some states begin with arrays that they share, and all are given away later.
        return jax.tree.map(jnp.copy, self.step(setting).init(params))

    def _epoch(
        self, data: Examples, params: Any, state: Any, order: jax.Array, setting: Setting
    ) -> tuple[Any, Any, dict[str, jax.Array]]:
        """Steps on the rows `order` `[steps, batch]`; what is recorded has the axis `[steps]`."""
        step = self.step(setting)

        def one(carry: Any, rows: jax.Array) -> Any:
            batch = jax.tree.map(lambda column: column[rows], data)
            params, state, losses, weights = step.update(*carry, batch)
            return (params, state), {"losses": losses, "weights": weights, **_recorded(state)}

        (params, state), record = jax.lax.scan(one, (params, state), order)
        return params, state, record


def _recorded(state: Any) -> dict[str, jax.Array]:
    """The norms of the task gradients, where the method computes them, and MultiBalance's lambda."""
    found = {}
    norms = mtl.diagnostics(state).get("norms")
    if norms is not None and norms.ndim == 1:
        found["norms"] = norms
    simplex = optax.tree.get(state, "simplex_weights")
    if simplex is not None:
        found["simplex weights"] = simplex.reshape(-1)
    return found


class Trainer:
    """Trains choices on one dataset with one model."""

    side_by_side = False

    def __init__(self, dataset: Dataset, make_model: MakeModel, config: TrainConfig):
        self.dataset, self.config = dataset, config
        self.batch = min(config.batch, dataset.train.size)
        self.network = Network(dataset, make_model, self.batch, config.mean_over)
        # An epoch shows every example; a few a second time, so that all batches have one size.
        self.steps_per_epoch = -(-dataset.train.size // self.batch)
        self._train = jax.tree.map(jnp.asarray, dataset.train)
        self._programs: dict[str, _Program] = {}
        self._lock = threading.Lock()
        self._begin = jax.jit(self.network.init)
        self._predict = jax.jit(self._predict_blocks)
        self._order = jax.jit(self._shuffled)

    @property
    def epochs(self) -> int:
        """The most epochs of a run."""
        return self.config.epochs

    def default_setting(self, **knobs: Any) -> Setting:
        """The configuration's learning rate and decay."""
        return Setting(self.config.learning_rate, self.config.weight_decay, knobs)

    def check(self, choice: Choice, setting: Setting) -> None:
        """Raise what is wrong with a choice, before anything is compiled."""
        self._program(choice, setting).step(setting)

    def _program(self, choice: Choice, setting: Setting) -> _Program:
        key = repr((choice.parts, choice.place, tuple(setting.knobs)))  # options may be lists
        with self._lock:
            if key not in self._programs:
                self._programs[key] = _Program(self, choice)
            return self._programs[key]

    def train(
        self,
        choice: Choice,
        plans: list[Plan],
        on_epoch: Callable[[int, np.ndarray], None] = lambda epoch, values: None,
        unfinished: UnfinishedRun | None = None,
        *,
        measure: bool = True,
    ) -> list[Run]:
        """Train every plan, one after the other, with early stopping on the validation set.

        The value that stops is minus the mean over the tasks of the normalized entropy or, for a
        regression, of the squared error over the variance of the labels. `measure=False` leaves the test
        set alone. Every random number comes from the seed and the epoch, so that a run which goes on from
        what `unfinished` holds ends with the bits of one that was never stopped.
        """
        if len(plans) > 1 and unfinished is not None:
            raise ValueError("an unfinished run can be kept for one plan alone")
        return [self._run(choice, plan, on_epoch, unfinished, measure) for plan in plans]

    def _run(
        self,
        choice: Choice,
        plan: Plan,
        on_epoch: Callable[[int, np.ndarray], None],
        unfinished: UnfinishedRun | None,
        measure: bool,
    ) -> Run:
        program = self._program(choice, plan.setting)
        setting = jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), plan.setting)
        key = jax.random.key(plan.seed)
        carry = self._fresh(program, key, setting)
        epoch, carry = unfinished.restore(carry) if unfinished else (0, carry)
        seconds: list[float] = []
        saved = time.perf_counter()
        while epoch < self.epochs and epoch - int(carry.best_epoch) <= self.config.patience:
            epoch += 1
            began = time.perf_counter()
            carry = self._one_epoch(program, carry, key, setting, epoch)
            seconds.append(time.perf_counter() - began)
            on_epoch(epoch, carry.history["validation"][epoch - 1 : epoch])
            if unfinished and time.perf_counter() >= saved + SECONDS_BETWEEN_SAVES:
                saved = time.perf_counter()
                unfinished.save(epoch, carry)
        # The first epoch may compile: the others stand for it.
        usual = float(np.mean(seconds[1:] or seconds or [0.0])) * epoch
        found = [{}, {}]
        if measure:
            found = [
                self.measure(carry.best, part)
                for part in (self.dataset.validation, self.dataset.test)
            ]
        history = {name: rows[:epoch] for name, rows in carry.history.items()}
        return Run(choice.label, plan.seed, *found, int(carry.best_epoch), usual, history)

    def _fresh(self, program: _Program, key: jax.Array, setting: Setting) -> _Carry:
        params = self._begin(key)
        state = program.start(params, setting)
        like = jax.eval_shape(program.epoch, self._train, params, state, self._order(key), setting)[
            2
        ]
        history = {
            name: np.zeros((self.epochs, *rows.shape), np.float32) for name, rows in like.items()
        }
        history["validation"] = np.zeros(self.epochs, np.float32)
        best = jax.tree.map(jnp.copy, params)
        return _Carry(params, state, best, np.asarray(-np.inf), np.asarray(0), history)

    def _one_epoch(
        self, program: _Program, carry: _Carry, key: jax.Array, setting: Setting, epoch: int
    ) -> _Carry:
        order = self._order(jax.random.fold_in(key, epoch))
        params, state, record = program.epoch(
            self._train, carry.params, carry.state, order, setting
        )
        value = self.value(params)
        history = {name: np.array(rows) for name, rows in carry.history.items()}
        for name, rows in record.items():
            history[name][epoch - 1] = np.asarray(rows)
        history["validation"][epoch - 1] = value
        if value > carry.value:
            best = jax.tree.map(jnp.copy, params)
            return _Carry(params, state, best, np.asarray(value), np.asarray(epoch), history)
        return carry._replace(params=params, state=state, history=history)

    def _shuffled(self, key: jax.Array) -> jax.Array:
        order = jax.random.permutation(key, self.dataset.train.size)
        return jnp.resize(order, (self.steps_per_epoch, self.batch))

    def predict(self, params: Any, features: Features) -> np.ndarray:
        """Logits and numbers `[N, T]`."""
        size = len(features.numerical)
        at_once = min(EXAMPLES_AT_ONCE, size)
        blocks = -(-size // at_once)
        padded = Features(
            *(np.resize(f, (blocks, at_once, f.shape[1])) if f.shape[1] else
              np.zeros((blocks, at_once, 0), f.dtype) for f in features)
        )  # fmt: skip
        return np.asarray(self._predict(params, padded)).reshape(-1, len(self.dataset.tasks))[:size]

    def _predict_blocks(self, params: Any, features: Features) -> jax.Array:
        return jax.lax.map(lambda block: self.network.predict(params, block), features)

    def measure(self, params: Any, examples: Examples) -> dict[str, np.ndarray]:
        """The metrics of every task."""
        predicted = self.predict(params, examples.features)
        return measure_all(self.dataset.tasks, examples, predicted)

    def value(self, params: Any) -> float:
        """What early stopping looks at: see `train`."""
        examples = self.dataset.validation
        predicted = self.predict(params, examples.features)
        if not np.isfinite(predicted).all():
            return -np.inf
        losses = []
        for place, task in enumerate(self.dataset.tasks):
            counts = examples.mask[:, place] > 0
            labels = examples.labels[counts, place]
            losses.append(normalized_loss(task, labels, predicted[counts, place]))
        # A task whose validation labels are all equal says nothing.
        return -float(np.nanmean(losses)) if not np.isnan(losses).all() else 0.0


def _is_table(params: Any) -> Any:
    """True for the embedding tables; dense layers are not decayed."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(getattr(key, "key", None) == "tables" for key in path), params
    )
