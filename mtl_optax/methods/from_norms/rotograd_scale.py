"""RotoGrad's scaling: all gradients at one norm, that of the task that converges slowest."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_integer, check_num_tasks
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method


class RotoGradState(NamedTuple):
    """Each task's reference norm, `[T]`; 0 until its gradient was not."""

    initial_norms: jax.Array


def rotograd_scale(
    num_tasks: int, *, burn_in: int = 20, **options: Unpack[WeightingOptions]
) -> optax.GradientTransformationExtraArgs:
    r"""Gives all task gradients one norm, which leans to the tasks whose gradients shrank least.

    Gradients of different norm make the largest task the only one. Equal norms need a common value; the
    mean of all weighted by how slowly each task's gradient has shrunk since the start keeps the step
    long enough for the task that is behind.

    .. math::
        \alpha_t = \frac{n_t / n_t^0}{\sum_s n_s / n_s^0}, \qquad C = \sum_t \alpha_t n_t, \qquad
        w_t = C / n_t,

    with :math:`n_t^0` the norm at the start. The update is :math:`\sum_t w_t g_t`: sum-like. Section 4.1
    of the paper, meant for the representation (`fork`). The paper's second half, one trained rotation a
    task that turns the representation before each head, is extra parameters of the model and an optimizer
    of their own; it is no transformation of gradients and not part of this function.

    As in the authors' program the reference norms are taken again once, at update number ``burn_in``,
    because the first batches' norms are untypical. There a gradient that starts at 0 makes its ratio
    huge for good; here the first norm above 0 is the reference.

    Degenerate input: a zero gradient has :math:`\alpha = 0` and contributes nothing. All zero: the update
    is 0. T = 1: the gradient itself.

    Args:
      num_tasks: T, static.
      burn_in: the update, counted from 0, that renews the reference norms; 0 keeps the first ones.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. State: `RotoGradState`. Cost: one pass over
      the gradients for the norms, one for the sum.

    Raises:
      ValueError: for a `burn_in` below 0.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.rotograd_scale(2)
      >>> update, _ = tx.update(jnp.array([[3., 0.], [0., 1.]]), tx.init(jnp.zeros(2)))
      >>> np.array(update, float).round(3).tolist()
      [2.0, 2.0]

    References:
      Javaloy and Valera, RotoGrad: Gradient Homogenization in Multitask Learning, 2022.
    """
    num_tasks = check_num_tasks("rotograd_scale", num_tasks)
    check_integer("rotograd_scale", "burn_in", burn_in, 0)

    def init(dtype: Any) -> RotoGradState:
        return RotoGradState(jnp.zeros((num_tasks,), dtype))

    def weigh(evidence: Evidence, state: RotoGradState) -> tuple[jax.Array, RotoGradState]:
        norms = evidence.norms
        positive = norms > 0
        renew = (state.initial_norms == 0) | (evidence.step == burn_in)
        initial = jnp.where(evidence.active & positive & renew, norms, state.initial_norms)
        ratios = jnp.where(positive, norms / jnp.where(positive, initial, 1), 0)
        total = jnp.sum(ratios)
        shares = ratios / jnp.where(total > 0, total, 1)
        common = jnp.sum(shares * norms)
        weights = jnp.where(positive, common / jnp.where(positive, norms, 1), 0)
        return weights, RotoGradState(initial)

    rule = Rule("rotograd_scale", num_tasks, frozenset({"norms"}), init, weigh)
    return from_rule(rule, **options)


METHOD = Method(
    name="rotograd_scale",
    factory=rotograd_scale,
    needs=("norms",),
    family="from_norms",
    scale="sum",
    reference="Javaloy and Valera, RotoGrad, 2022",
    make=rotograd_scale,
    properties=frozenset({"permutation", "scale", "split"}),
)
