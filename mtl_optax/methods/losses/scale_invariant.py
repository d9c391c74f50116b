"""Scale-invariant weighting: the sum of the logarithms of the losses."""

from __future__ import annotations

from collections.abc import Collection
from typing import Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import Nonnegative, factory
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.log_weights import largest_weight


@factory
def scale_invariant(
    tasks: int | Collection[str], *, eps: Nonnegative = 0.0, **options: Unpack[MethodOptions]
) -> Method:
    r"""Minimises the sum of the logarithms of the losses.

    The update then does not depend on the unit of a loss. With ``eps`` :math:`\epsilon`,
    :math:`\sum_t \log(L_t + \epsilon)` has the gradient :math:`\sum_t w_t g_t` with

    .. math:: w_t = 1 / (L_t + \epsilon).

    Scale: the method's own. This is a baseline in section 5 of the Nash-MTL paper, which has no ``eps``.

    Args:
      tasks: T, or the task names.
      eps: added to each loss, >= 0.
      **options: see `MethodOptions`.

    Returns:
      A `Method` whose rule has no state. `update` needs `losses=`. Cost: O(T).

    Raises:
      ValueError: if `eps` is negative.

    Notes:
      A negative loss has the weight :math:`1/(|L_t| + \epsilon)`, so that it still decreases; a loss of 0
      without ``eps`` has weight 0. Weights are at most 1.8e19 (float32). With one task, the update is its
      gradient divided by the loss.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.scale_invariant(("buy", "click"))
      >>> losses = {"buy": 4.0, "click": 0.5}
      >>> tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), losses=losses)[0].tolist()
      [0.25, 2.0]

    References:
      Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik and Fetaya, Multi-Task Learning as a
      Bargaining Game, 2022, https://arxiv.org/abs/2202.01017
    """

    def weigh(inputs: StepInputs, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        dtype = inputs.losses.dtype
        sizes = jnp.abs(inputs.losses) + jnp.asarray(eps, dtype)
        bounded = jnp.maximum(sizes, 1 / largest_weight(dtype))
        return jnp.where(sizes >= jnp.finfo(dtype).tiny, 1 / bounded, 0), state

    return from_rule("scale_invariant", tasks, WeightRule(frozenset({"losses"}), weigh), **options)
