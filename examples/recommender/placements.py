"""One training step per placement: a method on the losses, the representation or the parameters.

Every step has the same form, so that the training loop does not know which method it runs. Whatever the
placement, the towers get the gradient of the plain sum of losses (a method on the losses excepted, which
weights the towers too). The two parts of the network have the same optimizer, unless the method takes
Adam's place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import mtl_optax as mtl
from examples.recommender.errors import UserError
from examples.recommender.network import NetworkConfig, SharedBottom, Tower

SINGLE, SUM = "single", "sum"
# The methods whose paper puts them on the representation.
ON_REPRESENTATION = ("multibalance",)
# The methods that take Adam's place on the shared bottom.
IN_PLACE_OF_ADAM = ("adatask", "scale_by_mtadam")
# Its weights come from the residuals of a regression, which a ranking loss does not have.
WITHOUT_USE = ("ntk",)
# The choices that some methods leave to the user, and defaults that do not fit every number of tasks.
ARGUMENTS: dict[str, Callable[[int, optax.GradientTransformation], dict[str, Any]]] = {
    "adatask": lambda num_tasks, scaler: {"inner": scaler},
    # The target counts twice as much as each of the other tasks.
    "fixed_weights": lambda num_tasks, scaler: {"weights": [1.0] + [0.5] * (num_tasks - 1)},
    "go4align": lambda num_tasks, scaler: {"num_groups": min(2, num_tasks)},
    # The target is what is minimised; guessing costs the other tasks log(2) = 0.69.
    "lagrangian": lambda num_tasks, scaler: {
        "limits": [None] + [0.5] * (num_tasks - 1),
        "step_size": 0.1,
    },
    "trimmed_mean": lambda num_tasks, scaler: {"trim_number": min(1, (num_tasks - 1) // 2)},
}


class Batch(NamedTuple):
    """Pairs with a label and a mask per task.

    Attributes:
        users, items: `[N]`.
        labels, mask: `[T, N]`; a pair without mask does not count in the task's loss.
        key: for dropout.
    """

    users: jax.Array
    items: jax.Array
    labels: jax.Array
    mask: jax.Array
    key: jax.Array


class Parameters(NamedTuple):
    """The parameters of the shared bottom and of the towers, apart."""

    shared: nnx.State
    heads: nnx.State


class Network:
    """The network as pure functions of its parameters.

    The towers are alike, so their parameters are stacked along a task axis and one `vmap` runs all.
    """

    def __init__(self, users: int, items: int, item_bias: np.ndarray, config: NetworkConfig):
        """`item_bias` `[T, items]` is where each tower's bias of the items starts."""
        tasks = len(item_bias)
        self.num_tasks = tasks
        self._item_bias = jnp.asarray(item_bias)[..., None]
        self.width = config.embedding + config.mlp[-1]
        self._make_bottom = lambda key: SharedBottom(users, items, config, nnx.Rngs(key))
        self._make_tower = lambda key: Tower(items, config, nnx.Rngs(key))
        key = jax.random.key(0)
        self._bottom = nnx.graphdef(nnx.eval_shape(self._make_bottom, key))
        self._tower = nnx.graphdef(nnx.eval_shape(self._make_tower, key))

    def init(self, key: jax.Array) -> Parameters:
        """Fresh parameters."""
        bottom_key, tower_key = jax.random.split(key)
        heads = jax.vmap(lambda key: nnx.state(self._make_tower(key)))(
            jax.random.split(tower_key, self.num_tasks)
        )
        heads = jax.tree.map_with_path(
            lambda path, leaf: self._item_bias if "item_bias" in str(path) else leaf, heads
        )
        return Parameters(nnx.state(self._make_bottom(bottom_key)), heads)

    def encode(self, shared: nnx.State, batch: Batch) -> jax.Array:
        """The shared representation `[N, width]` of a training batch."""
        return nnx.merge(self._bottom, shared)(batch.users, batch.items, batch.key)

    def losses(self, heads: nnx.State, copies: tuple[jax.Array, ...], batch: Batch) -> jax.Array:
        """The binary cross-entropy of every task `[T]`; each tower reads its own copy."""

        def one(head: nnx.State, copy: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
            logits = nnx.merge(self._tower, head)(copy, batch.items)
            each = optax.sigmoid_binary_cross_entropy(logits, labels)
            return jnp.sum(each * mask) / jnp.maximum(jnp.sum(mask), 1)

        return jax.vmap(one)(heads, jnp.stack(copies), batch.labels, batch.mask)

    def decode(self, heads: nnx.State, representation: jax.Array, batch: Batch) -> jax.Array:
        """The losses `[T]` with one representation for all towers."""
        return self.losses(heads, (representation,) * self.num_tasks, batch)

    def scores(self, params: Parameters, users: jax.Array, items: jax.Array) -> jax.Array:
        """The logits of the target task for pairs of users and items."""
        representation = nnx.merge(self._bottom, params.shared)(users, items)
        target = jax.tree.map(lambda leaf: leaf[0], params.heads)
        return nnx.merge(self._tower, target)(representation, items)


@dataclass(frozen=True)
class Step:
    """`init(params) -> state`; `update(params, state, batch) -> (params, state, losses, weights)`."""

    init: Callable[[Parameters], Any]
    update: Callable[[Parameters, Any, Batch], tuple[Parameters, Any, jax.Array, jax.Array]]


def known_methods() -> tuple[str, ...]:
    """What `--method` accepts: single, sum, and the methods of the library."""
    return (SINGLE, SUM, *(name for name in mtl.METHODS if name not in WITHOUT_USE))


def make_step(
    name: str,
    network: Network,
    scaler: optax.GradientTransformation,
    descent: optax.GradientTransformation,
) -> Step:
    """The step of a method by name, in the placement that its paper gives it.

    The optimizer is `scaler` (Adam) followed by `descent` (decay and learning rate).
    """
    num_tasks = network.num_tasks
    optimizer = optax.chain(scaler, descent)
    if name == SINGLE:
        target_only = mtl.fixed_weights(num_tasks, [1.0] + [0.0] * (num_tasks - 1))
        return on_losses(target_only, network, optimizer)
    if name == SUM:
        return on_losses(mtl.sum_tasks(num_tasks), network, optimizer)
    if name not in known_methods():
        raise UserError(f"unknown method {name!r}; choose from {', '.join(known_methods())}")
    arguments = ARGUMENTS[name](num_tasks, scaler) if name in ARGUMENTS else {}
    method = mtl.METHODS[name].factory(num_tasks, **arguments)
    if name in IN_PLACE_OF_ADAM:
        return on_parameters(optax.chain(method, descent), network, optimizer)
    if name in ON_REPRESENTATION:
        return on_representation(method, network, optimizer)
    if method.needs <= {"losses"}:
        return on_losses(method, network, optimizer)
    return on_parameters(optax.chain(method, optimizer), network, optimizer)


def on_losses(
    method: mtl.Method, network: Network, optimizer: optax.GradientTransformation
) -> Step:
    """One backward pass of the weighted sum of losses; the whole network is weighted."""

    def init(params: Parameters) -> Any:
        return method.init(params), optimizer.init(params)

    def update(params: Parameters, state: Any, batch: Batch) -> Any:
        method_state, opt_state = state

        def loss_fn(params: Parameters) -> Any:
            losses = network.decode(params.heads, network.encode(params.shared, batch), batch)
            total, new_state = mtl.weigh_losses(losses, method_state, method)
            return total, (losses, new_state)

        grads, (losses, method_state) = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, (method_state, opt_state), losses, mtl.head_weights(method_state)

    return Step(init, update)


def on_representation(
    method: mtl.Method, network: Network, optimizer: optax.GradientTransformation
) -> Step:
    """One backward pass; the method combines the tasks' gradients of the representation."""

    def loss_fn(params: Parameters, fork: Any, batch: Batch) -> jax.Array:
        copies = fork(network.encode(params.shared, batch))
        return network.losses(params.heads, copies, batch)

    value_and_grad = mtl.fork_value_and_grad(loss_fn, method)

    def init(params: Parameters) -> Any:
        # The weights depend on the batch's gradients alone, so the state has no axis of the batch.
        representation = jax.ShapeDtypeStruct((1, network.width), jnp.float32)
        return method.init(representation), optimizer.init(params)

    def update(params: Parameters, state: Any, batch: Batch) -> Any:
        method_state, opt_state = state
        losses, (grads, method_state) = value_and_grad(params, method_state, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, (method_state, opt_state), losses, mtl.head_weights(method_state)

    return Step(init, update)


def on_parameters(shared_optimizer: Any, network: Network, optimizer: Any) -> Step:
    """One backward pass per task; a method in `shared_optimizer` combines the gradients of the bottom."""
    value_and_grad = mtl.split_value_and_grad(network.encode, network.decode)

    def init(params: Parameters) -> Any:
        return shared_optimizer.init(params.shared), optimizer.init(params.heads)

    def update(params: Parameters, state: Any, batch: Batch) -> Any:
        shared_state, head_state = state
        losses, grads = value_and_grad(params.shared, params.heads, batch)
        shared_updates, shared_state = shared_optimizer.update(
            grads[0], shared_state, params.shared, losses=losses
        )
        head_updates, head_state = optimizer.update(grads[1], head_state, params.heads)
        params = optax.apply_updates(params, Parameters(shared_updates, head_updates))
        return params, (shared_state, head_state), losses, mtl.head_weights(shared_state)

    return Step(init, update)
