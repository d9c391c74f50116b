"""Training of small networks on a problem, one seed after the other."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_optax as mtl
from examples.studies.physics.pointwise import residual_attention
from examples.studies.physics.problems import Network, Problem


@dataclass(frozen=True)
class Config:
    """Sizes of the network and of the training, the same for every method and problem.

    Attributes:
      steps, seeds: of the training.
      width, depth: of the network.
      input_scale: factor on the first layer's weights at the start, for solutions that oscillate.
      interior, edge: points a step, drawn anew for each step.
      learning_rate: of Adam at the start; it falls to 0 along a cosine.
      period: steps between two computations of the weights, for the rows that keep them.
      probes: random vectors that estimate an NTK trace.
      pool: batches of interior points that come back in turn, for weights of points.
      chunk: steps between two updates of the progress bar.
      grid: points along each axis at which the error is measured.
    """

    steps: int = 3000
    seeds: int = 3
    width: int = 64
    depth: int = 2
    input_scale: float = 2.0
    interior: int = 192
    edge: int = 32
    learning_rate: float = 5e-3
    period: int = 100
    probes: int = 16
    pool: int = 16
    chunk: int = 500
    grid: int = 64


@dataclass
class Run:
    """What one method did on one problem.

    Attributes:
      errors: `[seeds]`, relative L2 errors at the end.
      step_ms: milliseconds a step of one seed, without compilation; the median over chunks of steps.
      weights: `[chunks, T]`, the weights of the first seed over training.
      names: of the T losses.
      field: `[grid, grid]`, the first seed's solution.
    """

    errors: np.ndarray
    step_ms: float
    weights: np.ndarray
    names: tuple[str, ...]
    field: np.ndarray


# On a CPU this compiles a row in three quarters of the default level's time, and the steps take as long.
CPU_OPTIONS = {"xla_backend_optimization_level": 1}

# `(params, state, step, points of the interior, of the boundary) -> (direction for Adam, new state)`
Direction = Callable[..., tuple[Any, Any]]
# `(problem, method, config) -> (the state's init, direction)`
Placement = Callable[[Problem, mtl.Method, Config], tuple[Callable[[Any], Any], Direction]]


def every_gradient(problem: Problem, method: mtl.Method, config: Config) -> Any:
    """T backward passes a step."""

    def direction(params: Any, state: Any, k: jax.Array, *points: jax.Array) -> Any:
        losses, grads = mtl.per_task_value_and_grad(_losses(problem))(params, *points)
        return method.update(grads, state, params, losses=losses)

    return method.init, direction


def kept_weights(problem: Problem, method: mtl.Method, config: Config) -> Any:
    """T backward passes where weights are due (`update_every`), and one in between: jaxpi's scheme."""
    value_and_grad = mtl.weighted_value_and_grad(_losses(problem), method)

    def direction(params: Any, state: Any, k: jax.Array, *points: jax.Array) -> Any:
        return value_and_grad(params, state, *points)[1]

    return method.init, direction


def one_gradient(problem: Problem, method: mtl.Method, config: Config) -> Any:
    """One backward pass a step, of the loss whose turn it is."""
    remembered = mtl.remember(method, decay=0.0)
    value_and_grad = mtl.one_task_value_and_grad(_losses(problem), method.tasks.names)

    def direction(params: Any, state: Any, k: jax.Array, *points: jax.Array) -> Any:
        losses, (grads, active) = value_and_grad(k, params, *points)
        return remembered.update(grads, state, params, losses=losses, active=active)

    return remembered.init, direction


def on_losses(problem: Problem, method: mtl.Method, config: Config) -> Any:
    """One backward pass a step, of the weighted sum; NTK traces where the method asks for them."""
    loss_fn = _losses(problem)

    def direction(params: Any, state: Any, k: jax.Array, *points: jax.Array) -> Any:
        extra = {}
        if "traces" in method.rule.extra:
            extra["traces"] = _traces(problem, method.tasks.names, config, params, k, *points)

        def weighted(params: Any) -> Any:
            return mtl.weigh_losses(loss_fn(params, *points), state, method, **extra)

        return jax.grad(weighted, has_aux=True)(params)

    return method.init, direction


def _traces(
    problem: Problem,
    names: tuple[str, ...],
    config: Config,
    params: Any,
    k: jax.Array,
    *points: jax.Array,
) -> jax.Array:
    """The traces `[T]` every `config.period` steps, and zeros, which `ntk` passes over, in between."""

    def residuals(params: Any, name: str) -> jax.Array:
        values = problem.residuals(network(problem, params), *points)[name]
        return values / values.size**0.5  # the loss is the sum of their squares

    def estimate(params: Any) -> jax.Array:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), k), len(names))
        return jnp.stack(
            [
                mtl.ntk_trace(residuals, params, name, num_samples=config.probes, key=key)
                for name, key in zip(names, keys, strict=True)
            ]
        )

    due = k % config.period == 0
    return jax.lax.cond(due, estimate, lambda _: jnp.zeros(len(names)), params)


