"""The physics example: its reference solutions solve the equations, and the command runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.physics import problems, training
from examples.physics.__main__ import main


def exact_network(name):
    """The exact solution as a JAX function of one point."""
    if name == "helmholtz":
        return lambda p: jnp.sin(jnp.pi * p[0]) * jnp.sin(4 * jnp.pi * p[1])
    return lambda p: jnp.sin(p[0] - 10.0 * p[1])


@pytest.mark.parametrize("name", ["helmholtz", "advection"])
def test_the_exact_solution_has_no_loss(name, x64):
    problem = problems.PROBLEMS[name]
    interior, boundary = problem.draw(jax.random.key(0), 50, 20)
    losses = problem.losses(exact_network(name), interior, boundary)
    assert all(float(loss) < 1e-20 for loss in losses.values()), losses
    grid = problem.grid(9)
    found = jax.vmap(exact_network(name))(jnp.asarray(grid))
    np.testing.assert_allclose(found, problem.solution(grid), atol=1e-12)


def test_the_burgers_solution_solves_the_equation():
    solve = problems.PROBLEMS["burgers"].solution
    points = np.array([[-0.6, 0.3], [0.3, 0.5], [0.7, 0.9], [0.2, 0.1]])
    h = 1e-3
    shift = lambda dx, dt: solve(points + np.array([[dx, dt]]))  # noqa: E731
    u_t = (shift(0, h) - shift(0, -h)) / (2 * h)
    u_x = (shift(h, 0) - shift(-h, 0)) / (2 * h)
    u_xx = (shift(h, 0) - 2 * shift(0, 0) + shift(-h, 0)) / h**2
    residual = u_t + shift(0, 0) * u_x - 0.01 / np.pi * u_xx
    assert np.abs(residual).max() < 1e-3
    start = np.stack([np.linspace(-1, 1, 11), np.zeros(11)], axis=1)
    np.testing.assert_allclose(solve(start), -np.sin(np.pi * start[:, 0]), atol=1e-9)


def test_points_are_where_they_should_be():
    problem = problems.PROBLEMS["burgers"]
    interior, boundary = problem.draw(jax.random.key(1), 100, 30)
    assert interior.shape == (100, 2) and boundary.shape == (4, 30, 2)
    assert np.all(interior[:, 0] >= -1) and np.all(interior[:, 1] >= 0)
    assert np.all(boundary[0, :, 0] == -1) and np.all(boundary[1, :, 0] == 1)
    assert np.all(boundary[2, :, 1] == 0) and np.all(boundary[3, :, 1] == 1)


def test_a_method_trains():
    config = training.Config(
        steps=200, chunk=100, seeds=2, width=16, depth=2, interior=64, edge=16, learning_rate=1e-2
    )
    *steps, run = training.train(problems.PROBLEMS["advection"], "inverse_norm", config)
    assert steps == [100, 200]
    assert run.errors.shape == (2,) and run.weights.shape == (2, 3)
    start = functools.partial(
        training.apply_network, training.init_network(jax.random.key(0), 16, 2)
    )
    grid = problems.PROBLEMS["advection"].grid(16)
    exact = problems.PROBLEMS["advection"].solution(grid)
    untrained = np.asarray(jax.vmap(start)(jnp.asarray(grid, jnp.float32)))
    assert run.errors.max() < np.linalg.norm(untrained - exact) / np.linalg.norm(exact)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    runs = main(["--quick", "--problems", "helmholtz", "burgers", "--out", str(tmp_path)])
    assert len(runs) == 2 * len(training.methods())
    assert all(np.isfinite(run.errors).all() for run in runs.values())
    text = capsys.readouterr().out
    assert "helmholtz: the smallest median error is that of" in text
    rows = (tmp_path / "physics.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * len(runs)
    assert (tmp_path / "helmholtz.png").stat().st_size > 10_000
