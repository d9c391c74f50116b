"""MetaBalance: auxiliary gradients brought to the magnitude of the target's."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_num_tasks, check_range, check_task_index
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method


class MetaBalanceState(NamedTuple):
    """State of `metabalance`, `[T]` a block.

    Attributes:
      norm_ema: EMA of each task's gradient norm; starts at 0.
      seen: the share of each average that is data: `1 - ema_decay ** k` after k steps.
    """

    norm_ema: jax.Array
    seen: jax.Array


def metabalance(
    num_tasks: int,
    *,
    target: int = 0,
    relax_factor: Any = 0.7,
    strategy: Literal["shrink", "enlarge", "both"] = "both",
    ema_decay: Any = 0.9,
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Brings the gradient of every auxiliary task to the magnitude of the target task's.

    One task matters (buying), the others are there to help it (clicking, adding to a cart). An
    auxiliary whose gradient is much larger takes the shared parameters over; one whose gradient is much
    smaller does not help. MetaBalance rescales auxiliary gradients, tensor by tensor, by how the moving
    averages of the norms compare.

    In every block, with :math:`n_t` the norm of task t's gradient, ``ema_decay`` :math:`\beta`, and
    ``relax_factor`` :math:`r`:

    .. math::
        m_t \leftarrow \beta m_t + (1-\beta) n_t, \qquad
        w_t = r\, m_{target} / m_t + (1 - r), \qquad w_{target} = 1,

    where the strategy applies, else :math:`w_t = 1`. The update is :math:`\sum_t w_t g_t`: sum-like.
    r = 1 makes the magnitudes equal, r = 0 changes nothing.

    Algorithm 1 (strategies: algorithm 2) of the paper. The averages start at 0 without bias correction,
    as in the authors' code; only their ratio is used, so it cancels between tasks that were there equally
    often. Between others the ratio is corrected for it: else an auxiliary that comes in late would be
    enlarged a hundredfold. Without a target so far, the weights are 1. Differences from that code, which
    has strategy "both" only: r = 1 is allowed; a tensor that a task has no gradient for counts as a
    zero gradient (there the code leaves every later tensor unbalanced); where :math:`m_t = 0` the
    weight is 1 (there the tensor becomes NaN).

    Degenerate input: a zero gradient moves the average towards 0 and contributes nothing. All zero: the
    update is 0. T = 1: the gradient itself.

    Args:
      num_tasks: T, static.
      target: index of the target task.
      relax_factor: r in [0, 1].
      strategy: "shrink" (A) rescales only auxiliaries larger than the target, "enlarge" (B) only
        smaller ones, "both" (C) all.
      ema_decay: beta in [0, 1).
      **options: see `WeightingOptions`; here `blocks` is "leaf" by default, as in the paper.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. State: `rule_state`, two `[B, T]`.
      Cost: one pass over the gradients for the norms, one for the sum; no Gram matrix.

    Raises:
      ValueError: for a target outside 0..T-1, an unknown strategy, or numbers outside their range.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.metabalance(2, relax_factor=1.0)
      >>> grads = {"w": jnp.array([[3., 4.], [0., 50.]])}
      >>> update, state = tx.update(grads, tx.init({"w": jnp.zeros(2)}))
      >>> [round(float(x), 3) for x in update["w"]]
      [3.0, 9.0]

    References:
      He, Feng, Cheng, Ji, Guo and Caverlee, MetaBalance: Improving Multi-Task Recommendations via
      Adapting Gradient Magnitudes of Auxiliary Tasks, 2022.
    """
    num_tasks = check_num_tasks("metabalance", num_tasks)
    target = check_task_index("metabalance", "target", target, num_tasks)
    if strategy not in ("shrink", "enlarge", "both"):
        raise ValueError(
            f'metabalance: strategy must be "shrink", "enlarge" or "both"; found {strategy!r}.'
        )
    check_range("metabalance", relax_factor=(relax_factor, 0, 1), ema_decay=(ema_decay, 0, 1))

    def init(dtype: Any) -> MetaBalanceState:
        return MetaBalanceState(jnp.zeros((num_tasks,), dtype), jnp.zeros((num_tasks,), dtype))

    def weigh(evidence: Evidence, state: MetaBalanceState) -> tuple[jax.Array, MetaBalanceState]:
        norms, dtype = evidence.norms, evidence.norms.dtype
        decay, relax = jnp.asarray(ema_decay, dtype), jnp.asarray(relax_factor, dtype)

        def average(old: jax.Array, new: Any) -> jax.Array:
            return jnp.where(evidence.active, decay * old + (1 - decay) * new, old)

        ema, seen = average(state.norm_ema, norms), average(state.seen, 1)
        known = (seen > 0) & (seen[target] > 0)
        arrived = seen / jnp.where(known, seen[target], 1)  # exactly 1 where all are present
        reference = ema[target] * arrived
        ratio = jnp.where(ema > 0, reference / jnp.where(ema > 0, ema, 1), 1)
        rescaled = relax * ratio + (1 - relax)
        applies = {"shrink": ema > reference, "enlarge": ema < reference, "both": ema > 0}[strategy]
        balanced = applies & known & (jnp.arange(num_tasks) != target)
        return jnp.where(balanced, rescaled, 1), MetaBalanceState(ema, seen)

    rule = Rule("metabalance", num_tasks, frozenset({"norms"}), init, weigh)
    return from_rule(rule, **{"blocks": "leaf", **options})


METHOD = Method(
    name="metabalance",
    factory=metabalance,
    needs=("norms",),
    family="from_norms",
    scale="sum",
    reference="He et al., MetaBalance, 2022",
    make=metabalance,
    properties=frozenset({"scale"}),
)
