"""Lagrangian: minimises some losses subject to limits on the others."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, TypeAlias, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from mtl_optax.core.factory import Nonnegative, factory
from mtl_optax.core.types import DType, Number
from mtl_optax.core.validation import Tasks, read_tasks, task_numbers
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.log_weights import clip_weights

# One number per constrained task, and None for an objective.
Limits: TypeAlias = Mapping[str, Number] | Sequence[Number | None] | jax.Array | np.ndarray


class LagrangianState(NamedTuple):
    """State of `lagrangian`.

    Attributes:
      multipliers: `[T]`, the multipliers of the constraints, which start at 0; they stay 0 for
        objectives.
    """

    multipliers: jax.Array


@factory
def lagrangian(
    tasks: int | Collection[str],
    *,
    limits: Limits,
    step_size: Nonnegative,
    damping: Nonnegative = 0.0,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Minimises some losses subject to upper limits on the others.

    The method is made for constrained and safe reinforcement learning, and for fairness or cost
    constraints. It replaces a weight, which must be tuned, by a limit in the unit of the loss. With
    ``limits`` :math:`c_t`, ``step_size`` :math:`\eta` and ``damping`` d, for the constrained tasks

    .. math::
        w_t = \max(0,\; \mu_t + d\,(L_t - c_t)), \qquad
        \mu_t \leftarrow \max(0,\; \mu_t + \eta\, (L_t - c_t)),

    and :math:`w_t = 1` for the others, the objectives. The update uses the multipliers :math:`\mu` before
    their step of projected gradient ascent on the Lagrangian. Scale: the method's own. This is the basic
    differential multiplier method of the paper; with damping it is the modified method, which does not
    oscillate.

    Args:
      tasks: T, or the task names.
      limits: a dictionary from the names of the constrained tasks to their limits, or `[T]` with None (or
        infinity) for objectives.
      step_size: eta >= 0, in units of an inverse loss.
      damping: d >= 0.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `LagrangianState`; `update` needs `losses=`. Cost: O(T).

    Raises:
      ValueError: if a limited task is unknown, `limits` is not `[T]`, there is no objective, or a number
        is outside its range.

    Notes:
      The multipliers converge only if they change slowly compared with the parameters of the network. The
      multiplier of an absent task does not change.

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
    limit, constrained = _read_limits(limits, axis)

    def init(num_tasks: int, dtype: DType) -> LagrangianState:
        return LagrangianState(jnp.zeros((num_tasks,), dtype))

    def weigh(inputs: StepInputs, state: LagrangianState) -> tuple[jax.Array, LagrangianState]:
        dtype = state.multipliers.dtype
        excess = clip_weights(inputs.losses - jnp.asarray(limit, dtype))

        def add(share: Number) -> jax.Array:
            moved = state.multipliers + clip_weights(jnp.asarray(share, dtype) * excess)
            return jnp.maximum(clip_weights(moved), 0)

        weights = jnp.where(constrained, add(damping), 1)
        moves = inputs.active & constrained
        return weights, LagrangianState(jnp.where(moves, add(step_size), state.multipliers))

    return from_rule("lagrangian", axis, WeightRule(frozenset({"losses"}), weigh, init), **options)


def _read_limits(limits: Limits, axis: Tasks) -> tuple[np.ndarray, np.ndarray]:
    """Returns the limits `[T]`, 0 for objectives, and which tasks have a limit."""
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
