"""Methods on the parameters: `per_task_value_and_grad`, `split_value_and_grad`, `stack_tasks`."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from placement_problem import (
    TASKS,
    assert_close,
    encode,
    head_losses,
    make_problem,
    plain_losses,
)

import mtl_optax as mtl

NAMES = ("click", "cart", "buy")
ORDER = sorted(NAMES)


# --- per_task_value_and_grad -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "vmap", "unroll", "map"])
def test_modes_agree_with_jacrev(mode):
    params, batch = make_problem()
    fn = jax.jit(mtl.per_task_value_and_grad(plain_losses, mode=mode))
    losses, grads = fn(params, batch)
    assert_close(losses, plain_losses(params, batch))
    assert_close(grads, jax.jit(jax.jacrev(plain_losses))(params, batch))


@pytest.mark.parametrize("mode", ["auto", "vmap", "unroll", "map"])
def test_losses_by_name_come_back_as_given(mode):
    """A dictionary in the user's order; the rows of the gradients follow the sorted names."""

    def loss_fn(params, batch):
        losses = plain_losses(params, batch)
        return {name: losses[ORDER.index(name)] for name in NAMES}, {"batch": batch}

    params, batch = make_problem()
    fn = jax.jit(mtl.per_task_value_and_grad(loss_fn, has_aux=True, mode=mode))
    (losses, aux), grads = fn(params, batch)
    assert losses.keys() == set(NAMES) and aux["batch"][0].shape == batch[0].shape
    expected, expected_grads = mtl.per_task_value_and_grad(plain_losses)(params, batch)
    assert_close([losses[name] for name in ORDER], list(expected))
    assert_close(grads, expected_grads)


def test_named_losses_go_to_the_method_as_they_are():
    method = mtl.metabalance(NAMES, target="click", relax_factor=1.0)
    updates = jnp.asarray([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])  # buy, cart, click

    def loss_fn(w):
        return dict(zip(ORDER, updates @ w, strict=True))

    losses, grads = mtl.per_task_value_and_grad(loss_fn)(jnp.ones(2))
    update, state = method.update(
        grads, method.init(jnp.ones(2)), losses=losses, active=dict.fromkeys(NAMES, True)
    )
    assert_close(mtl.head_weights(state), jnp.asarray([3.0, 1.5, 1.0]))
    assert_close(update, jnp.asarray([6.0, 3.0]))


def test_argnums_aux_and_keywords():
    def loss_fn(a, b, *, power):
        return jnp.stack([jnp.sum(a**power), jnp.sum(a * b)]), {"b": b}

    a, b = jnp.asarray([1.0, 2.0]), jnp.asarray([3.0, 5.0])
    both = mtl.per_task_value_and_grad(loss_fn, argnums=(1, 0), has_aux=True)
    (losses, aux), (grad_b, grad_a) = both(a, b, power=2)
    assert losses.tolist() == [5.0, 13.0]
    assert aux["b"].tolist() == [3.0, 5.0]
    assert grad_a.tolist() == [[2.0, 4.0], [3.0, 5.0]]
    assert grad_b.tolist() == [[0.0, 0.0], [1.0, 2.0]]
    one = mtl.per_task_value_and_grad(loss_fn, argnums=(0,), has_aux=True)
    assert isinstance(one(a, b, power=2)[1], tuple)


def test_negative_argnum():
    fn = mtl.per_task_value_and_grad(lambda x, w: jnp.stack([w * x, w**2]), argnums=-1)
    assert fn(2.0, jnp.asarray(3.0))[1].tolist() == [2.0, 6.0]


