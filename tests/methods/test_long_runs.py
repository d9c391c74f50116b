"""Counters and random streams past 2**24 and 2**31 steps, and a hundred thousand steps in one go."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_properties import PROPERTIES, make

import mtl_optax as mtl
from mtl_optax.core.pipeline import next_count
from mtl_optax.placement.fork.carrier import encode_state

T, N = 2, 4
PARAMS = {"w": jnp.zeros(N)}
LIKE = jnp.zeros(N)
# Where float32 stops counting, where int32 does, and where the halves of a carrier carry over.
LIMITS = [2**16 - 2, 2**24 - 2, 2**24 + 1, 2**31 - 4]


@pytest.mark.parametrize("limit", LIMITS)
def test_counter_and_random_stream_through_a_carrier(limit):
    method, step = mtl.rlw(T), carried()
    state = method.init(LIKE)._replace(balance_count=jnp.asarray(limit, jnp.int32))
    carrier, seen = encode_state(state), []
    for k in range(3):
        gradient, carrier = step(jnp.ones(N), carrier)
        now = mtl.fork_state(method, carrier, LIKE)
        assert int(now.balance_count) == limit + k + 1
        # The method outside of the fork draws the same.
        update, state = method.update(GRADS, state)
        np.testing.assert_allclose(gradient, update, 1e-5, 1e-6)
        seen.append(np.asarray(gradient).tobytes())
    assert len(set(seen)) == 3


GRADS = jnp.asarray([[1.0, -2.0, 3.0, -4.0], [-1.5, 2.5, -3.5, 4.5]])


@functools.cache
def carried():
    method = mtl.rlw(T)

    def loss_fn(h, carrier):
        copies, token = mtl.fork(method, carrier, h)
        return mtl.join(jnp.stack([copies[0] @ GRADS[0], copies[1] @ GRADS[1]]), token)

    return jax.jit(jax.grad(loss_fn, argnums=(0, 1)))


def test_past_the_largest_count_it_goes_on():
    largest = np.iinfo(np.int32).max
    counts = [jnp.asarray(largest - 1, jnp.int32)]
    for _ in range(3):
        counts.append(next_count(counts[-1]))
    assert [int(c) for c in counts] == [largest - 1, largest, 2**30, 2**30 + 1]
    assert next_count(jnp.asarray([largest, 5]), jnp.asarray([False, True])).tolist() == [
        largest,
        6,
    ]


def test_a_carrier_past_the_largest_count_does_not_freeze():
    method, step = mtl.rlw(T), carried()
    state = method.init(LIKE)._replace(balance_count=jnp.asarray(2**31 - 1, jnp.int32))
    carrier, seen = encode_state(state), []
    for _ in range(4):
        gradient, carrier = step(jnp.ones(N), carrier)
        seen.append(np.asarray(gradient).tobytes())
    assert len(set(seen)) == 4
    assert int(mtl.fork_state(method, carrier, LIKE).balance_count) == 2**30 + 3


def test_counters_inside_states_go_on_too():
    """MTAdam's bias correction would come back if its counters did."""
    tx = make("scale_by_mtadam", T)
    grads = {"w": GRADS}
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    counts = jnp.full((T,), np.iinfo(np.int32).max, jnp.int32)
    late = state._replace(rule_state=state.rule_state._replace(task_counts=counts), skipped=counts)
    broken = {"w": GRADS.at[1].set(jnp.nan)}
    update, later = tx.update(grads, late, PARAMS)
    assert later.rule_state.task_counts.tolist() == [2**30] * T
    million = late.rule_state._replace(task_counts=jnp.full((T,), 10**6, jnp.int32))
    expected, _ = tx.update(grads, late._replace(rule_state=million), PARAMS)
    np.testing.assert_allclose(update["w"], expected["w"], 1e-5)
    early, _ = tx.update(grads, state, PARAMS)
    assert not np.allclose(update["w"], early["w"], 0.1)
    _, later = tx.update(broken, late, PARAMS)
    assert later.skipped.tolist() == [2**31 - 1, 2**30]


# --- a hundred thousand steps ------------------------------------------------------------------------

STEPS, PART = 100_000, 10_000
# A stream of gradients and losses without any trend.
DRAW = np.random.default_rng(0)
STREAM = DRAW.normal(size=(997, T, N)).astype(np.float32) + np.array([[1.0], [0.3]], np.float32)
LOSSES = DRAW.uniform(0.5, 1.5, size=(997, T)).astype(np.float32)
# By definition their weights are sums over all steps: of inner products, and of the excess of a loss
# over its limit. Nothing that is trained brings them back here.
GROWS = ("lagrangian", "ol_aux")


def stateful():
    """The methods that remember anything beside the shared fields."""
    rows = []
    for name in sorted(mtl.METHODS):
        state = jax.eval_shape(make(name, T).init, PARAMS)
        if jax.tree.leaves((state.rule_state, state.averages)):
            rows.append(pytest.param(name, marks=pytest.mark.xdist_group(f"long {name}")))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("name", stateful())
def test_many_steps(name):
    tx = make(name, T)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def part(state, first):
        def body(carry, step):
            state, finite = carry
            grads, losses = jnp.asarray(STREAM)[step % 997], jnp.asarray(LOSSES)[step % 997]
            update, state = tx.update({"w": grads}, state, PARAMS, losses=losses)
            finite = finite & jnp.all(jnp.isfinite(update["w"]))
            return (state, finite), jnp.linalg.norm(update["w"])

        carry = (state, jnp.ones((), bool))
        (state, finite), sizes = jax.lax.scan(body, carry, first + jnp.arange(PART))
        return state, finite, sizes.mean()

    state, sizes = tx.init(PARAMS), []
    for first in range(0, STEPS, PART):
        state, finite, size = part(state, jnp.asarray(first))
        assert bool(finite), first
        sizes.append(float(size))
    chex.assert_tree_all_finite(state)
    read = mtl.diagnostics(state)
    assert int(read["steps"]) == STEPS and read["skipped"].tolist() == [0] * T
    if "simplex" in PROPERTIES[name]:
        np.testing.assert_allclose(float(jnp.sum(state.weights)), 1, atol=1e-5)
    # After a tenth of the steps all memories have settled; from then on nothing may wander off.
    settled = np.asarray(sizes[1:])
    assert name in GROWS or settled.max() <= 1.1 * settled.min(), sizes
