"""Identities between methods, and the chains of MetaBalance's table 3."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from method_properties import BROAD, every_method, make

import mtl_optax as mtl
from mtl_optax import METHODS

pytestmark = pytest.mark.usefixtures("x64")


def draws(num_tasks: int, seed: int = 0, count: int = 16) -> jax.Array:
    """Gradients `[count, T, 6]` of different lengths, many of them in conflict."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(count, num_tasks, 6))
    return jnp.asarray(directions * np.exp(rng.normal(size=(count, num_tasks, 1))))


def updates(transformation: Any, gradients: jax.Array, **extra: Any) -> np.ndarray:
    """One update from a fresh state for every `[T, n]` in `gradients`."""

    def one(g: jax.Array) -> jax.Array:
        return transformation.update(g, transformation.init(g[0]), **extra)[0]

    return np.asarray(jax.jit(jax.vmap(one))(gradients))


@pytest.mark.slow
def test_pcgrad_is_twice_upgrad_for_two_tasks() -> None:
    gradients = draws(2)
    assert (jnp.sum(gradients[:, 0] * gradients[:, 1], axis=-1) < 0).any()
    surgery = updates(mtl.pcgrad(2, order="cyclic"), gradients)
    np.testing.assert_allclose(surgery, 2 * updates(mtl.upgrad(2), gradients), rtol=1e-9)


@pytest.mark.slow
def test_pcgrad_and_upgrad_differ_for_three_tasks() -> None:
    gradients = draws(3)
    surgery = updates(mtl.pcgrad(3, order="cyclic"), gradients)
    assert np.abs(surgery - 3 * updates(mtl.upgrad(3), gradients)).max() > 0.1


def test_gradient_vaccine_starts_as_pcgrad() -> None:
    gradients = draws(3)
    first = updates(mtl.grad_vaccine(3, order="cyclic", ema_decay=1 - 1e-12, eps=0.0), gradients)
    np.testing.assert_allclose(
        first, updates(mtl.pcgrad(3, order="cyclic"), gradients), rtol=1e-9, atol=1e-12
    )


