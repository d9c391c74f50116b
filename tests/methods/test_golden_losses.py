"""The methods on losses, and the two that train or accumulate, against reference numbers.

Every case is a sequence, run as one scan. The gradients are unit vectors (times given norms), so that
the update is the vector of weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_cases import parameters

import mtl_optax as mtl
from mtl_optax.solvers.k_means import k_means_on_line

# Relative to the largest reference weight of a step: sequences in double and in single precision.
DOUBLE, SINGLE = 1e-7, 1e-4

OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam}


def run(method, case, dtype, losses=None, extra=None):
    """The weights of every step, `[K, T]`."""
    losses = jnp.asarray(np.asarray(case["losses"] if losses is None else losses), dtype)
    norms = jnp.asarray(np.asarray(case.get("grad_norms", np.ones(losses.shape))), dtype)
    unit = jnp.eye(losses.shape[1], dtype=dtype)
    start = method.init(jnp.zeros(losses.shape[1], dtype))
    extra = {name: jnp.asarray(np.asarray(value), dtype) for name, value in (extra or {}).items()}

    def body(state, step):
        losses, norms, extra = step
        _, state = method.update(unit * norms[:, None], state, losses=losses, **extra)
        # Without the axis of the one block.
        return state, jax.tree.map(lambda x: x[0], (state.weights, state.rule_state))

    _, (weights, states) = jax.jit(lambda *args: jax.lax.scan(body, start, args))(
        losses, norms, extra
    )
    assert weights.dtype == dtype
    return np.asarray(weights), states


def check(weights, want):
    want = np.asarray(want, float)
    assert weights.shape == want.shape
    error = np.abs(weights - want).max(axis=1) / np.abs(want).max(axis=1)
    assert error.max() <= (DOUBLE if weights.dtype == np.float64 else SINGLE), error


@pytest.fixture(params=["float64", pytest.param("float32", marks=pytest.mark.slow)])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


@pytest.mark.parametrize("case", parameters("loss/uncertainty"))
def test_golden_uncertainty(case, dtype):
    h = case["hyperparameters"]
    optimizer = OPTIMIZERS[h["optimizer"]](h["lr"])
    method = mtl.uncertainty(case["T"], form=h["form"], init=h["init"], optimizer=optimizer)
    weights, states = run(method, case, dtype)
    check(weights, case["outputs"]["weights"])
    check(np.asarray(states.values)[:-1], case["outputs"]["state_before"][1:])


@pytest.mark.parametrize("case", parameters("loss/imtl_l"))
def test_golden_imtl_l(case, dtype):
    h = case["hyperparameters"]
    method = mtl.imtl_l(case["T"], optimizer=OPTIMIZERS[h["optimizer"]](h["lr"]))
    check(run(method, case, dtype)[0], case["outputs"]["weights"])


@pytest.mark.parametrize(
    "case", parameters("loss/gradnorm", lambda c: c["hyperparameters"]["variant"] == "paper")
)
def test_golden_gradnorm(case, dtype):
    h = case["hyperparameters"]
    optimizer = OPTIMIZERS[h["weight_optimizer"]](h["weight_lr"])
    method = mtl.gradnorm(case["T"], alpha=h["alpha"], optimizer=optimizer)
    check(run(method, case, dtype)[0], case["outputs"]["weights_before"])


@pytest.mark.parametrize(
    "case", parameters("loss/dwa", lambda c: c["hyperparameters"]["variant"] == "epoch")
)
def test_golden_dwa(case, dtype):
    method = mtl.dwa(case["T"], temperature=case["hyperparameters"]["temperature"])
    check(run(method, case, dtype)[0], case["outputs"]["weights"])


@pytest.mark.parametrize("case", parameters("loss/rlw"))
def test_golden_rlw(case, dtype):
    normals = case["normals"]
    weights, _ = run(mtl.rlw(case["T"]), case, dtype, np.ones_like(normals), {"noise": normals})
    check(weights, case["outputs"]["weights"])


@pytest.mark.parametrize("case", parameters("loss/gls"))
def test_golden_gls(case, dtype):
    check(run(mtl.gls(case["T"]), case, dtype)[0], case["outputs"]["weights"])


@pytest.mark.parametrize("case", parameters("loss/si"))
def test_golden_si(case, dtype):
    """Task weights, which the reference has beside the losses, are a reducer of their own here."""
    task_weights = np.asarray(case["hyperparameters"]["task_weights"], dtype)
    weights, _ = run(mtl.scale_invariant(case["T"]), case, dtype)
    check(weights * task_weights, case["outputs"]["weights"])


@pytest.mark.parametrize("case", parameters("loss/stch"))
def test_golden_stch(case, dtype):
    h, steps = case["hyperparameters"], case["hyperparameters"]["steps_per_epoch"]
    method = mtl.stch(
        case["T"], mu=h["mu"], warmup_steps=h["warmup_epoch"] * steps, nadir_steps=steps
    )
    weights, states = run(method, case, dtype)
    check(weights, case["outputs"]["weights"])
    check(np.asarray(states.nadir)[-1:], [case["outputs"]["nadir"]])


@pytest.mark.parametrize("case", parameters("loss/famo"))
def test_golden_famo(case, dtype):
    h = case["hyperparameters"]
    low = jnp.asarray(case["min_losses"], dtype)
    method = mtl.famo(case["T"], gamma=h["gamma"], weight_lr=h["w_lr"], min_losses=low)
    # The first entry belongs to no step, and must not be looked at.
    after = [[1.0] * case["T"], *case["losses_after_update"][:-1]]
    check(run(method, case, dtype, extra={"losses_after": after})[0], case["outputs"]["weights"])


@pytest.mark.parametrize("case", parameters("loss/bandit_mtl"))
def test_golden_bandit_mtl(case, dtype):
    h = case["hyperparameters"]
    method = mtl.bandit_mtl(case["T"], step_size=h["eta"], kl_radius=h["kl_radius"])
    weights, states = run(method, case, dtype)
    check(weights, case["outputs"]["weights"])
    check(np.exp(np.asarray(states.log_p)), case["outputs"]["p_after"])


@pytest.mark.parametrize("case", parameters("loss/go4align"))
def test_golden_go4align(case, dtype):
    h = case["hyperparameters"]
    method = mtl.go4align(case["T"], num_groups=h["num_groups"], step_size=h["robust_step_size"])
    check(run(method, case, dtype)[0], case["outputs"]["weights"])


@pytest.mark.parametrize("case", parameters("gradient/torchjd_extras"))
def test_golden_torchjd_extras_excess_mtl(case, dtype):
    gradients = jnp.asarray(np.asarray([step["G"] for step in case["steps"]]), dtype)
    method = mtl.excess_mtl(gradients.shape[1], step_size=1e-2)

    def body(state, gradient):
        update, state = method.update(gradient, state)
        return state, (update, state.weights[0])

    start = method.init(jnp.zeros(gradients.shape[2], dtype))
    _, (updates, weights) = jax.jit(lambda g: jax.lax.scan(body, start, g))(gradients)
    check(np.asarray(weights), [step["excess_mtl_weights"] for step in case["steps"]])
    total = np.einsum("kt,ktn->kn", np.asarray(weights, float), np.asarray(gradients, float))
    check(np.asarray(updates), total)


# --- what the reference files do not hold ------------------------------------------------------------


def simple(method, losses, **extra):
    """The weights at the last of a few steps."""
    case = {"losses": np.atleast_2d(losses)}
    return run(method, case, jnp.dtype(jnp.float32), extra=extra)[0][-1]


def test_dwa_averages_over_windows():
    losses = np.random.default_rng(0).uniform(0.5, 2, (7, 2))
    first, second = losses[:3].mean(0), losses[3:6].mean(0)
    logits = np.exp(second / first / 2)
    np.testing.assert_allclose(
        simple(mtl.dwa(2, window=3), losses), 2 * logits / logits.sum(), rtol=1e-5
    )


def test_famo_without_losses_after_takes_the_present_ones():
    losses = np.array([[2.0, 1.0], [1.5, 0.2]])
    method = mtl.famo(2)
    given = simple(method, losses, losses_after=np.array([[1.0, 1.0], [1.5, 0.2]]))
    np.testing.assert_array_equal(given, simple(method, losses))


def test_rlw_is_uniform_on_average_and_follows_its_seed():
    losses = np.ones((400, 3))
    case = {"losses": losses}
    draws, _ = run(mtl.rlw(3, seed=1), case, jnp.dtype(jnp.float32))
    np.testing.assert_allclose(draws.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(draws.mean(0), 1 / 3, atol=0.03)
    again, _ = run(mtl.rlw(3, seed=1), case, jnp.dtype(jnp.float32))
    other, _ = run(mtl.rlw(3, seed=2), case, jnp.dtype(jnp.float32))
    np.testing.assert_array_equal(draws, again)
    assert not np.allclose(draws, other)


def test_preference_weights_are_the_derivatives_of_their_objectives():
    losses, r = jnp.array([0.7, 2.0, 1.1]), jnp.array([0.2, 0.5, 0.3])

    def cosmos(x):
        return r @ x - 0.8 * (r @ x) / (jnp.linalg.norm(r) * jnp.linalg.norm(x))

    def pbi(x):
        unit = r / jnp.linalg.norm(r)
        x = x - 0.1
        along = x @ unit
        return along + 2.0 * jnp.linalg.norm(x - along * unit)

    pairs = (
        (cosmos, mtl.cosmos(3, preference=r, lam=0.8)),
        (pbi, mtl.pbi(3, preference=r, theta=2.0, reference=0.1)),
    )
    for objective, method in pairs:
        np.testing.assert_allclose(
            simple(method, losses), jax.grad(objective)(losses), rtol=2e-5, atol=1e-6
        )


def test_preference_methods_where_the_objective_has_no_derivative():
    np.testing.assert_allclose(simple(mtl.cosmos(2), [0.0, 0.0]), 0.5)
    np.testing.assert_allclose(simple(mtl.pbi(3), [0.3, 0.3, 0.3]), 3**-0.5, rtol=1e-6)


def test_losses_without_a_logarithm_have_a_written_answer():
    np.testing.assert_allclose(simple(mtl.scale_invariant(3), [0.0, -2.0, 4.0]), [0, 0.5, 0.25])
    np.testing.assert_allclose(simple(mtl.scale_invariant(2, eps=0.5), [0.0, 1.5]), [2, 0.5])
    weights = simple(mtl.gls(3), [0.0, -2.0, 8.0])
    np.testing.assert_allclose(weights, [0, 1, 0.25], rtol=1e-5)
    assert simple(mtl.gls(2), [1e30, 1e-30])[1] == pytest.approx(2.0**64, rel=1e-4)
    np.testing.assert_allclose(simple(mtl.stch(2), [[1.0, 1.0], [0.0, 2.0]]), [0, 1], rtol=1e-5)
    assert simple(mtl.go4align(2, num_groups=1), [0.0, 2.0])[0] == 0


def test_trained_weights_stay_finite_where_their_optimum_is_not():
    for losses in ([0.0, 1e30], [-1e30, 0.0]):
        steps = np.tile(losses, (40, 1))
        for optimizer in (optax.sgd(10.0), optax.adam(10.0)):
            for method in (
                mtl.uncertainty(2, optimizer=optimizer),
                mtl.uncertainty(2, form="sigma", init=1.0, optimizer=optimizer),
                mtl.imtl_l(2, optimizer=optimizer),
                mtl.gradnorm(2, optimizer=optimizer),
            ):
                weights, states = run(method, {"losses": steps}, jnp.dtype(jnp.float32))
                for leaf in jax.tree.leaves((weights, states)):
                    assert np.isfinite(np.asarray(leaf)).all()


def test_gradnorm_keeps_its_weights_where_none_stays_positive():
    method = mtl.gradnorm(1, optimizer=optax.sgd(10.0), alpha=0.0)
    weights, states = run(method, {"losses": [[1.0]] * 3}, jnp.dtype(jnp.float32))
    np.testing.assert_array_equal(weights, 1)
    two = mtl.gradnorm(2, optimizer=optax.chain(optax.sgd(1.0), optax.add_decayed_weights(-9.0)))
    weights, states = run(two, {"losses": [[1.0, 1.0]] * 3}, jnp.dtype(jnp.float32))
    np.testing.assert_array_equal(weights, 1)
    assert states.fallback_count.tolist() == [1, 2, 3]


def test_an_absent_task_does_not_move():
    """Its trained number and its optimizer's moments stay; the others go on as if alone."""
    active = jnp.array([True, False])
    gradients, losses = jnp.eye(2), jnp.array([0.3, 5.0])
    for make in (mtl.uncertainty, mtl.imtl_l, mtl.famo, mtl.dwa, mtl.bandit_mtl, mtl.gradnorm):
        method = make(2)
        state = method.init(jnp.zeros(2))
        for k in range(3):
            _, state = method.update(gradients, state, losses=losses / (k + 1))
        _, after = method.update(gradients, state, losses=losses, active=active)
        leaves = zip(
            jax.tree.leaves(after.rule_state), jax.tree.leaves(state.rule_state), strict=True
        )
        per_task = [(new, old) for new, old in leaves if new.shape == (1, 2)]
        assert per_task, make
        for new, old in per_task:
            assert new[0, 1] == old[0, 1], make
        _, nobody = method.update(gradients, state, losses=losses, active=~(active | True))
        jax.tree.map(np.testing.assert_array_equal, nobody.rule_state, state.rule_state)


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_k_means_on_a_line_is_the_best_of_all_partitions(groups):
    rng = np.random.default_rng(groups)
    points = jnp.asarray(rng.normal(size=(6, 6)) * 10.0 ** rng.integers(-6, 6, (6, 1)), jnp.float32)
    active = jnp.asarray([True] * 5 + [False])
    found = jax.jit(jax.vmap(lambda x: k_means_on_line(x, active, groups)))(points)
    for x, got in zip(np.asarray(points, float), np.asarray(found, float), strict=True):
        values = np.sort(x[:5])
        scale = (values**2).sum()
        assert ((got[:5] - x[:5]) ** 2).sum() <= best_error(values, groups) + 1e-10 * scale
        assert len(np.unique(got[:5])) <= groups
        assert got[5] == 0


