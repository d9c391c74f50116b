"""A check of a whole optimizer before training: its task axis, its state, and its tasks."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.method import Method
from mtl_optax.core.state import BalanceState, states_in
from mtl_optax.core.validation import (
    MissingLosses,
    NotFloating,
    Tasks,
    WrongEntries,
    WrongTaskAxis,
    and_more,
    difference,
    read_tasks,
    where,
)
from mtl_optax.small_runs import (
    fault_before_methods,
    gradients_like,
    leaves_in,
    methods_in,
    nodes_in,
    rounded_hyperparameter,
)

_Tree = TypeVar("_Tree")
_GUIDE = "See docs/composition.md."
# Wrappers of optax that cannot wrap a method, by the types of their states.
_CANNOT_STAND_AROUND: dict[type, tuple[str, str]] = {
    optax.MultiStepsState: (
        "optax.MultiSteps",
        "accumulates gradients shaped like the parameters, without the task axis. Use "
        "mtl_optax.accumulate(inner, tasks, every_k=...) in its place.",
    ),
    optax.ApplyIfFiniteState: (
        "optax.apply_if_finite",
        "returns updates with the task axis when it skips a step. Use mtl_optax.skip_nonfinite(inner) in "
        "its place.",
    ),
}


def check(
    tx: optax.GradientTransformation,
    params: optax.Params,
    tasks: int | Collection[str] | None = None,
    *,
    gradients: optax.Updates | None = None,
    **extra_args: object,
) -> str:
    """Checks that an optimizer separates the tasks, removes the task axis, and keeps its state.

    Call it once, before training or in a test. It traces `tx.init` and `tx.update` on gradients of shape
    `[T, *shape]`, and detects errors that affect shapes: a transformation with a state before the method,
    a wrapper that cannot wrap a method, a part of `optax.partition` or `optax.masked` that keeps the task
    axis, a wrong number of tasks, or wrong task names.

    It also executes the transformations before the first method, on leaves of at most two elements. It
    raises if the gradient of a task depends on the gradients of other tasks (`clip_by_global_norm` takes
    one norm over all tasks), or if a term of the parameters is added (`add_decayed_weights` would add it
    once per task).

    Notes:
      It cannot detect three errors. First, `centralize` before a method treats the task axis as the first
      axis of the parameter: put it after the method, or inside `mtl_optax.per_task`. Second, optimizers
      that fail on leaves of two elements (for example because labels depend on shapes) are not executed.
      Third, the losses may be in another order than the gradients; named tasks prevent this.

    Args:
      tx: the whole optimizer, for example `optax.chain(method, optax.adam(1e-3))`.
      params: the parameters; shapes are enough.
      tasks: the task names, which are compared with those of the methods in `tx`, or T; by default the
        number of tasks of the methods.
      gradients: the gradients for `update`, if they are not one gradient per task for every parameter
        (such as the heads in `split_value_and_grad`); only shapes and dtypes are used.
      **extra_args: the extra arguments of `update`, such as those of a line search; a
        `jax.ShapeDtypeStruct` can replace an array. By default `losses` has one entry per task.

    Returns:
      One line per method that `update` calls: its name and the tasks. The target is not in it, because only
      the program of `update` is read; `repr(method)` shows the target.

    Raises:
      ValueError: if `init` or `update` raises, the update does not have the shapes of the parameters, the
        state changes its shape or dtype, a transformation before a method mixes tasks, methods have
        different numbers of tasks, a method has other task names than `tasks`, or
        `optax.inject_hyperparams` changes a number by rounding. The message contains the location and a
        remedy.

    Example:

      >>> import jax.numpy as jnp, optax, mtl_optax as mtl
      >>> params = {"w": jnp.zeros((3, 2))}
      >>> tx = optax.chain(mtl.metabalance(("click", "buy"), target="click"), optax.adam(1e-3))
      >>> print(mtl.check(tx, params, ("click", "buy")))
      metabalance: tasks 'buy', 'click' in this order
      >>> momentum_first = optax.chain(optax.trace(0.9), mtl.mgda(2), optax.sgd(1e-3))
      >>> mtl.check(momentum_first, params)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
        ...
      ValueError: check: state[0].trace['w'] changes its shape from (3, 2) to (2, 3, 2): ...
    """
    given = _shapes(params)
    state = _first_state(tx, given)
    _refuse(rounded_hyperparameter(tx.init, given, state))
    axis = _tasks_of(tx, state, tasks)
    like, state = _arrays_of_variables((given, state))
    if gradients is None:
        gradients = _with_tasks(gradients_like(like), axis.number)
    gradients = _arrays_of_variables(_shapes(gradients))
    extra_args = {"losses": _losses(axis), **extra_args}
    arrays = {name: value for name, value in extra_args.items() if _has_shapes(value)}
    others = {name: value for name, value in extra_args.items() if name not in arrays}
    update = functools.partial(_update, tx, others)
    trace = jax.make_jaxpr(update, return_shape=True)
    try:
        program, (updates, following) = trace(gradients, state, like, arrays)
    except Exception as error:
        fewer = {name: value for name, value in arrays.items() if name != "losses"}
        without_losses = functools.partial(trace, gradients, state, like, fewer)
        variables = jax.tree.structure(like) != jax.tree.structure(given)
        about = _about_update(error, state, without_losses, variables)
        raise ValueError(about) from error
    _check_updates(updates, like, axis.number, state)
    _check_state(state, following, axis.number)
    # `optax.monitor` has no entries before its first step.
    if jax.tree.structure(state) != jax.tree.structure(following):
        _check_structure(following, trace(gradients, following, like, arrays)[1][1])
    _refuse(fault_before_methods(tx.init, update, like, gradients, arrays, axis.number))
    of_tasks = f"{axis.number} tasks"
    if axis.names is not None:
        of_tasks = f"tasks {', '.join(map(repr, axis.names))} in this order"
    return "\n".join(f"{method}: {of_tasks}" for method in methods_in(program.jaxpr))


# --- what is checked ---------------------------------------------------------------------------------


def _update(
    tx: optax.GradientTransformation,
    others: dict[str, object],
    gradients: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    arrays: dict[str, object],
) -> tuple[optax.Updates, optax.OptState]:
    """Calls `update` with the extra arguments that are arrays, which are traced, and with the others."""
    # A state that is broadcast over the tasks is reported by `check`, with its path.
    with jax.numpy_rank_promotion("allow"):
        update = optax.with_extra_args_support(tx).update
        return update(gradients, state, params, **arrays, **others)


def _first_state(tx: optax.GradientTransformation, params: optax.Params) -> optax.OptState:
    """Returns the shapes of what `init` returns."""
    try:
        return jax.eval_shape(tx.init, params)
    except Exception as error:
        raise ValueError(_about_init(error, tx, params)) from error


def _losses(tasks: Tasks) -> jax.ShapeDtypeStruct | dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of the losses; a method for tasks of other names refuses a dictionary."""
    if tasks.names is None:
        return jax.ShapeDtypeStruct((tasks.number,), jnp.float32)
    return dict.fromkeys(tasks.names, jax.ShapeDtypeStruct((), jnp.float32))


