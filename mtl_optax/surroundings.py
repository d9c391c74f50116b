"""What stands around a method: the optax transformations before it, and the wrappers that call it.

A method sees gradients, not the chain it stands in. Yet four mistakes happen outside of it and raise
nothing there: a stateful transformation before the method, whose state broadcasts over the task axis;
one that takes norms over all tasks at once; a wrapper whose other branch keeps the task axis; a partition
whose other group does. So at trace time the method looks at the Python frames of optax that called it.
Frames that it does not recognise are passed over, and then nothing is checked; no number ever depends on
any of this.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp

_ADDS = "add_decayed_weights"
# Transformations of optax that keep no state which could give them away, but reduce over whole leaves
# or over all of them, or add to the gradient what every task would then get.
MIXES_TASKS = {
    _ADDS: "adds its term once for every task",
    "centralize": "takes means over all tasks at once",
    "clip_by_block_rms": "takes norms over all tasks at once",
    "clip_by_global_norm": "takes one norm over all tasks at once",
    "normalize": "takes one norm over all tasks at once",
    "normalize_by_update_norm": "takes one norm over all tasks at once",
    "scale_by_polyak": "takes one norm over all tasks at once",
    "scale_by_trust_ratio": "takes norms over all tasks at once",
}
# Wrappers whose other branch returns updates with the task axis still there.
_KEEPS_AXIS = {
    "apply_if_finite": "mtl_optax.skip_nonfinite(inner) skips such steps",
    "conditionally_mask": "put it after the method",
    "conditionally_transform": "put it after the method",
}
# Wrappers that hand on updates shaped like the parameters.
_LOSES_AXIS = {
    "MultiSteps": (
        "accumulates gradients shaped like the parameters, without a task axis. Use "
        "mtl_optax.accumulate(inner, num_tasks={num_tasks}, every_k=...) in its place, or "
        "optax.microbatching over the function that returns one gradient per task."
    ),
    "flatten": (
        "concatenates the tasks into one vector. Put it after the method: "
        "optax.chain({name}(...), optax.flatten(inner))."
    ),
}


def check_before(name: str, num_tasks: int) -> None:
    """Raises where a transformation earlier in the chain has mixed the tasks."""
    for frame in _optax_frames():
        for update_fn, old, new in _earlier(frame):
            mixer = _find_mixer(update_fn, set())
            if mixer is not None:
                remedy = _after(name) if mixer == _ADDS else _remedy(name, mixer, num_tasks)
                raise ValueError(
                    f"{name}: {mixer} stands before it in the chain and {MIXES_TASKS[mixer]}. {remedy}"
                )
            grown = _changed_shape(old, new)
            if grown is not None:
                path, was, now = grown
                first = _names_of(update_fn)
                raise ValueError(
                    f"{name}: {first} stands before it in the chain and keeps one state for all "
                    f"tasks; its state {path} went from shape {was} to {now}. "
                    + _remedy(name, first, num_tasks)
                )


def check_around(name: str) -> None:
    """Raises under a wrapper whose other branch would keep the axis that the method removes."""
    for frame in _optax_frames():
        wrapper = _factory(frame)
        if wrapper in _KEEPS_AXIS:
            raise ValueError(
                f"{name}: stands inside {wrapper}, which returns updates with the task axis when it "
                f"does not apply what it wraps: {_KEEPS_AXIS[wrapper]}."
            )


def check_beside(name: str, num_tasks: int) -> None:
    """Raises in a partition where another group gets the task axis and keeps it."""
    for frame in _optax_frames():
        group = _group_that_keeps_axis(frame, num_tasks) if _factory(frame) == "partition" else None
        if group is not None:
            raise ValueError(
                f"{name}: beside it in the partition stands the group {group!r}, whose gradients carry the "
                "task axis too and which does not remove it: its updates would be broadcast into the "
                f"parameters. Begin it with a method: optax.chain(mtl_optax.sum_tasks({num_tasks}), ...). "
                "To freeze parameters, put optax.transforms.freeze(mask) after everything."
            )


def explain_shape(name: str, num_tasks: int) -> str | None:
    """Why updates without a task axis arrived, where a wrapper around the method is the reason."""
    for frame in _optax_frames():
        wrapper = _factory(frame)
        if wrapper in _LOSES_AXIS:
            why = _LOSES_AXIS[wrapper].format(name=name, num_tasks=num_tasks)
            return f"{name}: stands inside {wrapper}, which {why}"
    return None


def _after(name: str) -> str:
    return f"Put it after {name}."


def _remedy(name: str, before: str, num_tasks: int) -> str:
    lifted = f"mtl_optax.per_task({before}(...), {num_tasks})"
    return f"{_after(name)[:-1]}, or lift it over the tasks: {lifted}."


# --- frames ------------------------------------------------------------------------------------------


def _optax_frames() -> Iterator[FrameType]:
    """The frames of optax that lead to here, up to the first one of anybody else's code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package == "optax":
            yield frame
        elif package not in ("mtl_optax", "jax", "contextlib", "functools"):
            return
        frame = frame.f_back


