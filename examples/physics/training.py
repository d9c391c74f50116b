"""Training of small networks on a problem, all seeds at once."""

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
from examples.physics.problems import Problem

ONE_GRADIENT = "config, one gradient a step"


@dataclass(frozen=True)
class Config:
    """Sizes of the network and of the training."""

    steps: int = 4000
    seeds: int = 3
    width: int = 32
    depth: int = 3
    interior: int = 256
    edge: int = 32
    learning_rate: float = 2e-3
    chunk: int = 500
    grid: int = 64


@dataclass
class Run:
    """What one method did on one problem.

    Attributes:
      errors: `[seeds]`, relative L2 errors at the end.
      step_ms: milliseconds a step of all seeds, without compilation.
      weights: `[chunks, T]`, the weights of the first seed over training.
      field: `[grid, grid]`, the first seed's solution.
    """

    errors: np.ndarray
    step_ms: float
    weights: np.ndarray
    field: np.ndarray


def methods() -> dict[str, Callable[[Any], Any]]:
    """The rows of the table, from the task names to a method."""
    return {
        "plain sum": mtl.sum_tasks,
        "fixed weights, 100": lambda names: mtl.fixed_weights(
            names, {name: 1.0 if name == "equation" else 100.0 for name in names}
        ),
        "inverse_norm": mtl.inverse_norm,
        "lr_annealing": lambda names: mtl.lr_annealing(names, target="equation"),
        "metabalance": lambda names: mtl.metabalance(
            names, target="equation", relax_factor=1.0, blocks="all"
        ),
        "upgrad": mtl.upgrad,
        "config": mtl.config,
        ONE_GRADIENT: mtl.config,
        "mgda": mtl.mgda,
        "softadapt": lambda names: mtl.softadapt(names, variant="normalized"),
        "relobralo": mtl.relobralo,
    }


def init_network(key: jax.Array, width: int, depth: int) -> list[tuple[jax.Array, jax.Array]]:
    """A tanh network from 2 numbers to 1."""
    sizes = [2, *[width] * depth, 1]
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (jax.random.normal(k, (a, b)) * (2 / (a + b)) ** 0.5, jnp.zeros(b))
        for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def apply_network(params: Any, point: jax.Array) -> jax.Array:
    """U at one point `[2]`."""
    for weight, bias in params[:-1]:
        point = jnp.tanh(point @ weight + bias)
    weight, bias = params[-1]
    return (point @ weight + bias)[0]


def train(problem: Problem, name: str, config: Config) -> Iterator[Run | int]:
    """Trains all seeds of one method; yields the steps done, and the `Run` at the end."""
    loss_fn = functools.partial(_losses, problem)
    names = tuple(jax.eval_shape(lambda: _example_losses(problem, config)))
    method = methods()[name](names)
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    one_gradient = name == ONE_GRADIENT
    balance = mtl.remember(method, decay=0.9) if one_gradient else method
    tx = optax.chain(balance, optax.adam(schedule))
    single = mtl.one_task_value_and_grad(loss_fn, names)
    each = mtl.per_task_value_and_grad(loss_fn)
    # A method that looks at nothing needs one backward pass, of the weighted sum.
    on_losses = method.needs <= {"losses"}
    adam = optax.adam(schedule)

    def init(key: jax.Array) -> Any:
        params = init_network(key, config.width, config.depth)
        if on_losses:
            return params, (method.init(params), adam.init(params))
        return params, tx.init(params)

    def step(key: jax.Array, carry: Any, k: jax.Array) -> tuple[Any, None]:
        params, state = carry
        points = problem.draw(jax.random.fold_in(key, k), config.interior, config.edge)
        if on_losses:
            method_state, adam_state = state

            def weighted(params: Any) -> Any:
                return mtl.weigh_losses(loss_fn(params, *points), method_state, method)

            grads, method_state = jax.grad(weighted, has_aux=True)(params)
            updates, adam_state = adam.update(grads, adam_state, params)
            state = method_state, adam_state
        elif one_gradient:
            losses, (grads, active) = single(k, params, *points)
            updates, state = tx.update(grads, state, params, losses=losses, active=active)
        else:
            losses, grads = each(params, *points)
            updates, state = tx.update(grads, state, params, losses=losses)
        return (optax.apply_updates(params, updates), state), None

    @functools.partial(jax.jit, donate_argnums=1)
    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def advance(key: jax.Array, carry: Any, start: jax.Array) -> tuple[Any, jax.Array]:
        steps = start + jnp.arange(config.chunk)
        carry, _ = jax.lax.scan(functools.partial(step, key), carry, steps)
        return carry, mtl.head_weights(carry[1])

    keys = jax.random.split(jax.random.key(0), config.seeds)
    carry = jax.jit(jax.vmap(init))(keys)
    advance = advance.lower(keys, carry, jnp.int32(0)).compile()
    weights, seconds = [], 0.0
    for start in range(0, config.steps, config.chunk):
        began = time.perf_counter()
        carry, used = jax.block_until_ready(advance(keys, carry, jnp.int32(start)))
        seconds += time.perf_counter() - began
        weights.append(np.asarray(used[0]))
        yield start + config.chunk
    points = problem.grid(config.grid)
    fields = jax.jit(
        jax.vmap(
            lambda params: jax.vmap(functools.partial(apply_network, params))(
                jnp.asarray(points, jnp.float32)
            )
        )
    )(carry[0])
    exact = problem.solution(points)
    errors = np.linalg.norm(np.asarray(fields, float) - exact, axis=1) / np.linalg.norm(exact)
    field = np.asarray(fields[0]).reshape(config.grid, config.grid)
    yield Run(errors, 1e3 * seconds / config.steps, np.stack(weights), field)


def _losses(
    problem: Problem, params: Any, interior: jax.Array, boundary: jax.Array
) -> dict[str, jax.Array]:
    return problem.losses(functools.partial(apply_network, params), interior, boundary)


def _example_losses(problem: Problem, config: Config) -> dict[str, jax.Array]:
    params = init_network(jax.random.key(0), config.width, config.depth)
    return _losses(problem, params, *problem.draw(jax.random.key(1), 2, 2))
