"""FAMO: every loss falls at the same relative rate, found from loss values alone."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_optax.arguments import check_num_tasks, check_range
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.solvers.log_weights import largest_weight, log_softmax
from mtl_optax.trained_values import TrainedState, start, train

# Part of the method's definition: keeps the logarithm of a loss at its minimum finite.
_EPSILON = 1e-8


class FAMOState(NamedTuple):
    """What FAMO remembers.

    Attributes:
      logits: the trained logits `[T]` and their optimizer's state.
      log_losses: `[T]`, log losses of the step at which each task was last present.
      last_step: int32 `[T]`, that step; -2 where there was none.
    """

    logits: TrainedState
    log_losses: jax.Array
    last_step: jax.Array


def famo(
    num_tasks: int,
    *,
    gamma: Any = 1e-2,
    weight_lr: Any = 0.025,
    min_losses: Any = 0.0,
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Balances the relative rates at which the losses fall, in constant time and memory.

    Logits :math:`\xi` are trained so that no task's log loss falls slower than another's; no task
    gradient is looked at. With :math:`D_t = L_t -` ``min_losses`` :math:`+ 10^{-8}` and
    :math:`z = \mathrm{softmax}(\xi)`:

    .. math::
        w_t = \frac{z_t / D_t}{\sum_s z_s / D_s}, \qquad
        \nabla_\xi = J_{softmax}^T \big( \log D^{before} - \log D^{after} \big) + \gamma\, \xi,

    a step of Adam(``weight_lr``) on :math:`\xi`, with the losses before and after the network's step *on
    the same batch*. Hand those over at the next update: `losses_after=` are the losses of the previous
    batch after the previous step (one more forward pass). Without it the losses of the present batch
    stand in: no extra cost, but the noise between batches enters.

    Algorithm 1 of the paper; the weights sum to 1: mean-like. As in the authors' code, ``gamma`` decays
    inside Adam (L2, not decoupled). It is 0.01 there by default, 0.001 in most of their scripts.

    Degenerate input: a loss at or below its minimum counts as 1e-8 above it. In the first update the
    logits rest. A task trains from the present losses when it is there, against the step at which it was
    last there; from `losses_after` when it was in the previous batch and the number given is finite.
    T = 1: 1.

    Args:
      num_tasks: T, static.
      gamma: decay of the logits, >= 0.
      weight_lr: Adam's learning rate, a number or schedule.
      min_losses: lower bounds of the losses, a scalar or `[T]`.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Needs `losses=`, takes `losses_after=`.
      State: `FAMOState`. Cost: O(T).

    Raises:
      ValueError: for numbers outside their range, `min_losses` or `losses_after` that do not fit, or
        missing `losses`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.famo(2)
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.eye(2), state, losses=jnp.array([3., 1.]))
      >>> print(np.asarray(updates).round(3))
      [0.25 0.75]
      >>> after = jnp.array([2.9, 0.5])  # the second task fell faster
      >>> now = jnp.array([1., 1.])
      >>> updates, state = tx.update(jnp.eye(2), state, losses=now, losses_after=after)
      >>> print(np.asarray(updates).round(3))
      [0.512 0.488]

    References:
      Liu, Feng, Stone and Liu, FAMO: Fast Adaptive Multitask Optimization, 2023.
    """
    num_tasks = check_num_tasks("famo", num_tasks)
    check_range("famo", gamma=(gamma, 0, math.inf), weight_lr=(weight_lr, 0, math.inf))
    if np.shape(min_losses) not in ((), (num_tasks,)):
        raise ValueError(
            f"famo: min_losses must be a scalar or [{num_tasks}]; found {np.shape(min_losses)}."
        )
    optimizer = optax.adam(weight_lr)

    def init(dtype: Any) -> FAMOState:
        zeros = jnp.zeros((num_tasks,), dtype)
        return FAMOState(start(optimizer, zeros), zeros, jnp.full((num_tasks,), -2, jnp.int32))

    def log_excess(losses: jax.Array) -> jax.Array:
        low = jnp.broadcast_to(jnp.asarray(min_losses, losses.dtype), losses.shape)
        return jnp.log(jnp.maximum(losses - low, 0) + _EPSILON)

    def weigh(evidence: Evidence, state: FAMOState) -> tuple[jax.Array, FAMOState]:
        log_losses = log_excess(evidence.losses)
        told = evidence.extra["losses_after"]
        if told is None:
            after, trains = log_losses, evidence.active & (state.last_step >= 0)
        else:
            after, trains = _after(told, evidence, state)
        logits = _train(state, after, trains)
        active = evidence.active
        weights = jnp.exp(log_softmax(logits.values - log_losses, active))
        last = jnp.where(active, evidence.step, state.last_step)
        return weights, FAMOState(logits, jnp.where(active, log_losses, state.log_losses), last)

    def _after(told: Any, evidence: Evidence, state: FAMOState) -> tuple[jax.Array, jax.Array]:
        if np.shape(told) != (num_tasks,):
            raise ValueError(f"famo: losses_after must be [{num_tasks}]; found {np.shape(told)}.")
        losses = jnp.asarray(told).astype(state.log_losses.dtype)
        finite = jnp.isfinite(losses)
        trains = finite & (state.last_step == evidence.step - 1)
        return log_excess(jnp.where(finite, losses, 0)), trains

    def _train(state: FAMOState, after: jax.Array, trains: jax.Array) -> TrainedState:
        logits = state.logits.values
        z = jnp.exp(log_softmax(logits, trains))
        fall = jnp.where(trains, state.log_losses - after, 0)
        gradient = z * (fall - jnp.sum(z * fall)) + jnp.asarray(gamma, logits.dtype) * logits
        limit = largest_weight(logits.dtype)
        return train(optimizer, state.logits, gradient, trains, -limit, limit)

    rule = Rule("famo", num_tasks, frozenset({"losses"}), init, weigh, ("losses_after",))
    return from_rule(rule, **options)


METHOD = Method(
    name="famo",
    factory=famo,
    needs=("losses",),
    family="from_losses",
    scale="mean",
    reference="Liu et al., FAMO, 2023",
    make=famo,
    properties=frozenset({"permutation", "scale", "simplex", "split"}),
)
