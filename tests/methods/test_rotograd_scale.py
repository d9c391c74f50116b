"""`rotograd_scale` against reference numbers, and what is its own."""

import jax.numpy as jnp
import numpy as np
from golden_elements import SEQUENCE, check, precisions, run, sequences

import mtl_optax as mtl


@precisions(SEQUENCE)
def test_golden(x64, dtype, tolerance):
    cases = sequences("gradient/rotograd_scale", lambda step: step["update"])
    check(run(mtl.rotograd_scale, cases, dtype), tolerance)


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