def _factory(frame: FrameType) -> str:
    return frame.f_code.co_qualname.partition(".")[0]


def _earlier(frame: FrameType) -> list[tuple[Callable[..., Any], Any, Any]]:
    """For the update of a chain: `(update_fn, state before, state after)` of what has run already."""
    if not frame.f_code.co_qualname.endswith("chain.<locals>.update_fn"):
        return []
    known = frame.f_locals
    try:
        if "update_fns" in known:
            functions, olds, news = known["update_fns"], known["state"], known["new_state"]
        else:
            functions = [transform.update for _, transform in known["transforms"]]
            olds, news = known["state"].values(), known["new_state"].values()
        # The shortest is `new_state`, which does not hold the method's own yet.
        return list(zip(functions, olds, news, strict=False))
    except (AttributeError, KeyError, TypeError, ValueError):
        return []


def _changed_shape(old: Any, new: Any) -> tuple[str, Any, Any] | None:
    if jax.tree.structure(old) != jax.tree.structure(new):
        return None
    leaves = jax.tree_util.tree_leaves_with_path(old)
    for (path, before), after in zip(leaves, jax.tree.leaves(new), strict=True):
        if jnp.shape(before) != jnp.shape(after):
            where = jax.tree_util.keystr(path).lstrip(".")
            return where, jnp.shape(before), jnp.shape(after)
    return None


def _group_that_keeps_axis(frame: FrameType, num_tasks: int) -> Any:
    """The label of such a group among those of a partition, or None."""
    known = frame.f_locals
    try:
        params, updates = known["params"], known["updates"]
        spread = lambda label, part: jax.tree.map(lambda _: label, part)  # noqa: E731
        labels = jax.tree.leaves(jax.tree.map(spread, known["labels"], params))
        leaves = zip(labels, jax.tree.leaves(params), jax.tree.leaves(updates), strict=True)
        for label, param, update in leaves:
            stacked = jnp.shape(update) == (num_tasks, *jnp.shape(param))
            if stacked and _only_optax(known["transforms"][label].update, set()):
                return label
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return None


# --- functions ---------------------------------------------------------------------------------------


def _inner_functions(function: Any) -> Iterator[Any]:
    """The functions of the transformations that an update of optax wraps."""
    for cell in getattr(function, "__closure__", None) or ():
        try:
            contents = cell.cell_contents
        except ValueError:  # a cell that is not filled yet
            continue
        yield from (leaf for leaf in jax.tree.leaves(contents) if callable(leaf))


def _find_mixer(function: Any, seen: set[int]) -> str | None:
    """The name of the first known mixer in an update of optax; other people's code is opaque."""
    if id(function) in seen or not _of_optax(function):
        return None
    seen.add(id(function))
    name = _factory_name(function)
    if name in MIXES_TASKS:
        return name
    return next(
        filter(None, (_find_mixer(inner, seen) for inner in _inner_functions(function))), None
    )


def _only_optax(function: Any, seen: set[int]) -> bool:
    """Whether an update and all that it wraps are optax's own, none of which removes the task axis."""
    if id(function) in seen:
        return True
    seen.add(id(function))
    updates = [
        f
        for f in _inner_functions(function)
        if getattr(f, "__name__", "").startswith("update") or _of_optax(f)
    ]
    return _of_optax(function) and all(_only_optax(inner, seen) for inner in updates)


def _names_of(function: Any) -> str:
    """What to call a transformation: the factory of its update, without optax's adapter around it."""
    while _factory_name(function) == "with_extra_args_support":
        inner = list(_inner_functions(function))
        updates = [f for f in inner if f.__name__.startswith("update")]
        if not updates:
            break
        function = updates[0]
    return _factory_name(function)


def _factory_name(function: Any) -> str:
    return getattr(function, "__qualname__", "a transformation").partition(".")[0]


def _of_optax(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").partition(".")[0] == "optax"
