"""One training step per place: a method on the losses, the representation or the parameters.

Every step has the same form, so that the training loop does not know which method it runs. The towers get
the gradient of the plain sum of losses, unless the method or its paper weighs the towers too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

import mtl_optax as mtl
from examples.studies.harness.choices import (
    IN_PLACE_OF_ADAM,
    LOSSES,
    ON_REPRESENTATION,
    PARAMETERS,
    REPRESENTATION,
    WEIGHS_HEADS,
    Choice,
)
from examples.studies.harness.errors import UserError
from examples.studies.recommender.network import Batch, Parameters, Shared, Tables


class Network(Protocol):
    """What a step needs of a network, as functions of its parameters and a batch of any kind.

    Attributes:
      num_tasks: T.
      representation: the shape of what the towers read, any pytree of `jax.ShapeDtypeStruct`.
    """

    num_tasks: int

    @property
    def representation(self) -> Any:
        """See above."""

    def encode(self, shared: Any, batch: Any) -> Any:
        """The shared representation."""

    def decode(self, heads: Any, representation: Any, batch: Any) -> tuple[jax.Array, ...]:
        """The T losses with one representation for all towers."""
        ...

    def losses(self, heads: Any, copies: tuple[Any, ...], batch: Any) -> tuple[jax.Array, ...]:
        """The T losses, each tower on its copy of the representation."""
        ...

    def weigh_heads(self, head_grads: Any, weights: jax.Array) -> Any:
        """The gradients of the towers, each times the weight of its task."""


@dataclass(frozen=True)
class Step:
    """`init(params) -> state`; `update(params, state, batch) -> (params, state, losses, weights)`."""

    init: Callable[[Parameters], Any]
    update: Callable[[Parameters, Any, Any], tuple[Parameters, Any, jax.Array, jax.Array]]


def make_step(
    choice: Choice,
    network: Network,
    scaler: optax.GradientTransformation,
    descent: optax.GradientTransformation,
    knobs: Mapping[str, Any],
) -> Step:
    """The step of a choice; the optimizer is `scaler` (say, Adam's) followed by `descent`."""
    try:
        method = choice.method(network.num_tasks, scaler, knobs)
    except (TypeError, ValueError) as error:
        raise UserError(f"--method {choice.label}: {error}") from None
    optimizer = optax.chain(scaler, descent)
    needs = method.needs if isinstance(method, mtl.Method) else {"gradients"}
    place = choice.place
    if place is None:
        place = LOSSES if needs <= {"losses"} else PARAMETERS
        if choice.name in ON_REPRESENTATION and len(choice.parts) == 1:
            place = REPRESENTATION
    if place == LOSSES and not needs <= {"losses"}:
        raise UserError(f"--method {choice.label}: looks at gradients, so not with place='losses'")
    weighs_heads = choice.name in WEIGHS_HEADS
    if choice.name in IN_PLACE_OF_ADAM:
        return _on_parameters(method, network, descent, optimizer, weighs_heads)
    if place == LOSSES:
        return _on_losses(method, network, optimizer)
    if place == REPRESENTATION:
        return _on_representation(method, network, optimizer)
    return _on_parameters(method, network, optimizer, optimizer, weighs_heads)


def _on_losses(method: Any, network: Network, optimizer: Any) -> Step:
    """One backward pass of the weighted sum of losses; the whole network is weighted."""

    def init(params: Parameters) -> Any:
        return method.init(params), optimizer.init(params)

    def update(params: Parameters, state: Any, batch: Any) -> Any:
        method_state, opt_state = state

        def loss_fn(params: Parameters) -> Any:
            representation = network.encode(params.shared, batch)
            losses = network.decode(params.heads, representation, batch)
            total, new_state = mtl.weigh_losses(losses, method_state, method)
            return total, (losses, new_state)

        grads, (losses, method_state) = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        weights = mtl.head_weights(method_state)
        return params, (method_state, opt_state), jnp.stack(losses), weights

    return Step(init, update)


def _on_representation(method: Any, network: Network, optimizer: Any) -> Step:
    """One backward pass; the method combines the tasks' gradients of the representation."""

    def loss_fn(params: Parameters, fork: Any, batch: Any) -> tuple[jax.Array, ...]:
        copies = fork(network.encode(params.shared, batch))
        return network.losses(params.heads, copies, batch)

    value_and_grad = mtl.fork_value_and_grad(loss_fn, method)

    def init(params: Parameters) -> Any:
        return method.init(network.representation), optimizer.init(params)

    def update(params: Parameters, state: Any, batch: Any) -> Any:
        method_state, opt_state = state
        losses, (grads, method_state) = value_and_grad(params, method_state, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        weights = mtl.head_weights(method_state)
        return params, (method_state, opt_state), jnp.stack(losses), weights

    return Step(init, update)


def _on_parameters(
    method: Any, network: Network, shared_optimizer: Any, head_optimizer: Any, weighs_heads: bool
) -> Step:
    """One backward pass per task through the shared bottom.

    Of the recommender's tables the T gradients are those of the rows that the batch reads: `[T, rows,
    size]`, whatever the vocabulary. A method that keeps gradients from step to step needs those of whole
    tables, and small tables are read whole.
    """
    value_and_grad = mtl.split_value_and_grad(network.encode, network.decode)

    def init(params: Parameters) -> Any:
        states = shared_optimizer.init(params.shared), head_optimizer.init(params.heads)
        return method.init(params.shared), *states

    def update(params: Parameters, state: Any, batch: Any) -> Any:
        method_state, shared_state, head_state = state
        read, rows = params.shared, None
        by_rows = isinstance(params.shared, Shared)
        if by_rows and not (
            _keeps_rows(method, params.shared) or _reads_all(params.shared.tables, batch)
        ):
            rows, batch = _distinct_rows(params.shared.tables, batch)
            read = read._replace(tables=Tables(*map(jnp.take, read.tables, rows, (0, 0))))
        losses, (shared_grads, head_grads) = value_and_grad(read, params.heads, batch)
        combined, method_state = method.update(shared_grads, method_state, read, losses=losses)
        if rows is not None:
            whole = (
                jnp.zeros_like(table).at[row].add(grad)
                for table, row, grad in zip(
                    params.shared.tables, rows, combined.tables, strict=True
                )
            )
            combined = combined._replace(tables=Tables(*whole))
        weights = mtl.head_weights(method_state)
        if weighs_heads:
            head_grads = network.weigh_heads(head_grads, weights)
        shared_updates, shared_state = shared_optimizer.update(
            combined, shared_state, params.shared
        )
        head_updates, head_state = head_optimizer.update(head_grads, head_state, params.heads)
        params = optax.apply_updates(params, Parameters(shared_updates, head_updates))
        return params, (method_state, shared_state, head_state), jnp.stack(losses), weights

    return Step(init, update)


def _distinct_rows(tables: Tables, batch: Batch) -> tuple[tuple[jax.Array, ...], Batch]:
    """The rows of the two tables that a batch reads, each once, and the batch that reads them there.

    The number of rows is fixed by the batch; where there are fewer, the first of them fills the rest, to
    which no pair points.
    """
    found = [
        jnp.unique(ids, return_inverse=True, size=min(len(ids), len(table)))
        for ids, table in zip((batch.users, batch.items), tables, strict=True)
    ]
    rows, places = zip(*found, strict=True)
    return rows, batch._replace(rows=places)


def _reads_all(tables: Tables, batch: Batch) -> bool:
    """Whether the tables are hardly larger than the batch: to find the distinct rows would save nothing."""
    return all(len(table) <= 4 * len(batch.users) for table in tables)


def _keeps_rows(method: Any, shared: Shared) -> bool:
    """Whether the method's state has an array of a table's size."""
    tables = {table.shape for table in shared.tables}
    state = jax.eval_shape(method.init, shared)
    return any(leaf.shape[-2:] in tables for leaf in jax.tree.leaves(state))
