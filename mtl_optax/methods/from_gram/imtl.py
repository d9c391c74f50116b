"""IMTL: learned loss scales (IMTL-L) under equal projections (IMTL-G)."""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from mtl_optax.arguments import check_num_tasks
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule, rule_of
from mtl_optax.method import Method
from mtl_optax.methods.from_losses.imtl_l import imtl_l
from mtl_optax.solvers.equal_projection import equal_projection_weights


def imtl(
    num_tasks: int,
    *,
    optimizer: optax.GradientTransformation = optax.adam(1e-3),
    **options: Unpack[WeightingOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Scales losses to the same size, then makes all tasks progress equally.

    `imtl_l` balances the losses, and with them the heads; `imtl_g` balances the shared parameters. With
    the trained :math:`s` of `imtl_l` and the gradients :math:`e^{s_t} g_t` of the scaled losses:

    .. math:: a = \text{the weights of IMTL-G for } e^{s_t} g_t, \qquad
        update = \sum_t a_t\, e^{s_t} g_t, \qquad s_t \text{ trained by } e^{s_t} L_t - 1.

    The s start at 0, so that the first update is that of `imtl_g`; its length then follows the scales.
    Algorithm 1 of the paper. As in public code, the IMTL-G weights do not enter the gradient of s. The
    heads' weights are :math:`e^{s_t}`, without a.

    Degenerate input: as `imtl_g` and `imtl_l`. T = 1: :math:`e^{s} g`.

    Args:
      num_tasks: T, static.
      optimizer: trains s; any optax optimizer.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. Needs `losses=`. State: `TrainedState`.
      Cost: one pass over the gradients for the Gram matrix, one for the sum, and a `[T, T]` eigenvalue
      problem.

    Raises:
      ValueError: for missing `losses`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.imtl(2)
      >>> grads, losses = jnp.array([[3., 0.], [0., 1.]]), jnp.array([2., 0.5])
      >>> update, state = tx.update(grads, tx.init(jnp.zeros(2)), losses=losses)
      >>> print(np.asarray(update).round(3))
      [0.75 0.75]

    References:
      Liu et al., Towards Impartial Multi-task Learning, 2021.
    """
    num_tasks = check_num_tasks("imtl", num_tasks)
    scales = rule_of("imtl", imtl_l(num_tasks, optimizer=optimizer))

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        scale, state = scales.weigh(evidence, state)
        # The common size of the scales cancels in a; without it no norm can overflow.
        largest = jnp.max(jnp.where(evidence.active, scale, 0))
        relative = jnp.where(evidence.active, scale / jnp.where(largest > 0, largest, 1), 0)
        shares = equal_projection_weights(
            evidence.cosine, evidence.norms * relative, evidence.active
        )
        return shares * scale, state

    return from_rule(
        Rule("imtl", num_tasks, frozenset({"losses", "gram"}), scales.init, weigh), **options
    )


METHOD = Method(
    name="imtl",
    factory=imtl,
    needs=("losses", "gram"),
    family="from_gram",
    scale="own",
    reference="Liu et al., Towards Impartial Multi-task Learning, 2021",
    make=imtl,
    properties=frozenset({"permutation", "scale", "split"}),
)
