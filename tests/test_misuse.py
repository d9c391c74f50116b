"""The mistakes that people make with such transformations, each with its own message, word for word.

What cannot be told from shapes is said in `test_an_order_of_tasks_that_differs_cannot_be_seen`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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

ALREADY_SUMMED = (
    "The gradients were already summed over tasks, or are one task's: take one gradient per task with "
    "mtl_optax.per_task_value_and_grad and put this transformation before the optimizer."
)


@pytest.mark.parametrize("name", ["mgda", "metabalance", "scale_invariant", "moco"])
def test_gradients_that_were_already_summed(name):
    found = message(ValueError, lambda: update(mtl.METHODS[name].make(T), PARAMS, losses=LOSSES))
    assert found == (
        f"{name}: updates must carry a leading task axis of size 3: leaf ['b'] has shape (2,), expected "
        "(3, 2); leaf ['w'] has shape (4, 2), expected (3, 4, 2). " + ALREADY_SUMMED
    )


def test_summed_gradients_behind_the_optimizer():
    """The method placed last gets the update of an optimizer that was given summed gradients."""
    tx = optax.chain(optax.adam(1e-2), mtl.mgda(T))
    found = message(ValueError, lambda: update(tx, PARAMS))
    assert found.endswith(ALREADY_SUMMED)


def test_one_gradient_per_parameter_group_in_place_of_one_per_task():
    """A list with one gradient tree a task, which is no task axis."""
    trees = [PARAMS, PARAMS, PARAMS]
    found = message(ValueError, lambda: update(mtl.mgda(T), trees))
    assert found == (
        f"mgda: updates and params differ in structure: updates {jax.tree.structure(trees)}, params "
        f"{jax.tree.structure(PARAMS)}. Give the gradients of the same tree as params (for a part of "
        "it, optax.partition)."
    )


def test_only_one_parameter_has_the_task_axis():
    found = message(ValueError, lambda: update(mtl.mgda(T), {"b": GRADS["b"], "w": PARAMS["w"]}))
    assert found == (
        "mgda: updates must carry a leading task axis of size 3: leaf ['w'] has shape (4, 2), expected "
        "(3, 4, 2). " + ALREADY_SUMMED
    )


def test_the_task_axis_last():
    turned = jax.tree.map(lambda g: jnp.moveaxis(g, 0, -1), GRADS)
    found = message(ValueError, lambda: update(mtl.mgda(T), turned))
    assert found == (
        "mgda: updates must carry a leading task axis of size 3: leaf ['b'] has shape (2, 3), expected "
        "(3, 2); leaf ['w'] has shape (4, 2, 3), expected (3, 4, 2). Stack one gradient per task along "
        "axis 0 of every leaf, as mtl_optax.per_task_value_and_grad does."
    )


@pytest.mark.parametrize("given", [True, False], ids=["with params", "without"])
def test_a_wrong_number_of_tasks(given):
    found = message(
        ValueError,
        lambda: mtl.mgda(2).update(GRADS, mtl.mgda(2).init(PARAMS), PARAMS if given else None),
    )
    assert found == (
        "mgda: updates must carry a leading task axis of size 2: leaf ['b'] has shape (3, 2), expected "
        "(2, 2); leaf ['w'] has shape (3, 4, 2), expected (2, 4, 2). The task axis has size 3 but "
        "num_tasks=2: give the number of losses that loss_fn returns."
    )


def test_unstacked_gradients_whose_first_dimension_is_the_number_of_tasks():
    params = {"w": jnp.ones((T, 2))}
    tx = mtl.mgda(T)
    state = tx.init(params)
    assert message(ValueError, lambda: tx.update(params, state)) == (
        "mgda: updates have the shapes of the parameters (leaf ['w']: (3, 2)); the first dimension is "
        "no task axis. " + ALREADY_SUMMED
    )
    assert message(ValueError, lambda: tx.update(params, state, params)) == (
        "mgda: updates must carry a leading task axis of size 3: leaf ['w'] has shape (3, 2), expected "
        "(3, 3, 2). " + ALREADY_SUMMED
    )


def test_many_wrong_leaves_are_not_all_listed():
    params = {name: jnp.ones(2) for name in "abcde"}
    found = message(ValueError, lambda: update(mtl.mgda(T), params, params))
    assert found == (
        "mgda: updates must carry a leading task axis of size 3: leaf ['a'] has shape (2,), expected "
        "(3, 2); leaf ['b'] has shape (2,), expected (3, 2); leaf ['c'] has shape (2,), expected (3, 2) "
        "(and 2 more leaves). " + ALREADY_SUMMED
    )


def test_integer_gradients():
    grads = jax.tree.map(lambda g: g.astype(jnp.int32), GRADS)
    assert message(TypeError, lambda: update(mtl.mgda(T), grads)) == (
        "mgda: gradients must be real floating point; leaf ['b'] is int32."
    )


# --- losses ------------------------------------------------------------------------------------------

NEEDS = (
    "scale_invariant: needs the losses of this step: update(..., losses=losses), an array [3] in the "
    "order of the task axis."
)


def test_losses_forgotten():
    assert message(ValueError, lambda: update(mtl.scale_invariant(T))) == NEEDS


def test_losses_forgotten_in_a_chain():
    tx = optax.chain(mtl.scale_invariant(T), optax.adam(1e-2))
    assert message(ValueError, lambda: update(tx)) == NEEDS


def test_a_vector_in_value():
    assert message(ValueError, lambda: update(mtl.scale_invariant(T), value=LOSSES)) == (
        NEEDS + " Found a vector in value=, which optax keeps for one scalar."
    )


def test_a_scalar_in_value_is_somebody_elses():
    assert message(ValueError, lambda: update(mtl.scale_invariant(T), value=LOSSES.sum())) == NEEDS


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


def test_losses_by_name_have_no_order():
    """A dictionary is sorted by name, the task axis is not: the one order that can be seen to differ."""
    named = {"click": LOSSES[0], "buy": LOSSES[1], "cart": LOSSES[2]}
    assert message(TypeError, lambda: update(mtl.scale_invariant(T), losses=named)) == (
        "scale_invariant: losses must be one array of shape (3,) in the order of the task axis; found a "
        "dict, whose order is not that of the tasks."
    )


def test_an_order_of_tasks_that_differs_cannot_be_seen():
    """Both are arrays `[T]`: a permutation is a legal input. `per_task_value_and_grad` gives both out in
    one order, which is why the losses should come from it."""
    tx = mtl.scale_invariant(T)
    one, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, losses=LOSSES)
    assert mtl.per_task_value_and_grad(lambda w: w * LOSSES)(1.0)[0].tolist() == LOSSES.tolist()
    other, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, losses=LOSSES[::-1])
    # The gradients here are equal, so that the sum of weights 1/L is the same whatever the order.
    np.testing.assert_allclose(one["w"], other["w"], 1e-6)


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
        ("moco", "gradients"),
        ("gradnorm", "losses, norms"),
    ],
)
def test_a_method_on_gradients_put_on_losses(name, needs):
    tx = mtl.METHODS[name].make(T)
    found = message(ValueError, lambda: mtl.weigh_losses(LOSSES, tx.init(PARAMS), tx))
    assert found == (
        f"{name}: needs gradients ({needs}), so it cannot weigh losses alone. Use it through "
        "mtl_optax.fork (one backward pass) or mtl_optax.per_task_value_and_grad."
    )


# --- static arguments --------------------------------------------------------------------------------


def test_inject_hyperparams_on_num_tasks():
    tx = optax.inject_hyperparams(mtl.mgda)(num_tasks=T)
    assert message(TypeError, lambda: tx.init(PARAMS)) == (
        "mgda: num_tasks must be a Python integer, found a JAX array. Under optax.inject_hyperparams "
        "name it static: static_args=('num_tasks', ...)."
    )


STATIC = {
    "cagrad": ("rescale", "integer from 0 to 2"),
    "dwa": ("window", "integer >= 1"),
    "excess_mtl": ("warmup_steps", "integer >= 0"),
    "grad_surgery": ("target", "integer"),
    "krum": ("num_byzantine", "integer from 0 to 0"),
    "metabalance": ("target", "integer"),
    "nash_mtl": ("update_every", "integer >= 1"),
    "ol_aux": ("target", "integer"),
    "rotograd_scale": ("burn_in", "integer >= 0"),
    "stch": ("warmup_steps", "integer >= 0"),
    "trimmed_mean": ("trim_number", "integer from 0 to 1"),
}


@pytest.mark.parametrize("name", STATIC)
def test_inject_hyperparams_on_other_integers(name):
    what, wanted = STATIC[name]
    tx = optax.inject_hyperparams(mtl.METHODS[name].factory, static_args="num_tasks")(num_tasks=T)
    assert message(TypeError, lambda: tx.init(PARAMS)) == (
        f"{name}: {what} must be a Python {wanted}, found a JAX array. Under optax.inject_hyperparams "
        f"name it static: static_args=('{what}', ...)."
    )


@pytest.mark.parametrize(
    ("given", "kind", "found"),
    [
        (0, ValueError, "num_tasks must be at least 1, found 0."),
        (2.0, TypeError, "num_tasks must be a Python integer, found 2.0."),
        (None, TypeError, "num_tasks must be a Python integer, found None."),
    ],
)
def test_a_number_of_tasks_that_is_none(given, kind, found):
    assert message(kind, lambda: mtl.mgda(given)) == f"mgda: {found}"


def test_a_target_that_is_no_task():
    assert message(ValueError, lambda: mtl.metabalance(T, target=3)) == (
        "metabalance: target must be the index of a task, 0 to 2; found 3."
    )


def test_a_number_outside_its_range():
    assert message(ValueError, lambda: mtl.metabalance(T, relax_factor=1.5)).startswith(
        "metabalance: relax_factor must be in [0"
    )


def test_a_name_of_blocks_that_does_not_exist():
    assert message(ValueError, lambda: mtl.mgda(T, blocks="layer").init(PARAMS)) == (
        'blocks must be "all", "leaf" or a callable (path, leaf) -> label; found \'layer\'.'
    )


def test_per_task_on_gradients_without_the_axis():
    tx = mtl.per_task(optax.clip_by_global_norm(1.0), T)
    assert message(ValueError, lambda: update(tx, PARAMS)).endswith(ALREADY_SUMMED)


# --- what is differentiated --------------------------------------------------------------------------


def test_parameters_without_a_gradient():
    def loss_fn(params):
        return params["w"] * params["w"]

    params = {"w": jnp.ones(3), "count": jnp.uint32(0)}
    told = (
        "per_task_value_and_grad: cannot differentiate by the leaf [0]['count'] of uint32. Pass what is no "
        "parameter as another argument; of an nnx.Module differentiate by nnx.split(model, nnx.Param, ...)."
    )
    assert message(TypeError, lambda: mtl.per_task_value_and_grad(loss_fn)(params)) == told
    balanced = mtl.balanced_value_and_grad(loss_fn, mtl.mgda(3))
    state = mtl.mgda(3).init({"w": jnp.ones(3)})
    assert "leaf ['count'] of uint32" in message(TypeError, lambda: balanced(params, state))
    split = mtl.split_value_and_grad(lambda p: p["w"], lambda heads, h: heads * h)
    assert "leaf [0]['count'] of uint32" in message(TypeError, lambda: split(params, jnp.ones(3)))


WRAPPERS = {
    "checkpoint": jax.checkpoint,
    "jit": jax.jit,
    "scan": lambda f: lambda *args: jax.lax.scan(lambda c, _: (c, f(*args)), 0.0, length=1)[1][0],
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_fork_inside_an_inner_trace(name):
    method = mtl.mgda(2)

    def loss_fn(w, fork, x):
        return WRAPPERS[name](lambda w, x: jnp.stack([jnp.sum(c**2) for c in fork(x @ w)]))(w, x)

    w, x = jnp.ones((3, 2)), jnp.ones((4, 3))
    carrier = mtl.fork_init(method, x @ w)
    told = (
        "fork_value_and_grad: loss_fn calls fork inside jit, checkpoint, scan, vmap or the like, where the "
        "losses cannot be joined to it. Move the call out of there, or use mtl_optax.fork and "
        "mtl_optax.join themselves, with the token among the results of the inner function."
    )
    fn = mtl.fork_value_and_grad(loss_fn, method)
    assert message(ValueError, lambda: fn(w, carrier, x)) == told
    assert message(ValueError, lambda: jax.jit(fn)(w, carrier, x)) == told


def test_the_remedy_for_it():
    """`fork` itself inside of `jax.checkpoint`, its token handed out: the numbers are those without."""
    method = mtl.emtl(2)
    w, x = jnp.ones((3, 2)), jnp.linspace(-1, 1, 12).reshape(4, 3)

    def total(wrap):
        def loss_fn(w, carrier, x):
            def block(w, carrier, x):
                copies, token = mtl.fork(jnp.tanh(x @ w), carrier, method)
                return jnp.stack([jnp.sum(copies[0] ** 2), jnp.sum(copies[1] - 1)]), token

            return mtl.join(*wrap(block)(w, carrier, x))

        return jax.grad(loss_fn, argnums=(0, 1))(w, mtl.fork_init(method, x @ w), x)

    plain, inside = total(lambda f: f), total(jax.checkpoint)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), inside, plain)


def test_losses_joined_twice_are_told_once():
    method = mtl.emtl(2)
    h = jnp.arange(3.0)

    def total(times):
        def loss_fn(h, carrier):
            copies, token = mtl.fork(h, carrier, method)
            losses = jnp.stack([jnp.sum(copies[0] ** 2), jnp.sum(copies[1])])
            return sum(mtl.join(losses, token) for _ in range(times)) / times

        return jax.grad(loss_fn, argnums=(0, 1))(h, mtl.fork_init(method, h))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), total(2), total(1))


def test_a_weigher_that_clips():
    told = (
        "emtl: takes the weights of nash_mtl only, so its max_norm would be lost. Leave it out, and put "
        "optax.clip_by_global_norm after the whole method."
    )
    assert message(ValueError, lambda: mtl.emtl(T, weigher=mtl.nash_mtl(T, max_norm=1.0))) == told
