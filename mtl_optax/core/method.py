"""The type of every method, and its options."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np
import optax
from jax.core import Tracer

from mtl_optax.core.rule import UpdateRule, WeightRule
from mtl_optax.core.state import BalanceState
from mtl_optax.core.types import AxisName, Label
from mtl_optax.core.validation import Tasks, describe

# The update of a method is a program that is named by this prefix and the method's name.
PROGRAM = "mtl_optax."


class MethodOptions(TypedDict, total=False):
    """The keyword arguments that all weighting methods share.

    Attributes:
      blocks: how the parameters are grouped; the method computes separate weights per block. "all" is one
        block, "leaf" is one block per tensor, and a callable `(path, leaf) -> label` gives one block per
        label (it gets leaves without the task axis).
      reduce: False keeps the task axis, for another method in the same chain: the update is
        `weights[t] * g_t`. The entries of a non-finite task become NaN, so that the next method excludes
        it too.
      update_every: k > 1 computes new weights on every k-th update and reuses them in between. The other
        updates compute only norms, to exclude non-finite tasks and to limit weights that depend on
        averages of norms. If a task was absent or non-finite when the stored weights were computed, new
        weights are computed as soon as it is active.
      freeze_after: n computes weights as above in the first n updates only. Later updates reuse the last
        ones, except for a task that has none yet, so that a step of `weighted_value_and_grad` costs one
        backward pass. None never freezes them. Prefer a method with an EMA, because the frozen weights of
        others are those of a single batch.
      axis_name: under `shard_map` or `pmap`, the mapped axes over which the elements of the gradients are
        split. Inner products are summed over these axes, so that all devices compute the same weights.
        `losses` and `active` must be equal on all devices: apply `lax.pmean` to local losses first.
    """

    blocks: str | Label
    reduce: bool
    update_every: int
    freeze_after: int | None
    axis_name: AxisName


class Options(NamedTuple):
    """The `MethodOptions` of a method, with their defaults."""

    blocks: str | Label = "all"
    reduce: bool = True
    update_every: int = 1
    freeze_after: int | None = None
    axis_name: AxisName = None

    @property
    def always_due(self) -> bool:
        """Whether every update computes new weights."""
        return self.update_every == 1 and self.freeze_after is None


class Origin(NamedTuple):
    """The factory of a method, and its arguments.

    Attributes:
      make: `make(tasks, **given)` returns an equal method.
      given: the arguments that the caller passed after the tasks.
      arguments: all arguments after the tasks, with defaults, by which methods are compared.
    """

    make: Callable[..., Method]
    given: dict[str, object]
    arguments: dict[str, object]


@dataclasses.dataclass(frozen=True, eq=False)
class Definition:
    """The parts of a method.

    Attributes:
      name: the factory's name.
      tasks: the number of tasks, and their names.
      rule: the mathematics of the method.
      options: the `MethodOptions`, with their defaults.
      origin: the factory, and its arguments.
    """

    name: str
    tasks: Tasks
    rule: WeightRule | UpdateRule
    options: Options
    origin: Origin


class Method(optax.GradientTransformationExtraArgs):
    """A multi-task balancing method: an optax transformation that removes the task axis.

    `init(params)` and `update(updates, state, params=None, *, losses=None, active=None)` have the
    signatures of any optax transformation, so a method can be unpacked, chained and wrapped as usual. The
    leaves of `updates` are `[T, *shape]`, and those of the result are `[*shape]`. `losses` and `active`
    are arrays `[T]` or dictionaries by task name. Unknown extra arguments are ignored.

    A method is a constant: it is a pytree without leaves, so that it can be an argument of a compiled
    function or a field of a module. Two methods are equal if the same factory made them from equal
    arguments. Numbers, strings and arrays are compared by value, functions and optimizers by identity.
    `repr` shows the tasks and the arguments that were passed.

    Attributes:
      name: the factory's name.
      num_tasks: T, the number of tasks.
      task_names: the task names in the order of the task axis, or None.
      target: the name or index of the task that counts more than the others, or None.
      needs: what the method reads: a subset of {"losses", "norms", "gram", "gradients"}.
      rule: the mathematics, a `WeightRule` or an `UpdateRule`.
      options: the `MethodOptions`, with their defaults.

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
        """Returns the method that has these two functions, or else a plain transformation.

        Functions that rebuild named tuples therefore return a method again.
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

    def __reduce__(self) -> tuple[object, ...]:
        """Copies the method by a call of its factory."""
        return functools.partial(self.origin.make, self.tasks, **self.origin.given), ()

    @classmethod
    def _make(cls, iterable: Iterable[Any]) -> Any:
        return cls(*iterable)

    @functools.cached_property
    def _value(self) -> tuple[object, ...]:
        """A hashable value by which methods are compared."""
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
        """The object whose methods `init` and `update` are."""
        return self.update.__self__  # type: ignore[attr-defined]

    @property
    def name(self) -> str:
        """The factory's name."""
        return self.definition.name

    @property
    def tasks(self) -> Tasks:
        """The number of tasks, and their names."""
        return self.definition.tasks

    @property
    def rule(self) -> WeightRule | UpdateRule:
        """The mathematics of the method."""
        return self.definition.rule

    @property
    def options(self) -> Options:
        """The `MethodOptions`, with their defaults."""
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
        """What the method reads."""
        return self.rule.needs


def is_method(node: object) -> bool:
    """Whether a node of a tree is a method.

    As `is_leaf` it keeps JAX from flattening a method, which raises if an option is traced.
    """
    return isinstance(node, Method)


def _flatten(method: Method) -> tuple[tuple[()], Method]:
    # JAX compares the method without hashing it, so the hash is what detects a traced option.
    hash(method)
    return (), method


jax.tree_util.register_pytree_node(Method, _flatten, lambda method, _: method)


def flat_options(given: dict[str, object]) -> dict[str, object]:
    """Merges the entries of a keyword argument `options` into the other keyword arguments.

    `optax.inject_hyperparams` passes a factory's `**options` as one dictionary; its entries take
    precedence.
    """
    nested = given.get("options")
    if not isinstance(nested, Mapping):
        return given
    return {name: value for name, value in given.items() if name != "options"} | dict(nested)


def _by_value(leaf: object) -> object:
    """Returns a hashable value for comparison: shape, dtype and bytes of an array, else `leaf` itself."""
    if not isinstance(leaf, (jax.Array, np.ndarray)):
        return leaf
    array = np.asarray(leaf)
    return array.shape, array.dtype, array.tobytes()
