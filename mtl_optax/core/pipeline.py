"""The pipeline: computes one update from one gradient per task, for every method.

Every step has the same stages:

* `read` checks the caller's arguments and makes the record that a rule reads. A task is active if it is
  present and its loss is finite.
* `measure` returns norms and cosines. A task whose gradient is not finite is not active any more.
* `weigh` calls the rule, on the active tasks only.
* `combine` (`task_tree.py`) adds the gradients of the active tasks.
* `finish` counts the step, and the tasks that were present but not active.

An `UpdateRule`, which reads the gradients themselves, takes the place of the three stages in the middle.
`Pipeline.update` (on the parameters or on a fork's representation), `weighted_value_and_grad` and
`weigh_losses` all use these stages. `rule.py` says what a rule may assume.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar, Unpack

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mtl_optax.core import task_tree, validation
from mtl_optax.core.method import (
    PROGRAM,
    Definition,
    Method,
    MethodOptions,
    Options,
    Origin,
    flat_options,
)
from mtl_optax.core.rule import StepInputs, UpdateRule, WeightRule
from mtl_optax.core.state import BalanceState, check_fields, check_state, first_state, next_count
from mtl_optax.core.task_tree import Blocks, Measured
from mtl_optax.core.types import Active, Losses
from mtl_optax.core.validation import Tasks

_Result = TypeVar("_Result")


def from_rule(
    name: str,
    tasks: int | Collection[str] | Tasks,
    rule: WeightRule | UpdateRule,
    **given: Unpack[MethodOptions],
) -> Method:
    """Makes a method from a rule.

    Args:
      name: the method's name, for messages.
      tasks: T, or the task names.
      rule: the mathematics, a `WeightRule` or an `UpdateRule`.
      **given: see `MethodOptions`; an `UpdateRule` takes `axis_name` only.

    Returns:
      The method.

    Raises:
      ValueError, TypeError: if options or tasks are invalid. At trace time, `update` raises if the updates
        have no task axis or a wrong T, losses are missing, or `losses` or `active` have a wrong shape.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> def weigh(inputs, state):
      ...     return 1 / inputs.norms, state
      >>> unit = mtl.from_rule("unit", 2, mtl.WeightRule(frozenset({"norms"}), weigh))
      >>> state = unit.init({"w": jnp.zeros(2)})
      >>> updates, state = unit.update({"w": jnp.array([[3., 0.], [0., 4.]])}, state)
      >>> updates["w"].tolist()
      [1.0, 1.0]
    """
    arguments = flat_options(dict(given))
    origin = Origin(functools.partial(from_rule, name, rule=rule), arguments, {"rule": rule})
    options = _read_options(name, rule, arguments)
    pipeline = Pipeline(name, validation.read_tasks(name, tasks), rule, options, origin)
    return Method(pipeline.init, pipeline.update)


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline(Definition):
    """The definition of a method, with the functions of an optax transformation."""

    def init(self, params: optax.Params) -> BalanceState:
        """Returns the initial state of the method.

        Args:
          params: the parameters or, on a fork, the representation. Only shapes and dtypes are used.

        Returns:
          A `BalanceState`.
        """
        state = first_state(self.rule, self.tasks.number, params, self.options.blocks)
        # Equal zeros may share a buffer, which cannot be donated twice.
        return jax.tree.map(jnp.copy, state)

    def update(
        self,
        updates: optax.Updates,
        state: BalanceState,
        params: optax.Params | None = None,
        *,
        losses: Losses | None = None,
        active: Active | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, BalanceState]:
        """Combines the gradients of the tasks.

        Args:
          updates: one gradient per task, leaves `[T, *shape]`.
          state: from `init`, or from the last update.
          params: the parameters, with which the shapes of `updates` are compared.
          losses: the raw losses of this step, `[T]` or a dictionary by task name, if the method needs
            them.
          active: which tasks are in this batch, bool `[T]` or a dictionary by task name; None means all.
          **extra_args: the extra arguments in the documentation of the method; others are ignored.

        Returns:
          `(update, state)`: the update has leaves `[*shape]`, or `[T, *shape]` with `reduce=False`.
        """
        inputs = self.read(state, losses, active, params, extra_args)
        validation.check_updates(self.name, updates, self.tasks, params)
        return self._balance(state, inputs, updates)

    # --- the stages of a step ------------------------------------------------------------------------

    def read(
        self,
        state: BalanceState,
        losses: Losses | None,
        active: Active | None,
        params: optax.Params | None = None,
        extra_args: Mapping[str, object] | None = None,
    ) -> StepInputs:
        """Checks the caller's arguments, and makes the record of a step, without norms and gradients."""
        extra_args = extra_args or {}
        check_state(self.name, state, self.tasks)
        vector = None
        if "losses" in self.rule.needs:
            dtype = state.weights.dtype
            vector = validation.read_losses(self.name, losses, self.tasks, dtype, extra_args)
        elif isinstance(losses, Mapping):  # the losses of other tasks are refused
            validation.names_of(self.name, "losses", losses, self.tasks)
        present = validation.read_active(self.name, active, self.tasks)
        inputs = StepInputs(
            present=present,
            active=present,
            step=state.balance_count,
            dtype=state.weights.dtype,
            losses=vector,  # type: ignore[arg-type]
            params=params if self._on_gradients else None,
            extra={key: extra_args.get(key) for key in self.rule.extra},
        )
        return inputs if vector is None else inputs.restrict(jnp.isfinite(vector))

    def measure(
        self, updates: optax.Updates, blocks: Blocks, inputs: StepInputs, *, cosines: bool
    ) -> Measured:
        """Computes the norms and cosines that the rule needs, and which tasks are finite."""
        num_tasks, axis_name = self.tasks.number, self.options.axis_name
        products = task_tree.products(updates, blocks, num_tasks, axis_name, pairs=cosines)
        return self.measured(inputs, products)

    def measured(self, inputs: StepInputs, products: jax.Array) -> Measured:
        """As `measure`, from squared norms `[B, T]` or inner products `[B, T, T]`."""
        found = task_tree.measure(products, inputs.active, inputs.dtype)
        return found if self.rule.needs & {"norms", "gram"} else Measured(found.active)

    def due(self, state: BalanceState, active: jax.Array) -> jax.Array:
        """Whether to compute new weights: by the options, or for a task without a stored weight."""
        count, options = state.balance_count, self.options
        by_count = count % options.update_every == 0
        if options.freeze_after is not None:
            by_count &= count < options.freeze_after
        return by_count | jnp.any(active & ~state.weighed)

    def weigh(self, state: BalanceState, inputs: StepInputs, measured: Measured) -> BalanceState:
        """Computes new weights by the rule, and returns the state that contains them."""
        assert isinstance(self.rule, WeightRule)
        dtype, active = state.weights.dtype, measured.active
        weights, rule_state = _over_blocks(self.rule.weigh, inputs, measured, state)
        # A sum of quotients of norms may overflow, although no single quotient does.
        largest = float(jnp.finfo(dtype).max)
        weights = jnp.where(active, jnp.clip(weights, -largest, largest), 0).astype(dtype)
        return state._replace(
            weights=weights,
            kept_weights=None if state.kept_weights is None else weights,
            weighed=active,
            norms=measured.norms,
            cosine=measured.cosine,
            rule_state=jax.tree.map(_like, rule_state, state.rule_state),
        )

    def keep_weights(
        self, state: BalanceState, inputs: StepInputs, measured: Measured
    ) -> BalanceState:
        """Returns the state of a step that reuses weights, which are limited by the rule's `bound`."""
        assert isinstance(self.rule, WeightRule)
        state = state._replace(norms=measured.norms)
        if self.rule.bound is None:
            return state
        limits = _over_blocks(self.rule.bound, inputs, measured, state)
        assert state.kept_weights is not None
        weights = jnp.minimum(state.kept_weights, limits)
        return state._replace(weights=weights.astype(state.weights.dtype))

    def applied_weights(self, state: BalanceState) -> jax.Array:
        """Returns the weights `[B, T]`, with 0 for gradients that count as zero."""
        return (
            state.weights if state.norms is None else jnp.where(state.norms > 0, state.weights, 0)
        )

    def finish(self, state: BalanceState, inputs: StepInputs, active: jax.Array) -> BalanceState:
        """Counts the step, and the tasks that were present but not active."""
        return state._replace(
            balance_count=next_count(state.balance_count),
            skipped=next_count(state.skipped, inputs.present & ~active),
        )

    # --- an update -----------------------------------------------------------------------------------

    @property
    def _on_gradients(self) -> bool:
        """Whether the rule reads gradients element by element."""
        return isinstance(self.rule, UpdateRule) or self.rule.average is not None

    @functools.cached_property
    def _balance(self) -> Callable[..., tuple[optax.Updates, BalanceState]]:
        def balance(
            state: BalanceState, inputs: StepInputs, updates: optax.Updates
        ) -> tuple[optax.Updates, BalanceState]:
            check_fields(self.name, self.rule, state, updates, self.options.blocks)
            if self._on_gradients:
                updates = task_tree.stacked(updates)
                inputs = self._with_gradients(inputs, updates)
            advance = self._by_update if isinstance(self.rule, UpdateRule) else self._by_weights
            result, state, active = advance(updates, state, inputs)
            return task_tree.narrow_like(result, updates), self.finish(state, inputs, active)

        # `check` finds the methods of an optimizer by the names of their programs.
        balance.__name__ = PROGRAM + self.name
        # Compiled here, so that a call outside jit runs one program too; inside jit it is inlined.
        return jax.jit(balance)

    def _with_gradients(self, inputs: StepInputs, updates: optax.Updates) -> StepInputs:
        """Adds the gradients of the active tasks, for a rule that reads gradients element by element."""
        finite = task_tree.finite(updates, self.tasks.number, self.options.axis_name)
        inputs = inputs.restrict(finite)
        return dataclasses.replace(inputs, updates=task_tree.remove_absent(updates, inputs.active))

    def _by_update(
        self, updates: optax.Updates, state: BalanceState, inputs: StepInputs
    ) -> tuple[optax.Updates, BalanceState, jax.Array]:
        """Returns the update of an `UpdateRule`, the new state, and which tasks were used."""
        assert isinstance(self.rule, UpdateRule)
        update, weights, rule_state = self.rule.apply(inputs, state.rule_state)
        weights = jnp.where(inputs.active, weights, 0).astype(state.weights.dtype)
        state = state._replace(weights=weights[None], weighed=inputs.active, rule_state=rule_state)
        return update, state, inputs.active

    def _by_weights(
        self, updates: optax.Updates, state: BalanceState, inputs: StepInputs
    ) -> tuple[optax.Updates, BalanceState, jax.Array]:
        """Returns the weighted sum, the new state, and which tasks were used."""
        rule, options = self.rule, self.options
        assert isinstance(rule, WeightRule)
        blocks = task_tree.assign_blocks(task_tree.without_task_axis(updates), options.blocks)
        measured_on, weighted, averages = updates, updates, state.averages
        if rule.average is not None:
            measured_on, averages = rule.average.apply(inputs, averages)
            weighted = measured_on if rule.average.weighted else inputs.updates

        def fresh(state: BalanceState) -> tuple[BalanceState, jax.Array]:
            measured = self.measure(measured_on, blocks, inputs, cosines="gram" in rule.needs)
            return self.weigh(state, inputs, measured), measured.active

        def kept(state: BalanceState) -> tuple[BalanceState, jax.Array]:
            measured = self.measure(measured_on, blocks, inputs, cosines=False)
            return self.keep_weights(state, inputs, measured), measured.active

        # The averages are as large as the gradients, so they are not passed through the `cond`.
        state = state._replace(averages=None)
        if options.always_due:
            state, active = fresh(state)
        else:
            state, active = lax.cond(self.due(state, inputs.active), fresh, kept, state)
        weights = self.applied_weights(state) if weighted is measured_on else state.weights
        broken = None if options.reduce else inputs.present & ~active
        result = task_tree.combine(weighted, weights, active, blocks, broken)
        return result, state._replace(averages=averages), active


