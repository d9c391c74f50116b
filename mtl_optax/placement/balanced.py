"""Methods on a part of the parameters, or on some of the steps: fewer backward passes than T."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mtl_optax.core import task_tree
from mtl_optax.core.checks import read_active
from mtl_optax.core.first_state import check_state
from mtl_optax.core.lift import from_rule, is_due, next_count
from mtl_optax.core.method import BalanceState, Method
from mtl_optax.core.rule import WeightRule
from mtl_optax.core.tasks import task_vector
from mtl_optax.placement.loss_vector import check_differentiable, split_result
from mtl_optax.placement.pull_back import (
    Mode,
    check_mode,
    pull_each,
    replace_leaves,
    vjp_of_losses,
)


def balanced_value_and_grad(
    loss_fn: Callable[..., Any],
    method: Method,
    has_aux: bool = False,
    *,
    evidence: Any = None,
    mode: Mode = "auto",
) -> Callable[..., Any]:
    """Differentiates per task only what the weights are made of, and the rest once.

    Two savings for weighting methods on parameters. With `evidence`, the method looks at the gradients
    of the chosen leaves only (a few dense layers, say, and not the embedding tables); the others take
    one backward pass of `sum_t weights[t] * losses[t]`. With a method made with `update_every=k`, the
    T backward passes happen on every k-th step only; in between, one pass with the cached weights
    differentiates everything.

    A single pass takes no task apart: where the derivative of one is not finite, so is the whole. That step
    then takes T passes more, and sums what is finite: a broken task is left out and counted as skipped, an
    absent one is left out, and the others train on. Such a step costs T + 1 passes, so guard the divisions
    in the loss of a task that is often absent. An array `[T]`, "vmap" and "map" cannot keep tasks apart
    (see `per_task_value_and_grad`): there the update of such a step is 0, and all tasks are counted.

    Nor has a single pass the norms of the tasks, to limit kept weights by: where gradients are zero in most
    steps, or their norms jump, leave `update_every` at 1 (docs/recipes/update_every.md).

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` returns a dictionary or tuple of scalars, or an array
        `[T]`; `(losses, aux)` with `has_aux`.
      method: a weighting method with one block (`blocks="all"`) that reduces the task axis.
      has_aux: whether `loss_fn` returns auxiliary data as well.
      evidence: the leaves whose gradients the method looks at: a callable `(path, leaf) -> bool`, or a
        tree of booleans that is a prefix of `params`. None is all of them.
      mode: as in `per_task_value_and_grad`.

    Returns:
      A function `fn(params, state, *args, active=None, extra_args=None, **kwargs)` that returns `(losses,
      (update, state))`, with `(losses, aux)` for `losses` where `has_aux`. `update` has the structure of
      `params` and goes to an optimizer; `state` starts from `method.init(params)`; `active` is as in
      `method.update`, and `extra_args` is a dictionary of its further arguments (`traces` of `ntk`,
      `order`, `noise`, `losses_after`). `args` and `kwargs` go to `loss_fn`. Cost: T backward passes
      through the evidence plus one, or one alone on the steps between.

    Raises:
      TypeError: for a method that is no weighted sum. ValueError: for several blocks, `reduce=False`,
      evidence that covers no leaf, or an unknown mode.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> def loss_fn(params, x):
      ...     h = params["table"][0] * (x @ params["dense"])
      ...     return (h ** 2).mean(), h.mean()
      >>> params, x = {"dense": jnp.ones(2), "table": jnp.ones(5)}, jnp.ones((3, 2))
      >>> method = mtl.mgda(2, update_every=10)
      >>> fn = mtl.balanced_value_and_grad(loss_fn, method, evidence=lambda path, _: "dense" in str(path))
      >>> losses, (update, state) = fn(params, method.init(params), x)
      >>> state.weights.tolist(), update["dense"].tolist(), update["table"].tolist()
      ([[0.0, 1.0]], [1.0, 1.0], [2.0, 0.0, 0.0, 0.0, 0.0])

    References:
      Navon et al., Multi-Task Learning as a Bargaining Game, 2022, section 4.4 (weights kept for
      several steps), https://arxiv.org/abs/2202.01017
    """
    check_mode("balanced_value_and_grad", mode)
    rule, options = _rule_and_options(method)
    every, tasks = options.update_every, method.tasks
    fresh = from_rule(method.name, tasks, rule._replace(finish=None), axis_name=options.axis_name)

    def value_and_grad(
        params: Any,
        state: BalanceState,
        *args: Any,
        active: Any = None,
        extra_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        check_differentiable("balanced_value_and_grad", params)
        check_state(method.name, state, tasks)
        losses, pullback, result = vjp_of_losses(
            lambda params: split_result(loss_fn(params, *args, **kwargs), has_aux), params
        )
        given = result[0] if has_aux else result
        task_vector("balanced_value_and_grad", "the losses of loss_fn", given, tasks)
        chosen = _mask(params, evidence)
        others = [not c for c in chosen]
        present = read_active("balanced_value_and_grad", active, tasks)
        keep = present & jnp.isfinite(losses)

        def weighted_sum(
            weights: jax.Array, keep: jax.Array, wanted: list[bool]
        ) -> tuple[list[Any], jax.Array]:
            """The wanted leaves of `sum_t weights[t] * g_t`, and which tasks went into it."""
            cotangents = jnp.where(keep, weights[0].astype(losses.dtype), 0)
            once = _leaves(pullback.whole(cotangents)[0], wanted)

            def task_by_task() -> tuple[list[Any], jax.Array]:
                each = lambda grads: _leaves(grads[0], wanted)  # noqa: E731
                grads = pull_each(pullback, losses, mode, each)
                finite = keep & task_tree.finite(grads, tasks.number, options.axis_name)
                blocks = task_tree.assign_blocks(once, "all")
                return task_tree.combine(grads, weights, finite, blocks), finite

            as_one_task = jax.tree.map(lambda leaf: leaf[None], once)
            fits = task_tree.finite(as_one_task, 1, options.axis_name)[0]
            return lax.cond(fits, lambda: (once, keep), task_by_task)

        def apart(state: BalanceState) -> tuple[Any, BalanceState]:
            grads = pull_each(pullback, losses, mode, lambda grads: _leaves(grads[0], chosen))
            update, new = fresh.update(
                grads, state, losses=losses, active=present, **(extra_args or {})
            )
            if all(chosen):
                return replace_leaves(params, chosen, update), new
            rest, kept = weighted_sum(new.weights, new.weighed, others)
            new = new._replace(skipped=next_count(new.skipped, new.weighed & ~kept))
            update = replace_leaves(params, chosen, update)
            return replace_leaves(update, others, rest), new

        def with_old_weights(state: BalanceState) -> tuple[Any, BalanceState]:
            update, kept = weighted_sum(state.weights, keep, [True] * len(chosen))
            return jax.tree.structure(params).unflatten(update), state._replace(
                balance_count=next_count(state.balance_count),
                skipped=next_count(state.skipped, present & ~kept),
            )

        if every == 1:
            update, state = apart(state)
        else:
            due = is_due(state, keep, every)
            update, state = lax.cond(due, apart, with_old_weights, state)
        if rule.finish is not None:
            update = rule.finish(update, options, state.weights.dtype)
        return result, (update, state)

    return value_and_grad


def _rule_and_options(method: Any) -> tuple[WeightRule, Any]:
    rule = method.rule if isinstance(method, Method) else None
    if not isinstance(rule, WeightRule) or rule.average is not None:
        raise TypeError(
            "balanced_value_and_grad: expected a weighting method of mtl_optax (one whose update is a "
            f"weighted sum of this step's task gradients), found {getattr(method, 'name', method)!r}."
        )
    options = method.options
    if options.blocks != "all" or not options.reduce:
        raise ValueError(
            "balanced_value_and_grad: one weight a task is needed for a single backward pass; make the "
            f'method with blocks="all" and reduce=True, found {options.blocks!r} and '
            f"{options.reduce}."
        )
    return rule, options


def _mask(params: Any, evidence: Any) -> list[bool]:
    """For every leaf whether the method looks at its gradient."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if evidence is None:
        return [True] * len(leaves)
    if callable(evidence):
        mask = [bool(evidence(path, leaf)) for path, leaf in leaves]
    else:
        spread = lambda flag, part: jax.tree.map(lambda _: bool(flag), part)  # noqa: E731
        mask = jax.tree.leaves(jax.tree.map(spread, evidence, params))
    if not any(mask):
        raise ValueError(
            f"balanced_value_and_grad: evidence chooses none of the {len(leaves)} leaves of params."
        )
    return mask


def _leaves(tree: Any, wanted: list[bool]) -> list[Any]:
    return [leaf for leaf, here in zip(jax.tree.leaves(tree), wanted, strict=True) if here]
