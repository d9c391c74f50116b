"""MetaBalance: rescales auxiliary gradients to the magnitude of the target's gradient."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from mtl_optax.core.factory import Decay, Share, factory
from mtl_optax.core.types import DType
from mtl_optax.core.validation import find_target
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import move_average, safe_divide


class MetaBalanceState(NamedTuple):
    """State of `metabalance`, `[T]` per block.

    Attributes:
      norm_ema: EMA of each task's gradient norm, which starts at 0.
      correction: the bias correction of each EMA: `1 - ema_decay ** k` after k steps.
    """

    norm_ema: jax.Array
    correction: jax.Array


@factory
def metabalance(
    tasks: int | Collection[str],
    *,
    target: int | str | None = None,
    relax_factor: Share = 0.7,
    strategy: Literal["shrink", "enlarge", "both"] = "both",
    ema_decay: Decay = 0.9,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Rescales the gradient of every auxiliary task to the magnitude of the target's gradient.

    The method is made for training in which one task, the ``target``, matters (buy) and the other tasks
    should help it (click, cart). An auxiliary task with a much larger gradient dominates the shared
    parameters, and one with a much smaller gradient has no effect. MetaBalance rescales auxiliary
    gradients per tensor, by the ratio of the EMAs of the gradient norms.

    In every block, with :math:`n_t` the norm of task t's gradient, ``ema_decay`` :math:`\beta` and
    ``relax_factor`` :math:`r`:

    .. math::
        m_t \leftarrow \beta m_t + (1-\beta) n_t, \qquad
        w_t = r\, m_{target} / m_t + (1 - r), \qquad w_{target} = 1, \qquad
        update = \sum_t w_t g_t

    if ``strategy`` selects the task, else :math:`w_t = 1`. With r = 1 all magnitudes are equal; with r =
    0 the update is the plain sum. There is one weight per task and tensor, and the heads have weight 1;
    with ``blocks="all"`` there is one weight per task, for the heads too. Scale: sum-like. Algorithm 1 of
    the paper; the strategies are its algorithm 2.

    Args:
      tasks: T, or the task names.
      target: name or index of the target task: required if the tasks have names, else 0 by default.
      relax_factor: r in [0, 1].
      strategy: "shrink" (A) rescales only auxiliary gradients larger than the target's, "enlarge" (B)
        only smaller ones, "both" (C) all of them.
      ema_decay: beta in [0, 1).
      **options: see `MethodOptions`; here `blocks` is "leaf" by default, as in the paper.

    Returns:
      A `Method` with the state `MetaBalanceState`. Cost: one pass over the gradients for the norms, one
      for the sum.

    Raises:
      ValueError: if the target or the strategy is unknown, or a number is outside its range.

    Notes:
      As in the authors' code, the averages start at 0 without bias correction. Only their ratio is used,
      so the bias cancels if both tasks were present equally often. Otherwise the ratio is corrected,
      because the gradient of a task that first appears late would be enlarged by a factor of a hundred.

      If the target has had only zero gradients in a block, as in the head of an auxiliary task, the
      weights of this block are 1.

      The authors' code has only the strategy "both", and differs in three points. It does not allow r =
      1. If a tensor has no gradient, it does not balance any later tensor; here the gradient counts as
      zero. If :math:`m_t = 0`, it divides by zero; here the weight is 1.

      With ``update_every``, a reused weight is at most
      :math:`r\, m_{target} / ((1-\beta) n_t) + (1 - r)`, the weight for the smallest average that the
      current norm allows. Otherwise a weight that was computed after many zero gradients could enlarge
      the next nonzero gradient without bound.

      A zero gradient decays its average and contributes 0. If all gradients are zero, the update is 0.
      With one task, the update is its gradient.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.metabalance(("buy", "click"), target="buy", relax_factor=1.0)
      >>> grads = {"w": jnp.array([[3., 4.], [0., 50.]])}
      >>> update, state = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
      >>> [round(float(x), 3) for x in update["w"]]
      [3.0, 9.0]

    References:
      He, Feng, Cheng, Ji, Guo and Caverlee, MetaBalance: Improving Multi-Task Recommendations via
      Adapting Gradient Magnitudes of Auxiliary Tasks, 2022, https://arxiv.org/abs/2203.06801
    """
    index = find_target("metabalance", target, tasks)

    def init(num_tasks: int, dtype: DType) -> MetaBalanceState:
        return MetaBalanceState(jnp.zeros((num_tasks,), dtype), jnp.zeros((num_tasks,), dtype))

    def average(
        inputs: StepInputs, state: MetaBalanceState
    ) -> tuple[MetaBalanceState, jax.Array, jax.Array]:
        """Returns the new averages, the target's to compare with each, and which weights may change."""
        ema = move_average(state.norm_ema, inputs.norms, ema_decay, inputs.active)
        correction = move_average(state.correction, 1, ema_decay, inputs.active)
        known = (correction > 0) & (ema[index] > 0)
        # Exactly 1 if all tasks were always present.
        share = safe_divide(correction, correction[index], correction, where=known)
        balanced = known & (jnp.arange(len(ema)) != index)
        return MetaBalanceState(ema, correction), ema[index] * share, balanced

    def rescaled(reference: jax.Array, norms: jax.Array) -> jax.Array:
        relax = jnp.asarray(relax_factor, norms.dtype)
        # An average can decay below the smallest norm, and the ratio may then overflow.
        return safe_divide(relax * reference, norms, relax) + (1 - relax)

    def weigh(inputs: StepInputs, state: MetaBalanceState) -> tuple[jax.Array, MetaBalanceState]:
        state, reference, balanced = average(inputs, state)
        ema = state.norm_ema
        applies = {"shrink": ema > reference, "enlarge": ema < reference, "both": ema > 0}[strategy]
        return jnp.where(balanced & applies, rescaled(reference, ema), 1), state

    def bound(inputs: StepInputs, state: MetaBalanceState) -> jax.Array:
        """The weights for the smallest averages that these norms allow, `(1 - ema_decay) * norms`."""
        moved, reference, balanced = average(inputs, state)
        # Multiplied by `correction`, as `reference` is: both have the bias of this task's average.
        least = (1 - jnp.asarray(ema_decay, reference.dtype)) * moved.correction * inputs.norms
        limits = rescaled(reference, least)
        if strategy == "enlarge":  # no weight is below 1
            limits = jnp.maximum(limits, 1)
        return jnp.where(balanced & (least > 0), limits, jnp.inf)

    rule = WeightRule(frozenset({"norms"}), weigh, init, target=index, bound=bound)
    return from_rule("metabalance", tasks, rule, **{"blocks": "leaf", **options})
