"""What `check` itself does: what it accepts, what it computes, and what it says, word for word.

Which optax transformation stands where is in `test_composition.py`.
"""

import doctest
import importlib

import jax
import jax.numpy as jnp
import optax
import pytest
from method_properties import make

import mtl_optax as mtl

T = 3
FLOAT = jnp.float32
PARAMS = {
    "head": jax.ShapeDtypeStruct((2, 3), FLOAT),
    "shared": {"b": jax.ShapeDtypeStruct((), FLOAT), "w": jax.ShapeDtypeStruct((4, 2), FLOAT)},
}
BALANCE = mtl.sum_tasks(T)
WHOLE = optax.chain(BALANCE, optax.sgd(1e-2))
GUIDE = "See 'Composition with optax' in the README."
REMEDY = (
    "\nWhat stands before or around a method is given gradients with a task axis. Put it after the method, "
    "or, if it stands before, lift it over the tasks: mtl_optax.per_task(inner, 3). " + GUIDE
)


def refusal(tx, params=PARAMS, num_tasks=T, **given):
    with pytest.raises(ValueError) as raised:
        mtl.check(tx, params, num_tasks, **given)
    return str(raised.value)


def transformation(update, init=lambda params: ()):
    """One that takes any extra arguments."""
    return optax.GradientTransformationExtraArgs(
        init, lambda updates, state, params=None, **extra_args: update(updates, state, params)
    )


# --- what it accepts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(mtl.METHODS))
def test_every_method_passes(name):
    tx = optax.chain(make(name, T), optax.adam(1e-2))
    assert mtl.check(tx, PARAMS, T).startswith(f"{name}: 3 tasks")


@pytest.mark.parametrize("name", sorted(mtl.METHODS))
def test_every_method_with_named_tasks_passes(name):
    names = ("click", "buy", "cart")
    mtl.check(optax.chain(make(name, names), optax.adam(1e-2)), PARAMS, names)


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


@pytest.mark.parametrize("traced", [True, False], ids=["shapes", "arrays"])
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
    assert "losses must have shape (3,)" in refusal(tx, losses=jnp.ones(2))


def test_a_method_on_a_representation():
    mtl.check(mtl.multibalance(T), jax.ShapeDtypeStruct((64, 8), FLOAT), T)


def test_a_state_whose_structure_settles_after_the_first_step():
    """As that of `optax.monitor`."""

    def update(updates, state, params):
        return updates, {"steps": state.get("steps", jnp.zeros(())) + 1}

    mtl.check(optax.chain(BALANCE, transformation(update, lambda params: {})), PARAMS, T)


# --- what it returns ---------------------------------------------------------------------------------

HAVE_A_TARGET = {"grad_similarity", "grad_surgery", "lr_annealing", "metabalance", "ol_aux", "pcd"}


@pytest.mark.parametrize("name", sorted(HAVE_A_TARGET))
def test_the_target_is_named(name):
    """Left out, it is the first name in sorted order, whatever order the names are given in."""
    tasks, parameter = ("click", "buy"), {"w": PARAMS["head"]}
    of_tasks = f"{name}: tasks 'buy', 'click' in this order, target "
    factory = mtl.METHODS[name].factory
    assert mtl.check(factory(tasks), parameter, tasks) == f"{of_tasks}'buy'"
    assert mtl.check(factory(tasks, target="click"), parameter, tasks) == f"{of_tasks}'click'"
    assert mtl.check(factory(2, target=1), parameter, 2) == f"{name}: 2 tasks, target 1"


def test_the_methods_with_a_target_are_those():
    found = {name for name in mtl.METHODS if make(name, T).target is not None}
    assert found == HAVE_A_TARGET


def test_every_method_of_an_optimizer_is_listed():
    tasks = ("click", "buy", "cart")
    groups = {
        "a": optax.chain(mtl.metabalance(tasks, target="cart", reduce=False), mtl.mgda(T)),
        "b": mtl.skip_nonfinite(mtl.accumulate(mtl.sum_tasks(tasks), tasks, 2)),
    }
    tx = optax.partition(groups, {"head": "a", "shared": "b"})
    in_order = "tasks 'buy', 'cart', 'click' in this order"
    assert mtl.check(tx, PARAMS, tasks).split("\n") == [
        f"metabalance: {in_order}, target 'cart'",
        "mgda: 3 tasks",
        f"sum_tasks: {in_order}",
    ]


