"""DB-MTL: averaged gradients of log losses, rescaled to one norm."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core import task_tree
from mtl_optax.core.factory import AnyNumber, Decay, Flag, factory
from mtl_optax.rule import GradientAverage, Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import count_active, mean_active, safe_divide

# Part of the method's definition: added to the losses and to the norms.
_EPS = 1e-8


@factory
def db_mtl(
    tasks: int | Collection[str],
    *,
    ema_decay: Decay = 0.9,
    beta_sigma: AnyNumber = 0.0,
    log_losses: Flag = True,
    norm: Literal["max", "min", "median", "mean"] = "max",
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Averages the gradients of log losses, and rescales them to one norm.

    Losses in different units give gradients of different magnitude. The logarithm removes the units;
    rescaling the averaged gradients to the largest norm removes the remaining differences.

    At step k (from 1), with :math:`g_t` the gradient of the loss :math:`L_t`, ``ema_decay`` :math:`\beta`,
    ``beta_sigma`` :math:`\sigma` and :math:`\epsilon = 10^{-8}`:

    .. math::
        h_t = \frac{g_t}{L_t + \epsilon}, \qquad
        b_t \leftarrow h_t + \beta k^{-\sigma} (b_t - h_t), \qquad
        update = \sum_t \frac{\max_s |b_s|}{|b_t| + \epsilon}\, b_t

    Scale: sum-like, up to T times the largest norm. Algorithm 1 of the paper.

    Args:
      tasks: T, or the task names.
      ema_decay: the decay of the averages of the gradients, in [0, 1); 0 disables the average.
      beta_sigma: exponent by which this decay decreases over the steps.
      log_losses: True uses gradients of log losses, and `update` requires `losses=`; False uses the raw
        gradients.
      norm: the common norm: "max", "min", "median" (mean of the middle two) or "mean".
      **options: see `MethodOptions`.

    Returns:
      A `Method`. `state.averages` are the averages b, which `state.weights` multiply. Cost: one pass over
      the gradients for the averages, one for the norms, one for the sum; memory: T gradients.

    Raises:
      ValueError: if `norm` is unknown, or `ema_decay` is outside [0, 1).

    Notes:
      Use it on parameters. On a representation `[batch, width]` (`fork`) the averages would mix unrelated
      examples of successive batches, unless its rows always have the same meaning.

      As in the authors' code, the averages start at 0 without bias correction (the first update is
      :math:`1 - \beta` times as large as a later one), the update is a sum over tasks, and the norms are
      over all parameters. The authors train the task heads on the plain sum of log losses. The other
      choices of `norm` are those compared in the MultiBalance paper.

      With ``update_every``, a reused weight is at most :math:`1 / (1 - \beta k^{-\sigma})` times the
      weight for the current averages.

      A zero average contributes 0, and with "min" it makes the update 0. Norms of about 1e-8 or less are
      not rescaled to the full common norm. A negative loss counts as 0. If all gradients are zero, the
      update is 0. The average of an absent task does not change. With one task, the update is its
      averaged gradient.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.db_mtl(2, ema_decay=0.0)
      >>> grads, losses = jnp.array([[4., 0.], [0., 3.]]), jnp.array([2., 1.])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> [round(float(x), 3) for x in update]
      [3.0, 3.0]

    References:
      Lin, Jiang, Ye, Zhang, Chen, Chen, Liu and Kwok, Dual-Balancing for Multi-Task Learning, 2023,
      https://arxiv.org/abs/2308.12029

      He et al., MultiBalance: Multi-Objective Gradient Balancing in Industrial-Scale Multi-Task
      Recommendation System, 2024, https://arxiv.org/abs/2411.11871
    """

    def average(
        inputs: StepInputs, averages: optax.OptState
    ) -> tuple[optax.Updates, optax.OptState]:
        updates = inputs.updates
        if log_losses:
            updates = _divide(updates, jnp.maximum(inputs.losses, 0) + _EPS)
        averages = task_tree.move_averages(averages, updates, decay(inputs), inputs.active)
        return averages, averages

    def decay(inputs: StepInputs) -> jax.Array:
        count = (inputs.step + 1).astype(inputs.dtype)
        return ema_decay * count ** -jnp.asarray(beta_sigma, inputs.dtype)

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        common = jnp.where(jnp.any(inputs.active), _COMMON[norm](inputs.norms, inputs.active), 0)
        return common / (inputs.norms + _EPS), state

    def bound(inputs: StepInputs, state: optax.OptState) -> jax.Array:
        """The weights for the current averages, over the share of the current gradient in them."""
        weights, _ = weigh(inputs, state)
        return safe_divide(weights, 1 - decay(inputs), jnp.inf)

    needs = frozenset({"losses", "norms"} if log_losses else {"norms"})
    moving_average = GradientAverage(task_tree.per_task_zeros, average)
    return from_rule(
        "db_mtl", tasks, WeightRule(needs, weigh, average=moving_average, bound=bound), **options
    )


def _divide(updates: optax.Updates, divisors: jax.Array) -> optax.Updates:
    """Divides each task's gradient by its entry of `divisors`, in the dtype of `divisors`."""
    size = sum(leaf[0].size for leaf in jax.tree.leaves(updates))
    # A loss near 0 must not cause an average whose squared norm overflows, on up to 2**16 devices.
    limit = 2.0**-8 * (float(jnp.finfo(divisors.dtype).max) / max(size, 1)) ** 0.5

    def one(leaf: jax.Array) -> jax.Array:
        divided = leaf.astype(divisors.dtype) / task_tree.along_tasks(divisors, leaf.ndim)
        return jnp.clip(divided, -limit, limit)

    return jax.tree.map(one, updates)


def _median(norms: jax.Array, active: jax.Array) -> jax.Array:
    ordered = jnp.sort(jnp.where(active, norms, jnp.inf))
    count = count_active(active, jnp.int32)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


# The common norm of the active tasks.
_COMMON = {
    "max": lambda norms, active: jnp.max(norms, where=active, initial=0),
    "min": lambda norms, active: jnp.min(norms, where=active, initial=jnp.inf),
    "median": _median,
    "mean": mean_active,
}
