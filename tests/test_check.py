"""What `check` itself does: what it accepts, what it computes, and what it says, word for word.

Which optax transformation stands where is in `test_composition.py`.
"""

import doctest
import importlib

import jax
import jax.numpy as jnp
import optax
import pytest
from method_properties import SAMPLE, WITH_TARGET, every_method, make
from sampling import sampled

import mtl_optax as mtl

T = 3
FLOAT = jnp.float32
PARAMS = {
    "head": jax.ShapeDtypeStruct((2, 3), FLOAT),
    "shared": {"b": jax.ShapeDtypeStruct((), FLOAT), "w": jax.ShapeDtypeStruct((4, 2), FLOAT)},
}
BALANCE = mtl.sum_tasks(T)
WHOLE = optax.chain(BALANCE, optax.sgd(1e-2))
GUIDE = "See docs/composition.md."
REMEDY = (
    "\nWhat stands before or around a method is given gradients with a task axis. Put it after the method; "
    "before it, apply it per task: mtl_optax.per_task(inner, tasks). " + GUIDE
)


def refusal(tx, params=PARAMS, tasks=T, **given):
    with pytest.raises(ValueError) as raised:
        mtl.check(tx, params, tasks, **given)
    return str(raised.value)


def transformation(update, init=lambda params: ()):
    """One that takes any extra arguments."""
    return optax.GradientTransformationExtraArgs(
        init, lambda updates, state, params=None, **extra_args: update(updates, state, params)
    )


# --- what it accepts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", every_method(quick=SAMPLE))
def test_every_method_passes(name):
    tx = optax.chain(make(name, T), optax.adam(1e-2))
    assert mtl.check(tx, PARAMS, T).startswith(f"{name}: 3 tasks")


@pytest.mark.parametrize("name", every_method(quick=SAMPLE))
def test_every_method_with_named_tasks_passes(name):
    names = ("click", "buy", "cart")
    found = mtl.check(optax.chain(make(name, names), optax.adam(1e-2)), PARAMS, names)
    assert found == f"{name}: tasks 'buy', 'cart', 'click' in this order"


def test_nothing_is_computed():
    """Four tebibytes of parameters, and no data."""
    params = {"w": jax.ShapeDtypeStruct((2**20, 2**20), FLOAT)}
    tx = optax.chain(mtl.per_task(optax.clip_by_global_norm(1.0), T), mtl.moco(T), optax.adam(1e-2))
    mtl.check(mtl.skip_nonfinite(mtl.accumulate(tx, T, 2)), params, T)


@pytest.mark.parametrize("make_leaf", [jnp.zeros, lambda shape: 0.0], ids=["arrays", "numbers"])
def test_parameters_may_be_arrays_or_numbers(make_leaf):
    mtl.check(WHOLE, {"w": make_leaf((2, 3))}, T)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_of_sixteen_bits(dtype):
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), PARAMS)
    mtl.check(optax.chain(mtl.mgda(T), optax.adam(1e-2)), params, T)


def test_parameters_in_float64(x64):
    params = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float64)}
    mtl.check(optax.chain(mtl.gradnorm(T), optax.adam(1e-2)), params, T)


def test_a_multi_steps_object_is_refused_too():
    """It is no `GradientTransformation`, though it has `init` and `update`."""
    assert refusal(optax.MultiSteps(WHOLE, 2)).startswith("check: optax.MultiSteps, found at state")


@pytest.mark.parametrize("traced", sampled([True, False], [True]), ids=["shapes", "arrays"])
def test_the_extra_arguments_of_a_line_search(traced):
    def value_fn(params):
        return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    grad, value = PARAMS, jax.ShapeDtypeStruct((), FLOAT)
    if not traced:
        grad, value = jax.tree.map(lambda x: jnp.zeros(x.shape), (grad, value))
    search = mtl.drop_extra_args(optax.lbfgs(), "losses")
    for method in (BALANCE, mtl.scale_invariant(T)):
        tx = optax.chain(method, search)
        mtl.check(tx, PARAMS, T, value=value, grad=grad, value_fn=value_fn)


