"""Methods on the shared representation: one backward pass for all tasks (the design of MultiBalance).

Each head reads `stop_gradient(h) + z_t` with `z_t = 0`, so the gradient with respect to `z_t` is the
gradient of task t with respect to the representation h. The loss function is linearised once, and the
result is transposed twice. The first transpose gives these T gradients, which the method combines. The
second transpose gives the gradient with respect to all parameters: its cotangents are ones for the losses
and the combined gradient for h. Losses that do not depend on the fork, such as a penalty on activations
of the shared layers, therefore share the same backward pass. XLA merges the heads, which both transposes
contain, and removes the unused part of the first. The state of the method is an ordinary optax state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Concatenate, TypeVar

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.leaves import TaskRows
from mtl_optax.core.method import Method
from mtl_optax.core.state import states_in
from mtl_optax.core.types import Active
from mtl_optax.core.validation import Tasks, read_active, read_tasks, where
from mtl_optax.placement.loss_vector import (
    check_differentiable,
    check_tasks,
    loss_vector,
    split_result,
)
from mtl_optax.placement.pull_back import chosen_leaves, floating_leaves, replace_leaves

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # in older releases of jax
    from jax.core import get_opaque_trace_state  # type: ignore[attr-defined]

Params = TypeVar("Params")
Result = TypeVar("Result")

_INNER_TRACE = (
    "fork_value_and_grad: loss_fn calls fork inside jit, checkpoint, scan, vmap or the like. Move the call "
    "out of there, or use mtl_optax.fork and mtl_optax.join, which may stand anywhere."
)


def fork_value_and_grad(
    loss_fn: Callable[Concatenate[Params, Any, ...], Result],
    method: optax.GradientTransformation,
    has_aux: bool = False,
    *,
    tasks: int | Collection[str] | None = None,
) -> Callable[..., tuple[Result, tuple[Params, Any]]]:
    """Differentiates a multi-task model with a method on its shared representation.

    Let h be the representation and c_t the gradient of loss t with respect to task t's copy of h. The
    shared layers receive `method.update([c_1, ..., c_T])` instead of `sum_t c_t` as the cotangent of h.
    Each head is differentiated on its own copy with weight 1. The shared layers are differentiated once.
    Losses that depend on the shared layers without the fork (a penalty, the loss of a router) have weight
    1 too, in the same backward pass.

    Notes:
      `loss_fn` is traced twice, so it must be pure, as for `jax.grad`. Call the function inside
      `jax.jit`, where the compiler removes duplicated operations.

      The rows of a representation `[batch, width]` belong to different examples in every step. Methods
      with an average of gradients (`moco`, `db_mtl`, `excess_mtl`) would average unrelated examples.

      If each task has separate inputs, fork the representation of the concatenated batch, and let each
      head read its rows. A tuple of one representation per task needs a method with `blocks="all"`: with
      `blocks="leaf"` (the default of `metabalance`) every block has the gradient of only one task, and
      nothing is balanced.

      Integers and booleans have no gradients. In `params` their gradient is 0, in their own dtype; in the
      representation, such as the edges of a graph, all heads read them as they are, and the method sees
      zeros.

      A task whose c_t is not finite is excluded from the update and counted in `skipped`; it does not
      affect the gradients of the shared layers and the other heads. The gradient of its own head is still
      NaN or infinite: use `optax.zero_nans()` before the optimizer, or `optax.apply_if_finite` around the
      optimizer of the heads.

    Args:
      loss_fn: `loss_fn(params, fork, *args, **kwargs)` calls `copies = fork(representation)` exactly once
        and returns the losses of the heads on their copies: `[T]` or a dictionary of scalars, or
        `(losses, aux)` with `has_aux`. `copies` is a tuple of T representations, or a dictionary by
        task name for a method with named tasks.
      method: any optax transformation that removes the task axis. It sees the representation as
        `params`, and the extra arguments `losses` and `active`.
      has_aux: whether `loss_fn` returns auxiliary data as well.
      tasks: T or the task names. If `method` is not a `Method` but a chain or a wrapper, pass the names
        here to get `copies` as a dictionary.

    Returns:
      A function `fn(params, state, *args, active=None, extra_args=None, **kwargs)` that returns
      `(losses, (grads, state))`, or `((losses, aux), (grads, state))` with `has_aux`. The initial `state`
      is `method.init(representation)`. `extra_args` is a dictionary of further arguments for
      `method.update` (`noise`, `order`, ...). All other arguments are passed to `loss_fn`. A task that is
      not in `active` (bool `[T]` or a dictionary) has the cotangent 0: guard divisions in its loss whose
      derivative is not finite, such as `/ mask.sum()`. Cost: the backward pass of the plain sum of
      losses, plus the operations of the method on T arrays of the size of the representation, which are
      not stacked.

    Raises:
      ValueError: if `loss_fn` does not call `fork` exactly once, or calls it inside another transformed
        function; if the method does not remove the task axis; or if the number of tasks is unknown.
      TypeError: if a leaf of the representation or the parameters is complex, or no array of numbers.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> method = mtl.multibalance(("click", "buy"))
      >>> def loss_fn(w, fork, x):
      ...     h = fork(x @ w)
      ...     return {"click": (h["click"] ** 2).mean(), "buy": (h["buy"] - 1).mean()}
      >>> w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
      >>> state = method.init(x @ w)
      >>> losses, (grads, state) = mtl.fork_value_and_grad(loss_fn, method)(w, state, x)
      >>> float(losses["click"]), grads.shape
      (9.0, (3, 2))

    References:
      He et al., MultiBalance, 2024, algorithm 3, https://arxiv.org/abs/2411.11871
    """

    def value_and_grad(
        params: Params,
        state: optax.OptState,
        *args: object,
        active: Active | None = None,
        extra_args: Mapping[str, object] | None = None,
        **kwargs: object,
    ) -> tuple[Result, tuple[Params, optax.OptState]]:
        axis = tasks_of("fork_value_and_grad", method, state, tasks)
        check_differentiable("fork_value_and_grad", params, integers=True)
        present = read_active("fork_value_and_grad", active, axis)
        trained = floating_leaves(params)
        floats = [jnp.asarray(leaf) for leaf in chosen_leaves(params, trained)]

        def run(
            floats: list[jax.Array], zeros: Sequence[Sequence[jax.Array]] | None
        ) -> tuple[tuple[jax.Array, list[jax.Array]], tuple[Result, optax.Params]]:
            """Returns the losses and the floating leaves of h, and as auxiliary data the result and h."""
            fork = _Fork(axis, zeros)
            result = loss_fn(replace_leaves(params, trained, floats), fork, *args, **kwargs)
            losses, result = split_result(result, has_aux)
            h = fork.representation
            return (loss_vector(losses), chosen_leaves(h, floating_leaves(h))), (result, h)

        like = jax.eval_shape(lambda floats: run(floats, None)[1][1], floats)
        check_representation(like)
        # `zeros_like` keeps the sharding of the representation.
        rows = [jnp.zeros_like(leaf) for leaf in chosen_leaves(like, floating_leaves(like))]
        zeros = [rows] * axis.number
        (losses, _), tangents, (result, h) = jax.linearize(run, floats, zeros, has_aux=True)
        check_tasks("fork_value_and_grad", result, has_aux, axis)

        ones = jnp.where(present, jnp.ones_like(losses), 0)
        pull_losses = jax.linear_transpose(lambda p, z: tangents(p, z)[0], floats, zeros)
        _, cotangents = pull_losses(ones)
        update, state = combine_cotangents(
            method, cotangents, state, h, losses=losses, active=present, **(extra_args or {})
        )
        pull_all = jax.linear_transpose(tangents, floats, zeros)
        grads, _ = pull_all((ones, chosen_leaves(update, floating_leaves(h))))
        none = jax.tree.map(jnp.zeros_like, params)
        return result, (replace_leaves(none, trained, grads), state)

    return value_and_grad


class _Fork:
    """The argument `fork` of one call of a loss function, which remembers the representation."""

    def __init__(self, axis: Tasks, zeros: Sequence[Sequence[jax.Array]] | None) -> None:
        """Adds to copy t the leaves `zeros[t]`, or nothing if it is None."""
        self._axis, self._zeros = axis, zeros
        self._trace = get_opaque_trace_state()
        self._given: list[optax.Params] = []

    def __call__(
        self, representation: optax.Params
    ) -> tuple[optax.Params, ...] | dict[str, optax.Params]:
        # The representation would leak from an inner trace, and its gradient would be 0.
        if get_opaque_trace_state() != self._trace:
            raise ValueError(_INNER_TRACE)
        self._given.append(representation)
        held, floating = jax.lax.stop_gradient(representation), floating_leaves(representation)
        leaves = chosen_leaves(held, floating)
        copies = tuple(
            replace_leaves(held, floating, map(jnp.add, leaves, row)) for row in self._zeros or ()
        )
        copies = copies or (held,) * self._axis.number
        names = self._axis.names
        return copies if names is None else dict(zip(names, copies, strict=True))

    @property
    def representation(self) -> optax.Params:
        """What the loss function has given, in its only call."""
        if len(self._given) != 1:
            raise ValueError(
                "fork_value_and_grad: loss_fn must call fork exactly once, it called it "
                f"{len(self._given)} times. If each task has inputs of its own, fork one representation of "
                'the concatenated batch; a tuple of representations needs a method with blocks="all".'
            )
        return self._given[0]


def combine_cotangents(
    method: optax.GradientTransformation,
    cotangents: Sequence[Sequence[jax.Array]],
    state: optax.OptState,
    representation: optax.Params,
    **extra_args: object,
) -> tuple[optax.Updates, optax.OptState]:
    """Combines the T cotangents of a representation by a method.

    Args:
      method: any optax transformation that removes the task axis.
      cotangents: for each task, the cotangents of the floating leaves of the representation.
      state: the method's state.
      representation: the shared representation, which the method gets as `params`.
      **extra_args: the extra arguments of the method: `losses`, `active`, and others.

    Returns:
      `(update, state)`: the update has the dtypes of the representation, and is 0 for integers.

    Raises:
      ValueError: if the method does not remove the task axis.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> method, h = mtl.sum_tasks(2), jnp.ones(3)
      >>> combine_cotangents(method, ([h], [2 * h]), method.init(h), h)[0].tolist()
      [3.0, 3.0, 3.0]
    """
    # A method reads the T cotangents without a copy; any other transformation gets them stacked.
    gather = TaskRows if isinstance(method, Method) else jnp.stack
    floating = floating_leaves(representation)
    none = jax.tree.map(lambda h: jnp.zeros(jnp.shape(h), jnp.float32), representation)
    trees = [replace_leaves(none, floating, row) for row in cotangents]
    updates = jax.tree.map(lambda *rows: gather(rows), *trees)
    update, state = optax.with_extra_args_support(method).update(
        updates, state, representation, **extra_args
    )
    got, want = (jax.tree.map(jnp.shape, tree) for tree in (update, representation))
    if got != want:
        raise ValueError(
            f"fork: the method must return updates shaped like the representation, {want}; found "
            f"{got}. End the chain with one that removes the task axis, such as sum_tasks."
        )
    return jax.tree.map(lambda u, r: u.astype(r.dtype), update, representation), state


def tasks_of(
    name: str, method: object, state: optax.OptState, tasks: int | Collection[str] | None
) -> Tasks:
    """Finds the tasks: from `tasks`, from the method, or from the state of a method inside it.

    Args:
      name: the name of the caller, for messages.
      method: any optax transformation.
      state: the state of `method`, or its carrier.
      tasks: T, the task names, or None.

    Returns:
      The tasks.

    Raises:
      ValueError: if the number of tasks is unknown.

    Example:

      >>> import mtl_optax as mtl
      >>> tasks_of("fork", mtl.mgda(3), None, None).number
      3
    """
    if tasks is not None:
        return read_tasks(name, tasks)
    if isinstance(method, Method):
        return method.tasks
    for node in states_in(state):
        return Tasks(node.weights.shape[-1], None)
    raise ValueError(
        f"{name}: cannot tell the number of tasks, because this transformation holds no method of "
        "mtl_optax. Give one, such as mtl_optax.multibalance(tasks), or pass tasks= for one of "
        "your own."
    )


def check_representation(representation: optax.Params) -> None:
    """Raises if a leaf of the representation is not a real number, or a representation has no gradients.

    Args:
      representation: any pytree of arrays or shapes.

    Returns:
      None.

    Raises:
      TypeError: if a leaf is complex or a key, or no leaf is floating point; the message contains its path.

    Example:

      >>> import jax.numpy as jnp
      >>> check_representation({"user": jnp.ones((8, 4))})
    """
    leaves = jax.tree_util.tree_leaves_with_path(representation)
    dtypes = [(path, jnp.result_type(leaf)) for path, leaf in leaves]
    for path, dtype in dtypes:
        if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
            raise TypeError(
                f"fork: the representation must be real numbers; leaf {where(path)} is {dtype}. Keep real "
                "and imaginary part as two leaves, and give random keys to the heads directly."
            )
    if not any(jnp.issubdtype(dtype, jnp.floating) for _, dtype in dtypes):
        found = ", ".join(f"{dtype} at {where(path)}" for path, dtype in dtypes[:3]) or "no arrays"
        raise TypeError(
            f"fork: no leaf of the representation is floating point, so it has no gradients; found {found}."
        )
