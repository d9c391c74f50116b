"""MultiBalance: simplex weights by one projected gradient step per update."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from mtl_optax.core.factory import Decay, Nonnegative, factory
from mtl_optax.core.types import DType, Number, PerTask
from mtl_optax.core.validation import task_numbers
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import move_average, safe_divide
from mtl_optax.solvers.cosine import gram_product
from mtl_optax.solvers.preference import active_preference
from mtl_optax.solvers.simplex import keep_shares, project_onto_simplex, renormalize


class MultiBalanceState(NamedTuple):
    """State of `multibalance`, `[T]` per block.

    Attributes:
      norm_ema: EMA of each task's gradient norm.
      correction: the bias correction of each EMA: `1 - ema_decay ** k` after k steps.
      simplex_weights: lambda; starts uniform.
    """

    norm_ema: jax.Array
    correction: jax.Array
    simplex_weights: jax.Array


@factory
def multibalance(
    tasks: int | Collection[str],
    *,
    weight_lr: Nonnegative = 1.0,
    prior: PerTask | None = None,
    prior_strength: Nonnegative = 0.1,
    ema_decay: Decay = 0.9,
    direction: Literal["cosine", "gradient"] = "cosine",
    ema_init: Literal["first", "zeros", "debias"] = "first",
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Learns simplex weights by one projected gradient step per update towards the min-norm point.

    This is a stochastic MGDA for large models. It does not solve for the weights of each batch, and it
    rescales gradients to the EMA of their norm, which limits the effect of a batch with very large
    gradients. It is made for the shared representation (`fork`), where it needs no additional backward
    pass, and also works on parameters.

    With :math:`n_t = |g_t|`, ``ema_decay`` :math:`1-\gamma`, ``weight_lr`` :math:`\beta`, ``prior``
    :math:`\lambda_0` and ``prior_strength`` :math:`\rho`:

    .. math::
        u_t \leftarrow (1-\gamma) u_t + \gamma n_t, \quad v_t = u_t g_t / n_t, \quad
        \lambda \leftarrow \Pi_\Delta(\lambda - \beta\, q), \quad
        q_t = \cos(v_t, y) \text{ or } v_t \cdot y, \quad y = \sum_s (\lambda_s + \rho \lambda_{0,s}) v_s,

    and the update is :math:`\sum_t \lambda_t v_t` with the new :math:`\lambda`. Scale: mean-like, about
    1/T of the gradient of the summed losses. Algorithm 3 of the paper.

    Args:
      tasks: T, or the task names.
      weight_lr: beta, the step size of the weights.
      prior: lambda_0, `[T]` or a dictionary by task name; None means 1/T for every task.
      prior_strength: rho; the prior affects the update only through the step of the weights.
      ema_decay: 1 - gamma, in [0, 1); 0 uses the current norm, so that v = g.
      direction: "gradient" is the inner product in equation 12; "cosine" is the form in production
        (section 5), with learning rates from 1 (ads) to 5 (feeds).
      ema_init: the initial value of u, which the paper does not specify: "first" is the first norm,
        "zeros" is 0, and "debias" is 0 with a division of u by `1 - ema_decay ** k`.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `MultiBalanceState`. Cost: one pass over the gradients for the Gram matrix,
      one for the sum.

    Raises:
      ValueError: if `direction` or `ema_init` is unknown, `prior` does not have T entries, or a number is
        outside its range.

    Notes:
      With ``update_every``, a reused weight is at most :math:`1/\gamma` times the weight for the current
      norms and the stored :math:`\lambda`.

      A zero gradient has :math:`v_t = 0` and cosine 0. If all gradients are zero, the update is 0 and
      lambda does not change. The average and the weight of an absent task do not change. With one task,
      the update is its gradient, rescaled to the EMA of its norm.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.multibalance(2, weight_lr=0.1)
      >>> update, state = tx.update(jnp.array([[4., 0.], [0., 1.]]), tx.init(jnp.zeros(2)))
      >>> print(np.asarray(state.rule_state.simplex_weights).round(3))
      [[0.464 0.536]]

    References:
      He, Chen, Xu, Cai, You, Cao, Huang, Yang, Liu, Liu, Jin, Park, Long and Feng, MultiBalance:
      Multi-Objective Gradient Balancing in Industrial-Scale Multi-Task Recommendation System, 2024,
      https://arxiv.org/abs/2411.11871
    """
    vector = task_numbers("multibalance", "prior", prior, tasks, 0)

    def init(num_tasks: int, dtype: DType) -> MultiBalanceState:
        zeros = jnp.zeros((num_tasks,), dtype)
        return MultiBalanceState(zeros, zeros, jnp.full((num_tasks,), 1 / num_tasks, dtype))

    def weigh(inputs: StepInputs, state: MultiBalanceState) -> tuple[jax.Array, MultiBalanceState]:
        norms, active, dtype = inputs.norms, inputs.active, inputs.norms.dtype
        ema, correction, smooth = _smooth_norms(norms, active, state, ema_decay, ema_init)
        old = renormalize(state.simplex_weights, active)
        strength = jnp.asarray(prior_strength, dtype)
        y = old + strength * active_preference(vector, active, dtype)
        if direction == "gradient":
            step = gram_product(inputs.cosine, smooth, y)
        else:
            # In units of the largest smoothed norm the squares cannot overflow.
            lengths = safe_divide(smooth, jnp.max(smooth))
            along = gram_product(inputs.cosine, lengths, y)
            length_of_y = jnp.sqrt(jnp.maximum(jnp.sum(along * y), 0))
            step = safe_divide(along, lengths * length_of_y)
        new = project_onto_simplex(old - jnp.asarray(weight_lr, dtype) * step, active)
        kept = keep_shares(new, state.simplex_weights, active)
        return new * safe_divide(smooth, norms), MultiBalanceState(ema, correction, kept)

    def bound(inputs: StepInputs, state: MultiBalanceState) -> jax.Array:
        """The weights for the current norms and the stored lambda, over `1 - ema_decay`."""
        norms, active = inputs.norms, inputs.active
        _, _, smooth = _smooth_norms(norms, active, state, ema_decay, ema_init)
        least = (1 - jnp.asarray(ema_decay, norms.dtype)) * norms
        shares = renormalize(state.simplex_weights, active)
        return safe_divide(shares * smooth, least, jnp.inf)

    rule = WeightRule(frozenset({"gram"}), weigh, init, bound=bound)
    return from_rule("multibalance", tasks, rule, **options)


def _smooth_norms(
    norms: jax.Array, active: jax.Array, state: MultiBalanceState, ema_decay: Number, ema_init: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the new `norm_ema` and `correction`, and the smoothed norms u; all are `[T]`."""
    decay = jnp.asarray(ema_decay, norms.dtype)
    if ema_init == "first":
        decay = jnp.where(state.correction > 0, decay, 0)
    ema = move_average(state.norm_ema, norms, decay, active)
    correction = move_average(state.correction, 1, decay, active)
    if ema_init == "debias":
        return ema, correction, safe_divide(ema, correction, where=active & (correction > 0))
    return ema, correction, jnp.where(active, ema, 0)
