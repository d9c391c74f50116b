"""ExcessMTL: tasks weighed by how much of their risk can still be removed."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax import task_tree
from mtl_optax.arguments import check_integer, check_num_tasks, check_range
from mtl_optax.from_gradients import TaskGradients, from_gradients
from mtl_optax.method import Method
from mtl_optax.solvers.log_weights import keep_log_shares, largest_weight, log_softmax


class ExcessMTLState(NamedTuple):
    """What ExcessMTL remembers.

    Attributes:
      squares: leaves `[T, *shape]`, sums of the squared gradients.
      log_weights: `[T]`.
      baseline: `[T]`, mean excess risk over the steps that measure it.
      seen: int32 `[T]`, steps at which the task was present, up to the last one that counts.
    """

    squares: Any
    log_weights: jax.Array
    baseline: jax.Array
    seen: jax.Array


def excess_mtl(
    num_tasks: int,
    *,
    step_size: Any = 1.0,
    warmup_steps: int = 0,
    eps: Any = 1e-7,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Leans towards the tasks with the largest excess risk, not those with the noisiest labels.

    A task with label noise keeps a large loss however well it is learned, and methods that look at losses
    follow it. The excess risk, what is left above the best reachable loss, is estimated to second order
    with the diagonal Hessian of AdaGrad, :math:`H_t = \sqrt{\sum_k g_t(k)^2 + \epsilon}`, elementwise:

    .. math::
        e_t = \sum_i g_{t,i}^2 / H_{t,i}, \qquad
        w_t \leftarrow \frac{w_t e^{\eta e_t / b_t}}{\sum_s w_s e^{\eta e_s / b_s}} .

    The update is :math:`\sum_t w_t g_t` with the new weights: mean-like. Equations 6, 7 and 9 of the
    paper. The baseline :math:`b_t` is the mean of e over the first ``warmup_steps`` updates, during which
    the weights are equal (appendix C.1; the paper takes three epochs). With ``warmup_steps`` = 0 it is
    the first update's e, and that update itself moves the weights by :math:`\eta e_t` undivided, as the
    authors' program does. Weights sum to 1 here and to T there.

    Degenerate input: a zero gradient has e = 0; a baseline of 0 counts as 1. All zero: 0. Absent tasks
    keep their buffers and their place in the weights. T = 1: the gradient itself.

    Args:
      num_tasks: T, static.
      step_size: eta, >= 0.
      warmup_steps: updates that measure the baseline, static, >= 0.
      eps: added to the sums of squares; part of the definition, 0 is allowed.
      axis_name: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. State: `ExcessMTLState`. Cost: one pass
      over the gradients and their squares for e, one for the sum; a buffer of T gradients.

    Raises:
      ValueError: for numbers outside their range.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.excess_mtl(2)
      >>> grads = jnp.array([[2., 0.], [0., 1.]])
      >>> _, state = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> print(np.asarray(state.weights).round(3))
      [0.731 0.269]

    References:
      He, Zhou, Zhang, Zhao and Zhao, Robust Multi-Task Learning with Excess Risks, 2024.
    """
    num_tasks = check_num_tasks("excess_mtl", num_tasks)
    check_range("excess_mtl", step_size=(step_size, 0, math.inf), eps=(eps, 0, math.inf))
    check_integer("excess_mtl", "warmup_steps", warmup_steps, 0)

    def init(params: Any, dtype: Any) -> ExcessMTLState:
        return ExcessMTLState(
            squares=task_tree.per_task_zeros(params, num_tasks, dtype),
            log_weights=jnp.full((num_tasks,), -math.log(num_tasks), dtype),
            baseline=jnp.zeros((num_tasks,), dtype),
            seen=jnp.zeros((num_tasks,), jnp.int32),
        )

    def apply(view: TaskGradients, state: ExcessMTLState) -> tuple[Any, jax.Array, ExcessMTLState]:
        active = view.active
        squares = jax.tree.map(_add_square, state.squares, view.updates)
        excess = _excess(view, squares)
        # The first steps measure; without warm-up the first step also moves the weights.
        baseline, seen = _measure(excess, active, state)
        base = jnp.where((state.seen > 0) & (state.baseline > 0), state.baseline, 1)
        moves = active & (state.seen >= warmup_steps)
        eta = jnp.asarray(step_size, view.dtype)
        step = jnp.where(moves, jnp.minimum(eta * (excess / base), largest_weight(view.dtype)), 0)
        log_weights = log_softmax(state.log_weights + step, active)
        weights = jnp.exp(log_weights)
        blocks = task_tree.assign_blocks(state.squares, "all")
        update = task_tree.combine(view.updates, weights[None], active, blocks)
        kept = keep_log_shares(log_weights, state.log_weights, active)
        return update, weights, ExcessMTLState(squares, kept, baseline, seen)

    def _measure(
        excess: jax.Array, active: jax.Array, state: ExcessMTLState
    ) -> tuple[jax.Array, jax.Array]:
        measures = active & (state.seen < max(warmup_steps, 1))
        number = (state.seen + 1).astype(excess.dtype)
        moved = state.baseline + (excess - state.baseline) / number
        seen = state.seen + measures.astype(jnp.int32)
        return jnp.where(measures, moved, state.baseline), seen

    def _excess(view: TaskGradients, squares: Any) -> jax.Array:
        def one(gradient: jax.Array, total: jax.Array) -> jax.Array:
            wide = gradient.astype(total.dtype)
            hessian = jnp.sqrt(total + jnp.asarray(eps, total.dtype))
            quotient = jnp.abs(wide) / jnp.where(hessian > 0, hessian, 1)
            return jnp.sum(jnp.abs(wide) * quotient, axis=tuple(range(1, wide.ndim)))

        leaves = zip(jax.tree.leaves(view.updates), jax.tree.leaves(squares), strict=True)
        total = sum((one(g, s) for g, s in leaves), jnp.zeros((num_tasks,), view.dtype))
        return jax.lax.psum(total, axis_name) if axis_name is not None else total

    return from_gradients("excess_mtl", num_tasks, init, apply, axis_name=axis_name)


def _add_square(total: jax.Array, gradient: jax.Array) -> jax.Array:
    """Adds the squared gradient; beyond the range of the dtype the sum stays at its largest number."""
    wide = gradient.astype(total.dtype)
    return jnp.minimum(total + wide * wide, float(jnp.finfo(total.dtype).max))


METHOD = Method(
    name="excess_mtl",
    factory=excess_mtl,
    needs=("gradients",),
    family="from_gradients",
    scale="mean",
    reference="He et al., Robust Multi-Task Learning with Excess Risks, 2024",
    make=excess_mtl,
    properties=frozenset({"permutation", "simplex", "split"}),
)
