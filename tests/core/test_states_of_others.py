"""States that were made for another number of tasks, by another method, or for a whole optimizer."""

import jax
import jax.numpy as jnp
import optax
import pytest
from method_properties import SAMPLE, every_method, make

import mtl_optax as mtl

T = 3
NAMES = sorted(mtl.METHODS)
PARAMS = {"b": jnp.ones(2), "w": jnp.ones((4, 2))}
LOSSES = jnp.array([0.7, 1.3, 0.2])
# A rule with each kind of state: of weights, with an optimizer inside, averages, an update rule.
OTHERS = ("inverse_norm", "famo", "moco", "scale_by_mtadam")


def grads(num_tasks):
    return jax.tree.map(lambda p: jnp.ones((num_tasks, *p.shape)), PARAMS)


def refusal(tx, state):
    with pytest.raises((TypeError, ValueError)) as raised:
        jax.eval_shape(lambda: tx.update(grads(T), state, PARAMS, losses=LOSSES))
    assert len(str(raised.value)) <= 300
    return str(raised.value)


@pytest.mark.parametrize("name", every_method(quick=SAMPLE))
def test_states_that_are_not_of_this_method(name):
    tx = make(name, T)
    for number in (1, 2, 4):
        found = refusal(tx, make(name, number).init(PARAMS))
        assert found.startswith(f"{name}: the weights in the state must have the shape [blocks, 3]")
        assert found.endswith(f", {number}]: make it by init of the same method.")
    own = tx.init(PARAMS)
    for other in OTHERS:
        state = make(other, T).init(PARAMS)
        if other != name and jax.tree.structure(state) != jax.tree.structure(own):
            found = refusal(tx, state)
            assert found.startswith(
                f"{name}: the state was made by another method or for other parameters: "
            )
    for whole in (optax.chain(tx, optax.adam(1e-3)), optax.chain(optax.identity(), tx)):
        assert refusal(tx, whole.init(PARAMS)) == (
            f"{name}: the state is that of a whole optimizer that holds a method, a tuple: give it to "
            "update of that optimizer."
        )
    for nonsense in (None, (), {}, "state", 0, PARAMS, tx, optax.adam(1e-3).init(PARAMS)):
        assert refusal(tx, nonsense) == (
            f"{name}: the state must be what init of this method returns, found a "
            f"{type(nonsense).__name__}."
        )
    turned = own._replace(balance_count=own.balance_count.astype(jnp.float32))
    assert "its leaf .balance_count is float[], expected int32[]" in refusal(tx, turned)


def test_the_message_names_what_differs():
    for other, difference in (
        ("inverse_norm", ".rule_state.weight_ema is float[1, 3], expected none"),
        ("mgda", ".cosine is float[1, 3, 3], expected none"),
    ):
        assert difference in refusal(mtl.famo(T), make(other, T).init(PARAMS))
    assert ".cosine is missing, expected float[1, 3, 3]" in refusal(
        mtl.mgda(T), mtl.sum_tasks(T).init(PARAMS)
    )


@pytest.mark.parametrize("name", ["moco", "db_mtl", "scale_by_mtadam"])
def test_a_state_of_other_parameters(name):
    tx = make(name, T)
    assert "made by another method or for other parameters: " in refusal(tx, tx.init(PARAMS["w"]))
    other = {"b": jnp.ones(2), "w": jnp.ones((5, 2))}
    assert "['w'] is float[3, 5, 2], expected float[3, 4, 2]" in refusal(tx, tx.init(other))


def losses_of(params, *_):
    return jnp.stack([jnp.sum(params["w"]) * (t + 1) for t in range(T)])


def through_fork(params, fork):
    return jnp.stack([jnp.sum(copy["w"]) for copy in fork(params)])


PLACES = {
    "weigh_losses": lambda tx, state: mtl.weigh_losses(LOSSES, state, tx),
    "weighted_value_and_grad": lambda tx, state: mtl.weighted_value_and_grad(losses_of, tx)(
        PARAMS, state
    ),
    "fork_value_and_grad": lambda tx, state: mtl.fork_value_and_grad(through_fork, tx)(
        PARAMS, state
    ),
}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("place", PLACES)
def test_states_of_others_in_every_place(place, every):
    tx = mtl.famo(T, update_every=every)
    chain = optax.chain(tx, optax.adam(1e-3))
    for state, expected in (
        (
            mtl.famo(2).init(PARAMS),
            r"famo: the weights in the state must have the shape \[blocks, 3\]",
        ),
        (mtl.gradnorm(T).init(PARAMS), "famo: the state was made by another method"),
        (chain.init(PARAMS), "famo: the state is that of a whole optimizer"),
        (None, "famo: the state must be what init of this method returns, found a NoneType"),
    ):
        with pytest.raises((TypeError, ValueError), match=expected):
            jax.eval_shape(lambda s=state: PLACES[place](tx, s))
    jax.eval_shape(lambda: PLACES[place](tx, tx.init(PARAMS)))


def test_states_that_went_through_trees_pass():
    """Maps, other widths of floats, scan and vmap keep what is compared."""
    tx = mtl.gradnorm(T)
    state = jax.tree.map(jnp.asarray, optax.tree.zeros_like(tx.init(PARAMS)))
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if is_float(x) else x, state)

    def step(state, _):
        return tx.update(grads(T), state, PARAMS, losses=LOSSES)[1], None

    jax.eval_shape(lambda: jax.lax.scan(step, state, length=2))
    jax.eval_shape(lambda: step(narrow, None))
    several = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(4))
    jax.eval_shape(jax.vmap(lambda state: step(state, None)), several)
    with pytest.raises(ValueError, match=r"must have the shape \[blocks, 3\], found \[4, 1, 3\]"):
        step(several, None)
