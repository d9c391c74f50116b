"""Uncertainty weighting: learns the noise level of each task with the network."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_optax.core.factory import Transformation, factory
from mtl_optax.core.trained_values import TrainedState, start, train
from mtl_optax.core.types import DType, Number
from mtl_optax.core.validation import task_numbers
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.log_weights import largest_weight


@factory
def uncertainty(
    tasks: int | Collection[str],
    *,
    form: Literal["half_logvar", "logvar", "sigma", "half_sigma"] = "half_logvar",
    init: Number = 0.0,
    optimizer: Transformation = optax.adam(1e-2),
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Weighs each loss by the inverse of a learned noise variance.

    Losses in different units (metres, nats, pixels) have no common scale. Each task gets a log variance
    :math:`s_t` or a standard deviation :math:`\sigma_t`, trained to minimise, by ``form``:

    .. math::
        \text{half\_logvar: } \tfrac12 e^{-s} L + \tfrac12 s, \quad
        \text{logvar: } e^{-s} L + s, \quad
        \text{sigma: } L/\sigma^2 + \log\sigma, \quad
        \text{half\_sigma: } L/(2\sigma^2) + \log\sigma.

    The weights are the derivatives with respect to L: :math:`e^{-s}/2`, :math:`e^{-s}`,
    :math:`1/\sigma^2`, :math:`1/(2\sigma^2)`, at the values before the step. Scale: the method's own; at
    the optimum every weighted loss is 1/2 (logvar: 1). The form half_logvar is the paper's regression
    form (equation 7), and sigma is the form of its classification likelihood.

    Args:
      tasks: T, or the task names.
      form: the objective (above).
      init: first value of s, or of sigma (positive; 1 is neutral): a number, `[T]`, or a dictionary by task
        name.
      optimizer: any optax optimizer, which trains s or sigma.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `TrainedState` (s or sigma). `update` needs `losses=`. Cost: O(T).

    Raises:
      ValueError: if the form is unknown, or the initial sigma is not positive.

    Notes:
      Published programs differ in the form. The gradient of logvar is twice that of half_logvar, and so is
      the step of an optimizer such as SGD.

      Weights are limited to [1/1.8e19, 1.8e19] (float32), because the optimal weight of a loss of 0 is
      infinite, and the weight of a negative loss increases up to the bound. Add a constant to losses that
      can be negative. The trained value of an absent task does not change.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.uncertainty(2)
      >>> grads, losses = jnp.eye(2), jnp.array([4., 0.1])
      >>> update, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(update, np.asarray(state.rule_state.values).round(3))
      [0.5 0.5] [[ 0.01 -0.01]]

    References:
      Kendall, Gal and Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry
      and Semantics, 2018, https://arxiv.org/abs/1705.07115
    """
    logarithmic = form in ("half_logvar", "logvar")
    init = task_numbers("uncertainty", "init", init, tasks, or_one=True)
    if not logarithmic and not isinstance(init, jax.Array) and np.any(np.less_equal(init, 0)):
        raise ValueError(
            f"uncertainty: the form {form!r} trains a standard deviation, which must start positive; "
            f"found init={init}. init=1.0 is neutral."
        )
    factor = 0.5 if form.startswith("half") else 1.0

    def init_state(num_tasks: int, dtype: DType) -> TrainedState:
        return start(optimizer, jnp.asarray(init, dtype))

    def weigh(inputs: StepInputs, state: TrainedState) -> tuple[jax.Array, TrainedState]:
        losses, value = inputs.losses, state.values
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
        return weights, train(optimizer, state, gradient, inputs.active, low, high)

    rule = WeightRule(frozenset({"losses"}), weigh, init_state)
    return from_rule("uncertainty", tasks, rule, **options)
