"""SDMGrad: min-norm weights by a few gradient steps, regularised towards the mean gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax import lax

from mtl_optax.core.extra_args import given_gram
from mtl_optax.core.factory import Nonnegative, NonnegativeInt, Share, factory
from mtl_optax.core.types import DType
from mtl_optax.rule import Method, MethodOptions, StepInputs, WeightRule, from_rule
from mtl_optax.solvers.arithmetic import mean_active, safe_divide
from mtl_optax.solvers.cosine import product, uniform_weights
from mtl_optax.solvers.simplex import keep_shares, project_onto_simplex, renormalize


class SDMGradState(NamedTuple):
    """State of `sdmgrad`, `[T]` per block.

    Attributes:
      simplex_weights: w; starts uniform.
    """

    simplex_weights: jax.Array


@factory
def sdmgrad(
    tasks: int | Collection[str],
    *,
    lam: Nonnegative = 0.3,
    num_steps: NonnegativeInt = 20,
    step_size: Nonnegative = 10.0,
    momentum: Share = 0.5,
    **options: Unpack[MethodOptions],
) -> Method:
    r"""Combines the min-norm direction with the mean gradient.

    MGDA can make little progress on the mean loss; ``lam`` sets the share of the mean gradient.

    .. math:: w \approx \arg\min_{w \in \Delta} \tfrac12 w^\top K w + \lambda\, w^\top K w_0, \qquad
        update = \frac{\sum_t w_t g_t + \lambda\, \bar g}{1 + \lambda},

    with :math:`\bar g` the mean of the task gradients, :math:`w_0` uniform, ``lam`` :math:`\lambda`, and
    K the Gram matrix divided by the square of the mean gradient norm. Scale: mean-like; lam = 0 is close
    to MGDA, a large lam to the mean. Algorithm 1 of the paper.

    Args:
      tasks: T, or the task names.
      lam: weight of the mean gradient; not negative.
      num_steps: number of projected gradient steps on w, static.
      step_size: size of these steps; not negative.
      momentum: momentum of these steps, in [0, 1].
      **options: see `MethodOptions`.

    Returns:
      A `Method` with the state `SDMGradState`; its `update` takes `gram=`, `[T, T]` (see Notes). Cost: one
      pass over the gradients for the Gram matrix, one for the sum, and `num_steps` products with a
      `[T, T]` matrix; independent samples need more backward passes.

    Raises:
      ValueError: if a number is outside its range, or `gram` has the wrong shape.

    Notes:
      The paper uses three independent samples: two for K and one for the update. Without `gram=`, all
      three are the gradients given to `update`, as in the authors' training code (its samples share one
      buffer). With it, ``gram[s, t]`` is the inner product of task s's gradient on one batch and task t's
      on another:
      ``jax.vmap(lambda a: jax.vmap(lambda b: optax.tree.vdot(a, b))(second))(first)``.

      The steps start at the weights of the previous update, with momentum 0, and the momentum ignores the
      projection. With the default step size they do not contract: similar inputs can end at different
      weights, as in the authors' code.

      The authors' code adds 1e-4 to the squared norms before the root, multiplies the update by T and
      clips it to norm 1; for the last two chain ``optax.scale(T)`` and ``optax.clip_by_global_norm(1.0)``.

      The weight of a zero gradient increases, as in MGDA. If all gradients are zero, the update is 0.
      Diagonal entries of `gram` below 0 count as 0 in the mean norm; if the mean norm is 0, the weights
      do not change. The weight of an absent task does not change. With one task, the update is its
      gradient.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.sdmgrad(2, lam=0.5, num_steps=100, step_size=0.1)
      >>> _, state = tx.update(jnp.array([[1., 0.], [0., 1.]]), tx.init(jnp.zeros(2)))
      >>> print(np.asarray(state.weights).round(3))
      [[0.5 0.5]]

    References:
      Xiao, Ban and Ji, Direction-oriented Multi-objective Learning: Simple and Provable Stochastic
      Algorithms, 2023, https://arxiv.org/abs/2305.18409
    """

    def init(num_tasks: int, dtype: DType) -> SDMGradState:
        return SDMGradState(jnp.full((num_tasks,), 1 / num_tasks, dtype))

    def weigh(inputs: StepInputs, state: SDMGradState) -> tuple[jax.Array, SDMGradState]:
        dtype, active = inputs.norms.dtype, inputs.active
        gram = given_gram("sdmgrad", inputs)
        if gram is None:
            matrix = dataclasses.replace(inputs, norms=_over_mean(inputs.norms, active)).gram
        else:
            mean = mean_active(jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0)), active)
            # Divided twice, because the square of the mean can overflow.
            matrix = safe_divide(safe_divide(gram, mean), mean)
        uniform = uniform_weights(active, dtype)
        share, rate = jnp.asarray(lam, dtype), jnp.asarray(step_size, dtype)
        decay = jnp.asarray(momentum, dtype)
        pull = share * product(matrix, uniform)

        def step(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            weights, trace = carry
            trace = decay * trace + product(matrix, weights) + pull
            return project_onto_simplex(weights - rate * trace, active), trace

        old = renormalize(state.simplex_weights, active)
        new, _ = lax.fori_loop(0, num_steps, step, (old, jnp.zeros_like(old)))
        kept = keep_shares(new, state.simplex_weights, active)
        return (new + share * uniform) / (1 + share), SDMGradState(kept)

    rule = WeightRule(frozenset({"gram"}), weigh, init, ("gram",))
    return from_rule("sdmgrad", tasks, rule, **options)


def _over_mean(norms: jax.Array, active: jax.Array) -> jax.Array:
    """Divides norms by their mean; first by the largest norm, so that their sum cannot overflow."""
    lengths = safe_divide(norms, jnp.max(norms))
    return safe_divide(lengths, mean_active(lengths, active))