# --- what it says ------------------------------------------------------------------------------------


def test_nothing_removes_the_task_axis():
    expected = (
        "check: nothing removes the task axis: the update of leaf ['head'] has shape (3, 2, 3), expected "
        "(2, 3) (and 2 more leaves). Put a method, such as mtl_optax.sum_tasks(3), before the optimizer."
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
        f"check: num_tasks=3, but the method of state{where} is made for {number}. Give both the number of "
        "losses that loss_fn returns."
    )


def test_other_names_of_tasks():
    tx = optax.chain(mtl.mgda(("click", "buy")), optax.sgd(1.0))
    assert refusal(tx, num_tasks=("clik", "buy")) == (
        "check: the task names are ['buy', 'clik'], but mgda is made for ['buy', 'click']. Give both the "
        "names of the losses that loss_fn returns."
    )
    mtl.check(tx, PARAMS, 2)


def test_a_wrong_number_of_tasks_in_what_has_no_weights():
    tx = optax.chain(mtl.per_task(optax.trace(0.9), 2), BALANCE)
    assert refusal(tx, {"w": PARAMS["head"]}) == (
        "check: update raises ValueError: per_task: updates must carry a leading task axis of size 2: leaf "
        "['w'] has shape (3, 2, 3), expected (2, 2, 3). The task axis has size 3 but num_tasks=2: give the "
        "number of losses that loss_fn returns." + REMEDY
    )


def test_a_wrapper_is_blamed_only_if_it_holds_a_method():
    optimizer = optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation()
    found = refusal(optax.chain(optax.adaptive_grad_clip(0.1), BALANCE, optimizer))
    assert "MultiSteps" not in found and "Shape mismatch" in found


def test_several_methods_one_after_the_other():
    found = refusal(optax.chain(BALANCE, mtl.mgda(T)), {"w": PARAMS["head"]})
    assert found == (
        "check: update raises ValueError: mgda: updates must carry a leading task axis of size 3: leaf "
        "['w'] has shape (2, 3), expected (3, 2, 3). These have no task axis. Where they were already "
        "summed over tasks, or are one task's, take one gradient per task with "
        "mtl_optax.per_task_value_and_grad and put this transformation before the optimizer. Where "
        "optax.MultiSteps is around it, use mtl_optax.accumulate in its place. Where another method is "
        "before it, make that one with reduce=False." + REMEDY
    )


def test_extra_arguments_that_are_missing():
    found = refusal(optax.chain(BALANCE, optax.polyak_sgd()))
    assert found.startswith("check: update raises TypeError: ") and "'value'" in found
    assert found.endswith(
        "\nGive check the extra arguments that update is given, such as mtl_optax.check(tx, params, "
        "num_tasks, value=...)."
    )


def test_init_that_raises():
    """By itself, not because of the task axis: then there is no advice about it."""
    assert refusal(mtl.mgda(T, blocks="layer")) == (
        'check: init raises ValueError: blocks must be "all", "leaf" or a callable (path, leaf) -> label; '
        "found 'layer'."
    )
    assert refusal(optax.inject_hyperparams(mtl.mgda)(num_tasks=T)) == (
        "check: init raises TypeError: mgda: num_tasks must be a Python integer, found a JAX array. Under "
        "optax.inject_hyperparams name it static: static_args=('num_tasks', ...)."
    )


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
        f"check: the updates differ in structure from the parameters: {jax.tree.structure(0)} and "
        f"{jax.tree.structure(PARAMS)}. {GUIDE}"
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
        "check: the state changes its structure at every update, from PyTreeDef((*,)) to "
        f"PyTreeDef((*, *)), which jax.jit compiles anew each time. {GUIDE}"
    )


def test_the_error_that_was_caught_is_its_cause():
    with pytest.raises(ValueError) as raised:
        mtl.check(optax.chain(optax.adaptive_grad_clip(0.1), BALANCE), PARAMS, T)
    assert "Shape mismatch" in str(raised.value.__cause__)


def test_its_example_raises_what_it_says():
    """A doctest whose `Traceback` did not match would be no example of a refusal."""
    module = importlib.import_module("mtl_optax.checking")
    examples = doctest.DocTestFinder().find(mtl.check, "check", module=module)[0].examples
    assert [bool(example.exc_msg) for example in examples] == [False] * 6 + [True]
    assert doctest.testmod(module).failed == 0
