"""`pcd` against reference numbers, and what is its own."""

import jax.numpy as jnp
from golden_elements import check, precisions, run, sequences

import mtl_optax as mtl


# The quadratic program is a solver: 1e-5 in double, 1e-3 in single precision.
@precisions(1e-5, 1e-3)
def test_golden_torchjd_extras_pcd(x64, dtype, tolerance):
    cases = sequences("gradient/torchjd_extras", lambda step: step["pcd_update"])
    check(run(mtl.pcd, cases, dtype), tolerance)


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
