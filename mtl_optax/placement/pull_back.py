"""The gradients of T losses from one forward pass, one backward pass a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_optax.core.arguments import check_choice

Mode = Literal["auto", "vmap", "unroll", "map"]

# Up to so many tasks "auto" is "unroll". For an MLP with 64 heads on a CPU that takes 7 s of tracing, 3 s
# of compilation and 1 s a step; "map" goes through 64 x 64 heads, 11 s a step.
_UNROLLED = 64
# Every backward pass of an array [T] may go through all heads, each compiled apart: with 8 tasks in 6 s
# against 1.5 s of "map" for 0.7 of the time of its step, with 16 in 21 s against 3 s for 0.9 of it.
_UNROLLED_OF_ARRAY = 8


class Pullback(NamedTuple):
    """What takes cotangents of the losses to those of the primals.

    Attributes:
      whole: of a vector `[T]`.
      of_task: of one loss alone, by its static index.
      apart: whether `of_task` leaves out what only the other losses need.
    """

    whole: Callable[[jax.Array], Any]
    of_task: Callable[[int], Any]
    apart: bool


def vjp_of_losses(losses_of: Callable[..., Any], *primals: Any) -> tuple[jax.Array, Pullback, Any]:
    """`jax.vjp` of a function that returns `(losses, aux)`.

    Losses that are returned as a tuple are transposed output by output, and what leads to the other outputs
    is not there. An array `[T]` has one transpose: its unit cotangents send zeros through the heads of all
    other tasks, T times the work, and NaN wherever the derivative of one of these is not finite.

    Args:
      losses_of: `(*primals) -> (losses, aux)`, the losses a tuple of T scalars or an array `[T]`.
      *primals: what the losses are differentiated by. Leaves that are not floating point have the
        cotangents of `jax.vjp`, of dtype `float0`.

    Returns:
      The losses `[T]`, their `Pullback`, and `aux`.

    Example:

      >>> import jax.numpy as jnp
      >>> _, pullback, _ = vjp_of_losses(lambda x: ((x, 3 * x), None), jnp.array(2.0))
      >>> float(pullback.of_task(1)[0]), float(pullback.whole(jnp.ones(2))[0])
      (3.0, 4.0)
    """
    leaves = jax.tree.leaves(primals)
    # Only floats have tangents of their own type, which `linear_transpose` asks for.
    floating = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves]
    floats = [jnp.asarray(x) for x, is_float in zip(leaves, floating, strict=True) if is_float]
    no_cotangents = jax.tree.map(lambda x: np.zeros(jnp.shape(x), jax.dtypes.float0), primals)

    def of_floats(floats: list[jax.Array]) -> Any:
        return losses_of(*replace_leaves(primals, floating, floats))

    losses, tangents, aux = jax.linearize(of_floats, floats, has_aux=True)
    apart = isinstance(losses, tuple)
    stack = jnp.stack if apart else lambda losses: losses

    def transposed(linear: Callable[..., Any], cotangent: jax.Array) -> Any:
        (cotangents,) = jax.linear_transpose(linear, floats)(cotangent)
        return replace_leaves(no_cotangents, floating, cotangents)

    def whole(cotangents: jax.Array) -> Any:
        return transposed(lambda floats: stack(tangents(floats)), cotangents)

    def of_task(t: int) -> Any:
        if not apart:
            return whole(_units(losses)[t])
        return transposed(lambda floats: tangents(floats)[t], jnp.ones_like(losses[t]))

    return stack(losses), Pullback(whole, of_task, apart), aux


def pull_each(
    pullback: Pullback, losses: jax.Array, mode: Mode, then: Callable[[Any], Any] = lambda g: g
) -> Any:
    """The gradients of each loss, taken further by `then`, stacked along a new leading axis.

    Args:
      pullback: what `vjp_of_losses` returned.
      losses: the losses `[T]`.
      mode: "vmap" takes all at once, "unroll" one after the other in one program, "map" in a loop with
        the memory of one; "auto" is "unroll" up to a number of tasks, then "map". Only "unroll" keeps the
        tasks apart.
      then: applied to the gradients of each loss before they are stacked.

    Returns:
      What `then` returns, with leaves `[T, ...]`.

    Example:

      >>> import jax.numpy as jnp
      >>> x = jnp.array(2.0)
      >>> losses, pullback, _ = vjp_of_losses(lambda x: ((x, 3 * x), None), x)
      >>> pull_each(pullback, losses, "auto")[0].tolist()
      [1.0, 3.0]
    """
    num_tasks = losses.shape[0]
    if mode == "auto":
        most = _UNROLLED if pullback.apart else _UNROLLED_OF_ARRAY
        mode = "unroll" if num_tasks <= most else "map"
    if mode == "vmap":
        return jax.vmap(lambda unit: then(pullback.whole(unit)))(_units(losses))
    if mode == "map":
        return jax.lax.map(lambda unit: then(pullback.whole(unit)), _units(losses))
    each = [then(pullback.of_task(t)) for t in range(num_tasks)]
    return jax.tree.map(lambda *rows: jnp.stack(rows), *each)


def check_mode(name: str, mode: Any) -> None:
    """Raises where `mode` is none of the ways to take T backward passes.

    Args:
      name: whose error it is.
      mode: what was given.

    Raises:
      ValueError: with the modes that there are.

    Example:

      >>> check_mode("per_task_value_and_grad", "unroll")
    """
    check_choice(name, "mode", mode, get_args(Mode))


def replace_leaves(tree: optax.Params, chosen: Sequence[bool], new: Iterable[Any]) -> Any:
    """`tree` with its chosen leaves replaced by those of `new`, in order.

    Args:
      tree: any pytree.
      chosen: for every leaf whether it is replaced.
      new: as many leaves as are chosen.

    Returns:
      A tree of the same structure.

    Example:

      >>> replace_leaves({"a": 1, "b": 2}, [False, True], [3])
      {'a': 1, 'b': 3}
    """
    leaves, treedef = jax.tree.flatten(tree)
    following = iter(new)
    return treedef.unflatten(
        [next(following) if here else leaf for leaf, here in zip(leaves, chosen, strict=True)]
    )


def _units(losses: jax.Array) -> jax.Array:
    # With the losses' type inside `shard_map`, where what differs between devices says so.
    return jnp.eye(losses.shape[0], dtype=losses.dtype) + jnp.zeros_like(losses)[None]
