"""Dynamic weight average: tasks whose loss falls slowly get more weight."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_integer, check_num_tasks, check_range
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.solvers.log_weights import largest_weight, log_softmax


class DWAState(NamedTuple):
    """Mean losses by window; every task counts the steps at which it was present.

    Attributes:
      mean: `[T]`, mean loss of the present window so far.
      seen: int32 `[T]`, steps in it.
      last: `[T]`, mean loss of the last full window.
      before: `[T]`, of the one before.
      windows: int32 `[T]`, full windows so far, up to 2.
    """

    mean: jax.Array
    seen: jax.Array
    last: jax.Array
    before: jax.Array
    windows: jax.Array


def dwa(
    num_tasks: int,
    *,
    temperature: Any = 2.0,
    window: int = 1,
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Weighs tasks by how slowly their losses fall.

    A task that makes little progress gets a larger weight. With :math:`\bar L_t(e)` the mean loss of
    window e (``window`` steps: an epoch is the window of the paper) and ``temperature``
    :math:`\tau`:

    .. math::
        w_t = T\, \mathrm{softmax}_t\big( \bar L_t(e-1) / \bar L_t(e-2) / \tau \big),

    and 1 during the first two windows. Sum-like: the weights sum to T. Equation 7 of the paper, with its
    code's epochs; a variant in circulation fills the first windows with ones instead, so that real
    losses are compared with 1 there.

    Degenerate input: a quotient with a mean of 0 below it counts as 1, and quotients are bounded by
    1.8e19 (float32). Absent tasks do not count: the others' weights sum to their number, and a window of
    a task is made of the steps at which it was present. T = 1: 1.

    Args:
      num_tasks: T, static.
      temperature: tau > 0; larger is more even.
      window: steps a window, static.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Needs `losses=`. State: `DWAState`.
      Cost: O(T).

    Raises:
      ValueError: for numbers outside their range or missing `losses`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.dwa(2)
      >>> state = tx.init(jnp.zeros(2))
      >>> for losses in ([4., 1.], [2., 1.], [1., 1.]):
      ...     updates, state = tx.update(jnp.eye(2), state, losses=jnp.array(losses))
      >>> print(np.asarray(updates).round(3))
      [0.876 1.124]

    References:
      Liu, Johns and Davison, End-to-End Multi-Task Learning with Attention, 2019.
    """
    num_tasks = check_num_tasks("dwa", num_tasks)
    check_range("dwa", temperature=(temperature, 1e-6, math.inf))
    check_integer("dwa", "window", window, 1)

    def init(dtype: Any) -> DWAState:
        zeros, none = jnp.zeros((num_tasks,), dtype), jnp.zeros((num_tasks,), jnp.int32)
        return DWAState(zeros, none, zeros, zeros, none)

    def weigh(evidence: Evidence, state: DWAState) -> tuple[jax.Array, DWAState]:
        active, dtype = evidence.active, evidence.losses.dtype
        largest = largest_weight(dtype)
        known = (state.windows == 2) & (state.before != 0)
        ratio = jnp.where(known, state.last / jnp.where(known, state.before, 1), 1)
        logits = jnp.clip(ratio, -largest, largest) / jnp.asarray(temperature, dtype)
        count = jnp.sum(active).astype(dtype)
        weights = count * jnp.exp(log_softmax(logits, active))
        return weights, _observe(evidence, state)

    def _observe(evidence: Evidence, state: DWAState) -> DWAState:
        seen = state.seen + evidence.active.astype(jnp.int32)
        share = (evidence.losses - state.mean) / jnp.maximum(seen, 1).astype(state.mean.dtype)
        mean = jnp.where(evidence.active, state.mean + share, state.mean)
        full = seen == window
        return DWAState(
            mean=jnp.where(full, 0, mean),
            seen=jnp.where(full, 0, seen),
            last=jnp.where(full, mean, state.last),
            before=jnp.where(full, state.last, state.before),
            windows=jnp.minimum(state.windows + full.astype(jnp.int32), 2),
        )

    return from_rule(Rule("dwa", num_tasks, frozenset({"losses"}), init, weigh), **options)


METHOD = Method(
    name="dwa",
    factory=dwa,
    needs=("losses",),
    family="from_losses",
    scale="sum",
    reference="Liu et al., End-to-End Multi-Task Learning with Attention, 2019",
    make=dwa,
    properties=frozenset({"permutation", "scale", "split"}),
)
