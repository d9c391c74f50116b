"""The type of every method, and its options."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np
import optax
from jax.core import Tracer

from mtl_optax.core.arguments import describe
from mtl_optax.core.rule import UpdateRule, WeightRule
from mtl_optax.core.state import BalanceState
from mtl_optax.core.tasks import Tasks
from mtl_optax.core.types import AxisName, Label


class MethodOptions(TypedDict, total=False):
    """Keywords that every weighting method takes.

    Attributes:
      blocks: the granularity at which the method looks at gradients: "all" (one block), "leaf" (each
        tensor on its own), or a callable `(path, leaf) -> label` (one block a label; it sees leaves
        without the task axis).
      reduce: False keeps the task axis: the update is `weights[t] * g_t`, for methods in a chain. The
        slot of a task that is not finite is passed on as NaN, so that the next method excludes it too.
      update_every: k > 1 computes new weights only on every k-th update and reuses them in between; the
        steps between take the norms only, for the tasks that are not finite, and to limit weights that
        come from averages of norms. A task that the stored weights do not cover, because it was absent
        or not finite then, causes new weights at once.
      axis_name: under `shard_map` or `pmap`, the mapped axes over which the elements of the gradients
        are split. Inner products are summed over them, so that all devices find the same weights.
        `losses` and `active` must be equal on all devices already: `lax.pmean` local losses first.
    """

    blocks: str | Label
    reduce: bool
    update_every: int
    axis_name: AxisName


class Options(NamedTuple):
    """The `MethodOptions` of a method, with their defaults."""

    blocks: str | Label = "all"
    reduce: bool = True
    update_every: int = 1
    axis_name: AxisName = None


class Origin(NamedTuple):
    """What made a method, and of what.

    Attributes:
      make: `make(tasks, **given)` makes an equal method.
      given: the arguments after the tasks, as they were given.
      arguments: these and the defaults of the others: what methods are compared by.
    """

    make: Callable[..., Method]
    given: dict[str, Any]
    arguments: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Definition:
    """What a method is made of.

    Attributes:
      name: the factory's name.
      tasks: how many tasks there are, and their names.
      rule: the mathematics.
      options: what was given of `MethodOptions`, and defaults.
      origin: the factory and its arguments.
    """

    name: str
    tasks: Tasks
    rule: WeightRule | UpdateRule
    options: Options
    origin: Origin


class Method(optax.GradientTransformationExtraArgs):
    """A multi-task balancing method: an optax transformation that removes the task axis.

    `init(params)` and `update(updates, state, params=None, *, losses=None, active=None)` are those of
    any optax transformation, so it unpacks, chains and lifts as usual. `updates` has leaves
    `[T, *shape]` and the result leaves `[*shape]`. `losses` and `active` are arrays `[T]` or
    dictionaries by task name; unknown extra arguments are ignored.

    A method is a constant: to JAX it is a tree without leaves, so that it can be an argument of a
    compiled function or a field of a module. Two are equal if the same factory made them of equal
    arguments: numbers, strings and arrays by value, functions and optimizers by identity. `repr` shows
    the tasks and the arguments that were given.

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
      >>> method
      metabalance(('buy', 'click'), target='buy')
      >>> method.num_tasks, method.task_names, method.target, sorted(method.needs)
      (2, ('buy', 'click'), 'buy', ['norms'])
      >>> method == mtl.metabalance({"buy", "click"}, target="buy", relax_factor=0.7)  # the default
      True
    """

    init: Callable[[optax.Params], BalanceState]
    update: Callable[..., tuple[optax.Updates, BalanceState]]

    def __new__(cls, init: Callable[..., Any], update: Callable[..., Any]) -> Any:
        """The method whose two functions these are; of others, another transformation.

        So it comes back from whatever takes a named tuple apart and puts it together again.
        """
        owner = getattr(update, "__self__", None)
        if isinstance(owner, Definition) and getattr(init, "__self__", None) is owner:
            return tuple.__new__(cls, (init, update))
        return optax.GradientTransformationExtraArgs(init, update)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Method) and self._value == other._value)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        tasks = self.tasks.number if self.tasks.names is None else self.tasks.names
        given = (f"{name}={describe(value)}" for name, value in self.origin.given.items())
        return f"{self.name}({', '.join([repr(tasks), *given])})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is made by the factory."""
        return functools.partial(self.origin.make, self.tasks, **self.origin.given), ()

    @classmethod
    def _make(cls, iterable: Iterable[Any]) -> Any:
        return cls(*iterable)

    @functools.cached_property
    def _value(self) -> tuple[object, ...]:
        """What methods are compared by, hashable."""
        made_of = (self.options, self.origin.arguments)
        leaves, structure = jax.tree.flatten(made_of, is_leaf=is_method)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            raise TypeError(
                f"{self!r} depends on a traced value, so that it is no constant and cannot be an argument "
                "of a compiled function. Make it inside of that function."
            )
        return self.name, self.tasks, structure, tuple(map(_by_value, leaves))

    @property
    def definition(self) -> Any:
        """The object that `init` and `update` are methods of."""
        return self.update.__self__  # type: ignore[attr-defined]

    @property
    def name(self) -> str:
        """The factory's name."""
        return self.definition.name

    @property
    def tasks(self) -> Tasks:
        """How many tasks there are, and their names."""
        return self.definition.tasks

    @property
    def rule(self) -> WeightRule | UpdateRule:
        """Its mathematics."""
        return self.definition.rule

    @property
    def options(self) -> Options:
        """What it was given of `MethodOptions`, and defaults."""
        return self.definition.options

    @property
    def origin(self) -> Origin:
        """The factory and its arguments."""
        return self.definition.origin

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


def is_method(node: object) -> bool:
    """Whether a node of a tree is a method; as a leaf, one with a traced option passes."""
    return isinstance(node, Method)


def _flatten(method: Method) -> tuple[tuple[()], Method]:
    hash(method)  # raises for a traced one: JAX compares what a node holds, and does not hash it
    return (), method


jax.tree_util.register_pytree_node(Method, _flatten, lambda method, _: method)


def flat_options(given: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a factory, with those that came in one argument `options` among them.

    So `optax.inject_hyperparams` hands a factory's `**options` on. What stands beside them is a default.
    """
    nested = given.get("options")
    if not isinstance(nested, Mapping):
        return given
    return {name: value for name, value in given.items() if name != "options"} | dict(nested)


def _by_value(leaf: object) -> Any:
    """A hashable stand-in: arrays by their numbers, all else as it is."""
    if not isinstance(leaf, (jax.Array, np.ndarray)):
        return leaf
    array = np.asarray(leaf)
    return array.shape, array.dtype, array.tobytes()


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


def tell_update(method: Method, updates: optax.Updates) -> None:
    """Says that the `update` of a method is called."""
    calls = _CALLS.get()
    if calls is not None:
        calls.append((method, updates))


def is_watched() -> bool:
    """Whether `check` looks on."""
    return _CALLS.get() is not None
