"""Methods on a part of the parameters, or on some of the steps: fewer backward passes than T."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Concatenate, Literal, NamedTuple, TypeAlias, TypeVar, cast, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mtl_optax.core import task_tree
from mtl_optax.core.method import Method
from mtl_optax.core.pipeline import Pipeline
from mtl_optax.core.rule import StepInputs, WeightRule
from mtl_optax.core.state import BalanceState, check_fields
from mtl_optax.core.types import Active
from mtl_optax.core.validation import check_choice
from mtl_optax.placement import per_example
from mtl_optax.placement.factors import ExampleGradients
from mtl_optax.placement.loss_vector import check_differentiable, check_tasks, split_result
from mtl_optax.placement.products import TaskGradients
from mtl_optax.placement.pull_back import (
    Mode,
    chosen_leaves,
    floating_leaves,
    replace_leaves,
    vjp_of_losses,
)

Params = TypeVar("Params")
Result = TypeVar("Result")
# The leaves of an update, the new state, and which tasks went into the update.
Found: TypeAlias = tuple[list[jax.Array], BalanceState, jax.Array]
WeightMode: TypeAlias = Mode | Literal["products", "examples"]

# "auto" holds no gradients if T of them would take at least this many bytes.
_LARGE = 2**30


def weighted_value_and_grad(
    loss_fn: Callable[Concatenate[Params, ...], Result],
    method: Method,
    has_aux: bool = False,
    *,
    weights_from: Callable[[tuple[object, ...], jax.Array], bool] | optax.Params | None = None,
    mode: WeightMode = "auto",
) -> Callable[..., tuple[Result, tuple[Params, BalanceState]]]:
    """Computes the update of a weighting method on the parameters, with fewer passes or less memory.

    There are three ways to save backward passes. With `weights_from`, the method reads the gradients of
    the chosen leaves only (for example, of a few dense layers and not of the embedding tables); the other
    leaves take one backward pass of `sum_t weights[t] * losses[t]`. With a method made with
    `update_every=k`, the T backward passes happen on every k-th step only; on the steps between, one
    backward pass with the stored weights differentiates everything. With `freeze_after=n`, all steps
    after the first n are of this kind.

    With `mode="products"`, memory holds no gradient of a task, however many tasks there are. With the
    Jacobian J of the losses, `g_t = J^T e_t` is a backward pass, and its inner products with all gradients
    are `J g_t`, a forward pass, which uses each layer's part of `g_t` as soon as it is computed. One
    backward pass of the weighted sum follows.

    With `mode="examples"`, each example of a batch is a task. One backward pass gives the inputs of every
    layer and the cotangents of its outputs, of which the gradients of the examples are products; norms,
    inner products and the weighted sum are computed from these factors, without the gradients themselves.
    Only an example that is not finite is left out (docs/recipes/examples_as_tasks.md).

    One backward pass of a weighted sum cannot leave a task out: if the derivative of one loss is not
    finite, neither is the sum. Such a step takes up to 2 T more passes and sums the gradients that are
    finite: a non-finite task is left out and counted as skipped, an absent one is left out, and the others
    are used. Guard the divisions in the loss of a task that is often absent. An array `[T]`, more than 64
    tasks, "vmap" and "map" cannot keep tasks apart (see `per_task_value_and_grad`): there the update of
    such a step is 0, and all tasks are counted.

    One backward pass does not give the norms per task either, so stored weights cannot be limited by them.
    If gradients are zero in most steps, or their norms jump, leave `update_every` at 1
    (docs/recipes/update_every.md).

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` returns a dictionary or tuple of scalars, or an array
        `[T]`; `(losses, aux)` with `has_aux`.
      method: a weighting method with one block (`blocks="all"`) that reduces the task axis.
      has_aux: whether `loss_fn` returns auxiliary data as well.
      weights_from: the leaves whose gradients the method looks at: a callable `(path, leaf) -> bool`, or a
        tree of booleans that is a prefix of `params`. None is all of them.
      mode: how the weights are found.

        "unroll", "vmap" and "map" hold T gradients of the chosen leaves, and execute the backward passes as
        in `per_task_value_and_grad`.

        "products" holds none. It takes T + 1 backward passes and, for methods that need the Gram matrix,
        T - 1 forward passes of tangents (docs/recipes/large_models.md).

        "auto" is "products" if T gradients of the chosen leaves are 1 GiB or more, no array is float16, and
        JAX can transpose the backward pass; else it holds the gradients.

        "examples" takes about one backward pass. Every array in `args` and `kwargs` has T examples along
        its first axis, and so do auxiliary data. `loss_fn`, which returns `[B]` for B examples, is called
        on batches of one under `vmap`. Call it in `jax.jit` (docs/recipes/examples_as_tasks.md).

    Returns:
      A function `fn(params, state, *args, active=None, extra_args=None, **kwargs)` that returns `(losses,
      (update, state))`, or `((losses, aux), (update, state))` with `has_aux`. `update` has the structure of
      `params` and goes to an optimizer; `state` starts from `method.init(params)`; `active` is as in
      `method.update`, and `extra_args` is a dictionary of its further arguments (`traces` of `ntk`,
      `order`, `noise`, `losses_after`). `args` and `kwargs` go to `loss_fn`. Cost: T backward passes
      through the chosen leaves plus one, or only one on the steps that reuse weights.

    Raises:
      TypeError: for a method that is no weighted sum; with `mode="products"`, if a `custom_vjp` of the
        model has a backward pass that JAX cannot transpose.
      ValueError: for several blocks, `reduce=False`, `weights_from` that chooses no leaf, or an unknown
        mode; with "examples", for arguments or losses without an axis of T examples, or a
        `shard_map` inside `loss_fn`.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> def loss_fn(params, x):
      ...     h = params["table"][0] * (x @ params["dense"])
      ...     return (h ** 2).mean(), h.mean()
      >>> params, x = {"dense": jnp.ones(2), "table": jnp.ones(5)}, jnp.ones((3, 2))
      >>> method = mtl.mgda(2, update_every=10)
      >>> dense = lambda path, leaf: "dense" in str(path)
      >>> fn = mtl.weighted_value_and_grad(loss_fn, method, weights_from=dense)
      >>> losses, (update, state) = fn(params, method.init(params), x)
      >>> state.weights.tolist(), update["dense"].tolist(), update["table"].tolist()
      ([[0.0, 1.0]], [1.0, 1.0], [2.0, 0.0, 0.0, 0.0, 0.0])

    References:
      Navon et al., Multi-Task Learning as a Bargaining Game, 2022, section 4.4 (weights kept for
      several steps), https://arxiv.org/abs/2202.01017
    """
    check_choice("weighted_value_and_grad", "mode", mode, (*get_args(Mode), "products", "examples"))
    _check_method(method)
    pipeline = method.definition

    def value_and_grad(
        params: Params,
        state: BalanceState,
        *args: object,
        active: Active | None = None,
        extra_args: Mapping[str, object] | None = None,
        **kwargs: object,
    ) -> tuple[Result, tuple[Params, BalanceState]]:
        check_differentiable("weighted_value_and_grad", params, integers=True)
        floating = floating_leaves(params)
        floats = [jnp.asarray(leaf) for leaf in chosen_leaves(params, floating)]

        def of_floats(floats: list[jax.Array], *args: object, **kwargs: object) -> Result:
            return loss_fn(replace_leaves(params, floating, floats), *args, **kwargs)

        losses, result, gradients = _differentiate(
            of_floats, method, has_aux, mode, floats, args, kwargs
        )
        check_tasks("weighted_value_and_grad", result, has_aux, method.tasks)
        inputs = pipeline.read(state, losses, active, extra_args=extra_args)
        inputs = inputs.restrict(jnp.isfinite(losses))
        check_fields(method.name, method.rule, state, ())

        chosen = _chosen(params, floating, weights_from)
        step = _Step(pipeline, inputs, gradients, chosen)
        if _holds_no_gradients(mode, step, floats):
            fresh = partial(_weigh_products, step)
        else:
            fresh = partial(_weigh_gradients, step, cast(Mode, mode))
        kept = partial(_keep_weights, step)
        if method.options.always_due:
            leaves, state, summed = fresh(state)
        else:
            leaves, state, summed = lax.cond(pipeline.due(state, inputs.active), fresh, kept, state)
        update = replace_leaves(jax.tree.map(jnp.zeros_like, params), floating, leaves)
        return result, (update, pipeline.finish(state, inputs, summed))

    return value_and_grad


class _Step(NamedTuple):
    """What is known of a step before its weights.

    Attributes:
      pipeline: the stages of the method.
      inputs: the record that the rule reads, still without norms.
      gradients: those of the losses, which are computed when they are asked for.
      chosen: for every leaf, whether the method looks at its gradient.
    """

    pipeline: Pipeline
    inputs: StepInputs
    gradients: TaskGradients | ExampleGradients
    chosen: list[bool]


def _weigh_products(step: _Step, state: BalanceState) -> Found:
    """Computes new weights from norms or inner products, and one backward pass with these weights."""
    pipeline, inputs, gradients, chosen = step
    if "gram" in pipeline.rule.needs:
        products = gradients.gram_matrix(chosen, inputs.dtype)
    else:
        products = gradients.squared_norms(chosen)
    measured = pipeline.measured(inputs, products[None])
    state = pipeline.weigh(state, inputs, measured)
    weights, everything = pipeline.applied_weights(state)[0], [True] * len(chosen)
    update, summed = gradients.weighted_sum(
        weights, measured.active, everything, finite=all(chosen)
    )
    return update, state, summed


def _weigh_gradients(step: _Step, mode: Mode, state: BalanceState) -> Found:
    """Computes new weights and their sum from T gradients, and the other leaves by one backward pass."""
    pipeline, inputs, gradients, chosen = step
    assert isinstance(gradients, TaskGradients)
    grads = gradients.stack(chosen, mode)
    blocks = task_tree.assign_blocks(grads, "all")
    measured = pipeline.measure(grads, blocks, inputs, cosines="gram" in pipeline.rule.needs)
    state = pipeline.weigh(state, inputs, measured)
    update = task_tree.combine(grads, pipeline.applied_weights(state), measured.active, blocks)
    if all(chosen):
        return update, state, measured.active
    others = [not here for here in chosen]
    rest, summed = gradients.weighted_sum(state.weights[0], measured.active, others)
    parts = {True: iter(update), False: iter(rest)}
    return [next(parts[here]) for here in chosen], state, summed


def _keep_weights(step: _Step, state: BalanceState) -> Found:
    """Takes one backward pass with the stored weights."""
    _, inputs, gradients, chosen = step
    update, summed = gradients.weighted_sum(state.weights[0], inputs.active, [True] * len(chosen))
    return update, state, summed


def _holds_no_gradients(mode: WeightMode, step: _Step, leaves: list[jax.Array]) -> bool:
    """Whether the weights come from products of gradients that are not held; decides "auto"."""
    gradients, chosen = step.gradients, step.chosen
    if mode != "auto" or isinstance(gradients, ExampleGradients):
        return mode in ("products", "examples")
    read = chosen_leaves(leaves, chosen)
    size = gradients.losses.shape[0] * sum(x.size * x.dtype.itemsize for x in read)
    is_half = any(x.dtype == jnp.float16 for x in (gradients.losses, *read))
    if size < _LARGE or is_half:
        return False
    return "gram" not in step.pipeline.rule.needs or gradients.can_multiply(chosen)


def _differentiate(
    loss_fn: Callable[..., Result],
    method: Method,
    has_aux: bool,
    mode: WeightMode,
    params: list[jax.Array],
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> tuple[jax.Array, Result, TaskGradients | ExampleGradients]:
    """Returns the losses `[T]`, the result of `loss_fn`, and the gradients."""
    axis_name = method.options.axis_name
    if mode == "examples":
        batch = per_example.check_examples(method.num_tasks, args, kwargs)
        loss = per_example.loss_of_example(loss_fn, has_aux)
        losses, aux, factors = per_example.gradients_in_factors(loss, params, batch)
        result = cast(Result, (losses, aux) if has_aux else losses)
        return losses, result, ExampleGradients(factors, axis_name)
    losses, pullback, result = vjp_of_losses(
        lambda params: split_result(loss_fn(params, *args, **kwargs), has_aux), params
    )
    if mode in ("vmap", "map"):
        pullback = pullback._replace(apart=False)
    return losses, result, TaskGradients(pullback, losses, axis_name)


def _check_method(method: object) -> None:
    rule = method.rule if isinstance(method, Method) else None
    if (
        not isinstance(method, Method)
        or not isinstance(rule, WeightRule)
        or rule.average is not None
    ):
        raise TypeError(
            "weighted_value_and_grad: expected a weighting method of mtl_optax (one whose update is a "
            f"weighted sum of this step's task gradients), found {getattr(method, 'name', method)!r}."
        )
    options = method.options
    if options.blocks != "all" or not options.reduce:
        raise ValueError(
            "weighted_value_and_grad: one weight per task is needed for a single backward pass; make the "
            f'method with blocks="all" and reduce=True, found {options.blocks!r} and '
            f"{options.reduce}."
        )


def _chosen(params: object, floating: Sequence[bool], weights_from: object) -> list[bool]:
    """Returns for every floating leaf whether the method looks at its gradient."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if weights_from is None:
        return [True] * sum(floating)
    if callable(weights_from):
        mask = [bool(weights_from(path, leaf)) for path, leaf in leaves]
    else:
        spread = lambda flag, part: jax.tree.map(lambda _: bool(flag), part)  # noqa: E731
        mask = jax.tree.leaves(jax.tree.map(spread, weights_from, params))
    mask = [here for here, is_float in zip(mask, floating, strict=True) if is_float]
    if not any(mask):
        raise ValueError(
            f"weighted_value_and_grad: weights_from chooses none of the {len(mask)} leaves of params that "
            "have gradients."
        )
    return mask
