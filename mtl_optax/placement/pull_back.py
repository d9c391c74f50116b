"""The gradients of T losses, by one forward pass and one backward pass per loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from mtl_optax.placement.loss_vector import Split

Mode = Literal["auto", "vmap", "unroll", "map"]
Aux = TypeVar("Aux")
Rows = TypeVar("Rows")
Tree = TypeVar("Tree")

# Up to this number of tasks, each loss that is kept apart has a program of its own. For an MLP with 64
# heads on a CPU, "unroll" takes 7 s of tracing, 3 s of compilation and 1 s per step; "map" differentiates
# 64 x 64 heads, in 11 s per step.
_UNROLLED = 64
# Up to this number of tasks, "auto" means "unroll" for an array [T], each of whose T separately compiled
# backward passes may go through all heads. With 8 tasks, "unroll" compiles in 6 s and "map" in 1.5 s, and a
# step takes 0.7 of the time of "map". With 16 tasks these numbers are 21 s, 3 s and 0.9.
_UNROLLED_OF_ARRAY = 8


class Pullback(NamedTuple):
    """The functions from cotangents of the losses to cotangents of the primals.

    Attributes:
      whole: maps a cotangent `[T]` of all losses; the result has one tree per primal.
      of_task: takes the static index of one loss, and maps the cotangent 1 of this loss.
      apart: whether `of_task` excludes the operations that only the other losses need.
    """

    whole: Callable[[jax.Array], tuple[optax.Updates, ...]]
    of_task: Callable[[int], tuple[optax.Updates, ...]]
    apart: bool

    def keeps_apart(self, num_tasks: int) -> bool:
        """Whether each of T losses has a program of its own, so that one cannot make others non-finite.

        Args:
          num_tasks: T.

        Returns:
          False for an array of losses, and for many losses, whose programs would take long to compile.

        Example:

          >>> _, pullback, _ = vjp_of_losses(lambda x: ((x, 3 * x), None), 2.0)
          >>> pullback.keeps_apart(2), pullback.keeps_apart(1000)
          (True, False)
        """
        return self.apart and num_tasks <= _UNROLLED


def vjp_of_losses(
    losses_of: Callable[..., Split[Aux]], *primals: object
) -> tuple[jax.Array, Pullback, Aux]:
    """Computes `jax.vjp` of a function that returns `(losses, aux)`, also per loss.

    If the losses are a tuple, each loss is transposed separately, without the operations of the other
    losses. So is each loss of an array that a final `jnp.stack` made. Any other array `[T]` has only one
    transpose: the cotangents of the other losses are 0, but they go through all heads. This takes T times
    the work, and makes the result NaN if the derivative of another loss is not finite.

    Args:
      losses_of: `(*primals) -> (losses, aux)`, the losses a tuple of T scalars or an array `[T]`.
      *primals: the arguments with respect to which the losses are differentiated. As in `jax.vjp`, leaves
        that are not floating point have cotangents of dtype `float0`.

    Returns:
      The losses `[T]`, their `Pullback`, and `aux`.

    Example:

      >>> import jax.numpy as jnp
      >>> _, pullback, _ = vjp_of_losses(lambda x: ((x, 3 * x), None), jnp.array(2.0))
      >>> float(pullback.of_task(1)[0]), float(pullback.whole(jnp.ones(2))[0])
      (3.0, 4.0)
    """
    # `linear_transpose` requires tangents of the primal's dtype, which only floating-point leaves have.
    floating = floating_leaves(primals)
    floats = [jnp.asarray(x) for x in chosen_leaves(primals, floating)]
    no_cotangents = jax.tree.map(lambda x: np.zeros(jnp.shape(x), jax.dtypes.float0), primals)

    def of_floats(floats: list[jax.Array]) -> Split[Aux]:
        return losses_of(*replace_leaves(primals, floating, floats))

    losses, tangents, aux = jax.linearize(of_floats, floats, has_aux=True)
    apart = isinstance(losses, tuple)
    stack = jnp.stack if apart else lambda losses: losses
    each = tangents if apart else _before_stack(tangents, floats)

    def transposed(
        linear: Callable[[list[jax.Array]], jax.Array], cotangent: jax.Array
    ) -> tuple[optax.Updates, ...]:
        (cotangents,) = jax.linear_transpose(linear, floats)(cotangent)
        return replace_leaves(no_cotangents, floating, cotangents)

    def whole(cotangents: jax.Array) -> tuple[optax.Updates, ...]:
        return transposed(lambda floats: stack(tangents(floats)), cotangents)

    def of_task(t: int) -> tuple[optax.Updates, ...]:
        scalars = each
        if scalars is None:
            return whole(_units(losses)[t])
        return transposed(lambda floats: scalars(floats)[t], jnp.ones_like(losses[t]))

    return stack(losses), Pullback(whole, of_task, apart), aux


def pull_each(
    pullback: Pullback,
    losses: jax.Array,
    mode: Mode,
    then: Callable[[tuple[optax.Updates, ...]], Rows],
) -> Rows:
    """Computes the gradients of each loss, applies `then`, and stacks the results along a new axis 0.

    Args:
      pullback: what `vjp_of_losses` returned.
      losses: the losses `[T]`.
      mode: "vmap" batches the backward passes, "unroll" runs them one by one without a loop, and "map"
        runs them in a loop with the memory of one pass. "auto" is "unroll" up to a limit on T, and "map"
        above it. Only "unroll" differentiates each loss separately.
      then: applied to the gradients of each loss, one tree per primal, before they are stacked.

    Returns:
      The stacked results of `then`, with leaves `[T, ...]`.

    Example:

      >>> import jax.numpy as jnp
      >>> x = jnp.array(2.0)
      >>> losses, pullback, _ = vjp_of_losses(lambda x: ((x, 3 * x), None), x)
      >>> pull_each(pullback, losses, "auto", lambda grads: grads[0]).tolist()
      [1.0, 3.0]
    """
    num_tasks = losses.shape[0]
    if mode == "auto":
        few = num_tasks <= (_UNROLLED if pullback.apart else _UNROLLED_OF_ARRAY)
        mode = "unroll" if few else "map"
    if mode == "vmap":
        return jax.vmap(lambda unit: then(pullback.whole(unit)))(_units(losses))
    if mode == "map":
        return lax.map(lambda unit: then(pullback.whole(unit)), _units(losses))
    each = [then(pullback.of_task(t)) for t in range(num_tasks)]
    return jax.tree.map(lambda *rows: jnp.stack(rows), *each)


def pull_in_turn(
    pullback: Pullback,
    losses: jax.Array,
    then: Callable[[int | jax.Array, tuple[optax.Updates, ...]], Rows],
) -> Rows:
    """As `pull_each`, but in every case memory holds the gradient of only one loss at a time.

    If the losses are kept apart, each has a branch of its own inside a loop: XLA would start the backward
    passes of an unrolled program together, and hold the gradients of all losses.

    Args:
      pullback: what `vjp_of_losses` returned.
      losses: the losses `[T]`.
      then: `(t, gradients of loss t) -> rows`.

    Returns:
      What `then` returns, with leaves `[T, ...]`.

    Example:

      >>> import jax.numpy as jnp
      >>> losses, pullback, _ = vjp_of_losses(lambda x: ((x, 3 * x), None), 2.0)
      >>> pull_in_turn(pullback, losses, lambda t, grads: t * grads[0]).tolist()
      [0.0, 3.0]
    """
    num_tasks = losses.shape[0]
    units = _units(losses)
    branches = [lambda t=t: then(t, pullback.of_task(t)) for t in range(num_tasks)]

    def row(t: jax.Array) -> Rows:
        if pullback.keeps_apart(num_tasks):
            return lax.switch(t, branches)
        return then(t, pullback.whole(units[t]))

    return lax.map(row, jnp.arange(num_tasks))


def chosen_leaves(tree: object, chosen: Sequence[bool]) -> list[jax.Array]:
    """Returns the chosen leaves of a tree.

    Args:
      tree: any pytree.
      chosen: for every leaf whether it is chosen.

    Returns:
      A list of leaves, in the order of the tree.

    Example:

      >>> chosen_leaves({"a": 1, "b": 2}, [False, True])
      [2]
    """
    return [leaf for leaf, here in zip(jax.tree.leaves(tree), chosen, strict=True) if here]


def floating_leaves(tree: object) -> list[bool]:
    """Returns for every leaf of a tree whether it is floating point, and so has gradients.

    Args:
      tree: any pytree of arrays.

    Returns:
      One bool per leaf.

    Example:

      >>> floating_leaves({"ids": jnp.arange(3), "w": jnp.ones(3)})
      [False, True]
    """
    return [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in jax.tree.leaves(tree)]


def replace_leaves(tree: Tree, chosen: Sequence[bool], new: Iterable[object]) -> Tree:
    """Replaces the chosen leaves of a tree by those of `new`, in order.

    Args:
      tree: any pytree.
      chosen: one bool per leaf, whether to replace it.
      new: one value per chosen leaf.

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


def _before_stack(
    tangents: Callable[[list[jax.Array]], jax.Array], floats: list[jax.Array]
) -> Callable[[list[jax.Array]], list[jax.Array]] | None:
    """Returns the tangents of T scalars if a final `jnp.stack` of them makes `tangents`, else None."""
    program = jax.make_jaxpr(tangents)(floats)
    last = next((eqn for eqn in program.eqns if eqn.outvars == program.jaxpr.outvars), None)
    # Older releases of jax concatenate arrays [1].
    if last is None or last.primitive.name not in ("stack", "concatenate"):
        return None
    if any(scalar.aval.size != 1 for scalar in last.invars):
        return None
    jaxpr = program.jaxpr.replace(outvars=list(last.invars))
    scalars = jaxpr_as_fun(ClosedJaxpr(jaxpr, program.consts))
    return lambda floats: [jnp.reshape(scalar, ()) for scalar in scalars(*floats)]


def _units(losses: jax.Array) -> jax.Array:
    # Inside `shard_map`, the added zeros give the result the mapped axes in the type of the losses.
    return jnp.eye(losses.shape[0], dtype=losses.dtype) + jnp.zeros_like(losses)[None]
