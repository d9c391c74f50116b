"""Gradient Vaccine: gradients pulled towards the similarity that two tasks usually have."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mtl_optax.arguments import check_num_tasks, check_range
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.methods.from_gram.projection_order import (
    check_order,
    projection_order,
    raw_weights,
)


class GradVaccineState(NamedTuple):
    """Moving average of the cosines that task i (row) met with task j; starts at 0."""

    similarity_ema: jax.Array


class _Visits(NamedTuple):
    """Row i describes g_i' in units of |g_i|: coefficients added, components along all, length."""

    added: jax.Array
    along: jax.Array
    length: jax.Array
    similarity_ema: jax.Array


def grad_vaccine(
    num_tasks: int,
    *,
    beta: Any = 0.01,
    order: Literal["random", "cyclic"] = "random",
    seed: int = 0,
    eps: Any = 1e-8,
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Turns gradients that are less similar than usual, not only those that conflict.

    PCGrad acts on negative inner products only. Tasks that normally point the same way deserve more: a
    moving average of each pair's cosine is the goal, and a gradient below it is turned until it is met.

    For each task i, starting at :math:`g_i' = g_i`, for every other j in its order, with
    :math:`c = \cos(g_i', g_j)` and the average :math:`\rho_{ij}`:

    .. math::
        g_i' \leftarrow g_i' + \frac{|g_i'| \big(\rho_{ij}\sqrt{1-c^2} - c\sqrt{1-\rho_{ij}^2}\big)}
        {|g_j|\sqrt{1-\rho_{ij}^2}}\; g_j \quad \text{if } c < \rho_{ij}, \qquad
        \rho_{ij} \leftarrow (1-\beta)\rho_{ij} + \beta c,

    and the update is :math:`\sum_i g_i'`: sum-like. The average moves on every visit, with the cosine of
    the gradient as it is at that moment. Algorithm 1 of the paper, which has no public code of its own;
    as the widespread implementation does, ``eps`` is added to both denominators,
    :math:`|g_i'||g_j|` and :math:`|g_j|\sqrt{1-\rho^2}`. It depends on the scale of the gradients: far
    below norms of 1e-4 it switches the method off, and 0 is the formula as written.

    The paper prefers one average per layer: ``blocks="leaf"``.

    Degenerate input: a zero gradient has cosine 0 with all, and is not turned. All zero: 0. Opposite
    gradients at the first step: 0 (up to eps). A pair whose average is exactly 1 is left alone, since no
    finite amount of :math:`g_j` reaches it. T = 1: the gradient itself. With ``reduce=False`` the slots
    hold :math:`w_t g_t`, whose sum is the update.

    Args:
      num_tasks: T, static.
      beta: weight of the newest cosine in the average, in [0, 1].
      order: "random" shuffles the others for each task at every step; "cyclic" goes i+1, i+2, ...
      seed: of the shuffling.
      eps: added to the denominators (above); not negative.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`; its `update` takes `order=`, integers
      `[T, T]` that override the drawn order. State: `GradVaccineState`, `[T, T]` a block. Cost: one pass
      over the gradients for the Gram matrix, one for the sum, and T passes over a `[T, T]` array.

    Raises:
      ValueError: for an unknown `order`, one given to `update` that is not `[T, T]` integers, or numbers
        outside their range.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.grad_vaccine(2, beta=0.5)
      >>> update, state = tx.update(jnp.array([[1., 0.], [-1., 1.]]), tx.init(jnp.zeros(2)))
      >>> print(np.asarray(update).round(3))
      [0.5 1.5]
      >>> print(np.asarray(state.rule_state.similarity_ema).round(3))
      [[ 0.    -0.354]
       [-0.354  0.   ]]

    References:
      Wang et al., Gradient Vaccine: Investigating and Improving Multi-task Optimization in Massively
      Multilingual Models, 2021.
    """
    num_tasks = check_num_tasks("grad_vaccine", num_tasks)
    check_order("grad_vaccine", order)
    check_range("grad_vaccine", beta=(beta, 0, 1), eps=(eps, 0, float("inf")))
    tasks = jnp.arange(num_tasks, dtype=jnp.int32)

    def init(dtype: Any) -> GradVaccineState:
        return GradVaccineState(jnp.zeros((num_tasks, num_tasks), dtype))

    def weigh(evidence: Evidence, state: GradVaccineState) -> tuple[jax.Array, GradVaccineState]:
        cosine, norms, active = evidence.cosine, evidence.norms, evidence.active
        share, floor = jnp.asarray(beta, norms.dtype), jnp.asarray(eps, norms.dtype)

        def meet(visits: _Visits, others: jax.Array) -> tuple[_Visits, None]:
            one_hot = others[:, None] == tasks[None, :]
            pick = one_hot.astype(norms.dtype)
            ema = visits.similarity_ema
            component = jnp.sum(visits.along * pick, axis=1)
            goal = jnp.sum(ema * pick, axis=1)
            other_norms = norms[others]
            c = _cosine_with_floor(component, visits.length, norms, other_norms, floor)
            amount = _vaccine(c, goal, visits.length, other_norms, floor)
            amount = jnp.where((c < goal) & (others != tasks), amount, 0)
            # Split into the part along g_j, which changes, and the rest, which does not.
            rest = visits.length * visits.length - component * component
            length = jnp.sqrt(jnp.maximum(rest, 0) + (component + amount) ** 2)
            pair = one_hot & (active & active[others] & (others != tasks))[:, None]
            moved = (1 - share) * ema + share * c[:, None]
            return _Visits(
                visits.added + amount[:, None] * pick,
                visits.along + amount[:, None] * cosine[others],
                length,
                jnp.where(pair, moved, ema),
            ), None

        start = _Visits(
            jnp.zeros_like(cosine), cosine, (norms > 0).astype(norms.dtype), state.similarity_ema
        )
        orders = projection_order("grad_vaccine", num_tasks, order, seed, evidence)
        end, _ = lax.scan(meet, start, orders.T)
        return raw_weights(end.added, norms), GradVaccineState(end.similarity_ema)

    needs = frozenset({"gram"})
    return from_rule(Rule("grad_vaccine", num_tasks, needs, init, weigh, ("order",)), **options)


def _cosine_with_floor(
    component: jax.Array,
    length: jax.Array,
    norms: jax.Array,
    other_norms: jax.Array,
    floor: jax.Array,
) -> jax.Array:
    """`g_i' . g_j / (|g_i'| |g_j| + floor)`, with numerator and denominator over `|g_i| |g_j|`."""
    nonzero = (norms > 0) & (other_norms > 0)
    in_units = floor / jnp.where(nonzero, norms, 1) / jnp.where(nonzero, other_norms, 1)
    denominator = length + in_units
    usable = nonzero & (denominator > 0)
    return jnp.where(usable, jnp.clip(component / jnp.where(usable, denominator, 1), -1, 1), 0)


def _vaccine(
    c: jax.Array, goal: jax.Array, length: jax.Array, other_norms: jax.Array, floor: jax.Array
) -> jax.Array:
    """How much of the unit gradient j turns g_i' to the cosine `goal`; 0 where nothing can."""
    across = jnp.sqrt(jnp.maximum(1 - goal * goal, 0))
    nonzero = other_norms > 0
    denominator = across + floor / jnp.where(nonzero, other_norms, 1)
    possible = nonzero & (across > 0)
    turn = goal * jnp.sqrt(jnp.maximum(1 - c * c, 0)) - c * across
    return jnp.where(possible, length * turn / jnp.where(possible, denominator, 1), 0)


METHOD = Method(
    name="grad_vaccine",
    factory=grad_vaccine,
    needs=("gram",),
    family="from_gram",
    scale="sum",
    reference="Wang et al., Gradient Vaccine, 2021",
    make=grad_vaccine,
    properties=frozenset({"split"}),
    random=True,
)
