"""EMTL: equal relative contribution of tasks, by variance regularisation on top of MGDA."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_num_tasks, check_range
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule, rule_of
from mtl_optax.method import Method
from mtl_optax.methods.from_gram.mgda import mgda
from mtl_optax.solvers.kl_ball import kl_ball_mirror_step
from mtl_optax.solvers.log_weights import keep_log_shares


class EMTLState(NamedTuple):
    """What EMTL remembers.

    Attributes:
      log_p: `[T]`, logarithm of the adversary's distribution over tasks.
      weigher: the state of the weighting method underneath.
    """

    log_p: jax.Array
    weigher: Any


def emtl(
    num_tasks: int,
    *,
    epsilon: Any = 0.3,
    rho: Any = 0.3,
    kl_radius: Any = None,
    step_size: Any = 0.5,
    weigher: optax.GradientTransformation | None = None,
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Makes tasks contribute in proportion to their loss, by variance-regularised MGDA weights.

    A task's *relative rate* is its weighted loss over its gradient norm, :math:`R_t = \alpha_t L_t /
    |g_t|`; it is large where the task is far from done but hardly moves the shared parameters. An
    adversary :math:`p` in a KL ball around the uniform distribution leans towards large rates by mirror
    ascent, which bounds their variance.

    With :math:`\alpha` the weights of ``weigher``, ``step_size`` :math:`\eta`, ``epsilon``
    :math:`\epsilon`, and the smallest :math:`\mu \ge 0` that keeps :math:`KL(p\|u) \le` ``kl_radius``:

    .. math::
        p_t \leftarrow \frac{(p_t e^{\eta R_t})^{1/(1+\mu)}}{\sum_s (p_s e^{\eta R_s})^{1/(1+\mu)}},
        \qquad w_t = \tfrac1T \big(\epsilon\, \alpha_t + (1-\epsilon)\, p_t\, \alpha_t / |g_t|\big).

    The update is :math:`\sum_t w_t g_t` with the new :math:`p`; its length is the method's own (the
    second part is made of unit gradients). Equations 11 to 13 and algorithm 1 of the paper, which has no
    public code. Norms and :math:`\alpha` are constants to the differentiation. The paper weighs the
    losses, so heads are scaled as well: see `split_value_and_grad`. The KL divergence never exceeds
    log T, so ``rho`` >= (log T)^2 switches the ball off (T = 2: 0.481).

    Degenerate input: a zero gradient has rate 0 and no second part; MGDA gives it all the weight, and
    the update is 0. All zero: 0. T = 1: p = 1.

    Args:
      num_tasks: T, static.
      epsilon: share of the plain `weigher` update, in [0, 1]; 1 is the weigher over T.
      rho: trade-off of the regularisation; the ball's radius is its square root.
      kl_radius: the radius itself, instead of sqrt(rho).
      step_size: eta, of the adversary.
      weigher: any weighting method of this library; None is exact `mgda`.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. State: `EMTLState`. Needs `losses=`. Cost:
      one pass over the gradients for the Gram matrix, one for the sum, and a scalar root search.

    Raises:
      ValueError: for missing `losses` or numbers outside their range. TypeError: for a `weigher` that is
        no weighting method.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.emtl(2)
      >>> grads, losses = jnp.array([[2., 0.], [0., 1.]]), jnp.array([1., 3.])
      >>> _, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(np.asarray(jnp.exp(state.rule_state.log_p)).round(3))
      [0.24 0.76]

    References:
      Yuan et al., Equitable Multi-task Learning, 2023.
    """
    num_tasks = check_num_tasks("emtl", num_tasks)
    check_range(
        "emtl", epsilon=(epsilon, 0, 1), rho=(rho, 0, math.inf), step_size=(step_size, 0, math.inf)
    )
    inner = rule_of("emtl", mgda(num_tasks) if weigher is None else weigher)
    if inner.num_tasks != num_tasks:
        raise ValueError(
            f"emtl: the weigher has num_tasks={inner.num_tasks}, expected {num_tasks}."
        )

    def init(dtype: Any) -> EMTLState:
        log_p = jnp.full((num_tasks,), -math.log(num_tasks), dtype)
        return EMTLState(log_p, inner.init(dtype))

    def weigh(evidence: Evidence, state: EMTLState) -> tuple[jax.Array, EMTLState]:
        norms, active, dtype = evidence.norms, evidence.active, evidence.norms.dtype
        alpha, weigher_state = inner.weigh(evidence, state.weigher)
        alpha = jnp.where(active, alpha, 0).astype(dtype)
        nonzero = norms > 0
        per_unit = jnp.where(nonzero, alpha / jnp.where(nonzero, norms, 1), 0)
        radius = jnp.sqrt(jnp.asarray(rho, dtype)) if kl_radius is None else kl_radius
        scores = jnp.asarray(step_size, dtype) * per_unit * evidence.losses
        log_p = kl_ball_mirror_step(state.log_p, scores, jnp.asarray(radius, dtype), active)
        # An absent task keeps its place in the distribution until it is back.
        kept = keep_log_shares(log_p, state.log_p, active)
        share = jnp.asarray(epsilon, dtype)
        p = jnp.where(active, jnp.exp(log_p), 0)
        count = jnp.maximum(jnp.sum(active), 1).astype(dtype)
        weights = (share * alpha + (1 - share) * p * per_unit) / count
        return weights, EMTLState(kept, weigher_state)

    needs = inner.needs | {"losses", "norms"}
    rule = Rule("emtl", num_tasks, needs, init, weigh, inner.extra)
    return from_rule(rule, **options)


METHOD = Method(
    name="emtl",
    factory=emtl,
    needs=("losses", "gram"),
    family="from_gram",
    scale="own",
    reference="Yuan et al., Equitable Multi-Task Learning, 2023",
    make=emtl,
    properties=frozenset({"permutation", "split"}),
)
