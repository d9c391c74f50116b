"""OL-AUX: weights of auxiliary tasks learned from inner products with the target's gradient."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core import task_tree
from mtl_optax.core.factory import Flag, Nonnegative, PositiveInt, factory
from mtl_optax.core.state import next_count
from mtl_optax.core.types import DType
from mtl_optax.core.validation import find_target
from mtl_optax.rule import GradientAverage, Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import clip_finite

# Limit of the absolute value of a weight, so that its product with a gradient stays finite.
_LARGEST_WEIGHT = 2.0**60


class OLAuxState(NamedTuple):
    """State of `ol_aux`, `[T]` per block.

    Attributes:
      task_weights: the weights of the next step; all start at 1, and the weight of the target stays 1.
      products: inner products with the target's gradient, summed since the last change.
    """

    task_weights: jax.Array
    products: jax.Array


class OLAuxWindow(NamedTuple):
    """The last gradients of every task, for a ``filter_window`` F above 1.

    Attributes:
      window: leaves `[F, T, *shape]`, a ring buffer of the gradients of the last F steps.
      filled: int32 `[T]`, the number of steps in which each task was present.
    """

    window: optax.Updates
    filled: jax.Array


@factory  # pyright: ignore[reportArgumentType]
def ol_aux(
    tasks: int | Collection[str],
    *,
    target: int | str | None = None,
    weight_lr: Nonnegative = 0.005,
    update_every: PositiveInt = 5,
    filter_window: PositiveInt = 1,
    nonnegative: Flag = True,
    **options: Unpack[MethodOptions],  # pyright: ignore[reportGeneralTypeIssues]
) -> Method:
    r"""Learns the weights of auxiliary tasks from their effect on the target task.

    An auxiliary task helps if a step along its gradient decreases the target's loss; to first order, the
    decrease is the inner product of the two gradients.

    Every N = ``update_every`` steps, with ``weight_lr`` :math:`\eta`:

    .. math::
        w_t \leftarrow \max\Big(0,\; w_t + \eta \sum_{\text{last N steps}} \langle g_{target}, g_t \rangle
        \Big), \qquad w_{target} = 1, \qquad update = \sum_t w_t g_t.

    All weights start at 1. Scale: sum-like. Algorithm 1 of the paper: gradient descent on the target's
    loss N steps ahead.

    Args:
      tasks: T, or the task names.
      target: name or index of the target task: required if the tasks have names, else 0 by default.
      weight_lr: eta, in units of an inverse squared gradient norm.
      update_every: N, static: the number of steps between changes of the weights.
      filter_window: F, static: gradients are averaged over F steps for the inner products.
      nonnegative: whether negative weights are replaced by 0.
      **options: see `MethodOptions`, except `update_every`, which is an argument of this method.

    Returns:
      A `Method` with the state `OLAuxState`; with a filter, `state.averages` is an `OLAuxWindow`. Cost:
      one pass over the gradients for the Gram matrix, one for the sum; with a filter also the memory of F
      gradients of every task.

    Raises:
      ValueError: if the target is unknown, or `update_every` or `filter_window` is below 1.

    Notes:
      As in the authors' code, eta is the product of the learning rates of the weights (5) and of the model
      (0.001), new weights are first used in the next step, negative weights may be replaced by 0, and
      both gradients may be averaged (with F = 4; the paper has F = 1). The authors' code uses the
      gradient of the total loss instead of the target's; the paper and this function use the target's.

      A zero gradient changes no weight. If all gradients are zero, the update is 0. The weight and the
      sum of inner products of an absent task do not change; while the target is absent, no sum changes.
      With one task, the update is its gradient. Weights are limited to 2**60 in absolute value, to
      prevent overflow.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.ol_aux(3, weight_lr=0.1, update_every=1)
      >>> grads = jnp.array([[1., 0.], [2., 1.], [-3., 0.]])
      >>> update, state = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> np.array(state.rule_state.task_weights, float).round(3).tolist()
      [[1.0, 1.2, 0.7]]

    References:
      Lin, Baweja, Kantor and Held, Adaptive Auxiliary Task Weighting for Reinforcement Learning, 2019,
      https://papers.nips.cc/paper/2019/hash/0e900ad84f63618452210ab8baae0218-Abstract.html
    """
    index = find_target("ol_aux", target, tasks)

    def init(num_tasks: int, dtype: DType) -> OLAuxState:
        return OLAuxState(jnp.ones((num_tasks,), dtype), jnp.zeros((num_tasks,), dtype))

    def weigh(inputs: StepInputs, state: OLAuxState) -> tuple[jax.Array, OLAuxState]:
        weights = state.task_weights
        products = clip_finite(state.products + inputs.gram[index])
        due = inputs.active & ((inputs.step + 1) % update_every == 0)
        due = due & (jnp.arange(len(due)) != index)
        lowest = 0.0 if nonnegative else -_LARGEST_WEIGHT
        moved = weights + jnp.asarray(weight_lr, weights.dtype) * products
        moved = jnp.clip(moved, lowest, _LARGEST_WEIGHT)
        new = OLAuxState(jnp.where(due, moved, weights), jnp.where(due, 0, products))
        return weights, new

    average = _window_means(filter_window) if filter_window > 1 else None
    rule = WeightRule(frozenset({"gram"}), weigh, init, average=average, target=index)
    return from_rule("ol_aux", tasks, rule, **options)


def _window_means(size: int) -> GradientAverage:
    """Returns the mean of each task's last `size` gradients, only for the inner products."""

    def init(params: optax.Params, num_tasks: int, dtype: DType) -> OLAuxWindow:
        zeros = task_tree.per_task_zeros(params, num_tasks, dtype)
        window = optax.tree.batch_shape(zeros, (size,))
        return OLAuxWindow(window, jnp.zeros((num_tasks,), jnp.int32))

    def apply(inputs: StepInputs, state: OLAuxWindow) -> tuple[optax.Updates, OLAuxWindow]:
        # The buffer of an absent task does not change; its next gradient replaces its oldest one.
        oldest = jnp.arange(size, dtype=jnp.int32)[:, None] == (state.filled % size)[None, :]
        replaced = oldest & inputs.active[None, :]

        def insert(ring: jax.Array, leaf: jax.Array) -> jax.Array:
            here = replaced.reshape(replaced.shape + (1,) * (leaf.ndim - 1))
            return jnp.where(here, leaf.astype(ring.dtype)[None], ring)

        window = jax.tree.map(insert, state.window, inputs.updates)
        filled = next_count(state.filled, inputs.active)
        times = jnp.clip(filled, 1, size).astype(inputs.dtype)
        means = jax.tree.map(
            lambda ring: jnp.sum(ring, axis=0) / task_tree.along_tasks(times, ring.ndim - 1), window
        )
        return means, OLAuxWindow(window, filled)

    return GradientAverage(init, apply, weighted=False)
