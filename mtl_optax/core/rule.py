"""The two kinds of rule: the mathematics of a method, before it meets an optimizer.

A `WeightRule` gives one weight per task and sees only small arrays; what it does not need is not
computed. An `UpdateRule` gives the update itself, for methods that are no weighted sum of gradients.

**Absent tasks.** A task is *active* in a step if the caller says that it is present (`active=`), its
gradient's squared norm is finite, and so is its loss where the method needs losses. The lift
(`lift.py`) decides this once on the way in, and applies it once on the way out:

* in: the slots of inactive tasks hold 0 in losses, norms, cosines and task trees;
* state: a rule leaves what it remembers of an inactive task as it was, and counts only the active
  tasks in means, sums to 1 and the like;
* out: whatever a rule returns for an inactive task is replaced by weight 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Evidence(NamedTuple):
    """What a `WeightRule` sees of one block.

    Attributes:
      active: bool `[T]`; see above.
      step: int32 scalar; updates done before this one.
      losses: `[T]`, the raw losses, where the rule needs them.
      norms: `[T]`, gradient norms, where the rule needs norms or the Gram matrix.
      cosine: `[T, T]`, the Gram matrix of the unit gradients; a zero gradient has a zero row.
      extra: the extra arguments of `update` that the rule declares; None where not given.
    """

    active: jax.Array
    step: jax.Array
    losses: Any = None
    norms: Any = None
    cosine: Any = None
    extra: Any = None

    @property
    def gram(self) -> jax.Array:
        """`[T, T]`, the inner products of the raw gradients."""
        return self.cosine * self.norms[:, None] * self.norms[None, :]


class TaskGradients(NamedTuple):
    """What an `UpdateRule` or a `GradientAverage` sees.

    Attributes:
      updates: the task tree, leaves `[T, *shape]`.
      active: bool `[T]`; see above.
      step: int32 scalar; updates done before this one.
      dtype: the dtype of statistics and weights.
      losses: `[T]`, where the rule needs them.
      params: what the caller gave, or None.
      extra: as in `Evidence`.
    """

    updates: Any
    active: jax.Array
    step: jax.Array
    dtype: Any
    losses: Any
    params: Any
    extra: dict[str, Any]


class GradientAverage(NamedTuple):
    """A transformation of the task tree that comes before a `WeightRule`, such as a moving average.

    The rule then sees norms and inner products of what `apply` returns.

    Attributes:
      init: `(params, num_tasks, dtype) -> state`, arrays only.
      apply: `(TaskGradients, state) -> (task tree, state)`.
      weighted: True if the weights multiply what `apply` returns, False if they multiply the raw gradients
        of this step.
    """

    init: Callable[[Any, int, Any], Any]
    apply: Callable[[TaskGradients, Any], tuple[Any, Any]]
    weighted: bool = True


def no_state(*_: Any) -> tuple[()]:
    """The state of a rule that remembers nothing."""
    return ()


class WeightRule(NamedTuple):
    """A method whose update is a weighted sum of the task gradients.

    Attributes:
      needs: the subset of {"losses", "norms", "gram"} that `weigh` reads.
      weigh: `(Evidence, rule_state) -> (weights [T], rule_state)`; the weights multiply raw gradients.
      init: `dtype -> rule_state` of one block, arrays only.
      extra: names of extra arguments of `update` that `weigh` reads.
      average: what is done to the gradients before, if anything.
      finish: `(update, options, dtype) -> update`, what is done to the update after, if anything.
      target: the index of the task that counts more than the others, where there is one; `Method.target`
        and `check` say it.
      bound: `(Evidence, rule_state) -> limits [T]`, for weights that come from averages of norms: what a
        kept weight must not exceed between the steps of `update_every`. Of the gradients it sees norms.
    """

    needs: frozenset[str]
    weigh: Callable[[Evidence, Any], tuple[jax.Array, Any]]
    init: Callable[[Any], Any] = no_state
    extra: tuple[str, ...] = ()
    average: GradientAverage | None = None
    finish: Callable[[Any, Any, Any], Any] | None = None
    target: int | None = None
    bound: Callable[[Evidence, Any], jax.Array] | None = None


class UpdateRule(NamedTuple):
    """A method that works on the gradients element by element.

    Attributes:
      needs: "gradients", and "losses" where `apply` reads them.
      apply: `(TaskGradients, rule_state) -> (update, weights [T], rule_state)`; the update has the
        structure of the parameters, and the weights say how much of each task went into it.
      init: `(params, num_tasks, dtype) -> rule_state`, arrays only.
      extra: names of extra arguments of `update` that `apply` reads.
      target: as in `WeightRule`.
    """

    needs: frozenset[str]
    apply: Callable[[TaskGradients, Any], tuple[Any, jax.Array, Any]]
    init: Callable[[Any, int, Any], Any] = no_state
    extra: tuple[str, ...] = ()
    target: int | None = None
