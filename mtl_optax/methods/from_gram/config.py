"""ConFIG: one direction with the same cosine to every gradient."""

from __future__ import annotations

from typing import Any, Unpack

import jax
import optax

from mtl_optax.arguments import check_num_tasks
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.solvers.equal_projection import config_weights


def config(
    num_tasks: int, **options: Unpack[WeightingOptions]
) -> optax.GradientTransformationExtraArgs:
    r"""Takes the direction that has the same cosine with every gradient.

    Made for physics-informed networks, where losses of different terms (equation, boundary, data) differ
    by orders of magnitude: the direction depends on no gradient's length. With the unit gradients
    :math:`u_t` as rows of U:

    .. math:: d_0 = \frac{U^+ 1}{|U^+ 1|}, \qquad update = \Big(\sum_t g_t \cdot d_0\Big)\, d_0.

    Sum-like: equal gradients give their sum. Equation 2 of the paper, with equal weights. The
    pseudo-inverse is taken on the cosine matrix, to the dtype's precision. Where gradients are linearly
    independent all cosines are positive, so that no loss rises; where they are not, equal cosines may not
    exist, and the least-squares direction can conflict.

    Degenerate input: a zero gradient is left out. All zero: 0. Opposite gradients have no common
    direction: 0. T = 1: the gradient itself.

    Args:
      num_tasks: T, static.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Cost: one pass over the gradients for the
      Gram matrix, one for the sum, and a `[T, T]` eigenvalue problem.

    Raises:
      TypeError: where `num_tasks` is not a static integer.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.config(2)
      >>> grads = jnp.array([[2., 0.], [0., 1.]])
      >>> print(np.asarray(tx.update(grads, tx.init(jnp.zeros(2)))[0]).round(3))
      [1.5 1.5]

    References:
      Liu, Chu and Thuerey, ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks,
      2024.
    """
    num_tasks = check_num_tasks("config", num_tasks)

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        return config_weights(evidence.cosine, evidence.norms, evidence.active), state

    rule = Rule("config", num_tasks, frozenset({"gram"}), lambda dtype: (), weigh)
    return from_rule(rule, **options)


METHOD = Method(
    name="config",
    factory=config,
    needs=("gram",),
    family="from_gram",
    scale="sum",
    reference="Liu, Chu and Thuerey, ConFIG, 2024",
    make=config,
    properties=frozenset({"permutation", "scale", "split"}),
)
