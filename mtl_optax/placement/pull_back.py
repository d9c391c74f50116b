"""The gradients of T losses from one forward pass, one backward pass a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

Mode = Literal["auto", "vmap", "unroll", "map"]


class Pullback(NamedTuple):
    """What takes cotangents of the losses to those of the primals.

    Attributes:
      whole: of a vector `[T]`.
      of_task: of one loss alone, by its static index.
    """

    whole: Callable[[jax.Array], Any]
    of_task: Callable[[int], Any]


def vjp_of_losses(losses_of: Callable[..., Any], *primals: Any) -> tuple[jax.Array, Pullback, Any]:
    """`jax.vjp` of a function that returns `(losses [T], aux)`.

    Where the losses stand in a `jnp.stack`, each is pulled back from in front of it. A unit cotangent of
    the stack would send zeros through the heads of all other tasks: T times the work, and NaN wherever
    one of these is not finite.

    Args:
      losses_of: `(*primals) -> (losses [T], aux)`.
      *primals: what the losses are differentiated by.

    Returns:
      The losses `[T]`, their `Pullback`, and `aux`.

    Example:

      >>> import jax.numpy as jnp
      >>> _, pullback, _ = vjp_of_losses(lambda x: (jnp.stack([x, 3 * x]), None), jnp.array(2.0))
      >>> float(pullback.of_task(1)[0]), float(pullback.whole(jnp.ones(2))[0])
      (3.0, 4.0)
    """
    leaves = jax.tree.leaves(primals)
    # Only floats have tangents of their own type, which `linear_transpose` asks for.
    if not all(jnp.issubdtype(jnp.result_type(x), jnp.floating) for x in leaves):
        losses, pullback, aux = jax.vjp(losses_of, *primals, has_aux=True)
        return losses, _by_units(pullback, losses), aux
    losses, tangents, aux = jax.linearize(losses_of, *primals, has_aux=True)
    whole = _by_units(lambda c: jax.linear_transpose(tangents, *primals)(c), losses)
    program = jax.make_jaxpr(tangents)(*primals)
    rows = _rows_of_stack(program.jaxpr)
    if rows is None:
        return losses, whole, aux

    varying = _varying(program.jaxpr)

    def of_task(t: int) -> Any:
        if id(rows[t]) not in varying:
            return jax.tree.map(jnp.zeros_like, primals)
        # The heads of the other tasks are left out here: XLA would drop them, but only once traced.
        alone = program.jaxpr.replace(outvars=[rows[t]], eqns=_leading_to(program.jaxpr, rows[t]))
        one = core.ClosedJaxpr(alone, program.consts)
        call = core.jaxpr_as_fun(one)
        pull = jax.linear_transpose(lambda *p: call(*jax.tree.leaves(p))[0], *primals)
        return pull(jnp.ones_like(losses[t]).reshape(rows[t].aval.shape))

    return losses, whole._replace(of_task=of_task), aux


def pull_each(
    pullback: Pullback, losses: jax.Array, mode: Mode, then: Callable[[Any], Any] = lambda g: g
) -> Any:
    """The gradients of each loss, taken further by `then`, stacked along a new leading axis.

    Args:
      pullback: what `vjp_of_losses` returned.
      losses: the losses `[T]`.
      mode: "vmap" takes all at once, "unroll" one after the other in one program, "map" in a loop with
        the memory of one; "auto" is "vmap" off the CPU, and on it "unroll" up to 64 tasks, then "map".
      then: applied to the gradients of each loss before they are stacked.

    Returns:
      What `then` returns, with leaves `[T, ...]`.

    Example:

      >>> import jax.numpy as jnp
      >>> x = jnp.array(2.0)
      >>> losses, pullback, _ = vjp_of_losses(lambda x: (jnp.stack([x, 3 * x]), None), x)
      >>> pull_each(pullback, losses, "auto")[0].tolist()
      [1.0, 3.0]
    """
    if mode == "auto":
        on_cpu = jax.default_backend() == "cpu"
        mode = "vmap" if not on_cpu else "unroll" if losses.shape[0] <= 64 else "map"
    if mode == "vmap":
        return jax.vmap(lambda unit: then(pullback.whole(unit)))(_units(losses))
    if mode == "map":
        return jax.lax.map(lambda unit: then(pullback.whole(unit)), _units(losses))
    each = [then(pullback.of_task(t)) for t in range(losses.shape[0])]
    return jax.tree.map(lambda *rows: jnp.stack(rows), *each)


def _by_units(pullback: Callable[[jax.Array], Any], losses: jax.Array) -> Pullback:
    return Pullback(pullback, lambda t: pullback(_units(losses)[t]))


def _units(losses: jax.Array) -> jax.Array:
    # With the losses' type inside `shard_map`, where what differs between devices says so.
    return jnp.eye(losses.shape[0], dtype=losses.dtype) + jnp.zeros_like(losses)[None]


def _rows_of_stack(program: Any) -> list[Any] | None:
    """The variables that the one result of a program stacks, where that is how it is made."""
    (result,) = program.outvars
    last = next((eqn for eqn in program.eqns if result in eqn.outvars), None)
    if last is None:
        return None
    whole = last.primitive.name == "stack" and last.params["axis"] == 0
    joined = last.primitive.name == "concatenate" and all(
        row.aval.shape == (1,) for row in last.invars
    )
    return list(last.invars) if whole or joined else None


def _leading_to(program: Any, result: Any) -> list[Any]:
    """The operations of a program that one of its results needs."""
    wanted, needed = {id(result)}, []
    for eqn in reversed(program.eqns):
        if any(id(variable) in wanted for variable in eqn.outvars):
            needed.append(eqn)
            wanted |= {id(variable) for variable in eqn.invars}
    return needed[::-1]


def _varying(program: Any) -> set[int]:
    """The variables of a program that its arguments reach: the others have no gradient."""
    reached = {id(variable) for variable in program.invars}
    for eqn in program.eqns:
        if any(id(variable) in reached for variable in eqn.invars):
            reached |= {id(variable) for variable in eqn.outvars}
    return reached