def test_losses_and_active_tasks_may_be_given():
    names = ("click", "buy", "cart")
    tx = optax.chain(mtl.scale_invariant(names), optax.adam(1e-2))
    losses = dict.fromkeys(names, jax.ShapeDtypeStruct((), FLOAT))
    mtl.check(tx, PARAMS, names, losses=losses, active=dict.fromkeys(names, True))
    assert refusal(tx, losses=jnp.ones(2)) == (
        "check: scale_invariant: losses must have shape (3,), one entry per task in the order ['buy', "
        "'cart', 'click']; found (2,)."
    )


def test_a_method_on_a_representation():
    mtl.check(mtl.multibalance(T), jax.ShapeDtypeStruct((64, 8), FLOAT), T)


def test_a_state_whose_structure_settles_after_the_first_step():
    """As that of `optax.monitor`."""

    def update(updates, state, params):
        return updates, {"steps": state.get("steps", jnp.zeros(())) + 1}

    mtl.check(optax.chain(BALANCE, transformation(update, lambda params: {})), PARAMS, T)


# --- what it returns ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sampled(sorted(WITH_TARGET), ["metabalance", "grad_surgery"]))
def test_a_method_with_a_target(name):
    """Tasks with names need it; of numbered ones it is the first if it is left out."""
    tasks, parameter = ("click", "buy"), {"w": PARAMS["head"]}
    factory = mtl.METHODS[name].factory
    method = factory(tasks, target="click")
    assert method.target == "click"
    found = mtl.check(method, parameter, tasks)
    assert found == mtl.check(method, parameter) == f"{name}: tasks 'buy', 'click' in this order"
    assert (factory(2).target, factory(2, target=1).target) == (0, 1)
    assert mtl.check(factory(2), parameter, 2) == f"{name}: 2 tasks"


def test_the_methods_with_a_target_are_those():
    found = {name for name in mtl.METHODS if make(name, T).target is not None}
    assert found == WITH_TARGET


def test_every_method_of_an_optimizer_is_listed():
    tasks = ("click", "buy", "cart")
    groups = {
        "a": optax.chain(mtl.metabalance(tasks, target="cart", reduce=False), mtl.mgda(T)),
        "b": mtl.skip_nonfinite(mtl.accumulate(mtl.sum_tasks(tasks), tasks, 2)),
    }
    tx = optax.partition(groups, {"head": "a", "shared": "b"})
    in_order = "tasks 'buy', 'cart', 'click' in this order"
    assert mtl.check(tx, PARAMS, tasks).split("\n") == [
        f"metabalance: {in_order}",
        f"mgda: {in_order}",
        f"sum_tasks: {in_order}",
    ]
    assert mtl.check(tx, PARAMS) == "metabalance: 3 tasks\nmgda: 3 tasks\nsum_tasks: 3 tasks"


# --- the tasks it reads ------------------------------------------------------------------------------


HIDDEN_TASKS = {
    "a method": mtl.mgda(T),
    "a chain": optax.chain(optax.scale(2.0), mtl.mgda(T), optax.adam(1e-2)),
    "two methods": optax.chain(mtl.metabalance(T, reduce=False), mtl.mgda(T)),
    "groups": optax.partition(
        {"a": mtl.mgda(T), "b": optax.chain(mtl.moco(T), optax.adam(1e-2)), "c": mtl.imtl_g(T)},
        {"head": "a", "shared": "b"},
    ),
    "a guard": mtl.skip_nonfinite(mtl.accumulate(WHOLE, T, 2)),
    "injected": optax.inject_hyperparams(mtl.cagrad, static_args=("tasks", "rescale"))(T, c=0.3),
}


