"""GradDrop: keeps the gradients of one randomly drawn sign at every coordinate."""

from __future__ import annotations

import functools
from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.extra_args import step_key
from mtl_optax.core.factory import Seed, factory
from mtl_optax.core.task_tree import along_tasks, statistics_dtype, sum_over, without_task_axis
from mtl_optax.core.types import AxisName, Number
from mtl_optax.core.validation import task_numbers
from mtl_optax.rule import Method, StepInputs, UpdateRule, from_rule
from mtl_optax.solvers.arithmetic import safe_divide


@factory
def graddrop(
    tasks: int | Collection[str], *, leak: Number = 0.0, seed: Seed = 0, axis_name: AxisName = None
) -> Method:
    r"""Keeps the gradients of one randomly drawn sign at every coordinate.

    If tasks disagree on the sign of a coordinate, their gradients partly cancel, and training can stop at
    a joint saddle point. GradDrop draws the sign instead, with probabilities proportional to the summed
    magnitudes of either sign.

    At every coordinate, with :math:`U` uniform on [0, 1) and ``leak`` :math:`\ell_t`:

    .. math::
        P = \tfrac12 \Big(1 + \frac{\sum_t g_t}{\sum_t |g_t|}\Big), \qquad
        M_t = [g_t > 0][P > U] + [g_t < 0][P < U], \qquad
        update = \sum_t (\ell_t + (1 - \ell_t) M_t)\, g_t

    Scale: sum-like. Algorithm 1 of the paper, with the identity for its function f.

    Args:
      tasks: T, or the task names.
      leak: the share of a dropped gradient that is kept, in [0, 1]: a number, `[T]`, or a dictionary by
        task name.
      seed: seed of the random numbers, which also depend on the step and the leaf.
      axis_name: see `MethodOptions`.

    Returns:
      A `Method` whose rule has no state; `update` takes the extra argument `noise=`. `state.weights` are
      the share of each task's L1 norm in the update. Cost: one uniform number per element, and two passes
      over the gradients.

    Raises:
      ValueError: if `leak` is outside [0, 1] or does not have T entries, or `noise` has a wrong structure
        or shape.

    Notes:
      `noise=` replaces the random numbers: it is a tree of uniform numbers with the structure of the
      parameters, whose leaves may have size 1 along any axis.

      The paper applies the method to the representation (`fork`). Published implementations draw one mask
      per feature for the whole batch; here every element has a separate mask. One implementation averages
      over tasks. Another one inverts the leak (1 drops everything); here 1 keeps everything.

      With `axis_name` every device draws the same numbers for its part of a leaf.

      If all gradients are 0 at a coordinate, so is the update. Opposite gradients of equal size are kept
      with equal probability. With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.graddrop(2)
      >>> grads = jnp.array([[3., 1., 1.], [-1., 2., -1.]])
      >>> noise = jnp.array([0.5, 0.5, 0.9])
      >>> tx.update(grads, tx.init(jnp.zeros(3)), noise=noise)[0].tolist()
      [3.0, 3.0, -1.0]

    References:
      Chen, Ngiam, Huang, Luong, Kretzschmar, Chai and Anguelov, Just Pick a Sign: Optimizing Deep
      Multitask Models with Gradient Sign Dropout, 2020, https://arxiv.org/abs/2010.06808
    """
    leak = task_numbers("graddrop", "leak", leak, tasks, 0, 1, or_one=True)

    def apply(
        inputs: StepInputs, state: optax.OptState
    ) -> tuple[optax.Updates, jax.Array, optax.OptState]:
        shapes = without_task_axis(inputs.updates)
        noise = _noise(inputs.extra["noise"], shapes, step_key(seed, inputs))
        mask = functools.partial(_mask, jnp.asarray(leak, inputs.dtype))
        masked = jax.tree.map(mask, inputs.updates, noise)
        kept, whole = (
            sum_over(_l1_norms(part, inputs), axis_name) for part in (masked, inputs.updates)
        )
        update = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), masked)
        return update, safe_divide(kept, whole, 1), state

    rule = UpdateRule(frozenset({"gradients"}), apply, extra=("noise",))
    return from_rule("graddrop", tasks, rule, axis_name=axis_name)


def _mask(leaks: jax.Array, leaf: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns the masked gradients `[T, *shape]` of one leaf, at least in float32."""
    wide = leaf.astype(statistics_dtype(leaf))
    total, mass = jnp.sum(wide, axis=0), jnp.sum(jnp.abs(wide), axis=0)
    positive = 0.5 * (1 + safe_divide(total, mass))  # the probability of the positive sign
    uniform = jnp.broadcast_to(jnp.asarray(uniform, positive.dtype), positive.shape)
    kept = ((wide > 0) & (positive > uniform)[None]) | ((wide < 0) & (positive < uniform)[None])
    share = along_tasks(leaks.astype(wide.dtype), wide.ndim)
    return jnp.where(kept, wide, share * wide)


def _l1_norms(updates: optax.Updates, inputs: StepInputs) -> jax.Array:
    """Returns the L1 norm of each task, `[T]`."""
    total = jnp.zeros(inputs.active.shape, inputs.dtype)
    for leaf in jax.tree.leaves(updates):
        axes = tuple(range(1, leaf.ndim))
        total = total + jnp.sum(jnp.abs(leaf.astype(inputs.dtype)), axis=axes)
    return total


def _noise(given: optax.Params | None, shapes: optax.Params, key: jax.Array) -> optax.Params:
    """Returns uniform numbers like the parameters: `given`, or random numbers in at least float32."""
    leaves, structure = jax.tree.flatten(shapes)
    if given is None:
        draws = [
            jax.random.uniform(jax.random.fold_in(key, number), leaf.shape, statistics_dtype(leaf))
            for number, leaf in enumerate(leaves)
        ]
        return structure.unflatten(draws)
    if jax.tree.structure(given) != structure:
        raise ValueError(
            f"graddrop: noise must have the structure of the parameters, {structure}; found "
            f"{jax.tree.structure(given)}."
        )
    for found, leaf in zip(map(jnp.shape, jax.tree.leaves(given)), leaves, strict=True):
        fits = [one in (1, size) for one, size in zip(found, leaf.shape, strict=False)]
        if len(found) != leaf.ndim or not all(fits):
            raise ValueError(
                f"graddrop: a leaf of noise has shape {found}; it must have the shape of the parameter, "
                f"{leaf.shape}, or size 1 along some axes."
            )
    return given
