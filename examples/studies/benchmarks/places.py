"""Sections on whole training steps: time and memory of a method in each of its places."""

from collections.abc import Iterator

import jax

import mtl_optax as mtl
from examples.studies.benchmarks.problems import (
    DENSE,
    RECSYS,
    SMALL,
    TINY,
    Problem,
)
from examples.studies.benchmarks.report import Row
from examples.studies.benchmarks.steps import PLACES, steps, training_step
from examples.studies.harness.timing import interleaved_ratios, several

_TARGETS = {"fork": 1.02, "split": 2.0, "per_task": 2.5}


def _problems(quick: bool) -> dict[str, Problem]:
    return {
        "recsys": TINY["tables"] if quick else RECSYS,
        "dense": TINY["dense"] if quick else DENSE,
    }


def step_times(quick: bool) -> Iterator[Row]:
    """Every place over the plain step: time, arithmetic, and the memory that it adds."""
    for (kind, problem), num_tasks in zip(_problems(quick).items(), (8, 4), strict=True):
        made = steps(problem, num_tasks, PLACES)
        # T gradients of all embedding tables are compiled for their memory, and not run.
        timed = {n: s for n, s in made.items() if kind == "dense" or n in ("plain", "fork")}
        ratios = interleaved_ratios(timed, "plain", 1 if quick else 25)
        for place in PLACES:
            case = f"{place} / plain, {kind}, T={num_tasks}"
            if place in ratios:
                yield Row("step time", case, ratios[place], "x", _TARGETS[place])
            operations = made[place].operations / made["plain"].operations
            yield Row("step operations", case, operations, "x")
            beyond = made[place].temporary_mebibytes - made["plain"].temporary_mebibytes
            target = 10.0 if (kind, place) == ("recsys", "fork") else None
            case = f"{place} beyond plain, {kind}, T={num_tasks}"
            yield Row("step memory", case, beyond, "MiB", target)


def savings(quick: bool) -> Iterator[Row]:
    """What `update_every=` and `weights_from=` save, T = 4."""
    every, num_tasks, rounds = (2, 4, 1) if quick else (5, 4, 3)
    problems, method = _problems(quick), mtl.multibalance(num_tasks)
    seldom = mtl.multibalance(num_tasks, update_every=every)
    dense = steps(problems["dense"], num_tasks, ["weighted"], method)
    dense[f"update_every={every}"] = steps(problems["dense"], num_tasks, ["weighted"], seldom)[
        "weighted"
    ]
    # Whole periods, so that every reading holds one step with T backward passes.
    calls = {name: several(step, every) for name, step in dense.items()}
    recsys = steps(problems["recsys"], num_tasks, ["weighted", "weighted_by_layers"], method)
    for kind, each in (("dense", calls), ("recsys", recsys)):
        for name, value in interleaved_ratios(each, "plain", rounds).items():
            label = name.replace("weighted_by_layers", "weights_from= without tables")
            yield Row("fewer passes", f"{label} / plain, {kind}, T={num_tasks}", value, "x")


def products_memory(quick: bool) -> Iterator[Row]:
    """Temporary memory that `mode="products"` adds, against the parameters and the largest leaf."""
    num_tasks = 2 if quick else 16
    for network, problem in (TINY if quick else SMALL).items():
        for form in ("a tuple", "an array"):
            beyond, sizes = beyond_plain(problem, num_tasks, form == "an array")
            case = f"{network}, T={num_tasks}, losses in {form}"
            yield Row("beyond plain", case, beyond, "MiB", sum(sizes) + max(sizes))
            yield Row("beyond plain / parameters", case, beyond / sum(sizes), "x", 0.5)


def beyond_plain(problem: Problem, num_tasks: int, as_array: bool) -> tuple[float, list[float]]:
    """What `mode="products"` with UPGrad adds to the plain step's memory, and the sizes of all leaves."""
    plain, products = (
        training_step(place, problem, mtl.upgrad(num_tasks), "products", as_array=as_array)
        for place in ("plain", "weighted")
    )
    sizes = [leaf.nbytes / 2**20 for leaf in jax.tree.leaves(products.state[0])]
    return products.temporary_mebibytes - plain.temporary_mebibytes, sizes
