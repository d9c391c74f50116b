"""STCH: smooth Tchebycheff scalarisation, a soft maximum of the losses."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_integer, check_num_tasks, check_range
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.solvers.log_weights import exp_weights, log_softmax, magnitudes


class STCHState(NamedTuple):
    """What STCH knows of the size of the losses.

    Attributes:
      nadir: `[T]`, mean loss over the steps that measure it.
      seen: int32 `[T]`, steps at which the task was present, up to the last one that counts.
    """

    nadir: jax.Array
    seen: jax.Array


def stch(
    num_tasks: int,
    *,
    mu: Any = 1.0,
    warmup_steps: int = 0,
    nadir_steps: int = 1,
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Minimises a smooth maximum of the losses, each relative to its size early in training.

    A maximum looks at the worst task only, and jumps; its smooth form finds any Pareto-optimal point and
    moves all tasks. With ``mu`` :math:`\mu` and the nadir :math:`z_t`, the mean loss over the
    ``nadir_steps`` steps that follow the first ``warmup_steps``, the objective
    :math:`T \mu \log \sum_t (L_t / z_t)^{1/\mu}` has the weights

    .. math:: w_t = T\, \mathrm{softmax}_t\big( \log(L_t / z_t) / \mu \big) / L_t .

    Until the nadir of every task present is known: :math:`w_t = 1 / L_t` (the sum of log losses). The
    scale is the method's own. Smaller mu is closer to the maximum. This is the form of the authors'
    code, on log losses relative to a nadir; equation 10 of the paper has losses minus an ideal point,
    and a preference vector. The code's warm-up is in epochs: ``warmup_steps`` = epochs x steps an epoch,
    ``nadir_steps`` = one epoch.

    Degenerate input: a negative loss counts by its size and is still descended; a loss of 0 has weight 0
    and does not enter the softmax (the code adds 1e-20). No weight exceeds 1.8e19 (float32). Each task
    counts the steps at which it was present. T = 1: the gradient over the loss.

    Args:
      num_tasks: T, static.
      mu: smoothing, > 0.
      warmup_steps: steps before the nadir is measured, static, >= 0.
      nadir_steps: steps over which it is averaged, static, >= 1.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Needs `losses=`. State: `STCHState`.
      Cost: O(T).

    Raises:
      ValueError: for numbers outside their range or missing `losses`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.stch(2, mu=0.5)
      >>> state = tx.init(jnp.zeros(2))
      >>> for losses in ([4., 1.], [2., 1.]):
      ...     updates, state = tx.update(jnp.eye(2), state, losses=jnp.array(losses))
      >>> print(np.asarray(updates).round(3))
      [0.2 1.6]

    References:
      Lin et al., Smooth Tchebycheff Scalarization for Multi-Objective Optimization, 2024.
    """
    num_tasks = check_num_tasks("stch", num_tasks)
    check_range("stch", mu=(mu, 1e-6, math.inf))
    check_integer("stch", "warmup_steps", warmup_steps, 0)
    check_integer("stch", "nadir_steps", nadir_steps, 1)

    def init(dtype: Any) -> STCHState:
        return STCHState(jnp.zeros((num_tasks,), dtype), jnp.zeros((num_tasks,), jnp.int32))

    def weigh(evidence: Evidence, state: STCHState) -> tuple[jax.Array, STCHState]:
        active, dtype = evidence.active, evidence.losses.dtype
        sizes, usable = magnitudes(evidence.losses, active)
        nadir, _ = magnitudes(state.nadir, active)
        logs = jnp.log(sizes)
        soft = log_softmax((logs - jnp.log(nadir)) / jnp.asarray(mu, dtype), usable)
        count = jnp.maximum(jnp.sum(active), 1).astype(dtype)
        known = jnp.all((state.seen == warmup_steps + nadir_steps) | ~active)
        log_weights = jnp.where(known, soft + jnp.log(count), 0) - logs
        return exp_weights(log_weights, usable), _observe(evidence, state)

    def _observe(evidence: Evidence, state: STCHState) -> STCHState:
        measured = state.seen - warmup_steps
        counts = evidence.active & (measured >= 0) & (measured < nadir_steps)
        number = jnp.maximum(measured + 1, 1).astype(state.nadir.dtype)
        moved = state.nadir + (evidence.losses - state.nadir) / number
        more = evidence.active & (measured < nadir_steps)
        return STCHState(
            nadir=jnp.where(counts, moved, state.nadir),
            seen=state.seen + more.astype(jnp.int32),
        )

    return from_rule(Rule("stch", num_tasks, frozenset({"losses"}), init, weigh), **options)


METHOD = Method(
    name="stch",
    factory=stch,
    needs=("losses",),
    family="from_losses",
    scale="own",
    reference="Lin et al., Smooth Tchebycheff Scalarization, 2024",
    make=stch,
    properties=frozenset({"permutation", "scale", "split"}),
)
