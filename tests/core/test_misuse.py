"""The mistakes that people make with such transformations, each with its own message, word for word.

What shapes cannot show is said in `test_an_order_of_tasks_that_differs_cannot_be_seen`; what only a whole
optimizer shows is in `test_check.py` and `test_composition.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from method_properties import WITH_TARGET, make

import mtl_optax as mtl

T = 3
PARAMS = {"b": jnp.ones((2,)), "w": jnp.ones((4, 2))}
GRADS = jax.tree.map(lambda p: jnp.ones((T, *p.shape)), PARAMS)
LOSSES = jnp.array([0.7, 1.3, 0.2])


def message(kind, call):
    with pytest.raises(kind) as raised:
        call()
    return str(raised.value)


def update(tx, grads=GRADS, params=PARAMS, **extra_args):
    """Called with the shapes only: every one of these errors comes at trace time."""
    state = jax.eval_shape(tx.init, params)
    return jax.eval_shape(
        lambda grads, state: tx.update(grads, state, params, **extra_args), grads, state
    )


# --- gradients ---------------------------------------------------------------------------------------

NO_INTEGERS = (
    "gradients must be real floating point; leaf ['b'] is int32. Keep what is not trained out of the "
    "parameters that init and update are given."
)
NO_TASK_AXIS = (
    "These have no task axis: take one gradient per task with mtl_optax.per_task_value_and_grad. A method "
    "before this one needs reduce=False; in place of optax.MultiSteps around it use mtl_optax.accumulate."
)


@pytest.mark.parametrize("name", ["mgda", "metabalance", "scale_invariant", "moco"])
def test_gradients_that_were_already_summed(name):
    found = message(ValueError, lambda: update(make(name, T), PARAMS, losses=LOSSES))
    assert found == (
        f"{name}: updates must carry a leading task axis of size 3: leaf ['b'] has shape (2,), expected "
        "(3, 2) (and 1 more leaf). " + NO_TASK_AXIS
    )


def test_summed_gradients_behind_the_optimizer():
    """The method placed last gets the update of an optimizer that was given summed gradients."""
    tx = optax.chain(optax.adam(1e-2), mtl.mgda(T))
    found = message(ValueError, lambda: update(tx, PARAMS))
    assert found.endswith(NO_TASK_AXIS)


def test_multi_steps_around_a_method():
    """What it accumulates is shaped like the parameters; whether `check` was called or not."""
    tx = optax.MultiSteps(optax.chain(mtl.mgda(T), optax.adam(1e-2)), 2)
    with jax.numpy_rank_promotion("allow"):
        found = message(ValueError, lambda: update(tx))
    assert found == (
        "mgda: updates must carry a leading task axis of size 3: leaf ['b'] has shape (2,), expected "
        "(3, 2) (and 1 more leaf). " + NO_TASK_AXIS
    )


def test_a_method_behind_another_one():
    tx = optax.chain(mtl.metabalance(T), mtl.mgda(T))
    assert message(ValueError, lambda: update(tx)).endswith(NO_TASK_AXIS)
    update(optax.chain(mtl.metabalance(T, reduce=False), mtl.mgda(T)))


def test_one_gradient_per_parameter_group_in_place_of_one_per_task():
    """A list with one gradient tree a task, which is no task axis."""
    trees = [PARAMS, PARAMS, PARAMS]
    found = message(ValueError, lambda: update(mtl.mgda(T), trees))
    assert found == (
        "mgda: updates and params differ in structure: the updates have leaf [0]['b'] (and 5 more leaves), "
        "which params do not have. Give the gradients of the same tree as params (for a part of it, "
        "optax.partition)."
    )


def test_only_one_parameter_has_the_task_axis():
    found = message(ValueError, lambda: update(mtl.mgda(T), {"b": GRADS["b"], "w": PARAMS["w"]}))
    assert found == (
        "mgda: updates must carry a leading task axis of size 3: leaf ['w'] has shape (4, 2), expected "
        "(3, 4, 2). " + NO_TASK_AXIS
    )


def test_the_task_axis_last():
    turned = jax.tree.map(lambda g: jnp.moveaxis(g, 0, -1), GRADS)
    found = message(ValueError, lambda: update(mtl.mgda(T), turned))
    assert found == (
        "mgda: updates must carry a leading task axis of size 3: leaf ['b'] has shape (2, 3), expected "
        "(3, 2) (and 1 more leaf). Stack one gradient per task along axis 0 of every leaf, as "
        "mtl_optax.per_task_value_and_grad does."
    )


@pytest.mark.parametrize("given", [True, False], ids=["with params", "without"])
def test_a_wrong_number_of_tasks(given):
    found = message(
        ValueError,
        lambda: mtl.mgda(2).update(GRADS, mtl.mgda(2).init(PARAMS), PARAMS if given else None),
    )
    assert found == (
        "mgda: updates must carry a leading task axis of size 2: leaf ['b'] has shape (3, 2), expected "
        "(2, 2) (and 1 more leaf). The task axis has size 3 but tasks=2: give the number of losses "
        "that loss_fn returns."
    )


def test_unstacked_gradients_whose_first_dimension_is_the_number_of_tasks():
    params = {"w": jnp.ones((T, 2))}
    tx = mtl.mgda(T)
    state = tx.init(params)
    assert message(ValueError, lambda: tx.update(params, state, params)) == (
        "mgda: updates must carry a leading task axis of size 3: leaf ['w'] has shape (3, 2), expected "
        "(3, 3, 2). " + NO_TASK_AXIS
    )
    # Without params nothing shows that they are not stacked.
    found, _ = tx.update(params, state)
    assert found["w"].shape == (2,)


def test_all_tasks_in_one_vector():
    flat = optax.flatten(mtl.mgda(T))
    assert message(ValueError, lambda: update(flat)) == (
        "mgda: updates must carry a leading task axis of size 3: leaf (the root) has shape (30,), expected "
        "(3, 10). The gradients of all tasks were concatenated into one vector, as optax.flatten does: put "
        "it after the method."
    )


def test_many_wrong_leaves_are_not_all_listed():
    params = {name: jnp.ones(2) for name in "abcde"}
    found = message(ValueError, lambda: update(mtl.mgda(T), params, params))
    assert found == (
        "mgda: updates must carry a leading task axis of size 3: leaf ['a'] has shape (2,), expected "
        "(3, 2) (and 4 more leaves). " + NO_TASK_AXIS
    )


def test_integer_gradients():
    grads = jax.tree.map(lambda g: g.astype(jnp.int32), GRADS)
    assert message(TypeError, lambda: update(mtl.mgda(T), grads)) == (f"mgda: {NO_INTEGERS}")


def test_integer_parameters_are_found_by_check():
    """They are given gradients of their own dtype; the advice about the task axis is left out."""
    params = {"b": jnp.uint32(0), "w": PARAMS["w"]}
    found = message(ValueError, lambda: mtl.check(mtl.mgda(T), params, T))
    assert found == f"check: mgda: {NO_INTEGERS.replace('int32', 'uint32')}"


def test_gradients_and_parameters_in_the_wrong_order():
    tx = mtl.mgda(T)
    found = message(ValueError, lambda: tx.update(PARAMS, tx.init(PARAMS), GRADS))
    assert found == (
        "mgda: updates must carry a leading task axis of size 3: leaf ['b'] has shape (2,), expected "
        "(3, 3, 2) (and 1 more leaf). The parameters have a task axis and the gradients have none: call "
        "update(gradients, state, params) in this order."
    )


@pytest.mark.parametrize(("of_state", "of_gradients"), [(2, 1), (1, 2)])
def test_a_state_of_another_tree(of_state, of_gradients):
    """The state of the parameters on a fork, for a method with a block for each tensor, or the reverse."""
    trees = {1: jnp.ones((4, 2)), 2: PARAMS}
    tx = mtl.metabalance(T)
    grads = jax.tree.map(lambda p: jnp.ones((T, *p.shape)), trees[of_gradients])
    state = tx.init(trees[of_state])
    found = message(ValueError, lambda: tx.update(grads, state, trees[of_gradients]))
    assert f"float[{of_state}, 3], expected float[{of_gradients}, 3]" in found
    assert found.endswith("init of the same method, on the tree whose gradients update is given.")


# --- losses ------------------------------------------------------------------------------------------

NEEDS = (
    "scale_invariant: needs the losses of this step: update(..., losses=losses), an array [3] in the "
    "order of the task axis, or a dictionary by task name."
)
TRAINER = " Where a trainer calls update, give it mtl_optax.with_extra_args(tx, losses=losses)."


def test_losses_forgotten():
    assert message(ValueError, lambda: update(mtl.scale_invariant(T))) == NEEDS + TRAINER


def test_losses_forgotten_in_a_chain():
    tx = optax.chain(mtl.scale_invariant(T), optax.adam(1e-2))
    assert message(ValueError, lambda: update(tx)) == NEEDS + TRAINER


def test_a_vector_in_value():
    assert message(ValueError, lambda: update(mtl.scale_invariant(T), value=LOSSES)) == (
        NEEDS + " Found a vector in value=, which optax keeps for one scalar."
    )


def test_a_scalar_in_value_is_somebody_elses():
    found = message(ValueError, lambda: update(mtl.scale_invariant(T), value=LOSSES.sum()))
    assert found == NEEDS + TRAINER


@pytest.mark.parametrize(
    ("given", "shape"),
    [(LOSSES[:2], "(2,)"), (LOSSES.sum(), "()"), (LOSSES[:, None], "(3, 1)")],
    ids=["too few", "summed", "a column"],
)
def test_losses_of_another_shape(given, shape):
    assert message(ValueError, lambda: update(mtl.scale_invariant(T), losses=given)) == (
        "scale_invariant: losses must have shape (3,), one entry per task in the order of the task "
        f"axis; found {shape}."
    )


# Gradients that differ from task to task, and what the weights 1 / loss make of them.
DISTINCT = {"b": jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]), "w": jnp.zeros((T, 4, 2))}


def weighed(losses):
    return jnp.einsum("t,ti->i", 1 / losses, DISTINCT["b"])


def test_an_order_of_tasks_that_differs_cannot_be_seen():
    """Both are arrays `[T]`: losses in another order than the gradients are a legal input, and the update
    is another. `per_task_value_and_grad` gives both out in one order."""
    tx = mtl.scale_invariant(T)
    state = tx.init(PARAMS)
    right, _ = tx.update(DISTINCT, state, PARAMS, losses=LOSSES)
    wrong, _ = tx.update(DISTINCT, state, PARAMS, losses=LOSSES[::-1])
    np.testing.assert_allclose(right["b"], weighed(LOSSES), 1e-6)
    np.testing.assert_allclose(wrong["b"], weighed(LOSSES[::-1]), 1e-6)
    assert np.abs(right["b"] - wrong["b"]).max() > 1

    losses, grads = mtl.per_task_value_and_grad(lambda b: LOSSES + DISTINCT["b"] @ b)(jnp.zeros(2))
    assert losses.tolist() == LOSSES.tolist() and grads.tolist() == DISTINCT["b"].tolist()


# --- names -------------------------------------------------------------------------------------------

NAMES = ("click", "buy", "cart")
# In the order of the sorted names, as the task axis: buy, cart, click.
NAMED_LOSSES = dict(zip(sorted(NAMES), LOSSES, strict=True))


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1], {"cart", "click", "buy"}])
def test_names_make_the_order_of_tasks_safe(order):
    """Whatever the order in the factory, in the loss function and in the losses that are given back."""

    def loss_fn(b):
        return {
            name: NAMED_LOSSES[name] + DISTINCT["b"][sorted(NAMES).index(name)] @ b
            for name in ("cart", "click", "buy")
        }

    tx = mtl.scale_invariant(order)
    losses, grads = mtl.per_task_value_and_grad(loss_fn)(jnp.zeros(2))
    turned = dict(reversed(losses.items()))
    for given in (losses, turned):
        found, _ = tx.update(grads, tx.init(jnp.zeros(2)), jnp.zeros(2), losses=given)
        np.testing.assert_allclose(found, weighed(LOSSES), 1e-6)


NOT_NAMES = {
    "a single string": (
        "click",
        TypeError,
        "tasks must be a Python integer or a collection of task names; found the single string "
        "'click'. For one task give ('click',).",
    ),
    "twice": (
        ("click", "buy", "click"),
        ValueError,
        "task names must differ, found ['click'] more than once.",
    ),
    "no strings": (("click", 1), TypeError, "task names must be strings, found 1."),
    "None among them": (("click", None), TypeError, "task names must be strings, found None."),
    "none": ((), ValueError, "tasks must be at least 1, found no task names."),
}


@pytest.mark.parametrize("name", NOT_NAMES)
def test_names_that_are_none(name):
    given, kind, expected = NOT_NAMES[name]
    assert message(kind, lambda: mtl.mgda(given)) == f"mgda: {expected}"
    assert message(kind, lambda: mtl.check(mtl.mgda(2), PARAMS, given)) == f"check: {expected}"


@pytest.mark.parametrize("name", sorted(WITH_TARGET))
def test_no_target_among_tasks_with_names(name):
    """Which of them sorts first says nothing about which of them counts."""
    factory = mtl.METHODS[name].factory
    for call in (lambda: factory(NAMES), lambda: factory(NAMES, target=None)):
        found = message(TypeError, call)
        assert found.startswith(f"{name}: ") and "target='buy'" in found
        assert "['buy', 'cart', 'click']" in found
    assert factory(NAMES, target="cart").target == "cart"
    assert factory(T).target == 0


def test_a_target_that_is_no_name():
    assert message(ValueError, lambda: mtl.metabalance(NAMES, target="by")) == (
        "metabalance: target must be a task; the tasks are ['buy', 'cart', 'click'], found 'by'."
    )
    assert message(ValueError, lambda: mtl.metabalance(T, target="buy")) == (
        "metabalance: target must be a task; the tasks have no names, found 'buy'."
    )


WRONG_KEYS = {
    "one is missing": ({"buy", "click"}, "['buy', 'click']"),
    "one too many": ({*NAMES, "view"}, "['buy', 'cart', 'click', 'view']"),
    "one misspelt": ({"buy", "cart", "clik"}, "['buy', 'cart', 'clik']"),
}


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_losses_by_other_names(name):
    keys, found = WRONG_KEYS[name]
    expected = f"one entry per task, ['buy', 'cart', 'click']; found {found}."
    losses = dict.fromkeys(keys, LOSSES[0])
    tx = mtl.scale_invariant(NAMES)
    assert message(ValueError, lambda: update(tx, losses=losses)) == (
        f"scale_invariant: losses must have {expected}"
    )
    assert message(ValueError, lambda: mtl.weigh_losses(losses, tx.init(PARAMS), tx)) == (
        f"scale_invariant: losses must have {expected}"
    )
    active = dict.fromkeys(keys, True)
    assert message(ValueError, lambda: update(mtl.mgda(NAMES), active=active)) == (
        f"mgda: active must have {expected}"
    )
    assert message(ValueError, lambda: mtl.fixed_weights(NAMES, dict.fromkeys(keys, 1.0))) == (
        f"fixed_weights: weights must have {expected}"
    )


def test_losses_by_name_for_a_method_without_names():
    """Their sorted order, that of `per_task_value_and_grad`; only their number can be wrong."""
    tx = mtl.scale_invariant(T)
    found, _ = tx.update(DISTINCT, tx.init(PARAMS), PARAMS, losses=NAMED_LOSSES)
    np.testing.assert_allclose(found["b"], weighed(LOSSES), 1e-6)
    two = {"buy": LOSSES[0], "cart": LOSSES[1]}
    assert message(ValueError, lambda: update(tx, losses=two)) == (
        "scale_invariant: losses must have one entry per task, 3 names; found ['buy', 'cart']."
    )


@pytest.mark.parametrize("method", ["metabalance", "mgda", "graddrop", "moco", "sum_tasks"])
def test_names_of_losses_are_compared_by_methods_that_do_not_look_at_them(method):
    """With names that differ, the target would be another task's gradient."""
    tx = make(method, NAMES)
    misspelled = {"buy": LOSSES[0], "cart": LOSSES[1], "clicks": LOSSES[2]}
    assert message(ValueError, lambda: update(tx, losses=misspelled)) == (
        f"{method}: losses must have one entry per task, ['buy', 'cart', 'click']; found ['buy', 'cart', "
        "'clicks']."
    )
    update(tx, losses=NAMED_LOSSES)


