"""MTAdam: Adam with separate moments per task, and gradients with the norm of an anchor task."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core import task_tree
from mtl_optax.core.factory import Decay, Nonnegative, factory
from mtl_optax.core.state import next_count
from mtl_optax.core.task_tree import along_tasks
from mtl_optax.core.types import AxisName, DType, Number, PerTask
from mtl_optax.core.validation import task_numbers
from mtl_optax.rule import Method, StepInputs, UpdateRule, from_rule
from mtl_optax.solvers.arithmetic import clip_finite, move_average, safe_divide
from mtl_optax.solvers.log_weights import largest_weight


class MTAdamState(NamedTuple):
    """State of `scale_by_mtadam`.

    Attributes:
      task_counts: int32 `[T]`, the number of steps in which each task was active.
      norm_ema: a tree of `[T]`, the EMA of the gradient norms of each tensor; starts at the first norm.
      mu: leaves `[T, *shape]`, first moments of the rescaled gradients.
      nu: leaves `[T, *shape]`, second moments of the rescaled gradients.
    """

    task_counts: jax.Array
    norm_ema: optax.Updates
    mu: optax.Updates
    nu: optax.Updates


@factory
def scale_by_mtadam(
    tasks: int | Collection[str],
    *,
    b1: Decay = 0.9,
    b2: Decay = 0.999,
    b3: Decay = 0.9,
    eps: Nonnegative = 1e-8,
    ranks: PerTask | None = None,
    axis_name: AxisName = None,
) -> Method:
    r"""Scales by Adam with separate moments per task, and balances the gradient norms in every tensor.

    The gradient norms of tasks change during training, so fixed loss weights do not keep tasks balanced.
    MTAdam rescales all gradients to the norm of an anchor task in every step and tensor, and divides by
    the largest second moment, so that no task takes an excessively large step.

    In every tensor, with :math:`n_t` the norm of task t's gradient, ``ranks`` :math:`r_t` and the anchor
    a, the first task whose average :math:`m_t` is positive:

    .. math::
        m_t \leftarrow b_3 m_t + (1 - b_3) n_t, \qquad
        \tilde g_t = r_t \frac{m_a}{m_t}\, g_t, \qquad
        update = \sum_t \hat\mu_t \Big/ \max_t (\sqrt{\hat\nu_t} + \epsilon)

    where :math:`\hat\mu_t, \hat\nu_t` are Adam's bias-corrected moments of :math:`\tilde g_t`, and
    :math:`m_t` starts at the first norm. Scale: the method's own, up to T per entry. Algorithm 1 of the
    paper.

    Args:
      tasks: T, or the task names.
      b1: decay of the first moments.
      b2: decay of the second moments.
      b3: decay of the norm averages.
      eps: added to the root of the second moments, as in Adam.
      ranks: relative gradient norms of the tasks after rescaling, `[T]` or a dictionary by task name;
        None means 1 for every task.
      axis_name: see `MethodOptions`.

    Returns:
      A `Method` with `MTAdamState` in `state.rule_state`. The update has the sign of
      `optax.scale_by_adam`. `state.weights` are the factors of the gradients, averaged over tensors.
      Cost: one pass over the gradients for the norms, one for the moments; memory: 2T gradients.

    Raises:
      ValueError: if `ranks` does not have T entries, a decay is outside [0, 1), or `eps` is negative.

    Notes:
      This method replaces Adam: put `optax.scale_by_learning_rate` after it in the chain, and
      `optax.add_decayed_weights` between them for weight decay.

      The authors' code differs: averages below 1e-10 count as 0 for any scale of the loss, a tensor
      without any gradient raises, weight decay is added to the gradient of every task (T times in total),
      and AMSGrad is an option.

      The average of a task is zero if it has had only zero gradients; the task then contributes 0. If all
      gradients of a step are zero, the update is the remaining momentum. The moments of an absent task do
      not change, and the sum and the maximum exclude it. With one task, the method is Adam.

    Example:

      >>> import jax.numpy as jnp, optax, mtl_optax as mtl
      >>> tx = optax.chain(mtl.scale_by_mtadam(2), optax.scale_by_learning_rate(0.1))
      >>> grads = jnp.array([[3., 4.], [0., 500.]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> [round(float(x), 3) for x in update]
      [-0.1, -0.18]

    References:
      Malkiel and Wolf, MTAdam: Automatic Balancing of Multiple Training Loss Terms, 2021,
      https://arxiv.org/abs/2006.14683
    """
    ranks = task_numbers("scale_by_mtadam", "ranks", ranks, tasks, 0)

    def init(params: optax.Params, num_tasks: int, dtype: DType) -> MTAdamState:
        return MTAdamState(
            task_counts=jnp.zeros((num_tasks,), jnp.int32),
            norm_ema=jax.tree.map(lambda p: jnp.zeros((num_tasks,), dtype), params),
            mu=task_tree.per_task_zeros(params, num_tasks, dtype),
            nu=task_tree.per_task_zeros(params, num_tasks, dtype),
        )

    def apply(
        inputs: StepInputs, state: MTAdamState
    ) -> tuple[optax.Updates, jax.Array, MTAdamState]:
        active, dtype = inputs.active, inputs.dtype
        structure = jax.tree.structure(inputs.updates)
        rank = jnp.ones(active.shape, dtype) if ranks is None else jnp.asarray(ranks, dtype)
        counts = next_count(state.task_counts, active)
        corrections = [
            1 - jnp.asarray(decay, dtype) ** jnp.maximum(counts, 1).astype(dtype)
            for decay in (b1, b2)
        ]

        def one(
            gradients: jax.Array, ema: jax.Array, mu: jax.Array, nu: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
            """Returns the step, the moments and the factors of the gradients of one tensor."""
            present, first, second = (
                along_tasks(x, gradients.ndim) for x in (active, *corrections)
            )
            scaled, factors = _rescale(gradients.astype(dtype), ema, rank)
            mu = move_average(mu, scaled, b1, present)
            nu = move_average(nu, scaled**2, b2, present)
            total = jnp.sum(mu / first, axis=0, where=present)
            roots = jnp.sqrt(nu / second) + jnp.asarray(eps, dtype)
            step = safe_divide(total, jnp.max(roots, axis=0, where=present, initial=0))
            return step, mu, nu, factors / structure.num_leaves

        norm_ema = _norm_averages(inputs, state, b3, axis_name)
        trees = (inputs.updates, norm_ema, state.mu, state.nu)
        results = [one(*leaves) for leaves in zip(*map(jax.tree.leaves, trees), strict=True)]
        steps, mu, nu, factors = ([result[i] for result in results] for i in range(4))
        weights = sum(factors, jnp.zeros(active.shape, dtype))
        new = MTAdamState(counts, norm_ema, structure.unflatten(mu), structure.unflatten(nu))
        return structure.unflatten(steps), weights, new

    rule = UpdateRule(frozenset({"gradients"}), apply, init)
    return from_rule("scale_by_mtadam", tasks, rule, axis_name=axis_name)


def _rescale(gradients: jax.Array, ema: jax.Array, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rescales the gradients of one tensor to the average norm of the anchor; returns the factors too."""
    target = rank * ema[jnp.argmax(ema > 0)]
    # The division is first, because the ratio of the two averages may overflow.
    unit = safe_divide(gradients, along_tasks(ema, gradients.ndim), gradients)
    longest = largest_weight(gradients.dtype) / 2  # whose square is finite
    # A gradient that counts as zero can still be large relative to an average that has decayed.
    scaled = jnp.clip(unit * along_tasks(target, gradients.ndim), -longest, longest)
    return scaled, clip_finite(safe_divide(target, ema, target))


def _norm_averages(
    inputs: StepInputs, state: MTAdamState, decay: Number, axis_name: AxisName
) -> optax.Updates:
    """Returns the new averages `[T]` of every tensor, which start at the first norm."""
    blocks = task_tree.assign_blocks(state.norm_ema, "leaf")
    found = task_tree.norms(inputs.updates, blocks, inputs.active, inputs.dtype, axis_name)
    old, structure = jax.tree.flatten(state.norm_ema)
    decays = jnp.where(state.task_counts > 0, decay, 0)
    # An empty tree has one block and no tensor.
    pairs = zip(old, found.norms, strict=False)
    return structure.unflatten([move_average(*pair, decays, inputs.active) for pair in pairs])
