"""A method is a value, equal to what was made of equal arguments, and a constant for JAX; its options."""

import copy
import functools
import inspect
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from method_properties import BROAD, every_method, make
from sampling import sampled

import mtl_optax as mtl

T = 3
NAMES = sorted(mtl.METHODS)
NAMED = ("click", "buy", "cart")
ADAM = optax.scale_by_adam()  # compared by identity
# Optimizers are functions inside of functions, which pickle does not take.
WITH_AN_OPTIMIZER = {"adatask"}


def again(name, **options):
    return make(name, T, **({"inner": ADAM} if name == "adatask" else {}), **options)


def message(kind, call):
    with pytest.raises(kind) as raised:
        call()
    assert len(str(raised.value)) <= 300 and "0x" not in str(raised.value)
    return str(raised.value)


# --- equality ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", every_method(quick=BROAD))
def test_a_method_is_a_constant_that_equals_what_equal_arguments_make(name):
    tx, other = again(name), again(name)
    assert tx is not other and tx == other and hash(tx) == hash(other)
    assert tx != make(name, 4) and tx != make(name, NAMED) and tx != again(name, axis_name="data")
    assert tx != optax.GradientTransformationExtraArgs(*tx)
    assert repr(tx).startswith(f"{name}(3") and "0x" not in repr(tx)

    copies = [copy.copy(tx), copy.deepcopy(tx), tx._replace(), tx._replace(update=tx.update)]
    if name not in WITH_AN_OPTIMIZER:
        copies.append(pickle.loads(pickle.dumps(tx)))
    for copied in copies:
        assert isinstance(copied, mtl.Method) and copied == tx and repr(copied) == repr(tx)
    assert not isinstance(tx._replace(update=other.update), mtl.Method)

    assert jax.tree.leaves(tx) == [] and jax.tree.map(jnp.ones_like, {"tx": tx})["tx"] is tx
    traces = []
    compiled = jax.jit(lambda method: traces.append(method) or jnp.zeros(method.num_tasks))
    for method in (tx, other, again(name, axis_name="data")):
        compiled(method)
    assert traces == [tx, again(name, axis_name="data")]


@pytest.mark.parametrize("name", NAMES)
def test_the_two_functions_hold_all_that_a_method_knows(name):
    """What takes a named tuple apart and makes it again loses nothing."""
    tx = make(name, NAMED)
    rebuilt = type(tx)(*tx)
    assert len(tx) == 2 and rebuilt is not tx and vars(rebuilt) == {}
    assert rebuilt == tx and hash(rebuilt) == hash(tx) and repr(rebuilt) == repr(tx)
    for what in ("name", "tasks", "task_names", "num_tasks", "target", "needs", "rule", "options"):
        assert getattr(rebuilt, what) == getattr(tx, what)


def test_arguments_are_compared_by_value_and_functions_by_identity():
    weights = np.array([1.0, 2.0, 0.5])
    tx = mtl.fixed_weights(T, weights)
    same = mtl.fixed_weights(T, weights.copy())
    assert tx == same and hash(tx) == hash(same)
    weights[0] = 5.0  # the method keeps its own
    assert tx == same != mtl.fixed_weights(T, weights)
    assert tx.update(jnp.ones((T, 2)), tx.init(jnp.zeros(2)))[0].tolist() == [3.5, 3.5]
    assert mtl.fixed_weights(T, jnp.ones(T)) == mtl.fixed_weights(T, jnp.ones(T))
    assert mtl.fixed_weights(T, jnp.ones(T)) != mtl.fixed_weights(T, jnp.ones(T, jnp.bfloat16))

    assert mtl.metabalance(T) == mtl.metabalance(T, blocks="leaf", ema_decay=0.9)
    assert mtl.emtl(NAMED) == mtl.emtl(set(NAMED))
    assert mtl.cr_mogm(T, base=mtl.mgda(T)) == mtl.cr_mogm(T, base=mtl.mgda(T))
    assert mtl.cr_mogm(T, base=mtl.mgda(T)) != mtl.cr_mogm(T, base=mtl.imtl_g(T))
    sgd = optax.sgd(0.1)
    assert mtl.gradnorm(T, optimizer=sgd) == mtl.gradnorm(T, optimizer=sgd) != mtl.gradnorm(T)
    assert mtl.gradnorm(T, optimizer=sgd) != mtl.gradnorm(T, optimizer=optax.sgd(0.1))