def on_points(problem: Problem, method: mtl.Method, config: Config) -> Any:
    """Weights of the points of a fixed pool, whose batches come in turn; the other losses are added.

    `method` has the names of the losses; it weighs them after `residual_attention` has weighed the points.
    """
    attention = residual_attention(config.pool * config.interior)
    pool = problem.place(jax.random.uniform(jax.random.key(1), (config.pool, config.interior, 2)))

    def init(params: Any) -> Any:
        return method.init(params), attention.init(params)

    def direction(params: Any, state: Any, k: jax.Array, _: jax.Array, boundary: jax.Array) -> Any:
        batch = k % config.pool
        active = jnp.repeat(jnp.arange(config.pool) == batch, config.interior)

        def weighted(params: Any) -> Any:
            found = problem.residuals(network(problem, params), pool[batch], boundary)
            squares = found.pop("equation") ** 2
            losses = {name: jnp.mean(values * values) for name, values in found.items()}
            squares = jnp.where(active, jnp.tile(squares, config.pool), 0)
            total, points = mtl.weigh_losses(squares, state[1], attention, active=active)
            losses["equation"] = total / config.interior
            total, tasks = mtl.weigh_losses(losses, state[0], method)
            return total, (tasks, points)

        return jax.grad(weighted, has_aux=True)(params)

    return init, direction


@dataclass(frozen=True)
class Row:
    """One row of the table: a method, given the names of the losses, and where it is placed."""

    make: Callable[[tuple[str, ...], Config], mtl.Method]
    place: Placement = every_gradient


ROWS = {
    "plain sum": Row(lambda names, _: mtl.sum_tasks(names), on_losses),
    "fixed weights, 100": Row(
        lambda names, _: mtl.fixed_weights(
            names, {name: 1.0 if name == "equation" else 100.0 for name in names}
        ),
        on_losses,
    ),
    "inverse_norm": Row(lambda names, _: mtl.inverse_norm(names)),
    "inverse_norm, slow average": Row(lambda names, _: mtl.inverse_norm(names, ema_decay=0.999)),
    "inverse_norm, slow average, one gradient": Row(
        lambda names, _: mtl.inverse_norm(names, ema_decay=0.999), one_gradient
    ),
    "inverse_norm, kept weights": Row(
        lambda names, config: mtl.inverse_norm(names, update_every=config.period, eps=1e-5),
        kept_weights,
    ),
    "lr_annealing": Row(lambda names, _: mtl.lr_annealing(names, target="equation")),
    "ntk": Row(lambda names, _: mtl.ntk(names), on_losses),
    "metabalance": Row(
        lambda names, _: mtl.metabalance(names, target="equation", relax_factor=1.0, blocks="all")
    ),
    "upgrad": Row(lambda names, _: mtl.upgrad(names)),
    "conflict_free": Row(lambda names, _: mtl.conflict_free(names)),
    "conflict_free, one gradient": Row(lambda names, _: mtl.conflict_free(names), one_gradient),
    "mgda": Row(lambda names, _: mtl.mgda(names)),
    "imtl_g": Row(lambda names, _: mtl.imtl_g(names)),
    "multibalance": Row(lambda names, _: mtl.multibalance(names)),
    "gradnorm": Row(lambda names, _: mtl.gradnorm(names)),
    "db_mtl": Row(lambda names, _: mtl.db_mtl(names)),
    "softadapt": Row(lambda names, _: mtl.softadapt(names, variant="normalized"), on_losses),
    "relobralo": Row(lambda names, _: mtl.relobralo(names), on_losses),
    "residual attention": Row(lambda names, _: mtl.sum_tasks(names), on_points),
}


def init_network(key: jax.Array, config: Config) -> list[tuple[jax.Array, jax.Array]]:
    """A tanh network from 2 numbers to 1."""
    sizes = [2, *[config.width] * config.depth, 1]
    keys = jax.random.split(key, len(sizes) - 1)
    layers = [
        (jax.random.normal(k, (a, b)) * (2 / (a + b)) ** 0.5, jnp.zeros(b))
        for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]
    return [(layers[0][0] * config.input_scale, layers[0][1]), *layers[1:]]


_init_network = jax.jit(init_network, static_argnums=1)


def network(problem: Problem, params: Any) -> Network:
    """The function u of points `[n, 2]`."""

    def u(points: jax.Array) -> jax.Array:
        hidden = problem.scale(points)
        for weight, bias in params[:-1]:
            hidden = jnp.tanh(hidden @ weight + bias[None])
        weight, bias = params[-1]
        return (hidden @ weight + bias[None])[:, 0]

    return u


