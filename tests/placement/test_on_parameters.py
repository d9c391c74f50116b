"""Methods on the parameters: `per_task_value_and_grad`, `split_value_and_grad`, `stack_tasks`."""

import dataclasses
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
from sampling import sampled

import mtl_optax as mtl

NAMES = ("click", "cart", "buy")
ORDER = sorted(NAMES)
METHOD = mtl.sum_tasks(2)


@dataclasses.dataclass
class Losses:
    buy: jax.Array
    click: jax.Array


# --- per_task_value_and_grad -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "vmap", "unroll", "map"])
def test_modes_agree_with_jacrev(mode):
    params, batch = make_problem()
    fn = jax.jit(mtl.per_task_value_and_grad(plain_losses, mode=mode))
    losses, grads = fn(params, batch)
    assert_close(losses, plain_losses(params, batch))
    assert_close(grads, jax.jit(jax.jacrev(plain_losses))(params, batch))


@pytest.mark.parametrize("mode", sampled(["auto", "vmap", "unroll", "map"], ["auto"]))
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
    "losses and aux without has_aux": (
        lambda w: ((w, w), {"batch": w}),
        TypeError,
        "a tuple of losses must hold one scalar per task; found a tuple for entry 0. Make it one "
        "number, or pass has_aux=True if one output is auxiliary.",
    ),
    "a tuple of vectors": (
        lambda w: [w, jnp.stack([w, w])],
        ValueError,
        "a list of losses must hold one scalar per task; found shape (2,) for entry 1. Make it one number, "
        "or pass has_aux=True if one output is auxiliary.",
    ),
    "a scalar": (
        lambda w: w,
        ValueError,
        "losses must be a tuple or dictionary of one scalar per task, or an array [T]; found shape (). "
        "Return the loss of every task instead of their sum, and with has_aux=True (losses, aux).",
    ),
    "None": (
        lambda w: None,
        TypeError,
        "losses must be a tuple or dictionary of one scalar per task, or an array [T]; found None.",
    ),
    "a dataclass": (
        lambda w: Losses(w, w),
        TypeError,
        "losses must be a tuple or dictionary of one scalar per task, or an array [T]; found a Losses.",
    ),
    "a dictionary in a dictionary": (
        lambda w: {"buy": w, "click": {"x": w, "y": w}},
        TypeError,
        "a dictionary of losses must hold one scalar per task; found a dict for 'click'. Give every loss a "
        "name of its own, or add them up to one number.",
    ),
    "None in a dictionary": (
        lambda w: {"buy": w, "click": None},
        TypeError,
        "a dictionary of losses must hold one scalar per task; found None for 'click'. For a task that is "
        "absent from this batch return 0.0, and pass active=.",
    ),
    "complex numbers": (
        lambda w: {"buy": w, "click": w + 1j},
        TypeError,
        "losses must be real floating point, found complex64.",
    ),
    "integers": (
        lambda w: jnp.ones(2, jnp.int32),
        TypeError,
        "losses must be real floating point, found int32.",
    ),
    "a dictionary of vectors": (
        lambda w: {"buy": w, "click": jnp.stack([w, w])},
        ValueError,
        "a dictionary of losses must hold one scalar per task; found shape (2,) for 'click'. Give every "
        "loss a name of its own, or add them up to one number.",
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
        assert str(caught.value).replace("complex128", "complex64") == message
        assert len(message) <= 300


@pytest.mark.parametrize("result", [{"buy": 1.0, "click": 2.0}, (1.0, 2.0, 3.0), jnp.ones(2)])
def test_has_aux_without_aux_is_refused(result):
    found = {dict: "a dict of 2", tuple: "a tuple of 3"}.get(type(result), "an array of shape (2,)")
    for place in (
        mtl.per_task_value_and_grad(lambda w: result, has_aux=True),
        lambda w: mtl.split_value_and_grad(lambda w: w, lambda _, w: result, True)(w, w),
        lambda w: mtl.weighted_value_and_grad(lambda w: result, METHOD, True)(w, METHOD.init(w)),
    ):
        with pytest.raises(TypeError) as caught:
            place(jnp.asarray(1.0))
        assert str(caught.value) == (
            f"has_aux=True: loss_fn must return (losses, aux); found {found}. Leave has_aux "
            "out if it returns the losses alone."
        )


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (
            jnp.tanh,
            r"the leaf \['f'\] of the parameters is a .*, not an array.* eqx.partition.* nnx.split",
        ),
        ("relu", r"the leaf \['f'\] of the parameters is a str, not an array"),
        (1j * jnp.ones(2), r"the leaf \['f'\] of the parameters is complex.* two leaves"),
        (jnp.arange(2), r"cannot differentiate with respect to the leaf \['f'\] of int"),
    ],
)
def test_parameters_without_a_real_gradient_are_refused(leaf, words):
    params = {"w": jnp.ones(2), "f": leaf}
    loss_fn = lambda params: (params["w"].sum(), params["w"].sum())  # noqa: E731
    weighted = lambda params: mtl.weighted_value_and_grad(loss_fn, METHOD)(  # noqa: E731
        params, METHOD.init(jnp.ones(2))
    )
    places = [
        mtl.per_task_value_and_grad(loss_fn),
        lambda params: mtl.split_value_and_grad(lambda p: p, lambda *_: loss_fn(params))(
            params, {}
        ),
        lambda params: mtl.one_task_value_and_grad(loss_fn, 2)(0, params),
    ]
    if "of int" not in words:  # integers are left alone there
        places.append(weighted)
    for place in places:
        with pytest.raises(TypeError, match=words) as caught:
            place(params)
        assert len(str(caught.value)) <= 300


