"""What every transformation on per-task gradients checks, and what `losses` and `active` mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mtl_optax import surroundings, task_tree


class Guard:
    """The checks and the meaning of `losses` and `active`, for all that takes one gradient per task."""

    def __init__(
        self, name: str, num_tasks: int, needs: frozenset[str], *, reduces: bool = True
    ) -> None:
        self.name, self.num_tasks, self.needs, self.reduces = name, num_tasks, needs, reduces
        # Trace-time memory of the parameter shapes seen by init: no number ever depends on it.
        self._shapes: set[Any] = set()

    def remember(self, params: Any) -> None:
        """Notes the shapes that `init` was given."""
        self._shapes.add(task_tree.shapes_of(params))

    def check(self, updates: Any, params: Any, extra_args: Mapping[str, Any]) -> None:
        """Raises where `updates` is not one gradient per task, or the place is wrong."""
        if extra_args.get("on_losses") and self.needs & {"norms", "gram", "gradients"}:
            raise ValueError(
                f"{self.name}: needs gradients ({', '.join(sorted(self.needs))}), so it cannot weigh "
                "losses alone. Use it through mtl_optax.fork (one backward pass) or "
                "mtl_optax.per_task_value_and_grad."
            )
        try:
            task_tree.check_updates(self.name, updates, self.num_tasks, params)
            if params is None:
                task_tree.check_not_stacked_like(self.name, updates, self._shapes)
        except ValueError as error:
            reason = surroundings.explain_shape(self.name, self.num_tasks)
            if reason is None:
                raise
            raise ValueError(reason) from error
        surroundings.check_before(self.name, self.num_tasks)
        if self.reduces:
            surroundings.check_around(self.name)
            surroundings.check_beside(self.name, self.num_tasks)

    def losses(self, losses: Any, dtype: Any, extra_args: Mapping[str, Any]) -> Any:
        """The losses `[T]`, or None where the method does not need them."""
        if "losses" not in self.needs:
            return None
        if losses is None:
            vector = jnp.ndim(extra_args.get("value", 0.0)) == 1
            raise ValueError(
                f"{self.name}: needs the losses of this step: update(..., losses=losses), an array "
                f"[{self.num_tasks}] in the order of the task axis."
                + (" Found a vector in value=, which optax keeps for one scalar." * vector)
            )
        return self._vector("losses", losses, dtype)

    def present(self, active: Any) -> jax.Array:
        """Which tasks the caller says are in this batch; all by default."""
        if active is None:
            return jnp.ones((self.num_tasks,), bool)
        return self._vector("active", active, jnp.bool_)

    def _vector(self, what: str, value: Any, dtype: Any) -> jax.Array:
        if isinstance(value, Mapping):
            raise TypeError(
                f"{self.name}: {what} must be one array of shape ({self.num_tasks},) in the order of "
                f"the task axis; found a {type(value).__name__}, whose order is not that of the tasks."
            )
        if isinstance(value, (tuple, list)):
            value = jnp.stack([jnp.asarray(x) for x in value])
        if jnp.shape(value) != (self.num_tasks,):
            raise ValueError(
                f"{self.name}: {what} must have shape ({self.num_tasks},), one entry per task in "
                f"the order of the task axis; found {jnp.shape(value)}."
            )
        return jnp.asarray(value).astype(dtype)
