"""MTAdam: Adam with the moments of every task apart, and gradients brought to the anchor's norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_optax import task_tree
from mtl_optax.arguments import check_num_tasks, check_range
from mtl_optax.from_gradients import TaskGradients, from_gradients
from mtl_optax.from_rule import next_count
from mtl_optax.method import Method
from mtl_optax.task_tree import along_tasks


class MTAdamState(NamedTuple):
    """What MTAdam remembers.

    Attributes:
      task_counts: int32 `[T]`, in how many steps each task was present.
      norm_ema: a tree of `[T]`, the moving average of each tensor's gradient norms; starts at the first.
      mu: leaves `[T, *shape]`, first moments of the rescaled gradients.
      nu: leaves `[T, *shape]`, second moments.
    """

    task_counts: jax.Array
    norm_ema: Any
    mu: Any
    nu: Any


class _Decays(NamedTuple):
    b1: jax.Array
    b2: jax.Array
    b3: jax.Array
    eps: jax.Array


def mtadam(
    learning_rate: Any,
    num_tasks: int,
    *,
    b1: Any = 0.9,
    b2: Any = 0.999,
    b3: Any = 0.9,
    eps: Any = 1e-8,
    ranks: Any = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""A whole optimizer: Adam that balances the gradient norms of tasks tensor by tensor.

    Hand-tuned loss weights are out of tune again when gradients change during training. MTAdam sets the
    weights anew in every step and tensor, so that all tasks pull as hard as the anchor, and divides by
    the largest second moment, so that no task can take an uncontrolled step.

    In every tensor, with :math:`n_t = |g_t|`, ``ranks`` :math:`r_t` and the anchor a:

    .. math::
        m_t \leftarrow b_3 m_t + (1 - b_3) n_t, \qquad \tilde g_t = r_t \frac{m_a}{m_t}\, g_t, \qquad
        update = -\eta \sum_t \hat\mu_t \Big/ \max_t (\sqrt{\hat\nu_t} + \epsilon),

    where :math:`\hat\mu_t, \hat\nu_t` are Adam's bias-corrected moments of :math:`\tilde g_t`. The average
    :math:`m_t` starts at the first norm. The anchor is the first task whose average is above 0. The
    update is up to T learning rates an entry: "own" scale. Algorithm 1 of the paper.

    Differences from the authors' program: there, averages below 1e-10 count as 0, whatever the scale of
    the loss; a tensor without any gradient raises; weight decay is added to every task's gradient, T
    times in all. Here decay is one more line, `optax.chain(mtadam(...), optax.add_decayed_weights(...))`
    with the coefficient `-learning_rate * decay`, and AMSGrad is left out.

    Degenerate input: a task whose average is 0 has only zero gradients, and contributes 0. All zero: the
    update is 0 or what momentum is left. An absent task's moments stay; it takes no part in the sum or
    in the largest moment. T = 1: Adam.

    Args:
      learning_rate: a number or a schedule of the step.
      num_tasks: T, static. The order of these two is that of the published interface.
      b1: decay of the first moments.
      b2: decay of the second moments.
      b3: decay of the norm averages.
      eps: epsilon beside the root, as in Adam.
      ranks: `[T]`, how hard each task shall pull relative to the anchor; None is one each.
      axis_name: mapped axes over which the elements of the gradients are split (`WeightingOptions`).

    Returns:
      A transformation from leaves `[T, *shape]` to parameter updates `[*shape]`, sign included. State:
      `MTAdamState`; the state's `weights` are the mean over tensors of what gradients were multiplied by.
      Cost: one pass for the norms, one for the moments; memory: 2T gradients.

    Raises:
      ValueError: for ranks without T entries, or decays outside [0, 1].

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.mtadam(0.1, 2)
      >>> grads = jnp.array([[3., 4.], [0., 500.]])
      >>> update, _ = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> np.array(update, float).round(3).tolist()
      [-0.1, -0.18]

    References:
      Malkiel and Wolf, MTAdam: Automatic Balancing of Multiple Training Loss Terms, 2021.
    """
    num_tasks = check_num_tasks("mtadam", num_tasks)
    check_range("mtadam", b1=(b1, 0, 1), b2=(b2, 0, 1), b3=(b3, 0, 1), eps=(eps, 0, float("inf")))
    if ranks is not None and np.shape(ranks) != (num_tasks,):
        raise ValueError(
            f"mtadam: ranks must have shape ({num_tasks},), one number per task; found "
            f"{np.shape(ranks)}."
        )

    def init(params: Any, dtype: Any) -> MTAdamState:
        return MTAdamState(
            task_counts=jnp.zeros((num_tasks,), jnp.int32),
            norm_ema=jax.tree.map(lambda p: jnp.zeros((num_tasks,), dtype), params),
            mu=task_tree.per_task_zeros(params, num_tasks, dtype),
            nu=task_tree.per_task_zeros(params, num_tasks, dtype),
        )

    def apply(view: TaskGradients, state: MTAdamState) -> tuple[Any, jax.Array, MTAdamState]:
        active, dtype = view.active, view.dtype
        decays = _Decays(*(jnp.asarray(x, dtype) for x in (b1, b2, b3, eps)))
        rank = jnp.ones((num_tasks,), dtype) if ranks is None else jnp.asarray(ranks, dtype)
        counts = next_count(state.task_counts, active)
        norm_ema = _norm_averages(view, state, decays.b3, axis_name)
        leaves, treedef = jax.tree.flatten(view.updates)
        rate = _rate(learning_rate, view.step, dtype)
        steps, mus, nus, weights = [], [], [], jnp.zeros((num_tasks,), dtype)
        for leaf, ema, mu, nu in zip(
            leaves, norm_ema, jax.tree.leaves(state.mu), jax.tree.leaves(state.nu), strict=True
        ):
            anchor = ema[jnp.argmax(ema > 0)]
            divisor = jnp.where(ema > 0, ema, 1)
            # First over the own average, then times the anchor's: their ratio may leave the range.
            unit = leaf.astype(dtype) / along_tasks(divisor, leaf.ndim)
            scaled = unit * along_tasks(rank * anchor, leaf.ndim)
            here = along_tasks(active, leaf.ndim)
            mus.append(jnp.where(here, decays.b1 * mu + (1 - decays.b1) * scaled, mu))
            nus.append(jnp.where(here, decays.b2 * nu + (1 - decays.b2) * scaled**2, nu))
            steps.append(rate * _adam_step(mus[-1], nus[-1], counts, active, decays))
            largest = jnp.asarray(jnp.finfo(dtype).max, dtype)
            weights = weights + jnp.minimum(rank * anchor / divisor, largest) / len(leaves)
        unflatten = treedef.unflatten
        new = MTAdamState(counts, unflatten(norm_ema), unflatten(mus), unflatten(nus))
        return unflatten(steps), weights, new

    return from_gradients("mtadam", num_tasks, init, apply, axis_name=axis_name)


