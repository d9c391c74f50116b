"""The two kinds of rule: the mathematics of a method.

A `WeightRule` computes one weight per task from small arrays. An `UpdateRule` computes the update itself,
for methods that are not a weighted sum of gradients. Both read their inputs from a `StepInputs`.

**Absent tasks.** A task is *active* in a step if the caller marks it as present (`active=`), the norm of
its gradient is finite, and its loss is finite if the method needs losses. The pipeline (`pipeline.py`)
determines this before the rule and applies it to the result of the rule:

* inputs: the entries of inactive tasks are 0 in losses, norms, cosines and task trees;
* state: a rule does not change its state for an inactive task, and uses only the active tasks in means
  and in the normalisation of weights;
* result: the weight of an inactive task is replaced by 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.types import DType
from mtl_optax.solvers.cosine import Geometry


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StepInputs:
    """The inputs of a rule in one step. An entry that the rule does not need is None.

    Attributes:
      present: bool `[T]`, the tasks that the caller marked as present.
      active: bool `[T]`, the tasks that the rule uses; see above.
      step: int32 scalar, the number of previous updates.
      dtype: the dtype of weights and statistics.
      losses: `[T]`, the raw losses.
      norms: `[T]`, the norms of the gradients in one block, for a `WeightRule` only.
      cosine: `[T, T]`, the cosines between the gradients in one block; the row of a zero gradient is 0.
      updates: the task tree, with leaves `[T, *shape]`, for an `UpdateRule` or a `GradientAverage`.
      params: the parameters that the caller passed, or None; only together with `updates`.
      extra: the extra arguments of `update` that the rule declares; None for those that were not passed.
    """

    present: jax.Array
    active: jax.Array
    step: jax.Array
    dtype: DType = dataclasses.field(metadata={"static": True})
    # A rule reads only the entries in its `needs`, and these are arrays.
    losses: jax.Array = None  # type: ignore[assignment]
    norms: jax.Array = None  # type: ignore[assignment]
    cosine: jax.Array = None  # type: ignore[assignment]
    updates: optax.Updates = None  # type: ignore[assignment]
    params: optax.Params | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def restrict(self, finite: jax.Array) -> StepInputs:
        """Returns a copy in which only tasks that are `finite` `[T]` are active."""
        active = self.active & finite
        losses = None if self.losses is None else jnp.where(active, self.losses, 0)
        return dataclasses.replace(self, active=active, losses=losses)

    @property
    def geometry(self) -> Geometry:
        """The lengths and angles of the gradients, for the solvers."""
        return Geometry(self.cosine, self.norms, self.active)

    @property
    def gram(self) -> jax.Array:
        """`[T, T]`, the inner products of the raw gradients."""
        return self.cosine * self.norms[:, None] * self.norms[None, :]


class GradientAverage(NamedTuple):
    """A transformation of the task tree before a `WeightRule`, such as an EMA.

    The rule then reads the norms and cosines of the task tree that `apply` returns.

    Attributes:
      init: `(params, num_tasks, dtype) -> state`, arrays only.
      apply: `(StepInputs, state) -> (task tree, state)`.
      weighted: True if the weights multiply the result of `apply`, False if they multiply the raw
        gradients.
    """

    init: Callable[[optax.Params, int, DType], optax.OptState]
    apply: Callable[[StepInputs, Any], tuple[optax.Updates, optax.OptState]]
    weighted: bool = True


def no_state(*_: object) -> tuple[()]:
    """Returns the empty state, for a rule without a state."""
    return ()


class WeightRule(NamedTuple):
    """A method whose update is a weighted sum of the task gradients.

    Attributes:
      needs: the subset of {"losses", "norms", "gram"} that `weigh` reads.
      weigh: `(StepInputs, rule_state) -> (weights [T], rule_state)`; the weights multiply the raw
        gradients.
      init: `(num_tasks, dtype) -> rule_state`, the initial state of one block, which contains only arrays.
      extra: the names of extra arguments of `update` that `weigh` reads.
      average: a transformation of the gradients before `weigh`, or None.
      target: the index of the task that counts more than the others, or None; `Method.target` and `check`
        report it.
      bound: `(StepInputs, rule_state) -> limits [T]`, the upper limits of reused weights
        (`update_every`), for rules whose weights depend on averages of norms. It gets no cosines.
    """

    needs: frozenset[str]
    weigh: Callable[[StepInputs, Any], tuple[jax.Array, optax.OptState]]
    init: Callable[[int, DType], optax.OptState] = no_state
    extra: tuple[str, ...] = ()
    average: GradientAverage | None = None
    target: int | None = None
    bound: Callable[[StepInputs, Any], jax.Array] | None = None


class UpdateRule(NamedTuple):
    """A method that works on the gradients element by element.

    Attributes:
      needs: "gradients", and "losses" if `apply` reads them.
      apply: `(StepInputs, rule_state) -> (update, weights [T], rule_state)`; the update has the
        structure of the parameters, and the weights are the share of each task's gradient in it.
      init: `(params, num_tasks, dtype) -> rule_state`, arrays only.
      extra: the names of extra arguments of `update` that `apply` reads.
      target: as in `WeightRule`.
    """

    needs: frozenset[str]
    apply: Callable[[StepInputs, Any], tuple[optax.Updates, jax.Array, optax.OptState]]
    init: Callable[[optax.Params, int, DType], optax.OptState] = no_state
    extra: tuple[str, ...] = ()
    target: int | None = None
