"""The study of reinforcement learning: its environments, how a row is tuned, and what the table says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.ppo_actor_critic import CartPole
from examples.studies.reinforcement import __main__ as study
from examples.studies.reinforcement.acrobot import Acrobot


def energy(observed: np.ndarray) -> float:
    """Kinetic and potential, from the Lagrangian of two links whose mass, length and inertia are 1."""
    cos1, sin1, cos2, sin2, first, second = observed
    kinetic = 0.5 * ((3.5 + cos2) * first**2 + (1.25 + 0.5 * cos2) * 2 * first * second)
    kinetic += 0.5 * 1.25 * second**2
    return kinetic - 14.7 * cos1 - 4.9 * (cos1 * cos2 - sin1 * sin2)


def test_an_acrobot_without_torque_keeps_its_energy():
    start = jnp.array([jnp.cos(0.7), jnp.sin(0.7), jnp.cos(-0.4), jnp.sin(-0.4), 0.5, -0.3])
    _, path = jax.lax.scan(lambda s, _: (Acrobot.step(s, jnp.array(1))[0],) * 2, start, length=20)
    found = np.array([energy(state) for state in np.asarray(path, np.float64)])
    np.testing.assert_allclose(found, energy(np.asarray(start, np.float64)), rtol=2e-3)
    assert np.ptp(np.asarray(path)[:, 1]) > 0.5  # it moved


@pytest.mark.parametrize(("first", "second", "ends"), [(np.pi, 0.0, True), (0.0, 0.0, False)])
def test_an_acrobot_ends_a_link_above_the_joint(first, second, ends):
    angles = jnp.array([np.cos(first), np.sin(first), np.cos(second), np.sin(second), 0.0, 0.0])
    _, reward, done = Acrobot.step(angles, jnp.array(1))
    assert bool(done) == ends and reward == -1


def test_the_pole_moves_as_its_equations_say():
    """From rest, pushed by 10 N: the cart of 1 kg, the pole of 0.1 kg, whose half length is 0.5 m."""
    state, reward, done = CartPole.step(jnp.zeros(4), jnp.array(1))
    falls = -(10 / 1.1) / (0.5 * (4 / 3 - 0.1 / 1.1))
    pulls = 10 / 1.1 - 0.05 * falls / 1.1
    np.testing.assert_allclose(state, [0, 0.02 * pulls, 0, 0.02 * falls], rtol=1e-5)
    assert reward == 1 and not done
    for far in ([2.5, 0, 0, 0], [0, 0, 0.3, 0]):
        assert CartPole.step(jnp.array(far), jnp.array(0))[2]


@pytest.fixture
def trained(monkeypatch):
    """Replaces training: the return is best at one rate and one weight of the critic."""
    calls = []

    def train(method, key, rate, updates, env):
        calls.append(env)
        noise = jax.random.uniform(key)
        weight = 1.0 if method.name != "fixed_weights" else method.origin.given["weights"]["critic"]
        value = -jnp.abs(jnp.log10(rate / 0.01)) - jnp.abs(jnp.log10(weight / 0.1)) + 0.1 * noise
        return jnp.full(updates, value).at[:-1].set(100.0), None

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study, "look", lambda name: f"{name}: nothing.")
    return calls


def test_a_row_is_tuned_on_some_seeds_and_measured_on_others(trained):
    found = {name: study.arm(name, CartPole, 4, 2, 3) for name in (study.BASE, study.SEARCHED)}
    assert [each.rate for each in found.values()] == pytest.approx([0.01, 0.01])
    assert [each.weight for each in found.values()] == pytest.approx([1.0, 0.1])
    rates, weights = len(study.RATES), len(study.WEIGHTS)
    assert [each.runs for each in found.values()] == [rates * 2 + 3, rates * weights * 2 + 3]
    # The last update alone, a fifth of four at least; the seeds of both rows are the same.
    np.testing.assert_allclose(
        np.array(found[study.SEARCHED].returns) - found[study.BASE].returns, 1
    )


def test_the_table_and_what_is_trained_again(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "METHODS", {name: study.METHODS[name] for name in ("sum", "mgda")})
    arguments = ["--out", str(tmp_path), "--seeds", "3"]
    assert study.main(arguments) == 0
    page = (tmp_path / "table.md").read_text()
    assert page.splitlines()[2].split("|")[1:-1] == [
        " method ", " cartpole ", " learning rate ", " acrobot ", " learning rate ", " runs ",
    ]  # fmt: skip
    assert "| 0.01 |" in page and "cartpole: nothing." in page
    assert len((tmp_path / "returns.csv").read_text().splitlines()) == 1 + 2 * 2 * 3
    trained.clear()
    assert study.main([*arguments, "--resume"]) == 0 and not trained
    assert (tmp_path / "table.md").read_text().splitlines()[:6] == page.splitlines()[:6]
    assert study.main([*arguments, "--resume", "--quick"]) == 0 and trained