def test_methods_of_ones_own_rule():
    rule = mtl.WeightRule(frozenset(), lambda inputs, state: (jnp.ones(T), state))
    tx = mtl.from_rule("mine", NAMED, rule, update_every=2)
    assert repr(tx) == "mine(('buy', 'cart', 'click'), update_every=2)"
    assert tx == mtl.from_rule("mine", NAMED, rule, update_every=2) == copy.deepcopy(tx)
    assert jax.jit(lambda tx: jnp.zeros(tx.num_tasks))(tx).shape == (T,)
    for other in (
        mtl.from_rule("yours", NAMED, rule, update_every=2),
        mtl.from_rule("mine", T, rule, update_every=2),
        mtl.from_rule("mine", NAMED, rule),
        mtl.from_rule("mine", NAMED, rule._replace(weigh=lambda inputs, state: None)),
    ):
        assert other != tx


def test_what_a_rule_is_made_of_has_a_module():
    assert all(getattr(mtl.rule, name) is getattr(mtl, name) for name in mtl.rule.__all__)


def test_repr_shows_what_was_given():
    assert repr(mtl.metabalance(("click", "buy"), target="buy", relax_factor=0.7)) == (
        "metabalance(('buy', 'click'), target='buy', relax_factor=0.7)"
    )
    assert repr(mtl.mgda(2)) == "mgda(2)"
    assert repr(mtl.uncertainty(("a", "b"), init={"a": 0.1, "b": 0.2}, blocks=jnp.shape)) == (
        "uncertainty(('a', 'b'), init={'a': 0.1, 'b': 0.2}, blocks=shape)"
    )
    shown = repr(mtl.cr_mogm(2, base=mtl.mgda(2, normalize="l2"), ema_decay=jnp.float32(0.5)))
    assert shown == "cr_mogm(2, base=mgda(2, normalize='l2'), ema_decay=Array(0.5, dtype=float32))"
    assert repr(mtl.gradnorm(2, optimizer=optax.sgd(0.1))) == (
        "gradnorm(2, optimizer=GradientTransformationExtraArgs(...))"
    )


def test_the_functions_say_what_they_take():
    tx = mtl.mgda(2)
    assert [*inspect.signature(tx.update).parameters] == [
        *("updates", "state", "params", "losses", "active", "extra_args")
    ]
    for word in ("updates: ", "state: ", "params: ", "losses: ", "active: "):
        assert word in tx.update.__doc__
    assert "params: " in tx.init.__doc__
    assert [*inspect.signature(mtl.mgda).parameters] == ["tasks", "normalize", "options"]


# --- where trees are mapped and functions compiled ---------------------------------------------------


def weigh(method):
    return method.update(jnp.eye(2), method.init(jnp.zeros(2)))[0]


def test_a_method_with_a_traced_option_is_no_constant():
    expected = (
        "metabalance(2, relax_factor=<traced float32[]>) depends on a traced value, so that it is no "
        "constant and cannot be an argument of a compiled function. Make it inside of that function."
    )

    @jax.jit
    def step(relax_factor):
        method = mtl.metabalance(2, relax_factor=relax_factor)
        for use in (hash, mtl.mgda(2).__eq__, method.__eq__, jax.tree.leaves, jax.jit(weigh)):
            other = mtl.mgda(2) if use == method.__eq__ else method
            assert message(TypeError, functools.partial(use, other)) == expected

        def loss_fn(h, carrier):
            copies, token = mtl.fork(method, carrier, h)
            return mtl.join(jnp.stack([copies[0].sum(), 2 * copies[1].sum()]), token)

        mtl.cr_mogm(2, base=method).init(jnp.ones(2))
        assert message(TypeError, lambda: hash(mtl.cr_mogm(2, base=method))) == expected
        through_fork = jax.grad(loss_fn)(jnp.ones(2), mtl.fork_init(method, jnp.ones(2)))
        return weigh(method), through_fork

    update, through_fork = step(0.5)
    assert update.tolist() == weigh(mtl.metabalance(2, relax_factor=0.5)).tolist()
    assert through_fork.tolist() == [2.5, 2.5]  # 1 + 2 * (0.5 / 2 + 0.5)


