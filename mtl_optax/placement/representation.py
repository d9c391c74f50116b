"""Methods on the shared representation: one backward pass for all tasks (MultiBalance's design).

Each head reads `stop_gradient(h) + z_t` with `z_t = 0`: the gradient with respect to `z_t` is that of
task t with respect to the representation h. One linearisation of the loss function is transposed twice:
for these T gradients, which the method combines; then for all parameters, with ones for the losses and
the combination for h. So losses beside the fork, such as a penalty on the bottom's activations, share the
one backward pass through the bottom. XLA merges what both transpositions have in common, the heads, and
drops what only the first would pass on to the bottom. The method's state is an ordinary optax state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.checks import read_active
from mtl_optax.core.leaves import TaskRows
from mtl_optax.core.method import Method
from mtl_optax.core.state import states_in
from mtl_optax.core.tasks import Tasks, read_tasks, task_vector
from mtl_optax.core.types import Active
from mtl_optax.placement.loss_vector import check_differentiable, loss_vector, split_result

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # where older releases of jax have it
    from jax.core import get_opaque_trace_state  # type: ignore[attr-defined]

_INNER_TRACE = (
    "fork_value_and_grad: loss_fn calls fork inside jit, checkpoint, scan, vmap or the like. Move the call "
    "out of there, or use mtl_optax.fork and mtl_optax.join, which may stand anywhere."
)


def fork_value_and_grad(
    loss_fn: Callable[..., Any],
    method: optax.GradientTransformation,
    has_aux: bool = False,
    *,
    tasks: int | Collection[str] | None = None,
) -> Callable[..., Any]:
    """Differentiates a multi-task model with a method on its shared representation.

    Let h be the representation and c_t the gradient of loss t with respect to task t's copy of h. The
    shared bottom receives `method.update([c_1, ..., c_T])` in place of `sum_t c_t`. Each head is
    differentiated on its own copy with weight 1, and the bottom once. What a loss takes from the bottom
    past the fork (a penalty, a router's loss) is differentiated with weight 1 too, in the same pass.

    Notes:
      `loss_fn` is traced twice, so it must be pure, as for `jax.grad`. Call the function inside `jax.jit`:
      the compiler removes what would be computed twice.

      On a representation `[batch, width]` every step has other examples: methods that keep an average
      of gradients (`moco`, `db_mtl`, `excess_mtl`) would average unrelated examples there.

      Where each task has inputs of its own, fork the representation of the concatenated batch, and let each
      head read its rows. A tuple of one representation per task needs a method with `blocks="all"`:
      leaf by leaf (the default of `metabalance`) only one task has a gradient, and nothing is balanced.

      A task whose c_t is not finite is left out of the update and counted in `skipped`; the bottom and the
      other heads are differentiated as without it. The gradient of its own head stays NaN or inf: put
      `optax.zero_nans()` before the optimizer, or `optax.apply_if_finite` around that of the heads.

    Args:
      loss_fn: `loss_fn(params, fork, *args, **kwargs)` calls `copies = fork(representation)` exactly once
        and returns the losses of the heads on their copies: `[T]` or a dictionary of scalars, or
        `(losses, aux)` with `has_aux`. `copies` is a tuple of T representations, or a dictionary by
        task name for a method with named tasks.
      method: any optax transformation that removes the task axis. It sees the representation as
        `params`, and the extra arguments `losses` and `active`.
      has_aux: whether `loss_fn` returns auxiliary data as well.
      tasks: T or the task names; give the names if `method` is not itself a `Method` (a chain, a
        wrapper), else `copies` is a tuple.

    Returns:
      A function `fn(params, state, *args, active=None, extra_args=None, **kwargs)` that returns
      `(losses, (grads, state))`, with `(losses, aux)` for `losses` where `has_aux`. `state` starts from
      `method.init(representation)`. `extra_args` is a dictionary of further arguments for `method.update`
      (`noise`, `order`, ...); all others go to `loss_fn`. The loss of a task that is not in `active`
      (bool `[T]` or a dictionary) is pulled back with the cotangent 0: guard divisions such as
      `/ mask.sum()` in it, whose derivative is not finite.
      Cost: the backward pass of the plain sum of losses, plus what the method does with T arrays of the
      representation's size; no stack of them is made.

    Raises:
      ValueError: if `loss_fn` does not call `fork` exactly once, or calls it inside another transformed
        function; if the method does not remove the task axis; if nothing says how many tasks there
        are.
      TypeError: for a representation or parameters of integers.

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
        params: optax.Params,
        state: optax.OptState,
        *args: Any,
        active: Active | None = None,
        extra_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        axis = tasks_of("fork_value_and_grad", method, state, tasks)
        check_differentiable("fork_value_and_grad", params)
        present = read_active("fork_value_and_grad", active, axis)

        def run(params: optax.Params, zeros: Any) -> Any:
            """The losses and the representation, with `zeros` (None at first) added to the copies."""
            seen: list[Any] = []
            here = get_opaque_trace_state()

            def fork(representation: optax.Params) -> Any:
                # From an inner trace the representation would leak out, and its gradient would be 0.
                if get_opaque_trace_state() != here:
                    raise ValueError(_INNER_TRACE)
                seen.append(representation)
                rows = (None,) * axis.number if zeros is None else zeros
                copies = tuple(_copy(representation, row) for row in rows)
                return copies if axis.names is None else dict(zip(axis.names, copies, strict=True))

            losses, result = split_result(loss_fn(params, fork, *args, **kwargs), has_aux)
            if len(seen) != 1:
                raise ValueError(
                    "fork_value_and_grad: loss_fn must call fork exactly once, it called it "
                    f"{len(seen)} times. Where each task has inputs of its own, fork one representation of "
                    'the concatenated batch; a tuple of representations needs a method with blocks="all".'
                )
            return (loss_vector(losses), seen[0]), result

        _, like = jax.eval_shape(lambda params: run(params, None)[0], params)
        check_representation(like)
        # Of the representation's own type: split over a mesh as it is.
        zeros = jax.tree.map(jnp.zeros_like, (like,) * axis.number)
        (losses, representation), tangents, result = jax.linearize(run, params, zeros, has_aux=True)
        given = result[0] if has_aux else result
        task_vector("fork_value_and_grad", "the losses of loss_fn", given, axis)

        ones = jnp.where(present, jnp.ones_like(losses), 0)
        pull_losses = jax.linear_transpose(lambda p, z: tangents(p, z)[0], params, zeros)
        _, cotangents = pull_losses(ones)
        update, state = combine_cotangents(
            method,
            cotangents,
            state,
            representation,
            losses=losses,
            active=present,
            **(extra_args or {}),
        )
        grads, _ = jax.linear_transpose(tangents, params, zeros)((ones, update))
        return result, (grads, state)

    return value_and_grad


def combine_cotangents(
    method: optax.GradientTransformation,
    cotangents: tuple[Any, ...],
    state: optax.OptState,
    representation: optax.Params,
    **extra_args: Any,
) -> tuple[optax.Updates, optax.OptState]:
    """What a method makes of the T cotangents of a representation, and its new state.

    Args:
      method: any optax transformation that removes the task axis.
      cotangents: T trees shaped like the representation.
      state: the method's state.
      representation: the shared representation, which the method sees as `params`.
      **extra_args: for the method: `losses`, `active`, and its own.

    Returns:
      `(update, state)`, the update in the dtypes of the representation.

    Raises:
      ValueError: if the method does not remove the task axis.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> method, h = mtl.sum_tasks(2), jnp.ones(3)
      >>> combine_cotangents(method, (h, 2 * h), method.init(h), h)[0].tolist()
      [3.0, 3.0, 3.0]
    """
    # A method reads the T cotangents where they are; any other transformation gets a stack of them.
    gather = TaskRows if isinstance(method, Method) else jnp.stack
    updates = jax.tree.map(lambda *rows: gather(rows), *cotangents)
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
    name: str, method: Any, state: optax.OptState, tasks: int | Collection[str] | None
) -> Tasks:
    """The tasks of a method: as given, as it says, or as many as the state of one inside it has.

    Args:
      name: the caller's name, for messages.
      method: any optax transformation.
      state: its state, or a carrier of it.
      tasks: T, the task names, or None.

    Returns:
      The tasks.

    Raises:
      ValueError: if nothing says how many there are.

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
    """Raises where a representation holds anything but real floating-point numbers.

    Args:
      representation: any pytree of arrays or shapes.

    Raises:
      TypeError: with the leaf's path.

    Example:

      >>> import jax.numpy as jnp
      >>> check_representation({"user": jnp.ones((8, 4))})
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(representation):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                "fork: the representation must be real floating point; leaf "
                f"{jax.tree_util.keystr(path)} is {jnp.result_type(leaf)}. Give integers to the heads "
                "directly."
            )


def _copy(representation: optax.Params, zeros: Any) -> Any:
    held = jax.lax.stop_gradient(representation)
    return held if zeros is None else jax.tree.map(jnp.add, held, zeros)