def rule_of(name: str, base: object, num_tasks: int) -> WeightRule:
    """Returns the rule of a weighting method, on which another method is built."""
    rule = getattr(base, "rule", None)
    if not isinstance(base, Method) or not isinstance(rule, WeightRule):
        raise TypeError(
            f"{name}: base must be a weighting method of mtl_optax (one whose update is a weighted sum "
            f"of task gradients), found {base!r}."
        )
    if base.num_tasks != num_tasks:
        raise ValueError(f"{name}: base has {base.num_tasks} tasks, expected {num_tasks}.")
    if rule.average is not None:
        raise TypeError(
            f"{name}: base must weigh the gradients of this step; {base.name} weighs averages of gradients."
        )
    return rule


def _over_blocks(
    function: Callable[[StepInputs, optax.OptState], _Result],
    inputs: StepInputs,
    measured: Measured,
    state: BalanceState,
) -> _Result:
    """Calls a rule's `weigh` or `bound`, vmapped over the blocks."""
    inputs = inputs.restrict(measured.active)

    def of_block(blocked: tuple[object, object, optax.OptState]) -> _Result:
        norms, cosine, rule_state = blocked
        return function(dataclasses.replace(inputs, norms=norms, cosine=cosine), rule_state)

    blocked = (measured.norms, measured.cosine, state.rule_state)
    num_blocks = state.weights.shape[0]
    if num_blocks > 1:
        return jax.vmap(of_block, axis_size=num_blocks)(blocked)
    # One block needs no vmap, under which a solver's `cond` would execute both of its branches.
    result = of_block(jax.tree.map(lambda x: x[0], blocked))
    return jax.tree.map(lambda x: jnp.asarray(x)[None], result)