def _refuse(fault: str | None) -> None:
    if fault:
        raise ValueError(f"check: {fault}")


def _tasks_of(
    tx: optax.GradientTransformation, state: optax.OptState, tasks: int | Collection[str] | None
) -> Tasks:
    """Returns the tasks, and raises if a method in the optimizer is made for another number."""
    known = tx.tasks if isinstance(tx, Method) else None
    if tasks is not None:
        known = read_tasks("check", tasks)
    for path, node in nodes_in(state, BalanceState):
        number = node.weights.shape[-1]
        known = known or Tasks(number, None)
        if number != known.number:
            raise ValueError(
                f"check: the method of state{path} is made for {number} task{'s' * (number > 1)}, expected "
                f"{known.number}. Give check and all methods the number of losses that loss_fn returns."
            )
    if known is None:
        raise ValueError(
            "check: found no method of mtl_optax in this optimizer: put one, such as "
            "mtl_optax.sum_tasks(tasks), before the optimizer. For a transformation of your own that "
            "removes the task axis give check tasks=, their number or names."
        )
    return known


# --- what an update returned -------------------------------------------------------------------------


def _check_updates(
    updates: optax.Updates, params: optax.Params, num_tasks: int, state: optax.OptState
) -> None:
    if jax.tree.structure(updates) != jax.tree.structure(params):
        raise ValueError(
            "check: the updates differ in structure from the parameters: "
            f"{difference('the updates', updates, 'the parameters', params)}. {_GUIDE}"
        )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    pairs = list(zip(leaves, jax.tree.leaves(updates), strict=True))
    wrong = [(path, p.shape, u.shape) for (path, p), u in pairs if p.shape != u.shape]
    if not wrong:
        return
    path, want, got = wrong[0]
    found = f"the update of leaf {where(path)} has shape {got}, expected {want}{and_more(wrong)}"
    if any(got != (num_tasks, *want) for _, want, got in wrong):
        raise ValueError(f"check: {found}. {_stands_around(state) or _GUIDE}")
    if len(wrong) == len(pairs):
        raise ValueError(
            f"check: nothing removes the task axis: {found}. Put a method, such as "
            "mtl_optax.sum_tasks(tasks), before the optimizer."
        )
    raise ValueError(
        f"check: {found}: its part of optax.partition, masked or selective_transform keeps the task axis. "
        "Begin it with a method, such as mtl_optax.sum_tasks(tasks); to freeze, put "
        "optax.transforms.freeze(mask) last. If update is given none there, give check gradients=."
    )


