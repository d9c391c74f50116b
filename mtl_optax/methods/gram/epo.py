"""EPO: descent towards the point of the Pareto front where the losses have given ratios."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

from mtl_optax.core.factory import Nonnegative, factory
from mtl_optax.core.state import next_count
from mtl_optax.core.types import DType, PerTask
from mtl_optax.core.validation import task_numbers
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import count_active, safe_divide
from mtl_optax.solvers.cosine import product, uniform_weights
from mtl_optax.solvers.linear_program import maximize_on_simplex
from mtl_optax.solvers.log_weights import largest_weight
from mtl_optax.solvers.min_norm import min_norm_weights
from mtl_optax.solvers.preference import active_preference


class EPOState(NamedTuple):
    """State of `epo`.

    Attributes:
      fallback_count: one int32 scalar per block, the number of steps without a solution.
    """

    fallback_count: jax.Array


@factory
def epo(
    tasks: int | Collection[str],
    *,
    preference: PerTask | None = None,
    tolerance: Nonnegative = 1e-4,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Searches for the Pareto-optimal point at which all products of preference and loss are equal.

    The point that a weighted sum of losses reaches on the Pareto front depends on the shape of the front.
    With the ``preference`` r, this method reaches the point with :math:`r_1 L_1 = \dots = r_T L_T`. With
    the shares :math:`p_t = r_t L_t / \sum_s r_s L_s`, their nonuniformity
    :math:`\mu = \sum_t p_t \log(T p_t)` and :math:`a_t = r_t (\log(T p_t) - \mu)`, the update
    :math:`G^\top a` would reduce :math:`\mu` fastest. With the gradients as rows of G and
    :math:`C = G G^\top`, the weights :math:`\alpha` are those in the simplex that solve, if :math:`\mu`
    exceeds ``tolerance`` (balance),

    .. math::
        \max_\alpha \alpha^\top C a \;\text{ s.t. }\; (C \alpha)_t \ge 0 \text{ for the largest } p_t, \quad
        (C \alpha)_t \ge (C a)_t \text{ for all other } t \text{ with } (C a)_t \le 0,

    (if no entry of C a is positive, s.t. :math:`C \alpha \ge 0`), and else (descent)

    .. math::
        \max_\alpha 1^\top C \alpha \;\text{ s.t. }\; C \alpha \ge 0, \quad
        \alpha^\top C a \ge \min(0, \max_t (C a)_t).

    Scale: mean-like; the weights sum to 1. These are the linear programs of the authors' code for the first
    paper, in the restricted form.

    Args:
      tasks: T, or the task names.
      preference: r, `[T]` or a dictionary by task name, nonnegative; a larger entry gives a smaller loss.
        None means equal preferences.
      tolerance: the nonuniformity below which the losses count as balanced.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `EPOState`. `update` needs `losses=`. Cost: one pass over the gradients for
      the Gram matrix, one for the sum, and a linear program with T variables.

    Raises:
      ValueError: if `preference` has the wrong shape or a negative entry.

    Notes:
      The dual simplex method on the cosine matrix solves the program to the precision of the dtype. The
      authors' code calls a solver on the host. In training it multiplies the weights by T. If there is no
      solution, which only the second program allows, its weights are the preference; here they are those
      of `mgda`, and ``rule_state.fallback_count`` increases.

      While the losses are balanced, some of them may increase. Several weights can be exactly 0, because
      the solution is a vertex. A negative loss counts as 0; add a constant to losses that can be negative.
      A zero gradient can take a part of the weight. If all gradients are zero, the update is 0. With one
      task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.epo(2, preference=[1., 3.])
      >>> grads = jnp.array([[1., 0.], [0.6, 0.8]])
      >>> for losses in ([1., 1.], [3., 1.]):
      ...     update, _ = tx.update(grads, tx.init(jnp.zeros(2)), losses=jnp.array(losses))
      ...     print(np.asarray(update).round(3))
      [0.6 0.8]
      [1. 0.]

    References:
      Mahapatra and Rajan, Multi-Task Learning with User Preferences: Gradient Descent with Controlled
      Ascent in Pareto Optimization, 2020, https://proceedings.mlr.press/v119/mahapatra20a.html

      Mahapatra and Rajan, Exact Pareto Optimal Search for Multi-Task Learning and Multi-Criteria
      Decision-Making, 2021, https://arxiv.org/abs/2108.00597
    """
    vector = task_numbers("epo", "preference", preference, tasks, 0)

    def init(num_tasks: int, dtype: DType) -> EPOState:
        return EPOState(jnp.zeros((), jnp.int32))

    def weigh(inputs: StepInputs, state: EPOState) -> tuple[jax.Array, EPOState]:
        cosine, active, dtype = inputs.cosine, inputs.active, inputs.norms.dtype
        share = active_preference(vector, active, dtype)
        parts, adjustments, uniform = _adjustments(inputs.losses, share, active)
        balance = uniform > jnp.asarray(tolerance, dtype)
        # In units of the smallest norm n: x = alpha * norms / n, gain = C a / (norms * n).
        nonzero = inputs.geometry.nonzero
        smallest = jnp.min(inputs.norms, where=nonzero, initial=jnp.inf)
        lengths = jnp.where(nonzero, safe_divide(inputs.norms, smallest, where=nonzero), 1)
        lengths = jnp.minimum(lengths, largest_weight(dtype))
        gain = product(cosine, lengths * adjustments)
        programs = (
            _balance_program(cosine, gain, parts),
            _descent_program(cosine, gain, lengths, active),
        )
        objective, matrix, bound = (
            jnp.where(balance, *pair) for pair in zip(*programs, strict=True)
        )
        size = jnp.where(active, 1 / lengths, 0)
        alpha, solved = maximize_on_simplex(objective, size, matrix, bound)
        weights = jnp.where(solved, alpha / lengths, min_norm_weights(inputs.geometry))
        return weights, EPOState(next_count(state.fallback_count, jnp.any(active) & ~solved))

    return from_rule(
        "epo", tasks, WeightRule(frozenset({"losses", "gram"}), weigh, init), **options
    )


