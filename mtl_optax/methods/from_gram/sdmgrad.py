"""SDMGrad: min-norm weights by stochastic steps, regularised towards the mean gradient."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mtl_optax.arguments import check_num_tasks, check_range
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.methods.from_gram.cross_gram import given_gram
from mtl_optax.solvers.cosine import uniform_weights
from mtl_optax.solvers.simplex import keep_shares, project_onto_simplex, renormalize


class SDMGradState(NamedTuple):
    """w, `[T]`; starts uniform."""

    simplex_weights: jax.Array


def sdmgrad(
    num_tasks: int,
    *,
    lam: Any = 0.3,
    num_steps: int = 20,
    step_size: Any = 10.0,
    momentum: Any = 0.5,
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Combines the min-norm direction with the mean gradient, in proportions that ``lam`` sets.

    .. math:: w \approx \arg\min_{w \in \Delta} \tfrac12 w^\top K w + \lambda\, w^\top K w_0, \qquad
        update = \frac{\sum_t w_t g_t + \lambda\, \bar g}{1 + \lambda},

    with :math:`\bar g` the mean of the task gradients, :math:`w_0` uniform, ``lam`` :math:`\lambda`, and
    K the Gram matrix divided by the square of the mean gradient norm. ``num_steps`` projected gradient
    steps with momentum, from the weights of the step before, solve for w: the momentum starts at 0 every
    time and knows nothing of the projection. Mean-like; lam = 0 is close to MGDA, a large lam the mean.
    Algorithm 1 of the paper.

    The paper wants three independent samples: two for the entries of K, one for the update. Without
    ``gram=`` all are the gradients at hand, which is also what the authors' training code does (its three
    samples share one buffer). With it, ``gram[s, t]`` is the inner product of task s's gradient on
    one batch and task t's on another:
    ``jax.vmap(lambda a: jax.vmap(lambda b: optax.tree.vdot(a, b))(second))(first)``.

    Their code adds 1e-4 to the squared norms before the root, multiplies the update by T and clips it to
    norm 1; here none of that (chain ``optax.scale(T)`` and ``optax.clip_by_global_norm(1.0)``). The
    default step size does not contract: nearby inputs can end at different weights, there as here.

    Degenerate input: all zero: 0. A zero gradient draws weight, as in MGDA. Diagonal entries of ``gram``
    below 0 count as 0 in the mean norm; where that is 0 the weights stay. T = 1: the gradient itself.

    Args:
      num_tasks: T, static.
      lam: weight of the mean gradient, not negative.
      num_steps: steps on w, static.
      step_size: of these steps.
      momentum: of these steps, in [0, 1].
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`; its `update` takes `gram=`, `[T, T]`.
      State: `SDMGradState`; an absent task keeps its weight for its return. Cost: one pass over the
      gradients for the Gram matrix, one for the sum, and `num_steps` products with a `[T, T]` matrix;
      independent samples take more backward passes.

    Raises:
      ValueError: for a `gram` of the wrong shape, or numbers outside their range.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.sdmgrad(2, lam=0.5, num_steps=100, step_size=0.1)
      >>> _, state = tx.update(jnp.array([[1., 0.], [0., 1.]]), tx.init(jnp.zeros(2)))
      >>> print(np.asarray(state.weights).round(3))
      [0.5 0.5]

    References:
      Xiao, Ban and Ji, Direction-oriented Multi-objective Learning: Simple and Provable Stochastic
      Algorithms, 2023.
    """
    num_tasks = check_num_tasks("sdmgrad", num_tasks)
    check_range(
        "sdmgrad",
        lam=(lam, 0, math.inf),
        num_steps=(num_steps, 0, math.inf),
        step_size=(step_size, 0, math.inf),
        momentum=(momentum, 0, 1),
    )

    def init(dtype: Any) -> SDMGradState:
        return SDMGradState(jnp.full((num_tasks,), 1 / num_tasks, dtype))

    def weigh(evidence: Evidence, state: SDMGradState) -> tuple[jax.Array, SDMGradState]:
        dtype, active = evidence.norms.dtype, evidence.active
        gram = given_gram("sdmgrad", num_tasks, evidence)
        if gram is None:
            matrix = evidence._replace(norms=_over_mean(evidence.norms, active)).gram
        else:
            diagonal = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
            mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(active), 1).astype(dtype)
            divisor = jnp.where(mean > 0, mean, 1)
            matrix = jnp.where(mean > 0, gram / divisor / divisor, 0)
        uniform = uniform_weights(active, dtype)
        share, rate = jnp.asarray(lam, dtype), jnp.asarray(step_size, dtype)
        decay = jnp.asarray(momentum, dtype)
        pull = share * jnp.sum(matrix * uniform[None, :], axis=1)

        def step(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            weights, trace = carry
            trace = decay * trace + jnp.sum(matrix * weights[None, :], axis=1) + pull
            return project_onto_simplex(weights - rate * trace, active), trace

        old = renormalize(state.simplex_weights, active)
        new, _ = lax.fori_loop(0, num_steps, step, (old, jnp.zeros_like(old)))
        kept = keep_shares(new, state.simplex_weights, active)
        return (new + share * uniform) / (1 + share), SDMGradState(kept)

    rule = Rule("sdmgrad", num_tasks, frozenset({"gram"}), init, weigh, ("gram",))
    return from_rule(rule, **options)


def _over_mean(norms: jax.Array, active: jax.Array) -> jax.Array:
    """Norms over their mean; the largest one is taken out first, so that nothing overflows."""
    largest = jnp.max(norms)
    lengths = norms / jnp.where(largest > 0, largest, 1)
    mean = jnp.sum(lengths) / jnp.maximum(jnp.sum(active), 1).astype(norms.dtype)
    return lengths / jnp.where(mean > 0, mean, 1)


METHOD = Method(
    name="sdmgrad",
    factory=sdmgrad,
    needs=("gram",),
    family="from_gram",
    scale="mean",
    reference="Xiao, Ban and Ji, Direction-oriented Multi-objective Learning, 2023",
    make=sdmgrad,
    # In exact arithmetic also permutation, scale and split; the default step size amplifies rounding.
    properties=frozenset({"simplex"}),
)
