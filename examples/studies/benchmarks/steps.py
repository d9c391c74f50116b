"""Whole training steps: a method in each of its places against the plain sum of losses."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

import mtl_optax as mtl
from examples.studies.benchmarks.problems import (
    Batch,
    Layers,
    Params,
    Problem,
    decode,
    encode,
    example_losses,
    initial,
)
from examples.studies.harness.timing import Training

Losses: TypeAlias = jax.Array | tuple[jax.Array, ...]
State: TypeAlias = optax.OptState
Step: TypeAlias = tuple[Params, State, State, Losses]
Encode: TypeAlias = Callable[[Params, Batch], jax.Array]
Decode: TypeAlias = Callable[[Sequence[Layers], Sequence[jax.Array], Batch], tuple[jax.Array, ...]]
PLACES = ("fork", "split", "per_task")


def step_functions(
    encode: Encode,
    decode: Decode,
    method: mtl.Method,
    optimizer: optax.GradientTransformation,
    mode: Any = "auto",
    losses_of: Callable[[Params, Batch], Losses] | None = None,
    as_array: bool = False,
) -> dict[str, Callable[..., Step]]:
    """Training steps `(params, opt_state, balance_state, batch) -> the first three and the losses`.

    `encode(shared, batch)` is the representation, and `decode(heads, copies, batch)` the T losses. Steps
    that need no representation differentiate `losses_of(params, batch)`, by default those of the heads;
    with `as_array` as an array `[T]`, for which one backward pass is compiled, and run in a loop.
    """
    num_tasks = method.num_tasks

    def descend(params: Params, opt_state: State, grads: Params) -> tuple[Params, State]:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def of_heads(heads: Sequence[Layers], h: jax.Array, batch: Batch) -> tuple[jax.Array, ...]:
        return decode(heads, (h,) * num_tasks, batch)

    def of_params(params: Params, batch: Batch) -> Losses:
        losses = of_heads(params["heads"], encode(params["shared"], batch), batch)
        return jnp.stack(losses) if as_array else losses

    losses_of = losses_of or of_params

    def plain(params: Params, opt_state: State, balance: State, batch: Batch) -> Step:
        def total(params: Params) -> tuple[jax.Array, Losses]:
            losses = losses_of(params, batch)
            return jnp.asarray(losses).sum(), losses

        grads, losses = jax.grad(total, has_aux=True)(params)
        return *descend(params, opt_state, grads), balance, losses

    def on_losses(params: Params, opt_state: State, balance: State, batch: Batch) -> Step:
        def total(params: Params) -> tuple[jax.Array, tuple[Losses, State]]:
            losses = losses_of(params, batch)
            weighted, state = mtl.weigh_losses(losses, balance, method)
            return weighted, (losses, state)

        grads, (losses, balance) = jax.grad(total, has_aux=True)(params)
        return *descend(params, opt_state, grads), balance, losses

    def fork(params: Params, opt_state: State, balance: State, batch: Batch) -> Step:
        def forked(params: Params, fork: Callable[..., Any], batch: Batch) -> tuple[jax.Array, ...]:
            return decode(params["heads"], fork(encode(params["shared"], batch)), batch)

        step = mtl.fork_value_and_grad(forked, method)
        losses, (grads, balance) = step(params, balance, batch)
        return *descend(params, opt_state, grads), balance, losses

    def split(params: Params, opt_state: State, balance: State, batch: Batch) -> Step:
        step = mtl.split_value_and_grad(encode, of_heads, mode=mode)
        losses, (shared, heads) = step(params["shared"], params["heads"], batch)
        shared, balance = method.update(shared, balance, params["shared"], losses=losses)
        return *descend(params, opt_state, {"shared": shared, "heads": heads}), balance, losses

    def per_task(params: Params, opt_state: State, balance: State, batch: Batch) -> Step:
        losses, grads = mtl.per_task_value_and_grad(losses_of, mode=mode)(params, batch)
        shared, balance = method.update(grads["shared"], balance, params["shared"], losses=losses)
        heads = jax.tree.map(lambda g: g.sum(0), grads["heads"])
        return *descend(params, opt_state, {"shared": shared, "heads": heads}), balance, losses

    def weighted(
        params: Params, opt_state: State, balance: State, batch: Batch, weights_from: Any = None
    ) -> Step:
        step = mtl.weighted_value_and_grad(losses_of, method, weights_from=weights_from, mode=mode)
        losses, (grads, balance) = step(params, balance, batch)
        return *descend(params, opt_state, grads), balance, losses

    def layers(path: tuple[Any, ...], _: object) -> bool:
        return "'layers'" in jax.tree_util.keystr(path)

    by_layers = partial(weighted, weights_from=layers)
    made = {"plain": plain, "losses": on_losses, "fork": fork, "split": split, "per_task": per_task}
    return {**made, "weighted": weighted, "weighted_by_layers": by_layers}


def steps(
    problem: Problem, num_tasks: int, places: Iterable[str], method: mtl.Method | None = None
) -> dict[str, Training]:
    """The plain step and those of `places`, compiled, by name; MultiBalance by default."""
    method = mtl.multibalance(num_tasks) if method is None else method
    return {name: training_step(name, problem, method) for name in ("plain", *places)}


def training_step(
    place: str,
    problem: Problem,
    method: mtl.Method,
    mode: Any = "auto",
    *,
    by_example: bool = False,
    as_array: bool = False,
) -> Training:
    """A step of `step_functions` with Adam, compiled.

    With `by_example` the tasks are the examples of a batch, and the network has one head.
    """
    num_tasks = method.num_tasks
    if by_example:
        params, batch = initial(problem._replace(batch=num_tasks), 1)
        batch = {"features": batch["features"], "labels": batch["labels"][0]}
    else:
        params, batch = initial(problem, num_tasks)
    optimizer = optax.adam(1e-3)
    losses_of = example_losses if by_example else None
    made = step_functions(encode, decode, method, optimizer, mode, losses_of, as_array)
    balance: State = ()
    if place == "fork":
        balance = method.init(jax.eval_shape(encode, params["shared"], batch))
    elif place != "plain":
        balance = method.init(params if place.startswith("weighted") else params["shared"])
    return Training(made[place], (params, optimizer.init(params), balance), batch)