def test_methods_in_equinox():
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        w: jax.Array
        method: mtl.Method

    model = Model(jnp.ones(2), mtl.mean_tasks(2))
    arrays, rest = eqx.partition(model, eqx.is_array)
    for one in (eqx.combine(arrays, rest), jax.tree.map(lambda leaf: 2 * leaf, model)):
        assert one.method is model.method
    assert eqx.filter_jit(lambda model: weigh(model.method) * model.w)(model).tolist() == [0.5, 0.5]
    grads = eqx.filter_grad(lambda model: jnp.sum(weigh(model.method) * model.w))(model)
    assert grads.w.tolist() == [0.5, 0.5] and isinstance(grads.method, mtl.Method)


def test_methods_in_flax():
    class Linen(nn.Module):
        method: mtl.Method

        @nn.compact
        def __call__(self, x):
            return weigh(self.method) * x

    assert Linen(mtl.mean_tasks(2)).apply({}, 2.0).tolist() == [1.0, 1.0]
    assert isinstance(Linen(mtl.mean_tasks(2)).clone().method, mtl.Method)

    class Model(nnx.Module):
        def __init__(self, method):
            self.method, self.w = method, nnx.Param(jnp.ones(2))

    model = Model(mtl.mean_tasks(2))
    step = nnx.jit(lambda model: weigh(model.method) * model.w[...])
    assert step(model).tolist() == [0.5, 0.5]
    graph, state = nnx.split(model)
    assert isinstance(nnx.merge(graph, state).method, mtl.Method)

    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=mtl.mean_tasks(2))
    state = jax.jit(lambda state: state.apply_gradients(grads={"w": jnp.eye(2)}))(state)
    assert state.params["w"].tolist() == [1.5, 1.5] and isinstance(state.tx, mtl.Method)


def test_a_method_is_a_static_argument_and_a_key():
    static = jax.jit(lambda method, x: weigh(method) * x, static_argnums=0)
    assert static(mtl.mean_tasks(2), 2.0).tolist() == [1.0, 1.0]
    assert {mtl.mean_tasks(2): "found"}[mtl.mean_tasks(2)] == "found"


# --- options -----------------------------------------------------------------------------------------

# What takes a function, and what is a method itself.
TAKES_FUNCTIONS = {("famo", "weight_lr")}
METHODS_INSIDE = {"base"}
DECAYS = [
    *(
        (name, "ema_decay")
        for name in (
            *("cr_mogm", "db_mtl", "grad_vaccine", "gradcraft", "inverse_norm", "lr_annealing"),
            *("metabalance", "moco", "multibalance", "ntk", "pcd", "relobralo"),
        )
    ),
    *(("scale_by_mtadam", which) for which in ("b1", "b2", "b3")),
    *(("scale_by_pub", which) for which in ("b1", "b2")),
]


def own_options(name):
    _, *options = inspect.signature(mtl.METHODS[name].factory).parameters
    return [option for option in options if option != "options"]


def all_options(name):
    weighs = "options" in inspect.signature(mtl.METHODS[name].factory).parameters
    return [*own_options(name), *(mtl.core.method.Options._fields if weighs else ())]


@pytest.mark.parametrize("name", NAMES)
def test_misspelt_options(name):
    for option in all_options(name):
        if len(option) > 4:
            call = functools.partial(make, name, T, **{option[:-2]: 1})
            expected = f"{name}: takes no argument {option[:-2]}. Did you mean {option}?"
            assert message(TypeError, call) == expected
    unknown = message(TypeError, lambda: make(name, T, zzz=1))
    assert unknown == (
        f"{name}: takes no argument zzz. It takes tasks, "
        f"{', '.join(dict.fromkeys(all_options(name)))}."
    )


@pytest.mark.parametrize("name", NAMES)
def test_options_of_the_wrong_kind(name):
    for option in set(own_options(name)) - METHODS_INSIDE:
        wrong = [optax.constant_schedule(0.5), "high", float("nan"), np.array(["a"] * T)]
        if (name, option) in TAKES_FUNCTIONS:
            wrong.pop(0)
        if option == "axis_name":
            wrong = [3, optax.constant_schedule(0.5), float("nan"), ("data", 0)]
        for value in wrong:
            with pytest.raises((TypeError, ValueError), match=rf"\A{name}: .*{option} must "):
                make(name, T, **{option: value})


