"""MultiBalance: simplex weights that learn from step to step, made for the representation."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_num_tasks, check_range
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.solvers.cosine import uniform_weights
from mtl_optax.solvers.simplex import keep_shares, project_onto_simplex, renormalize


class MultiBalanceState(NamedTuple):
    """What MultiBalance remembers.

    Attributes:
      norm_ema: `[T]`, moving average of each task's gradient norm.
      seen: `[T]`, the share of each average that is data: `1 - ema_decay ** k` after k steps.
      simplex_weights: `[T]`, lambda.
    """

    norm_ema: jax.Array
    seen: jax.Array
    simplex_weights: jax.Array


def multibalance(
    num_tasks: int,
    *,
    weight_lr: Any = 1.0,
    prior: Any = None,
    prior_strength: Any = 0.1,
    ema_decay: Any = 0.9,
    direction: Literal["cosine", "gradient"] = "cosine",
    ema_init: Literal["first", "zeros", "debias"] = "first",
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Learns simplex weights by one projected gradient step towards the min-norm point.

    Stochastic MGDA for large models: instead of solving for the min-norm combination of this batch's
    gradients, the weights take one step towards it, and gradients are first rescaled to the moving
    average of their norm, so that a batch with an outlying magnitude cannot throw them. Made for the
    shared representation (`fork`), where it costs no backward pass; works on parameters too.

    With :math:`n_t = |g_t|`, ``ema_decay`` :math:`1-\gamma`, ``weight_lr`` :math:`\beta`, ``prior``
    :math:`\lambda_0` and ``prior_strength`` :math:`\rho`:

    .. math::
        u_t \leftarrow (1-\gamma) u_t + \gamma n_t, \quad v_t = u_t g_t / n_t, \quad
        \lambda \leftarrow \Pi_\Delta(\lambda - \beta\, q), \quad
        q_t = \cos(v_t, y) \text{ or } v_t \cdot y, \quad y = \sum_s (\lambda_s + \rho \lambda_{0,s}) v_s,

    and the update is :math:`\sum_t \lambda_t v_t` with the new :math:`\lambda`: mean-like, about 1/T of
    the gradient of the summed losses. Algorithm 3 of the paper; ``direction="gradient"`` is its
    equation 12 as written, "cosine" the form its section 5 uses in production, with learning rates of 1
    (ads) to 5 (feeds). The paper leaves open how :math:`u` starts: ``ema_init``.

    Degenerate input: a zero gradient has :math:`v_t = 0` and cosine 0. All zero: the update is 0 and
    only the prior's pull is gone. T = 1: the gradient rescaled to its moving average.

    Args:
      num_tasks: T, static.
      weight_lr: beta, step size of the weights.
      prior: `[T]`, lambda_0; None is 1/T each.
      prior_strength: rho, the pull of the prior (on the step of the weights, not on the update).
      ema_decay: 1 - gamma, in [0, 1]; 0 uses the present norm, so that v = g.
      direction: "cosine" or "gradient" (above).
      ema_init: "first": u starts at the first norm. "zeros": at 0, uncorrected. "debias": at 0, divided
        by `1 - ema_decay ** k`.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. State: `MultiBalanceState`. Cost: one pass
      over the gradients for the Gram matrix, one for the sum.

    Raises:
      ValueError: for unknown choices, a prior without T entries, or numbers outside their range.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.multibalance(2, weight_lr=0.1)
      >>> update, state = tx.update(jnp.array([[4., 0.], [0., 1.]]), tx.init(jnp.zeros(2)))
      >>> print(np.asarray(state.rule_state.simplex_weights).round(3))
      [0.464 0.536]

    References:
      He, Chen, Xu et al., MultiBalance: Multi-Objective Gradient Balancing in Industrial-Scale
      Multi-Task Recommendation System, 2024.
    """
    num_tasks = check_num_tasks("multibalance", num_tasks)
    if direction not in ("cosine", "gradient"):
        raise ValueError(
            f'multibalance: direction must be "cosine" or "gradient"; found {direction!r}.'
        )
    if ema_init not in ("first", "zeros", "debias"):
        raise ValueError(
            f'multibalance: ema_init must be "first", "zeros" or "debias"; found {ema_init!r}.'
        )
    prior = None if prior is None else jnp.asarray(prior)
    if prior is not None and prior.shape != (num_tasks,):
        raise ValueError(
            f"multibalance: prior must have shape ({num_tasks},); found {prior.shape}."
        )
    check_range("multibalance", ema_decay=(ema_decay, 0, 1))

    def init(dtype: Any) -> MultiBalanceState:
        zeros = jnp.zeros((num_tasks,), dtype)
        return MultiBalanceState(zeros, zeros, jnp.full((num_tasks,), 1 / num_tasks, dtype))

    def weigh(evidence: Evidence, state: MultiBalanceState) -> tuple[jax.Array, MultiBalanceState]:
        norms, active, dtype = evidence.norms, evidence.active, evidence.norms.dtype
        ema, seen, smooth = _smooth_norms(norms, active, state, ema_decay, ema_init)
        old = renormalize(state.simplex_weights, active)
        if prior is None:
            prior_weights = uniform_weights(active, dtype)
        else:
            prior_weights = jnp.where(active, prior.astype(dtype), 0)
        # In units of the largest smoothed norm the squares cannot overflow.
        unit = jnp.max(smooth)
        lengths = smooth / jnp.where(unit > 0, unit, 1)
        inner = evidence.cosine * lengths[:, None] * lengths[None, :]
        y = old + jnp.asarray(prior_strength, dtype) * prior_weights
        along = jnp.sum(inner * y[None, :], axis=1)
        if direction == "cosine":
            lengths_of_both = lengths * jnp.sqrt(jnp.maximum(jnp.sum(along * y), 0))
            nonzero = lengths_of_both > 0
            step = jnp.where(nonzero, along / jnp.where(nonzero, lengths_of_both, 1), 0)
        else:
            # A step that would overflow reaches a vertex of the simplex long before.
            limit = jnp.sqrt(jnp.asarray(jnp.finfo(dtype).max, dtype)) / 4
            step = along * jnp.minimum(unit, limit) ** 2
        new = project_onto_simplex(old - jnp.asarray(weight_lr, dtype) * step, active)
        kept = keep_shares(new, state.simplex_weights, active)
        rescale = jnp.where(norms > 0, smooth / jnp.where(norms > 0, norms, 1), 0)
        return new * rescale, MultiBalanceState(ema, seen, kept)

    rule = Rule("multibalance", num_tasks, frozenset({"gram"}), init, weigh)
    return from_rule(rule, **options)


def _smooth_norms(
    norms: jax.Array, active: jax.Array, state: MultiBalanceState, ema_decay: Any, ema_init: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The stored averages, the share of them that is data, and the averages to use."""
    decay = jnp.asarray(ema_decay, norms.dtype)
    moved = decay * state.norm_ema + (1 - decay) * norms
    if ema_init == "first":
        moved = jnp.where(state.seen > 0, moved, norms)
    ema = jnp.where(active, moved, state.norm_ema)
    first = ema_init == "first"
    share = jnp.ones_like(norms) if first else decay * state.seen + (1 - decay)
    seen = jnp.where(active, share, state.seen)
    if ema_init != "debias":
        return ema, seen, jnp.where(active, ema, 0)
    return ema, seen, jnp.where(active & (seen > 0), ema / jnp.where(seen > 0, seen, 1), 0)


METHOD = Method(
    name="multibalance",
    factory=multibalance,
    needs=("gram",),
    family="from_gram",
    scale="mean",
    reference="He et al., MultiBalance, 2024",
    make=multibalance,
    properties=frozenset({"permutation", "scale", "split"}),
)
