"""Methods on a part of the parameters, or on some of the steps: fewer backward passes than T."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, Literal, TypeAlias, TypeVar, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mtl_optax.core import task_tree
from mtl_optax.core.method import Method
from mtl_optax.core.rule import WeightRule
from mtl_optax.core.state import BalanceState, check_fields
from mtl_optax.core.types import Active
from mtl_optax.core.validation import check_choice
from mtl_optax.placement import per_example
from mtl_optax.placement.factors import ExampleGradients
from mtl_optax.placement.loss_vector import check_differentiable, check_tasks, split_result
from mtl_optax.placement.products import NotTransposable, TaskGradients
from mtl_optax.placement.pull_back import (
    Mode,
    Pullback,
    chosen_leaves,
    pull_each,
    replace_leaves,
    vjp_of_losses,
)

Params = TypeVar("Params")
Result = TypeVar("Result")
# The leaves of an update, the new state, and which tasks went into the update.
Step: TypeAlias = tuple[list[jax.Array], BalanceState, jax.Array]

# "auto" holds no gradients if T of them would take at least this many bytes.
_LARGE = 2**30


def weighted_value_and_grad(
    loss_fn: Callable[Concatenate[Params, ...], Result],
    method: Method,
    has_aux: bool = False,
    *,
    weights_from: Callable[[tuple[Any, ...], Any], bool] | optax.Params | None = None,
    mode: Mode | Literal["products", "examples"] = "auto",
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
      mode: "unroll", "vmap" and "map", as in `per_task_value_and_grad`, hold T gradients of the chosen
        leaves and take T backward passes. "products" holds none, for T + 1 backward passes, and for methods
        that need the Gram matrix T - 1 forward passes of tangents. On a CPU (a dense network of 25 MB,
        `upgrad`, T = 2, 8) a step took 1.4 and 1.5 times as long as with "map", and 16 MB instead of 57 and
        208 MB of temporary memory beyond the plain step's, whatever the number of tasks; methods on norms
        took 1.1 times as long.

        "auto" is "products" if T gradients of the chosen leaves are 1 GiB or more, no array is float16, and
        JAX can transpose the backward pass; else it holds the gradients as `per_task_value_and_grad` does.
        The size is that of the arrays as this function sees them, before a mesh divides them: pass a mode
        if you know what fits.

        With "products", norms are summed in float32 at least. The inner products of two tasks come from a
        forward pass in the model's own arithmetic: in a bfloat16 transformer, cosines differed by 0.0005
        from those of the stacked gradients, which differ by 0.0004 from float32. Float32 products of the
        gradients would need two of them in memory. The range of float16 is too small. With `weights_from`,
        a task that is not finite outside the chosen leaves is left out of all leaves.

        With "examples", every array in `args` and `kwargs` has T examples along its first axis, and so do
        auxiliary data. `loss_fn`, which returns `[B]` for B examples, is called on batches of one under
        `vmap`: batch normalisation in training mode would see one example. A step took 1.0 to 1.5 times as
        long as a plain one, besides the method's solver (four dense layers of 512, T = 64 and 256).
        Gradients that are no products (of biases, scales, convolutions) are stored. Call it in `jax.jit`.

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
        check_differentiable("weighted_value_and_grad", params)
        losses, result, gradients, pullback = _differentiate(
            loss_fn, method, has_aux, mode, params, args, kwargs
        )
        check_tasks("weighted_value_and_grad", result, has_aux, method.tasks)
        inputs = pipeline.read(state, losses, active, extra_args=extra_args)
        inputs = inputs.restrict(jnp.isfinite(losses))
        check_fields(method.name, method.rule, state, ())
        chosen = _mask(params, weights_from)
        everything, others = [True] * len(chosen), [not here for here in chosen]

        def by_products(state: BalanceState) -> Step:
            """Computes new weights from norms or products of gradients that are not held."""
            if "gram" in method.needs:
                found = gradients.gram_matrix(chosen, inputs.dtype)
            else:
                found = gradients.squared_norms(chosen)
            measured = pipeline.measured(inputs, found[None])
            state = pipeline.weigh(state, inputs, measured)
            weights = pipeline.applied_weights(state)[0]
            update, went_in = gradients.weighted_sum(
                weights, measured.active, everything, finite=all(chosen)
            )
            return update, state, went_in

        def by_gradients(state: BalanceState) -> Step:
            """Computes new weights, and the weighted sum of the gradients from which they follow."""
            assert pullback is not None and mode != "products" and mode != "examples"
            grads = pull_each(pullback, losses, mode, lambda grads: chosen_leaves(grads[0], chosen))
            blocks = task_tree.assign_blocks(grads, "all")
            measured = pipeline.measure(grads, blocks, inputs, cosines="gram" in method.needs)
            state, went_in = pipeline.weigh(state, inputs, measured), measured.active
            update = task_tree.combine(grads, pipeline.applied_weights(state), went_in, blocks)
            if not all(chosen):
                rest, went_in = gradients.weighted_sum(state.weights[0], went_in, others)
                merged = replace_leaves(replace_leaves(params, chosen, update), others, rest)
                update = jax.tree.leaves(merged)
            return update, state, went_in

        def fresh(state: BalanceState) -> Step:
            if mode in ("products", "examples"):
                return by_products(state)
            if mode != "auto" or not _are_large(params, chosen, losses):
                return by_gradients(state)
            try:
                return by_products(state)
            except NotTransposable:
                return by_gradients(state)

        def kept(state: BalanceState) -> Step:
            update, went_in = gradients.weighted_sum(state.weights[0], inputs.active, everything)
            return update, state, went_in

        if method.options.always_due:
            leaves, state, went_in = fresh(state)
        else:
            due = pipeline.due(state, inputs.active)
            leaves, state, went_in = lax.cond(due, fresh, kept, state)
        update = jax.tree.structure(params).unflatten(leaves)
        return result, (update, pipeline.finish(state, inputs, went_in))

    return value_and_grad


def _differentiate(
    loss_fn: Callable[..., Any],
    method: Method,
    has_aux: bool,
    mode: str,
    params: object,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> tuple[jax.Array, Any, TaskGradients | ExampleGradients, Pullback | None]:
    """Returns the losses `[T]`, the result of `loss_fn`, the gradients that are not held, and a pullback.

    With "examples" there is no pullback.
    """
    axis_name = method.options.axis_name
    if mode == "examples":
        batch = per_example.check_examples(method.num_tasks, args, kwargs)
        loss = per_example.loss_of_example(loss_fn, has_aux)
        losses, aux, factors = per_example.gradients_in_factors(loss, params, batch)
        result = (losses, aux) if has_aux else losses
        return losses, result, ExampleGradients(factors, axis_name), None
    losses, pullback, result = vjp_of_losses(
        lambda params: split_result(loss_fn(params, *args, **kwargs), has_aux), params
    )
    if mode in ("vmap", "map"):
        pullback = pullback._replace(apart=False)
    return losses, result, TaskGradients(pullback, losses, axis_name), pullback


def _are_large(params: object, chosen: Sequence[bool], losses: jax.Array) -> bool:
    """Whether "auto" uses products, because T gradients of the chosen leaves are large."""
    leaves = chosen_leaves(params, chosen)
    size = losses.shape[0] * sum(jnp.size(x) * jnp.result_type(x).itemsize for x in leaves)
    is_half = any(jnp.result_type(x) == jnp.float16 for x in (losses, *leaves))
    return size >= _LARGE and not is_half


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


def _mask(params: object, weights_from: object) -> list[bool]:
    """Returns for every leaf whether the method looks at its gradient."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if weights_from is None:
        return [True] * len(leaves)
    if callable(weights_from):
        mask = [bool(weights_from(path, leaf)) for path, leaf in leaves]
    else:
        spread = lambda flag, part: jax.tree.map(lambda _: bool(flag), part)  # noqa: E731
        mask = jax.tree.leaves(jax.tree.map(spread, weights_from, params))
    if not any(mask):
        raise ValueError(
            f"weighted_value_and_grad: weights_from chooses none of the {len(leaves)} leaves of params."
        )
    return mask
