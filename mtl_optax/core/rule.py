"""The two kinds of rule: the mathematics of a method, before it meets an optimizer.

A `WeightRule` gives one weight per task and sees only small arrays. An `UpdateRule` gives the update
itself, for methods that are no weighted sum of gradients. Both read a step from one record, `StepInputs`.

**Absent tasks.** A task is *active* in a step if the caller says that it is present (`active=`), the norm
of its gradient is finite, and so is its loss if the method needs losses. The pipeline (`pipeline.py`)
decides this once on the way in, and applies it once on the way out:

* in: the slots of inactive tasks hold 0 in losses, norms, cosines and task trees;
* state: a rule leaves what it remembers of an inactive task as it was, and counts only the active
  tasks in means, sums to 1 and the like;
* out: whatever a rule returns for an inactive task is replaced by weight 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.types import DType


class StepInputs(NamedTuple):
    """What a rule reads of one step. A value that the rule does not need is not computed: it is None.

    Attributes:
      active: bool `[T]`; see above.
      step: int32 scalar, the number of updates before this one.
      dtype: the dtype of weights and statistics.
      losses: `[T]`, the raw losses.
      norms: `[T]`, the norms of the gradients of one block. A `WeightRule` alone has them.
      cosine: `[T, T]`, the Gram matrix of the unit gradients of one block; the row of a zero gradient is 0.
      updates: the task tree, leaves `[T, *shape]`. An `UpdateRule` and a `GradientAverage` have it.
      params: what the caller gave, or None; with `updates`.
      extra: the extra arguments of `update` that the rule declares; None for one that was not given.
    """

    active: jax.Array
    step: jax.Array
    dtype: DType
    # A rule reads only what it says that it needs, which is an array then.
    losses: jax.Array = None  # type: ignore[assignment]
    norms: jax.Array = None  # type: ignore[assignment]
    cosine: jax.Array = None  # type: ignore[assignment]
    updates: optax.Updates = None  # type: ignore[assignment]
    params: optax.Params | None = None
    extra: Mapping[str, Any] = MappingProxyType({})

    def restrict(self, finite: jax.Array) -> StepInputs:
        """The record in which only tasks that are `finite` [T] are active."""
        active = self.active & finite
        losses = None if self.losses is None else jnp.where(active, self.losses, 0)
        return self._replace(active=active, losses=losses)

    @property
    def gram(self) -> jax.Array:
        """`[T, T]`, the inner products of the raw gradients."""
        return self.cosine * self.norms[:, None] * self.norms[None, :]


class GradientAverage(NamedTuple):
    """A transformation of the task tree that comes before a `WeightRule`, such as a moving average.

    The rule then sees norms and inner products of what `apply` returns.

    Attributes:
      init: `(params, num_tasks, dtype) -> state`, arrays only.
      apply: `(StepInputs, state) -> (task tree, state)`.
      weighted: True if the weights multiply what `apply` returns, False if they multiply the raw gradients
        of this step.
    """

    init: Callable[[optax.Params, int, DType], optax.OptState]
    apply: Callable[[StepInputs, Any], tuple[optax.Updates, optax.OptState]]
    weighted: bool = True


def no_state(*_: object) -> tuple[()]:
    """The state of a rule that remembers nothing."""
    return ()


class WeightRule(NamedTuple):
    """A method whose update is a weighted sum of the task gradients.

    Attributes:
      needs: the subset of {"losses", "norms", "gram"} that `weigh` reads.
      weigh: `(StepInputs, rule_state) -> (weights [T], rule_state)`; the weights multiply raw gradients.
      init: `dtype -> rule_state` of one block, arrays only.
      extra: the names of extra arguments of `update` that `weigh` reads.
      average: what is done to the gradients before, if anything.
      target: the index of the task that counts more than the others, if there is one; `Method.target`
        and `check` say it.
      bound: `(StepInputs, rule_state) -> limits [T]`, for weights that come from averages of norms: what a
        kept weight must not exceed between the steps of `update_every`. Of the gradients it sees norms.
    """

    needs: frozenset[str]
    weigh: Callable[[StepInputs, Any], tuple[jax.Array, optax.OptState]]
    init: Callable[[DType], optax.OptState] = no_state
    extra: tuple[str, ...] = ()
    average: GradientAverage | None = None
    target: int | None = None
    bound: Callable[[StepInputs, Any], jax.Array] | None = None


class UpdateRule(NamedTuple):
    """A method that works on the gradients element by element.

    Attributes:
      needs: "gradients", and "losses" if `apply` reads them.
      apply: `(StepInputs, rule_state) -> (update, weights [T], rule_state)`; the update has the
        structure of the parameters, and the weights say how much of each task went into it.
      init: `(params, num_tasks, dtype) -> rule_state`, arrays only.
      extra: the names of extra arguments of `update` that `apply` reads.
      target: as in `WeightRule`.
    """

    needs: frozenset[str]
    apply: Callable[[StepInputs, Any], tuple[optax.Updates, jax.Array, optax.OptState]]
    init: Callable[[optax.Params, int, DType], optax.OptState] = no_state
    extra: tuple[str, ...] = ()
    target: int | None = None
