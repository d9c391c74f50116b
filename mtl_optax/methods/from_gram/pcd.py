"""PCD: the target's gradient, bent just enough that every other task makes some progress."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_optax.arguments import check_num_tasks, check_range, check_task_index
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule, next_count
from mtl_optax.method import Method
from mtl_optax.solvers.nonnegative import nonnegative_least_squares, product


class PCDState(NamedTuple):
    """What PCD remembers.

    Attributes:
      square_ema: `[T]`, moving average of each task's squared gradient norm; starts at 0.
      seen: `[T]`, the share of each average that is data: `1 - beta ** k` after k steps.
      fallback_count: int32, how often no direction met all constraints.
    """

    square_ema: jax.Array
    seen: jax.Array
    fallback_count: jax.Array


def pcd(
    num_tasks: int,
    *,
    target: int = 0,
    tau: Any = 0.02,
    beta: Any = 0.999,
    eps: Any = 1e-8,
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Follows the target's gradient as closely as a minimal progress of all other tasks allows.

    One task has priority; the others must not be traded against it, but must not be forgotten either.
    Every auxiliary is promised a fraction ``tau`` :math:`\tau` of the progress that its own gradient
    would make, and within that promise the update stays as near to the target's gradient as possible.

    .. math::
        \tilde g_t = g_t / \sqrt{\hat v_t + \epsilon}, \qquad
        \tilde d = \arg\min_d |d - \tilde g_{target}|^2 \;\text{ s.t. }\;
        \tilde g_t \cdot d \ge \tau |\tilde g_t|^2 \;\; (t \ne target), \qquad
        update = |g_{target}|\, \tilde d / |\tilde d|,

    with :math:`\hat v_t` the bias-corrected average of :math:`|g_t|^2` with decay ``beta``. Its length is
    that of the target's gradient: "own" scale. The quadratic program is solved in its dual, on cosines,
    exactly.

    Degenerate input: a zero gradient has a constraint that always holds. Where no direction meets all
    constraints (opposite auxiliaries), or only one with multipliers beyond :math:`\varepsilon^{-1/2}` of
    the dtype does, they are dropped: the update is the target's gradient, and `fallback_count` goes up.
    The target zero or absent: the update is 0. T = 1: the gradient itself.

    Args:
      num_tasks: T, static.
      target: index of the task with priority.
      tau: promised fraction in [0, 1], a number or `[T]` (the target's entry is not used).
      beta: decay of the averages of squared norms.
      eps: epsilon beside those averages, in the unit of a squared norm.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. State: `PCDState`. Cost: one pass over the
      gradients for the Gram matrix, one for the sum, and a `[T, T]` quadratic program.

    Raises:
      ValueError: for a target outside 0..T-1, or numbers outside their range.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.pcd(2, tau=0.5)
      >>> update, _ = tx.update(jnp.array([[2., 0.], [0., 7.]]), tx.init(jnp.zeros(2)))
      >>> np.array(update, float).round(3).tolist()
      [1.789, 0.894]

    References:
      Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective
      Optimization, 2026.
    """
    num_tasks = check_num_tasks("pcd", num_tasks)
    target = check_task_index("pcd", "target", target, num_tasks)
    check_range("pcd", tau=(tau, 0, 1), beta=(beta, 0, 1), eps=(eps, 0, float("inf")))
    if np.shape(tau) not in ((), (num_tasks,)):
        raise ValueError(
            f"pcd: tau must be a number or have shape ({num_tasks},); found {np.shape(tau)}."
        )

    def init(dtype: Any) -> PCDState:
        zeros = jnp.zeros((num_tasks,), dtype)
        return PCDState(zeros, zeros, jnp.zeros((), jnp.int32))

    def weigh(evidence: Evidence, state: PCDState) -> tuple[jax.Array, PCDState]:
        norms, active, dtype = evidence.norms, evidence.active, evidence.norms.dtype
        decay = jnp.asarray(beta, dtype)
        squares = jnp.minimum(norms**2, jnp.asarray(jnp.finfo(dtype).max, dtype))
        average = decay * state.square_ema + (1 - decay) * squares
        square_ema = jnp.where(active, average, state.square_ema)
        seen = jnp.where(active, decay * state.seen + (1 - decay), state.seen)
        mean_square = square_ema / jnp.where(seen > 0, seen, 1)
        spread = jnp.sqrt(mean_square + jnp.asarray(eps, dtype))
        lengths = norms / jnp.where(spread > 0, spread, 1)
        promised = jnp.broadcast_to(jnp.asarray(tau, dtype), (num_tasks,)) * lengths
        along, feasible = _bend(evidence.cosine, lengths, promised, active, target)
        # In units of the target's length, which sets the length of the update.
        squared = jnp.sum(along * product(evidence.cosine, along))
        rounding = 10 * jnp.finfo(dtype).eps * jnp.sum(jnp.abs(along)) ** 2
        length = jnp.sqrt(jnp.where(squared > rounding, squared, 1))
        ratio = jnp.where(norms > 0, norms[target] / jnp.where(norms > 0, norms, 1), 0)
        weights = jnp.where(squared > rounding, along / length * ratio, 0)
        failed = active[target] & (norms[target] > 0) & ~feasible
        fallbacks = next_count(state.fallback_count, failed)
        return weights, PCDState(square_ema, seen, fallbacks)

    return from_rule(Rule("pcd", num_tasks, frozenset({"gram"}), init, weigh), **options)


def _bend(
    cosine: jax.Array, lengths: jax.Array, promised: jax.Array, active: jax.Array, target: int
) -> tuple[jax.Array, jax.Array]:
    """Coefficients `[T]` of the solution on the unit gradients, and whether there is one.

    In the dual every auxiliary gets a multiplier z >= 0: a nonnegative least squares problem.
    """
    own = jnp.arange(cosine.shape[0]) == target
    bound = active & (lengths > 0) & ~own
    wanted = jnp.where(bound, promised - cosine[:, target] * lengths[target], 0)
    added = nonnegative_least_squares(cosine, wanted, bound)
    slack = jnp.where(bound, product(cosine, added) - wanted, 0)
    scale = jnp.maximum(jnp.max(jnp.abs(wanted)), jnp.max(lengths))
    root = jnp.sqrt(jnp.asarray(jnp.finfo(cosine.dtype).eps, cosine.dtype))
    feasible = (jnp.min(slack) >= -root * scale) & (jnp.max(added) * root <= scale)
    return jnp.where(own, lengths, jnp.where(feasible, added, 0)), feasible


METHOD = Method(
    name="pcd",
    factory=pcd,
    needs=("gram",),
    family="from_gram",
    scale="own",
    reference="Priority-Constrained Descent, 2026",
    make=pcd,
    properties=frozenset({"split"}),
)