@pytest.mark.parametrize("name", sampled(HIDDEN_TASKS, ["a method", "groups", "a guard"]))
def test_the_number_of_tasks_is_read_from_the_methods(name):
    tx = HIDDEN_TASKS[name]
    assert mtl.check(tx, PARAMS) == mtl.check(tx, PARAMS, T)


def test_methods_that_disagree_are_refused():
    groups = {"a": mtl.mgda(2), "b": optax.chain(mtl.moco(4), optax.adam(1e-2))}
    tx = optax.partition(groups, {"head": "a", "shared": "b"})
    assert refusal(tx, tasks=None) == (
        "check: the method of state.inner_states['b'].inner_state[0] is made for 4 tasks, expected 2. Give "
        "check and all methods the number of losses that loss_fn returns."
    )
    names = ("click", "buy")
    first = mtl.metabalance(names, target="buy", reduce=False)
    tx = optax.chain(first, mtl.mgda(("clik", "buy")))
    assert refusal(tx, tasks=names) == (
        "check: mgda: losses must have one entry per task, ['buy', 'clik']; found ['buy', 'click']."
    )


def test_without_a_method_the_tasks_are_needed():
    expected = (
        "check: found no method of mtl_optax in this optimizer: put one, such as "
        "mtl_optax.sum_tasks(tasks), before the optimizer. For a transformation of your own that removes "
        "the task axis give check tasks=, their number or names."
    )
    own = transformation(lambda u, state, params: (jax.tree.map(lambda x: x.sum(0), u), state))
    for tx in (optax.adam(1e-2), own, mtl.per_task(optax.trace(0.9), T)):
        assert refusal(tx, tasks=None) == expected
    assert mtl.check(own, PARAMS, T) == ""


# --- numbers in sixteen bits -------------------------------------------------------------------------

HALF = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), PARAMS)


def injected(factory, *args, static=(), dtype=None, **numbers):
    return optax.inject_hyperparams(factory, static, dtype)(*args, **numbers)


@pytest.mark.parametrize("decay", [0.999, lambda step: 0.999], ids=["a number", "a schedule"])
def test_a_decay_that_is_rounded_to_one_is_refused(decay):
    make_it = lambda **given: injected(  # noqa: E731
        lambda decay: optax.chain(mtl.per_task(optax.ema(decay), T), BALANCE), **given
    )
    expected = (
        "check: optax.inject_hyperparams, found at state, rounds decay from 0.999 to 1 in bfloat16, the "
        "dtype of the parameters. Give it hyperparam_dtype=jnp.float32, or name this argument in "
        "static_args."
    )
    assert refusal(make_it(decay=decay), HALF, None) == expected
    mtl.check(make_it(decay=decay), PARAMS)
    mtl.check(make_it(decay=0.9), HALF)


def test_the_numbers_of_a_method_are_looked_at_too():
    make_it = lambda **given: optax.chain(  # noqa: E731
        injected(mtl.metabalance, T, static=("tasks", "target"), ema_decay=0.999, **given)
    )
    assert "found at state[0], rounds ema_decay from 0.999 to 1 in bfloat16" in refusal(
        make_it(), HALF
    )
    mtl.check(make_it(dtype=FLOAT), HALF)


def test_a_number_that_is_rounded_to_nothing_is_refused():
    half = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float16), PARAMS)
    tx = optax.chain(BALANCE, injected(optax.adam, 1e-3, static=("b1", "b2")))
    assert "found at state[1], rounds eps from 1e-08 to 0 in float16" in refusal(tx, half)
    # Adam counts its moments in the dtype of its numbers: for it the other remedy is the right one.
    named = injected(optax.adam, 1e-3, static=("b1", "b2", "eps", "eps_root"))
    mtl.check(optax.chain(BALANCE, named), half)


# --- what it says ------------------------------------------------------------------------------------


