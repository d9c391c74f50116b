"""Trains choices: epochs of compiled steps, early stopping, and the metrics of the epoch that is kept.

On a GPU or a TPU all runs of a choice (seeds, settings) go side by side under `vmap`. On a CPU a run has
a program of its own, since matrix products with one more axis are slower there; the runner trains two runs
at a time in threads.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from examples.studies.harness.choices import Choice
from examples.studies.harness.runs import Plan, Run, Setting
from examples.studies.harness.steps import Batch, Params, State, Step

VALIDATION, TEST = 1, 2
# Pytrees whose structure the study knows: what stays on the device, and what a step reads of an epoch.
Data: TypeAlias = Any
Slots: TypeAlias = Any
Measured = dict[str, np.ndarray]


class Program(NamedTuple):
    """The compiled functions of one choice.

    Attributes:
      start: `(None, params, setting)` to the state of the step.
      steps: `(data, params, state, slots, setting)` to the next parameters and state, and a record.
    """

    start: Callable[..., State]
    steps: Callable[..., tuple[Params, State, dict[str, jax.Array]]]


class Trainer:
    """What every study's trainer has in common; a study says what is trained, as the methods below ask.

    Attributes:
      side_by_side: whether the runs of a choice are trained in one program.
      config: how every run is trained: at most `epochs`, the first `learning_rate` and `weight_decay`, and
        `patience`. Training ends after so many epochs in a row without a better validation value; with None
        it never does, and the last parameters are kept.
      data: what stays on the device.
      dataset, network: of the study; only what it does not override reads them.
      every_step: whether the history has every step, or the mean of an epoch.
    """

    config: Any
    data: Data = None
    dataset: Any = None
    network: Any = None
    every_step = False

    def __init__(self) -> None:
        self._on_cpu = jax.default_backend() == "cpu"
        self.side_by_side = not self._on_cpu
        self._programs: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._init = self.compiled(lambda _, seed: self.init(jax.random.key(seed)))
        self._order = self.compiled(lambda common, seed: self.order(*common, jax.random.key(seed)))
        self._probe = self.compiled(
            lambda common, params, seed: self.probe(*common, params, jax.random.key(seed))
        )
        self._choose = self.compiled(
            lambda _, better, new, old: jax.tree.map(partial(jnp.where, better), new, old)
        )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a stored run must agree on."""
        return {"train": asdict(self.config), "data": self.dataset.digest()}

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters."""
        return self.network.init(key)

    def make_step(self, choice: Choice, setting: Setting) -> Step:
        """The step of a choice; raises what is wrong with its options."""
        raise NotImplementedError

    def order(self, data: Data, epoch: jax.Array, key: jax.Array) -> Slots:
        """What the steps of an epoch read, `[parts, steps, ...]`: a part is one call of the program."""
        raise NotImplementedError

    def batch(self, data: Data, slot: Slots) -> Batch:
        """The batch of one step."""
        raise NotImplementedError

    def value(self, params: Params) -> float:
        """The validation value of one run; higher is better, and 0 for all where nothing stops a run."""
        return 0.0

    def result(self, params: Params) -> tuple[Measured, Measured]:
        """What is measured on the validation and on the test set of one run."""
        raise NotImplementedError

    def validate(self, params: Params) -> np.ndarray:
        """The validation values `[runs]`; overridden where all runs are measured at once."""
        return np.array([self.value(of_run) for of_run in _each_run(params)])

    def results(self, params: Params) -> list[tuple[Measured, Measured]]:
        """What is measured of all runs; as `validate`."""
        return [self.result(of_run) for of_run in _each_run(params)]

    def recorded(self, losses: Any, weights: jax.Array, state: State) -> dict[str, jax.Array]:
        """What the history has of a step."""
        return {"losses": losses, "weights": weights}

    def probe(
        self, data: Data, epoch: jax.Array, params: Params, key: jax.Array
    ) -> dict[str, jax.Array]:
        """What the history has of the parameters after an epoch."""
        return {}

    # --- the same for every study -------------------------------------------------------------------

    @property
    def epochs(self) -> int:
        """The most epochs of a run."""
        return self.config.epochs

    def default_setting(self, **knobs: Any) -> Setting:
        """The configuration's learning rate and decay."""
        return Setting(self.config.learning_rate, self.config.weight_decay, knobs)

    def check(self, choice: Choice, setting: Setting) -> None:
        """Raise what is wrong with a choice, before anything is compiled."""
        self.make_step(choice, setting)

    def compiled(
        self, function: Callable[..., Any], donate_argnums: Any = ()
    ) -> Callable[..., Any]:
        """Jit `function(common, ...)` over a first axis of runs of every argument but `common`."""

        def over_runs(common: Any, *args: Any) -> Any:
            if self.side_by_side:
                return jax.vmap(function, in_axes=(None, *[0] * len(args)))(common, *args)
            one_run = jax.tree.map(lambda leaf: leaf[0], args)  # alone, so without the axis
            return jax.tree.map(lambda leaf: leaf[None], function(common, *one_run))

        # On a CPU with less work for LLVM: it compiles faster and runs as fast.
        options = {"xla_backend_optimization_level": 1} if self._on_cpu else None
        return jax.jit(over_runs, donate_argnums=donate_argnums, compiler_options=options)

    def program(self, choice: Choice, setting: Setting) -> Any:
        """The programs of a choice, made once for settings with the same knobs."""
        key = repr((choice.parts, choice.place, tuple(setting.knobs)))  # options may be lists
        with self._lock:
            if key not in self._programs:
                self._programs[key] = self.make_program(choice)
            return self._programs[key]

    def make_program(self, choice: Choice) -> Any:
        """New programs."""

        def start(_: None, params: Params, setting: Setting) -> State:
            # Copied, since some states begin with arrays that they share, and all are given away later.
            return jax.tree.map(jnp.copy, self.make_step(choice, setting).init(params))

        def steps(
            data: Data, params: Params, state: State, slots: Slots, setting: Setting
        ) -> tuple[Params, State, Any]:
            step = self.make_step(choice, setting)

            def one(carry: Any, slot: Slots) -> Any:
                params, state, losses, weights = step.update(*carry, self.batch(data, slot))
                return (params, state), self.recorded(losses, weights, state)

            (params, state), record = jax.lax.scan(one, (params, state), slots)
            if not self.every_step:
                record = jax.tree.map(lambda rows: rows.mean(axis=0), record)
            return params, state, record

        return Program(self.compiled(start), self.compiled(steps, donate_argnums=(1, 2)))

    def initial(self, seeds: np.ndarray) -> Params:
        """The parameters of runs that have not begun."""
        return self._init(None, seeds)

    def slots(self, epoch: int, seeds: np.ndarray) -> Slots:
        """What the steps of an epoch read, `[runs, parts, steps, ...]`; see `order`."""
        return self._order((self.data, jnp.asarray(epoch)), seeds)

    def train(
        self,
        choice: Choice,
        plans: list[Plan],
        on_epoch: Callable[[np.ndarray], None] = lambda values: None,
        *,
        measure: bool = True,
    ) -> list[Run]:
        """Train every plan.

        `on_epoch(validation values [plans])` is called after each epoch. Every random number comes from the
        seed and the epoch. `measure=False` leaves the test set alone.
        """
        if not self.side_by_side and len(plans) > 1:
            runs = [self.train(choice, [plan], on_epoch, measure=measure) for plan in plans]
            return [run for found in runs for run in found]
        program, setting, params, state = self.begin(choice, plans)
        seeds, best = _seeds(plans), jax.tree.map(jnp.copy, params)
        best_value, best_epoch = np.full(len(plans), -np.inf), np.zeros(len(plans), int)
        patience, history, seconds = self.config.patience, [], []
        for epoch in range(1, self.epochs + 1):
            began, records = time.perf_counter(), []
            for part in self.epoch_parts(epoch, seeds):
                params, state, found = program.steps(self.data, params, state, part, setting)
                records.append(found)
            record = jax.tree.map(lambda *entries: sum(entries) / len(entries), *records)
            record |= self._probe((self.data, jnp.asarray(epoch)), params, seeds)
            value = np.asarray(self.validate(params), float)
            better = np.ones(len(plans), bool)
            if patience is not None:
                # A run that ran out of patience stays as it is while others go on beside it.
                better = (value > best_value) & (epoch - best_epoch <= patience)
            best = jax.block_until_ready(self._choose(None, better, params, best))
            best_value = np.where(better, value, best_value)
            best_epoch = np.where(better, epoch, best_epoch)
            history.append(jax.tree.map(np.asarray, {**record, "validation": np.float32(value)}))
            seconds.append(time.perf_counter() - began)
            on_epoch(history[-1]["validation"])
            if patience is not None and np.all(epoch - best_epoch >= patience):
                break
        # The first epoch may compile: the others stand for it.
        usual = float(np.mean(seconds[1:] or seconds)) * len(history) / len(plans)
        results = self.results(best) if measure else [({}, {}) for _ in plans]
        return [
            Run(choice.label, plan.seed, *found, int(best_epoch[row]), usual,
                {name: np.stack([of_epoch[name][row] for of_epoch in history]) for name in history[0]})
            for row, (plan, found) in enumerate(zip(plans, results, strict=True))
        ]  # fmt: skip

    def begin(self, choice: Choice, plans: list[Plan]) -> tuple[Program, Setting, Params, State]:
        """The programs of a choice, and the settings, parameters and states of runs that have not begun."""
        program, setting = self.program(choice, plans[0].setting), _stacked(plans)
        params = self.initial(_seeds(plans))
        return program, setting, params, program.start(None, params, setting)

    def epoch_parts(self, epoch: int, seeds: np.ndarray) -> list[Slots]:
        """What each call of the program in an epoch reads, `[runs, steps, ...]`."""
        slots = self.slots(epoch, seeds)
        parts = jax.tree.leaves(slots)[0].shape[1]
        return [jax.tree.map(lambda slot, k=k: slot[:, k], slots) for k in range(parts)]

    def step_calls(self, choices: list[Choice]) -> dict[str, Callable[[], Any]]:
        """For a clock: for every choice the first part of an epoch, of one run."""
        plans = [Plan(0, self.default_setting())]
        first, *_ = self.epoch_parts(1, _seeds(plans))

        def call_of(choice: Choice) -> Callable[[], Any]:
            program, setting, *carry = self.begin(choice, plans)

            def call() -> Any:
                *carry[:], record = program.steps(self.data, *carry, first, setting)
                return record

            return call

        return {choice.label: call_of(choice) for choice in choices}


def _each_run(params: Params) -> list[Params]:
    runs = len(jax.tree.leaves(params)[0])
    return [jax.tree.map(lambda leaf, run=run: leaf[run], params) for run in range(runs)]


def _seeds(plans: list[Plan]) -> np.ndarray:
    return np.array([plan.seed for plan in plans], np.int32)


def _stacked(plans: list[Plan]) -> Setting:
    """The settings of all plans with a first axis of runs."""
    settings = [jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), p.setting) for p in plans]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *settings)
