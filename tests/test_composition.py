"""Which optax transformations and wrappers go before, after and around a method, row by row.

What works is traced through `scan`, which refuses a state whose shapes or dtypes drift, and passes
`check`; what a shape or a run on small leaves can show is refused by `check` with a message that is
pinned word for word; what neither shows passes `check`, and numbers show what it does. The table of
docs/composition.md says the same, and every name in it is one of these cases. An optax release that
changes a row is seen here.
"""

import functools
import itertools
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from method_properties import BROAD, make
from optax import microbatching
from optax.experimental import aggregating
from sampling import sampled

import mtl_optax as mtl

T = 3
OPTAX = tuple(map(int, optax.__version__.split(".")[:3]))
PARAMS = {"head": jnp.ones((2, 3)), "shared": {"b": jnp.ones(()), "w": jnp.ones((4, 2))}}
PAIR = optax.LookaheadParams.init_synced(PARAMS)
LOSSES = jnp.array([0.7, 1.3, 0.2])
WITH_LOSSES = {"losses": LOSSES}


def gradients(seed, params=PARAMS):
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    return jax.tree.map(lambda p: jax.random.normal(next(keys), (T, *p.shape)), params)


GRADS = gradients(0)
# Compiled once for the whole file: outside jit an update is its own program.
BALANCE = mtl.sum_tasks(T)
WHOLE = optax.chain(BALANCE, optax.sgd(1e-2))
shape_of = functools.partial(jax.tree.map, jnp.shape)


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def traced(tx, params=PARAMS, grads=GRADS, **extra_args):
    """The shapes of three updates in a scan, without compiling anything."""

    def run(grads, params):
        def step(carry, _):
            params, state = carry
            update, state = tx.update(grads, state, params, **extra_args)
            return (optax.apply_updates(params, update), state), update

        return jax.lax.scan(step, (params, tx.init(params)), length=3)[1]

    return jax.tree.map(lambda u: u.shape[1:], jax.eval_shape(run, grads, params))


def run(tx, grads=GRADS, params=PARAMS, **extra_args):
    update = jax.jit(lambda *args: tx.update(*args, **extra_args))
    return update(grads, tx.init(params), params)


def refusal(tx, params=PARAMS, **extra_args):
    """What `check` says."""
    with pytest.raises(ValueError) as raised:
        mtl.check(tx, shapes(params), T, **extra_args)
    return str(raised.value)


def assert_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), left, right)


def difference(left, right):
    """The largest difference of two trees."""
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.max(abs(a - b))), left, right)))


# --- what works --------------------------------------------------------------------------------------


class Works(NamedTuple):
    """An optimizer that works, and the extra arguments of its `update` and its parameters."""

    tx: Any
    extra: Any = WITH_LOSSES
    params: Any = PARAMS
    scans: bool = True


def after(inner, **extra):
    return Works(optax.chain(mtl.scale_invariant(T), inner), {**WITH_LOSSES, **extra})


def before(outer):
    return Works(optax.chain(outer, BALANCE))


def squares(params):
    return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


def label(path, _):
    return "shared" if "shared" in jax.tree_util.keystr(path) else "head"


def freeze(inner):
    return optax.chain(inner, optax.transforms.freeze({"head": True, "shared": False}))


LABELS = {"head": "head", "shared": "shared"}
ONLY_SHARED = {"head": False, "shared": True}
GROUPS = {
    "shared": optax.chain(mtl.scale_invariant(T), optax.adam(1e-2)),
    "head": optax.chain(BALANCE, optax.sgd(1e-2)),
    # An empty group, to which a method must not object.
    "nothing": optax.chain(mtl.mgda(T), optax.sgd(1e-2)),
}
SEARCH = {"value": jnp.ones(()), "grad": PARAMS, "value_fn": squares}
WORKS = {
    ("after", "adam"): after(optax.adam(1e-2)),
    ("after", "adamw"): after(optax.adamw(1e-2)),
    ("after", "adaptive_grad_clip"): after(optax.adaptive_grad_clip(0.1)),
    ("after", "add_decayed_weights"): after(optax.add_decayed_weights(0.1)),
    ("after", "add_decayed_weights, masked"): after(
        optax.masked(optax.add_decayed_weights(0.1), {"head": True, "shared": False})
    ),
    ("after", "apply_if_finite"): after(optax.apply_if_finite(optax.sgd(1e-2), 2)),
    ("after", "clip_by_global_norm"): after(optax.clip_by_global_norm(1.0)),
    ("after", "conditionally_mask"): after(
        optax.conditionally_mask(optax.sgd(1e-2), lambda step: step < 3)
    ),
    ("after", "conditionally_transform"): after(
        optax.conditionally_transform(optax.sgd(1e-2), lambda step: step < 3)
    ),
    ("after", "flatten"): after(optax.flatten(optax.adam(1e-2))),
    ("after", "freeze"): Works(freeze(WHOLE)),
    ("after", "keep_params_nonnegative"): after(optax.keep_params_nonnegative()),
    ("after", "lbfgs"): after(mtl.drop_extra_args(optax.lbfgs(), "losses"), **SEARCH),
    ("after", "mechanize"): after(optax.contrib.mechanize(optax.sgd(1e-2))),
    ("after", "momo"): after(optax.contrib.momo(1.0), value=LOSSES.sum()),
    # It has no entries before its first step, which `scan` does not take.
    ("after", "monitor"): after(optax.monitor({"norm": optax.tree.norm}))._replace(scans=False),
    ("after", "MultiSteps"): after(optax.MultiSteps(optax.sgd(1e-2), 2).gradient_transformation()),
    ("after", "muon"): after(optax.contrib.muon(1e-2)),
    ("after", "polyak_sgd"): after(optax.polyak_sgd(), value=LOSSES.sum()),
    ("after", "reduce_on_plateau"): after(optax.contrib.reduce_on_plateau(), value=LOSSES.sum()),
    ("after", "sam"): after(
        mtl.drop_extra_args(optax.contrib.sam(optax.sgd(1e-2), optax.sgd(1e-2)), "losses")
    ),
    ("after", "scale_by_backtracking_linesearch"): after(
        mtl.drop_extra_args(optax.scale_by_backtracking_linesearch(3), "losses"), **SEARCH
    ),
    ("after", "scale_by_zoom_linesearch"): after(
        mtl.drop_extra_args(optax.scale_by_zoom_linesearch(3), "losses"), **SEARCH
    ),
    ("after", "schedule_free_sgd"): after(optax.contrib.schedule_free_sgd(1e-2)),
    ("after", "selective_transform"): after(
        optax.selective_transform(optax.sgd(1e-2), freeze_mask={"head": True, "shared": False})
    ),
    ("after", "sgd"): after(optax.sgd(1e-2, 0.9)),
    ("after", "snapshot"): after(optax.snapshot("norm", optax.tree.norm)),
    ("before", "add_noise"): before(optax.add_noise(0.1, 0.5, jax.random.key(0))),
    ("before", "clip"): before(optax.clip(1.0)),
    ("before", "per_task"): before(mtl.per_task(optax.scale_by_adam(), T)),
    ("before", "per_task, apply_every"): before(mtl.per_task(optax.apply_every(2), T)),
    ("before", "per_task, snapshot"): before(mtl.per_task(optax.snapshot("n", optax.tree.norm), T)),
    ("before", "scale"): before(optax.scale(2.0)),
    ("before", "scale_by_schedule"): before(optax.scale_by_schedule(lambda count: 0.5)),
    ("before", "scale_by_sign"): before(optax.scale_by_sign()),
    ("before", "zero_nans"): before(optax.zero_nans()),
    ("around", "accumulate"): Works(mtl.accumulate(WHOLE, T, 2)),
    ("around", "apply_if_finite, reduce=False"): Works(
        optax.chain(optax.apply_if_finite(mtl.mgda(T, reduce=False), 2), BALANCE)
    ),
    ("around", "chain"): Works(optax.chain(optax.chain(optax.chain(BALANCE), optax.adam(1e-2)))),
    ("around", "inject_hyperparams"): Works(
        optax.inject_hyperparams(mtl.cagrad, static_args=("tasks", "rescale"))(
            tasks=T, c=lambda step: 0.1 + 0.1 * step
        )
    ),
    ("around", "lookahead"): Works(optax.lookahead(WHOLE, 2, 0.5), {}, PAIR),
    ("around", "masked"): Works(
        optax.chain(
            optax.masked(mtl.moco(T), ONLY_SHARED),
            optax.masked(BALANCE, {"head": True, "shared": False}),
            optax.adam(1e-2),
        )
    ),
    ("around", "named_chain"): Works(
        optax.named_chain(("balance", BALANCE), ("optimizer", optax.adam(1e-2)))
    ),
    ("around", "partition"): Works(optax.partition(GROUPS, LABELS)),
    ("around", "partition, labels from paths"): Works(
        optax.partition(GROUPS, functools.partial(jax.tree_util.tree_map_with_path, label))
    ),
    ("around", "partition, extra arguments masked"): Works(
        optax.partition(GROUPS, LABELS, mask_compatible_extra_args=True)
    ),
    ("around", "partition, then one optimizer"): Works(
        optax.chain(
            optax.partition({"shared": mtl.mgda(T), "head": BALANCE}, LABELS), optax.adam(1e-2)
        )
    ),
    ("around", "process"): Works(
        aggregating.process(
            optax.with_extra_args_support(optax.identity()),
            mtl.scale_invariant(T),
            optax.with_extra_args_support(optax.adam(1e-2)),
        )
    ),
    ("around", "schedule_free"): Works(optax.contrib.schedule_free(WHOLE, 1e-2)),
    ("around", "skip_nonfinite"): Works(mtl.skip_nonfinite(WHOLE)),
    ("around", "split_real_and_imaginary"): Works(
        optax.contrib.split_real_and_imaginary(WHOLE), {}
    ),
    ("around", "five levels"): Works(
        mtl.skip_nonfinite(
            mtl.accumulate(
                optax.partition(
                    {
                        "shared": optax.chain(
                            mtl.per_task(optax.clip_by_global_norm(1.0), T),
                            mtl.metabalance(T, reduce=False),
                            mtl.grad_surgery(T),
                            optax.apply_if_finite(optax.adam(1e-2), 2),
                        ),
                        "head": optax.chain(BALANCE, optax.adam(1e-2)),
                    },
                    LABELS,
                ),
                T,
                2,
            )
        )
    ),
}


