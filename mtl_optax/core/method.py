"""The type of every method, its options, and its state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypedDict

import jax
import optax

from mtl_optax.core.rule import UpdateRule, WeightRule
from mtl_optax.core.tasks import Tasks


class MethodOptions(TypedDict, total=False):
    """Keywords that every weighting method takes.

    Attributes:
      blocks: the granularity at which the method looks at gradients: "all" (one block), "leaf" (each
        tensor on its own), or a callable `(path, leaf) -> label` (one block a label; it sees leaves
        without the task axis).
      reduce: False keeps the task axis: the update is `weights[t] * g_t`, for methods in a chain. The
        slot of a task that is not finite is passed on as NaN, so that the next method excludes it too.
      update_every: k > 1 computes new weights only on every k-th update and reuses them in between; the
        steps between only test that gradients are finite. A task that the stored weights do not cover,
        because it was absent or not finite then, causes new weights at once.
      axis_name: under `shard_map` or `pmap`, the mapped axes over which the elements of the gradients
        are split. Inner products are summed over them, so that all devices find the same weights.
        `losses` and `active` must be equal on all devices already: `lax.pmean` local losses first.
    """

    blocks: Any
    reduce: bool
    update_every: int
    axis_name: Any


class Options(NamedTuple):
    """The `MethodOptions` of a method, with their defaults."""

    blocks: Any = "all"
    reduce: bool = True
    update_every: int = 1
    axis_name: Any = None


class BalanceState(NamedTuple):
    """The state of every method. B is the number of blocks, 1 with `blocks="all"`.

    Attributes:
      balance_count: int32 scalar, updates done.
      weights: `[B, T]`, the weights used last.
      norms: `[B, T]`, the gradient norms seen last; `()` where the method needs none.
      cosine: `[B, T, T]`, the cosines seen last; `()` where the method needs none.
      skipped: int32 `[T]`, how often each task was excluded because its numbers were not finite.
      weighed: bool `[T]`, the tasks for which `weights` were computed.
      averages: what the method keeps of the gradients themselves; `()` for most methods.
      rule_state: what the rule remembers; with a block axis for methods that give weights.
    """

    balance_count: jax.Array
    weights: jax.Array
    norms: Any
    cosine: Any
    skipped: jax.Array
    weighed: jax.Array
    averages: Any
    rule_state: Any


class GradientsState(BalanceState):
    """The state of a method that works on the gradients element by element: the same fields."""


class Method(optax.GradientTransformationExtraArgs):
    """A multi-task balancing method: an optax transformation that removes the task axis.

    `init(params)` and `update(updates, state, params=None, *, losses=None, active=None)` are those of
    any optax transformation, so it unpacks, chains and lifts as usual. `updates` has leaves
    `[T, *shape]` and the result leaves `[*shape]`. `losses` and `active` are arrays `[T]` or
    dictionaries by task name; unknown extra arguments are ignored.

    Attributes:
      name: the factory's name.
      num_tasks: T, the number of tasks.
      task_names: the task names in the order of the task axis, or None.
      target: the name or index of the task that counts more than the others, or None.
      needs: what it looks at: a subset of {"losses", "norms", "gram", "gradients"}.
      rule: its mathematics, a `WeightRule` or an `UpdateRule`.
      options: what it was given of `MethodOptions`, and defaults.

    Example:

      >>> import mtl_optax as mtl
      >>> method = mtl.metabalance(("click", "buy"), target="buy")
      >>> method.num_tasks, method.task_names, method.target, sorted(method.needs)
      (2, ('buy', 'click'), 'buy', ['norms'])
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    name: str
    tasks: Tasks
    rule: WeightRule | UpdateRule
    options: Options

    def __new__(
        cls,
        init: Callable[..., Any],
        update: Callable[..., Any],
        name: str | None = None,
        tasks: Tasks | None = None,
        rule: WeightRule | UpdateRule | None = None,
        options: Options | None = None,
    ) -> Any:
        """A pair of functions, and what the library asks of a method as attributes."""
        if name is None or tasks is None or rule is None or options is None:
            return cls._make((init, update))
        method = super().__new__(cls, init, update)
        method.name, method.tasks, method.rule, method.options = name, tasks, rule, options
        return method

    def __getnewargs__(self) -> tuple[Any, ...]:
        """What a copy is made of."""
        return (self.init, self.update, self.name, self.tasks, self.rule, self.options)

    @classmethod
    def _make(cls, iterable: Iterable[Any]) -> Any:
        """Other functions make another transformation (`_replace`, a tree map), which is no `Method`."""
        return optax.GradientTransformationExtraArgs(*iterable)

    @property
    def num_tasks(self) -> int:
        """T, the number of tasks."""
        return self.tasks.number

    @property
    def task_names(self) -> tuple[str, ...] | None:
        """The task names in the order of the task axis, or None."""
        return self.tasks.names

    @property
    def target(self) -> str | int | None:
        """The name or index of the task that counts more than the others, or None."""
        index = self.rule.target
        return index if index is None or self.task_names is None else self.task_names[index]

    @property
    def needs(self) -> frozenset[str]:
        """What it looks at."""
        return self.rule.needs


def states_in(tree: Any) -> list[BalanceState]:
    """The states of methods in any tree that holds some: of a chain, a wrapper, a fork's carrier."""
    is_state = lambda node: isinstance(node, BalanceState)  # noqa: E731
    return [node for node in jax.tree.leaves(tree, is_leaf=is_state) if is_state(node)]


# What is inside a chain shows in no attribute of it: while `check` calls its update, methods say so here.
_CALLS: ContextVar[list[tuple[Method, Any]] | None] = ContextVar("calls", default=None)


@contextmanager
def update_calls() -> Iterator[list[tuple[Method, Any]]]:
    """A list that grows by each method whose `update` is called meanwhile, and the updates it is given."""
    calls: list[tuple[Method, Any]] = []
    token = _CALLS.set(calls)
    try:
        yield calls
    finally:
        _CALLS.reset(token)


def tell_update(method: Method, updates: Any) -> None:
    """Says that the `update` of a method is called."""
    calls = _CALLS.get()
    if calls is not None:
        calls.append((method, updates))


def is_watched() -> bool:
    """Whether somebody wants to see the calls; what a branch of `lax.cond` is given cannot be seen."""
    return _CALLS.get() is not None
