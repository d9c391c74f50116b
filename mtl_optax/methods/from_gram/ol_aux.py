"""OL-AUX: auxiliary weights that grow while the auxiliary's gradient helps the target's."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_optax import task_tree
from mtl_optax.arguments import check_integer, check_num_tasks, check_task_index
from mtl_optax.from_gradients import TaskGradients, from_gradients
from mtl_optax.from_rule import Evidence, Rule, from_rule, next_count
from mtl_optax.method import Method

# Weights stay below this in size, so that products with legal gradients stay finite.
_LARGEST_WEIGHT = 2.0**60


class OLAuxState(NamedTuple):
    """What OL-AUX remembers.

    Attributes:
      task_weights: `[T]`; start at 1, and the target's stays there.
      products: `[T]`, inner products with the target's gradient summed since the last change.
    """

    task_weights: jax.Array
    products: jax.Array


class FilteredOLAuxState(NamedTuple):
    """`OLAuxState`, and the last gradients of every task.

    Attributes:
      rule: the weights and the products.
      window: leaves `[F, T, *shape]`, the gradients of the last F steps, a ring.
      filled: int32 `[T]`, in how many steps each task was present.
    """

    rule: OLAuxState
    window: Any
    filled: jax.Array


def ol_aux(
    num_tasks: int,
    *,
    target: int = 0,
    weight_lr: Any = 0.005,
    update_every: int = 5,
    filter_window: int = 1,
    nonnegative: bool = True,
    blocks: Any = "all",
    reduce: bool = True,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Learns the weights of auxiliary tasks by how much they help the target task.

    An auxiliary helps when a step along its gradient lowers the target's loss; to first order that is
    the inner product of the two gradients. Every N = ``update_every`` steps,

    .. math::
        w_t \leftarrow \max\Big(0,\; w_t + \eta \sum_{\text{last N steps}} \langle g_{target}, g_t \rangle
        \Big), \qquad update = \sum_t w_t g_t,

    with :math:`w_{target} = 1`, all weights 1 at the start, and ``weight_lr`` :math:`\eta`. Sum-like.
    Algorithm 1 of the paper: gradient descent on the target's loss N steps ahead. As in the authors'
    program, :math:`\eta` holds both the learning rate of the weights and that of the model (5 times
    0.001), new weights first act in the next step, weights may be kept at 0 or above, and both gradients
    may be averaged over the last F = ``filter_window`` steps before the product (there F = 4; 1, the
    paper, costs no memory). That program takes the gradient of the total loss for the target's; the
    paper and this function take the target's own.

    Degenerate input: a zero gradient changes no weight. An absent task keeps its weight and what it has
    gathered; while the target is absent nothing is gathered. T = 1: the gradient itself. Weights stay
    within 2**60, so that large gradients cannot push them out of the range of numbers.

    Args:
      num_tasks: T, static.
      target: index of the target task.
      weight_lr: eta; its unit is one over a squared gradient norm.
      update_every: N, static: steps between changes of the weights.
      filter_window: F, static: gradients are averaged over the last F steps for the products.
      nonnegative: True keeps weights at 0 or above.
      blocks: as in `WeightingOptions`; only "all" where `filter_window` > 1.
      reduce: as there.
      axis_name: as there.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. State: `OLAuxState`, or
      `FilteredOLAuxState`. Cost: one pass over the gradients for the Gram matrix, one for the sum; with a
      filter also F gradients of every task in memory.

    Raises:
      ValueError: for a target outside 0..T-1, counts below 1, or blocks together with a filter.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.ol_aux(3, weight_lr=0.1, update_every=1)
      >>> grads = jnp.array([[1., 0.], [2., 1.], [-3., 0.]])
      >>> update, state = tx.update(grads, tx.init(jnp.zeros(2)))
      >>> np.array(state.rule_state.task_weights, float).round(3).tolist()
      [1.0, 1.2, 0.7]

    References:
      Lin, Baweja, Kantor and Held, Adaptive Auxiliary Task Weighting for Reinforcement Learning, 2019.
    """
    num_tasks = check_num_tasks("ol_aux", num_tasks)
    target = check_task_index("ol_aux", "target", target, num_tasks)
    check_integer("ol_aux", "update_every", update_every, 1)
    check_integer("ol_aux", "filter_window", filter_window, 1)

    def init(dtype: Any) -> OLAuxState:
        return OLAuxState(jnp.ones((num_tasks,), dtype), jnp.zeros((num_tasks,), dtype))

    def weigh(evidence: Evidence, state: OLAuxState) -> tuple[jax.Array, OLAuxState]:
        weights, dtype = state.task_weights, state.task_weights.dtype
        largest = jnp.asarray(jnp.finfo(dtype).max, dtype)
        gathered = jnp.clip(state.products + evidence.gram[target], -largest, largest)
        due = evidence.active & ((evidence.step + 1) % update_every == 0)
        due = due & (jnp.arange(num_tasks) != target)
        lowest = 0.0 if nonnegative else -_LARGEST_WEIGHT
        moved = weights + jnp.asarray(weight_lr, dtype) * gathered
        moved = jnp.clip(moved, lowest, _LARGEST_WEIGHT)
        new = OLAuxState(jnp.where(due, moved, weights), jnp.where(due, 0, gathered))
        return weights, new

    if filter_window == 1:
        rule = Rule("ol_aux", num_tasks, frozenset({"gram"}), init, weigh)
        return from_rule(rule, blocks=blocks, reduce=reduce, axis_name=axis_name)
    if blocks != "all":
        raise ValueError(f'ol_aux: a filter_window above 1 needs blocks="all"; found {blocks!r}.')

    def init_filtered(params: Any, dtype: Any) -> FilteredOLAuxState:
        zeros = task_tree.per_task_zeros(params, num_tasks, dtype)
        window = optax.tree.batch_shape(zeros, (filter_window,))
        return FilteredOLAuxState(init(dtype), window, jnp.zeros((num_tasks,), jnp.int32))

    def apply(
        view: TaskGradients, state: FilteredOLAuxState
    ) -> tuple[Any, jax.Array, FilteredOLAuxState]:
        window, filled = _remember(view, state)
        times = jnp.clip(filled, 1, filter_window).astype(view.dtype)
        means = jax.tree.map(
            lambda ring: jnp.sum(ring, axis=0) / task_tree.along_tasks(times, ring.ndim - 1), window
        )
        grouping = task_tree.assign_blocks(means, "all")
        cosine, norms, _ = task_tree.gram(
            means, grouping, num_tasks, view.dtype, view.active, axis_name
        )
        evidence = Evidence(view.active, view.step, norms=norms[0], cosine=cosine[0])
        weights, rule_state = weigh(evidence, state.rule)
        told = (view.updates, weights[None], view.active)
        if reduce:
            update = task_tree.combine(*told, grouping)
        else:
            update = task_tree.scale(*told, view.broken, grouping)
        return update, weights, FilteredOLAuxState(rule_state, window, filled)

    needs = frozenset({"gradients"})
    return from_gradients(
        "ol_aux", num_tasks, init_filtered, apply, needs=needs, axis_name=axis_name
    )


def _remember(view: TaskGradients, state: FilteredOLAuxState) -> tuple[Any, jax.Array]:
    """The rings with this step's gradients in the place of the oldest; each task turns its own."""

    def one(ring: jax.Array, leaf: jax.Array) -> jax.Array:
        slots = jnp.arange(ring.shape[0], dtype=jnp.int32)
        mine = (slots[:, None] == (state.filled % ring.shape[0])[None, :]) & view.active[None, :]
        mine = mine.reshape(mine.shape + (1,) * (leaf.ndim - 1))
        return jnp.where(mine, leaf.astype(ring.dtype)[None], ring)

    window = jax.tree.map(one, state.window, view.updates)
    return window, next_count(state.filled, view.active)


METHOD = Method(
    name="ol_aux",
    factory=ol_aux,
    needs=("gram",),
    family="from_gram",
    scale="sum",
    reference="Lin et al., Adaptive Auxiliary Task Weighting for Reinforcement Learning, 2019",
    make=ol_aux,
    properties=frozenset({"split"}),
)
