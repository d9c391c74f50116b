"""Norms, inner products and a weighted sum of T gradients that are not stored.

With the Jacobian J of the losses, the gradient of task t is `g_t = J^T e_t`, a backward pass, and its inner
products with all gradients are `J g_t`, a forward pass of tangents: the transpose of the backward pass.
XLA uses each layer's part of `g_t` as soon as it is computed, so memory holds not even one whole gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mtl_optax.core import task_tree
from mtl_optax.core.types import AxisName, DType
from mtl_optax.placement.pull_back import (
    Mode,
    Pullback,
    chosen_leaves,
    pull_each,
    pull_in_turn,
)


class NotTransposable(TypeError):
    """Raised if JAX cannot transpose the backward pass of a `custom_vjp` in the model."""


@dataclasses.dataclass(frozen=True)
class TaskGradients:
    """The gradients of T losses, of which at most one is computed at a time.

    Every function takes `chosen`, which says for every leaf of the primal whether it counts.

    Attributes:
      pullback: what `vjp_of_losses` returned for losses of one primal.
      losses: the losses `[T]`.
      axis_name: mapped axes over which the leaves are divided.

    Example:

      >>> from mtl_optax.placement.pull_back import vjp_of_losses
      >>> losses, pullback, _ = vjp_of_losses(lambda x: ((x, 3 * x), None), 2.0)
      >>> gradients = TaskGradients(pullback, losses, None)
      >>> gradients.squared_norms([True]).tolist()
      [1.0, 9.0]
      >>> gradients.gram_matrix([True], jnp.float32).tolist()
      [[1.0, 3.0], [3.0, 9.0]]
    """

    pullback: Pullback
    losses: jax.Array
    axis_name: AxisName

    def stack(self, chosen: Sequence[bool], mode: Mode) -> list[jax.Array]:
        """Computes the chosen leaves of all gradients, `[T, *shape]`, by T backward passes in memory."""
        return pull_each(self.pullback, self.losses, mode, lambda g: chosen_leaves(g, chosen))

    def squared_norms(self, chosen: Sequence[bool]) -> jax.Array:
        """Computes the squared norms `[T]`, in at least float32, by T backward passes."""
        return pull_in_turn(
            self.pullback,
            self.losses,
            lambda _, grads: task_tree.squared_norm(chosen_leaves(grads, chosen), self.axis_name),
        )

    def gram_matrix(self, chosen: Sequence[bool], dtype: DType) -> jax.Array:
        """Computes the Gram matrix `[T, T]`, by T backward and T - 1 forward passes.

        The diagonal is `squared_norms`. The other products have the precision of the model's own
        arithmetic. The product of two gradients is not finite if one of them is not.

        Args:
          chosen: see the class.
          dtype: the dtype of the result.

        Returns:
          `[T, T]`.

        Raises:
          NotTransposable: if JAX cannot transpose the backward pass of a `custom_vjp` in the model.
        """
        num_tasks = self.losses.shape[0]

        def row(
            t: int | jax.Array, grads: tuple[optax.Updates, ...]
        ) -> tuple[jax.Array, jax.Array]:
            gradient = chosen_leaves(grads, chosen)
            local = task_tree.squared_norm(gradient)
            square = task_tree.sum_over(local, self.axis_name)
            like = jnp.broadcast_to(jnp.zeros_like(square, self.losses.dtype), self.losses.shape)
            products = self._times_jacobian(chosen, gradient, like).astype(dtype)
            # If its type changes in the sum over devices (`check_vma=True`), the transpose has summed too.
            if jax.typeof(local) == jax.typeof(square):
                products = task_tree.sum_over(products, self.axis_name)
            # The products with earlier tasks are enough, so the first task needs no forward pass.
            before = jnp.arange(num_tasks) < t
            return square.astype(dtype), jnp.where(before, products, 0)

        squares, lower = pull_in_turn(self.pullback, self.losses, row)
        # A product may overflow in the forward pass (in float16) although both gradients are finite. Their
        # cosine would be NaN, so both tasks count as not finite.
        finite = jnp.isfinite(squares)
        overflows = finite[:, None] & finite[None, :] & ~jnp.isfinite(lower + lower.T)
        squares = jnp.where(jnp.any(overflows, axis=1), jnp.nan, squares)
        return lower + lower.T + jnp.diag(squares)

    def weighted_sum(
        self, weights: jax.Array, active: jax.Array, chosen: Sequence[bool], *, finite: bool = False
    ) -> tuple[list[jax.Array], jax.Array]:
        """Computes `sum_t weights[t] * g_t` of the chosen leaves, by one backward pass.

        If the result is not finite, it is computed again task by task, from the finite gradients. For
        losses that are not kept apart it is then 0.

        Args:
          weights: `[T]`.
          active: bool `[T]`, the tasks that count.
          chosen: see the class.
          finite: whether the gradients of all active tasks are known to be finite.

        Returns:
          The chosen leaves of the sum, and bool `[T]`, the tasks that went into it.

        Example:

          >>> from mtl_optax.placement.pull_back import vjp_of_losses
          >>> broken = lambda x: ((x, 0 * jnp.sqrt(0 * x)), None)
          >>> losses, pullback, _ = vjp_of_losses(broken, 2.0)
          >>> gradients, both = TaskGradients(pullback, losses, None), jnp.array([True, True])
          >>> total, active = gradients.weighted_sum(jnp.ones(2), both, [True])
          >>> float(total[0]), active.tolist()
          (1.0, [True, False])
        """
        cotangents = jnp.where(active, task_tree.narrow(weights, self.losses.dtype), 0)
        once = chosen_leaves(self.pullback.whole(cotangents), chosen)
        fits = jnp.isfinite(task_tree.squared_norm(once, self.axis_name))
        total = [jnp.where(fits, leaf, 0) for leaf in once]
        if not self.pullback.keeps_apart(self.losses.shape[0]):
            return total, active & fits
        if not finite:
            active = lax.cond(
                fits, lambda: active, lambda: active & jnp.isfinite(self.squared_norms(chosen))
            )

        def add(total: list[jax.Array], t: int) -> list[jax.Array]:
            wide = weights.dtype
            return [
                task_tree.narrow(x.astype(wide) + weights[t] * g.astype(wide), x.dtype)
                for x, g in zip(total, chosen_leaves(self.pullback.of_task(t), chosen), strict=True)
            ]

        # XLA executes the `cond` of one task after the other, in place. A single `cond` over all tasks
        # would keep `once` in memory beside its result.
        for t in range(self.losses.shape[0]):
            missing = ~fits & active[t]
            total = lax.cond(missing, lambda total, t=t: add(total, t), lambda total: total, total)
        return total, active

    def can_multiply(self, chosen: Sequence[bool]) -> bool:
        """Whether `gram_matrix` exists, because JAX can transpose the backward pass of the model."""

        def multiply() -> jax.Array:
            gradient = chosen_leaves(self.pullback.whole(self.losses), chosen)
            return self._times_jacobian(chosen, gradient, self.losses)

        try:
            jax.eval_shape(multiply)
        except NotTransposable:
            return False
        return True

    def _times_jacobian(
        self, chosen: Sequence[bool], gradient: list[jax.Array], like: jax.Array
    ) -> jax.Array:
        """Computes `J g`, with the type of `like` inside `shard_map`.

        J is the transpose of the pullback. The tangent map of `jax.linearize` cannot replace it: it does
        not exist for a `custom_vjp`, and would compute with zeros for the leaves that are not chosen.
        """

        def pull(cotangents: jax.Array) -> list[jax.Array]:
            return chosen_leaves(
                self.pullback.whole(cotangents + jnp.zeros_like(self.losses)), chosen
            )

        try:
            return jax.linear_transpose(pull, like)(gradient)[0]
        # Each primitive that has no transpose raises an error of its own type.
        except Exception as error:
            raise NotTransposable(
                'weighted_value_and_grad: mode="products" transposes the backward pass of the model, and '
                "JAX cannot transpose that of a custom_vjp in it (a kernel, or a rule that is not linear "
                'in its cotangents). Use mode="map", which holds one gradient per task.'
            ) from error