@pytest.mark.slow
def test_python_floats_are_parameters():
    loss_fn = lambda params: (params["w"] * 2.0, params["w"] ** 2)  # noqa: E731
    params, state = {"w": 1.5}, METHOD.init({"w": 1.5})
    _, grads = mtl.per_task_value_and_grad(loss_fn)(params)
    _, (shared, heads) = mtl.split_value_and_grad(lambda w: w, lambda v, w: (2 * w, v * w))(
        1.5, 3.0
    )
    _, (update, _) = mtl.weighted_value_and_grad(loss_fn, METHOD)(params, state)
    _, (row, active) = mtl.one_task_value_and_grad(loss_fn, 2)(1, params)
    assert grads["w"].tolist() == [2.0, 3.0] and update["w"] == 5.0
    assert shared.tolist() == [2.0, 3.0] and heads == 1.5
    assert row["w"].tolist() == [0.0, 3.0] and active.tolist() == [False, True]
    assert METHOD.update(grads, state, params)[0]["w"] == 5.0


def test_all_gradient_functions_pass_arguments_on():
    def loss_fn(w, x, *, power):
        return (w * x) ** power, w * x

    w, x = jnp.asarray(3.0), jnp.asarray(2.0)
    want = [24.0, 2.0]
    assert mtl.per_task_value_and_grad(loss_fn)(w, x, power=2)[1].tolist() == want
    encode, decode = (lambda w, x, *, power: w * x), (lambda v, h, x, *, power: (h**power, v * h))
    _, (shared, _) = mtl.split_value_and_grad(encode, decode)(w, jnp.asarray(1.0), x, power=2)
    assert shared.tolist() == want
    _, (update, _) = mtl.weighted_value_and_grad(loss_fn, METHOD)(w, METHOD.init(w), x, power=2)
    assert update == sum(want)
    _, (row, _) = mtl.one_task_value_and_grad(loss_fn, 2)(0, w, x, power=2)
    assert row.tolist() == [24.0, 0.0]


@pytest.mark.parametrize("mode", sampled(["auto", "vmap", "unroll", "map"], ["vmap", "map"]))
def test_a_representation_may_hold_integers(mode):
    def encode(w):
        return {"h": jnp.stack([w, 2 * w]), "ids": jnp.array([1, 0])}

    def decode(v, r):
        h = r["h"][r["ids"]]
        return v * h[0], v * h[1] ** 2

    w = jnp.asarray(3.0)
    _, (shared, heads) = mtl.split_value_and_grad(encode, decode, mode=mode)(w, jnp.asarray(1.0))
    assert shared.tolist() == [2.0, 6.0] and heads == 15.0


def test_unknown_mode_is_refused():
    all_gradients = '"auto", "vmap", "unroll" or "map"'
    all_modes = '"auto", "vmap", "unroll", "map", "products" or "examples"'
    places = (
        (mtl.per_task_value_and_grad, [plain_losses], all_gradients),
        (mtl.split_value_and_grad, [plain_losses] * 2, all_gradients),
        (mtl.weighted_value_and_grad, [plain_losses, METHOD], all_modes),
    )
    for place, arguments, modes in places:
        with pytest.raises(ValueError) as caught:
            place(*arguments, mode="fast")
        assert str(caught.value) == f"{place.__name__}: mode must be {modes}; found 'fast'."


# --- split_value_and_grad ----------------------------------------------------------------------------


@pytest.mark.parametrize("named", sampled([False, True], [True]))
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


@pytest.mark.slow
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
