"""What is `epo`'s own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_optax as mtl


def test_epo_counts_the_steps_without_a_solution():
    """The authors' program finds none here either; the weights are then those of the min-norm point."""
    grads = jnp.array([[3.0, 1.0, 4.0], [-1.0, -2.0, 3.0], [-4.0, -3.0, -3.0]])
    tx = mtl.epo(3)
    state, counts = tx.init(jnp.zeros(3)), []
    for losses in ([1.0, 0.99, 1.005], [1.0, 2.0, 3.0], [1.0, 0.99, 1.005]):
        update, state = tx.update(grads, state, losses=jnp.array(losses))
        counts.append(int(state.rule_state.fallback_count[0]))
    assert counts == [1, 1, 2]
    shortest, _ = mtl.mgda(3).update(grads, mtl.mgda(3).init(jnp.zeros(3)))
    np.testing.assert_allclose(update, shortest, rtol=1e-5, atol=1e-6)


def test_epo_reaches_the_ratio_of_its_preference():
    """Two parabolas whose sum has its minimum at equal losses."""
    tx = optax.chain(mtl.epo(2, preference=[1.0, 4.0]), optax.sgd(0.02))

    def losses_of(x):
        return jnp.stack([jnp.sum((x - 1) ** 2), jnp.sum((x + 1) ** 2)])

    def step(carry, _):
        x, state = carry
        losses, grads = mtl.per_task_value_and_grad(losses_of)(x)
        update, state = tx.update(grads, state, losses=losses)
        return (optax.apply_updates(x, update), state), None

    x = jnp.array([0.9, -0.3])
    (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), length=500)
    first, second = losses_of(x)
    np.testing.assert_allclose(first / second, 4, rtol=0.1)
    np.testing.assert_allclose(x[0], x[1], atol=1e-2)  # the Pareto set
