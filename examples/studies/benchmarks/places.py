"""Sections on whole training steps: time and memory of a method in each of its places."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import mtl_optax as mtl
from examples.studies.benchmarks.problems import DENSE, RECSYS, TINY, Problem, encode, initial
from examples.studies.benchmarks.report import Row
from examples.studies.benchmarks.steps import PLACES, steps
from examples.studies.harness.timing import interleaved_ratios, several

FORK, SPLIT, PER_TASK = 1.02, 2.0, 2.5


def _problems(quick: bool) -> dict[str, Problem]:
    return TINY if quick else {"recsys": RECSYS, "dense": DENSE}


def _target(kind: str, num_tasks: int, place: str) -> float | None:
    if place == "fork":
        return 1.05 if (kind, num_tasks) == ("dense", 8) else FORK
    if (kind, num_tasks) != ("dense", 4):
        return None
    return SPLIT if place == "split" else PER_TASK


def step_times(quick: bool) -> Iterator[Row]:
    """Every place over the plain step: time, arithmetic, and the memory that it adds."""
    for kind, problem in _problems(quick).items():
        for num_tasks in (2,) if quick else (2, 4, 8):
            made = steps(problem, num_tasks, PLACES)
            # T gradients of all embedding tables are compiled for their memory, and not run.
            timed = {n: s for n, s in made.items() if kind == "dense" or n in ("plain", "fork")}
            rounds = 1 if quick else 25
            for place, value in interleaved_ratios(timed, "plain", rounds).items():
                case = f"{place} / plain, {kind}, T={num_tasks}"
                yield Row("step time", case, value, "x", _target(kind, num_tasks, place))
            for place in PLACES:
                operations = made[place].operations / made["plain"].operations
                case = f"{place} / plain, {kind}, T={num_tasks}"
                yield Row("step operations", case, operations, "x")
            plain = made["plain"].temporary_mebibytes
            yield Row("step memory", f"plain, {kind}, T={num_tasks}", plain, "MiB")
            for place in PLACES:
                extra = made[place].temporary_mebibytes - plain
                target = 10.0 if (kind, num_tasks, place) == ("recsys", 8, "fork") else None
                case = f"{place} beyond plain, {kind}, T={num_tasks}"
                yield Row("step memory", case, extra, "MiB", target)


def savings(quick: bool) -> Iterator[Row]:
    """What `update_every=` and `weights_from=` save, T = 4."""
    every, num_tasks = (2 if quick else 10), 4
    problems = _problems(quick)
    method = mtl.multibalance(num_tasks)
    seldom = mtl.multibalance(num_tasks, update_every=every)
    dense = steps(problems["dense"], num_tasks, ["per_task", "weighted"], method)
    dense[f"update_every={every}"] = steps(problems["dense"], num_tasks, ["weighted"], seldom)[
        "weighted"
    ]
    # Whole periods, so that every reading holds one step with T backward passes.
    calls = {name: several(step, every) for name, step in dense.items()}
    for name, value in interleaved_ratios(calls, "plain", 1 if quick else 5).items():
        case = f"{name} / plain, dense, T={num_tasks}"
        yield Row("fewer passes", case, value, "x")
    recsys = steps(problems["recsys"], num_tasks, ["per_task", "weighted_by_layers"], method)
    for name, value in interleaved_ratios(recsys, "plain", 1 if quick else 5).items():
        label = "weights_from= without tables" if name == "weighted_by_layers" else name
        yield Row("fewer passes", f"{label} / plain, recsys, T={num_tasks}", value, "x")
    for name in ("per_task", "weighted_by_layers"):
        label = "weights_from= without tables" if name == "weighted_by_layers" else name
        extra = recsys[name].temporary_mebibytes - recsys["plain"].temporary_mebibytes
        yield Row("fewer passes", f"{label} beyond plain, recsys, T={num_tasks}", extra, "MiB")


def map_memory(quick: bool) -> Iterator[Row]:
    """Temporary memory of `mode="map"`, against one gradient's, for several T."""
    problem = TINY["dense"] if quick else DENSE
    sizes = {}
    for num_tasks in (2, 4) if quick else (2, 8, 32):
        sizes[num_tasks] = _map_step(problem, num_tasks).memory_analysis().temp_size_in_bytes
        case = f'temporaries of mode="map", dense, T={num_tasks}'
        yield Row("map memory", case, sizes[num_tasks] / 2**20, "MiB")


def _map_step(problem: Problem, num_tasks: int) -> Any:
    """The T gradients of the shared layers of one representation, with losses that cost nothing."""
    params, batch = initial(problem, num_tasks)

    def losses_of(shared: Any, batch: Any) -> jax.Array:
        # T cheap losses of one representation: what grows with T is then the pulling back alone.
        return jnp.mean(encode(shared, batch)[:, :num_tasks], axis=0)

    step = mtl.per_task_value_and_grad(losses_of, mode="map")
    return jax.jit(step).lower(params.shared, batch).compile()