def best_error(values, groups):
    if groups == 1 or len(values) <= 1:
        return ((values - values.mean()) ** 2).sum() if len(values) else 0.0
    return min(
        ((values[:i] - values[:i].mean()) ** 2).sum() + best_error(values[i:], groups - 1)
        for i in range(1, len(values) + 1)
    )


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"init=1\.0 is neutral"):
        mtl.uncertainty(2, form="sigma")
    with pytest.raises(ValueError, match=r'form must be "half_logvar"'):
        mtl.uncertainty(2, form="variance")
    with pytest.raises(ValueError, match="num_groups must be a Python integer from 1 to 2"):
        mtl.go4align(2, num_groups=3)
    with pytest.raises(ValueError, match="window must be a Python integer >= 1"):
        mtl.dwa(2, window=0)
    with pytest.raises(ValueError, match="nadir_steps must be a Python integer >= 1"):
        mtl.stch(2, nadir_steps=0)
    with pytest.raises(ValueError, match=r"preference must have shape \(2,\)"):
        mtl.cosmos(2, preference=[1.0])
    with pytest.raises(ValueError, match=r"losses_after must have shape \(2,\)"):
        method = mtl.famo(2)
        state = method.init(jnp.zeros(2))
        method.update(jnp.eye(2), state, losses=jnp.ones(2), losses_after=jnp.ones(3))