def names(table):
    return [f"{where}: {name}" for where, name in table]


@pytest.mark.parametrize("case", WORKS.values(), ids=names(WORKS))
def test_works(case):
    if case.scans:
        assert traced(case.tx, case.params, **case.extra) == shape_of(case.params)
    else:
        update, _ = jax.eval_shape(lambda: run(case.tx, params=case.params, **case.extra))
        assert shape_of(update) == shape_of(case.params)
    mtl.check(case.tx, shapes(case.params), T, **case.extra)


# --- what a shape can show ---------------------------------------------------------------------------

# The transformation, and where its state would get the task axis.
STATEFUL = {
    "scale_by_adam": (optax.scale_by_adam(), "mu['head']"),
    "scale_by_lion": (optax.scale_by_lion(), "mu['head']"),
    "scale_by_rms": (optax.scale_by_rms(), "nu['head']"),
    "trace": (optax.trace(0.9), "trace['head']"),
    "ema": (optax.ema(0.9), "ema['head']"),
    "apply_every": (optax.apply_every(2), "grad_acc['head']"),
}
TRAINED = optax.chain(mtl.mgda(T), optax.sgd(1e-2))
KEEPS_AXIS = {
    "partition": optax.partition(
        {"trained": TRAINED, "frozen": optax.set_to_zero()}, {"head": "frozen", "shared": "trained"}
    ),
    "partition, another optimizer": optax.partition(
        {"trained": TRAINED, "frozen": optax.adam(0.1)}, {"head": "frozen", "shared": "trained"}
    ),
    "masked": optax.masked(TRAINED, ONLY_SHARED),
    "masked, an optimizer after it": optax.chain(
        optax.masked(mtl.mgda(T), ONLY_SHARED), optax.adam(0.1)
    ),
    "selective_transform": optax.selective_transform(
        TRAINED, freeze_mask={"head": True, "shared": {"b": False, "w": False}}
    ),
}
# The wrapper, and what `check` says of it.
CANNOT_STAND_AROUND = {
    "MultiSteps": (
        optax.MultiSteps(WHOLE, 2),
        "optax.MultiSteps, found at state, stands around a method: it accumulates gradients shaped like "
        "the parameters, without the task axis. Use mtl_optax.accumulate(inner, tasks, every_k=...) in its "
        "place.",
    ),
    "apply_if_finite": (
        optax.apply_if_finite(WHOLE, 2),
        "optax.apply_if_finite, found at state, stands around a method: it returns updates with the task "
        "axis when it skips a step. Use mtl_optax.skip_nonfinite(inner) in its place.",
    ),
    "conditionally_mask": (
        optax.conditionally_mask(WHOLE, lambda step: step < 3),
        "update raises TypeError: ",
    ),
    "conditionally_transform": (
        optax.conditionally_transform(WHOLE, lambda step: step < 3),
        "update raises TypeError: ",
    ),
    "mechanize": (optax.contrib.mechanize(WHOLE), "update raises "),
    "flatten": (
        optax.flatten(WHOLE),
        "sum_tasks: updates must carry a leading task axis of size 3: leaf (the root) has shape (45,), "
        "expected (3, 15). The gradients of all tasks were concatenated into one vector, as optax.flatten "
        "does: put it after the method.",
    ),
    "sam": (
        mtl.drop_extra_args(optax.contrib.sam(WHOLE, WHOLE), "losses"),
        # It computes `c * old + (1 - c) * new` with every state.
        "state.opt_state[0].weighed changes its dtype from bool to int32, which jax.lax.scan refuses and "
        "jax.jit compiles anew. See docs/composition.md.",
    ),
}
REMEDY = (
    "What stands before or around a method is given gradients with a task axis. Put it after the method; "
    "before it, apply it per task: mtl_optax.per_task(inner, tasks). See docs/composition.md."
)


def labels(is_shared):
    return functools.partial(jax.tree.map, lambda x: "shared" if is_shared(x) else "head")


