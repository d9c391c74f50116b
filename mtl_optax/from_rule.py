"""Lifts a rule, mathematics on `[T]` and `[T, T]` arrays, to an optax transformation.

A rule is a pure function `(evidence, rule_state) -> (weights [T], rule_state)` that says what it needs:
losses, norms, or the Gram matrix. What it does not need is not computed. Everything that all methods
share lives here once: checks, blocks, absent and non-finite tasks, cached weights, shared state fields.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from mtl_optax import arguments, task_tree
from mtl_optax.guard import Guard
from mtl_optax.task_tree import Blocks


class Evidence(NamedTuple):
    """What a rule may look at. Slots of inactive tasks hold 0.

    Attributes:
      active: bool `[T]`; tasks present in this batch whose numbers are finite.
      step: int32 scalar; updates done before this one.
      losses: `[T]`, the raw losses, where the rule needs them.
      norms: `[T]`, gradient norms, where the rule needs norms or the Gram matrix.
      cosine: `[T, T]`, the Gram matrix of the unit gradients; a zero gradient has a zero row.
      extra: what the rule declared as extra arguments of `update`; None where not given.
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


class Rule(NamedTuple):
    """A weighting method before it meets a pytree.

    Attributes:
      name: the factory's name, for messages.
      num_tasks: T.
      needs: the subset of {"losses", "norms", "gram"} that `weigh` reads.
      init: `dtype -> rule_state`, arrays only.
      weigh: `(Evidence, rule_state) -> (weights [T], rule_state)`; weights multiply raw gradients.
      extra: names of extra arguments of `update` that `weigh` reads.
    """

    name: str
    num_tasks: int
    needs: frozenset[str]
    init: Callable[[Any], Any]
    weigh: Callable[[Evidence, Any], tuple[jax.Array, Any]]
    extra: tuple[str, ...] = ()


class BalanceState(NamedTuple):
    """The state of every method here.

    Attributes:
      balance_count: int32 scalar, updates done.
      weights: the weights used last, `[T]`, or `[B, T]` where the method looks at several blocks.
      norms: the gradient norms seen last, same shape; `()` where the method needs none.
      cosine: the cosines seen last, `[T, T]` or `[B, T, T]`; `()` where the method needs none.
      skipped: int32 `[T]`, how often each task was excluded because its numbers were not finite.
      weighed: bool `[T]`, the tasks that `weights` were made for.
      block_names: uint8 `[B, length]`, the blocks' names in ASCII; `()` for one block.
      rule_state: what the method itself remembers.
    """

    balance_count: jax.Array
    weights: jax.Array
    norms: Any
    cosine: Any
    skipped: jax.Array
    weighed: jax.Array
    block_names: Any
    rule_state: Any


class WeightingOptions(TypedDict, total=False):
    """Keywords that every weighting method takes.

    Attributes:
      blocks: the granularity at which the method looks at gradients: "all" (one block), "leaf" (each
        tensor on its own), or a callable `(path, leaf) -> label` (one block a label; it sees leaves
        without the task axis).
      reduce: False keeps the task axis: the update is `weights[t] * g_t`, for methods in a chain. The
        slot of a task that is not finite is passed on as NaN, so that the next method excludes it too.
      update_every: k > 1 asks for new weights every k-th update only, and uses the cached ones in
        between, when nothing but finiteness is looked at. A task that these were not made for, because it
        was absent then or not finite, makes new ones due at once, and as long as it is not finite.
      axis_name: under `shard_map` or `pmap`, the mapped axes over which the gradients' elements are
        split; inner products are summed over them, so that all devices find the same weights. `losses` and
        `active` must be equal on all devices already: `lax.pmean` local losses first.
    """

    blocks: Any
    reduce: bool
    update_every: int
    axis_name: Any