def _rate(learning_rate: Any, step: jax.Array, dtype: Any) -> jax.Array:
    value = learning_rate(step) if isinstance(learning_rate, Callable) else learning_rate
    return jnp.asarray(value).astype(dtype)


def _norm_averages(
    view: TaskGradients, state: MTAdamState, decay: jax.Array, axis_name: Any
) -> list[jax.Array]:
    """The moved averages `[T]`, one a tensor."""
    leaves = task_tree.leaves_of(view.updates)
    grouping = task_tree.Blocks(tuple(range(len(leaves))), ("",) * len(leaves), False)
    num_tasks = view.active.shape[0]
    norms, _ = task_tree.norms(
        view.updates, grouping, num_tasks, view.dtype, view.active, axis_name
    )
    moved = []
    for norm, old in zip(norms, jax.tree.leaves(state.norm_ema), strict=False):
        new = jnp.where(state.task_counts > 0, decay * old + (1 - decay) * norm, norm)
        moved.append(jnp.where(view.active, new, old))
    return moved


def _adam_step(
    mu: jax.Array, nu: jax.Array, counts: jax.Array, active: jax.Array, decays: _Decays
) -> jax.Array:
    """Minus the sum over active tasks of the first moments over their largest second moment's root."""
    seen = jnp.maximum(counts, 1).astype(mu.dtype)
    here = along_tasks(active, mu.ndim)
    first = mu / along_tasks(1 - decays.b1**seen, mu.ndim)
    second = nu / along_tasks(1 - decays.b2**seen, mu.ndim)
    total = jnp.sum(jnp.where(here, first, 0), axis=0)
    largest = jnp.max(jnp.where(here, jnp.sqrt(second) + decays.eps, 0), axis=0)
    return -jnp.where(largest > 0, total / jnp.where(largest > 0, largest, 1), 0)


METHOD = Method(
    name="mtadam",
    factory=mtadam,
    needs=("gradients",),
    family="from_gradients",
    scale="own",
    reference="Malkiel and Wolf, MTAdam, 2021",
    make=lambda num_tasks: mtadam(1e-3, num_tasks),
    properties=frozenset(),
)
