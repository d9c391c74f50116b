"""Methods on the shared representation: one backward pass for all tasks (MultiBalance's design).

Forward, `fork` hands out T copies of the representation. Backward, it receives one cotangent per task,
lets the method combine them, and passes the combination down. The method's new state leaves the
backward pass as the *cotangent of the old state*, so there is no side effect, and everything that JAX
does to a gradient (jit, scan, remat, vmap, sharding) it does to this one.

A cotangent must have the dtype of its primal and integers have none, so the state travels as a
*carrier*: see `carrier.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.custom_derivatives import SymbolicZero

from mtl_optax.from_rule import BalanceState
from mtl_optax.placement.carrier import encode_state, fork_state
from mtl_optax.placement.parameters import check_losses
from mtl_optax.task_tree import TaskRows

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # where older releases of jax have it
    from jax.core import get_opaque_trace_state  # type: ignore[attr-defined]


class ForkToken(NamedTuple):
    """What ties a fork to the `join` of its losses: rows of losses, present tasks, and a mark."""

    slots: jax.Array


def fork(
    representation: Any,
    carrier: Any,
    method: optax.GradientTransformation,
    *,
    num_tasks: int | None = None,
) -> tuple[tuple[Any, ...], ForkToken]:
    """Hands out T copies of a representation whose cotangents the method combines.

    Let `h` be the representation and `c_t` the gradient of loss t with respect to copy t. Backward, the
    shared bottom receives `method.update([c_1, ..., c_T])` in place of `sum_t c_t`. Each head is
    differentiated on its own copy, with weight 1; the bottom is differentiated once.

    Differentiate with respect to the carrier too: its "gradient" is the carrier of the next step. Use
    each carrier in one fork only, and give a `vmap` over models one carrier a model: cotangents of a
    carrier that is used twice would be added.

    Args:
      representation: `h`, any pytree of arrays.
      carrier: from `fork_init(method, h)`, or the last step's.
      method: any optax transformation that removes the task axis. It sees `h` as `params`, and the
        extra arguments `losses` and `active`: wrap one that refuses what it does not know in
        `drop_extra_args(method, "losses", "active")`.
      num_tasks: T; read from the method's state where that is a method of this library.

    Returns:
      `(copies, token)`: a tuple of T representations, one for each head, and the token for `join`.

    Raises:
      TypeError: where the representation holds integers; give those to the heads directly.
      ValueError: where the carrier does not fit, T cannot be told, the losses were not joined though
        the method needs them, or the method does not remove the task axis.

    Cost: the backward pass of the plain sum of losses, plus what the method does with T arrays of the
    representation's size; no copy of them is made.

    Example:

      >>> import jax, jax.numpy as jnp, mtl_optax as mtl
      >>> method = mtl.mgda(2)
      >>> def loss_fn(w, carrier, x):
      ...     copies, token = mtl.fork(x @ w, carrier, method)
      ...     return mtl.join(jnp.stack([copies[0].sum(), (copies[1] ** 2).sum()]), token)
      >>> w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
      >>> carrier = mtl.fork_init(method, x @ w)
      >>> grad, carrier = jax.grad(loss_fn, argnums=(0, 1))(w, carrier, x)
      >>> grad.shape, carrier.weights.round(3).tolist()
      ((3, 2), [1.0, 0.0])

    References:
      He et al., MultiBalance, 2024, algorithm 3.
    """
    num_tasks = _tasks_of(carrier) if num_tasks is None else num_tasks
    if num_tasks is None:
        raise ValueError(
            "fork: cannot tell the number of tasks from this method's state; pass num_tasks=."
        )
    _check_representation(representation)
    fork_state(method, carrier, representation)  # raises here, where the caller can see it
    copies, slots = _fork(method, num_tasks, representation, carrier)
    return copies, ForkToken(slots)


def join(losses: jax.Array, token: ForkToken, *, active: jax.Array | None = None) -> jax.Array:
    """Sums the losses of a fork's heads and hands the losses to the method.

    Args:
      losses: `[T]`, in the order of the copies. For a method with `axis_name`, equal on all devices:
        `lax.pmean` local losses first.
      token: from the same `fork`.
      active: bool `[T]`, tasks present in this batch; all by default. The loss of an absent task does
        not enter the sum.

    Returns:
      The sum, a scalar to differentiate. Scale it (loss scaling) as you like: the method sees the
      losses unscaled and the cotangents scaled.

    Raises:
      ValueError: where `losses` is not one array `[T]`.

    Example:

      >>> import jax, jax.numpy as jnp, mtl_optax as mtl
      >>> method = mtl.sum_tasks(2)
      >>> def loss_fn(h, carrier):
      ...     copies, token = mtl.fork(h, carrier, method)
      ...     return mtl.join(jnp.stack(copies) ** 2, token)
      >>> h = jnp.asarray(3.0)
      >>> float(jax.grad(loss_fn)(h, mtl.fork_init(method, h)))
      12.0

    References:
      He et al., MultiBalance, 2024, algorithm 3.
    """
    losses = check_losses(losses)
    slots = token.slots
    if losses.shape[0] != slots.shape[1]:
        raise ValueError(
            f"join: the fork has {slots.shape[1]} tasks, found {losses.shape[0]} losses."
        )
    present = jnp.ones(losses.shape, bool) if active is None else jnp.asarray(active)
    if present.shape != losses.shape:
        raise ValueError(
            f"join: active must have shape {losses.shape}, one entry per task; found {present.shape}."
        )
    return _join(losses, slots, present.astype(slots.dtype))


def fork_value_and_grad(
    loss_fn: Callable[..., Any],
    method: optax.GradientTransformation,
    has_aux: bool = False,
    *,
    num_tasks: int | None = None,
) -> Callable[..., Any]:
    """Differentiates a multi-task model with a method on its shared representation.

    Carrier, token and join stay inside: `loss_fn(params, fork, *args)` calls `copies =
    fork(representation)` exactly once and returns the losses `[T]` of the heads on their copies.

    Args:
      loss_fn: `loss_fn(params, fork, *args) -> losses [T]`, or `(losses, aux)` with `has_aux`.
      method: any optax transformation that removes the task axis.
      has_aux: whether `loss_fn` returns auxiliary data as well.
      num_tasks: as in `fork`.

    Returns:
      A function `fn(params, carrier, *args, active=None)` that returns `(losses, (grads, carrier))`,
      with `(losses, aux)` for `losses` where `has_aux`. `carrier` starts from
      `fork_init(method, representation)`. One backward pass.

    Raises:
      ValueError: where `loss_fn` does not call `fork` exactly once, or inside jit, checkpoint or the like,
        and as `fork`.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> method = mtl.multibalance(2)
      >>> def loss_fn(w, fork, x):
      ...     click, buy = fork(x @ w)
      ...     return jnp.stack([(click ** 2).mean(), (buy - 1).mean()])
      >>> w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
      >>> carrier = mtl.fork_init(method, x @ w)
      >>> losses, (grads, carrier) = mtl.fork_value_and_grad(loss_fn, method)(w, carrier, x)
      >>> losses.tolist(), grads.shape
      ([9.0, 2.0], (3, 2))

    References:
      He et al., MultiBalance, 2024, algorithm 3.
    """

    def value_and_grad(params: Any, carrier: Any, *args: Any, active: Any = None) -> Any:
        def total(params: Any, carrier: Any) -> Any:
            tokens: list[ForkToken] = []
            here = get_opaque_trace_state()

            def fork_once(representation: Any) -> tuple[Any, ...]:
                # From an inner trace the token would leak out, and the losses never reach the method.
                if get_opaque_trace_state() != here:
                    raise ValueError(
                        "fork_value_and_grad: loss_fn calls fork inside jit, checkpoint, scan, vmap or the "
                        "like, where the losses cannot be joined to it. Move the call out of there, or use "
                        "mtl_optax.fork and mtl_optax.join themselves, with the token among the results "
                        "of the inner function."
                    )
                copies, token = fork(representation, carrier, method, num_tasks=num_tasks)
                tokens.append(token)
                return copies

            result = loss_fn(params, fork_once, *args)
            losses, aux = result if has_aux else (result, None)
            if len(tokens) != 1:
                raise ValueError(
                    f"fork_value_and_grad: loss_fn must call fork exactly once, it called it "
                    f"{len(tokens)} times. For several representations pass fork a tuple of them."
                )
            return join(losses, tokens[0], active=active), (losses, aux)

        grad = jax.grad(total, argnums=(0, 1), has_aux=True)
        grads, (losses, aux) = grad(params, carrier)
        return ((losses, aux) if has_aux else losses), grads

    return value_and_grad


# --- the operator ------------------------------------------------------------------------------------


def _fork_forward(
    method: Any, num_tasks: int, representation: Any, carrier: Any
) -> tuple[tuple[Any, ...], jax.Array]:
    leaves = jax.tree.leaves(representation)
    wide = any(leaf.dtype == jnp.float64 for leaf in leaves)
    slots = jnp.zeros((3, num_tasks), jnp.float64 if wide else jnp.float32)
    return (representation,) * num_tasks, slots


_fork = jax.custom_vjp(_fork_forward, nondiff_argnums=(0, 1))


def _fork_fwd(method: Any, num_tasks: int, representation: Any, carrier: Any) -> Any:
    value = lambda tree: jax.tree.map(lambda primal: primal.value, tree)  # noqa: E731
    representation, carrier = value(representation), value(carrier)
    outputs = _fork_forward(method, num_tasks, representation, carrier)
    return outputs, (representation, carrier)


def _fork_bwd(method: Any, num_tasks: int, residuals: Any, cotangents: Any) -> Any:
    representation, carrier = residuals
    copies, slots = cotangents
    is_zero = lambda leaf: isinstance(leaf, SymbolicZero)  # noqa: E731
    copies = tuple(
        jax.tree.map(
            lambda c, r: jnp.zeros_like(r) if is_zero(c) else c,
            copy,
            representation,
            is_leaf=is_zero,
        )
        for copy in copies
    )
    # A rule reads the T cotangents where they are; any other transformation gets its task axis.
    in_place = hasattr(method.update, "rule")
    updates = jax.tree.map(lambda *rows: TaskRows(rows) if in_place else jnp.stack(rows), *copies)
    state = fork_state(method, carrier, representation)
    told: dict[str, Any] = {}
    if not is_zero(slots):
        losses, present, joined = slots
        # A join that was traced away leaves zeros here: then nothing is known of the losses.
        # `joined` counts the joins; of losses joined twice the cotangents have been added.
        told["losses"] = jnp.where(joined > 0, losses / jnp.maximum(joined, 1), jnp.nan)
        told["active"] = (present > 0) | (joined <= 0)
    try:
        update, state = optax.with_extra_args_support(method).update(
            updates, state, representation, **told
        )
    except ValueError as error:
        if not told:
            error.add_note(
                "fork: the method was not told the losses: differentiate join(losses, token)."
            )
        raise
    got, want = (jax.tree.map(jnp.shape, tree) for tree in (update, representation))
    if got != want:
        raise ValueError(
            f"fork: the method must return updates shaped like the representation, {want}; found "
            f"{got}. End the chain with one that removes the task axis, such as sum_tasks."
        )
    update = jax.tree.map(lambda u, r: u.astype(r.dtype), update, representation)
    return update, encode_state(state)


_fork.defvjp(_fork_fwd, _fork_bwd, symbolic_zeros=True)


@jax.custom_vjp
def _join(losses: jax.Array, slots: jax.Array, present: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(present > 0, losses, 0))


def _join_fwd(losses: jax.Array, slots: jax.Array, present: jax.Array) -> Any:
    return _join(losses, slots, present), (losses, slots, present)


def _join_bwd(residuals: Any, cotangent: jax.Array) -> Any:
    losses, slots, present = residuals
    told = jnp.stack([losses.astype(slots.dtype), present, jnp.ones_like(present)])
    d_losses = jnp.where(present > 0, cotangent, 0).astype(losses.dtype)
    return d_losses, told, jnp.zeros_like(present)


_join.defvjp(_join_fwd, _join_bwd)


def _check_representation(representation: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(representation):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                "fork: the representation must be real floating point; leaf "
                f"{jax.tree_util.keystr(path)} is {jnp.result_type(leaf)}. Give integers to the heads "
                "directly."
            )


def _tasks_of(carrier: Any) -> int | None:
    is_state = lambda node: isinstance(node, BalanceState)  # noqa: E731
    for node in jax.tree.leaves(carrier, is_leaf=is_state):
        if is_state(node):
            return node.skipped.shape[0]
    return None
