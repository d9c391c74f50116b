"""A check of a whole optimizer, once, before training: does it remove the task axis and keep its state?"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_optax.core.checks import where
from mtl_optax.core.method import BalanceState, Method, methods_updated, states_in
from mtl_optax.core.tasks import Tasks, read_tasks

_GUIDE = "See 'Composition with optax' in the README."
# Wrappers of optax that cannot stand around a method, known by their states.
_CANNOT_STAND_AROUND: dict[type, tuple[str, str]] = {
    optax.MultiStepsState: (
        "optax.MultiSteps",
        "accumulates gradients shaped like the parameters, without the task axis. Use "
        "mtl_optax.accumulate(inner, {num_tasks}, every_k=...) in its place.",
    ),
    optax.ApplyIfFiniteState: (
        "optax.apply_if_finite",
        "returns updates with the task axis when it skips a step. Use mtl_optax.skip_nonfinite(inner) in "
        "its place.",
    ),
    optax.ConditionallyMaskState: (
        "optax.conditionally_mask",
        "returns updates with the task axis when its condition is false. Put it after the method.",
    ),
    optax.ConditionallyTransformState: (
        "optax.conditionally_transform",
        "returns updates with the task axis when its condition is false. Put it after the method.",
    ),
    optax.contrib.MechanicState: (
        "optax.contrib.mechanize",
        "multiplies gradients by parameters, which have no task axis. Put it after the method: "
        "optax.chain(method, optax.contrib.mechanize(inner)).",
    ),
}


def check(
    tx: optax.GradientTransformation,
    params: Any,
    num_tasks: Any,
    *,
    gradients: Any = None,
    **extra_args: Any,
) -> str:
    """Checks that a whole optimizer removes the task axis and keeps the shapes of its state.

    Call it once, before training or in a test. It traces `tx.init` and `tx.update` on gradients of
    shape `[T, *shape]` with `jax.eval_shape`: nothing is computed. It finds what shows in shapes: a
    transformation with a state before the method, a wrapper that cannot stand around one, a part of
    `optax.partition` or `optax.masked` that keeps the task axis, a wrong number of tasks or other names.

    Notes:
      What no shape shows, it cannot find. These transformations of optax pass before a method, and mean
      something else there: `clip_by_global_norm`, `contrib.normalize`, `normalize_by_update_norm` and
      `scale_by_polyak` take one norm over all tasks; `clip_by_block_rms` and `scale_by_trust_ratio` take
      one per tensor, over all tasks; `centralize` takes the task axis for the first axis of the
      parameter; `add_decayed_weights` adds its term once per task. Put them after the method. All but
      the last may also be lifted over the tasks: `mtl_optax.per_task(inner, num_tasks)`.

      An order of the losses that is not that of the gradients shows in no shape either; named tasks rule
      it out.

    Args:
      tx: the whole optimizer, for example `optax.chain(method, optax.adam(1e-3))`.
      params: the parameters; shapes are enough.
      num_tasks: T, or the task names.
      gradients: what `update` is given, where that is not one gradient per task for every parameter
        (heads from `split_value_and_grad`); shapes are enough.
      **extra_args: the extra arguments of `update`, such as those of a line search; for arrays, shapes
        are enough. `losses` is `[T]` where it is not given.

    Returns:
      A line for each method that `update` calls: its name, its tasks in the order of the task axis, and
      its target, where it has one.

    Raises:
      ValueError: if `init` or `update` raises, an update would not be shaped like the parameters, or a
        state would change its shape or dtype. The message says where, and what to do.

    Example:

      >>> import jax.numpy as jnp, optax, mtl_optax as mtl
      >>> params = {"w": jnp.zeros((3, 2))}
      >>> tasks = ("click", "buy")
      >>> tx = optax.chain(mtl.metabalance(tasks, target="click"), optax.adam(1e-3))
      >>> print(mtl.check(tx, params, tasks))
      metabalance: tasks 'buy', 'click' in this order, target 'click'
      >>> momentum_first = optax.chain(optax.trace(0.9), mtl.mgda(2), optax.sgd(1e-3))
      >>> mtl.check(momentum_first, params, num_tasks=2)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
        ...
      ValueError: check: state[0].trace['w'] changes its shape from (3, 2) to (2, 3, 2): ...
    """
    tasks = read_tasks("check", num_tasks)
    number = tasks.number
    update_fn = optax.with_extra_args_support(tx).update
    like = _shapes(params)
    # The parameters of `optax.lookahead` are a pair, of which the gradients know one.
    trained = like.fast if isinstance(like, optax.LookaheadParams) else like
    if gradients is None:
        gradients = _with_tasks(trained, number)
    extra_args = {"losses": jax.ShapeDtypeStruct((number,), jnp.float32), **extra_args}
    arrays = {name: value for name, value in extra_args.items() if _has_shapes(value)}
    # Functions and Python numbers stay what they are.
    others = {name: value for name, value in extra_args.items() if name not in arrays}

    def update(gradients: Any, state: Any, params: Any, arrays: Any) -> Any:
        return update_fn(gradients, state, params, **arrays, **others)

    def step(state: Any) -> Any:
        # A state that is broadcast over the tasks is reported with its path, not by the first operation.
        with jax.numpy_rank_promotion("allow"):
            return jax.eval_shape(update, gradients, state, like, arrays)

    try:
        state = jax.eval_shape(tx.init, like)
    except Exception as error:
        raise ValueError(_about_init(error, tx, like, number)) from error
    with methods_updated() as methods:
        try:
            updates, following = step(state)
        except Exception as error:
            raise ValueError(_about_update(error, tx, state, number)) from error
    _check_updates(updates, like, number, state)
    _check_state(state, following, number)
    if jax.tree.structure(state) != jax.tree.structure(following):
        # `optax.monitor` has no entries before its first step.
        _check_structure(following, step(following)[1])
    _check_names(methods, tasks)
    return "\n".join(map(_describe, methods))


# --- what an update returned -------------------------------------------------------------------------


def _check_updates(updates: Any, params: Any, num_tasks: int, state: Any) -> None:
    got, want = jax.tree.structure(updates), jax.tree.structure(params)
    if got != want:
        raise ValueError(
            f"check: the updates differ in structure from the parameters: {got} and {want}. {_GUIDE}"
        )
    leaves = jax.tree_util.tree_leaves_with_path(params)
    pairs = list(zip(leaves, jax.tree.leaves(updates), strict=True))
    wrong = [(path, p.shape, u.shape) for (path, p), u in pairs if p.shape != u.shape]
    if not wrong:
        return
    path, want, got = wrong[0]
    more = f" (and {len(wrong) - 1} more leaves)" if len(wrong) > 1 else ""
    found = f"the update of leaf {where(path)} has shape {got}, expected {want}{more}"
    if any(got != (num_tasks, *want) for _, want, got in wrong):
        raise ValueError(f"check: {found}. {_stands_around(state, num_tasks) or _GUIDE}")
    if len(wrong) == len(pairs):
        raise ValueError(
            f"check: nothing removes the task axis: {found}. Put a method, such as "
            f"mtl_optax.sum_tasks({num_tasks}), before the optimizer."
        )
    raise ValueError(
        f"check: {found}: the part of optax.partition, optax.masked or optax.selective_transform that "
        "owns it keeps the task axis. Begin that part with a method, such as "
        f"mtl_optax.sum_tasks({num_tasks}). To freeze parameters, put optax.transforms.freeze(mask) after "
        "everything. Gradients that come without the task axis are given to check as gradients=."
    )


def _check_state(old: Any, new: Any, num_tasks: int) -> None:
    after = dict(_leaves(new))
    for path, before in _leaves(old):
        now = after.get(path, before)
        if now.shape == (num_tasks, *before.shape):
            raise ValueError(
                f"check: state{path} changes its shape from {before.shape} to {now.shape}: a "
                "transformation before the method keeps one state for all tasks. Put it after the "
                f"method, or lift it over the tasks: mtl_optax.per_task(inner, {num_tasks})."
            )
        for what in ("shape", "dtype"):
            was, is_now = getattr(before, what), getattr(now, what)
            if was != is_now:
                raise ValueError(
                    f"check: state{path} changes its {what} from {was} to {is_now}, which jax.lax.scan "
                    f"refuses and jax.jit compiles anew. {_GUIDE}"
                )


def _check_structure(old: Any, new: Any) -> None:
    was, is_now = jax.tree.structure(old), jax.tree.structure(new)
    if was != is_now:
        raise ValueError(
            f"check: the state changes its structure at every update, from {was} to {is_now}, which "
            f"jax.jit compiles anew each time. {_GUIDE}"
        )


def _check_names(methods: list[Method], tasks: Tasks) -> None:
    for method in methods:
        if None not in (method.task_names, tasks.names) and method.task_names != tasks.names:
            raise ValueError(
                f"check: the task names are {list(tasks.names or ())}, but {method.name} is made for "
                f"{list(method.task_names or ())}. Give both the names of the losses that loss_fn returns."
            )


def _describe(method: Method) -> str:
    tasks = f"{method.num_tasks} tasks"
    if method.task_names is not None:
        tasks = f"tasks {', '.join(map(repr, method.task_names))} in this order"
    target = "" if method.target is None else f", target {method.target!r}"
    return f"{method.name}: {tasks}{target}"


# --- what was raised ---------------------------------------------------------------------------------


def _about_init(error: Exception, tx: Any, params: Any, num_tasks: int) -> str:
    found = f"check: init raises {_quote(error)}"
    try:
        jax.eval_shape(tx.init, _with_tasks(params, num_tasks))
    except Exception:
        return found
    return (
        f"{found}\nA transformation before the method looks at the task axis, which the parameters that "
        f"init sees do not have. Lift it over the tasks: mtl_optax.per_task(inner, {num_tasks})."
    )


def _about_update(error: Exception, tx: Any, state: Any, num_tasks: int) -> str:
    for path, node in _nodes(state, BalanceState):
        made_for = node.weights.shape[-1]
        if made_for != num_tasks:
            return (
                f"check: num_tasks={num_tasks}, but the method of state{path} is made for {made_for} "
                f"task{'s' * (made_for > 1)}. Give both the number of losses that loss_fn returns."
            )
    around = _stands_around(state, num_tasks)
    if around:
        return f"check: {around}"
    found = f"check: update raises {_quote(error)}"
    if isinstance(error, TypeError) and "must be real floating point" in str(error):
        return found
    if isinstance(error, TypeError) and "required keyword-only" in str(error):
        return (
            f"{found}\nGive check the extra arguments that update is given, such as "
            "mtl_optax.check(tx, params, num_tasks, value=...)."
        )
    if isinstance(error, TypeError) and "'losses'" in str(error):
        return (
            f"{found}\nA part of this optimizer refuses the extra argument losses. Wrap that part: "
            "mtl_optax.drop_extra_args(inner, 'losses')."
        )
    if "losses" in str(error) and not isinstance(tx, optax.GradientTransformationExtraArgs):
        return (
            f"{found}\nThe outermost transformation hands no extra arguments on, so that no losses reach a "
            "method inside of it. Put it after the method, or use a method that needs no losses."
        )
    if _nodes(state, (optax.PartitionState, optax.MaskedState)):
        return (
            f"{found}\nA function for the labels or the mask is called on the parameters at init, and on "
            "gradients with the task axis at update. Where it looks at ranks or shapes, call it once on "
            f"the parameters, and give optax.partition or optax.masked the result. {_GUIDE}"
        )
    return (
        f"{found}\nWhat stands before or around a method is given gradients with a task axis. Put it after "
        "the method, or, if it stands before, lift it over the tasks: "
        f"mtl_optax.per_task(inner, {num_tasks}). {_GUIDE}"
    )


def _stands_around(state: Any, num_tasks: int) -> str | None:
    """What to do about a wrapper that holds a method and cannot, where the state shows one."""
    for path, node in _nodes(state, tuple(_CANNOT_STAND_AROUND)):
        if states_in(node):
            wrapper, why = _CANNOT_STAND_AROUND[type(node)]
            return f"{wrapper}, found at state{path}, stands around a method: it " + why.format(
                num_tasks=num_tasks
            )
    return None


def _quote(error: Exception) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# --- trees of shapes ---------------------------------------------------------------------------------


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def _with_tasks(tree: Any, num_tasks: int) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((num_tasks, *x.shape), x.dtype), tree)


def _has_shapes(tree: Any) -> bool:
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and all(hasattr(x, "shape") and hasattr(x, "dtype") for x in leaves)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _nodes(tree: Any, kinds: type | tuple[type, ...]) -> list[tuple[str, Any]]:
    """The outermost nodes of these types in a tree, with their paths."""
    is_one = lambda node: isinstance(node, kinds)  # noqa: E731
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_one)
    return [(jax.tree_util.keystr(path), node) for path, node in nodes if is_one(node)]
