"""GO4Align: one weight for each group of tasks of similar risk."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_integer, check_num_tasks, check_range
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.solvers.k_means import k_means_on_line
from mtl_optax.solvers.log_weights import exp_weights, keep_log_shares, log_softmax, magnitudes


class GO4AlignState(NamedTuple):
    """`[T]`, logarithm of the running distribution over tasks; starts uniform."""

    log_q: jax.Array


def go4align(
    num_tasks: int,
    *,
    num_groups: int,
    step_size: Any = 1e-4,
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Groups tasks by a running measure of their risk and gives each group one weight.

    Many tasks that progress alike are aligned by a common weight. With ``step_size`` :math:`\beta`:

    .. math::
        q_t \leftarrow \frac{q_t e^{-\beta L_t}}{\sum_s q_s e^{-\beta L_s}}, \qquad
        r_t = q_t \frac{\sum_s L_s}{L_t}, \qquad
        w_t = \text{mean of } r \text{ over the group of } t,

    with groups by k-means on r. The scale is the method's own. Algorithm 1 of the paper. The authors'
    code has one group by default, so that all tasks share one weight: here ``num_groups`` must be said.
    Its k-means starts at random on the host (and its import is commented out); here it is the exact
    optimum in one dimension, by dynamic programming on the device.

    Degenerate input: a negative loss counts by its size; a loss of 0 has weight 0 and joins no group. No
    r exceeds 1.8e19 (float32). Where tied groupings are equally good one of them is taken. T = 1: the
    gradient itself.

    Args:
      num_tasks: T, static.
      num_groups: K, static, 1 to T.
      step_size: beta >= 0, of the distribution.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Needs `losses=`. State: `GO4AlignState`.
      Cost: O(T^2 K).

    Raises:
      ValueError: for numbers outside their range or missing `losses`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.go4align(3, num_groups=2)
      >>> losses = jnp.array([4., 5., 0.5])
      >>> print(np.asarray(tx.update(jnp.eye(3), tx.init(jnp.zeros(3)), losses=losses)[0]).round(2))
      [0.71 0.71 6.34]

    References:
      Shen et al., GO4Align: Group Optimization for Multi-Task Alignment, 2024.
    """
    num_tasks = check_num_tasks("go4align", num_tasks)
    check_range("go4align", step_size=(step_size, 0, math.inf))
    check_integer("go4align", "num_groups", num_groups, 1, num_tasks)

    def init(dtype: Any) -> GO4AlignState:
        return GO4AlignState(jnp.full((num_tasks,), -math.log(num_tasks), dtype))

    def weigh(evidence: Evidence, state: GO4AlignState) -> tuple[jax.Array, GO4AlignState]:
        active, losses = evidence.active, evidence.losses
        beta = jnp.asarray(step_size, losses.dtype)
        log_q = log_softmax(state.log_q - beta * losses, active)
        sizes, usable = magnitudes(losses, active)
        log_shares = log_softmax(jnp.log(sizes), usable)  # log of L_t / sum L
        relative = exp_weights(log_q - log_shares, usable)
        weights = k_means_on_line(relative, usable, num_groups)
        return weights, GO4AlignState(keep_log_shares(log_q, state.log_q, active))

    return from_rule(Rule("go4align", num_tasks, frozenset({"losses"}), init, weigh), **options)


def _with_two_groups(num_tasks: int) -> optax.GradientTransformationExtraArgs:
    return go4align(num_tasks, num_groups=min(2, num_tasks))


METHOD = Method(
    name="go4align",
    factory=go4align,
    needs=("losses",),
    family="from_losses",
    scale="own",
    reference="Shen et al., GO4Align, 2024",
    make=_with_two_groups,
    properties=frozenset({"permutation", "scale", "split"}),
)
