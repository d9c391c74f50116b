"""`advise`: what is measured, and what follows from it."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl
from mtl_optax.advice import CONFLICT_COSINE, HELPFUL_COSINE, LARGEST_RATIO

TASKS = ("buy", "cart", "view")


def gradients(norms: Any, cosines: tuple[float, float]) -> jax.Array:
    """Gradients `[3, 3]`; the cosines are those of cart and view with buy, in planes of their own."""
    rows = [[1.0, 0.0, 0.0]]
    for axis, cosine in enumerate(cosines, 1):
        row = [cosine, 0.0, 0.0]
        row[axis] = (1 - cosine**2) ** 0.5
        rows.append(row)
    return jnp.asarray(norms, jnp.float32)[:, None] * jnp.asarray(rows)


def measured(grads: Any, *, tasks: Any = TASKS, steps: int = 2, **options: Any) -> Any:
    tx, update = optimizer(tasks, **options)
    params = jax.tree.map(lambda leaf: leaf[0], grads)
    state = tx.init(params)
    for _ in range(steps):
        _, state = update(grads, state, params)
    return state


@cache
def optimizer(tasks: Any, **options: Any) -> Any:
    tx = optax.chain(mtl.sum_tasks(tasks, measure=True, **options), optax.adam(1e-3))
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize(
    ("norms", "cosines", "target", "action"),
    [
        ((1, 1, 1), (0, 0), None, "sum"),
        ((1, 0.9 * LARGEST_RATIO, 1), (0, 0), None, "sum"),
        ((1, 1.1 * LARGEST_RATIO, 1), (0, 0), None, "balance"),
        ((1, 1, 1 / 11), (0, 0), None, "balance"),
        ((1, 2, 1), (CONFLICT_COSINE - 0.1, 0), None, "compromise"),
        # One task counts. What dominates it helps it, or does not.
        ((1, 20, 30), (0.5, 0.5), "buy", "sum"),
        ((1, 20, 30), (0.5, HELPFUL_COSINE / 2), "buy", "balance"),
        ((1, 2, 30), (0, 0), "buy", "balance"),
        # What has no effect would help it, or would not.
        ((1, 0.01, 1), (0.5, 0), "buy", "balance"),
        ((1, 0.01, 1), (-0.5, 0), "buy", "sum"),
        ((1, 5, 0.2), (0.5, 0), "buy", "sum"),
        ((1, 1, 1), (0, CONFLICT_COSINE - 0.1), "buy", "compromise"),
        # 11 between the largest and the smallest, but not with the target.
        ((1, 4, 4 / 11), (0, 0), "buy", "sum"),
    ],
)
def test_what_follows_from_norms_and_cosines(norms, cosines, target, action):
    advice = mtl.advise(measured(gradients(norms, cosines)), mtl.sum_tasks(TASKS), target=target)
    assert advice.action == action
    reference = norms[0] if target else min(norms)
    expected = dict(zip(TASKS, np.array(norms) / reference, strict=True))
    assert advice.norm_ratios == pytest.approx(expected, rel=1e-5)
    assert advice.dominant == TASKS[int(np.argmax(norms))]
    between = cosines[0] * cosines[1]
    assert advice.smallest_cosine == pytest.approx(min(*cosines, between), abs=1e-6)
    lines = str(advice).splitlines()
    assert lines[0].startswith("Ratios of gradient norms: buy ")
    assert " ".join(lines[1:]) == advice.text


def test_it_names_who_dominates_and_what_to_compare():
    state = measured(gradients((1, 20, 2), (0, 0)))
    text = mtl.advise(state, mtl.sum_tasks(TASKS), target="buy").text
    assert text.startswith("The gradients of cart dominate buy") and "target='buy'" in text
    assert mtl.advise(state, target=0).text.startswith("The gradients of 1 dominate 0")


def test_leaves_of_one_task_are_left_out():
    """The heads make the whole gradients alike; the shared layer is 50 times apart."""
    grads = {
        "shared": jnp.array([[1.0, 0.0], [0.0, 50.0]]),
        "heads": {"a": jnp.array([[900.0], [0.0]]), "b": jnp.array([[0.0], [900.0]])},
    }
    assert mtl.advise(measured(grads, tasks=2)).norm_ratios == pytest.approx({0: 1, 1: 50})
    whole = mtl.advise(measured(grads, tasks=2, blocks="all"))
    assert whole.norm_ratios[1] == pytest.approx(1, rel=0.01)


def test_a_task_without_gradient_is_left_out():
    advice = mtl.advise(measured(gradients((1, 0, 30), (0, 0))), mtl.sum_tasks(TASKS))
    assert set(advice.norm_ratios) == {"buy", "view"}


def test_several_tensors_count_together():
    """Norms of 5 and 10 over two leaves, and the cosine of the whole."""
    grads = {"a": jnp.array([[3.0], [6.0]]), "b": jnp.array([[4.0], [-8.0]])}
    advice = mtl.advise(measured(grads, tasks=2))
    assert advice.norm_ratios == pytest.approx({0: 1, 1: 2})
    assert advice.smallest_cosine == pytest.approx((18 - 32) / 50)


@pytest.mark.parametrize("method", [mtl.mgda, partial(mtl.sum_tasks, measure=True)])
def test_the_seeds_of_a_vmap_count_together(method):
    tx, params = method(2), jnp.zeros(2)
    several = jnp.stack([jnp.diag(jnp.array(norms)) for norms in ((3.0, 6.0), (4.0, 8.0))])
    state = jax.vmap(lambda grads: tx.update(grads, tx.init(params), params)[1])(several)
    assert mtl.advise(state).norm_ratios == pytest.approx({0: 1, 1: 2})


@pytest.mark.parametrize("method", [mtl.mgda, mtl.inverse_norm])
def test_states_and_diagnostics_of_other_methods_are_read(method):
    tx, grads = method(TASKS), gradients((1, 20, 2), (0, 0))
    _, state = tx.update(grads, tx.init(grads[0]))
    found = [
        mtl.advise(state, tx, target="buy"),
        mtl.advise(mtl.diagnostics(state, tx), target="buy"),
        mtl.advise(mtl.diagnostics(state), tx, target="buy"),
    ]
    assert found[0].action == "balance"
    for other in found[1:]:
        assert str(other) == str(found[0])
    assert (found[0].smallest_cosine is None) == (method is mtl.inverse_norm)


def test_it_refuses_what_it_cannot_read():
    method = mtl.sum_tasks(TASKS, measure=True)
    state = measured(gradients((1, 2, 3), (0, 0)))
    for nothing in (method.init(jnp.zeros(3)), mtl.sum_tasks(3).init(jnp.zeros(3)), {}, None):
        with pytest.raises(ValueError, match="norms of at least two tasks"):
            mtl.advise(nothing)
    with pytest.raises(ValueError, match="target must be one of"):
        mtl.advise(state, method, target="click")
    with pytest.raises(ValueError, match="target must be one of"):
        mtl.advise(state, target="buy")
    with pytest.raises(ValueError, match="not the 3 tasks"):
        mtl.advise(state, mtl.mgda(2))


@pytest.mark.parametrize("names", [None, TASKS])
def test_diagnostics_of_several_steps_or_blocks_are_refused(names):
    # A method that needs cosines and compiles quickly.
    method = mtl.krum(3 if names is None else names, blocks="leaf")
    params = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    _, state = method.update({"a": jnp.eye(3), "b": jnp.eye(3)}, method.init(params), params)
    one = mtl.krum(3 if names is None else names)
    _, whole = one.update(jnp.eye(3), one.init(jnp.zeros(3)))
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), mtl.diagnostics(whole, one))
    by_block = mtl.diagnostics(state, method, params)
    for found in (by_block, mtl.diagnostics(state), mtl.diagnostics(state, method), twice):
        with pytest.raises(ValueError, match="one step and one block"):
            mtl.advise(found, method)
    mtl.advise(mtl.diagnostics(whole, one), method)
    mtl.advise(state, method)