def _read_options(name: str, rule: WeightRule | UpdateRule, given: dict[str, object]) -> Options:
    on_updates = isinstance(rule, UpdateRule)
    wrong = sorted(given.keys() - ({"axis_name"} if on_updates else set(Options._fields)))
    if wrong:
        kind = "a method that gives the update itself" if on_updates else "a weighting method"
        raise TypeError(f"{name}: {kind} takes no argument {', '.join(wrong)}; see MethodOptions.")
    needs = rule.needs - ({"gradients", "losses"} if on_updates else {"losses", "norms", "gram"})
    if needs:
        raise ValueError(
            f"{name}: a rule of type {type(rule).__name__} cannot need {sorted(needs)}."
        )
    options = Options()._replace(**given)
    validation.check_blocks(name, options.blocks)
    validation.check_bool(name, "reduce", options.reduce)
    validation.check_integer(name, "update_every", options.update_every, 1)
    if options.freeze_after is not None:
        validation.check_integer(name, "freeze_after", options.freeze_after, 1)
    validation.check_axis_name(name, options.axis_name)
    return options


def _like(new: jax.Array, old: jax.Array) -> jax.Array:
    if jnp.shape(new) != jnp.shape(old):
        raise ValueError(
            f"a rule changed the shape of its state: {jnp.shape(old)} to {jnp.shape(new)}"
        )
    return jnp.asarray(new).astype(old.dtype)