def test_grad_surgery_is_pcgrad_of_the_auxiliary_alone() -> None:
    gradients = draws(2)
    both = updates(mtl.pcgrad(2, order="cyclic"), gradients)
    sides = [updates(mtl.grad_surgery(2, target=t), gradients) for t in (0, 1)]
    plain = updates(mtl.sum_tasks(2), gradients)
    np.testing.assert_allclose(both, sides[0] + sides[1] - plain, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_cagrad_without_radius_is_the_mean() -> None:
    gradients = draws(3)
    mean = updates(mtl.mean_tasks(3), gradients)
    np.testing.assert_allclose(updates(mtl.cagrad(3, c=0.0), gradients), mean, rtol=1e-12)


@pytest.mark.slow
def test_fairgrad_with_alpha_one_is_nash() -> None:
    gradients = draws(3)
    nash = updates(mtl.nash_mtl(3), gradients)
    np.testing.assert_allclose(updates(mtl.fairgrad(3, alpha=1.0), gradients), nash, rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(nash, axis=-1), np.sqrt(3), rtol=1e-9)
    assert np.abs(updates(mtl.fairgrad(3, alpha=2.0), gradients) - nash).max() > 1e-3


def test_sdmgrad_with_a_large_lambda_is_the_mean() -> None:
    gradients = draws(3)
    mean = updates(mtl.mean_tasks(3), gradients)
    near = updates(mtl.sdmgrad(3, lam=1e9), gradients)
    np.testing.assert_allclose(near, mean, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_sdmgrad_without_lambda_tends_to_mgda() -> None:
    gradients = draws(3)
    solved = updates(mtl.sdmgrad(3, lam=0.0, step_size=0.02, num_steps=4000), gradients)
    np.testing.assert_allclose(solved, updates(mtl.mgda(3), gradients), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_multibalance_without_memory_is_modo() -> None:
    gradients = draws(3)
    one = mtl.multibalance(
        3, weight_lr=0.05, prior_strength=0.0, ema_decay=0.0, direction="gradient"
    )
    other = mtl.modo(3, weight_lr=0.05, rho=0.0)

    def weights(transformation: Any) -> np.ndarray:
        def step(state: Any, g: jax.Array) -> Any:
            update, state = transformation.update(g, state)
            return state, update

        start = transformation.init(gradients[0, 0])
        return np.asarray(jax.jit(lambda: jax.lax.scan(step, start, gradients)[1])())

    np.testing.assert_allclose(weights(one), weights(other), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [2, 3])
def test_emtl_does_not_depend_on_the_scales_of_losses(tasks: int) -> None:
    """A loss times c has a gradient times c; with other options this matters."""
    powers = jnp.array([[0.0, 0.0, 0.0], [-3.0, 3.0, 0.0], [3.0, 0.0, -3.0], [-1.0, -2.0, -3.0]])
    scales = 10.0 ** powers[:, :tasks]
    gradients, losses = draws(tasks), jnp.linspace(0.3, 2.0, tasks)

    def changes(**options: Any) -> tuple[np.ndarray, np.ndarray]:
        tx = mtl.emtl(tasks, **options)

        @jax.jit
        @jax.vmap
        def scaled(scale: jax.Array) -> Any:
            def one(g: jax.Array) -> Any:
                return tx.update(g * scale[:, None], tx.init(g[0]), losses=losses * scale)[0]

            return jax.vmap(one)(gradients)

        plain, *others = np.asarray(scaled(scales))
        return np.stack(others), np.stack([plain] * len(others))

    np.testing.assert_allclose(*changes(), rtol=1e-9, atol=1e-12)
    for options in ({"epsilon": 0.1}, {"base": mtl.mgda(tasks)}):
        changed, plain = changes(**options)
        assert (np.abs(changed - plain).max(axis=(1, 2)) > 1e-3).all(), options


@pytest.mark.slow
def test_emtl_by_its_formula() -> None:
    """Two tasks: MGDA on unit gradients has weights of 1/2, and the ball holds p."""
    gradients, losses = jnp.asarray([[3.0, 4.0], [-0.6, 0.8]]), jnp.asarray([2.0, 1.0])
    rates = np.array([0.5 * 2 / 5, 0.5 * 1 / 1])
    p = np.exp(0.5 * rates) / np.exp(0.5 * rates).sum()
    units = np.array([[0.6, 0.8], [-0.6, 0.8]])

    @jax.jit
    def update_of(epsilon: jax.Array) -> Any:
        tx = mtl.emtl(2, epsilon=epsilon)
        return tx.update(gradients, tx.init(gradients[0]), losses=losses)[0]

    for epsilon in (0.0, 0.25):
        update = update_of(jnp.asarray(epsilon))
        plain, own = gradients.sum(0) / 2, (p / 2) @ units
        expected = (epsilon * plain + (1 - epsilon) * own) / 2
        np.testing.assert_allclose(update, expected, rtol=1e-9)


@pytest.mark.slow
def test_emtl_with_epsilon_one_is_its_base() -> None:
    gradients = draws(3)
    for base in (mtl.mgda(3, normalize="l2"), mtl.imtl_g(3)):
        found = updates(mtl.emtl(3, epsilon=1.0, base=base), gradients, losses=jnp.ones(3))
        np.testing.assert_allclose(found, updates(base, gradients) / 3, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_cr_mogm_without_memory_is_its_weigher() -> None:
    gradients = draws(3)
    plain = updates(mtl.mgda(3), gradients)
    np.testing.assert_allclose(updates(mtl.cr_mogm(3, ema_decay=0.0), gradients), plain, rtol=1e-12)


def test_imtl_starts_as_imtl_g() -> None:
    gradients = draws(3)
    joint = updates(mtl.imtl(3), gradients, losses=jnp.asarray([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(joint, updates(mtl.imtl_g(3), gradients), rtol=1e-9)


def test_adatask_is_a_chain() -> None:
    gradients = draws(3)
    inner = optax.scale_by_adam()
    chain = optax.chain(mtl.per_task(inner, 3), mtl.sum_tasks(3))
    np.testing.assert_allclose(
        updates(mtl.adatask(3, inner), gradients), updates(chain, gradients), rtol=1e-12
    )


@pytest.mark.parametrize("name", every_method(quick=BROAD))
def test_one_task_keeps_its_direction(name: str) -> None:
    """With one task a method has nothing to balance: the update is a multiple of the gradient."""
    gradient = jnp.asarray([[3.0, -4.0, 12.0]])
    transformation = make(name, 1)
    state = transformation.init(jnp.zeros(3))
    update, _ = jax.jit(transformation.update)(
        gradient, state, jnp.ones(3), losses=jnp.asarray([2.0])
    )
    # The first direction of Adam is a sign.
    if name in ("adatask", "scale_by_mtadam", "scale_by_pub"):
        assert (np.asarray(update) * np.asarray(gradient[0]) > 0).all()
        return
    length = np.linalg.norm(update)
    np.testing.assert_allclose(update / length, gradient[0] / 13, rtol=1e-6)
    # The averages of these two start at 0 without correction, as in their references.
    if METHODS[name].scale in ("sum", "mean") and name not in ("db_mtl", "moco"):
        np.testing.assert_allclose(update, gradient[0], rtol=1e-6)


# --- MetaBalance's table 3: one-line chains against NumPy ---------------------------------------------

TREE = {"w": (2, 3), "b": (2,)}


def tree_draws(steps: int = 5, num_tasks: int = 3) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    sizes = 10.0 ** rng.uniform(-1, 1, size=num_tasks)
    return [
        {
            name: rng.normal(size=(num_tasks, *shape)) * sizes.reshape(-1, *(1,) * len(shape))
            for name, shape in TREE.items()
        }
        for _ in range(steps)
    ]


def numpy_metabalance(steps: list[Any], relax: float = 0.7, decay: float = 0.9) -> list[Any]:
    """Balanced per-task gradients, task 0 the target."""
    averages = {name: np.zeros(3) for name in TREE}
    result = []
    for gradients in steps:
        balanced = {}
        for name, g in gradients.items():
            norms = np.sqrt((g.reshape(3, -1) ** 2).sum(1))
            averages[name] = decay * averages[name] + (1 - decay) * norms
            factor = relax * averages[name][0] / averages[name] + 1 - relax
            factor[0] = 1
            balanced[name] = g * factor.reshape(-1, *(1,) * (g.ndim - 1))
        result.append(balanced)
    return result


def flat(gradients: Any) -> np.ndarray:
    return np.concatenate([gradients[name].reshape(3, -1) for name in sorted(TREE)], axis=1)


def numpy_similarity(g: np.ndarray) -> np.ndarray:
    return g[0] + sum((row for row in g[1:] if row @ g[0] >= 0), np.zeros(g.shape[1]))


def numpy_surgery(g: np.ndarray) -> np.ndarray:
    cleaned = [row - min(row @ g[0], 0) / (g[0] @ g[0]) * g[0] for row in g[1:]]
    return g[0] + sum(cleaned)


CHAINS = {
    "similarity": (
        optax.chain(mtl.metabalance(3, reduce=False), mtl.grad_similarity(3)),
        numpy_similarity,
    ),
    "surgery": (
        optax.chain(mtl.metabalance(3, reduce=False), mtl.grad_surgery(3)),
        numpy_surgery,
    ),
}


@pytest.mark.parametrize("name", sorted(CHAINS))
def test_metabalance_chains(name: str) -> None:
    chain, reference = CHAINS[name]
    steps = tree_draws()
    state = chain.init({n: jnp.zeros(shape) for n, shape in TREE.items()})
    update = jax.jit(chain.update)
    plain = 0
    for gradients, balanced in zip(steps, numpy_metabalance(steps), strict=True):
        found, state = update(jax.tree.map(jnp.asarray, gradients), state)
        got = np.concatenate([np.asarray(found[n]).ravel() for n in sorted(TREE)])
        want = reference(flat(balanced))
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
        plain += np.allclose(want, flat(balanced).sum(0))
    assert plain < len(steps)  # the second method had something to do


# --- docs/methods/other_names.md ----------------------------------------------------------------------


@pytest.mark.slow
def test_dcgd_is_conflict_free_or_dualproj() -> None:
    """The two forms of dual cone gradient descent, as its authors write them, for two losses."""
    gradients = draws(2)
    centered = updates(mtl.conflict_free(2), gradients)
    dual = updates(mtl.dualproj(2, preference=[1.0, 1.0]), gradients)
    for g, found, other in zip(np.asarray(gradients), centered, dual, strict=True):
        total, units = g.sum(0), g / np.linalg.norm(g, axis=1, keepdims=True)
        center = units.sum(0)
        expected = center @ total / (center @ center) * center
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        projected = total - sum(min(total @ row, 0.0) / (row @ row) * row for row in g)
        np.testing.assert_allclose(other, projected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_names_of_two_tasks_and_of_inverse_norms() -> None:
    gradients = draws(2)
    crafted = updates(mtl.gradcraft(2, relax_factor=0.0), gradients)
    np.testing.assert_allclose(updates(mtl.pcgrad(2), gradients), 2 * crafted, rtol=1e-9)
    norms = np.linalg.norm(gradients, axis=-1, keepdims=True)
    unit = (gradients / norms).sum(1) * norms.mean(1)
    np.testing.assert_allclose(
        updates(mtl.inverse_norm(2, ema_decay=0.0), gradients), unit, rtol=1e-9
    )