# Of the parameters none is shared, of their gradients all or most are.
RANKS = {
    "ndim": labels(lambda x: jnp.ndim(x) >= 3),
    "shape": labels(lambda x: jnp.shape(x)[:1] == (T,)),
}
FUNCTION_OF_SHAPES = (
    "\nA function for labels or a mask sees the parameters at init, and gradients with the task axis at "
    "update. If it looks at ranks or shapes, give its result on the parameters instead."
)


def by_ranks(labels):
    same = optax.chain(BALANCE, optax.adam(1e-2))
    return optax.partition({"head": same, "shared": same}, labels)


# No shape shows these; `check` runs them.
MIXES = {
    "clip_by_global_norm": Works(optax.clip_by_global_norm(1.0)),
    "clip_by_block_rms": Works(optax.clip_by_block_rms(1.0)),
    "normalize": Works(optax.contrib.normalize()),
    "normalize_by_update_norm": Works(optax.normalize_by_update_norm()),
    "scale_by_polyak": Works(optax.scale_by_polyak(), {"value": jnp.ones(())}),
    "scale_by_trust_ratio": Works(optax.scale_by_trust_ratio()),
}
DECAYS = {
    "add_decayed_weights": optax.add_decayed_weights(1e-4),
    "keep_params_nonnegative": optax.keep_params_nonnegative(),
    "per_task, adamw": mtl.per_task(optax.adamw(1e-2), T),
}
REFUSED = {
    **{("before", name): optax.chain(tx, BALANCE) for name, (tx, _) in STATEFUL.items()},
    ("before", "adaptive_grad_clip"): optax.chain(optax.adaptive_grad_clip(0.1), BALANCE),
    ("before", "snapshot"): optax.chain(
        optax.snapshot("norms", jax.vmap(optax.tree.norm)), BALANCE
    ),
    **{("before", name): optax.chain(case.tx, BALANCE) for name, case in MIXES.items()},
    ("before", "add_decayed_weights"): optax.chain(DECAYS["add_decayed_weights"], BALANCE),
    **{("around", name): tx for name, (tx, _) in CANNOT_STAND_AROUND.items()},
    **{("around", name): by_ranks(labels) for name, labels in RANKS.items()},
    **{("beside", name): tx for name, tx in KEEPS_AXIS.items()},
}


@pytest.mark.parametrize("tx", REFUSED.values(), ids=names(REFUSED))
def test_is_refused(tx):
    """The messages are in the tests below."""
    found = refusal(tx, value=jnp.ones(()))
    assert found.startswith("check: ")
    assert len(found) <= 320


# --- what no shape shows -----------------------------------------------------------------------------


def mixed(method="sum_tasks"):
    return (
        f"check: what stands before {method} mixes the tasks, as optax.clip_by_global_norm "
        "does with one norm over all of them: the gradient of a task depends on those of the others. Put "
        "it after the method, or apply it per task: mtl_optax.per_task(inner, tasks)."
    )


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_the_tasks_is_refused(name):
    case = MIXES[name]
    assert refusal(optax.chain(case.tx, BALANCE), **case.extra) == mixed()
    mtl.check(optax.chain(mtl.per_task(case.tx, T), BALANCE), shapes(PARAMS), **case.extra)


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_the_tasks_does_so(name):
    tx, extra = MIXES[name].tx, MIXES[name].extra
    # The gradient of the second task alone grows.
    louder = jax.tree.map(lambda g: g.at[1].multiply(10.0), GRADS)

    @jax.jit
    def first_task(grads):
        bare, lifted = optax.with_extra_args_support(tx), mtl.per_task(tx, T)
        updates = [run(transformation, grads, **extra)[0] for transformation in (bare, lifted)]
        return jax.tree.map(lambda u: u[0], updates)

    (bare, lifted), (bare_louder, lifted_louder) = first_task(GRADS), first_task(louder)
    assert difference(bare, bare_louder) > 0.01
    assert_close(lifted, lifted_louder)


CLIP = optax.clip_by_global_norm(1.0)
MIXES_INSIDE = {
    "a chain": (optax.chain(optax.chain(optax.scale(2.0), CLIP), optax.chain(BALANCE)), {}),
    "a branch": (
        optax.chain(
            optax.apply_if_finite(optax.chain(CLIP, mtl.mgda(T, reduce=False)), 2), BALANCE
        ),
        {"method": "mgda"},
    ),
    "a guard": (mtl.skip_nonfinite(optax.chain(CLIP, BALANCE)), {}),
    "accumulate": (mtl.accumulate(optax.chain(CLIP, BALANCE), T, 4), {}),
    "front of accumulate": (optax.chain(CLIP, mtl.accumulate(BALANCE, T, 4)), {}),
    "front of remember": (optax.chain(CLIP, mtl.remember(BALANCE)), {}),
    "inject_hyperparams": (
        optax.chain(optax.inject_hyperparams(optax.clip_by_global_norm)(1.0), BALANCE),
        {},
    ),
    "a group": (
        optax.partition({"head": BALANCE, "shared": optax.chain(CLIP, mtl.mgda(T))}, LABELS),
        {"method": "mgda"},
    ),
    "the last group": (
        optax.partition({"head": mtl.mgda(T), "shared": optax.chain(CLIP, BALANCE)}, LABELS),
        {},
    ),
    "front of masks": (
        optax.chain(
            CLIP,
            optax.masked(mtl.mgda(T), ONLY_SHARED),
            optax.masked(BALANCE, {"head": True, "shared": False}),
        ),
        {"method": "mgda"},
    ),
    "what is lifted": (optax.chain(mtl.per_task(optax.trace(0.9), T), CLIP, BALANCE), {}),
    "front of two methods": (
        optax.chain(CLIP, mtl.metabalance(T, reduce=False), mtl.grad_surgery(T)),
        {"method": "metabalance"},
    ),
    "only when it is large": (optax.chain(optax.clip_by_global_norm(100.0), BALANCE), {}),
}


