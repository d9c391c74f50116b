"""What the notes of single methods promise, where no property that methods share would show it."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl


def test_pcd_counts_the_steps_without_a_feasible_update():
    """Two auxiliaries that are opposite cannot both have their guarantee."""
    tx = mtl.pcd(3, tau=0.1)
    opposite = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    possible = jnp.array([[1.0, 0.0], [-1.0, 1.0], [0.5, 1.0]])
    state, counts = tx.init(jnp.zeros(2)), []
    for grads in (possible, opposite, opposite, possible):
        update, state = tx.update(grads, state)
        counts.append(int(state.rule_state.fallback_count[0]))
        if grads is opposite:  # the target alone
            assert state.weights[0, 0] > 0 and state.weights[0, 1:].tolist() == [0, 0]
        else:
            assert float(jnp.min(grads @ update)) > 0
    assert counts == [0, 1, 2, 2]
    # Without its target a step has no constraint to fail.
    _, state = tx.update(opposite, state, active=jnp.array([False, True, True]))
    assert int(state.rule_state.fallback_count[0]) == 2


def test_adatask_gives_its_optimizer_everything_in_float32():
    """A weight decay of 0.1 of a bfloat16 parameter has more digits than bfloat16."""
    seen = []

    def look(updates, state, params):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves((updates, state, params)))
        return jax.tree.map(lambda u, p: u + 0.1 * p, updates, params), state

    inner = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), look)
    params = {"w": jnp.full(3, 1.0, jnp.bfloat16)}
    tx = mtl.adatask(2, inner)
    update, _ = tx.update({"w": jnp.ones((2, 3), jnp.bfloat16)}, tx.init(params), params)
    assert len(seen) == 3 and set(seen) == {jnp.dtype(jnp.float32)}
    assert update["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(update["w"], jnp.full(3, 2.2, jnp.bfloat16))


@pytest.mark.parametrize("power", [1.0, 4.0])
def test_inverse_norm_has_weights_that_can_be_multiplied(power):
    """The fourth power of a ratio of 1e12 is beyond float32: the weight stops at the root of its range."""
    grads = jnp.array([[1e6, 0.0], [0.0, 1e-6]])
    tx = mtl.inverse_norm(2, power=power, ema_decay=0.0)
    update, state = tx.update(grads, tx.init(jnp.zeros(2)))
    largest = float(jnp.finfo(jnp.float32).max) ** 0.5
    assert float(state.weights[0, 1]) == pytest.approx(min(5e11**power, largest), rel=1e-3)
    assert np.isfinite(update).all()
    bounded = mtl.inverse_norm(2, power=power, ema_decay=0.0, eps=0.1)
    _, state = bounded.update(grads, bounded.init(jnp.zeros(2)))
    assert float(state.weights[0, 1]) == pytest.approx(10.0**power, rel=1e-5)


def test_rotograd_takes_its_reference_again_once():
    """At the update that `burn_in` counts from 0, neither before nor after."""
    tx = mtl.rotograd_scale(2, burn_in=2)
    state, weights = tx.init(jnp.zeros(2)), []
    for norms in ([1.0, 1.0], [2.0, 1.0], [4.0, 2.0], [4.0, 1.0]):
        _, state = tx.update(jnp.diag(jnp.array(norms)), state)
        weights.append(state.weights[0])
    # The common norms are 1, (2 * 2 + 1) / 3, (4 + 2) / 2 and (2 * 4 + 1) / 3.
    common = np.array([1, 5 / 3, 3, 3])[:, None]
    expected = common / [[1.0, 1.0], [2.0, 1.0], [4.0, 2.0], [4.0, 1.0]]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_excess_mtl_measures_its_baseline_in_the_first_steps():
    gradients = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 4.0], [2.0, 1.0]])
    tx = mtl.excess_mtl(2, warmup_steps=2, step_size=0.5, eps=0.0)
    state, squares, excess = tx.init(jnp.zeros(1)), np.zeros(2), []
    log_weights = np.zeros(2)
    for k, gradient in enumerate(gradients):
        _, state = tx.update(jnp.asarray(gradient)[:, None], state)
        squares += gradient**2
        excess.append(gradient**2 / np.sqrt(squares))
        if k >= 2:
            log_weights += 0.5 * excess[k] / np.mean(excess[:2], axis=0)
        weights = np.exp(log_weights) / np.exp(log_weights).sum()
        np.testing.assert_allclose(state.weights[0], weights, rtol=1e-5)


# The numbers of the papers or of their programs. Another one changes what everybody trains with.
DEFAULTS = {
    "bandit_mtl": {"step_size": 0.5, "kl_radius": 1.2},
    "cagrad": {"c": 0.4, "rescale": 1},
    "cosmos": {"lam": 1.0},
    "cr_mogm": {"ema_decay": 0.9},
    "db_mtl": {"ema_decay": 0.9, "beta_sigma": 0.0, "log_losses": True, "norm": "max"},
    "dwa": {"temperature": 2.0, "window": 1},
    "emtl": {"epsilon": 0.0, "rho": 0.1, "kl_radius": None, "step_size": 0.5},
    "epo": {"preference": None, "tolerance": 1e-4},
    "excess_mtl": {"step_size": 1.0, "warmup_steps": 0, "eps": 1e-7},
    "fairgrad": {"alpha": 1.0},
    "famo": {"gamma": 1e-2, "weight_lr": 0.025, "min_losses": 0.0},
    "go4align": {"step_size": 1e-4},
    "grad_similarity": {"mode": "unweighted"},
    "grad_vaccine": {"ema_decay": 0.99, "order": "random", "eps": 1e-8},
    "gradcraft": {"relax_factor": 1.0, "margin": 0.0, "ema_decay": 0.0},
    "graddrop": {"leak": 0.0},
    "gradnorm": {"alpha": 1.5},
    "igb": {"warmup_steps": 0, "base_steps": 1},
    "inverse_norm": {"reference": "mean", "power": 1.0, "ema_decay": 0.9, "eps": 0.0},
    "lagrangian": {"damping": 0.0},
    "ldc_mtl": {"penalty": 0.01},
    "lr_annealing": {"ema_decay": 0.9},
    "metabalance": {"relax_factor": 0.7, "strategy": "both", "ema_decay": 0.9},
    "mgda": {"normalize": "none"},
    "moco": {"ema_decay": 0.9, "weight_lr": 0.1, "rho": 0.1},
    "modo": {"weight_lr": 0.1, "rho": 0.1},
    "multibalance": {
        "weight_lr": 1.0,
        "prior": None,
        "prior_strength": 0.1,
        "ema_decay": 0.9,
        "direction": "cosine",
        "ema_init": "first",
    },
    "ntk": {"reference": "sum", "ema_decay": 0.0},
    "ol_aux": {"weight_lr": 0.005, "update_every": 5, "filter_window": 1, "nonnegative": True},
    "pbi": {"theta": 5.0, "reference": 0.0},
    "pcd": {"tau": 0.02, "ema_decay": 0.999, "eps": 1e-8},
    "pcgrad": {"order": "random"},
    "relobralo": {"ema_decay": 0.999, "rho": 0.999, "temperature": 1.0},
    "rotograd_scale": {"burn_in": 20},
    "scale_by_mtadam": {"b1": 0.9, "b2": 0.999, "b3": 0.9, "eps": 1e-8},
    "scale_by_pub": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "scale_invariant": {"eps": 0.0},
    "sdmgrad": {"lam": 0.3, "num_steps": 20, "step_size": 10.0, "momentum": 0.5},
    "softadapt": {"beta": 0.1, "variant": "original"},
    "stch": {"mu": 1.0, "warmup_steps": 0, "nadir_steps": 1},
    "uncertainty": {"form": "half_logvar", "init": 0.0},
    "uw_so": {"temperature": 1.0},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_papers(name):
    parameters = inspect.signature(mtl.METHODS[name].factory).parameters
    assert {key: parameters[key].default for key in DEFAULTS[name]} == DEFAULTS[name]
