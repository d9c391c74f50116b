"""The physics example: its reference solutions solve the equations, and the command runs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_optax as mtl
from examples.studies.harness.runs import Plan, Run
from examples.studies.physics import __main__ as command
from examples.studies.physics import problems, training
from examples.studies.physics.__main__ import SHORT, main
from examples.studies.physics.pointwise import residual_attention


def exact_network(name):
    """The exact solution as a JAX function of points `[n, 2]`."""
    if name == "helmholtz":
        return lambda p: jnp.sin(jnp.pi * p[:, 0]) * jnp.sin(4 * jnp.pi * p[:, 1])
    return lambda p: jnp.sin(p[:, 0] - 10.0 * p[:, 1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["helmholtz", "advection"])
def test_the_exact_solution_has_no_loss(name, x64):
    problem = problems.PROBLEMS[name]
    interior, boundary = problem.draw(jax.random.key(0), 50, 20)
    losses = problem.losses(exact_network(name), interior, boundary)
    assert all(float(loss) < 1e-20 for loss in losses.values()), losses
    grid = problem.grid(9)
    found = exact_network(name)(jnp.asarray(grid))
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


@pytest.mark.slow
def test_points_are_where_they_should_be():
    problem = problems.PROBLEMS["burgers"]
    interior, boundary = problem.draw(jax.random.key(1), 100, 30)
    assert interior.shape == (100, 2) and boundary.shape == (4, 30, 2)
    assert np.all(interior[:, 0] >= -1) and np.all(interior[:, 1] >= 0)
    assert np.all(boundary[0, :, 0] == -1) and np.all(boundary[1, :, 0] == 1)
    assert np.all(boundary[2, :, 1] == 0) and np.all(boundary[3, :, 1] == 1)


@pytest.mark.slow
def test_the_burgers_residual_is_that_of_the_equation(x64):
    # u = x t^2 + x^2 t has u_t + u u_x - nu u_xx with the derivatives below.
    interior, boundary = problems.PROBLEMS["burgers"].draw(jax.random.key(2), 20, 5)
    found = problems.PROBLEMS["burgers"].residuals(
        lambda p: p[:, 0] * p[:, 1] ** 2 + p[:, 0] ** 2 * p[:, 1], interior, boundary
    )
    x, t = interior[:, 0], interior[:, 1]
    u, u_x, u_t = x * t**2 + x**2 * t, t**2 + 2 * x * t, 2 * x * t + x**2
    expected = u_t + u * u_x - 0.01 / np.pi * 2 * t
    np.testing.assert_allclose(found["equation"], expected, rtol=1e-12)


def test_residual_attention_is_its_formula():
    method = residual_attention(3, decay=0.9, step=0.5)
    residuals = jnp.array([1.0, -2.0, 4.0])
    state, expected = method.init(jnp.zeros(1)), np.zeros(3)
    for active in ([True, True, True], [True, True, False]):
        total, state = mtl.weigh_losses(residuals**2, state, method, active=jnp.array(active))
        there = np.abs(residuals)[active]
        expected[active] = 0.9 * expected[active] + 0.5 * there / there.max()
        np.testing.assert_allclose(
            total, np.sum((expected * residuals)[np.array(active)] ** 2), rtol=1e-6
        )
    # The point that was absent kept its weight.
    np.testing.assert_allclose(expected[2], 0.5)
    np.testing.assert_allclose(mtl.head_weights(state), [*expected[:2] ** 2, 0], rtol=1e-6)


def test_residual_attention_without_residuals_stays_finite():
    method = residual_attention(2)
    total, state = mtl.weigh_losses(jnp.zeros(2), method.init(jnp.zeros(1)), method)
    assert float(total) == 0 and np.isfinite(mtl.head_weights(state)).all()


SMALL = training.Config(
    steps=200, chunk=100, seeds=2, width=16, depth=2, interior=64, edge=16, learning_rate=1e-2
)


@pytest.mark.slow
def test_a_method_trains():
    problem = problems.PROBLEMS["advection"]
    trainer = training.Trainer(problem, SMALL)
    plans = [Plan(seed, trainer.default_setting()) for seed in range(2)]
    values = []
    runs = trainer.train(training.choose("inverse_norm, kept weights"), plans, values.append)
    assert np.concatenate(values).shape == (4,)
    assert [run.history["weights"].shape for run in runs] == [(2, 3)] * 2
    start = training.init_network(jax.random.key(0), SMALL)
    grid = problem.grid(16)
    exact = problem.solution(grid)
    untrained = np.asarray(training.network(problem, start)(jnp.asarray(grid, jnp.float32)))
    assert command.L2.by_seed(runs).max() < np.linalg.norm(untrained - exact) / np.linalg.norm(
        exact
    )


def test_the_table_has_errors_and_ratios():
    def row(errors):
        return [Run("", seed, {}, {training.ERROR: np.array(error)}, 1, 1.0, {})
                for seed, error in enumerate(errors)]  # fmt: skip

    runs = {"plain sum": row([1.0, 2.0, 4.0]), "upgrad": row([0.1, 0.3, 0.2])}
    assert command.lines_of(runs)[2] == ("upgrad", "0.2000", "0.1000", "0.3000", "10.0")


@pytest.mark.slow
def test_one_gradient_takes_one_branch():
    """The compiled step keeps the branch over tasks: it does not compute them all and select."""
    trainer = training.Trainer(problems.PROBLEMS["helmholtz"], replace(SMALL, chunk=1))
    choice = training.choose("conflict_free, one gradient")
    step = trainer.make_step(choice, trainer.default_setting())
    params = trainer.init(jax.random.key(0))
    batch = trainer.batch(None, (jnp.int32(1), jax.random.key(1)))
    lowered = jax.jit(step.update).lower(params, step.init(params), batch)
    assert "conditional(" in lowered.compile().as_text()


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--methods", "plain sums"], "unknown method 'plain sums'; did you mean 'plain sum'?"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--out", __file__], "File exists"),
    ],
)
def test_bad_arguments(arguments, shown, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("examples.studies.physics: error: ") and shown in error


def test_ctrl_c_ends_the_other_trainings_with_their_chunk(monkeypatch, capsys):
    def train(self, choice, plans, on_epoch, *_, **__):
        if choice.label == "upgrad":
            raise KeyboardInterrupt
        while True:
            on_epoch(np.zeros(1))

    monkeypatch.setattr(training.Trainer, "train", train)
    monkeypatch.setattr(command, "cores", lambda: 2)  # on one core it would wait for the first
    methods = ["plain sum", "upgrad", "mgda"]
    assert main(["--problems", "helmholtz", "--methods", *methods]) == 130
    assert capsys.readouterr().err.endswith("stopped; nothing is kept\n")


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    arguments = ["--quick", "--problems", "helmholtz", "burgers"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert "helmholtz: relative L2 error after 20 steps" in capsys.readouterr().out
    for problem, rows in (("helmholtz", training.ROWS), ("burgers", SHORT)):
        lines = (tmp_path / f"{problem}.csv").read_text().splitlines()
        assert len(lines) == 1 + 2 * len(rows)
        assert all(np.isfinite(float(line.split(",")[-1])) for line in lines[1:])
        made = "python -m examples.studies.physics --quick"
        assert made in (tmp_path / f"{problem}.md").read_text()
    assert (tmp_path / "helmholtz.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_command_that_times(tmp_path):
    assert main(["--quick", "--time", "--problems", "helmholtz", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "helmholtz_time.md").read_text()
    assert "| plain sum |" in text and "| conflict_free, one gradient |" in text
