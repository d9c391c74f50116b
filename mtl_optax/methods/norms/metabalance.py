"""MetaBalance: auxiliary gradients brought to the magnitude of the target's."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp

from mtl_optax.core.arguments import check_choice, check_decay, check_range
from mtl_optax.core.factory import factory
from mtl_optax.core.method import Method, MethodOptions
from mtl_optax.core.pipeline import from_rule
from mtl_optax.core.rule import StepInputs, WeightRule
from mtl_optax.core.tasks import find_target, read_tasks
from mtl_optax.core.types import DType, Number
from mtl_optax.solvers.arithmetic import safe_divide


class MetaBalanceState(NamedTuple):
    """State of `metabalance`, `[T]` per block.

    Attributes:
      norm_ema: EMA of each task's gradient norm; starts at 0.
      seen: the share of each average that is data: `1 - ema_decay ** k` after k steps.
    """

    norm_ema: jax.Array
    seen: jax.Array


@factory
def metabalance(
    tasks: int | Collection[str],
    *,
    target: int | str | None = None,
    relax_factor: Number = 0.7,
    strategy: Literal["shrink", "enlarge", "both"] = "both",
    ema_decay: Number = 0.9,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Brings the gradient of every auxiliary task to the magnitude of the target task's.

    Name the task that matters with ``target=``; only where the tasks have no names may it be left out, and
    is the first one then. There is one weight per task and tensor, and the heads keep weight 1;
    ``blocks="all"`` makes it one weight per task, for the heads too.

    For training where one task matters (buy) and the others should help it (click, cart). An auxiliary
    task with a much larger gradient dominates the shared parameters; one with a much smaller gradient
    has no effect. MetaBalance rescales auxiliary gradients, tensor by tensor, by the ratio of the moving
    averages of the gradient norms.

    In every block, with :math:`n_t` the norm of task t's gradient, ``ema_decay`` :math:`\beta` and
    ``relax_factor`` :math:`r`:

    .. math::
        m_t \leftarrow \beta m_t + (1-\beta) n_t, \qquad
        w_t = r\, m_{target} / m_t + (1 - r), \qquad w_{target} = 1, \qquad
        update = \sum_t w_t g_t

    where ``strategy`` applies, else :math:`w_t = 1`. With r = 1 all magnitudes are equal, with r = 0
    nothing changes. Scale: sum-like. Algorithm 1 of the paper; the strategies are its algorithm 2.

    Args:
      tasks: T, or the task names.
      target: name or index of the target task: required if the tasks have names, else 0 by default.
      relax_factor: r in [0, 1].
      strategy: "shrink" (A) rescales only auxiliaries larger than the target, "enlarge" (B) only
        smaller ones, "both" (C) all.
      ema_decay: beta in [0, 1).
      **options: see `MethodOptions`; here `blocks` is "leaf" by default, as in the paper.

    Returns:
      A `Method` with the state `MetaBalanceState`. Cost: one pass over the gradients for the norms, one
      for the sum.

    Raises:
      ValueError: for an unknown target or strategy, or numbers outside their range.

    Notes:
      The averages start at 0 without bias correction, as in the authors' code; only their ratio is used,
      so the bias cancels between tasks that were present equally often. For other tasks the ratio is
      corrected: an auxiliary that first appears late would be enlarged a hundredfold otherwise.

      Where the target has had no gradient but 0, as in the head of an auxiliary task, there is no
      magnitude to match, and the weights are 1.

      Differences from the authors' code, which has strategy "both" only: r = 1 is allowed; a tensor
      without a gradient counts as a zero gradient (the code leaves every later tensor unbalanced); where
      :math:`m_t = 0` the weight is 1 (the code divides by zero).

      With ``update_every`` a kept weight is limited to that of the least average these norms could leave,
      :math:`r\, m_{target} / ((1-\beta) n_t) + (1 - r)`: a weight computed from the zeros of rare gradients
      would enlarge the next one without limit.

      A zero gradient moves its average towards 0 and adds nothing. If all gradients are zero, the update
      is 0. With one task, the update is its gradient.

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
    axis = read_tasks("metabalance", tasks)
    index = find_target("metabalance", target, axis)
    check_choice("metabalance", "strategy", strategy, ("shrink", "enlarge", "both"))
    check_range("metabalance", relax_factor=(relax_factor, 0, 1))
    check_decay("metabalance", ema_decay=ema_decay)

    def init(dtype: DType) -> MetaBalanceState:
        return MetaBalanceState(jnp.zeros((axis.number,), dtype), jnp.zeros((axis.number,), dtype))

    def average(
        inputs: StepInputs, state: MetaBalanceState
    ) -> tuple[MetaBalanceState, jax.Array, jax.Array]:
        """The new averages, the target's to compare each of them with, and which weights may change."""
        decay = jnp.asarray(ema_decay, inputs.norms.dtype)

        def move(old: jax.Array, new: Any) -> jax.Array:
            return jnp.where(inputs.active, decay * old + (1 - decay) * new, old)

        ema, seen = move(state.norm_ema, inputs.norms), move(state.seen, 1)
        known = (seen > 0) & (ema[index] > 0)
        share = safe_divide(seen, seen[index], seen, where=known)  # exactly 1 where all are present
        balanced = known & (jnp.arange(axis.number) != index)
        return MetaBalanceState(ema, seen), ema[index] * share, balanced

    def rescaled(reference: jax.Array, norms: jax.Array) -> jax.Array:
        relax = jnp.asarray(relax_factor, norms.dtype)
        # An average decays below the smallest norm, and the ratio alone may then overflow.
        return safe_divide(relax * reference, norms, relax) + (1 - relax)

    def weigh(inputs: StepInputs, state: MetaBalanceState) -> tuple[jax.Array, MetaBalanceState]:
        state, reference, balanced = average(inputs, state)
        ema = state.norm_ema
        applies = {"shrink": ema > reference, "enlarge": ema < reference, "both": ema > 0}[strategy]
        return jnp.where(balanced & applies, rescaled(reference, ema), 1), state

    def bound(inputs: StepInputs, state: MetaBalanceState) -> jax.Array:
        """The weights with the least average that these norms could leave, `(1 - ema_decay) * norms`."""
        moved, reference, balanced = average(inputs, state)
        # As `reference`, it is taken for the share of this task's average that is data.
        least = (1 - jnp.asarray(ema_decay, reference.dtype)) * moved.seen * inputs.norms
        limits = rescaled(reference, least)
        if strategy == "enlarge":  # no weight is below 1
            limits = jnp.maximum(limits, 1)
        return jnp.where(balanced & (least > 0), limits, jnp.inf)

    rule = WeightRule(frozenset({"norms"}), weigh, init, target=index, bound=bound)
    return from_rule("metabalance", axis, rule, **{"blocks": "leaf", **options})
