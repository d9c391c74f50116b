"""Whole training steps: a method in each of its places against the plain sum of losses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import optax

import mtl_optax as mtl
from examples.studies.benchmarks.problems import Problem, decode, encode, initial
from examples.studies.harness.timing import Training

PLACES = ("fork", "split", "per_task")


def steps(
    problem: Problem, num_tasks: int, places: Iterable[str], method: Any = None, mode: Any = "auto"
) -> dict[str, Training]:
    """The plain step and those of `places`, compiled, by name; MultiBalance and Adam by default."""
    method = mtl.multibalance(num_tasks) if method is None else method
    params, batch = initial(problem, num_tasks)
    optimizer = optax.adam(1e-3)
    opt_state = optimizer.init(params)

    def descend(params: Any, opt_state: Any, grads: Any) -> Any:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def plain(params: Any, opt_state: Any, balance: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            h = encode(params["shared"], batch)
            losses = decode(params["heads"], (h,) * num_tasks, batch)
            return sum(losses), losses

        grads, losses = jax.grad(loss, has_aux=True)(params)
        return *descend(params, opt_state, grads), balance, losses

    def fork(params: Any, opt_state: Any, balance: Any, batch: Any) -> Any:
        def losses_of(params: Any, fork: Any) -> tuple[jax.Array, ...]:
            return decode(params["heads"], fork(encode(params["shared"], batch)), batch)

        step = mtl.fork_value_and_grad(losses_of, method)
        losses, (grads, balance) = step(params, balance)
        return *descend(params, opt_state, grads), balance, losses

    def split(params: Any, opt_state: Any, balance: Any, batch: Any) -> Any:
        def heads_of(heads: Any, h: jax.Array, batch: Any) -> tuple[jax.Array, ...]:
            return decode(heads, (h,) * num_tasks, batch)

        step = mtl.split_value_and_grad(encode, heads_of, mode=mode)
        losses, (shared, heads) = step(params["shared"], params["heads"], batch)
        shared, balance = method.update(shared, balance, params["shared"], losses=losses)
        return *descend(params, opt_state, {"shared": shared, "heads": heads}), balance, losses

    def losses_of(params: Any, batch: Any) -> tuple[jax.Array, ...]:
        h = encode(params["shared"], batch)
        return decode(params["heads"], (h,) * num_tasks, batch)

    def per_task(params: Any, opt_state: Any, balance: Any, batch: Any) -> Any:
        losses, grads = mtl.per_task_value_and_grad(losses_of, mode=mode)(params, batch)
        shared, balance = method.update(grads["shared"], balance, params["shared"], losses=losses)
        heads = jax.tree.map(lambda g: g.sum(0), grads["heads"])
        return *descend(params, opt_state, {"shared": shared, "heads": heads}), balance, losses

    def weighted(
        params: Any, opt_state: Any, balance: Any, batch: Any, weights_from: Any = None
    ) -> Any:
        step = mtl.weighted_value_and_grad(losses_of, method, weights_from=weights_from, mode=mode)
        losses, (grads, balance) = step(params, balance, batch)
        return *descend(params, opt_state, grads), balance, losses

    def weighted_by_layers(params: Any, opt_state: Any, balance: Any, batch: Any) -> Any:
        def layers(path: Any, _: Any) -> bool:
            return "'layers'" in jax.tree_util.keystr(path)

        return weighted(params, opt_state, balance, batch, layers)

    made = {"plain": plain, "fork": fork, "split": split, "per_task": per_task}
    made |= {"weighted": weighted, "weighted_by_layers": weighted_by_layers}

    def start(name: str) -> Any:
        if name == "plain":
            return ()
        if name == "fork":
            return method.init(jax.eval_shape(encode, params["shared"], batch))
        return method.init(params if name.startswith("weighted") else params["shared"])

    return {
        name: Training(made[name], (params, opt_state, start(name)), batch)
        for name in ("plain", *places)
    }