def _check_state(old: optax.OptState, new: optax.OptState, num_tasks: int) -> None:
    after = dict(leaves_in(new))
    for path, before in leaves_in(old):
        now = after.get(path, before)
        if now.shape == (num_tasks, *before.shape):
            raise ValueError(
                f"check: state{path} changes its shape from {before.shape} to {now.shape}: a "
                "transformation before the method keeps one state for all tasks. Put it after the "
                "method, or apply it per task: mtl_optax.per_task(inner, tasks)."
            )
        for what in ("shape", "dtype"):
            was, is_now = getattr(before, what), getattr(now, what)
            if was != is_now:
                raise ValueError(
                    f"check: state{path} changes its {what} from {was} to {is_now}, which jax.lax.scan "
                    f"refuses and jax.jit compiles anew. {_GUIDE}"
                )


def _check_structure(old: optax.OptState, new: optax.OptState) -> None:
    if jax.tree.structure(old) != jax.tree.structure(new):
        raise ValueError(
            "check: the state changes its structure at every update, which jax.jit compiles anew each "
            f"time: {difference('new states', new, 'old ones', old)}. {_GUIDE}"
        )


# --- what was raised ---------------------------------------------------------------------------------


def _about_init(error: Exception, tx: optax.GradientTransformation, params: optax.Params) -> str:
    remedy = (
        "A transformation before the method looks at the task axis, which the parameters that init sees do "
        "not have. Apply it per task: mtl_optax.per_task(inner, tasks)."
    )
    try:
        jax.eval_shape(tx.init, _with_tasks(params, 2))
    except Exception:
        remedy = ""
    return _quote("init", error, remedy)


def _about_update(
    error: Exception, state: optax.OptState, without_losses: Callable[[], object], variables: bool
) -> str:
    around = _stands_around(state)
    if around:
        return f"check: {around}"
    if isinstance(error, MissingLosses):
        return (
            f"check: {error.args[0]} A transformation around the method hands no losses on: put it after "
            "the method, or use a method that needs none."
        )
    if isinstance(error, (NotFloating, WrongEntries, WrongTaskAxis)):
        return f"check: {error}"
    return _quote("update", error, _remedy(error, state, without_losses, variables))


def _remedy(
    error: Exception, state: optax.OptState, without_losses: Callable[[], object], variables: bool
) -> str:
    """Returns a remedy for an error that another library raised."""
    # Python has no exception class for a missing keyword argument.
    if isinstance(error, TypeError) and "required keyword-only" in str(error):
        return (
            "Give check the extra arguments that update is given, such as "
            "mtl_optax.check(tx, params, value=...)."
        )
    if isinstance(error, TypeError) and _passes(without_losses):
        return (
            "A part of this optimizer refuses the extra argument losses. Wrap that part: "
            "mtl_optax.drop_extra_args(inner, 'losses')."
        )
    has_labels = nodes_in(state, (optax.PartitionState, optax.MaskedState))
    if has_labels and variables:
        return (
            "nnx.Optimizer calls init on variables, and update on their arrays. Make labels and masks that "
            "are trees from nnx.as_pure(params), or give functions of the paths."
        )
    if has_labels:
        return (
            "A function for labels or a mask sees the parameters at init, and gradients with the task axis "
            "at update. If it looks at ranks or shapes, give its result on the parameters instead."
        )
    return (
        "What stands before or around a method is given gradients with a task axis. Put it after the "
        f"method; before it, apply it per task: mtl_optax.per_task(inner, tasks). {_GUIDE}"
    )


def _passes(update: Callable[[], object]) -> bool:
    """Whether an update runs, at least until a method raises because of missing losses."""
    try:
        update()
    except MissingLosses:
        return True
    except Exception:
        return False
    return True


def _stands_around(state: optax.OptState) -> str | None:
    """Returns a remedy if the state shows a wrapper that cannot wrap a method."""
    for path, node in nodes_in(state, tuple(_CANNOT_STAND_AROUND)):
        if states_in(node):
            wrapper, why = _CANNOT_STAND_AROUND[type(node)]
            return f"{wrapper}, found at state{path}, stands around a method: it {why}"
    return None


def _quote(function: str, error: Exception, remedy: str) -> str:
    """Returns an error as one line, and the remedy; about 300 characters in total."""
    text = " ".join(f"{type(error).__name__}: {error}".rstrip(": ").split())
    room = 275 - len(remedy)
    text = text if len(text) <= room else f"{text[: room - 3]}..."
    return f"check: {function} raises {text}\n{remedy}".rstrip()


# --- trees of shapes ---------------------------------------------------------------------------------


def _shapes(tree: _Tree) -> _Tree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def _arrays_of_variables(tree: _Tree) -> _Tree:
    """Replaces the variables of Flax by arrays, as `nnx.Optimizer` does before `update`."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return tree
    # The name in Flax 0.12.0 is `pure`.
    return nnx.as_pure(tree) if hasattr(nnx, "as_pure") else nnx.pure(tree)


def _with_tasks(tree: _Tree, num_tasks: int) -> _Tree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((num_tasks, *x.shape), x.dtype), tree)


def _has_shapes(tree: object) -> bool:
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and all(hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves)
