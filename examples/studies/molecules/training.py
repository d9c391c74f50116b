"""Trains the networks of an arm side by side, and keeps what was measured in a file of one line a run."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mtl_optax as mtl
from examples.studies.harness.command import say_damaged
from examples.studies.molecules.arms import ARMS, Shared, step_of
from examples.studies.molecules.data import HISTOGRAMS, MESSAGES, Molecules, split
from examples.studies.molecules.messages import Messages

NETWORKS = {HISTOGRAMS: Shared, MESSAGES: Messages}
MEASURED = 500  # molecules at a time


@dataclass(frozen=True)
class Config:
    """How every network is trained.

    Attributes:
      steps, batch: of a training.
      rates: learning rates at the start, every one tried in every arm.
      sizes: molecules of the training, the validation and the test part; a seed draws a split of its own.
      searched: weightings of a search.
      chunk: steps of one call of the program.
      network: one of `NETWORKS`.
    """

    steps: int = 4000
    batch: int = 128
    rates: tuple[float, ...] = (3e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
    sizes: tuple[int, int, int] = (10_000, 2000, 2000)
    searched: int = 64
    chunk: int = 250
    network: str = HISTOGRAMS


def config_of(network: str, large: bool = False) -> Config:
    """The configuration of a network where nothing else is asked for."""
    if network == HISTOGRAMS:
        return Config()
    rates = (3e-3, 1e-2, 2e-2)
    if large:
        return Config(50_000, 128, rates, (100_000, 10_000, 10_000), network=network)
    return Config(1500, 32, rates, (4000, 1000, 1000), network=network)


class Result(NamedTuple):
    """What one learning rate of an arm reached on a split.

    Attributes:
      validation, test: mean absolute errors `[K, T]` of its K networks, in standard deviations.
      seconds: of the training; of all that ran beside it, divided by their number.
    """

    arm: str
    seed: int
    rate: float
    validation: np.ndarray
    test: np.ndarray
    seconds: float


class Store:
    """The finished results in `rows.jsonl`, of this configuration alone."""

    def __init__(
        self,
        out: Path | None,
        config: Config,
        resume: bool,
        version: str | None = mtl.__version__,
    ):
        """`version` of the library that made the results; None takes those of any."""
        self.path = None if out is None else out / "rows.jsonl"
        about = {**asdict(config), "rates": None, "chunk": None, "mtl_optax": version}
        self.about = json.loads(json.dumps(about))  # as it reads back
        self._lock = threading.Lock()
        self.results: list[Result] = []
        if self.path is not None and self.path.exists():
            if resume:
                self.results = list(read(self.path, self.about))
            else:
                self.path.unlink()

    def add(self, result: Result) -> None:
        """Keep a result, at once."""
        with self._lock:
            self.results.append(result)
            if self.path is not None:
                with self.path.open("a") as stream:
                    stream.write(line_of(result, self.about))


def line_of(result: Result, about: dict[str, Any]) -> str:
    """A result as a line of JSON."""

    def plain(value: Any) -> Any:
        return [[float(f"{x:.6g}") for x in row] for row in value]

    entry = result._replace(validation=plain(result.validation), test=plain(result.test))
    return json.dumps({**entry._asdict(), "about": about}) + "\n"


def read(path: Path, about: dict[str, Any]) -> Iterator[Result]:
    """The results of a file that were made in this way."""
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
            made = {"network": HISTOGRAMS, **entry.pop("about")}  # older rows name none
            parts = {name: np.array(entry[name]) for name in ("validation", "test")}
            result = Result(**{**entry, **parts})
        except (ValueError, KeyError, TypeError) as error:  # a line that was not finished
            say_damaged(path, error)
            continue
        if made == {**about, "mtl_optax": about["mtl_optax"] or made["mtl_optax"]}:
            yield result


class Programs:
    """The compiled programs of an arm, over axes of runs and weightings `[R, K]`.

    A run is a split, by its seed, and a learning rate; the data have a first axis of splits.
    """

    def __init__(self, name: str, config: Config, inputs: int):
        arm, network = ARMS[name], NETWORKS[config.network](config.batch)

        def start(seed: jax.Array, rate: jax.Array, weights: jax.Array) -> Any:
            params = network.init(jax.random.key(seed), inputs)
            state = step_of(arm, network, rate, weights, config.steps).init(params)
            return jax.tree.map(jnp.copy, (params, state))  # some states begin with shared arrays

        def advance(
            carry: Any, data: Molecules, seed: Any, rate: Any, weights: Any, begin: jax.Array
        ) -> Any:
            step = step_of(arm, network, rate, weights, config.steps)
            key = jax.random.fold_in(jax.random.key(seed), 1)

            def one(carry: Any, number: jax.Array) -> Any:
                shape, molecules = (config.batch,), data.properties.shape[1]
                rows = jax.random.randint(jax.random.fold_in(key, number), shape, 0, molecules)
                batch = jax.tree.map(lambda part: part[seed, rows], data)
                params, state, *_ = step.update(*carry, batch)
                return (params, state), None

            return jax.lax.scan(one, carry, begin + jnp.arange(config.chunk))[0]

        def measure(carry: Any, data: Molecules, seed: jax.Array) -> jax.Array:
            params, _ = carry

            def errors(molecule: Molecules) -> jax.Array:
                one = jax.tree.map(lambda array: array[None], molecule)
                found = network.predict(params.heads, network.encode(params.shared, one))
                return jnp.abs(found[0] - molecule.properties)

            part = jax.tree.map(lambda part: part[seed], data)
            return jnp.mean(jax.lax.map(errors, part, batch_size=MEASURED), axis=0)

        def over(function: Callable[..., Any], runs: Any, weightings: Any) -> Callable[..., Any]:
            return jax.vmap(jax.vmap(function, weightings), runs)

        self.start = jax.jit(over(start, (0, 0, 0), (None, None, 0)))
        axes = (0, None, 0, 0, 0, None), (0, None, None, None, 0, None)
        self.advance = jax.jit(over(advance, *axes), donate_argnums=0)
        self.measure = jax.jit(over(measure, (0, None, 0), (0, None, None)))


class Trainer:
    """Trains what is missing of an arm.

    On an accelerator all networks of an arm go side by side if they are small; else, and on a CPU, those of
    one split and one rate.
    """

    def __init__(self, molecules: Molecules, config: Config, seeds: int):
        self.config = config
        parts = [split(molecules, config.sizes, seed) for seed in range(seeds)]
        stacked = jax.tree.map(lambda *of_part: np.stack(of_part), *parts)
        self.train, self.validation, self.test = jax.device_put(stacked)
        self.side_by_side = NETWORKS[config.network].small and jax.default_backend() != "cpu"

    def run(
        self,
        name: str,
        missing: Sequence[tuple[int, float]],
        advanced: Callable[[int], None] = lambda steps: None,
    ) -> Iterator[Result]:
        """The results of an arm for splits and rates; `advanced` is told how many steps were done."""
        config, programs = self.config, self._programs(name)
        for group in [missing] if self.side_by_side else [[run] for run in missing]:
            begun = time.perf_counter()
            settings = self._settings(name, group)
            seeds, *_ = settings
            carry = programs.start(*settings)
            for begin in range(0, config.steps, config.chunk):
                carry = jax.block_until_ready(programs.advance(carry, self.train, *settings, begin))
                advanced(len(group) * config.chunk)
            validation, test = (
                np.asarray(programs.measure(carry, part, seeds))
                for part in (self.validation, self.test)
            )
            seconds = (time.perf_counter() - begun) / len(group)
            for run, *errors in zip(group, validation, test, strict=True):
                yield Result(name, *run, *errors, seconds)

    def step_call(self, name: str) -> Callable[[], Any]:
        """For a clock: one call of an arm's program on the first split."""
        programs = self._programs(name)
        settings = self._settings(name, [(0, self.config.rates[0])])
        carry = programs.start(*settings)

        def call() -> Any:
            nonlocal carry
            carry = programs.advance(carry, self.train, *settings, 0)
            return carry

        return call

    def _programs(self, name: str) -> Programs:
        return Programs(name, self.config, self.train.descriptors.shape[-1])

    def _settings(self, name: str, group: Sequence[tuple[int, float]]) -> tuple[np.ndarray, ...]:
        """The seeds and rates of some runs, and the weights of their networks."""
        seeds, rates = map(np.array, zip(*group, strict=True))
        weights = [ARMS[name].weightings(self.config.searched, seed) for seed, _ in group]
        return seeds, rates.astype(np.float32), np.stack(weights)
