"""STCH: smooth Tchebycheff scalarisation, a smooth maximum of the losses."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp

from mtl_optax.core.early_losses import early_means
from mtl_optax.core.factory import NonnegativeInt, Positive, PositiveInt, factory
from mtl_optax.core.types import DType
from mtl_optax.core.validation import read_tasks
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import count_active
from mtl_optax.solvers.log_weights import exp_weights, log_softmax, magnitudes


class STCHState(NamedTuple):
    """State of `stch`, `[T]` per block.

    Attributes:
      nadir: mean loss over the steps that measure it.
      num_steps: int32, the number of steps at which each task was present, at most
        `warmup_steps + nadir_steps`.
    """

    nadir: jax.Array
    num_steps: jax.Array


@factory
def stch(
    tasks: int | Collection[str],
    *,
    mu: Positive = 1.0,
    warmup_steps: NonnegativeInt = 0,
    nadir_steps: PositiveInt = 1,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Minimises a smooth maximum of the losses, each relative to its mean early in training.

    A maximum uses only the worst task and is not smooth. A smooth maximum uses all tasks and can reach
    every Pareto-optimal point. With ``mu`` :math:`\mu` and the nadir :math:`z_t`, the mean loss over the
    ``nadir_steps`` steps after the first ``warmup_steps``, the objective
    :math:`T \mu \log \sum_t (L_t / z_t)^{1/\mu}` has the weights

    .. math:: w_t = T\, \mathrm{softmax}_t\big( \log(L_t / z_t) / \mu \big) / L_t .

    Until the nadir of every present task is known, :math:`w_t = 1 / L_t` (the sum of log losses). Scale:
    the method's own. Equation 10 of the paper, in the form of the authors' code.

    Args:
      tasks: T, or the task names.
      mu: smoothing, >= 1e-6; smaller values are closer to the maximum.
      warmup_steps: steps before the nadir is measured, static, >= 0.
      nadir_steps: steps over which the nadir is averaged, static, >= 1.
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `STCHState`. `update` needs `losses=`. Cost: O(T).

    Raises:
      ValueError: if a number is outside its range.

    Notes:
      The equation in the paper has losses minus an ideal point, and a preference vector; the authors'
      code has log losses relative to the nadir. The warm-up in the code is in epochs: ``warmup_steps`` is
      epochs times steps per epoch, and ``nadir_steps`` is one epoch.

      A negative loss is weighted by its absolute value, so that it still decreases. A loss of 0 has
      weight 0 and is excluded from the softmax (the code adds 1e-20). Weights are at most 1.8e19
      (float32). Each task counts the steps at which it was present. With one task, the update is its
      gradient divided by the loss.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.stch(2, mu=0.5)
      >>> state = tx.init(jnp.zeros(2))
      >>> for losses in ([4., 1.], [2., 1.]):
      ...     update, state = tx.update(jnp.eye(2), state, losses=jnp.array(losses))
      >>> print(np.asarray(update).round(3))
      [0.2 1.6]

    References:
      Lin, Zhang, Yang, Liu, Wang and Zhang, Smooth Tchebycheff Scalarization for Multi-Objective
      Optimization, 2024, https://arxiv.org/abs/2402.19078
    """
    axis = read_tasks("stch", tasks)

    def init(dtype: DType) -> STCHState:
        return STCHState(jnp.zeros((axis.number,), dtype), jnp.zeros((axis.number,), jnp.int32))

    def weigh(inputs: StepInputs, state: STCHState) -> tuple[jax.Array, STCHState]:
        active, dtype = inputs.active, inputs.losses.dtype
        sizes, usable = magnitudes(inputs.losses, active)
        nadir, _ = magnitudes(state.nadir, active)
        logs = jnp.log(sizes)
        log_shares = log_softmax((logs - jnp.log(nadir)) / jnp.asarray(mu, dtype), usable)
        known = jnp.all((state.num_steps == warmup_steps + nadir_steps) | ~active)
        log_weights = jnp.where(known, log_shares + jnp.log(count_active(active, dtype)), 0) - logs
        early = early_means(inputs, *state, warmup_steps, nadir_steps)
        return exp_weights(log_weights, usable), STCHState(*early)

    return from_rule("stch", axis, WeightRule(frozenset({"losses"}), weigh, init), **options)
