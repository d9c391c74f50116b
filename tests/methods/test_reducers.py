"""The plain reducers against reference numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_elements import STATIC, check, precisions, run, static

import mtl_optax as mtl


@precisions(STATIC)
@pytest.mark.parametrize("name", ["sum", "mean", "trimmed_mean_1", "trimmed_mean_2"])
def test_golden_mean_sum_trimmed_krum_reducers(x64, name, dtype, tolerance):
    cases = static("gradient/mean_sum_trimmed_krum", lambda case: case.get(name))
    make = {"sum": mtl.sum_tasks, "mean": mtl.mean_tasks}.get(name)
    if make is None:
        make = functools.partial(mtl.trimmed_mean, trim_number=int(name[-1]))
    check(run(make, cases, dtype), tolerance)


def test_measuring_changes_nothing_and_takes_the_mean_of_a_hundred_steps():
    """Gradients that grow from step to step; a task that is absent in every second step."""
    plain, method = mtl.sum_tasks(2), mtl.sum_tasks(2, measure=True, blocks="all")
    grads = jnp.array([[3.0, 4.0], [1.0, 0.0]])

    def step(states, number):
        scaled, active = grads * number, jnp.array([True, number % 2 == 0])
        one, first = plain.update(scaled, states[0], active=active)
        other, second = method.update(scaled, states[1], active=active)
        return (first, second), (one, other)

    start = plain.init(grads[0]), method.init(grads[0])
    (_, state), (ones, others) = jax.lax.scan(step, start, jnp.arange(1.0, 121.0))
    np.testing.assert_array_equal(ones, others)
    squares = np.arange(1.0, 101.0) ** 2
    both = squares[1::2].mean()
    expected = [[25 * squares.mean(), 3 * both], [3 * both, both]]
    np.testing.assert_allclose(state.rule_state.products[0], expected, rtol=1e-5)
    np.testing.assert_array_equal(state.rule_state.count[0], [[100, 50], [50, 50]])


def test_the_mean_of_the_largest_gradients_is_finite():
    method = mtl.sum_tasks(2, measure=True)
    grads = 1e19 * jnp.array([[1.0, 0.0], [-1.0, 0.0]])
    state = method.init(grads[0])
    for _ in range(3):
        _, state = method.update(grads, state)
    np.testing.assert_allclose(
        state.rule_state.products[0], [[1e38, -1e38], [-1e38, 1e38]], rtol=1e-5
    )
