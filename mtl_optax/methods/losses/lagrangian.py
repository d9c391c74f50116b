"""Lagrangian: minimise some losses subject to limits on others."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from mtl_optax.core.arguments import check_range
from mtl_optax.core.factory import factory
from mtl_optax.core.method import Method, MethodOptions
from mtl_optax.core.pipeline import from_rule
from mtl_optax.core.rule import StepInputs, WeightRule
from mtl_optax.core.tasks import Tasks, read_tasks, task_numbers
from mtl_optax.core.types import DType, Number
from mtl_optax.solvers.log_weights import largest_weight


class LagrangianState(NamedTuple):
    """State of `lagrangian`.

    Attributes:
      multipliers: `[T]`, of the constraints; start at 0, and stay 0 for objectives.
    """

    multipliers: jax.Array


@factory
def lagrangian(
    tasks: int | Collection[str],
    *,
    limits: Any,
    step_size: Number,
    damping: Number = 0.0,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Minimises some losses subject to upper limits on the others.

    For constrained and safe reinforcement learning, for fairness or cost constraints: a weight that has
    to be tuned by hand is replaced by a limit that has a meaning. With ``limits`` :math:`c_t`,
    ``step_size`` :math:`\eta` and ``damping`` d, for the constrained tasks

    .. math::
        w_t = \max(0,\; \mu_t + d\,(L_t - c_t)), \qquad
        \mu_t \leftarrow \max(0,\; \mu_t + \eta\, (L_t - c_t)),

    and :math:`w_t = 1` for the others, the objectives. The multipliers :math:`\mu` are used first and moved
    after, by projected gradient ascent on the Lagrangian. Scale: the method's own. The basic differential
    multiplier method of the paper; with damping its modified one, which does not oscillate.

    Args:
      tasks: T, or the task names.
      limits: a dictionary from the names of the constrained tasks to their limits, or `[T]` with None (or
        infinity) for objectives.
      step_size: eta > 0; its unit is one over a loss.
      damping: d >= 0.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `LagrangianState`; `update` needs `losses=`. Cost: O(T).

    Raises:
      ValueError: for limits of unknown tasks or not `[T]`, no objective, or numbers outside their range.

    Notes:
      The multipliers converge only if the learning rate of the network is small against the time in which
      they move. An absent task keeps its multiplier.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.lagrangian(("cost", "reward"), limits={"cost": 1.0}, step_size=0.5)
      >>> state = tx.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...     update, state = tx.update(jnp.eye(2), state, losses={"cost": 3.0, "reward": 7.0})
      >>> update.tolist(), state.rule_state.multipliers.tolist()
      ([1.0, 1.0], [[2.0, 0.0]])

    References:
      Platt and Barr, Constrained Differential Optimization, 1988,
      https://papers.nips.cc/paper/4-constrained-differential-optimization
    """
    axis = read_tasks("lagrangian", tasks)
    check_range("lagrangian", step_size=(step_size, 0, math.inf), damping=(damping, 0, math.inf))
    limit, constrained = _read_limits(limits, axis)

    def init(dtype: DType) -> LagrangianState:
        return LagrangianState(jnp.zeros((axis.number,), dtype))

    def weigh(inputs: StepInputs, state: LagrangianState) -> tuple[jax.Array, LagrangianState]:
        dtype = state.multipliers.dtype
        largest = largest_weight(dtype)
        excess = jnp.clip(inputs.losses - jnp.asarray(limit, dtype), -largest, largest)

        def add(share: Any) -> jax.Array:
            moved = state.multipliers + jnp.clip(
                jnp.asarray(share, dtype) * excess, -largest, largest
            )
            return jnp.clip(moved, 0, largest)

        weights = jnp.where(constrained, add(damping), 1)
        moves = inputs.active & constrained
        return weights, LagrangianState(jnp.where(moves, add(step_size), state.multipliers))

    rule = WeightRule(frozenset({"losses"}), weigh, init)
    return from_rule("lagrangian", axis, rule, **options)


def _read_limits(limits: Any, axis: Tasks) -> tuple[np.ndarray, np.ndarray]:
    """The limits `[T]`, 0 for objectives, and which tasks have one."""
    if isinstance(limits, Mapping):
        names = axis.names or ()
        unknown = sorted(set(limits) - set(names))
        if unknown:
            raise ValueError(
                f"lagrangian: limits must name tasks of {list(names)}; found {unknown}."
            )
        limits = [limits.get(name) for name in names]
    if isinstance(limits, Sequence):
        limits = [math.inf if limit is None else limit for limit in limits]
    values = np.asarray(task_numbers("lagrangian", "limits", limits, axis), float)
    constrained = np.isfinite(values)
    if constrained.all():
        raise ValueError("lagrangian: at least one task must have no limit: the objective.")
    return np.where(constrained, values, 0.0), constrained