def test_nothing_removes_the_task_axis():
    expected = (
        "check: nothing removes the task axis: the update of leaf ['head'] has shape (3, 2, 3), expected "
        "(2, 3) (and 2 more leaves). Put a method, such as mtl_optax.sum_tasks(tasks), before the "
        "optimizer."
    )
    for tx in (
        optax.adam(1e-2),
        optax.sgd(1e-2),
        optax.chain(mtl.per_task(optax.trace(0.9), T), optax.sgd(1e-2)),
        optax.chain(mtl.mgda(T, reduce=False), optax.adam(1e-2)),
    ):
        assert refusal(tx) == expected


WRONG_NUMBER = {
    "chain": (optax.chain(mtl.mgda(2), optax.sgd(1.0)), "[0]", "2 tasks"),
    "one task": (optax.chain(optax.scale(2.0), mtl.mgda(1)), "[1]", "1 task"),
    "names": (mtl.mgda(("click", "buy")), "", "2 tasks"),
    "one of two": (
        optax.partition(
            {"a": BALANCE, "b": optax.chain(mtl.moco(4), optax.adam(1e-2))},
            {"head": "a", "shared": "b"},
        ),
        ".inner_states['b'].inner_state[0]",
        "4 tasks",
    ),
}


@pytest.mark.parametrize("name", WRONG_NUMBER)
def test_a_wrong_number_of_tasks(name):
    tx, where, number = WRONG_NUMBER[name]
    assert refusal(tx) == (
        f"check: the method of state{where} is made for {number}, expected 3. Give check and all methods "
        "the number of losses that loss_fn returns."
    )


def test_other_names_of_tasks():
    tx = optax.chain(mtl.mgda(("click", "buy")), optax.sgd(1.0))
    assert refusal(tx, tasks=("clik", "buy")) == (
        "check: mgda: losses must have one entry per task, ['buy', 'click']; found ['buy', 'clik']."
    )
    mtl.check(tx, PARAMS, 2)


def test_a_wrong_number_of_tasks_in_what_has_no_weights():
    tx = optax.chain(mtl.per_task(optax.trace(0.9), 2), BALANCE)
    assert refusal(tx, {"w": PARAMS["head"]}) == (
        "check: per_task: updates must carry a leading task axis of size 2: leaf ['w'] has shape "
        "(3, 2, 3), expected (2, 2, 3). The task axis has size 3 but tasks=2: give the number of "
        "losses that loss_fn returns."
    )


def test_a_wrapper_is_blamed_only_if_it_holds_a_method():
    optimizer = optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation()
    found = refusal(optax.chain(optax.adaptive_grad_clip(0.1), BALANCE, optimizer))
    assert "MultiSteps" not in found and "Shape mismatch" in found


def test_several_methods_one_after_the_other():
    found = refusal(optax.chain(BALANCE, mtl.mgda(T)), {"w": PARAMS["head"]})
    assert found.startswith(
        "check: mgda: updates must carry a leading task axis of size 3: leaf ['w'] has shape (2, 3), "
        "expected (3, 2, 3). These have no task axis: "
    )
    assert "A method before this one needs reduce=False" in found


def test_extra_arguments_that_are_missing():
    found = refusal(optax.chain(BALANCE, optax.polyak_sgd()))
    assert found.startswith("check: update raises TypeError: ") and "'value'" in found
    assert found.endswith(
        "\nGive check the extra arguments that update is given, such as mtl_optax.check(tx, params, "
        "value=...)."
    )


def test_init_that_raises():
    """By itself, not because of the task axis: then there is no advice about it."""
    assert refusal(optax.inject_hyperparams(mtl.mgda)(tasks=T)) == (
        "check: init raises TypeError: mgda: tasks must be a Python integer >= 1 or a collection of task "
        "names, found a JAX array. Under optax.inject_hyperparams name it static: static_args=('tasks', "
        "...)."
    )


def test_words_in_the_messages_of_others_decide_nothing():
    for error in (
        ValueError("no losses today"),
        TypeError("must be real floating point: 'losses'"),
    ):

        def update(updates, state, params, error=error):
            raise error

        assert (
            refusal(transformation(update))
            == f"check: update raises {type(error).__name__}: {error}{REMEDY}"
        )


