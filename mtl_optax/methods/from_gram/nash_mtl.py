"""Nash-MTL: the tasks bargain over the direction of the step."""

from __future__ import annotations

import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mtl_optax.arguments import check_num_tasks, check_range
from mtl_optax.from_rule import WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.methods.from_gram.fairgrad import bargaining_rule
from mtl_optax.task_tree import narrow


def nash_mtl(
    num_tasks: int,
    *,
    max_norm: Any = None,
    update_every: int = 1,  # among the options too, but the paper's own: named for its readers
    **options: Unpack[WeightingOptions],  # pyright: ignore[reportGeneralTypeIssues]
) -> optax.GradientTransformationExtraArgs:
    r"""Takes the Nash bargaining solution: the direction with the largest product of progresses.

    .. math:: \max_{|d| \le r} \sum_t \log (g_t \cdot d), \qquad
        G G^\top a = 1 / a \;\text{(elementwise)}, \quad a > 0, \qquad update = \sum_t a_t g_t.

    It is blind to the scale of each task: multiplying one loss by a constant changes nothing. Every task
    gets progress :math:`g_t \cdot d = 1 / a_t > 0`. The norm is always :math:`\sqrt T`, whatever the
    gradients: the learning rate sets the step, and ``max_norm`` <= sqrt(T) always clips while the
    weights are fresh. Algorithm 1 of the paper.

    The root is found by Newton's method on the cosine matrix, to the dtype's precision. The authors'
    program runs at most 20 convex programs on the host and silently keeps the previous weights where they
    fail, which is most of the time for norms that differ much. The weights also scale the heads there:
    see `split_value_and_grad`.

    Degenerate input: as `fairgrad`: where no solution exists (a zero gradient; 0 in the convex hull of
    the gradients) the weights are those of MGDA, whose update vanishes there, and
    ``rule_state.fallback_count`` counts. All zero: 0, counted. T = 1: the unit gradient.

    Args:
      num_tasks: T, static.
      max_norm: the update is shortened to this norm, over all leaves together; None does not clip. The
        authors use 1. The weights in the state are those before clipping.
      update_every: bargain anew only every so many steps, and reuse the weights in between.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. State: `BargainingState`. Cost: one pass
      over the gradients for the Gram matrix, one for the sum, and about ten `[T, T]` factorisations;
      with `max_norm` one pass over the update.

    Raises:
      ValueError: for a negative `max_norm`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.nash_mtl(2)
      >>> update, state = tx.update(jnp.array([[8., 0.], [0., 0.1]]), tx.init(jnp.zeros(2)))
      >>> print(np.asarray(update).round(3))
      [1. 1.]
      >>> print(np.asarray(state.weights).round(3))
      [ 0.125 10.   ]

    References:
      Navon et al., Multi-Task Learning as a Bargaining Game, 2022.
    """
    num_tasks = check_num_tasks("nash_mtl", num_tasks)
    check_range("nash_mtl", max_norm=(max_norm, 0, math.inf))
    rule = bargaining_rule("nash_mtl", num_tasks, 1.0)
    balance = from_rule(rule, **{**options, "update_every": update_every})
    if max_norm is None:
        return balance
    reduce, axis_name = options.get("reduce", True), options.get("axis_name")

    def clip(update: Any, dtype: Any) -> Any:
        return _clip(update, max_norm, reduce, axis_name, dtype)

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        result, state = balance.update(updates, state, params, **extra)
        return clip(result, state.weights.dtype), state

    update_fn.rule = rule  # type: ignore[attr-defined]
    update_fn.options = balance.update.options  # type: ignore[attr-defined]
    update_fn.finish = clip  # type: ignore[attr-defined]
    return optax.GradientTransformationExtraArgs(balance.init, update_fn)


def _clip(update: Any, max_norm: Any, reduce: bool, axis_name: Any, dtype: Any) -> Any:
    """Shortens the update (with the task axis: its sum over tasks) to `max_norm`."""
    wide = jax.tree.map(lambda u: u.astype(dtype), update)
    total = wide if reduce else jax.tree.map(lambda u: jnp.sum(u, axis=0), wide)
    squared = optax.tree.norm(total, squared=True)
    norm = jnp.sqrt(squared if axis_name is None else lax.psum(squared, axis_name))
    limit = jnp.asarray(max_norm, dtype)
    factor = jnp.where(norm > limit, limit / jnp.where(norm > 0, norm, 1), 1).astype(dtype)
    return jax.tree.map(lambda w, u: narrow(w * factor, u.dtype), wide, update)


METHOD = Method(
    name="nash_mtl",
    factory=nash_mtl,
    needs=("gram",),
    family="from_gram",
    scale="own",
    reference="Navon et al., Multi-Task Learning as a Bargaining Game, 2022",
    make=nash_mtl,
    properties=frozenset({"non_conflicting", "permutation", "stationary", "split", "task_scale"}),
)
