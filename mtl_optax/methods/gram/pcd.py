"""PCD: the target's gradient, with a minimum progress of every other task."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

from mtl_optax.core.factory import Decay, Nonnegative, factory
from mtl_optax.core.state import next_count
from mtl_optax.core.types import DType, Number
from mtl_optax.core.validation import find_target, task_numbers
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import clip_finite, move_average, safe_divide
from mtl_optax.solvers.cosine import product
from mtl_optax.solvers.nonnegative import nonnegative_least_squares


class PCDState(NamedTuple):
    """State of `pcd`, `[T]` per block.

    Attributes:
      square_ema: EMA of each task's squared gradient norm; starts at 0.
      correction: the bias correction of each EMA: `1 - ema_decay ** k` after k steps.
      fallback_count: one int32 scalar per block, the number of steps without the constraints.
    """

    square_ema: jax.Array
    correction: jax.Array
    fallback_count: jax.Array


@factory
def pcd(
    tasks: int | Collection[str],
    *,
    target: int | str | None = None,
    tau: Number = 0.02,
    ema_decay: Decay = 0.999,
    eps: Nonnegative = 1e-8,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Finds the update nearest to the target's gradient with a minimum progress of every other task.

    The target task has priority, but each other task is guaranteed a fraction ``tau`` :math:`\tau` of the
    progress that its own gradient would make. Under these constraints the update is as close to the
    target's gradient as possible.

    .. math::
        \tilde g_t = g_t / \sqrt{\hat v_t + \epsilon}, \qquad
        \tilde d = \arg\min_d |d - \tilde g_{target}|^2 \;\text{ s.t. }\;
        \tilde g_t \cdot d \ge \tau |\tilde g_t|^2 \;\; (t \ne target), \qquad
        update = |g_{target}|\, \tilde d / |\tilde d|,

    with :math:`\hat v_t` the bias-corrected EMA of :math:`|g_t|^2` with decay ``ema_decay``. Scale: the
    method's own, the norm of the target's gradient. Algorithm 1 of the paper.

    Args:
      tasks: T, or the task names.
      target: name or index of the target task: required if the tasks have names, else 0 by default.
      tau: the guaranteed fraction in [0, 1]: a number, `[T]`, or a dictionary by task name. The entry of
        the target is not used.
      ema_decay: the decay of the averages of the squared norms, in [0, 1).
      eps: added to these averages, in units of a squared norm; not negative.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `PCDState`. Cost: one pass over the gradients for the Gram matrix, one for
      the sum, and a `[T, T]` quadratic program.

    Raises:
      ValueError: if the target is unknown, `tau` has the wrong shape, or a number is outside its range.

    Notes:
      The dual of the quadratic program is solved exactly, on cosines. The constraints are dropped if no
      direction satisfies all of them (opposite auxiliary gradients), or if their multipliers exceed 1 /
      sqrt(machine epsilon). The update is then the target's gradient, and ``rule_state.fallback_count``
      increases.

      The constraint of a zero gradient always holds. If the target is zero or absent, the update is 0.
      With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.pcd(2, tau=0.5)
      >>> update, _ = tx.update(jnp.array([[2., 0.], [0., 7.]]), tx.init(jnp.zeros(2)))
      >>> np.array(update, float).round(3).tolist()
      [1.789, 0.894]

    References:
      Varam and AlHajri, Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical
      Multi-Objective Optimization, 2026, https://arxiv.org/abs/2606.29521
    """
    index = find_target("pcd", target, tasks)
    tau = task_numbers("pcd", "tau", tau, tasks, 0, 1, or_one=True)

    def init(num_tasks: int, dtype: DType) -> PCDState:
        zeros = jnp.zeros((num_tasks,), dtype)
        return PCDState(zeros, zeros, jnp.zeros((), jnp.int32))

    def weigh(inputs: StepInputs, state: PCDState) -> tuple[jax.Array, PCDState]:
        norms, active, dtype = inputs.norms, inputs.active, inputs.norms.dtype
        square_ema = move_average(state.square_ema, clip_finite(norms**2), ema_decay, active)
        correction = move_average(state.correction, 1, ema_decay, active)
        mean_square = safe_divide(square_ema, correction)
        spread = jnp.sqrt(mean_square + jnp.asarray(eps, dtype))
        lengths = safe_divide(norms, spread, norms)
        guaranteed = jnp.asarray(tau, dtype) * lengths
        along, feasible = _constrained(inputs.cosine, lengths, guaranteed, active, index)
        # Scaled to the norm of the target's gradient; a norm below the rounding error counts as 0.
        squared = jnp.sum(along * product(inputs.cosine, along))
        rounding = 10 * jnp.finfo(dtype).eps * jnp.sum(jnp.abs(along)) ** 2
        length = jnp.sqrt(jnp.where(squared > rounding, squared, 1))
        ratio = safe_divide(norms[index], norms)
        weights = jnp.where(squared > rounding, along / length * ratio, 0)
        failed = active[index] & (norms[index] > 0) & ~feasible
        fallbacks = next_count(state.fallback_count, failed)
        return weights, PCDState(square_ema, correction, fallbacks)

    rule = WeightRule(frozenset({"gram"}), weigh, init, target=index)
    return from_rule("pcd", tasks, rule, **options)


def _constrained(
    cosine: jax.Array, lengths: jax.Array, guaranteed: jax.Array, active: jax.Array, target: int
) -> tuple[jax.Array, jax.Array]:
    """Returns coefficients `[T]` of the unit gradients, and whether they satisfy the constraints.

    The dual, with a multiplier z >= 0 for each auxiliary task, is a nonnegative least squares problem.
    """
    own = jnp.arange(cosine.shape[0]) == target
    bound = active & (lengths > 0) & ~own
    wanted = jnp.where(bound, guaranteed - cosine[:, target] * lengths[target], 0)
    added = nonnegative_least_squares(cosine, wanted, bound)
    slack = jnp.where(bound, product(cosine, added) - wanted, 0)
    scale = jnp.maximum(jnp.max(jnp.abs(wanted)), jnp.max(lengths))
    root = jnp.sqrt(jnp.asarray(jnp.finfo(cosine.dtype).eps, cosine.dtype))
    feasible = (jnp.min(slack) >= -root * scale) & (jnp.max(added) * root <= scale)
    return jnp.where(own, lengths, jnp.where(feasible, added, 0)), feasible
