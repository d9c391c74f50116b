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

from examples.studies.harness.checkpoints import UnfinishedRun
from examples.studies.harness.choices import Choice
from examples.studies.harness.runs import Plan, Run, Setting
from examples.studies.harness.steps import Batch, Params, State, Step

SECONDS_BETWEEN_SAVES = 30.0
VALIDATION, TEST = 1, 2
# Pytrees whose structure the study knows: what stays on the device, and what a step reads of an epoch.
Data: TypeAlias = Any
Slots: TypeAlias = Any
Measured = dict[str, np.ndarray]


class Carry(NamedTuple):
    """All that goes from epoch to epoch, with a first axis of runs.

    Attributes:
      params, state: of the training.
      best: the parameters that are kept, which have the best validation value so far or are the last.
      value, epoch: of `best`.
    """

    params: Params
    state: State
    best: Params
    value: np.ndarray
    epoch: np.ndarray


class Program:
    """The compiled programs of one choice."""

    def __init__(self, trainer: "Trainer", choice: Choice):
        self._trainer, self._choice = trainer, choice
        self.start = trainer.compiled(self._start)
        self.steps = trainer.compiled(self._steps, donate_argnums=(1, 2))

    def _start(self, common: None, params: Params, setting: Setting) -> State:
        del common
        # Copied, since some states begin with arrays that they share, and all are given away later.
        return jax.tree.map(jnp.copy, self._trainer.make_step(self._choice, setting).init(params))

    def _steps(
        self, data: Data, params: Params, state: State, slots: Slots, setting: Setting
    ) -> Any:
        """Some steps, and their record: means, or with `every_step` a row each."""
        trainer = self._trainer
        step = trainer.make_step(self._choice, setting)

        def one(carry: Any, slot: Slots) -> Any:
            params, state, losses, weights = step.update(*carry, trainer.batch(data, slot))
            return (params, state), trainer.recorded(losses, weights, state)

        (params, state), record = jax.lax.scan(one, (params, state), slots)
        if not trainer.every_step:
            record = jax.tree.map(lambda rows: rows.mean(axis=0), record)
        return params, state, record


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
      one_by_one: whether runs are trained alone on an accelerator too, as branches on a step's number ask:
        `vmap` would take all of them.
    """

    config: Any
    data: Data = None
    dataset: Any = None
    network: Any = None
    every_step = False
    one_by_one = False

    def __init__(self) -> None:
        self._on_cpu = jax.default_backend() == "cpu"
        self.side_by_side = not (self._on_cpu or self.one_by_one)
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

    def validate(self, params: Params) -> np.ndarray:
        """The validation values `[runs]`; higher is better."""
        raise NotImplementedError

    def results(self, params: Params) -> list[tuple[Measured, Measured]]:
        """What is measured on the validation and on the test set, for each run."""
        raise NotImplementedError

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
        return Program(self, choice)

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
        on_epoch: Callable[[int, np.ndarray], None] = lambda epoch, values: None,
        unfinished: UnfinishedRun | None = None,
        *,
        measure: bool = True,
    ) -> list[Run]:
        """Train every plan.

        `on_epoch(epochs done, validation values [plans])` is called after each epoch. Every random number
        comes from the seed and the epoch, so that a run which goes on from the epoch that `unfinished`
        holds ends with the bits of one that was never stopped. `measure=False` leaves the test set alone.
        """
        if not self.side_by_side and len(plans) > 1:
            runs = [self.train(choice, [plan], on_epoch, measure=measure) for plan in plans]
            return [run for found in runs for run in found]
        program, setting = self.program(choice, plans[0].setting), _stacked(plans)
        seeds = np.array([plan.seed for plan in plans], np.int32)
        params = self.initial(seeds)
        state, best = program.start(None, params, setting), jax.tree.map(jnp.copy, params)
        never = np.full(len(plans), -np.inf), np.zeros(len(plans), int)
        carry, history = Carry(params, state, best, *never), list[dict[str, np.ndarray]]()
        if unfinished:
            carry, history = unfinished.restore(carry)
        seconds: list[float] = []
        saved = time.perf_counter()
        while (epoch := len(history)) < self.epochs and not self._out_of_patience(carry, epoch):
            began = time.perf_counter()
            carry, record = self._epoch(program, carry, seeds, setting, epoch + 1)
            seconds.append(time.perf_counter() - began)
            history.append(record)
            on_epoch(epoch + 1, record["validation"])
            if unfinished and time.perf_counter() >= saved + SECONDS_BETWEEN_SAVES:
                saved = time.perf_counter()
                unfinished.save(carry, history)
        # The first epoch may compile: the others stand for it.
        usual = float(np.mean(seconds[1:] or seconds or [0.0])) * len(history) / len(plans)
        results = self.results(carry.best) if measure else [({}, {}) for _ in plans]
        return [
            Run(choice.label, plan.seed, *found, int(carry.epoch[row]), usual,
                {name: np.stack([of_epoch[name][row] for of_epoch in history]) for name in history[0]})
            for row, (plan, found) in enumerate(zip(plans, results, strict=True))
        ]  # fmt: skip

    def _parts(self, epoch: int, seeds: np.ndarray) -> list[Slots]:
        slots = self.slots(epoch, seeds)
        parts = jax.tree.leaves(slots)[0].shape[1]
        return [jax.tree.map(lambda slot, k=k: slot[:, k], slots) for k in range(parts)]

    def _epoch(
        self, program: Any, carry: Carry, seeds: np.ndarray, setting: Setting, epoch: int
    ) -> tuple[Carry, dict[str, np.ndarray]]:
        """Train an epoch; the record has a first axis of runs."""
        params, state, records = carry.params, carry.state, []
        for part in self._parts(epoch, seeds):
            params, state, found = program.steps(self.data, params, state, part, setting)
            records.append(found)
        record = jax.tree.map(lambda *entries: sum(entries) / len(entries), *records)
        record |= self._probe((self.data, jnp.asarray(epoch)), params, seeds)
        value, patience = np.asarray(self.validate(params), float), self.config.patience
        better = np.ones(len(value), bool)
        if patience is not None:
            # A run that ran out of patience stays as it is while others go on beside it.
            better = (value > carry.value) & (epoch - carry.epoch <= patience)
        best = self._choose(None, better, params, carry.best)
        kept = np.where(better, value, carry.value), np.where(better, epoch, carry.epoch)
        record = jax.tree.map(np.asarray, {**record, "validation": np.float32(value)})
        return Carry(params, state, jax.block_until_ready(best), *kept), record

    def _out_of_patience(self, carry: Carry, epoch: int) -> bool:
        patience = self.config.patience
        return patience is not None and bool(np.all(epoch - carry.epoch >= patience))

    def step_calls(self, choices: list[Choice]) -> dict[str, Callable[[], Any]]:
        """For a clock: for every choice the first part of an epoch, of one run."""
        seeds, setting = np.zeros(1, np.int32), _stacked([Plan(0, self.default_setting())])
        first, *_ = self._parts(1, seeds)

        def call_of(choice: Choice) -> Callable[[], Any]:
            program = self.program(choice, self.default_setting())
            params = self.initial(seeds)
            carry = [params, program.start(None, params, setting)]

            def call() -> Any:
                *carry[:], record = program.steps(self.data, *carry, first, setting)
                return record

            return call

        return {choice.label: call_of(choice) for choice in choices}


def each_run(params: Params) -> list[Params]:
    """The parameters of every run, without the axis of runs."""
    runs = len(jax.tree.leaves(params)[0])
    return [jax.tree.map(lambda leaf, run=run: leaf[run], params) for run in range(runs)]


def _stacked(plans: list[Plan]) -> Setting:
    """The settings of all plans with a first axis of runs."""
    settings = [jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), p.setting) for p in plans]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *settings)
