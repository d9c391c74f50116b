"""One training step per place: a method on the losses, the representation or the parameters.

Every step has the same form, so that the training loop does not know which method it runs. The towers get
the gradient of the plain sum of losses, unless the method or its paper weighs the towers too.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

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
from examples.studies.harness.runs import Setting

# Pytrees whose structure the network or the method knows.
Batch: TypeAlias = Any
Params: TypeAlias = Any
Representation: TypeAlias = Any
State: TypeAlias = Any
Optimizer: TypeAlias = optax.GradientTransformation


def decayed(setting: Setting, tables: Collection[str], steps: int | None = None) -> Optimizer:
    """What follows a scaler: decay of the embedding tables, and the learning rate.

    Args:
      setting: has both.
      tables: the names of the tables in the parameters; biases and dense layers are not decayed.
      steps: the rate falls to 0 along a cosine over so many; None leaves it as it is.
    """

    def is_table(path: Any, leaf: Any) -> bool:
        return any(getattr(k, "key", getattr(k, "name", None)) in tables for k in path)

    rate = setting.learning_rate
    if steps is not None:
        falls = optax.cosine_decay_schedule(1.0, steps)
        rate = lambda count: setting.learning_rate * falls(count)  # noqa: E731
    return optax.chain(
        optax.add_decayed_weights(
            setting.weight_decay, partial(jax.tree_util.tree_map_with_path, is_table)
        ),
        optax.scale_by_learning_rate(rate),
    )


class Parameters(NamedTuple):
    """The parameters that all tasks share, and those of the towers."""

    shared: Params
    heads: Params


class Network:
    """What a step needs of a network, as functions of its parameters and a batch of any kind.

    Attributes:
      num_tasks: T.
      representation: the shape of what the towers read, any pytree of `jax.ShapeDtypeStruct`.
    """

    num_tasks: int
    representation: Representation

    def encode(self, shared: Params, batch: Batch) -> Representation:
        """The shared representation."""
        raise NotImplementedError

    def losses(
        self, heads: Params, copies: tuple[Representation, ...], batch: Batch
    ) -> tuple[jax.Array, ...]:
        """The T losses, each tower on its copy of the representation."""
        raise NotImplementedError

    def weigh_heads(self, head_grads: Params, weights: jax.Array) -> Params:
        """The gradients of the towers, each times the weight of its task."""
        raise NotImplementedError

    def decode(
        self, heads: Params, representation: Representation, batch: Batch
    ) -> tuple[jax.Array, ...]:
        """The T losses with one representation for all towers."""
        return self.losses(heads, (representation,) * self.num_tasks, batch)


@dataclass(frozen=True)
class Step:
    """`init(params) -> state`; `update(params, state, batch) -> (params, state, losses, weights)`.

    The weights are None for a step without a method.
    """

    init: Callable[[Params], State]
    update: Callable[[Params, State, Batch], tuple[Params, State, jax.Array, Any]]


def make_step(
    choice: Choice,
    network: Network,
    scaler: Optimizer,
    descent: Optimizer,
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
    in_place_of_adam = choice.name in IN_PLACE_OF_ADAM
    if place == LOSSES and not in_place_of_adam:
        return on_losses(method, network, optimizer)
    if place == REPRESENTATION and not in_place_of_adam:
        return on_representation(method, network, optimizer)
    parts = {"shared": descent if in_place_of_adam else optimizer, "heads": optimizer}
    optimizer = optax.partition(parts, Parameters("shared", "heads"))
    return on_parameters(method, network, optimizer, choice.name in WEIGHS_HEADS)


def on_losses(method: Any, network: Network, optimizer: Optimizer) -> Step:
    """One backward pass of the weighted sum of losses; the whole network is weighted."""

    def value_and_grad(params: Parameters, state: State, batch: Batch) -> Any:
        def loss_fn(params: Parameters) -> Any:
            representation = network.encode(params.shared, batch)
            losses = network.decode(params.heads, representation, batch)
            total, new_state = mtl.weigh_losses(losses, state, method)
            return total, (losses, new_state)

        grads, (losses, new_state) = jax.grad(loss_fn, has_aux=True)(params)
        return losses, (grads, new_state)

    return one_optimizer(value_and_grad, method.init, optimizer)


def on_representation(method: Any, network: Network, optimizer: Optimizer) -> Step:
    """One backward pass; the method combines the tasks' gradients of the representation."""

    def loss_fn(params: Parameters, fork: Any, batch: Batch) -> tuple[jax.Array, ...]:
        copies = fork(network.encode(params.shared, batch))
        return network.losses(params.heads, copies, batch)

    value_and_grad = mtl.fork_value_and_grad(loss_fn, method)
    return one_optimizer(value_and_grad, lambda _: method.init(network.representation), optimizer)


def on_parameters(
    method: Any, network: Network, optimizer: Optimizer, weighs_heads: bool = False
) -> Step:
    """One backward pass per task through the shared bottom."""
    per_task = mtl.split_value_and_grad(network.encode, network.decode)

    def value_and_grad(params: Parameters, state: State, batch: Batch) -> Any:
        losses, (shared, heads) = per_task(params.shared, params.heads, batch)
        combined, state = method.update(shared, state, params.shared, losses=losses)
        if weighs_heads:
            heads = network.weigh_heads(heads, mtl.head_weights(state))
        return losses, (Parameters(combined, heads), state)

    return one_optimizer(value_and_grad, lambda params: method.init(params.shared), optimizer)


def one_optimizer(
    value_and_grad: Callable[[Params, State, Batch], Any],
    init_method: Callable[[Params], State],
    optimizer: Optimizer,
) -> Step:
    """The step of `value_and_grad(params, method_state, batch) -> (losses, (grads, method_state))`."""

    def init(params: Params) -> State:
        return init_method(params), optimizer.init(params)

    def update(params: Params, state: State, batch: Batch) -> Any:
        method_state, opt_state = state
        losses, (grads, method_state) = value_and_grad(params, method_state, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        weights = mtl.head_weights(method_state) if method_state else None
        return params, (method_state, opt_state), jnp.asarray(losses), weights

    return Step(init, update)
