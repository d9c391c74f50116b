"""The solvers against reference numbers, optimality conditions and their documented degenerate answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from golden_cases import load, pad_vector
from sampling import sampled

from mtl_optax.solvers import dual_cone, nash
from mtl_optax.solvers.aligned import aligned_weights
from mtl_optax.solvers.conflict_averse import conflict_averse_weights
from mtl_optax.solvers.cosine import Geometry, geometry_of
from mtl_optax.solvers.dual_cone import dualproj_weights, upgrad_weights
from mtl_optax.solvers.equal_projection import config_weights, equal_projection_weights
from mtl_optax.solvers.kl_ball import kl_ball_mirror_step
from mtl_optax.solvers.linear_program import maximize_on_simplex
from mtl_optax.solvers.min_norm import min_norm_weights
from mtl_optax.solvers.nash import fair_weights
from mtl_optax.solvers.nonnegative import nonnegative_by_products, nonnegative_least_squares
from mtl_optax.solvers.simplex import keep_shares, project_onto_simplex, renormalize


def nash_only(geometry):
    return fair_weights(geometry)[0]


SOLVERS = {
    "mgda": min_norm_weights,
    "nash_mtl": nash_only,
    "cagrad": conflict_averse_weights,
    "upgrad": upgrad_weights,
    "dualproj": dualproj_weights,
    "imtl_g": equal_projection_weights,
    "config": config_weights,
    "aligned_mtl": aligned_weights,
}


def solver(name):
    return lambda gram, active: SOLVERS[name](geometry_of(gram, active))


@functools.cache
def jitted(name):
    return jax.jit(solver(name))


def solve(name, gradients, dtype, active=None):
    gradients = np.asarray(gradients, dtype)
    active = np.ones(len(gradients), bool) if active is None else active
    gram = jnp.asarray(gradients @ gradients.T)
    return np.asarray(jitted(name)(gram, jnp.asarray(active)), np.float64)


def reference_cases(name):
    file = {"upgrad": "upgrad_dualproj", "dualproj": "upgrad_dualproj"}.get(name, name)
    for case in load(f"gradient/{file}"):
        entry = case
        if name in ("upgrad", "dualproj"):
            entry = case[name]
        elif name == "cagrad":
            entry = case["c"]["0.4"]
        elif name == "aligned_mtl":
            entry = case["modes"]["min"]
        want = entry.get("update", entry.get("update_sum"))
        if "G" in case and want is not None:
            yield case["name"], np.array(case["G"]), np.array(want)


def solve_all(solver, gradients, dtype):
    """The weights of many problems by one program: those of fewer tasks have absent ones."""
    counts = [len(g) for g in gradients]
    size = max(counts)
    grams = np.zeros((len(counts), size, size), dtype)
    for gram, g in zip(grams, gradients, strict=True):
        gram[: len(g), : len(g)] = np.asarray(g, dtype) @ np.asarray(g, dtype).T
    active = np.arange(size) < np.array(counts)[:, None]
    found = jax.jit(jax.vmap(solver))(jnp.asarray(grams), jnp.asarray(active))
    pick = lambda x: [np.asarray(row)[:count] for row, count in zip(x, counts, strict=True)]  # noqa: E731
    return jax.tree.map(lambda x: pick(x) if x.ndim > 1 else np.asarray(x), found)


# The tests of the methods compare their updates with the same numbers.
@pytest.mark.parametrize("name", sampled(SOLVERS, ["mgda", "imtl_g", "config", "aligned_mtl"]))
@pytest.mark.parametrize("dtype", sampled([np.float32, np.float64], [np.float64]))
def test_reference_updates(name, dtype):
    # In float32 a Gram matrix does not hold singular values a million times apart.
    singular = name == "aligned_mtl" and dtype == np.float32
    cases = [
        row for row in reference_cases(name) if not (singular and row[0].startswith("scales_T"))
    ]
    with jax.enable_x64(dtype == np.float64):
        found = solve_all(solver(name), [gradients for _, gradients, _ in cases], dtype)
    for (case, gradients, want), weights in zip(cases, found, strict=True):
        longest = np.linalg.norm(gradients, axis=1).max()
        largest = np.abs(want).max()
        scale = largest if dtype == np.float64 and largest > 1e-9 * longest else longest
        tolerance = 1e-6 if dtype == np.float64 else 1e-3
        assert np.abs(weights @ gradients - want).max() <= tolerance * scale, case


@pytest.mark.usefixtures("x64")
def test_simplex_projection_reference():
    cases = load("gradient/simplex_projection")
    size = max(len(case["y"]) for case in cases)
    points = jnp.asarray([pad_vector(case["y"], size) for case in cases])
    active = jnp.asarray([np.arange(size) < len(case["y"]) for case in cases])
    for case, got in zip(
        cases, jax.jit(jax.vmap(project_onto_simplex))(points, active), strict=True
    ):
        want = pad_vector(case["projection"], size)
        np.testing.assert_allclose(got, want, atol=1e-15, err_msg=case["name"])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_fair_weights_reference(alpha):
    cases = [
        (case["name"], np.array(case["G"]), entry["update"])
        for case in load("gradient/fairgrad")
        for key, entry in case["alpha"].items()
        if float(key) == alpha
    ]
    weights, solved = solve_all(
        lambda gram, active: fair_weights(geometry_of(gram, active), alpha),
        [gradients for _, gradients, _ in cases],
        np.float64,
    )
    for (case, gradients, want), w, right in zip(cases, weights, solved, strict=True):
        assert right == (want is not None), case
        if want is not None:
            np.testing.assert_allclose(w @ gradients, want, atol=1e-6 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 2])
def test_fair_weights_far_from_the_solution_are_not_called_solved(limit, monkeypatch):
    monkeypatch.setattr(nash, "LIMIT", limit)
    rows = jnp.array([[1.0, 0.0, 0.0], [-0.9, 1.0, 0.0], [-0.9, -0.9, 1.0]])
    geometry = geometry_of(rows @ rows.T)
    weights, solved = jax.jit(lambda geometry: fair_weights(geometry))(geometry)
    assert not bool(solved)
    np.testing.assert_allclose(weights, jax.jit(min_norm_weights)(geometry), rtol=1e-5)


def test_shares_among_those_who_are_there():
    weights, present = jnp.array([0.2, 0.3, 0.5]), jnp.array([True, False, True])
    np.testing.assert_allclose(renormalize(weights, present), [2 / 7, 0, 5 / 7], rtol=1e-6)
    np.testing.assert_allclose(
        keep_shares(jnp.array([0.9, 0.0, 0.1]), weights, present), [0.63, 0.3, 0.07], rtol=1e-6
    )
    # Where those who are there had nothing, they begin with equal shares.
    others = jnp.array([False, True, True])
    np.testing.assert_allclose(renormalize(jnp.array([1.0, 0, 0]), others), [0, 0.5, 0.5])
    np.testing.assert_array_equal(renormalize(weights, jnp.zeros(3, bool)), 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tasks", sampled([1, 3, 16, 64], [3]))
def test_nonnegative_least_squares_agrees_with_scipy(tasks):
    generator = np.random.default_rng(tasks)
    solver = jax.jit(nonnegative_least_squares)
    for size in (tasks + 3, max(tasks // 2, 1)):
        rows, goal = generator.normal(size=(tasks, size)), generator.normal(size=size)
        got = np.asarray(solver(jnp.asarray(rows @ rows.T), jnp.asarray(rows @ goal)))
        want, _ = scipy.optimize.nnls(rows.T, goal)
        np.testing.assert_allclose(got @ rows, want @ rows, atol=1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("variables", sampled([1, 2, 5, 8], [5]))
def test_linear_program_agrees_with_scipy(variables):
    rng = np.random.default_rng(variables)
    gain = rng.normal(size=(60, variables))
    size = 10.0 ** rng.uniform(-3, 0, size=(60, variables))
    matrix = rng.normal(size=(60, variables, variables))
    bound = rng.normal(size=(60, variables)) * 10.0 ** rng.uniform(-2, 2, size=(60, 1))
    found, feasible = jax.jit(jax.vmap(maximize_on_simplex))(gain, size, matrix, bound)
    solvable = []
    for c, r, a, b, x, solved in zip(gain, size, matrix, bound, found, feasible, strict=True):
        want = scipy.optimize.linprog(-c, -a, -b, r[None], [1.0])
        assert bool(solved) == (want.status == 0)
        solvable.append(bool(solved))
        if solved:
            np.testing.assert_allclose(x, want.x, rtol=1e-6, atol=1e-6 * want.x.max())
    assert 0 < sum(solvable) < 60


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("free", "tolerance"), [(8, 2e-8), (5, 2e-11)])
def test_nonnegative_least_squares_of_nearly_dependent_rows(free, tolerance):
    """A shift of the diagonal keeps the factor finite; only refinement takes it out of the solution."""
    generator = np.random.default_rng(free)
    left, _ = np.linalg.qr(generator.normal(size=(8, 8)))
    right, _ = np.linalg.qr(generator.normal(size=(8, 8)))
    rows = left * np.geomspace(1, 1e-4, 8) @ right
    # Where the solution is positive the slope is 0, elsewhere positive: this is how optima look.
    want = np.where(np.arange(8) < free, generator.uniform(0.5, 1, 8), 0)
    slope = np.where(np.arange(8) < free, 0, 0.1)
    gram = rows @ rows.T
    got = np.asarray(jax.jit(nonnegative_least_squares)(gram, gram @ want - slope))
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tasks", sampled([1, 2, 3, 8, 16, 64], [3, 16]))
def test_min_norm_point_is_optimal(tasks):
    generator = np.random.default_rng(tasks)
    gradients = generator.normal(size=(tasks, tasks + 3)) * 10 ** generator.uniform(
        -1, 1, (tasks, 1)
    )
    update = (weights := solve("mgda", gradients, np.float64)) @ gradients
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert (gradients @ update).min() >= update @ update * (1 - 1e-8)


@pytest.mark.slow
def test_norms_spread_over_twelve_orders_in_float32():
    generator = np.random.default_rng(0)
    gradients = generator.normal(size=(8, 20)) * 10 ** np.linspace(-6, 6, 8)[:, None]
    for name in ("mgda", "nash_mtl", "cagrad", "upgrad", "dualproj", "config"):
        single = solve(name, gradients, np.float32) @ gradients
        with jax.enable_x64(True):
            double = solve(name, gradients, np.float64) @ gradients
        assert np.abs(single - double).max() <= 1e-3 * np.abs(double).max(), name


DEGENERATE = {
    "zero": np.zeros((3, 4)),
    "one zero": np.array([[1.0, 2, 0, 1], [0, 0, 0, 0], [0, 1, 1, 3]]),
    "identical": np.ones((3, 4)),
    "opposite": np.array([[1.0, 2, 0, 1], [-1, -2, 0, -1], [0, 1, 1, 3]]),
    "hull": np.array([[1.0, 0, 0, 0], [-1, 1, 0, 0], [-1, -2, 0, 0]]),
}


@pytest.mark.parametrize("name", sampled(SOLVERS, ["mgda", "aligned_mtl", "config"]))
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_input_gives_finite_weights_and_inactive_slots_count_for_nothing(name, case):
    gradients = DEGENERATE[case]
    weights = solve(name, gradients, np.float32)
    assert np.isfinite(weights).all()
    padded = np.concatenate([gradients, np.full((1, 4), np.nan)])
    masked = solve(name, padded, np.float32, np.array([True, True, True, False]))
    assert masked[3] == 0
    np.testing.assert_allclose(masked[:3] @ gradients, weights @ gradients, atol=2e-3)


def test_documented_degenerate_answers():
    zero, one_zero, hull = (DEGENERATE[name] for name in ("zero", "one zero", "hull"))
    np.testing.assert_allclose(solve("mgda", zero, np.float32), 1 / 3, rtol=1e-6)
    np.testing.assert_array_equal(solve("mgda", one_zero, np.float32), [0, 1, 0])
    for name in ("mgda", "upgrad", "dualproj"):
        np.testing.assert_allclose(solve(name, hull, np.float32) @ hull, 0, atol=1e-4)
    fair, solved = jax.jit(fair_weights)(geometry_of(jnp.asarray(hull @ hull.T, "float32")))
    np.testing.assert_allclose(np.asarray(fair, float) @ hull, 0, atol=1e-4)
    assert not solved


@pytest.mark.parametrize("angle", [0.0, 1e-4, 0.005, 0.008, 0.1])
def test_equal_projections_of_nearly_opposite_gradients(angle):
    """For two gradients the weights are proportional to 1 / n at every angle, also where C is singular."""
    pair = np.array([[1.0, 0.0], [-2 * np.cos(angle), 2 * np.sin(angle)]])
    np.testing.assert_allclose(solve("imtl_g", pair, np.float32), [2 / 3, 1 / 3], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_vmap_equals_loop(name):
    gradients = np.random.default_rng(5).normal(size=(4, 3, 6)).astype(np.float32)
    grams = jnp.asarray(gradients @ gradients.transpose(0, 2, 1))
    active = jnp.ones(3, bool)
    batched = jax.vmap(jitted(name), in_axes=(0, None))(grams, active)
    looped = np.stack([jitted(name)(gram, active) for gram in grams])
    np.testing.assert_allclose(batched, looped, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("converges", "size"), [(True, 30), (False, 3)])
def test_many_projections_are_those_of_one_batch(converges, size, monkeypatch):
    """As with more than 50 tasks: by products, or in batches, of which the last one is not full."""
    gradients = np.random.default_rng(0).normal(size=(7, size)).astype(np.float32)
    geometry = geometry_of(jnp.asarray(gradients @ gradients.T))
    at_once = upgrad_weights(geometry)
    monkeypatch.setattr(dual_cone, "_NUMBERS_AT_A_TIME", 2 * 7**2)
    if not converges:
        unsolved = lambda _, target: (jnp.nan * target, jnp.array(False))  # noqa: E731
        monkeypatch.setattr(dual_cone, "nonnegative_by_products", unsolved)
    np.testing.assert_allclose(upgrad_weights(geometry), at_once, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", sampled([np.float32, np.float64], [np.float32]))
@pytest.mark.parametrize("size", sampled([20, 50, 2000], [50]))
def test_projections_by_products_are_optimal(size, dtype):
    """Also of dependent gradients, and with a gradient that is 0."""
    generator = np.random.default_rng(size)
    gradients = generator.normal(size=(60, size)) + generator.normal(size=size)
    gradients[7], gradients[9] = 0, gradients[8]
    cosine = geometry_of(jnp.asarray(gradients @ gradients.T, dtype)).cosine
    by_products = jax.vmap(functools.partial(nonnegative_by_products, cosine))
    added, solved = jax.jit(by_products)(-cosine)
    exact, added = np.asarray(cosine, np.float64), np.asarray(added, np.float64)
    slopes = (np.eye(60) + added) @ exact
    assert solved.all() and (added >= 0).all()
    assert np.abs(np.minimum(added, slopes)).max() < 20 * np.finfo(dtype).eps * (1 + added.max())
    assert not added[7].any() and not added[:, 7].any()


@pytest.mark.slow
def test_projections_by_products_tell_if_they_do_not_converge():
    generator = np.random.default_rng(0)
    gradients = generator.normal(size=(60, 8)) @ generator.normal(size=(8, 500))
    gradients += 1e-2 * generator.normal(size=gradients.shape)
    cosine = geometry_of(jnp.asarray(gradients @ gradients.T, np.float32)).cosine
    by_products = jax.vmap(functools.partial(nonnegative_by_products, cosine))
    assert not jax.jit(by_products)(-cosine)[1].all()


@pytest.mark.usefixtures("x64")
def test_kl_ball_step_is_tight_and_finite():
    step = jax.jit(kl_ball_mirror_step)
    generator = np.random.default_rng(0)
    for scale in (1e-3, 1.0, 1e3, 1e30):
        scores = jnp.asarray(generator.normal(size=4) * scale)
        for radius in (1e-6, 0.1, 0.9):
            log_p = np.asarray(step(jnp.zeros(4), scores, radius))
            divergence = np.sum(np.exp(log_p) * (log_p + np.log(4)))
            assert np.isfinite(log_p).all()
            bound = divergence < radius and np.allclose(np.diff(log_p), np.diff(scores))
            assert bound or divergence == pytest.approx(radius, rel=1e-7)
    np.testing.assert_allclose(np.exp(step(jnp.zeros(4), scores, 0.0)), 0.25)
    active = jnp.asarray([True, False, True, True])
    masked = step(jnp.zeros(4), jnp.asarray([1.0, jnp.nan, 2.0, 0.0]), 0.1, active)
    assert np.exp(masked)[1] == 0
    assert np.exp(masked).sum() == pytest.approx(1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("num_tasks", "size"), sampled([(6, 2), (8, 3), (10, 4)], [(6, 2)]))
def test_min_norm_point_of_more_gradients_than_dimensions(num_tasks, size):
    """Of thousands of random cases some leave the refinement a free direction out of the simplex."""
    rng = np.random.default_rng(0)
    unit = rng.normal(size=(3000, num_tasks, size)) + 0.3
    unit /= np.linalg.norm(unit, axis=2, keepdims=True)
    norms = rng.uniform(0.2, 1, size=(3000, num_tasks))

    def solve(unit, norms):
        return min_norm_weights(geometry_of(unit @ unit.T)._replace(norms=norms))

    weights = np.asarray(jax.jit(jax.vmap(solve))(unit, norms))
    point = np.einsum("bt,btn->bn", weights * norms, unit)
    progress = np.einsum("bn,btn->bt", point, unit * norms[..., None])
    # The shortest point has at least its own square with every gradient.
    assert np.max((point**2).sum(1)[:, None] - progress) < 1e-12


@pytest.mark.parametrize("noise", [1e-5, 1e-3])
@pytest.mark.parametrize("name", sampled(SOLVERS, ["mgda", "aligned_mtl"]))
def test_cosines_that_rounding_has_made_indefinite(name, noise):
    """Inner products of 1e9 numbers in float32 are not exact; of dependent gradients that shows."""
    rng = np.random.default_rng(0)
    unit = rng.normal(size=(20, 8, 3))
    unit /= np.linalg.norm(unit, axis=2, keepdims=True)
    rounding = noise * rng.normal(size=(20, 8, 8))
    cosine = np.clip(unit @ unit.transpose(0, 2, 1) + rounding + rounding.transpose(0, 2, 1), -1, 1)
    cosine[:, np.arange(8), np.arange(8)] = 1
    assert np.linalg.eigvalsh(cosine).min() < -noise
    norms = rng.uniform(0.2, 1, size=(20, 8))
    solver = jax.jit(SOLVERS[name])
    for c, n, u in zip(cosine.astype("float32"), norms.astype("float32"), unit, strict=True):
        weights = np.asarray(solver(Geometry(c, n, n > 0)), np.float64)
        assert np.isfinite(weights).all()
        if name == "mgda":
            point = (weights * n) @ u
            assert np.max(point @ point - (u * n[:, None]) @ point) < 20 * noise


@pytest.mark.slow
def test_the_correction_of_nearly_opposite_gradients_stays_in_its_ball():
    """Where only rounding decides which gradients conflict, in float32."""
    rng = np.random.default_rng(0)
    line = rng.normal(size=(100, 1, 20)) * rng.choice([-1, 1], size=(100, 5, 1))
    gradients = line + 10.0 ** rng.uniform(-5, -1, size=(100, 1, 1)) * rng.normal(size=(100, 5, 20))
    gram = gradients @ gradients.transpose(0, 2, 1)

    def solve(gram):
        return conflict_averse_weights(geometry_of(gram), 2.0)

    weights = jax.jit(jax.vmap(solve))(jnp.asarray(gram, "float32"))
    update = np.einsum("bt,btn->bn", np.asarray(weights, np.float64), gradients)
    mean = gradients.mean(1)
    radius = 2 * np.linalg.norm(mean, axis=1)
    assert np.max(np.linalg.norm(update - mean, axis=1) / radius) < 1 + 1e-2
