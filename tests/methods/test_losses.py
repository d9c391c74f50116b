"""What several methods on losses share: the answers where a formula has none, and absent tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_losses import run, simple

import mtl_optax as mtl


def test_losses_without_a_logarithm_have_a_written_answer():
    np.testing.assert_allclose(simple(mtl.scale_invariant(3), [0.0, -2.0, 4.0]), [0, 0.5, 0.25])
    np.testing.assert_allclose(simple(mtl.scale_invariant(2, eps=0.5), [0.0, 1.5]), [2, 0.5])
    weights = simple(mtl.gls(3), [0.0, -2.0, 8.0])
    np.testing.assert_allclose(weights, [0, 1, 0.25], rtol=1e-5)
    assert simple(mtl.gls(2), [1e30, 1e-30])[1] == pytest.approx(2.0**64, rel=1e-4)
    np.testing.assert_allclose(simple(mtl.stch(2), [[1.0, 1.0], [0.0, 2.0]]), [0, 1], rtol=1e-5)
    assert simple(mtl.go4align(2, num_groups=1), [0.0, 2.0])[0] == 0


@pytest.mark.slow
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


@pytest.mark.slow
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
