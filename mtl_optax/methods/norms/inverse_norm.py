"""Inverse gradient norms: every task's weighted gradient has the same norm."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from mtl_optax.core.factory import Decay, Nonnegative, factory
from mtl_optax.core.types import DType
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import mean_active, move_average, safe_divide
from mtl_optax.solvers.log_weights import clip_weights


class InverseNormState(NamedTuple):
    """State of `inverse_norm`.

    Attributes:
      weight_ema: `[T]`, the EMA of the weights, which starts at 1.
    """

    weight_ema: jax.Array


@factory
def inverse_norm(
    tasks: int | Collection[str],
    *,
    reference: Literal["mean", "rms"] = "mean",
    power: Nonnegative = 1.0,
    ema_decay: Decay = 0.9,
    eps: Nonnegative = 0.0,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Weighs each task by the inverse of its gradient norm.

    The losses of a physics-informed network (equation, boundary, initial condition) have gradients that
    differ by orders of magnitude, and the largest one dominates. With weights inverse to the norms, all
    weighted gradients have the same norm.

    With :math:`n_t` the norm of task t's gradient, ``power`` p and ``ema_decay`` :math:`\beta`:

    .. math::
        \hat w_t = \Big( \frac{\bar n}{n_t + \epsilon \bar n} \Big)^p, \qquad
        w_t \leftarrow \beta w_t + (1 - \beta) \hat w_t, \qquad update = \sum_t w_t g_t,

    where :math:`\bar n` is the mean of the norms (``reference="mean"``) or their root mean square
    ("rms"). The weights start at 1, and the update uses the new weights. Scale: sum-like. Section 4 of
    the expert's guide, "grad norm" weighting.

    Args:
      tasks: T, or the task names.
      reference: the common norm.
      power: p >= 0; 0 is the plain sum.
      ema_decay: beta in [0, 1); the average is over the weights, not over the norms.
      eps: relative bound on the weights, >= 0: no weight exceeds ``1 / eps`` to the power p.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `InverseNormState`. Cost: one pass over the gradients for the norms, one
      for the sum.

    Raises:
      ValueError: if the reference is unknown, or a number is outside its range.

    Notes:
      The jaxpi library computes the weights after every 1000th step, with ``eps=1e-5``, and uses them
      from the next step on. `weighted_value_and_grad` with ``update_every=1000`` computes the same
      weights, but already uses them in the step that computes them. ``reference="rms"`` with a power
      below 1 is the rule of NTK-based multi-task learning, applied to gradients.

      Weights are at most 1.8e19 (float32). A zero gradient does not change its weight. If all gradients
      are zero, the update is 0. The weight of an absent task does not change. With one task, the update
      is its gradient.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.inverse_norm(("boundary", "equation"), ema_decay=0.0)
      >>> grads = jnp.array([[1., 0.], [0., 99.]])
      >>> update, state = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> [round(float(x), 3) for x in update]
      [50.0, 50.0]

    References:
      Wang, Sankaran, Wang and Perdikaris, An Expert's Guide to Training Physics-Informed Neural Networks,
      2023, https://arxiv.org/abs/2308.08468
    """

    def init(num_tasks: int, dtype: DType) -> InverseNormState:
        return InverseNormState(jnp.ones((num_tasks,), dtype))

    def weigh(inputs: StepInputs, state: InverseNormState) -> tuple[jax.Array, InverseNormState]:
        norms, dtype = inputs.norms, inputs.norms.dtype
        # In units of the largest norm, so that no square overflows.
        lengths = safe_divide(norms, jnp.max(norms))
        if reference == "mean":
            common = mean_active(lengths, inputs.active)
        else:
            common = jnp.sqrt(mean_active(lengths * lengths, inputs.active))
        nonzero = lengths > 0
        ratio = safe_divide(common, lengths + jnp.asarray(eps, dtype) * common, 1, where=nonzero)
        fresh = clip_weights(ratio ** jnp.asarray(power, dtype))
        weights = move_average(state.weight_ema, fresh, ema_decay, inputs.active & nonzero)
        return weights, InverseNormState(weights)

    return from_rule(
        "inverse_norm", tasks, WeightRule(frozenset({"norms"}), weigh, init), **options
    )
