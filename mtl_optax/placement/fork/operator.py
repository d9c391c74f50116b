"""The fork as an operator, for code that calls `jax.grad` itself.

It computes the same as `fork_value_and_grad`, and is meant for the training loop of a framework, or for a
fork inside `scan` or `remat`. In the forward pass, `fork` returns T copies of the representation. In the
backward pass, it receives one cotangent per task, combines them by the method, and returns the
combination. The new state of the method is returned as the *cotangent of the old state*. The fork has no
side effect, so it works under every transformation of JAX (jit, scan, remat, vmap, sharding).

A cotangent must have the dtype of its primal, and integers have no cotangents. The state is therefore
encoded as a *carrier*, see `carrier.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.custom_derivatives import SymbolicZero

from mtl_optax.core.types import Active, Losses
from mtl_optax.core.validation import Tasks, task_vector
from mtl_optax.placement.fork.carrier import encode_state, fork_state
from mtl_optax.placement.loss_vector import loss_vector
from mtl_optax.placement.pull_back import chosen_leaves, floating_leaves, replace_leaves
from mtl_optax.placement.representation import check_representation, combine_cotangents, tasks_of

Representation = TypeVar("Representation", bound=optax.Params)


class ForkToken(NamedTuple):
    """Connects a fork to the `join` of its losses: rows of losses, present tasks, and join counts."""

    slots: jax.Array


def fork(
    method: optax.GradientTransformation,
    carrier: optax.OptState,
    representation: Representation,
    *,
    tasks: int | Collection[str] | None = None,
) -> tuple[tuple[Representation, ...], ForkToken]:
    """Returns T copies of a representation, whose cotangents the method combines.

    Let h be the representation and c_t the gradient of loss t with respect to copy t. In the backward
    pass, the shared layers receive `method.update([c_1, ..., c_T])` instead of `sum_t c_t` as the
    cotangent of h. Each head is differentiated on its own copy with weight 1, and the shared layers once.
    Prefer `fork_value_and_grad`, which needs no carrier and no `join`, unless the fork is inside another
    transformed function.

    Notes:
      Differentiate with respect to the carrier too: its "gradient" is the carrier of the next step. Use
      each carrier in only one fork, and one carrier per model in a `vmap` over models, because JAX adds
      the cotangents of an array that is used twice.

    Args:
      method: any optax transformation that removes the task axis. It gets h as `params`, and the extra
        arguments `losses` and `active`. Wrap a transformation that rejects unknown arguments in
        `drop_extra_args(method, "losses", "active")`.
      carrier: from `fork_init(method, h)`, or from the last step.
      representation: h, any pytree of arrays. Integers are copied, and the method sees zeros for them.
      tasks: T; needed only for a transformation that contains no `Method`.

    Returns:
      `(copies, token)`: a tuple of T representations in the order of the tasks, one for each head, and
      the token for `join`. Cost: the backward pass of the plain sum of losses, plus the operations of the
      method on T arrays of the size of the representation, which are not stacked.

    Raises:
      TypeError: if a leaf of the representation is complex or a key, or no leaf is floating point.
      ValueError: if the carrier does not match, the number of tasks is unknown, the method needs losses
        and they were not joined, or the method does not remove the task axis.

    Example:

      >>> import jax, jax.numpy as jnp, mtl_optax as mtl
      >>> method = mtl.mgda(2)
      >>> def loss_fn(w, carrier, x):
      ...     copies, token = mtl.fork(method, carrier, x @ w)
      ...     return mtl.join(jnp.stack([copies[0].sum(), (copies[1] ** 2).sum()]), token)
      >>> w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
      >>> carrier = mtl.fork_init(method, x @ w)
      >>> grad, carrier = jax.grad(loss_fn, argnums=(0, 1))(w, carrier, x)
      >>> grad.shape, carrier.weights.round(3).tolist()
      ((3, 2), [[1.0, 0.0]])

    References:
      He et al., MultiBalance, 2024, algorithm 3, https://arxiv.org/abs/2411.11871
    """
    axis = tasks_of("fork", method, carrier, tasks)
    check_representation(representation)
    fork_state(method, carrier, representation)  # raises here, in the caller's stack trace
    # Passed inside a function, because JAX rejects a method with a traced option as an argument.
    copies, slots = _fork(lambda: method, axis.number, representation, carrier)
    return copies, ForkToken(slots)


def join(losses: Losses, token: ForkToken, *, active: Active | None = None) -> jax.Array:
    """Sums the losses of a fork's heads, and passes the losses to the method.

    Args:
      losses: `[T]` in the order of the copies, or a dictionary of scalars. For a method with `axis_name`
        they must be equal on all devices: apply `lax.pmean` to local losses first.
      token: from the same `fork`.
      active: which tasks are in this batch, bool `[T]` or a dictionary; all by default. The loss of an
        absent task does not enter the sum.

    Returns:
      The sum, a scalar to differentiate. It may be multiplied by a factor (loss scaling), which scales
      the cotangents that the method gets, but not the losses.

    Raises:
      ValueError: if `losses` does not have one entry per copy.

    Example:

      >>> import jax, jax.numpy as jnp, mtl_optax as mtl
      >>> method = mtl.sum_tasks(2)
      >>> def loss_fn(h, carrier):
      ...     copies, token = mtl.fork(method, carrier, h)
      ...     return mtl.join(jnp.stack(copies) ** 2, token)
      >>> h = jnp.asarray(3.0)
      >>> float(jax.grad(loss_fn)(h, mtl.fork_init(method, h)))
      12.0

    References:
      He et al., MultiBalance, 2024, algorithm 3, https://arxiv.org/abs/2411.11871
    """
    losses, slots = loss_vector(losses), token.slots
    num_tasks = slots.shape[1]
    if losses.shape[0] != num_tasks:
        raise ValueError(f"join: the fork has {num_tasks} tasks, found {losses.shape[0]} losses.")
    present = jnp.ones(losses.shape, bool) if active is None else active
    present = task_vector("join", "active", present, Tasks(num_tasks, None))
    return _join(losses, slots, present.astype(slots.dtype))


# --- the operator ------------------------------------------------------------------------------------


def _fork_forward(
    held: object, num_tasks: int, representation: optax.Params, carrier: optax.OptState
) -> tuple[tuple[optax.Params, ...], jax.Array]:
    leaves = jax.tree.leaves(representation)
    wide = any(leaf.dtype == jnp.float64 for leaf in leaves)
    slots = jnp.zeros((3, num_tasks), jnp.float64 if wide else jnp.float32)
    return (representation,) * num_tasks, slots


_fork = jax.custom_vjp(_fork_forward, nondiff_argnums=(0, 1))


def _fork_fwd(
    held: object, num_tasks: int, representation: optax.Params, carrier: optax.OptState
) -> tuple[tuple[tuple[optax.Params, ...], jax.Array], tuple[optax.Params, optax.OptState]]:
    value = lambda tree: jax.tree.map(lambda primal: primal.value, tree)  # noqa: E731
    representation, carrier = value(representation), value(carrier)
    outputs = _fork_forward(held, num_tasks, representation, carrier)
    return outputs, (representation, carrier)


def _fork_bwd(
    held: Callable[[], optax.GradientTransformation],
    num_tasks: int,
    residuals: tuple[optax.Params, optax.OptState],
    cotangents: tuple[tuple[optax.Updates, ...], jax.Array | SymbolicZero],
) -> tuple[optax.Updates, optax.OptState]:
    method = held()
    representation, carrier = residuals
    copies, slots = cotangents
    floating = floating_leaves(representation)
    rows = [
        [
            jnp.zeros_like(primal) if isinstance(leaf, SymbolicZero) else leaf
            for leaf, primal in zip(
                chosen_leaves(copy, floating), chosen_leaves(representation, floating), strict=True
            )
        ]
        for copy in copies
    ]
    state = fork_state(method, carrier, representation)
    given: dict[str, jax.Array] = {}
    if not isinstance(slots, SymbolicZero):
        losses, present, joined = slots
        # `joined` counts the joins. It is 0 if the join was not differentiated, and the losses are
        # unknown. The cotangents of losses that are joined twice have been added, so the sum is divided.
        given["losses"] = jnp.where(joined > 0, losses / jnp.maximum(joined, 1), jnp.nan)
        given["active"] = (present > 0) | (joined <= 0)
    try:
        update, state = combine_cotangents(method, rows, state, representation, **given)
    except ValueError as error:
        if not given:
            error.add_note(
                "fork: the method was not given the losses: differentiate join(losses, token)."
            )
        raise
    # Integers have cotangents of dtype `float0`.
    none = jax.tree.map(lambda h: np.zeros(h.shape, jax.dtypes.float0), representation)
    update = replace_leaves(none, floating, chosen_leaves(update, floating))
    return update, encode_state(state)


_fork.defvjp(_fork_fwd, _fork_bwd, symbolic_zeros=True)


@jax.custom_vjp
def _join(losses: jax.Array, slots: jax.Array, present: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(present > 0, losses, 0))


def _join_fwd(
    losses: jax.Array, slots: jax.Array, present: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _join(losses, slots, present), (losses, slots, present)


def _join_bwd(
    residuals: tuple[jax.Array, jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    losses, slots, present = residuals
    to_method = jnp.stack([losses.astype(slots.dtype), present, jnp.ones_like(present)])
    d_losses = jnp.where(present > 0, cotangent, 0).astype(losses.dtype)
    return d_losses, to_method, jnp.zeros_like(present)


_join.defvjp(_join_fwd, _join_bwd)
