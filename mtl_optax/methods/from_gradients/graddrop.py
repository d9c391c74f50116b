"""GradDrop: at every coordinate, only gradients of one randomly picked sign survive."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_optax.arguments import check_num_tasks, check_range
from mtl_optax.from_gradients import TaskGradients, from_gradients
from mtl_optax.method import Method
from mtl_optax.task_tree import along_tasks, statistics_dtype


def graddrop(
    num_tasks: int, *, leak: Any = 0.0, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Lets one sign through at every coordinate, and drops the gradients of the other.

    Where tasks disagree on the sign of a coordinate, the sum is a compromise that suits nobody and can
    hold training at a joint saddle. GradDrop draws the sign instead, with the odds of the gradients'
    own masses, so that every step is consistent and every task gets its way in proportion.

    At every coordinate, with :math:`U` uniform on [0, 1) and ``leak`` :math:`\ell_t`:

    .. math::
        P = \tfrac12 \Big(1 + \frac{\sum_t g_t}{\sum_t |g_t|}\Big), \quad
        M_t = [g_t > 0][P > U] + [g_t < 0][P < U], \quad
        update = \sum_t (\ell_t + (1 - \ell_t) M_t)\, g_t.

    Sum-like: equal gradients pass untouched. Algorithm 1 of the paper with the identity for f. Meant for
    the representation (`fork`), where the published programs draw one mask a feature for the whole
    batch; here every element draws its own, wherever the method is put. Pass ``noise=``, a tree of
    uniforms shaped like the parameters, to fix the draw or to share it: each of its leaves may have size
    1 along any axis. One published program averages over the tasks, another inverts the leak (1 drops
    everything); here 1 keeps everything.

    Degenerate input: a coordinate where all gradients are 0 gives 0; opposite gradients of one size are
    a fair coin. T = 1: the gradient itself.

    Args:
      num_tasks: T, static.
      leak: share of a dropped gradient that passes anyway, in [0, 1]; a number or `[T]`.
      seed: of the random stream; draws depend on it, on the step and on the leaf.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`; extra argument `noise=` of `update`.
      The state's `weights` are the share of each task's L1 norm that went into the update. Cost: one
      uniform number an element, two passes over the gradients, no state.

    Raises:
      ValueError: for a leak outside [0, 1] or without T entries, or `noise` that does not fit.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.graddrop(2)
      >>> grads = jnp.array([[3., 1., 1.], [-1., 2., -1.]])
      >>> noise = jnp.array([0.5, 0.5, 0.9])
      >>> tx.update(grads, tx.init(jnp.zeros(3)), noise=noise)[0].tolist()
      [3.0, 3.0, -1.0]

    References:
      Chen et al., Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout, 2020.
    """
    num_tasks = check_num_tasks("graddrop", num_tasks)
    check_range("graddrop", leak=(leak, 0, 1))
    if np.shape(leak) not in ((), (num_tasks,)):
        raise ValueError(
            f"graddrop: leak must be a number or have shape ({num_tasks},); found {np.shape(leak)}."
        )

    def apply(view: TaskGradients, state: Any) -> tuple[Any, jax.Array, Any]:
        leaves, treedef = jax.tree.flatten(view.updates)
        key = jax.random.fold_in(jax.random.key(seed), view.step)
        noise = _noise_leaves(view.extra["noise"], leaves, treedef, key)
        leaks = jnp.broadcast_to(jnp.asarray(leak, view.dtype), (num_tasks,))
        passed = [
            _pick_sign(leaf, uniform, leaks) for leaf, uniform in zip(leaves, noise, strict=True)
        ]
        update = [jnp.sum(leaf, axis=0) for leaf in passed]
        whole, share = _absolute_sums(leaves, view), _absolute_sums(passed, view)
        weights = jnp.where(whole > 0, share / jnp.where(whole > 0, whole, 1), 1)
        return jax.tree.unflatten(treedef, update), weights, state

    return from_gradients("graddrop", num_tasks, lambda params, dtype: (), apply, extra=("noise",))


def _pick_sign(leaf: jax.Array, uniform: jax.Array, leaks: jax.Array) -> jax.Array:
    """The masked gradients `[T, *shape]` of one leaf, at least in float32."""
    wide = leaf.astype(statistics_dtype(leaf))
    total, mass = jnp.sum(wide, axis=0), jnp.sum(jnp.abs(wide), axis=0)
    purity = jnp.where(mass > 0, total / jnp.where(mass > 0, mass, 1), 0)
    positive = 0.5 * (1 + purity)
    uniform = jnp.broadcast_to(uniform.astype(positive.dtype), positive.shape)
    kept = ((wide > 0) & (positive > uniform)[None]) | ((wide < 0) & (positive < uniform)[None])
    share = along_tasks(leaks.astype(wide.dtype), wide.ndim)
    return jnp.where(kept, wide, share * wide)


def _absolute_sums(leaves: list[jax.Array], view: TaskGradients) -> jax.Array:
    """Each task's L1 norm, `[T]`."""
    total = jnp.zeros(view.active.shape, view.dtype)
    for leaf in leaves:
        axes = tuple(range(1, leaf.ndim))
        total = total + jnp.sum(jnp.abs(leaf.astype(view.dtype)), axis=axes)
    return total


def _noise_leaves(
    noise: Any, leaves: list[jax.Array], treedef: Any, key: jax.Array
) -> list[jax.Array]:
    """One array of uniforms a leaf: the caller's, or drawn in the leaf's own precision or float32."""
    if noise is None:
        return [
            jax.random.uniform(
                jax.random.fold_in(key, index),
                leaf.shape[1:],
                statistics_dtype(leaf),
            )
            for index, leaf in enumerate(leaves)
        ]
    if jax.tree.structure(noise) != treedef:
        raise ValueError(
            f"graddrop: noise must have the structure of the parameters, {treedef}; found "
            f"{jax.tree.structure(noise)}."
        )
    given = [jnp.asarray(uniform) for uniform in jax.tree.leaves(noise)]
    for uniform, leaf in zip(given, leaves, strict=True):
        shape = leaf.shape[1:]
        fits = uniform.ndim == len(shape) and all(
            have in (1, want) for have, want in zip(uniform.shape, shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"graddrop: a leaf of noise has shape {uniform.shape}; the gradient of one task has "
                f"shape {shape}, and only sizes of 1 may stand for others."
            )
    return given


METHOD = Method(
    name="graddrop",
    factory=graddrop,
    needs=("gradients",),
    family="from_gradients",
    scale="sum",
    reference="Chen et al., Just Pick a Sign, 2020",
    make=graddrop,
    properties=frozenset({"permutation", "scale"}),
    random=True,
)