@pytest.mark.parametrize("name", MIXES_INSIDE)
def test_nesting_hides_no_mixing_from_check(name):
    tx, where = MIXES_INSIDE[name]
    assert refusal(optax.chain(tx, optax.adam(1e-2))) == mixed(**where)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_mixing_in_sixteen_bits(dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    assert refusal(optax.chain(CLIP, BALANCE), params) == mixed()
    mtl.check(optax.chain(mtl.per_task(CLIP, T), BALANCE), shapes(params))


@pytest.mark.parametrize("number", [2, 16])
def test_mixing_of_other_numbers_of_tasks(number):
    tx = optax.chain(CLIP, mtl.mean_tasks(number))
    with pytest.raises(ValueError, match="mixes the tasks"):
        mtl.check(tx, shapes(PARAMS))


def test_one_task_cannot_be_mixed():
    mtl.check(optax.chain(CLIP, mtl.sum_tasks(1)), shapes(PARAMS))


@pytest.mark.parametrize(("task", "other"), list(itertools.permutations(range(T), 2)))
def test_one_task_that_looks_at_another_is_seen(task, other):
    looks = lambda updates, _: jax.tree.map(lambda u: u.at[task].add(u[other]), updates)  # noqa: E731
    assert refusal(optax.chain(optax.stateless(looks), BALANCE)) == mixed()


KEEPS_APART = {
    "between methods": optax.chain(mtl.metabalance(T, reduce=False), CLIP, mtl.grad_surgery(T)),
    "noise": optax.chain(optax.add_noise(10.0, 0.5, jax.random.key(0)), BALANCE),
    "noise per task": optax.chain(
        mtl.per_task(optax.add_noise(10.0, 0.5, jax.random.key(0)), T), BALANCE
    ),
    "parameters in a factor": optax.chain(mtl.per_task(optax.adaptive_grad_clip(0.1), T), BALANCE),
    "each row by its own norm": optax.chain(
        optax.stateless(
            lambda updates, _: jax.tree.map(
                lambda u: (
                    u
                    / jnp.linalg.norm(u.reshape(T, -1), axis=1).reshape((T,) + (1,) * (u.ndim - 1))
                ),
                updates,
            )
        ),
        BALANCE,
    ),
    "a schedule": optax.chain(
        optax.inject_hyperparams(optax.scale)(lambda step: 1 / (1 + step)), BALANCE
    ),
}


@pytest.mark.parametrize("name", KEEPS_APART)
def test_what_keeps_the_tasks_apart_passes(name):
    mtl.check(optax.chain(KEEPS_APART[name], optax.adamw(1e-2)), shapes(PARAMS))


def test_heads_without_a_task_axis_may_stand_beside():
    tx = optax.chain(
        optax.masked(optax.chain(mtl.per_task(CLIP, T), mtl.mgda(T)), ONLY_SHARED), optax.sgd(1e-2)
    )
    gradients = shapes({"head": PARAMS["head"], "shared": GRADS["shared"]})
    mtl.check(tx, shapes(PARAMS), gradients=gradients)
    with pytest.raises(ValueError, match="mixes the tasks"):
        mtl.check(optax.chain(CLIP, tx), shapes(PARAMS), gradients=gradients)


@pytest.mark.parametrize("where", ["init", "update"])
def test_an_optimizer_that_needs_its_shapes_is_not_run(where):
    """Then what mixes the tasks is not seen; the shapes are."""

    def of_these_shapes(tree):
        assert jnp.shape(tree["head"])[-2:] == (2, 3)
        return tree

    init = (lambda params: of_these_shapes(params) and ()) if where == "init" else lambda params: ()
    keeps = optax.GradientTransformation(
        init, lambda updates, state, params=None: (of_these_shapes(updates), state)
    )
    mtl.check(optax.chain(keeps, CLIP, BALANCE), shapes(PARAMS))
    assert refusal(optax.chain(keeps, optax.trace(0.9), BALANCE)).startswith(
        "check: state[1].trace"
    )


@pytest.mark.parametrize("name", DECAYS)
def test_a_term_of_the_parameters_before_a_method_is_refused(name):
    assert refusal(optax.chain(DECAYS[name], BALANCE)) == (
        "check: what stands before sum_tasks adds a term of the parameters, such as a "
        "weight decay, to the gradient of every task. Put it after the method."
    )


# --- what `check` cannot see -------------------------------------------------------------------------

# It keeps the tasks apart, and `check` cannot know what it is meant to do within each of them.
SILENT = {("before", "centralize"): before(optax.centralize())}


@pytest.mark.parametrize("case", SILENT.values(), ids=names(SILENT))
def test_passes_check_though_it_is_wrong(case):
    """That it is wrong is shown in the next test."""
    mtl.check(case.tx, shapes(PARAMS), T, **case.extra)
    with jax.numpy_rank_promotion("allow"):
        assert traced(case.tx, **case.extra) == shape_of(PARAMS)


def test_centralize_before_takes_the_task_axis_for_that_of_the_parameter():
    alone, _ = run(mtl.per_task(optax.centralize(), T))
    stacked, _ = run(optax.centralize())
    assert difference(alone, stacked) > 0.1
    # Each row of a matrix is centred on its own, but behind a task axis the whole matrix.
    assert difference(alone["head"].mean(2), jnp.zeros((T, 2))) < 1e-6
    assert difference(stacked["head"].mean((1, 2)), jnp.zeros(T)) < 1e-6
    assert difference(stacked["head"].mean(2), jnp.zeros((T, 2))) > 0.1


def test_weight_decay_before_is_added_once_per_task():
    no_gradients = jax.tree.map(jnp.zeros_like, GRADS)
    decay = optax.add_decayed_weights(0.1)
    with jax.numpy_rank_promotion("allow"):
        update, _ = run(optax.chain(decay, BALANCE), no_gradients)
    assert_close(update, jax.tree.map(lambda p: T * 0.1 * p, PARAMS))
    update, _ = run(optax.chain(BALANCE, decay), no_gradients)
    assert_close(update, jax.tree.map(lambda p: 0.1 * p, PARAMS))


# --- the documentation's table -----------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "composition.md").read_text(encoding="utf-8")
VERDICTS = {
    "yes": WORKS,
    "no: `check` refuses it": REFUSED,
    "**no, and `check` cannot see it**": SILENT,
}


def rows_of_the_page():
    """`(where, names of transformations, verdict)` of each row."""
    section = PAGE.split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [
        (where.split()[0], re.findall(r"`(\w+)`", what), verdict.strip(" |"))
        for where, what, verdict, *_ in rows[1:]
    ]


@pytest.mark.parametrize(
    ("where", "named", "verdict"),
    rows_of_the_page(),
    ids=[f"{where}: {', '.join(named)}" for where, named, _ in rows_of_the_page()],
)
def test_every_row_of_the_page_is_a_case_here(where, named, verdict):
    assert named
    assert [name for name in named if (where, name) not in VERDICTS[verdict]] == []


@pytest.mark.parametrize("verdict", ["no: `check` refuses it", "**no, and `check` cannot see it**"])
def test_the_page_warns_of_every_case_here(verdict):
    warned = {
        (where, name) for where, named, v in rows_of_the_page() for name in named if v == verdict
    }
    assert warned == {(where, name.split(",")[0]) for where, name in VERDICTS[verdict]}


def test_check_names_what_it_cannot_see():
    notes = mtl.check.__doc__.split("Notes:")[1].split("Args:")[0]
    assert [name for _, name in SILENT if name not in notes] == []


# --- E1: chain ---------------------------------------------------------------------------------------


def test_works_in_a_named_chain():
    tx = WORKS["around", "named_chain"].tx
    assert int(tx.update(GRADS, tx.init(PARAMS))[1]["balance"].balance_count) == 1


def test_no_recompilation_on_the_second_step():
    tx = optax.chain(BALANCE, optax.adam(1e-2))
    update = jax.jit(tx.update)
    _, state = update(GRADS, tx.init(PARAMS), PARAMS)
    update(gradients(1), state, PARAMS)
    assert update._cache_size() == 1


def test_zero_nans_may_stand_before_though_the_method_excludes_such_tasks_itself():
    update, _ = run(WORKS["before", "zero_nans"].tx)
    assert_close(update, run(BALANCE)[0])


@pytest.mark.parametrize("name", STATEFUL)
def test_a_stateful_transformation_before_is_refused(name):
    _, where = STATEFUL[name]
    assert refusal(REFUSED["before", name]) == (
        f"check: state[0].{where} changes its shape from (2, 3) to (3, 2, 3): a transformation before the "
        "method keeps one state for all tasks. Put it after the method, or apply it per task: "
        "mtl_optax.per_task(inner, tasks)."
    )


@pytest.mark.parametrize("name", STATEFUL)
def test_update_itself_does_not_look_at_what_stands_before(name):
    """Nothing is raised without `scan`; the state drifts, and with it the compiled program."""
    tx = REFUSED["before", name]
    with jax.numpy_rank_promotion("allow"):
        update, state = jax.eval_shape(lambda: run(tx))
        assert shape_of(update) == shape_of(PARAMS)
        assert shape_of(state) != shape_of(tx.init(PARAMS))
        with pytest.raises(TypeError, match="carry"):
            traced(tx)


def test_a_drifting_state_is_compiled_twice():
    tx = optax.chain(optax.trace(0.9), BALANCE)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    with jax.numpy_rank_promotion("allow"):
        for _ in range(3):
            _, state = update(GRADS, state, PARAMS)
    assert update._cache_size() == 2


def test_rank_promotion_raises_on_a_stateful_transformation_too():
    with pytest.raises(ValueError, match="rank_promotion"):
        run(optax.chain(optax.trace(0.9), BALANCE))


TRACE = optax.trace(0.9)
# A chain that keeps one momentum for all tasks, and where `check` finds it.
HIDDEN = {
    "named chain": (optax.named_chain(("trace", TRACE), ("balance", BALANCE)), "['trace']"),
    "outer chain": (optax.chain(TRACE, optax.chain(BALANCE, optax.sgd(1.0))), "[0]"),
    "chain inside": (optax.chain(optax.chain(optax.scale(2.0), TRACE), BALANCE), "[0][1]"),
    "masked": (optax.chain(optax.masked(TRACE, True), BALANCE), "[0].inner_state"),
    "partition": (
        optax.chain(optax.partition({"all": TRACE}, "all"), BALANCE),
        "[0].inner_states['all'].inner_state",
    ),
    "inject": (
        optax.chain(optax.inject_hyperparams(optax.trace)(0.9), BALANCE),
        "[0].inner_state",
    ),
    "before a guard": (optax.chain(TRACE, mtl.skip_nonfinite(BALANCE)), "[0]"),
    "inside a guard": (mtl.skip_nonfinite(optax.chain(TRACE, BALANCE)), ".inner_state[0]"),
    "before accumulate": (optax.chain(TRACE, mtl.accumulate(BALANCE, T, 2)), "[0]"),
    "before adatask": (optax.chain(TRACE, mtl.adatask(T, optax.scale_by_adam())), "[0]"),
    "before a method with buffers": (optax.chain(TRACE, mtl.moco(T)), "[0]"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_nesting_hides_nothing_from_check(name):
    tx, where = HIDDEN[name]
    assert refusal(tx).startswith(
        f"check: state{where}.trace['head'] changes its shape from (2, 3) to (3, 2, 3)"
    )


def test_a_stateful_transformation_inside_accumulate_is_refused():
    """Its two branches differ in what they return."""
    found = refusal(mtl.accumulate(optax.chain(TRACE, BALANCE), T, 2))
    assert found.startswith("check: update raises TypeError: cond") and found.endswith(REMEDY)


def test_a_transformation_that_makes_the_task_axis_itself():
    def update_fn(updates, state, params=None):
        stacked = jax.tree.map(lambda u: jnp.stack([u, 2 * u, 3 * u]), updates)
        return BALANCE.update(stacked, state, params)

    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.GradientTransformation(BALANCE.init, update_fn)
    )
    assert traced(tx, grads=PARAMS) == shape_of(PARAMS)
    mtl.check(tx, shapes(PARAMS), T, gradients=shapes(PARAMS))


def test_adaptive_grad_clip_before_fails_on_shapes():
    tx = REFUSED["before", "adaptive_grad_clip"]
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match="Shape mismatch"):
        jax.eval_shape(lambda: run(tx))
    found = refusal(tx)
    assert found.startswith("check: update raises ValueError: Shape mismatch")
    assert found.endswith(f"\n{REMEDY}")


def test_snapshot_of_a_vmapped_measure_before_fails_at_init():
    tx = REFUSED["before", "snapshot"]
    with pytest.raises(ValueError, match="vmap"):
        tx.init(PARAMS)
    found = refusal(tx)
    assert found.startswith("check: init raises ValueError: vmap")
    assert found.endswith(
        "\nA transformation before the method looks at the task axis, which the parameters that init sees "
        "do not have. Apply it per task: mtl_optax.per_task(inner, tasks)."
    )


PER_TASK = {
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "trace": optax.trace(0.9),
    "normalize": optax.contrib.normalize(),
    "scale_by_adam": optax.scale_by_adam(),
}


@pytest.mark.parametrize("name", sampled(PER_TASK, ["normalize", "trace"]))
def test_per_task_makes_it_right(name):
    tx = optax.chain(mtl.per_task(PER_TASK[name], T), BALANCE)
    assert traced(tx) == shape_of(PARAMS)
    inner = optax.with_extra_args_support(PER_TASK[name])
    alone = [
        inner.update(jax.tree.map(lambda g, t=t: g[t], GRADS), inner.init(PARAMS), PARAMS)[0]
        for t in range(T)
    ]
    assert_close(run(tx)[0], jax.tree.map(lambda *rows: sum(rows), *alone))


def test_per_task_apply_every_gives_the_method_zeros_in_between():
    tx = optax.chain(mtl.per_task(optax.apply_every(2), T), mtl.mgda(T))
    update = jax.jit(tx.update)
    _, state = update(GRADS, tx.init(PARAMS), PARAMS)
    assert not state[1].norms.any()
    _, state = update(GRADS, state, PARAMS)
    assert state[1].norms.all()


# --- E2: masked, partition ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", RANKS)
def test_labels_from_ranks_fail_because_gradients_have_one_more(name):
    expected = "Expected named tuple" if OPTAX < (0, 2, 8) else r"(?i)structure|mismatch|None"
    tx = REFUSED["around", name]
    with pytest.raises(ValueError, match=expected):
        run(tx)
    found = refusal(tx)
    assert found.startswith("check: update raises ValueError: ")
    assert found.endswith(FUNCTION_OF_SHAPES)
    mtl.check(by_ranks(RANKS[name](PARAMS)), shapes(PARAMS), T)


def test_masked_alone_leaves_the_rest_stacked():
    update, _ = run(optax.masked(BALANCE, ONLY_SHARED))
    assert update["head"].shape == (T, 2, 3) and update["shared"]["w"].shape == (4, 2)


@pytest.mark.parametrize("name", KEEPS_AXIS)
def test_a_part_that_keeps_the_task_axis_is_refused(name):
    tx = KEEPS_AXIS[name]
    assert refusal(tx) == (
        "check: the update of leaf ['head'] has shape (3, 2, 3), expected (2, 3): its part of "
        "optax.partition, masked or selective_transform keeps the task axis. Begin it with a method, such "
        "as mtl_optax.sum_tasks(tasks); to freeze, put optax.transforms.freeze(mask) last. If update is "
        "given none there, give check gradients=."
    )
    # Nothing else finds it: `optax.apply_updates` would broadcast it into the parameters.
    with jax.numpy_rank_promotion("allow"):
        update, _ = jax.eval_shape(lambda: run(tx))
    assert update["head"].shape == (T, 2, 3)


def test_two_ways_to_freeze():
    groups = {"trained": TRAINED, "frozen": optax.chain(mtl.sum_tasks(T), optax.set_to_zero())}
    for frozen in (
        freeze(TRAINED),
        optax.partition(groups, {"head": "frozen", "shared": "trained"}),
    ):
        mtl.check(frozen, shapes(PARAMS), T)
        update, _ = jax.jit(lambda frozen=frozen: run(frozen))()
        assert shape_of(update) == shape_of(PARAMS)
        assert not np.any(update["head"]) and np.any(update["shared"]["w"])


def test_head_gradients_that_were_summed_already():
    """From `split_value_and_grad`: one backward pass through the heads, and no task axis there."""
    tx = optax.chain(optax.masked(mtl.mgda(T), ONLY_SHARED), optax.sgd(1e-2))
    mixed = {"head": PARAMS["head"], "shared": GRADS["shared"]}
    assert traced(tx, grads=mixed) == shape_of(PARAMS)
    mtl.check(tx, shapes(PARAMS), T, gradients=shapes(mixed))


def test_extra_arguments_shaped_like_the_gradients_are_masked_with_them():
    noise = jax.tree.map(jnp.ones_like, PARAMS)
    groups = {"shared": mtl.graddrop(T), "head": BALANCE}
    masks = optax.partition(groups, LABELS, mask_compatible_extra_args=True)
    assert shape_of(jax.eval_shape(lambda: run(masks, noise=noise))[0]) == shape_of(PARAMS)
    with pytest.raises(ValueError):
        jax.eval_shape(lambda: run(optax.partition(groups, LABELS), noise=noise))


# --- E3: wrappers that take updates for parameters ---------------------------------------------------


@pytest.mark.parametrize("name", CANNOT_STAND_AROUND)
def test_wrappers_that_cannot_stand_around_are_refused(name):
    tx, why = CANNOT_STAND_AROUND[name]
    found = refusal(tx)
    assert found.startswith(f"check: {why}")
    assert "in its place" in found or "after the method" in found or name == "sam"


def test_wrappers_are_found_inside_of_others():
    tx = mtl.skip_nonfinite(optax.chain(optax.MultiSteps(WHOLE, 2).gradient_transformation()))
    assert refusal(tx).startswith(
        "check: optax.MultiSteps, found at state.inner_state[0], stands around a method: it accumulates"
    )


# What they raise by themselves at `update`; only the message about flatten is ours.
RAISE = {
    "MultiSteps": ((TypeError, ValueError), "acc_grads|sum_tasks"),
    "apply_if_finite": (TypeError, "cond"),
    "conditionally_mask": (TypeError, "cond"),
    "conditionally_transform": (TypeError, "cond"),
    # Until optax 0.2.7 an assertion without a message.
    "mechanize": (TypeError, "contracting dimensions")
    if OPTAX >= (0, 2, 8)
    else (AssertionError, None),
    "flatten": (ValueError, "concatenated into one vector"),
}


@pytest.mark.parametrize("name", RAISE)
def test_such_wrappers_raise_by_themselves_too(name):
    error, expected = RAISE[name]
    with jax.numpy_rank_promotion("allow"), pytest.raises(error, match=expected):
        jax.eval_shape(lambda: run(CANNOT_STAND_AROUND[name][0]))


def test_multi_steps_with_an_accumulator_given_the_task_axis():
    tx = optax.MultiSteps(WHOLE, 2)
    state = tx.init(PARAMS)
    state = state._replace(acc_grads=optax.tree.batch_shape(state.acc_grads, (T,)))
    update, _ = jax.eval_shape(tx.update, GRADS, state, PARAMS)
    assert shape_of(update) == shape_of(PARAMS)


@pytest.mark.slow
def test_multi_steps_after_averages_what_the_method_made_of_each_micro_batch():
    method = mtl.mgda(T)
    tx = optax.chain(method, optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation())

    @jax.jit
    def updates(first, second):
        update, _ = tx.update(second, run(tx, first)[1], PARAMS)
        each = [run(method, grads)[0] for grads in (first, second)]
        mean = jax.tree.map(lambda a, b: -(a + b) / 2, *each)
        of_mean, _ = run(method, jax.tree.map(lambda a, b: -(a + b) / 2, first, second))
        return update, mean, of_mean

    update, mean, of_mean = updates(GRADS, gradients(1))
    assert_close(update, mean)
    assert difference(update, of_mean) > 0.05


def test_sam_around_needs_no_losses_and_counts_with_states():
    """It computes `c * old + (1 - c) * new` with every state, which makes integers of bools."""
    tx = optax.contrib.sam(WHOLE, WHOLE)
    with pytest.raises(TypeError, match="losses"):
        run(tx, losses=LOSSES)
    update, state = jax.eval_shape(lambda: run(tx))
    assert shape_of(update) == shape_of(PARAMS)
    assert state.opt_state[0].weighed.dtype == jnp.int32


def test_lookahead_updates_both_copies():
    tx = WORKS["around", "lookahead"].tx
    update, _ = tx.update(GRADS, tx.init(PAIR), PAIR)
    assert shape_of(update.fast) == shape_of(update.slow) == shape_of(PARAMS)


def test_accumulation_by_microbatches_is_exact():
    x = jax.random.normal(jax.random.key(1), (8, 4))

    def per_task(w, x):
        losses_of = lambda w: jnp.stack([(x @ w).mean(), ((x @ w) ** 2).mean(), jnp.sum(w**2)])  # noqa: E731
        return mtl.per_task_value_and_grad(losses_of)(w)

    w = jnp.arange(4.0)
    whole = per_task(w, x)
    parts = microbatching.microbatch(
        per_task,
        argnums=1,
        microbatch_size=4,
        accumulator=microbatching.AccumulationType.MEAN,
    )(w, x)
    assert_close(parts, whole)


def test_a_guard_inside_alone_would_not_save_a_memory_but_ours_needs_none():
    """`apply_if_finite` behind a method sees the update only; the method excludes the task itself."""
    tx = optax.chain(mtl.moco(T), optax.apply_if_finite(optax.sgd(1e-2), 2))
    spoilt = jax.tree.map(lambda g: g.at[1].set(jnp.nan), GRADS)
    update, state = run(tx, spoilt)
    for leaf in jax.tree.leaves((update, state)):
        assert np.isfinite(leaf).all()


# --- E4: inject_hyperparams --------------------------------------------------------------------------


def test_inject_hyperparams_with_static_tasks():
    state = jax.eval_shape(WORKS["around", "inject_hyperparams"].tx.init, PARAMS)
    assert state.hyperparams["c"].shape == ()


def test_inject_hyperparams_hands_options_on():
    inject = optax.inject_hyperparams(mtl.metabalance, static_args=("tasks", "target"))
    tx = inject(tasks=T, relax_factor=0.5, blocks="all")
    assert tx.init(PARAMS).inner_state.weights.shape == (1, T)
    inject = optax.inject_hyperparams(mtl.mgda, static_args=("tasks",))
    update, _ = jax.eval_shape(lambda: run(inject(tasks=T, reduce=False)))
    assert shape_of(update) == shape_of(GRADS)


INJECTED = {
    "lambda": lambda: optax.inject_hyperparams(lambda c: mtl.cagrad(T, c=c))(c=0.3),
    "positional": lambda: optax.inject_hyperparams(functools.partial(mtl.scale_invariant, T))(),
    "integer seed": lambda: optax.inject_hyperparams(mtl.rlw, static_args="tasks")(T, seed=3),
}


@pytest.mark.parametrize("name", INJECTED)
def test_inject_hyperparams_other_ways(name):
    tx = INJECTED[name]()
    assert traced(tx, losses=LOSSES) == shape_of(PARAMS)
    # Without parameters too.
    update, _ = jax.eval_shape(lambda: tx.update(GRADS, tx.init(PARAMS), losses=LOSSES))
    assert shape_of(update) == shape_of(PARAMS)


# The argument is in the signature still, so it is traced all the same.
NOT_STATIC = {
    "tasks": lambda: optax.inject_hyperparams(functools.partial(mtl.mgda, tasks=T))(),
    "rescale": lambda: optax.inject_hyperparams(functools.partial(mtl.cagrad, T, rescale=0))(c=0.3),
}


@pytest.mark.parametrize("name", NOT_STATIC)
def test_a_partial_does_not_make_an_argument_static(name):
    tx = NOT_STATIC[name]()
    with pytest.raises(TypeError, match=f"{name} must be a Python integer"):
        tx.init(PARAMS)
    assert refusal(tx).endswith(
        "found a JAX array. Under optax.inject_hyperparams name it static: "
        f"static_args=('{name}', ...)."
    )


# --- E5: extra arguments -----------------------------------------------------------------------------


def test_a_plain_transformation_never_sees_losses():
    seen = []

    def update_fn(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    plain = optax.GradientTransformation(lambda params: (), update_fn)
    run(optax.chain(BALANCE, plain), losses=LOSSES)
    assert seen == [{}]


def test_a_bare_transformation_refuses_losses_where_a_chain_drops_them():
    with pytest.raises(TypeError, match="losses"):
        run(optax.scale_by_adam(), PARAMS, losses=LOSSES)
    update, _ = jax.eval_shape(lambda: run(optax.adam(1e-2), PARAMS, losses=LOSSES))
    assert shape_of(update) == shape_of(PARAMS)


RATES = (
    *(
        "adabelief",
        "adadelta",
        "adafactor",
        "adagrad",
        "adam",
        "adamax",
        "adamaxw",
        "adamw",
        "adan",
    ),
    *(
        "amsgrad",
        "fromage",
        "lamb",
        "lars",
        "lion",
        "nadam",
        "nadamw",
        "novograd",
        "optimistic_adam_v2",
    ),
    *("optimistic_gradient_descent", "radam", "rmsprop", "rprop", "sgd", "sign_sgd", "sm3", "yogi"),
)
OPTIMIZERS = {
    **{name: after(getattr(optax, name)(1e-2)) for name in RATES},
    "lbfgs": after(mtl.drop_extra_args(optax.lbfgs(), "losses"), **SEARCH),
    "noisy_sgd": after(optax.noisy_sgd(1e-2, key=0)),
    "polyak_sgd": after(optax.polyak_sgd(), value=LOSSES.sum()),
}


@pytest.mark.parametrize("name", sampled(OPTIMIZERS, ["adam", "lbfgs"]))
def test_every_optimizer_of_optax_follows_a_method(name):
    vectors = jax.tree.map(jnp.atleast_1d, PARAMS)  # sm3 takes no scalars
    tx, given = OPTIMIZERS[name].tx, OPTIMIZERS[name].extra
    mtl.check(tx, vectors if name == "sm3" else PARAMS, **given)


# Without `drop_extra_args`; the other way round they are among the cases that work.
REFUSES_LOSSES = {
    "lbfgs": optax.lbfgs(),
    "scale_by_backtracking_linesearch": optax.scale_by_backtracking_linesearch(3),
    "scale_by_zoom_linesearch": optax.scale_by_zoom_linesearch(3),
    "sam": optax.contrib.sam(optax.sgd(1e-2), optax.sgd(1e-2)),
}


@pytest.mark.parametrize("name", REFUSES_LOSSES)
def test_what_refuses_losses_needs_them_dropped(name):
    tx = optax.chain(mtl.scale_invariant(T), REFUSES_LOSSES[name])
    extra = {} if name == "sam" else SEARCH
    with pytest.raises(TypeError, match="losses"):
        run(tx, losses=LOSSES, **extra)
    found = refusal(tx, **extra)
    assert found.startswith("check: update raises TypeError: ")
    assert found.endswith(
        "\nA part of this optimizer refuses the extra argument losses. Wrap that part: "
        "mtl_optax.drop_extra_args(inner, 'losses')."
    )


LOSSES_INSIDE = {
    "lookahead": (optax.lookahead(after(optax.sgd(1e-2)).tx, 2, 0.5), PAIR),
    "split_real_and_imaginary": (
        optax.contrib.split_real_and_imaginary(after(optax.sgd(1e-2)).tx),
        PARAMS,
    ),
}


@pytest.mark.parametrize("name", LOSSES_INSIDE)
def test_wrappers_that_hand_no_losses_on(name):
    tx, params = LOSSES_INSIDE[name]
    with pytest.raises(TypeError, match="losses"):
        run(tx, params=params, losses=LOSSES)
    assert refusal(tx, params) == (
        f"check: {NEEDS_LOSSES}, an array [3] in the order of the task axis, or a dictionary by task name. "
        "A transformation around the method hands no losses on: put it after the method, or use a method "
        "that needs none."
    )


def test_a_line_search_whose_value_function_takes_the_losses():
    given = {**SEARCH, "value_fn": lambda params, losses: squares(params)}
    tx = optax.chain(mtl.scale_invariant(T), optax.scale_by_backtracking_linesearch(3))
    update, _ = jax.eval_shape(lambda: run(tx, losses=LOSSES, **given))
    assert shape_of(update) == shape_of(PARAMS)


@pytest.mark.parametrize("name", ["polyak_sgd", "reduce_on_plateau"])
def test_value_must_be_a_scalar(name):
    """Those that work are called with one."""
    with pytest.raises((TypeError, ValueError)):
        traced(WORKS["after", name].tx, losses=LOSSES, value=LOSSES)


def test_aggregators_take_extra_arguments_only_if_each_part_does():
    plain = aggregating.process(optax.identity(), BALANCE, optax.adam(1e-2))
    update, _ = jax.eval_shape(lambda: run(plain))
    assert shape_of(update) == shape_of(PARAMS)
    with pytest.raises(TypeError, match="losses"):
        run(plain, losses=LOSSES)
    average = optax.chain(aggregating.average_per_element_updates(0), optax.adam(1e-2))
    update, _ = jax.eval_shape(lambda: run(average))
    assert shape_of(update) == shape_of(PARAMS)
    with pytest.raises(TypeError, match="losses"):
        run(average, losses=LOSSES)


# --- E6: state tools ---------------------------------------------------------------------------------


def test_state_tools_find_the_fields():
    tx = optax.chain(BALANCE, optax.adam(1e-2))
    _, state = run(tx)
    assert optax.tree.get(state, "weights").tolist() == [[1.0] * T]
    assert int(optax.tree.get(state, "balance_count")) == 1
    assert isinstance(optax.tree.get(state, "BalanceState"), mtl.BalanceState)
    assert int(optax.tree.get(state, "count")) == 1  # Adam's, and nobody else's
    moved = optax.tree.set(state, weights=jnp.zeros((1, T)))
    assert optax.tree.get(moved, "weights").tolist() == [[0.0] * T]


def test_state_tools_find_the_fields_through_inject_hyperparams():
    state = jax.eval_shape(WORKS["around", "inject_hyperparams"].tx.init, PARAMS)
    assert optax.tree.get(state, "weights").shape == (1, T)


def test_init_takes_shapes():
    tx = optax.chain(mtl.moco(T), optax.adam(1e-2))
    assert shape_of(jax.eval_shape(tx.init, shapes(PARAMS))) == shape_of(tx.init(PARAMS))
    assert shape_of(mtl.moco(T).init(shapes(PARAMS))) == shape_of(mtl.moco(T).init(PARAMS))


@pytest.mark.parametrize("name", ["mgda", "moco", "scale_by_mtadam", "metabalance", "adatask"])
def test_map_params_gives_back_any_state(name):
    tx = make(name, T)
    state = tx.init(PARAMS)
    same = optax.tree.map_params(tx, lambda leaf: leaf, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    assert shape_of(same) == shape_of(state)


def test_specs_of_stacked_states_need_one_more_axis():
    """`map_params` hands a buffer `[T, ...]` the spec of its parameter, which has one axis less."""
    tx = mtl.moco(T)
    state = jax.eval_shape(tx.init, PARAMS)
    specs = jax.tree.map(lambda p: jax.P(*("model",) * p.ndim), PARAMS)
    shapes = jax.tree.map(lambda p: p.ndim, PARAMS)

    def spec_of(leaf, spec, ndim):
        return jax.P(*(None,) * (leaf.ndim - ndim), *spec)

    found = optax.tree.map_params(
        tx, spec_of, state, specs, shapes, transform_non_params=lambda _: jax.P()
    )
    padded = jax.tree.leaves(found, is_leaf=lambda node: isinstance(node, jax.P))
    ranks = jax.tree.leaves(jax.tree.map(lambda leaf: leaf.ndim, state))
    assert all(len(spec) in (0, rank) for spec, rank in zip(padded, ranks, strict=True))
    assert jax.P(None, "model", "model") in padded


# --- E7: explicit meshes -----------------------------------------------------------------------------


@pytest.mark.slow
def test_gram_under_an_explicit_mesh():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,))
    params = {"w": jax.device_put(jnp.ones((4,)), jax.NamedSharding(mesh, jax.P("model")))}
    grads = jax.random.normal(jax.random.key(0), (T, 4))
    spread = jax.device_put(grads, jax.NamedSharding(mesh, jax.P(None, "model")))
    tx = mtl.mgda(T)
    with jax.set_mesh(mesh):
        with pytest.raises(Exception, match=r"(?i)shard"):
            jax.jit(lambda g: jnp.einsum("ti,si->ts", g, g))(spread)
        state = tx.init(params)
        update, after = jax.jit(tx.update)({"w": spread}, state, params)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    expected, _ = tx.update({"w": grads}, tx.init({"w": jnp.ones(4)}))
    assert_close(jax.device_get(update), expected)


# --- E8: odd trees -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", sampled(["mgda", "metabalance", "moco", "graddrop"], ["metabalance", "graddrop"])
)
def test_odd_trees(name):
    """No leaf, a scalar, an empty tree, one task."""
    params = {"empty": {}, "none": None, "scalar": jnp.ones(())}
    for tree in (params, {}):
        mtl.check(optax.chain(make(name, T), optax.adam(1e-2)), shapes(tree), T)
        mtl.check(optax.chain(make(name, 1), optax.adam(1e-2)), shapes(tree), 1)