def test_a_long_message_of_others_is_cut():
    def update(updates, state, params):
        raise ValueError("shapes\n" + "(1, 2, 3) " * 100)

    found = refusal(transformation(update))
    assert found.startswith("check: update raises ValueError: shapes (1, 2, 3) (1, 2, 3)")
    assert found.endswith("..." + REMEDY) and len(found) <= 300


def test_an_error_without_a_text():
    def update(updates, state, params):
        raise AssertionError

    assert refusal(transformation(update)) == "check: update raises AssertionError" + REMEDY


def test_updates_of_another_shape():
    def update(updates, state, params):
        return jax.tree.map(lambda u: u[None, None], updates), state

    assert refusal(optax.chain(BALANCE, transformation(update))) == (
        "check: the update of leaf ['head'] has shape (1, 1, 2, 3), expected (2, 3) (and 2 more leaves). "
        + GUIDE
    )


def test_updates_of_another_structure():
    def update(updates, state, params):
        return updates["head"], state

    assert refusal(optax.chain(BALANCE, transformation(update))) == (
        "check: the updates differ in structure from the parameters: the updates have leaf (the root), "
        f"which the parameters do not have. {GUIDE}"
    )


def test_a_state_of_another_shape():
    def update(updates, state, params):
        return updates, state[None]

    tx = optax.chain(BALANCE, transformation(update, lambda params: jnp.zeros(2)))
    assert refusal(tx) == (
        "check: state[1] changes its shape from (2,) to (1, 2), which jax.lax.scan refuses and jax.jit "
        f"compiles anew. {GUIDE}"
    )


def test_a_state_of_another_dtype():
    def update(updates, state, params):
        return updates, state.astype(jnp.bfloat16)

    tx = optax.chain(BALANCE, transformation(update, lambda params: jnp.zeros(2)))
    assert refusal(tx) == (
        "check: state[1] changes its dtype from float32 to bfloat16, which jax.lax.scan refuses and "
        f"jax.jit compiles anew. {GUIDE}"
    )


def test_a_state_whose_structure_never_settles():
    def update(updates, state, params):
        return jax.tree.map(lambda u: u.sum(0), updates), (*state, jnp.zeros(()))

    assert refusal(transformation(update)) == (
        "check: the state changes its structure at every update, which jax.jit compiles anew each time: "
        f"new states have leaf [1], which old ones do not have. {GUIDE}"
    )


def test_the_error_that_was_caught_is_its_cause():
    with pytest.raises(ValueError) as raised:
        mtl.check(optax.chain(optax.adaptive_grad_clip(0.1), BALANCE), PARAMS, T)
    assert "Shape mismatch" in str(raised.value.__cause__)


def test_its_example_raises_what_it_says():
    """A doctest whose `Traceback` did not match would be no example of a refusal."""
    module = importlib.import_module("mtl_optax.checking")
    examples = doctest.DocTestFinder().find(mtl.check, "check", module=module)[0].examples
    assert [bool(example.exc_msg) for example in examples] == [False] * 5 + [True]
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("method, noise", [("relobralo", 0.5), ("graddrop", PARAMS)])
def test_random_numbers_as_an_extra_argument_hide_no_mistake(method, noise):
    """For `relobralo`, `noise` is a number, and for `graddrop` a tree like the parameters."""
    method = mtl.METHODS[method].factory(3)
    mtl.check(optax.chain(method, optax.sgd(0.1)), PARAMS, noise=noise)
    with pytest.raises(ValueError, match="weight decay"):
        mtl.check(optax.chain(optax.add_decayed_weights(0.1), method), PARAMS, noise=noise)
    with pytest.raises(ValueError, match="mixes the tasks"):
        mtl.check(optax.chain(optax.clip_by_global_norm(1.0), method), PARAMS, noise=noise)