@pytest.mark.parametrize(("option", "value", "expected"), [
    ("reduce", "no", "reduce must be True or False; found 'no'."),
    ("reduce", 0, "reduce must be True or False; found 0."),
    ("update_every", True, "update_every must be a Python integer >= 1, found True."),
    ("update_every", 2.0, "update_every must be a Python integer >= 1, found 2.0."),
    ("axis_name", 3, "axis_name must be the name of a mapped axis, or a tuple of names; found 3."),
])  # fmt: skip
def test_common_options_of_the_wrong_kind(option, value, expected):
    call = functools.partial(mtl.mgda, T, **{option: value})
    assert message((TypeError, ValueError), call) == f"mgda: {expected}"


@pytest.mark.parametrize(("name", "option"), DECAYS)
def test_an_average_that_never_moves(name, option):
    found = message(ValueError, lambda: make(name, T, **{option: 1.0}))
    assert found == f"{name}: {option} must be in [0, 1), found 1.0."
    make(name, T, **{option: jnp.float32(1.0)})  # arrays pass, as schedules do


def test_a_schedule_where_a_number_is_expected():
    found = message(
        TypeError, lambda: mtl.metabalance(T, relax_factor=optax.constant_schedule(0.5))
    )
    assert found == (
        "metabalance: relax_factor must be a number, found the function <lambda>. For a schedule give "
        "metabalance to optax.inject_hyperparams, and the schedule to what that returns."
    )
    inject = optax.inject_hyperparams(mtl.metabalance, static_args=("tasks", "target"))
    inject(T, relax_factor=optax.constant_schedule(0.5)).init(jnp.zeros(2))
    assert message(TypeError, lambda: inject(T, relax=0.5).init(jnp.zeros(2))) == (
        "metabalance: takes no argument relax. Did you mean relax_factor?"
    )


# One number a task: in the order buy, cart, click.
PER_TASK = {
    ("cosmos", "preference"): [0.2, 0.3, 0.5],
    ("dualproj", "preference"): [0.2, 0.3, 0.5],
    ("famo", "min_losses"): [0.1, 0.2, 0.3],
    ("fixed_weights", "weights"): [0.2, 0.3, 0.5],
    ("graddrop", "leak"): [0.2, 0.3, 0.5],
    ("multibalance", "prior"): [0.2, 0.3, 0.5],
    ("pbi", "preference"): [0.2, 0.3, 0.5],
    ("pbi", "reference"): [0.1, 0.2, 0.3],
    ("pcd", "tau"): [0.2, 0.3, 0.5],
    ("scale_by_mtadam", "ranks"): [0.2, 0.3, 0.5],
    ("uncertainty", "init"): [0.2, 0.3, 0.5],
    ("upgrad", "preference"): [0.2, 0.3, 0.5],
}


@pytest.mark.parametrize(
    ("name", "option"),
    sampled(PER_TASK, [("famo", "min_losses"), ("multibalance", "prior"), ("pcd", "tau")]),
)
def test_numbers_by_task_name(name, option):
    numbers = PER_TASK[name, option]
    by_name = dict(zip(["buy", "cart", "click"], numbers, strict=True))
    grads = jnp.array([[1.0, 0.2], [-0.3, 1.0], [0.4, 0.5]])
    found = []
    for value in (numbers, np.array(numbers), dict(reversed(by_name.items()))):
        tx = make(name, NAMED, **{option: value})
        state = tx.init(jnp.zeros(2))
        for _ in range(2):
            update, state = tx.update(grads, state, losses=jnp.array([0.7, 1.3, 0.4]))
        found.append(np.asarray(update).tolist())
    assert found[0] == found[1] == found[2]
    turned = make(name, NAMED, **{option: numbers[::-1]})
    assert turned != tx

    for wrong in ({"buy": 0.1, "cart": 0.1}, by_name | {"view": 0.1}):
        assert message(ValueError, lambda w=wrong: make(name, NAMED, **{option: w})) == (
            f"{name}: {option} must have one entry per task, ['buy', 'cart', 'click']; found "
            f"{sorted(wrong)}."
        )
    for wrong in ([0.1, 0.2, float("nan")], {**by_name, "buy": "high"}, by_name | {"buy": jnp.sin}):
        with pytest.raises((TypeError, ValueError), match=f"{name}: {option} must be "):
            make(name, NAMED, **{option: wrong})
