"""Sections on methods alone: `update` and solvers. Times are medians of rounds."""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import mtl_optax as mtl
from examples.studies.benchmarks.report import Row
from examples.studies.harness.timing import compiled_call, interleaved, several
from mtl_optax.solvers.aligned import aligned_weights
from mtl_optax.solvers.conflict_averse import conflict_averse_weights
from mtl_optax.solvers.cosine import geometry_of
from mtl_optax.solvers.dual_cone import dualproj_weights, upgrad_weights
from mtl_optax.solvers.equal_projection import equal_projection_weights
from mtl_optax.solvers.min_norm import min_norm_weights
from mtl_optax.solvers.nash import fair_weights

SHAPES = ((8, 10_000), (8, 1_000_000))
SOLVERS = {
    "min-norm point (mgda)": min_norm_weights,
    "projection of the sum (dualproj)": dualproj_weights,
    "projection of each (upgrad)": upgrad_weights,
    "conflict-averse (cagrad)": conflict_averse_weights,
    "bargaining (nash_mtl)": fair_weights,
    "aligned (aligned_mtl)": aligned_weights,
    "equal projections (imtl_g)": equal_projection_weights,
}


def gradients(num_tasks: int, size: int) -> jax.Array:
    """Partly conflicting gradients `[T, size]`, of different lengths."""
    first, second = jax.random.split(jax.random.key(0))
    common = jax.random.normal(first, (1, size))
    own = jax.random.normal(second, (num_tasks, size))
    lengths = 2.0 ** jnp.linspace(-1, 1, num_tasks)[:, None]
    return (own - own.mean(0, keepdims=True) + 0.2 * common) * lengths


def gram_methods() -> list[str]:
    """The methods on the Gram matrix that keep no buffers of the gradients' size."""
    return [row.name for row in mtl.METHODS.values() if row.family == "gram"]


def update_call(name: str, stacked: jax.Array) -> Callable[[], Any]:
    """The compiled `update` of a method on one leaf, ready to be timed."""
    num_tasks = stacked.shape[0]
    method = mtl.METHODS[name].factory(num_tasks)
    state = method.init(stacked[0])
    update = lambda g, s, losses: method.update(g, s, losses=losses)  # noqa: E731
    return compiled_call(update, stacked, state, jnp.ones(num_tasks))


def updates(quick: bool) -> Iterator[Row]:
    """`update` alone, milliseconds."""
    for num_tasks, size in ((2, 50),) if quick else SHAPES:
        names = gram_methods()[:1] if quick else gram_methods()
        stacked = gradients(num_tasks, size)
        target = 0.2 if size <= 10_000 else None
        for name in names:
            call = update_call(name, stacked)
            times, rounds = (1, 1) if quick else (20, 15) if size <= 10_000 else (1, 9)
            seconds = interleaved({name: several(call, times)}, rounds)[name]
            milliseconds = 1e3 * statistics.median(seconds) / times
            yield Row("update alone", f"{name} [{num_tasks}, {size}]", milliseconds, "ms", target)


def solvers(quick: bool) -> Iterator[Row]:
    """Solvers alone, from cosines and norms to weights, microseconds."""
    num_tasks = 2 if quick else 8
    g = gradients(num_tasks, 20)
    geometry = geometry_of(g @ g.T)
    for name, solve in dict(list(SOLVERS.items())[:1] if quick else SOLVERS).items():
        call = several(compiled_call(solve, geometry), 1 if quick else 50)
        seconds = interleaved({name: call}, 1 if quick else 15)[name]
        microseconds = 1e6 * statistics.median(seconds) / (1 if quick else 50)
        yield Row("solver alone", f"{name}, T={num_tasks}", microseconds, "us", 100.0)
