"""Uncertainty weighting: each task's noise level is learned with the network."""

from __future__ import annotations

import math
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_num_tasks
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.solvers.log_weights import largest_weight
from mtl_optax.trained_values import TrainedState, start, train

_FORMS = ("half_logvar", "logvar", "sigma", "half_sigma")


def uncertainty(
    num_tasks: int,
    *,
    form: Literal["half_logvar", "logvar", "sigma", "half_sigma"] = "half_logvar",
    init: Any = 0.0,
    optimizer: optax.GradientTransformation = optax.adam(1e-2),
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Weighs each loss by the inverse of a learned noise variance.

    Losses of different units (metres, nats, pixels) cannot simply be added. Each task gets a number
    :math:`s_t` (log variance) or :math:`\sigma_t` (standard deviation), trained to minimise, by ``form``:

    .. math::
        \text{half\_logvar: } \tfrac12 e^{-s} L + \tfrac12 s, \quad
        \text{logvar: } e^{-s} L + s, \quad
        \text{sigma: } L/\sigma^2 + \log\sigma, \quad
        \text{half\_sigma: } L/(2\sigma^2) + \log\sigma.

    The weights are the derivatives of these by L: :math:`e^{-s}/2`, :math:`e^{-s}`,
    :math:`1/\sigma^2`, :math:`1/(2\sigma^2)`. They are used first and trained after. The scale is the
    method's own: at the optimum every weighted loss is 1/2 (logvar: 1). half_logvar is the paper's
    regression form (equation 7), sigma the form of its classification likelihood; the half forms take
    half the step of the others at the same learning rate, which is why published programs differ.

    Degenerate input: weights stay between the inverse of 1.8e19 and 1.8e19 (float32), so that a loss of
    0, whose optimal weight is infinite, keeps everything finite. A negative loss drives its weight up to
    that bound: add a constant to losses that can be negative. T = 1: one weight.

    Args:
      num_tasks: T, static.
      form: the objective, see above.
      init: first value of s (or of sigma, where it must be positive; 1 is neutral).
      optimizer: trains the numbers; any optax optimizer.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Needs `losses=`. State:
      `rule_state.values`, `[T]`. Cost: O(T).

    Raises:
      ValueError: for an unknown form, a sigma that does not start positive, or missing `losses`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.uncertainty(2)
      >>> grads, losses = jnp.eye(2), jnp.array([4., 0.1])
      >>> updates, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(updates, np.asarray(state.rule_state.values).round(3))
      [0.5 0.5] [ 0.01 -0.01]

    References:
      Kendall, Gal and Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry
      and Semantics, 2018.
    """
    num_tasks = check_num_tasks("uncertainty", num_tasks)
    if form not in _FORMS:
        raise ValueError(f"uncertainty: form must be one of {', '.join(_FORMS)}; found {form!r}.")
    logarithmic = form in ("half_logvar", "logvar")
    if not logarithmic and isinstance(init, (int, float)) and init <= 0:
        raise ValueError(
            f"uncertainty: the form {form!r} trains a standard deviation, which must start positive; "
            f"found init={init}. init=1.0 is neutral."
        )
    factor = 0.5 if form.startswith("half") else 1.0

    def first(dtype: Any) -> TrainedState:
        values = jnp.broadcast_to(jnp.asarray(init, dtype), (num_tasks,))
        return start(optimizer, values)

    def weigh(evidence: Evidence, state: TrainedState) -> tuple[jax.Array, TrainedState]:
        losses, value = evidence.losses, state.values
        largest = largest_weight(losses.dtype)
        if logarithmic:
            weights = factor * jnp.exp(-value)
            gradient = factor - weights * losses
            high = math.log(largest)
            low = -high
        else:
            weights = factor / (value * value)
            gradient = 1 / value - 2 * weights * losses / value
            low, high = largest**-0.5, largest**0.5
        return weights, train(optimizer, state, gradient, evidence.active, low, high)

    rule = Rule("uncertainty", num_tasks, frozenset({"losses"}), first, weigh)
    return from_rule(rule, **options)


METHOD = Method(
    name="uncertainty",
    factory=uncertainty,
    needs=("losses",),
    family="from_losses",
    scale="own",
    reference="Kendall et al., Multi-Task Learning Using Uncertainty, 2018",
    make=uncertainty,
    properties=frozenset({"permutation", "scale", "split"}),
)
