"""One weight a collocation point: residual-based attention as a method of one's own."""

import jax
import jax.numpy as jnp

import mtl_optax as mtl


def residual_attention(num_points: int, decay: float = 0.999, step: float = 0.01) -> mtl.Method:
    r"""Weighs the squared residual of every point by how large it has been.

    With :math:`r_i` the residual at point i, :math:`\gamma` = ``decay`` and :math:`\eta` = ``step``,

    .. math:: \lambda_i \leftarrow \gamma \lambda_i + \eta |r_i| / \max_j |r_j|,

    from 0 on, and the loss is the mean of :math:`(\lambda_i r_i)^2`. The points are the tasks, so
    `weigh_losses` takes their squared residuals, and the cost is that of a few vector operations. The
    points must come back: use a fixed set. Points that are not in a step (`active=`) keep their
    :math:`\lambda`.

    References:
      Anagnostopoulos, Toscano, Stergiopulos and Karniadakis, Residual-Based Attention in Physics-Informed
      Neural Networks, 2024, https://arxiv.org/abs/2307.00379
    """

    def weigh(inputs: mtl.StepInputs, attention: jax.Array) -> tuple[jax.Array, jax.Array]:
        size = jnp.sqrt(inputs.losses)  # the losses are squared residuals
        moved = decay * attention + step * size / jnp.maximum(jnp.max(size), 1e-30)
        attention = jnp.where(inputs.active, moved, attention)
        return attention**2, attention

    rule = mtl.WeightRule(frozenset({"losses"}), weigh, jnp.zeros)
    return mtl.from_rule("residual_attention", num_points, rule)
