"""PUB: Nash bargaining between the Adam updates of the tasks, which share their moments."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mtl_optax.core import task_tree
from mtl_optax.core.factory import Decay, Nonnegative, PositiveInt, factory
from mtl_optax.core.shared_rules import fair_rule
from mtl_optax.core.state import next_count
from mtl_optax.core.task_tree import along_tasks
from mtl_optax.core.types import AxisName, DType
from mtl_optax.rule import Method, StepInputs, UpdateRule, from_rule
from mtl_optax.solvers.arithmetic import move_average, safe_divide
from mtl_optax.solvers.log_weights import clip_weights, largest_weight


class PUBState(NamedTuple):
    """State of `scale_by_pub`.

    Attributes:
      steps: int32 scalar, the number of steps with an active task.
      last_weights: `[T]`, the last weights, which start at 0.
      mu: the first moments of the weighted sum of the gradients, which the tasks share.
      nu: its second moments.
      bargaining: a `BargainingState`, which counts the steps without a solution.
    """

    steps: jax.Array
    last_weights: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    bargaining: optax.OptState


@factory
def scale_by_pub(
    tasks: int | Collection[str],
    *,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    eps: Nonnegative = 1e-8,
    update_every: PositiveInt = 1,
    axis_name: AxisName = None,
) -> Method:
    r"""Takes the Nash bargaining solution of the updates that Adam would take for each task.

    A gradient that is fair to all tasks does not give a fair step, because Adam rescales it element by
    element and adds momentum. PUB balances the steps instead. With :math:`\mu, \nu` Adam's moments, which
    all tasks share, and U the matrix with rows :math:`u_t`:

    .. math::
        u_t = \frac{(b_1 \mu + (1 - b_1)\, g_t) / (1 - b_1^k)}
        {\sqrt{(b_2 \nu + (1 - b_2)\, g_t^2) / (1 - b_2^k)} + \epsilon}, \qquad
        U U^\top w = 1 / w, \quad w > 0, \qquad update = \sum_t w_t u_t.

    The moments are then updated with :math:`\sum_t w_t g_t`. Scale: the method's own; with new weights
    the norm is :math:`\sqrt T` for any number of parameters, unlike the norm of Adam's updates, so tune
    the learning rate.

    Args:
      tasks: T, or the task names.
      b1: decay of the first moments.
      b2: decay of the second moments.
      eps: added to the root of the second moments, as in Adam.
      update_every: steps between new weights, static, >= 1; the authors use 10.
      axis_name: see `MethodOptions`.

    Returns:
      A `Method` with `PUBState` in `state.rule_state`. The update has the sign of `optax.scale_by_adam`.
      Cost: one pass over the gradients for the sum, and one for the T(T+1)/2 inner products of the
      updates if the weights are new; memory: 2 gradients.

    Raises:
      ValueError: if a number is outside its range.

    Notes:
      This method replaces Adam: put `optax.scale_by_learning_rate` after it in the chain, and
      `optax.add_decayed_weights` between them for weight decay. With moments of its own for every task,
      the method is ``optax.chain(per_task(optax.scale_by_adam(), T), nash_mtl(T))``.

      The weights of updates that almost cancel are large. If they are kept for 10 steps, as in the
      authors' code, the update can be much longer than :math:`\sqrt T`: all five paths on the toy problem
      of the documentation then diverge. With new weights in every step none does.

      The authors' code renews the weights in steps 1, 11, ..., with weights of 1 before, and corrects the
      bias of the updates in the bargaining for one step less. It names a solver that does not exist and
      ignores the error, so its weights stay 1. It applies weight decay T times.

      If the bargaining has no solution, as for a task whose update is 0, the weights are those of the
      min-norm point, and ``rule_state.bargaining.fallback_count`` increases. As long as an active task has
      the weight 0, every step computes new weights. An absent task keeps its weight. With one task, the
      update is a multiple of Adam's.

    Example:

      >>> import jax.numpy as jnp, numpy as np, optax, mtl_optax as mtl
      >>> tx = optax.chain(mtl.scale_by_pub(2), optax.scale_by_learning_rate(0.1))
      >>> grads = jnp.array([[3., 4., 0.], [0., 50., 1.]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(3)))
      >>> print(np.asarray(update).round(3))
      [-0.058 -0.115 -0.058]

    References:
      Yuan, Cai and Dong, A Parameter Update Balancing Algorithm for Multi-task Ranking Models in
      Recommendation Systems, 2024, https://arxiv.org/abs/2410.05806
    """
    bargain = fair_rule(1.0)

    def init(params: optax.Params, num_tasks: int, dtype: DType) -> PUBState:
        def zeros() -> optax.Updates:
            return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params)

        steps, weights = jnp.zeros((), jnp.int32), jnp.zeros((num_tasks,), dtype)
        return PUBState(steps, weights, zeros(), zeros(), bargain.init(num_tasks, dtype))

    def apply(inputs: StepInputs, state: PUBState) -> tuple[optax.Updates, jax.Array, PUBState]:
        active, dtype = inputs.active, inputs.dtype
        anyone = jnp.any(active)
        steps = next_count(state.steps, anyone)
        count = jnp.maximum(steps, 1).astype(dtype)
        corrections = [1 - jnp.asarray(decay, dtype) ** count for decay in (b1, b2)]
        gradients = jax.tree.map(lambda g: g.astype(dtype), inputs.updates)

        def direction(g: jax.Array, mu: jax.Array, nu: jax.Array) -> jax.Array:
            """Returns the updates `[T, *shape]` that Adam would take for each task."""
            present = along_tasks(active, g.ndim)
            up = move_average(mu[None], g, b1, present) / corrections[0]
            square = move_average(nu[None], g * g, b2, present) / corrections[1]
            down = jnp.sqrt(square) + jnp.asarray(eps, dtype)
            return jnp.where(present, safe_divide(up, down), 0)

        updates = jax.tree.map(direction, gradients, state.mu, state.nu)

        def fresh() -> tuple[jax.Array, optax.OptState]:
            measured = _measured(inputs, updates, axis_name)
            weights, bargaining = bargain.weigh(measured, state.bargaining)
            return jnp.where(active, clip_weights(weights), state.last_weights), bargaining

        due = (inputs.step % update_every == 0) | jnp.any(active & (state.last_weights <= 0))
        weights, bargaining = lax.cond(due, fresh, lambda: (state.last_weights, state.bargaining))
        applied = jnp.where(active, weights, 0)

        longest = largest_weight(dtype) / 2  # whose square is finite
        joint = jax.tree.map(
            lambda g: jnp.clip(g, -longest, longest), _weighted_sum(gradients, applied)
        )
        mu = jax.tree.map(lambda old, new: move_average(old, new, b1, anyone), state.mu, joint)
        nu = jax.tree.map(lambda old, new: move_average(old, new**2, b2, anyone), state.nu, joint)
        new = PUBState(steps, weights, mu, nu, bargaining)
        return _weighted_sum(updates, applied), weights, new

    rule = UpdateRule(frozenset({"gradients"}), apply, init)
    return from_rule("scale_by_pub", tasks, rule, axis_name=axis_name)


def _measured(inputs: StepInputs, updates: optax.Updates, axis_name: AxisName) -> StepInputs:
    """Returns the inputs of a rule that weighs `updates` in place of the gradients."""
    blocks = task_tree.assign_blocks(task_tree.without_task_axis(updates), "all")
    num_tasks = inputs.active.shape[0]
    products = task_tree.products(updates, blocks, num_tasks, axis_name, pairs=True)
    found = task_tree.measure(products, inputs.active, inputs.dtype)
    return dataclasses.replace(inputs, cosine=found.cosine[0], norms=found.norms[0])


def _weighted_sum(tree: optax.Updates, weights: jax.Array) -> optax.Updates:
    return jax.tree.map(lambda x: jnp.sum(along_tasks(weights, x.ndim) * x, axis=0), tree)
