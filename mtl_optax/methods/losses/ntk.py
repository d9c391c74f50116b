"""NTK weights: each loss weighted by the inverse trace of its neural tangent kernel."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.factory import Decay, factory
from mtl_optax.core.types import DType
from mtl_optax.core.validation import read_tasks, task_vector
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import count_active, move_average, safe_divide
from mtl_optax.solvers.log_weights import clip_weights


class NTKState(NamedTuple):
    """State of `ntk`.

    Attributes:
      weight_ema: `[T]`, the EMA of the weights, which starts at 1.
    """

    weight_ema: jax.Array


@factory
def ntk(
    tasks: int | Collection[str],
    *,
    reference: Literal["sum", "mean"] = "sum",
    ema_decay: Decay = 0.0,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Weighs each loss by how slowly its residuals converge under gradient descent.

    Near the start of training, the residuals of a wide network decay at the rates of the eigenvalues of
    their block :math:`K_t = J_t J_t^\top` of the neural tangent kernel. Weights inverse to the traces
    give all blocks the same mean rate. With the ``traces`` :math:`\mathrm{tr}(K_t)` and ``ema_decay``
    :math:`\beta`:

    .. math::
        \hat w_t = \frac{\sum_s \mathrm{tr}(K_s)}{\mathrm{tr}(K_t)}, \qquad
        w_t \leftarrow \beta w_t + (1 - \beta) \hat w_t, \qquad update = \sum_t w_t g_t.

    ``reference="mean"`` uses the mean of the traces instead of their sum. The weights start at 1. Scale:
    sum-like; with "sum", the weights are about T times as large. Algorithm 1 of the paper.

    Args:
      tasks: T, or the task names.
      reference: numerator of the weights.
      ema_decay: beta in [0, 1); the paper uses no average, and jaxpi uses 0.9 with "mean".
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `NTKState`; `update` takes `traces=`, `[T]` or a dictionary by task name,
      from `ntk_trace`. Without it the weights do not change, so that traces on every k-th step are
      enough. Cost: O(T).

    Raises:
      ValueError: if the reference is unknown, or `traces` does not have one entry per task.

    Notes:
      A trace that is 0, negative or not finite does not change its weight. The weights of absent tasks do
      not change, and the sum excludes them. With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.ntk(2)
      >>> state = tx.init(jnp.zeros(2))
      >>> tx.update(jnp.eye(2), state, traces=jnp.array([2.0, 0.5]))[0].tolist()
      [1.25, 5.0]

    References:
      Wang, Yu and Perdikaris, When and Why PINNs Fail to Train: A Neural Tangent Kernel Perspective, 2022,
      https://arxiv.org/abs/2007.14527
    """
    axis = read_tasks("ntk", tasks)

    def init(num_tasks: int, dtype: DType) -> NTKState:
        return NTKState(jnp.ones((num_tasks,), dtype))

    def weigh(inputs: StepInputs, state: NTKState) -> tuple[jax.Array, NTKState]:
        given, dtype = inputs.extra["traces"], state.weight_ema.dtype
        if given is None:
            return state.weight_ema, state
        traces = task_vector("ntk", "traces", given, axis, dtype)
        usable = inputs.active & (traces > 0) & jnp.isfinite(traces)
        # In units of the largest trace, so that the sum cannot overflow.
        traces = jnp.where(usable, traces, 0)
        shares = safe_divide(traces, jnp.max(traces))
        common = jnp.sum(shares)
        if reference == "mean":
            common = common / count_active(usable, dtype)
        fresh = clip_weights(safe_divide(common, shares, 1))
        weights = move_average(state.weight_ema, fresh, ema_decay, usable)
        return weights, NTKState(weights)

    rule = WeightRule(frozenset(), weigh, init, extra=("traces",))
    return from_rule("ntk", axis, rule, **options)


def ntk_trace(
    residual_fn: Callable[..., jax.Array],
    params: optax.Params,
    *args: object,
    num_samples: int | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    r"""Computes the trace of a residual function's block of the neural tangent kernel.

    With J the Jacobian of the residuals with respect to the parameters, the trace is
    :math:`\mathrm{tr}(J J^\top) = \sum_{ij} J_{ij}^2`. The exact trace takes one backward pass per
    residual. With ``num_samples``, the trace is estimated by the mean of :math:`|J^\top v|^2` over random
    sign vectors v (Hutchinson), with one backward pass per sample.

    Args:
      residual_fn: `residual_fn(params, *args)` returns an array of residuals of any shape.
      params: the parameters.
      *args: passed to `residual_fn`.
      num_samples: the number of samples; None means the exact trace.
      key: a random key, required with `num_samples`.

    Returns:
      A scalar.

    Raises:
      ValueError: if `num_samples` is given without a key.

    Example:

      >>> import jax, jax.numpy as jnp, mtl_optax as mtl
      >>> residuals = lambda w, x: x * w[0] + w[1]
      >>> x = jnp.array([1.0, 2.0])
      >>> float(mtl.ntk_trace(residuals, jnp.zeros(2), x))
      7.0

    References:
      Wang, Yu and Perdikaris, When and Why PINNs Fail to Train: A Neural Tangent Kernel Perspective, 2022,
      https://arxiv.org/abs/2007.14527
    """
    residuals, pullback = jax.vjp(lambda p: jnp.ravel(residual_fn(p, *args)), params)

    def squared(vector: jax.Array) -> jax.Array:
        leaves = jax.tree.leaves(pullback(vector)[0])
        return sum((jnp.sum(leaf * leaf) for leaf in leaves), jnp.zeros((), residuals.dtype))

    if num_samples is None:
        return jnp.sum(jax.lax.map(squared, jnp.eye(residuals.size, dtype=residuals.dtype)))
    if key is None:
        raise ValueError("ntk_trace: give a random key= for an estimate from samples.")
    vectors = jax.random.rademacher(key, (num_samples, residuals.size), residuals.dtype)
    return jnp.mean(jax.lax.map(squared, vectors))
