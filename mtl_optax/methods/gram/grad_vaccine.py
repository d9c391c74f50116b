"""Gradient Vaccine: rotates gradients towards the average cosine of each pair of tasks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from mtl_optax.core.extra_args import projection_order
from mtl_optax.core.factory import Decay, Nonnegative, Seed, factory
from mtl_optax.core.types import DType
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import move_average, safe_divide
from mtl_optax.solvers.projections import add_in_order, projected_sum_weights


class GradVaccineState(NamedTuple):
    """State of `grad_vaccine`.

    Attributes:
      similarity_ema: `[T, T]`, EMA of the cosine of task i's gradient (row) with task j's, from 0.
    """

    similarity_ema: jax.Array


@factory
def grad_vaccine(
    tasks: int | Collection[str],
    *,
    ema_decay: Decay = 0.99,
    order: Literal["random", "cyclic"] = "random",
    seed: Seed = 0,
    eps: Nonnegative = 1e-8,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Rotates each gradient whose cosine with another one is below the average of their pair.

    PCGrad acts on negative inner products only, so it has no effect on tasks that are usually similar.
    Gradient Vaccine keeps an EMA of the cosine of each pair of tasks, and rotates a gradient whose cosine
    is below the EMA until they are equal.

    For each task i, starting at :math:`g_i' = g_i`, for every other j in its order, with
    :math:`c = \cos(g_i', g_j)`, the EMA :math:`\rho_{ij}` and ``ema_decay`` :math:`1 - \beta`:

    .. math::
        g_i' \leftarrow g_i' + \frac{|g_i'| \big(\rho_{ij}\sqrt{1-c^2} - c\sqrt{1-\rho_{ij}^2}\big)}
        {|g_j|\sqrt{1-\rho_{ij}^2}}\; g_j \quad \text{if } c < \rho_{ij}, \qquad
        \rho_{ij} \leftarrow (1-\beta)\rho_{ij} + \beta c, \qquad update = \sum_i g_i'

    The EMA is updated for every pair at every step, with the cosine of the current :math:`g_i'`. Scale:
    sum-like. Algorithm 1 of the paper.

    Args:
      tasks: T, or the task names.
      ema_decay: the share of the EMA that is kept, in [0, 1); the paper's beta is 1 minus this.
      order: "random" shuffles the others for each task at every step; "cyclic" takes i+1, i+2, ...
      seed: the seed of the shuffling.
      eps: added to the denominators (see Notes); not negative.
      **options: see `MethodOptions`; the paper prefers one EMA per layer, ``blocks="leaf"``.

    Returns:
      A `Method` with the state `GradVaccineState`. Its `update` takes `order=`, integers `[T, T]` that
      replace the order. Cost: one pass over the gradients for the Gram matrix, one for the sum, and T
      passes over a `[T, T]` array.

    Raises:
      ValueError: if `order` is unknown, the `order` of `update` is not integers `[T, T]`, or a number is
        outside its range.

    Notes:
      The paper has no public code. As in common implementations, ``eps`` is added to both denominators,
      :math:`|g_i'||g_j|` (of c) and :math:`|g_j|\sqrt{1-\rho_{ij}^2}`. It is absolute: for norms far below
      1e-4 the default disables the method. With 0 the formula is exact.

      With ``reduce=False`` the entries are :math:`w_t g_t`, whose sum is the update.

      A zero gradient has cosine 0 with all others and is not changed. If all gradients are zero, the
      update is 0. For opposite gradients the first update is 0, up to eps. If the EMA is exactly 1, the
      gradient is not changed, because no finite multiple of :math:`g_j` gives this cosine. The EMA of a
      pair with an absent task does not change. With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.grad_vaccine(2, ema_decay=0.5)
      >>> update, state = tx.update(jnp.array([[1., 0.], [-1., 1.]]), tx.init(jnp.zeros(2)))
      >>> print(np.asarray(update).round(3))
      [0.5 1.5]
      >>> print(np.asarray(state.rule_state.similarity_ema).round(3))
      [[[ 0.    -0.354]
        [-0.354  0.   ]]]

    References:
      Wang, Tsvetkov, Firat and Cao, Gradient Vaccine: Investigating and Improving Multi-task Optimization
      in Massively Multilingual Models, 2021, https://arxiv.org/abs/2010.05874
    """

    def init(num_tasks: int, dtype: DType) -> GradVaccineState:
        return GradVaccineState(jnp.zeros((num_tasks, num_tasks), dtype))

    def weigh(inputs: StepInputs, state: GradVaccineState) -> tuple[jax.Array, GradVaccineState]:
        norms, active = inputs.norms, inputs.active
        own, epsilon = jnp.arange(len(norms)), jnp.asarray(eps, norms.dtype)

        def rotate(
            component: jax.Array, others: jax.Array, memory: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            """Lengths and components are in units of |g_i|, at the start."""
            length, ema = memory
            goal, other_norms = ema[own, others], norms[others]
            c = _cosine(component, length, norms, other_norms, epsilon)
            amount = _amount(c, goal, length, other_norms, epsilon)
            amount = jnp.where((c < goal) & (others != own), amount, 0)
            # Only the part of g_i' along g_j changes.
            rest = jnp.maximum(length * length - component * component, 0)
            moves = active & active[others] & (others != own)
            ema = ema.at[own, others].set(move_average(goal, c, ema_decay, moves))
            return amount, (jnp.sqrt(rest + (component + amount) ** 2), ema)

        orders = projection_order("grad_vaccine", order, seed, inputs)
        start = (norms > 0).astype(norms.dtype), state.similarity_ema
        added, (_, ema) = add_in_order(inputs.cosine, orders, rotate, start)
        return projected_sum_weights(added, norms), GradVaccineState(ema)

    needs = frozenset({"gram"})
    return from_rule("grad_vaccine", tasks, WeightRule(needs, weigh, init, ("order",)), **options)


def _cosine(
    component: jax.Array,
    length: jax.Array,
    norms: jax.Array,
    other_norms: jax.Array,
    epsilon: jax.Array,
) -> jax.Array:
    """`g_i' . g_j / (|g_i'| |g_j| + epsilon)`, with numerator and denominator over `|g_i| |g_j|`."""
    nonzero = (norms > 0) & (other_norms > 0)
    relative = epsilon / jnp.where(nonzero, norms, 1) / jnp.where(nonzero, other_norms, 1)
    denominator = length + relative
    usable = nonzero & (denominator > 0)
    return jnp.clip(safe_divide(component, denominator, where=usable), -1, 1)


def _amount(
    c: jax.Array, goal: jax.Array, length: jax.Array, other_norms: jax.Array, epsilon: jax.Array
) -> jax.Array:
    """The multiple of the unit gradient j that rotates g_i' to the cosine `goal`; 0 if there is none."""
    sine = jnp.sqrt(jnp.maximum(1 - goal * goal, 0))
    denominator = sine + safe_divide(epsilon, other_norms)
    difference = goal * jnp.sqrt(jnp.maximum(1 - c * c, 0)) - c * sine
    possible = (other_norms > 0) & (sine > 0)
    return safe_divide(length * difference, denominator, where=possible)
