"""Whole training steps: a method in each of its places against the plain sum of losses."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import mtl_optax as mtl
from examples.studies.benchmarks import problems
from examples.studies.benchmarks.problems import Batch, Problem, initial
from examples.studies.harness import steps as harness
from examples.studies.harness.steps import Parameters, Step
from examples.studies.harness.timing import Training

PLACES = ("fork", "split", "per_task")


class Network(harness.Network):
    """A network of `problems`."""

    def __init__(
        self, num_tasks: int, representation: Any, by_example: bool = False, as_array: bool = False
    ):
        """`by_example`: the tasks are the examples of a batch, and the network has one head.

        `as_array`: the losses are an array `[T]`, of which one backward pass is compiled, in a loop.
        """
        self.num_tasks, self.representation = num_tasks, representation
        self._by_example, self._as_array = by_example, as_array

    def encode(self, shared: Any, batch: Batch) -> jax.Array:
        """The representation `[batch, width]`."""
        return problems.encode(shared, batch)

    def losses(self, heads: Any, copies: Any, batch: Batch) -> tuple[jax.Array, ...]:
        """The T losses of the heads, each on its copy of the representation."""
        return problems.decode(heads, copies, batch)

    def decode(self, heads: Any, representation: jax.Array, batch: Batch) -> Any:
        """The T losses with one representation for all heads."""
        if self._by_example:
            return problems.example_losses(heads, representation, batch)
        losses = super().decode(heads, representation, batch)
        return jnp.stack(losses) if self._as_array else losses


def step_of(
    place: str,
    network: Network,
    method: mtl.Method,
    optimizer: optax.GradientTransformation,
    mode: Any = "auto",
) -> Step:
    """The step with the method in a place, or "plain", that of the sum of losses."""

    def losses_of(params: Parameters, batch: Batch) -> Any:
        return network.decode(params.heads, network.encode(params.shared, batch), batch)

    def plain(params: Parameters, state: Any, batch: Batch) -> Any:
        def total(params: Parameters) -> tuple[jax.Array, Any]:
            losses = losses_of(params, batch)
            return jnp.asarray(losses).sum(), losses

        grads, losses = jax.grad(total, has_aux=True)(params)
        return losses, (grads, state)

    def per_task(params: Parameters, state: Any, batch: Batch) -> Any:
        losses, grads = mtl.per_task_value_and_grad(losses_of, mode=mode)(params, batch)
        shared, state = method.update(grads.shared, state, params.shared, losses=losses)
        heads = jax.tree.map(lambda g: g.sum(0), grads.heads)
        return losses, (Parameters(shared, heads), state)

    def layers(path: tuple[Any, ...], _: object) -> bool:
        return "'layers'" in jax.tree_util.keystr(path)

    match place:
        case "plain":
            return harness.one_optimizer(plain, lambda _: (), optimizer)
        case "losses":
            return harness.on_losses(method, network, optimizer)
        case "fork":
            return harness.on_representation(method, network, optimizer)
        case "split":
            return harness.on_parameters(method, network, optimizer)
        case "per_task":
            init = lambda params: method.init(params.shared)  # noqa: E731
            return harness.one_optimizer(per_task, init, optimizer)
    source = layers if place == "weighted_by_layers" else None
    weighted = mtl.weighted_value_and_grad(losses_of, method, weights_from=source, mode=mode)
    return harness.one_optimizer(weighted, method.init, optimizer)


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
    """A step of `step_of` with Adam, compiled; see `Network` for the options."""
    num_tasks = method.num_tasks
    if by_example:
        params, batch = initial(problem._replace(batch=num_tasks), 1)
        batch = {"features": batch["features"], "labels": batch["labels"][0]}
    else:
        params, batch = initial(problem, num_tasks)
    representation = jax.eval_shape(problems.encode, params.shared, batch)
    network = Network(num_tasks, representation, by_example, as_array)
    return Training(step_of(place, network, method, optax.adam(1e-3), mode), params, batch)