class _Program(NamedTuple):
    """`max objective x` with `matrix x >= bound`; a row of zeros with the bound 0 is no constraint."""

    objective: jax.Array  # [T]
    matrix: jax.Array  # [T + 1, T]
    bound: jax.Array  # [T + 1]


def _balance_program(cosine: jax.Array, gain: jax.Array, parts: jax.Array) -> _Program:
    """Makes the losses more uniform. All but the worst may increase as much as by the adjustments.

    A loss that the adjustments decrease has no constraint. If they decrease none, no loss may increase.
    """
    limited = (parts < jnp.max(parts)) & jnp.any(gain > 0)
    free = limited & (gain > 0)
    rows = jnp.where(free[:, None], 0, cosine)
    bound = jnp.where(limited, jnp.minimum(gain, 0), 0)
    return _Program(
        gain / _unit(gain),
        jnp.concatenate([rows, jnp.zeros_like(gain)[None]]),
        jnp.append(bound, 0),
    )


def _descent_program(
    cosine: jax.Array, gain: jax.Array, lengths: jax.Array, active: jax.Array
) -> _Program:
    """Decreases the sum of the losses, and none may increase; the last row keeps them uniform."""
    rise = jnp.minimum(jnp.max(jnp.where(active, gain * lengths, -jnp.inf)), 0)
    unit = _unit(gain)
    return _Program(
        product(cosine, lengths / jnp.max(lengths)),
        jnp.concatenate([cosine, gain[None] / unit]),
        jnp.append(jnp.zeros_like(gain), rise / unit),
    )


def _unit(gain: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.max(jnp.abs(gain)), jnp.finfo(gain.dtype).tiny)


def _adjustments(
    losses: jax.Array, preference: jax.Array, active: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the shares p `[T]`, the adjustments a `[T]` and the nonuniformity."""
    losses = jnp.where(active, jnp.maximum(losses, 0), 0)
    parts = preference * safe_divide(losses, jnp.max(losses))
    parts = safe_divide(parts, jnp.sum(parts), uniform_weights(active, losses.dtype))
    number = count_active(active, losses.dtype)
    logs = jnp.log(jnp.maximum(parts * number, jnp.finfo(losses.dtype).tiny))
    nonuniformity = jnp.sum(parts * logs)
    return parts, jnp.where(active, preference * (logs - nonuniformity), 0), nonuniformity
