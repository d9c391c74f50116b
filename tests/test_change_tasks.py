"""`change_tasks`: a task is added to or removed from the state of a method."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from method_properties import every_method, make

import mtl_optax as mtl

PARAMS = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(4)}
FEW, MANY = ("a", "c"), ("a", "b", "c")


def trained(method, steps=3):
    state = method.init(PARAMS)
    number = method.num_tasks
    for step in range(steps):
        keys = jax.random.split(jax.random.key(step), 2)
        grads = {
            "w": jax.random.normal(keys[0], (3, 2, 3)),
            "b": jax.random.normal(keys[1], (3, 4)),
        }
        grads = grads if number == 3 else jax.tree.map(lambda g: g[jnp.array([0, 2])], grads)
        update, state = method.update(grads, state, PARAMS, losses=jnp.arange(1.0, number + 1))
    return update, state


@pytest.mark.parametrize("name", every_method(["metabalance", "gradnorm"], "change"))
def test_a_task_comes_and_goes(name):
    few, many = make(name, FEW), make(name, MANY)
    _, state = trained(few)
    wider = mtl.change_tasks(state, few, many, PARAMS)
    assert jax.tree.structure(wider) == jax.tree.structure(many.init(PARAMS))
    np.testing.assert_array_equal(wider.weights[:, [0, 2]], state.weights)
    assert int(wider.balance_count) == int(state.balance_count)
    assert wider.weighed.tolist()[1] is False
    back = mtl.change_tasks(wider, many, few, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, *map(numbers, (back, state)))
    grads = {"w": jnp.ones((3, 2, 3)), "b": -jnp.ones((3, 4))}
    update, after = many.update(grads, wider, PARAMS, losses=jnp.array([1.0, 2.0, 3.0]))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(update))
    assert after.skipped.tolist() == [0, 0, 0]


def numbers(state):
    """Random keys as numbers."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, state)


def test_averages_of_the_other_tasks_are_kept():
    few, many = mtl.metabalance(FEW, target="a"), mtl.metabalance(MANY, target="a")
    _, state = trained(few)
    wider = mtl.change_tasks(state, few, many, PARAMS)
    old, new = jax.tree.leaves(state.rule_state), jax.tree.leaves(wider.rule_state)
    assert any(leaf.shape[-1:] == (2,) for leaf in old)
    for before, after in zip(old, new, strict=True):
        if before.shape != after.shape:
            np.testing.assert_array_equal(after[..., jnp.array([0, 2])], before)
            np.testing.assert_array_equal(after[..., 1], jnp.zeros(before.shape[:-1]))


def test_inside_the_state_of_a_chain_and_under_jit():
    few, many = mtl.mgda(FEW), mtl.mgda(MANY)
    state = optax.chain(few, optax.adam(0.1)).init(PARAMS)
    wider = jax.jit(lambda state: mtl.change_tasks(state, few, many, PARAMS))(state)
    assert wider[0].weights.shape == (1, 3)
    jax.tree.map(np.testing.assert_array_equal, wider[1], state[1])


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        (mtl.mgda(2), mtl.mgda(3), TypeError, "matched by name"),
        (mtl.mgda(FEW), mtl.upgrad(MANY), TypeError, "found mgda and upgrad"),
        (mtl.mgda(FEW), mtl.mgda(("a", "b")), ValueError, "remove it first"),
        (mtl.multibalance(FEW), mtl.multibalance(MANY), ValueError, "was not made by"),
    ],
)
def test_mistakes_are_refused(old, new, error, message):
    with pytest.raises(error, match=message):
        mtl.change_tasks(mtl.mgda(FEW).init(PARAMS), old, new, PARAMS)


def test_other_parameters_are_refused():
    few, many = mtl.moco(FEW), mtl.moco(MANY)
    with pytest.raises(ValueError, match="give the params"):
        mtl.change_tasks(few.init(PARAMS), few, many, {"w": jnp.zeros(5), "b": jnp.zeros(4)})


def test_a_tree_without_a_method_is_refused():
    with pytest.raises(ValueError, match="no state of a method"):
        mtl.change_tasks(optax.adam(0.1).init(PARAMS), mtl.mgda(FEW), mtl.mgda(MANY), PARAMS)