def test_losses_without_names_for_a_method_with_names():
    tx = mtl.scale_invariant(NAMES)
    assert message(ValueError, lambda: update(tx, losses=LOSSES[:2])) == (
        "scale_invariant: losses must have shape (3,), one entry per task in the order ['buy', 'cart', "
        "'click']; found (2,)."
    )


def test_heads_of_other_names_on_a_fork():
    method = mtl.sum_tasks(("click", "buy"))

    def loss_fn(w, fork):
        h = fork(w)
        return {"click": h["click"].sum(), "sale": h["buy"].sum()}

    fn = mtl.fork_value_and_grad(loss_fn, method)
    assert message(ValueError, lambda: fn(jnp.ones(2), method.init(jnp.ones(2)))) == (
        "fork_value_and_grad: the losses of loss_fn must have one entry per task, ['buy', 'click']; found "
        "['click', 'sale']."
    )


def test_gradients_of_a_task_without_a_name():
    assert message(ValueError, lambda: mtl.stack_tasks({"clik": PARAMS}, NAMES)) == (
        "stack_tasks: give the gradients of at least one of the tasks ['buy', 'cart', 'click']; found "
        "['clik']."
    )
    assert message(TypeError, lambda: mtl.stack_tasks({"click": PARAMS}, T)) == (
        "stack_tasks: names must be the names of all tasks; found only their number."
    )