# Their own Adam does not pass in strict mode, which is optax's code.
WITH_ADAM = ("adatask", "famo", "gradnorm", "imtl", "imtl_l", "ldc_mtl", "uncertainty")


@pytest.mark.parametrize("dtype", sampled(["bfloat16", "float32"], ["bfloat16"]))
@pytest.mark.parametrize(
    "name", sampled(sorted(set(mtl.METHODS) - set(WITH_ADAM)), set(BROAD) - set(WITH_ADAM))
)
def test_strict_dtypes_for_our_part(name, dtype, strict_dtypes):
    params = {"w": jnp.ones((4,), dtype)}
    grads = {"w": jnp.ones((T, 4), dtype)}
    tx = optax.chain(make(name, T), optax.sgd(1e-2))
    update, _ = jax.eval_shape(lambda: run(tx, grads, params, losses=LOSSES))
    assert update["w"].dtype == dtype


def test_donating_stacked_gradients_only_warns():
    def step(grads, state):
        return BALANCE.update(grads, state)[0]

    with pytest.warns(UserWarning, match=re.compile("donated", re.I)):
        jax.jit(step, donate_argnums=0)(gradients(3), BALANCE.init(PARAMS))


def test_flax_serialization_takes_our_states():
    """No typed key in any state: msgpack knows none."""
    serialization = pytest.importorskip("flax.serialization")
    for name in ("rlw", "graddrop", "pcgrad", "metabalance", "moco"):
        tx = optax.chain(make(name, T), optax.adam(1e-2))
        state = tx.init(PARAMS)
        assert_close(serialization.from_bytes(state, serialization.to_bytes(state)), state)


