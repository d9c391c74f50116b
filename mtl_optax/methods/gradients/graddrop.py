"""GradDrop: keeps the gradients of one randomly drawn sign at every coordinate."""

from __future__ import annotations

from collections.abc import Collection

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.extra_args import step_key
from mtl_optax.core.factory import Seed, factory
from mtl_optax.core.task_tree import along_tasks, statistics_dtype, sum_over
from mtl_optax.core.types import AxisName, Number
from mtl_optax.core.validation import read_tasks, task_numbers
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
    axis = read_tasks("graddrop", tasks)
    leak = task_numbers("graddrop", "leak", leak, axis, 0, 1, or_one=True)

    def apply(
        inputs: StepInputs, state: optax.OptState
    ) -> tuple[optax.Updates, jax.Array, optax.OptState]:
        leaves, treedef = jax.tree.flatten(inputs.updates)
        noise = _noise_leaves(inputs.extra["noise"], leaves, treedef, step_key(seed, inputs))
        leaks = jnp.asarray(leak, inputs.dtype)
        masked = [_mask(leaf, uniform, leaks) for leaf, uniform in zip(leaves, noise, strict=True)]
        update = [jnp.sum(leaf, axis=0) for leaf in masked]
        kept, whole = (sum_over(_l1_norms(part, inputs), axis_name) for part in (masked, leaves))
        return jax.tree.unflatten(treedef, update), safe_divide(kept, whole, 1), state

    rule = UpdateRule(frozenset({"gradients"}), apply, extra=("noise",))
    return from_rule("graddrop", axis, rule, axis_name=axis_name)


def _mask(leaf: jax.Array, uniform: jax.Array, leaks: jax.Array) -> jax.Array:
    """Returns the masked gradients `[T, *shape]` of one leaf, at least in float32."""
    wide = leaf.astype(statistics_dtype(leaf))
    total, mass = jnp.sum(wide, axis=0), jnp.sum(jnp.abs(wide), axis=0)
    positive = 0.5 * (1 + safe_divide(total, mass))  # the probability of the positive sign
    uniform = jnp.broadcast_to(uniform.astype(positive.dtype), positive.shape)
    kept = ((wide > 0) & (positive > uniform)[None]) | ((wide < 0) & (positive < uniform)[None])
    share = along_tasks(leaks.astype(wide.dtype), wide.ndim)
    return jnp.where(kept, wide, share * wide)


def _l1_norms(leaves: list[jax.Array], inputs: StepInputs) -> jax.Array:
    """Returns the L1 norm of each task, `[T]`."""
    total = jnp.zeros(inputs.active.shape, inputs.dtype)
    for leaf in leaves:
        axes = tuple(range(1, leaf.ndim))
        total = total + jnp.sum(jnp.abs(leaf.astype(inputs.dtype)), axis=axes)
    return total


def _noise_leaves(
    noise: optax.Params | None,
    leaves: list[jax.Array],
    treedef: object,
    key: jax.Array,
) -> list[jax.Array]:
    """Returns one array of uniform numbers per leaf: `noise`, or random numbers in at least float32."""
    if noise is None:
        keys = [jax.random.fold_in(key, index) for index in range(len(leaves))]
        return [
            jax.random.uniform(key, leaf.shape[1:], statistics_dtype(leaf))
            for key, leaf in zip(keys, leaves, strict=True)
        ]
    if jax.tree.structure(noise) != treedef:
        raise ValueError(
            f"graddrop: noise must have the structure of the parameters, {treedef}; found "
            f"{jax.tree.structure(noise)}."
        )
    given = [jnp.asarray(uniform) for uniform in jax.tree.leaves(noise)]
    for uniform, leaf in zip(given, leaves, strict=True):
        shape = leaf.shape[1:]
        if uniform.ndim != len(shape) or any(
            found not in (1, size) for found, size in zip(uniform.shape, shape, strict=True)
        ):
            raise ValueError(
                f"graddrop: a leaf of noise has shape {uniform.shape}; it must have the shape of the "
                f"parameter, {shape}, or size 1 along some axes."
            )
    return given