MISTAKES = {
    "a tuple": (
        lambda w: (w, w),
        TypeError,
        "loss_fn must return one array [T] or a dictionary of scalars, found a tuple of 2: return "
        "jnp.stack([...]) of the losses, or a dictionary of them by task name (and pass has_aux=True where "
        "the second output is auxiliary).",
    ),
    "a scalar": (
        lambda w: w,
        ValueError,
        "loss_fn must return one loss per task, an array [T] or a dictionary of scalars; found shape (). "
        "Return jnp.stack([...]) of the losses, or a dictionary of them by task name, instead of their "
        "sum.",
    ),
    "integers": (
        lambda w: jnp.ones(2, jnp.int32),
        TypeError,
        "losses must be real floating point, found int32.",
    ),
    "a dictionary of vectors": (
        lambda w: {"buy": w, "click": jnp.stack([w, w])},
        ValueError,
        "a dictionary of losses must hold one scalar per task; found shape (2,) for 'click'.",
    ),
    "an empty dictionary": (
        lambda w: {},
        ValueError,
        "a dictionary of losses must hold one scalar per task; found none.",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_losses_of_the_wrong_kind_are_refused(name):
    loss_fn, error, message = MISTAKES[name]
    places = (
        mtl.per_task_value_and_grad(loss_fn),
        lambda w: mtl.split_value_and_grad(lambda w: w, lambda _, w: loss_fn(w))(w, w),
        lambda w: mtl.weigh_losses(loss_fn(w), (), mtl.sum_tasks(2)),
    )
    for place in places:
        with pytest.raises(error) as caught:
            place(jnp.asarray(1.0))
        assert str(caught.value) == message


def test_unknown_mode_is_refused():
    message = 'mode must be "auto", "vmap", "unroll" or "map"; found \'fast\'.'
    for place, functions in ((mtl.per_task_value_and_grad, 1), (mtl.split_value_and_grad, 2)):
        with pytest.raises(ValueError) as caught:
            place(*[plain_losses] * functions, mode="fast")
        assert str(caught.value) == f"{place.__name__}: {message}"


# --- split_value_and_grad ----------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("mode", ["vmap", "unroll", "map"])
def test_split_gives_the_same_gradients(mode, named):
    params, batch = make_problem()
    x, y = batch

    def decode(heads, h, x, y):
        losses = head_losses(heads, (h,) * TASKS, y)
        given = {name: losses[ORDER.index(name)] for name in NAMES} if named else losses
        return given, jnp.mean(h)

    fn = mtl.split_value_and_grad(lambda shared, x, y: encode(shared, x), decode, True, mode=mode)
    (losses, aux), (shared, heads) = jax.jit(fn)(params["shared"], params["heads"], x, y)
    _, whole = mtl.per_task_value_and_grad(plain_losses)(params, batch)
    if named:
        assert losses.keys() == set(NAMES)
        losses = jnp.stack([losses[name] for name in ORDER])
    assert_close(losses, plain_losses(params, batch))
    assert_close(aux, jnp.mean(encode(params["shared"], x)))
    assert_close(shared, whole["shared"])
    assert_close(heads, jnp.sum(whole["heads"], axis=0))


# --- stack_tasks -------------------------------------------------------------------------------------


def test_stack_tasks_stands_in_the_order_of_the_sorted_names():
    given = {
        name: {"w": jnp.full((2,), i + 1.0), "b": jnp.ones(())} for i, name in enumerate(NAMES)
    }
    for names in (NAMES, set(NAMES), mtl.mgda(NAMES)):
        updates, active = mtl.stack_tasks(given, names)
        assert active.dtype == jnp.bool_ and active.all()
        assert updates["w"].tolist() == [[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]]  # buy, cart, click
        assert updates["b"].tolist() == [1.0, 1.0, 1.0]


def test_stack_tasks_fills_the_slots_of_absent_tasks():
    given = {"click": {"w": jnp.ones((2, 3), jnp.bfloat16), "none": None}}
    updates, active = jax.jit(lambda given: mtl.stack_tasks(given, NAMES))(given)
    assert active.tolist() == [False, False, True]
    assert updates["w"].dtype == jnp.bfloat16 and updates["w"].shape == (3, 2, 3)
    assert updates["w"].sum(axis=(1, 2)).tolist() == [0.0, 0.0, 6.0]


def test_one_loader_per_task():
    """What a method makes of some tasks' gradients is what it makes of all of them with `active=`."""
    params, batch = make_problem()
    method = mtl.multibalance(NAMES)
    _, grads = mtl.per_task_value_and_grad(plain_losses)(params, batch)
    row = lambda t: jax.tree.map(lambda g: g[t], grads)  # noqa: E731
    some = {name: row(ORDER.index(name)) for name in ("click", "buy")}

    @jax.jit
    def both(state):
        updates, active = mtl.stack_tasks(some, method)
        got = method.update(updates, state, params, active=active)
        present = {"buy": True, "cart": False, "click": True}
        return got, method.update(grads, state, params, active=present)

    got, expected = both(method.init(params))
    assert_close(got, expected)


@pytest.mark.parametrize(
    ("given", "names", "error", "message"),
    [
        (
            {"view": jnp.ones(2)},
            NAMES,
            ValueError,
            "stack_tasks: give the gradients of at least one of the tasks ['buy', 'cart', 'click']; found "
            "['view'].",
        ),
        (
            {},
            NAMES,
            ValueError,
            "stack_tasks: give the gradients of at least one of the tasks ['buy', 'cart', 'click']; found "
            "[].",
        ),
        (
            {"buy": jnp.ones(2), "cart": jnp.ones(3)},
            NAMES,
            ValueError,
            "stack_tasks: the gradients of 'buy' and 'cart' differ in structure or shape: (2,) and (3,).",
        ),
        (
            {"buy": {"w": jnp.ones(2)}, "cart": {"v": jnp.ones(2)}},
            NAMES,
            ValueError,
            "stack_tasks: the gradients of 'buy' and 'cart' differ in structure or shape: {'w': (2,)} and "
            "{'v': (2,)}.",
        ),
        (
            {"buy": jnp.ones(2)},
            mtl.mgda(2),
            TypeError,
            "stack_tasks: names must be the names of all tasks; found only their number.",
        ),
    ],
)
def test_stack_tasks_refuses(given, names, error, message):
    with pytest.raises(error) as caught:
        mtl.stack_tasks(given, names)
    assert str(caught.value) == message


# --- what it is for ----------------------------------------------------------------------------------


def test_metabalance_lets_a_quiet_task_learn():
    """Two tasks whose losses differ a thousandfold, on a bottom too narrow to keep them apart."""
    keys = jax.random.split(jax.random.key(0), 6)
    # With a dtype, so that the numbers drawn are the same in double precision.
    normal = functools.partial(jax.random.normal, dtype=jnp.float32)
    x = normal(keys[0], (64, 6))
    features = jnp.tanh(normal(keys[1], (2, 6, 3)))
    targets = jnp.stack([jnp.tanh(x @ features[t]) @ normal(keys[2 + t], (3,)) for t in range(2)])
    targets = (targets - targets.mean(1, keepdims=True)) / targets.std(1, keepdims=True)
    params = {
        "shared": 0.3 * normal(keys[4], (6, 4)),
        "heads": 0.3 * normal(keys[5], (2, 4)),
    }

    def losses_of(params):
        h = jnp.tanh(x @ params["shared"])
        errors = [jnp.mean((h @ params["heads"][t] - targets[t]) ** 2) for t in range(2)]
        return jnp.stack([1000 * errors[0], errors[1]])

    def train(method):
        tx = optax.chain(method, optax.adam(1e-2))

        def step(carry, _):
            params, state = carry
            losses, grads = mtl.per_task_value_and_grad(losses_of)(params)
            updates, state = tx.update(grads, state, params, losses=losses)
            return (optax.apply_updates(params, updates), state), None

        start = params, tx.init(params)
        return losses_of(jax.jit(lambda start: lax.scan(step, start, length=300)[0][0])(start))

    before = losses_of(params)
    loud, quiet = train(mtl.metabalance(2, target=1, relax_factor=1.0))
    assert quiet < 0.1 * train(mtl.sum_tasks(2))[1]  # 0.016 against 0.44, from 0.93
    assert loud < 0.1 * before[0]