# --- E9: Flax ----------------------------------------------------------------------------------------


def test_linen_train_state_takes_no_losses():
    """Its `apply_gradients` hands keywords to `replace`; three lines of one's own are needed."""
    train_state = pytest.importorskip("flax.training.train_state")
    tx = optax.chain(mtl.scale_invariant(T), optax.sgd(1e-2))
    state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    with pytest.raises(ValueError, match=re.escape(NEEDS_LOSSES)):
        state.apply_gradients(grads=GRADS, losses=LOSSES)
    plain = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=WHOLE)
    assert shape_of(plain.apply_gradients(grads=GRADS).params) == shape_of(PARAMS)


NEEDS_LOSSES = "scale_invariant: needs the losses of this step: update(..., losses=losses)"


def test_nnx_optimizer_state_holds_variables():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(BALANCE, optax.sgd(1e-2)), wrt=nnx.Param)
    weights = optax.tree.get(optimizer.opt_state, "weights")
    assert isinstance(weights, nnx.Variable) and weights[...].shape == (1, T)


def test_labels_of_variables_are_refused_as_nnx_optimizer_refuses_them():
    """It calls `init` on variables and `update` on their arrays; labels from arrays or paths fit both."""
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    grads = jax.tree.map(lambda p: jnp.ones((T, *p.shape)), params)
    arrays = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure

    def step(labels):
        tx = optax.partition({"kernel": WHOLE, "bias": WHOLE}, labels)
        return tx, nnx.Optimizer(model, tx, wrt=nnx.Param)

    by_path = functools.partial(
        jax.tree.map_with_path, lambda path, _: "bias" if "bias" in str(path) else "kernel"
    )
    tx, optimizer = step(by_path(params))
    with pytest.raises(ValueError, match="structure"):
        optimizer.update(model, grads)
    found = refusal(tx, params)
    assert found.startswith("check: update raises ValueError: pytree structure error")
    assert found.endswith(
        "\nnnx.Optimizer calls init on variables, and update on their arrays. Make labels and masks that "
        "are trees from nnx.as_pure(params), or give functions of the paths."
    )
    for labels in (by_path, by_path(arrays(params))):
        tx, optimizer = step(labels)
        mtl.check(tx, params)
        optimizer.update(model, grads)