# --- a vector of the wrong kind ----------------------------------------------------------------------


def test_active_of_another_shape():
    assert message(ValueError, lambda: update(mtl.mgda(T), active=jnp.ones((2,), bool))) == (
        "mgda: active must have shape (3,), one entry per task in the order of the task axis; found "
        "(2,)."
    )


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("mgda", "gram"),
        ("metabalance", "norms"),
        ("moco", "gram"),
        ("graddrop", "gradients"),
        ("gradnorm", "losses, norms"),
    ],
)
def test_a_method_on_gradients_put_on_losses(name, needs):
    tx = make(name, T)
    found = message(ValueError, lambda: mtl.weigh_losses(LOSSES, tx.init(PARAMS), tx))
    assert found == f"{name}: looks at gradients ({needs}), so {CANNOT_WEIGH}"


CANNOT_WEIGH = (
    "it cannot weigh losses alone. Use it with mtl_optax.fork_value_and_grad (one backward pass) or "
    "mtl_optax.per_task_value_and_grad."
)
# Transformations that are no `Method`.
WRAPPED = {
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        mtl.dwa, static_args=("tasks", "window")
    )(T),
    "chain": lambda: optax.chain(mtl.scale_invariant(T), optax.adam(1e-3)),
    "skip_nonfinite": lambda: mtl.skip_nonfinite(mtl.uncertainty(T)),
    "an optimizer": lambda: optax.adam(1e-3),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_another_transformation_put_on_losses(name):
    tx = WRAPPED[name]()
    assert not isinstance(tx, mtl.Method)
    state = jax.eval_shape(tx.init, LOSSES)
    found = message(TypeError, lambda: mtl.weigh_losses(LOSSES, state, tx))
    assert found.startswith("weigh_losses: method must be what a factory of mtl_optax returned")
    assert type(tx).__name__ in found and "into the optimizer" in found