class Trainer:
    """The compiled training of one row on one problem, the same program for every seed."""

    def __init__(self, problem: Problem, name: str, config: Config, chunk: int | None = None):
        self.problem, self.config, self.chunk = problem, config, chunk or config.chunk
        self.names = tuple(sorted(jax.eval_shape(lambda: _example_residuals(problem, config))))
        row = ROWS[name]
        method = row.make(self.names, config)
        init_state, direction = row.place(problem, method, config)
        adam = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))

        def init(params: Any) -> Any:
            return params, init_state(params), adam.init(params)

        def step(key: jax.Array, carry: Any, k: jax.Array) -> tuple[Any, None]:
            params, state, adam_state = carry
            points = problem.draw(jax.random.fold_in(key, k), config.interior, config.edge)
            update, state = direction(params, state, k, *points)
            update, adam_state = adam.update(update, adam_state, params)
            return (optax.apply_updates(params, update), state, adam_state), None

        def advance(key: jax.Array, carry: Any, start: jax.Array) -> tuple[Any, jax.Array]:
            steps = start + jnp.arange(self.chunk)
            carry, _ = jax.lax.scan(functools.partial(step, key), carry, steps)
            return carry, mtl.head_weights(carry[1])

        self._init = init
        key = jax.random.key(0)
        carry = jax.eval_shape(lambda: init(init_network(key, config)))
        lowered = jax.jit(advance, donate_argnums=1).lower(key, carry, jnp.int32(0))
        self._advance = lowered.compile(CPU_OPTIONS if jax.default_backend() == "cpu" else None)

    def start(self, seed: int) -> tuple[jax.Array, Any]:
        """The seed's key and first state."""
        key = jax.random.key(seed)
        # A copy, since the first call of `advance` donates its buffers.
        return key, jax.tree.map(jnp.copy, self._init(_init_network(key, self.config)))

    def advance(self, key: jax.Array, carry: Any, step: int) -> tuple[Any, np.ndarray, float]:
        """One chunk of steps: the new state, the weights `[T]` at its end, and the seconds."""
        began = time.perf_counter()
        carry, weights = jax.block_until_ready(self._advance(key, carry, jnp.int32(step)))
        return carry, np.asarray(weights), time.perf_counter() - began

    def compiled_text(self) -> str:
        """The compiled program of one chunk."""
        return self._advance.as_text()

    def solution(self, carry: Any) -> np.ndarray:
        """The network's values on the grid, `[grid * grid]`."""
        grid = jnp.asarray(self.problem.grid(self.config.grid), jnp.float32)
        return np.asarray(jax.jit(network(self.problem, carry[0]))(grid), np.float64)


def train(problem: Problem, name: str, config: Config) -> Iterator[Run | int]:
    """Trains all seeds of one row; yields the steps done since the last time, and the `Run` at the end."""
    trainer = Trainer(problem, name, config)
    exact = problem.solution(problem.grid(config.grid))
    fields, weights, seconds = [], [], []
    for seed in range(config.seeds):
        key, carry = trainer.start(seed)
        for step in range(0, config.steps, config.chunk):
            carry, used, taken = trainer.advance(key, carry, step)
            seconds.append(taken)
            weights += [used] * (seed == 0)
            yield config.chunk
        fields.append(trainer.solution(carry))
    errors = np.linalg.norm(np.stack(fields) - exact, axis=1) / np.linalg.norm(exact)
    step_ms = 1e3 * float(np.median(seconds)) / config.chunk
    field = fields[0].reshape(config.grid, config.grid)
    yield Run(errors, step_ms, np.stack(weights), trainer.names, field)


def time_steps(
    problem: Problem, names: list[str], config: Config, rounds: int, chunk: int = 100
) -> dict[str, list[float]]:
    """Milliseconds a step of every row, measured in turns so that all see the same load of the machine."""
    trainers = {name: Trainer(problem, name, config, chunk) for name in names}
    states = {name: trainer.start(0) for name, trainer in trainers.items()}
    found: dict[str, list[float]] = {name: [] for name in names}
    for step in range(0, (rounds + 1) * chunk, chunk):
        for name, trainer in trainers.items():
            key, carry = states[name]
            carry, _, seconds = trainer.advance(key, carry, step)
            states[name] = key, carry
            if step > 0:  # the first chunk fills caches
                found[name].append(1e3 * seconds / chunk)
    return found


def _losses(problem: Problem) -> Callable[..., dict[str, jax.Array]]:
    def loss_fn(params: Any, *points: jax.Array) -> dict[str, jax.Array]:
        return problem.losses(network(problem, params), *points)

    return loss_fn


def _example_residuals(problem: Problem, config: Config) -> dict[str, jax.Array]:
    u = network(problem, init_network(jax.random.key(0), config))
    return problem.residuals(u, *problem.draw(jax.random.key(1), 2, 2))
