"""Tests of EMTL's experiments on tiny data: the toy problem, the tables, the command line."""

import csv
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.emtl import figure1, toy
from examples.emtl.__main__ import main


def test_losses_at_points_computed_by_hand() -> None:
    below = np.tanh(4.0)
    cases = {
        (7.0, -8.0): (-20 * below, (19.6 - 20) * below),
        (-7.0, -8.0): ((19.6 - 20) * below, -20 * below),
        (0.0, 0.0): (0.0, 0.0),
        # The bottoms of the two valleys, where the other distance is 7 - 2 tanh(5).
        (-7 + 2 * np.tanh(5.0), 5.0): (
            np.tanh(2.5) * (np.log(5e-6) + 6),
            np.tanh(2.5) * (np.log(7 - 2 * np.tanh(5.0)) + 6),
        ),
        (7 - 2 * np.tanh(5.0), 5.0): (
            np.tanh(2.5) * (np.log(7 - 2 * np.tanh(5.0)) + 6),
            np.tanh(2.5) * (np.log(5e-6) + 6),
        ),
    }
    for point, expected in cases.items():
        # The logarithm is clipped at 5e-6; a float32 coordinate is 5e-7 off.
        found = toy.losses(jnp.array(point))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_no_point_dominates_the_pareto_front() -> None:
    front = toy.pareto_front(201)
    points = jax.random.uniform(jax.random.key(0), (20_000, 2), minval=-11.0, maxval=11.0)
    found = np.asarray(jax.vmap(toy.losses)(points))
    # 1e-4: the losses are float32 numbers of size 20, and y is taken from a grid.
    assert not (found[:, None] < front - 1e-4).all(axis=2).any()
    assert (np.diff(front[:, 0]) > 0).all()
    assert (np.diff(front[:, 1]) < 0).all()
    np.testing.assert_allclose(front.mean(axis=1).min(), -15.09, atol=0.01)


def test_ends_are_measured_against_the_front() -> None:
    front = toy.pareto_front()
    at_best = (0.0, -8.3552)  # Nash-MTL's program has this height
    positions = jnp.array([at_best, (2.0, -8.3552), (0.0, -3.8)])[:, None]
    ends = figure1.ends_of(positions, front)
    assert ends.distance[:2] == pytest.approx(0.0, abs=0.05)
    assert ends.distance[2] > 0.1
    assert ends.excess[0] == pytest.approx(0.0, abs=0.01)
    # The mean of the bowls is x^2 / 10 higher.
    assert ends.excess[1] == pytest.approx(0.4, abs=0.02)
    assert ends.counts() == ("2", "1")


def test_figure1_writes_a_table_a_csv_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure1, "ROWS", {"EMTL": "emtl"})
    monkeypatch.setattr(figure1, "EPSILONS", (0.3,))
    assert main(["figure1", "--steps", "20", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "figure1.md").read_text("utf-8")
    assert "python -m examples.emtl figure1" in text
    assert text.count("\n| EMTL |") == 1
    assert text.count("\n| as they are |") == len(figure1.RHOS)
    with (tmp_path / "figure1.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(toy.STARTS)
    assert (tmp_path / "figure1.png").stat().st_size > 1000


def test_paths_repeat_a_plain_loop() -> None:
    visited = np.asarray(figure1.paths("sum", 20))
    position, first, second = np.array(toy.STARTS[0]), np.zeros(2), np.zeros(2)
    scale = jnp.array(toy.SCALE)
    for count in range(1, 21):
        grad = np.asarray(jax.grad(lambda p: (toy.losses(p) * scale).sum())(jnp.asarray(position)))
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        unbiased = first / (1 - 0.9**count), second / (1 - 0.999**count)
        position = position - 1e-3 * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    np.testing.assert_allclose(visited[0, -1], position, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["table1", "--seeds", "0"], "--seeds must be at least 1"),
        (["table1", "--resume"], "--resume needs --out DIR"),
        (["table9"], "table9"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("examples.emtl: error: ")
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_figure1_runs_quickly_with_all_methods(tmp_path: Path) -> None:
    assert main(["figure1", "--quick", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "figure1.md").read_text("utf-8")
    assert all(f"\n| {name} |" in text for name in figure1.ROWS)
    assert "nan" not in text