# --- options of methods ------------------------------------------------------------------------------

WEIGHTS = mtl.WeightRule(frozenset(), lambda inputs, state: (jnp.ones(T), state))
UPDATES = mtl.UpdateRule(
    frozenset({"gradients"}), lambda inputs, state: (PARAMS, jnp.ones(T), state)
)
OPTIONS = {
    "blocks of an update rule": (
        UPDATES,
        {"blocks": "leaf"},
        TypeError,
        "a method that gives the update itself takes no argument blocks; see MethodOptions.",
    ),
    "several": (
        UPDATES,
        {"update_every": 2, "reduce": False, "axis_name": "data"},
        TypeError,
        "a method that gives the update itself takes no argument reduce, update_every; see MethodOptions.",
    ),
    "misspelt": (
        WEIGHTS,
        {"block": "leaf"},
        TypeError,
        "a weighting method takes no argument block; see MethodOptions.",
    ),
    "update_every=0": (
        WEIGHTS,
        {"update_every": 0},
        ValueError,
        "update_every must be a Python integer >= 1, found 0.",
    ),
    "freeze_after=0": (
        WEIGHTS,
        {"freeze_after": 0},
        ValueError,
        "freeze_after must be a Python integer >= 1, found 0.",
    ),
    "a need of the other kind": (
        WEIGHTS._replace(needs=frozenset({"gradients"})),
        {},
        ValueError,
        "a rule of type WeightRule cannot need ['gradients'].",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_a_rule_does_not_take(name):
    rule, options, kind, expected = OPTIONS[name]
    assert message(kind, lambda: mtl.from_rule("mine", T, rule, **options)) == f"mine: {expected}"


def test_the_option_that_both_kinds_of_rule_take():
    for rule in (WEIGHTS, UPDATES):
        assert mtl.from_rule("mine", T, rule, axis_name="data").num_tasks == T


# --- static arguments --------------------------------------------------------------------------------


def test_inject_hyperparams_on_tasks():
    tx = optax.inject_hyperparams(mtl.mgda)(tasks=T)
    assert message(TypeError, lambda: tx.init(PARAMS)) == (
        "mgda: tasks must be a Python integer >= 1 or a collection of task names, found a JAX array. "
        "Under optax.inject_hyperparams name it static: static_args=('tasks', ...)."
    )


STATIC = {
    "cagrad": ("rescale", "integer from 0 to 2"),
    "dwa": ("window", "integer >= 1"),
    "excess_mtl": ("warmup_steps", "integer >= 0"),
    "grad_surgery": ("target", "integer from 0 to 2 or a task's name"),
    "krum": ("num_byzantine", "integer from 0 to 0"),
    "metabalance": ("target", "integer from 0 to 2 or a task's name"),
    "ol_aux": ("update_every", "integer >= 1"),
    "rotograd_scale": ("burn_in", "integer >= 0"),
    "stch": ("warmup_steps", "integer >= 0"),
    "trimmed_mean": ("trim_number", "integer from 0 to 1"),
}


@pytest.mark.parametrize("name", STATIC)
def test_inject_hyperparams_on_other_integers(name):
    what, wanted = STATIC[name]
    given = {"target": 0} if what == "target" else {}
    tx = optax.inject_hyperparams(mtl.METHODS[name].factory, static_args="tasks")(tasks=T, **given)
    assert message(TypeError, lambda: tx.init(PARAMS)) == (
        f"{name}: {what} must be a Python {wanted}, found a JAX array. Under optax.inject_hyperparams "
        f"name it static: static_args=('{what}', ...)."
    )


@pytest.mark.parametrize(
    ("given", "kind", "found"),
    [
        (0, ValueError, "0"),
        (2.0, TypeError, "2.0"),
        (None, TypeError, "None"),
    ],
)
def test_a_number_of_tasks_that_is_none(given, kind, found):
    assert message(kind, lambda: mtl.mgda(given)) == (
        f"mgda: tasks must be a Python integer >= 1 or a collection of task names, found {found}."
    )


def test_a_target_that_is_no_task():
    assert message(ValueError, lambda: mtl.metabalance(T, target=3)) == (
        "metabalance: target must be a Python integer from 0 to 2 or a task's name, found 3."
    )


def test_a_number_outside_its_range():
    assert message(ValueError, lambda: mtl.metabalance(T, relax_factor=1.5)).startswith(
        "metabalance: relax_factor must be in [0"
    )


def test_a_name_of_blocks_that_does_not_exist():
    for blocks, found in (("layer", "'layer'"), (3, "3")):
        assert message(TypeError, functools.partial(mtl.mgda, T, blocks=blocks)) == (
            f'mgda: blocks must be "all", "leaf" or a callable (path, leaf) -> label; found {found}.'
        )


def test_per_task_on_gradients_without_the_axis():
    tx = mtl.per_task(optax.clip_by_global_norm(1.0), T)
    assert message(ValueError, lambda: update(tx, PARAMS)).endswith(NO_TASK_AXIS)


# --- what is differentiated --------------------------------------------------------------------------


def test_parameters_without_a_gradient():
    def loss_fn(params):
        return params["w"] * params["w"]

    params = {"w": jnp.ones(3), "count": jnp.uint32(0)}
    expected = (
        "per_task_value_and_grad: cannot differentiate with respect to the leaf ['count'] of uint32. Pass "
        "values that are not parameters as another argument; for an nnx.Module pass nnx.split(model, "
        "nnx.Param, ...)."
    )
    assert message(TypeError, lambda: mtl.per_task_value_and_grad(loss_fn)(params)) == expected
    weighted = mtl.weighted_value_and_grad(loss_fn, mtl.mgda(3))
    state = mtl.mgda(3).init({"w": jnp.ones(3)})
    wrong = {"w": jnp.ones(3), "count": jax.random.key(0)}
    assert "leaf ['count'] of key" in message(TypeError, lambda: weighted(wrong, state))
    split = mtl.split_value_and_grad(lambda p: p["w"], lambda heads, h: heads * h)
    assert "leaf ['count'] of uint32" in message(TypeError, lambda: split(params, jnp.ones(3)))


WRAPPERS = {
    "checkpoint": jax.checkpoint,
    "jit": jax.jit,
    "cond": lambda f: lambda *args: jax.lax.cond(args[1][0, 0] > 0, f, f, *args),
    "scan": lambda f: lambda *args: jax.lax.scan(lambda c, _: (c, f(*args)), 0.0, length=1)[1][0],
    "vmap": lambda f: lambda w, x: jax.vmap(f, in_axes=(None, 0))(w, x[None])[0],
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_fork_inside_an_inner_trace(name):
    method = mtl.mgda(2)

    def loss_fn(w, fork, x):
        return WRAPPERS[name](lambda w, x: jnp.stack([jnp.sum(c**2) for c in fork(x @ w)]))(w, x)

    w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
    fn = functools.partial(mtl.fork_value_and_grad(loss_fn, method), w, method.init(x @ w), x)
    expected = (
        "fork_value_and_grad: loss_fn calls fork inside jit, checkpoint, scan, vmap or the like. Move the "
        "call out of there, or use mtl_optax.fork and mtl_optax.join, which may stand anywhere."
    )
    assert message(ValueError, fn) == expected
    assert message(ValueError, jax.jit(fn)) == expected


def test_the_remedy_for_it():
    """`fork` itself inside of `jax.checkpoint`, its token handed out: the numbers are those without."""
    method = mtl.scale_invariant(2)
    w, x = jnp.ones((3, 2)), jnp.linspace(-1, 1, 12).reshape(4, 3)

    def total(wrap):
        def loss_fn(w, carrier, x):
            def block(w, carrier, x):
                copies, token = mtl.fork(method, carrier, jnp.tanh(x @ w))
                return jnp.stack([jnp.sum(copies[0] ** 2), jnp.sum(copies[1] - 1)]), token

            return mtl.join(*wrap(block)(w, carrier, x))

        carrier = mtl.fork_init(method, x @ w)
        return jax.jit(jax.grad(loss_fn, argnums=(0, 1)))(w, carrier, x)

    plain, inside = total(lambda f: f), total(jax.checkpoint)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), inside, plain)


@pytest.mark.slow
def test_losses_joined_twice_move_the_state_once():
    method = mtl.emtl(2)
    h = jnp.arange(3.0)

    def total(times):
        def loss_fn(h, carrier):
            copies, token = mtl.fork(method, carrier, h)
            losses = jnp.stack([jnp.sum(copies[0] ** 2), jnp.sum(copies[1])])
            return sum(mtl.join(losses, token) for _ in range(times)) / times

        return jax.grad(loss_fn, argnums=(0, 1))(h, mtl.fork_init(method, h))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), total(2), total(1))
