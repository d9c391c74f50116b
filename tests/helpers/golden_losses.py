"""Methods on losses against reference numbers.

Every case is a sequence, run as one scan. The gradients are unit vectors (times given norms), so that
the update is the vector of weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

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


def simple(method, losses, **extra):
    """The weights at the last of a few steps."""
    case = {"losses": np.atleast_2d(losses)}
    return run(method, case, jnp.dtype(jnp.float32), extra=extra)[0][-1]