def from_rule(
    rule: Rule,
    *,
    blocks: Any = "all",
    reduce: bool = True,
    update_every: int = 1,
    axis_name: Any = None,
    options: WeightingOptions | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lifts `rule` to a transformation that removes the task axis.

    Args:
      rule: the method's mathematics.
      blocks: see `WeightingOptions`, as for the next three.
      reduce: see there.
      update_every: see there.
      axis_name: see there.
      options: the same four in a dictionary, which goes first: `optax.inject_hyperparams` hands a
        factory's `**options` on as one argument of that name.

    Returns:
      A transformation whose `update(updates, state, params=None, *, losses=None, active=None)` takes
      leaves `[T, *shape]` and returns leaves `[*shape]` (`[T, *shape]` with `reduce=False`).

    Raises:
      ValueError, TypeError: at trace time, for updates without the task axis, a wrong T, missing or
        misshapen `losses` or `active`.

    Example:

      >>> import jax.numpy as jnp
      >>> from mtl_optax.from_rule import Rule, from_rule
      >>> def weigh(evidence, state):
      ...     return 1 / evidence.norms, state
      >>> unit = from_rule(Rule("unit", 2, frozenset({"norms"}), lambda dtype: (), weigh))
      >>> state = unit.init({"w": jnp.zeros(2)})
      >>> updates, state = unit.update({"w": jnp.array([[3., 0.], [0., 4.]])}, state)
      >>> updates["w"].tolist()
      [1.0, 1.0]
    """
    if options:
        own = WeightingOptions(
            blocks=blocks, reduce=reduce, update_every=update_every, axis_name=axis_name
        )
        own.update(options)
        return from_rule(rule, **own)
    _check_options(rule, update_every)
    guard = Guard(rule.name, rule.num_tasks, rule.needs, reduces=reduce)

    def init_fn(params: Any) -> BalanceState:
        guard.remember(params)
        grouping = task_tree.assign_blocks(params, blocks)
        dtype = task_tree.statistics_dtype(params)
        lead = () if grouping.single else (grouping.count,)
        zeros = jnp.zeros((*lead, rule.num_tasks), dtype)
        gram = "gram" in rule.needs
        rule_state = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (*lead, *jnp.shape(x))), rule.init(dtype)
        )
        state = BalanceState(
            balance_count=jnp.zeros((), jnp.int32),
            weights=zeros,
            norms=zeros if gram or "norms" in rule.needs else (),
            cosine=jnp.zeros((*lead, rule.num_tasks, rule.num_tasks), dtype) if gram else (),
            skipped=jnp.zeros((rule.num_tasks,), jnp.int32),
            weighed=jnp.zeros((rule.num_tasks,), bool),
            block_names=() if grouping.single else _encode_names(grouping.names),
            rule_state=rule_state,
        )
        # Equal zeros may share a buffer, and a shared buffer cannot be donated.
        return jax.tree.map(jnp.copy, state)

    # Compiled on its own, so that a call outside jit is one program too; inside jit it is inlined.
    @jax.jit
    def balance(
        updates: Any, state: BalanceState, losses: Any, present: jax.Array, extra: dict[str, Any]
    ) -> tuple[Any, BalanceState]:
        grouping = task_tree.assign_blocks(task_tree.without_task_axis(updates), blocks)
        active = present if losses is None else present & jnp.isfinite(losses)
        losses = None if losses is None else jnp.where(active, losses, 0)

        def fresh(state: BalanceState) -> tuple[BalanceState, jax.Array]:
            evidence = Evidence(active, state.balance_count, losses, extra=extra)
            evidence = _look(rule, evidence, updates, grouping, state.weights.dtype, axis_name)
            weights, rule_state = _weigh(rule, evidence, state.rule_state, grouping)
            return state._replace(
                weights=jnp.where(evidence.active, weights, 0).astype(state.weights.dtype),
                weighed=evidence.active,
                norms=() if evidence.norms is None else evidence.norms,
                cosine=() if evidence.cosine is None else evidence.cosine,
                rule_state=jax.tree.map(_like, rule_state, state.rule_state),
            ), evidence.active

        def cached(state: BalanceState) -> tuple[BalanceState, jax.Array]:
            return state, active & task_tree.finite(updates, rule.num_tasks, axis_name)

        if update_every == 1:
            state, keep = fresh(state)
        else:
            due = is_due(state, active, update_every)
            state, keep = lax.cond(due, fresh, cached, state)
        weights = state.weights[None] if grouping.single else state.weights
        if reduce:
            result = task_tree.combine(updates, weights, keep, grouping)
        else:
            result = task_tree.scale(updates, weights, keep, present & ~keep, grouping)
        return result, state._replace(
            balance_count=next_count(state.balance_count),
            skipped=next_count(state.skipped, present & ~keep),
        )

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        losses: Any = None,
        active: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, BalanceState]:
        guard.check(updates, params, extra_args)
        losses = guard.losses(losses, state.weights.dtype, extra_args)
        extra = {name: extra_args.get(name) for name in rule.extra}
        return balance(updates, state, losses, guard.present(active), extra)

    transformation = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    update_fn.rule = rule  # type: ignore[attr-defined]
    update_fn.options = WeightingOptions(  # type: ignore[attr-defined]
        blocks=blocks, reduce=reduce, update_every=update_every, axis_name=axis_name
    )
    return transformation


def is_due(state: BalanceState, active: jax.Array, update_every: int) -> jax.Array:
    """Whether new weights are due: by the count, or for a task that the cached ones were not made for."""
    return (state.balance_count % update_every == 0) | jnp.any(active & ~state.weighed)


def rule_of(name: str, transformation: Any, *, finished: bool = False) -> Rule:
    """The rule inside a weighting method of this library, for what is built on another.

    What such a method does to its update after weighing, `update.finish`, is not in the rule: the caller
    says by `finished` that it does the same.
    """
    rule = getattr(transformation.update, "rule", None)
    if not finished and hasattr(transformation.update, "finish"):
        raise ValueError(
            f"{name}: takes the weights of {getattr(rule, 'name', 'a method')} only, so its max_norm "
            "would be lost. Leave it out, and put optax.clip_by_global_norm after the whole method."
        )
    if rule is None:
        raise TypeError(
            f"{name}: expected a weighting method of mtl_optax (one whose update is a weighted sum "
            f"of task gradients), found {transformation!r}."
        )
    return rule


def next_count(count: jax.Array, happened: Any = True) -> jax.Array:
    """Counts up where something `happened`; past the largest int32 it goes on from the middle.

    A counter that stopped there would freeze every random stream folded from it, and one that wrapped
    to 0 would look like a first step.
    """
    last = jnp.asarray(np.iinfo(np.int32).max, count.dtype)
    following = jnp.where(count == last, jnp.asarray(2**30, count.dtype), count + 1)
    return jnp.where(happened, following, count)


def _check_options(rule: Rule, update_every: Any) -> None:
    unknown = rule.needs - {"losses", "norms", "gram"}
    if unknown:
        raise ValueError(f"{rule.name}: a rule cannot need {sorted(unknown)}.")
    arguments.check_integer(rule.name, "update_every", update_every, 1)


def _look(
    rule: Rule, evidence: Evidence, updates: Any, grouping: Blocks, dtype: Any, axis_name: Any
) -> Evidence:
    """Adds what the rule needs, and takes non-finite tasks out of the active ones."""
    norms = cosine = None
    if "gram" in rule.needs:
        cosine, norms, finite = task_tree.gram(
            updates, grouping, rule.num_tasks, dtype, evidence.active, axis_name
        )
    elif "norms" in rule.needs:
        norms, finite = task_tree.norms(
            updates, grouping, rule.num_tasks, dtype, evidence.active, axis_name
        )
    else:
        finite = task_tree.finite(updates, rule.num_tasks, axis_name)
    if grouping.single:
        norms, cosine = (None if x is None else x[0] for x in (norms, cosine))
    keep = evidence.active & finite
    losses = None if evidence.losses is None else jnp.where(keep, evidence.losses, 0)
    return evidence._replace(active=keep, losses=losses, norms=norms, cosine=cosine)


def _weigh(
    rule: Rule, evidence: Evidence, rule_state: Any, grouping: Blocks
) -> tuple[jax.Array, Any]:
    """One call of the rule, or one vmapped call over all blocks."""
    if grouping.single:
        return rule.weigh(evidence, rule_state)
    mapped = Evidence(
        active=None,  # type: ignore[arg-type]
        step=None,  # type: ignore[arg-type]
        norms=None if evidence.norms is None else 0,
        cosine=None if evidence.cosine is None else 0,
    )
    return jax.vmap(rule.weigh, in_axes=(mapped, 0), axis_size=grouping.count)(evidence, rule_state)


def _like(new: Any, old: Any) -> jax.Array:
    if jnp.shape(new) != jnp.shape(old):
        raise ValueError(
            f"a rule changed the shape of its state: {jnp.shape(old)} to {jnp.shape(new)}"
        )
    return jnp.asarray(new).astype(old.dtype)


def _encode_names(names: tuple[str, ...]) -> jax.Array:
    """Names as bytes: a state holds arrays only, so that every checkpoint format can carry it."""
    encoded = [name.encode("ascii", "replace") for name in names]
    length = max(map(len, encoded), default=1)
    table = np.zeros((len(encoded), length), np.uint8)
    for row, name in zip(table, encoded, strict=True):
        row[: len(name)] = np.frombuffer(name, np.uint8)
    return jnp.asarray(table)


def decode_names(table: Any) -> tuple[str, ...]:
    """The inverse of the encoding of `block_names`."""
    return tuple(bytes(row).rstrip(b"\0").decode("ascii") for row in np.asarray(table))
