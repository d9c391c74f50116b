"""Which optax transformations and wrappers go before, after and around a method, row by row.

What works is traced through `scan`, which refuses a state whose shapes or dtypes drift; what fails is
pinned with its message: ours word for word, optax's own by what it is about. An optax release that
changes a row, or hides the frames by which a method sees what stands before it, is seen here.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import microbatching
from optax.experimental import aggregating

import mtl_optax as mtl

T = 3
OPTAX = tuple(map(int, optax.__version__.split(".")[:3]))
PARAMS = {"head": jnp.ones((2, 3)), "shared": {"b": jnp.ones(()), "w": jnp.ones((4, 2))}}
LOSSES = jnp.array([0.7, 1.3, 0.2])


def gradients(seed, params=PARAMS):
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    return jax.tree.map(lambda p: jax.random.normal(next(keys), (T, *p.shape)), params)


GRADS = gradients(0)
# Compiled once for the whole file: outside jit an update is its own program.
BALANCE = mtl.sum_tasks(T)
shape_of = functools.partial(jax.tree.map, jnp.shape)


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
    return tx.update(grads, tx.init(params), params, **extra_args)


def assert_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), left, right)


# --- E1: chain ---------------------------------------------------------------------------------------

AFTER = {
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2),
    "adaptive_grad_clip": optax.adaptive_grad_clip(0.1),
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "decay, masked": optax.masked(optax.add_decayed_weights(0.1), {"head": True, "shared": False}),
    "flatten": optax.flatten(optax.adam(1e-2)),
    "keep_params_nonnegative": optax.keep_params_nonnegative(),
    "mechanize": optax.contrib.mechanize(optax.sgd(1e-2)),
    "muon": optax.contrib.muon(1e-2),
    "schedule_free": optax.contrib.schedule_free_sgd(1e-2),
    "sgd, momentum": optax.sgd(1e-2, 0.9),
}


@pytest.mark.parametrize("name", AFTER)
def test_works_before_any_optimizer(name):
    assert traced(optax.chain(BALANCE, AFTER[name]), losses=LOSSES) == shape_of(PARAMS)


def test_monitor_and_snapshot_go_after():
    tx = optax.chain(BALANCE, optax.monitor({"norm": optax.tree.norm}), optax.sgd(1e-2))
    assert shape_of(jax.eval_shape(lambda: run(tx))[0]) == shape_of(PARAMS)


def test_momo_takes_its_scalar_value_beside_the_losses():
    tx = optax.chain(mtl.scale_invariant(T), optax.contrib.momo(1.0))
    assert traced(tx, losses=LOSSES, value=LOSSES.sum()) == shape_of(PARAMS)


def test_works_in_a_named_chain():
    tx = optax.named_chain(("balance", BALANCE), ("optimizer", optax.adam(1e-2)))
    assert traced(tx) == shape_of(PARAMS)
    assert int(tx.update(GRADS, tx.init(PARAMS))[1]["balance"].balance_count) == 1


def test_no_recompilation_on_the_second_step():
    tx = optax.chain(BALANCE, optax.adam(1e-2))
    update = jax.jit(tx.update)
    _, state = update(GRADS, tx.init(PARAMS), PARAMS)
    update(gradients(1), state, PARAMS)
    assert update._cache_size() == 1


ELEMENTWISE = {
    "add_noise": optax.add_noise(0.1, 0.5, jax.random.key(0)),
    "clip": optax.clip(1.0),
    "scale": optax.scale(2.0),
    "scale_by_schedule": optax.scale_by_schedule(lambda count: 0.5),
    "scale_by_sign": optax.scale_by_sign(),
    "zero_nans": optax.zero_nans(),
}


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if name != "zero_nans"])
def test_elementwise_transformations_may_stand_before(name):
    assert traced(optax.chain(ELEMENTWISE[name], BALANCE)) == shape_of(PARAMS)


def test_zero_nans_may_stand_before_though_the_method_excludes_such_tasks_itself():
    update, _ = run(optax.chain(ELEMENTWISE["zero_nans"], BALANCE))
    assert_close(update, run(BALANCE)[0])


# Whether or not ranks may be promoted: jax's own error would come first in this file.
STATEFUL = {
    "scale_by_adam": (optax.scale_by_adam(), "mu['head']"),
    "trace": (optax.trace(0.9), "trace['head']"),
    "ema": (optax.ema(0.9), "ema['head']"),
    "scale_by_rms": (optax.scale_by_rms(), "nu['head']"),
    "apply_every": (optax.apply_every(2), "grad_acc['head']"),
    "scale_by_lion": (optax.scale_by_lion(), "mu['head']"),
}


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("wrap", [lambda update: update, jax.jit], ids=["eager", "jit"])
def test_a_stateful_transformation_before_is_refused(name, wrap):
    before, where = STATEFUL[name]
    tx = optax.chain(before, BALANCE, optax.sgd(1.0))
    message = (
        f"sum_tasks: {name} stands before it in the chain and keeps one state for all tasks; its state "
        f"{where} went from shape (2, 3) to (3, 2, 3). Put it after sum_tasks, or lift it over the "
        f"tasks: mtl_optax.per_task({name}(...), 3)."
    )
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError) as raised:
        wrap(tx.update)(GRADS, tx.init(PARAMS), PARAMS)
    assert str(raised.value) == message


def test_rank_promotion_raises_on_a_stateful_transformation_too():
    with pytest.raises(ValueError, match="rank_promotion"):
        run(optax.chain(optax.trace(0.9), BALANCE))


MIXERS = {
    "clip_by_global_norm": (
        optax.clip_by_global_norm(1.0),
        "takes one norm over all tasks at once",
    ),
    "clip_by_block_rms": (optax.clip_by_block_rms(1.0), "takes norms over all tasks at once"),
    "centralize": (optax.centralize(), "takes means over all tasks at once"),
    "normalize": (optax.contrib.normalize(), "takes one norm over all tasks at once"),
    "normalize_by_update_norm": (
        optax.normalize_by_update_norm(),
        "takes one norm over all tasks at once",
    ),
    "scale_by_trust_ratio": (optax.scale_by_trust_ratio(), "takes norms over all tasks at once"),
}


@pytest.mark.parametrize("name", MIXERS)
def test_a_reduction_over_all_tasks_before_is_refused(name):
    before, why = MIXERS[name]
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError) as raised:
        run(optax.chain(before, BALANCE))
    assert str(raised.value) == (
        f"sum_tasks: {name} stands before it in the chain and {why}. Put it after sum_tasks, or lift it "
        f"over the tasks: mtl_optax.per_task({name}(...), 3)."
    )


def test_weight_decay_before_is_refused():
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError) as raised:
        run(optax.chain(optax.add_decayed_weights(0.1), BALANCE))
    assert str(raised.value) == (
        "sum_tasks: add_decayed_weights stands before it in the chain and adds its term once for every "
        "task. Put it after sum_tasks."
    )


CLIP = optax.clip_by_global_norm(1.0)
HIDDEN = {
    "named chain": optax.named_chain(("clip", CLIP), ("balance", BALANCE)),
    "outer chain": optax.chain(CLIP, optax.chain(BALANCE, optax.sgd(1.0))),
    "chain inside": optax.chain(optax.chain(optax.scale(2.0), CLIP), BALANCE),
    "masked": optax.chain(optax.masked(CLIP, True), BALANCE),
    "partition": optax.chain(optax.partition({"all": CLIP}, "all"), BALANCE),
    "inject": optax.chain(optax.inject_hyperparams(optax.clip_by_global_norm)(1.0), BALANCE),
    "guard": optax.chain(CLIP, mtl.skip_nonfinite(BALANCE)),
    "accumulate": optax.chain(CLIP, mtl.accumulate(BALANCE, T, 2)),
    "adatask": optax.chain(CLIP, mtl.adatask(T, optax.scale_by_adam())),
    "buffered method": optax.chain(CLIP, mtl.moco(T)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_nesting_hides_nothing(name):
    with pytest.raises(ValueError, match=r"clip_by_global_norm stands before it in the chain"):
        run(HIDDEN[name])


def test_what_stands_before_somebody_elses_code_is_not_looked_at():
    """A transformation of the user's may make the task axis itself."""

    def update_fn(updates, state, params=None):
        stacked = jax.tree.map(lambda u: jnp.stack([u, 2 * u, 3 * u]), updates)
        return BALANCE.update(stacked, state, params)

    tx = optax.chain(CLIP, optax.GradientTransformation(BALANCE.init, update_fn))
    assert traced(tx, grads=PARAMS) == shape_of(PARAMS)


def test_adaptive_grad_clip_before_fails_on_shapes():
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match="Shape mismatch"):
        run(optax.chain(optax.adaptive_grad_clip(0.1), BALANCE))


def test_snapshot_of_a_vmapped_measure_before_fails_at_init():
    tx = optax.chain(optax.snapshot("norms", jax.vmap(optax.tree.norm)), BALANCE)
    with pytest.raises(ValueError, match="vmap"):
        tx.init(PARAMS)


PER_TASK = {
    "clip_by_global_norm": CLIP,
    "trace": optax.trace(0.9),
    "normalize": optax.contrib.normalize(),
    "scale_by_adam": optax.scale_by_adam(),
}


@pytest.mark.parametrize("name", PER_TASK)
def test_per_task_makes_it_right(name):
    tx = optax.chain(mtl.per_task(PER_TASK[name], T), BALANCE)
    assert traced(tx) == shape_of(PARAMS)
    inner = optax.with_extra_args_support(PER_TASK[name])
    alone = [
        inner.update(jax.tree.map(lambda g, t=t: g[t], GRADS), inner.init(PARAMS), PARAMS)[0]
        for t in range(T)
    ]
    assert_close(run(tx)[0], jax.tree.map(lambda *rows: sum(rows), *alone))


# --- E2: masked, partition ---------------------------------------------------------------------------


def label(path, _):
    return "shared" if "shared" in jax.tree_util.keystr(path) else "head"


@pytest.mark.parametrize(
    "labels",
    [
        {"head": "head", "shared": "shared"},
        functools.partial(jax.tree_util.tree_map_with_path, label),
    ],
    ids=["prefix", "path"],
)
@pytest.mark.parametrize("mask_extra", [False, True])
def test_partition_by_labels_from_paths(labels, mask_extra):
    groups = {
        "shared": optax.chain(mtl.scale_invariant(T), optax.adam(1e-2)),
        "head": optax.chain(BALANCE, optax.sgd(1e-2)),
        "nothing": optax.chain(mtl.mgda(T), optax.sgd(1e-2)),
    }
    tx = optax.partition(groups, labels, mask_compatible_extra_args=mask_extra)
    assert traced(tx, losses=LOSSES) == shape_of(PARAMS)


def test_labels_from_ranks_fail_because_gradients_have_one_more():
    ranks = functools.partial(jax.tree.map, lambda x: "shared" if jnp.ndim(x) >= 3 else "head")
    groups = {name: optax.chain(BALANCE, optax.adam(1e-2)) for name in ("head", "shared")}
    told = "Expected named tuple" if OPTAX < (0, 2, 8) else r"(?i)structure|mismatch|None"
    with pytest.raises(ValueError, match=told):
        run(optax.partition(groups, ranks))
    assert traced(optax.partition(groups, ranks(PARAMS))) == shape_of(PARAMS)


def test_masked_alone_leaves_the_rest_stacked():
    update, _ = run(optax.masked(BALANCE, {"head": False, "shared": True}))
    assert update["head"].shape == (T, 2, 3) and update["shared"]["w"].shape == (4, 2)


FROZEN = {
    "partition": lambda tx: optax.partition(
        {"trained": tx, "frozen": optax.set_to_zero()}, {"head": "frozen", "shared": "trained"}
    ),
    "another optimizer": lambda tx: optax.partition(
        {
            "trained": tx,
            "frozen": optax.chain(optax.scale_by_schedule(lambda _: 0.5), optax.sgd(0.1)),
        },
        {"head": "frozen", "shared": "trained"},
    ),
}
if hasattr(optax.transforms, "selective_transform"):
    FROZEN["selective"] = lambda tx: optax.transforms.selective_transform(
        tx, freeze_mask={"head": True, "shared": {"b": False, "w": False}}
    )


@pytest.mark.parametrize("name", FROZEN)
def test_a_group_that_keeps_the_task_axis_is_refused(name):
    group = "freeze" if name == "selective" else "frozen"
    told = (
        f"mgda: beside it in the partition stands the group '{group}', whose gradients carry the task axis "
        "too and which does not remove it: its updates would be broadcast into the parameters. Begin it "
        f"with a method: optax.chain(mtl_optax.sum_tasks({T}), ...). To freeze parameters, put "
        "optax.transforms.freeze(mask) after everything."
    )
    with pytest.raises(ValueError) as raised:
        run(FROZEN[name](optax.chain(mtl.mgda(T), optax.sgd(1e-2))))
    assert str(raised.value) == told


def test_two_ways_to_freeze():
    tx = optax.chain(mtl.mgda(T), optax.sgd(1e-2))
    mask = {"head": True, "shared": jax.tree.map(lambda _: False, PARAMS["shared"])}
    groups = {"trained": tx, "frozen": optax.chain(mtl.sum_tasks(T), optax.set_to_zero())}
    for frozen in (
        optax.chain(tx, optax.transforms.freeze(mask)),
        optax.partition(groups, {"head": "frozen", "shared": "trained"}),
    ):
        update, _ = run(frozen)
        assert shape_of(update) == shape_of(PARAMS)
        assert not np.any(update["head"]) and np.any(update["shared"]["w"])


def test_shared_and_heads_recipes():
    groups = {"shared": mtl.mgda(T), "head": BALANCE}
    stacked = optax.chain(
        optax.partition(groups, {"head": "head", "shared": "shared"}), optax.adam(1e-2)
    )
    assert traced(stacked) == shape_of(PARAMS)
    summed = optax.chain(
        optax.masked(mtl.mgda(T), {"head": False, "shared": True}), optax.sgd(1e-2)
    )
    mixed = {"head": PARAMS["head"], "shared": GRADS["shared"]}
    assert traced(summed, grads=mixed) == shape_of(PARAMS)


def test_selective_transform_goes_after():
    freeze = {"head": True, "shared": False}
    with pytest.raises(ValueError, match="beside it in the partition stands the group 'freeze'"):
        run(optax.selective_transform(BALANCE, freeze_mask=freeze))
    after = optax.chain(BALANCE, optax.selective_transform(optax.sgd(1e-2), freeze_mask=freeze))
    assert traced(after) == shape_of(PARAMS)


# --- E3: wrappers that take updates for parameters ---------------------------------------------------

WHOLE = optax.chain(BALANCE, optax.sgd(1e-2))
INSIDE = {
    "MultiSteps": (
        optax.MultiSteps(WHOLE, 2),
        "accumulates gradients shaped like the parameters, without a task axis. Use "
        "mtl_optax.accumulate(inner, num_tasks=3, every_k=...) in its place, or optax.microbatching over "
        "the function that returns one gradient per task.",
    ),
    "flatten": (
        optax.flatten(WHOLE),
        "concatenates the tasks into one vector. Put it after the method: optax.chain(sum_tasks(...), "
        "optax.flatten(inner)).",
    ),
    "apply_if_finite": (
        optax.apply_if_finite(WHOLE, 2),
        "returns updates with the task axis when it does not apply what it wraps: "
        "mtl_optax.skip_nonfinite(inner) skips such steps.",
    ),
    "conditionally_mask": (
        optax.conditionally_mask(WHOLE, lambda step: step < 3),
        "returns updates with the task axis when it does not apply what it wraps: put it after the "
        "method.",
    ),
    "conditionally_transform": (
        optax.conditionally_transform(WHOLE, lambda step: step < 3),
        "returns updates with the task axis when it does not apply what it wraps: put it after the "
        "method.",
    ),
}


@pytest.mark.parametrize("name", INSIDE)
def test_wrappers_that_cannot_stand_around_are_refused(name):
    tx, why = INSIDE[name]
    if name == "MultiSteps" and OPTAX < (0, 2, 8):
        # It broadcasts its accumulator over the tasks, and then refuses its own two branches.
        with jax.numpy_rank_promotion("allow"), pytest.raises(TypeError, match="acc_grads"):
            run(tx)
        return
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError) as raised:
        run(tx)
    assert str(raised.value) == f"sum_tasks: stands inside {name}, which {why}"


def test_multi_steps_with_an_accumulator_given_the_task_axis():
    tx = optax.MultiSteps(WHOLE, 2)
    state = tx.init(PARAMS)
    state = state._replace(acc_grads=optax.tree.batch_shape(state.acc_grads, (T,)))
    update, _ = jax.eval_shape(tx.update, GRADS, state, PARAMS)
    assert shape_of(update) == shape_of(PARAMS)


def test_inside_such_wrappers_what_keeps_the_axis_may_stand():
    tx = optax.chain(optax.apply_if_finite(mtl.mgda(T, reduce=False), 2), BALANCE)
    assert traced(tx) == shape_of(PARAMS)


def test_mechanize_and_sam_around_fail():
    # Until optax 0.2.7 an assertion without a message.
    error, told = (
        (TypeError, "contracting dimensions") if OPTAX >= (0, 2, 8) else (AssertionError, "^$")
    )
    with jax.numpy_rank_promotion("allow"), pytest.raises(error, match=told):
        run(optax.contrib.mechanize(WHOLE))
    with pytest.raises(TypeError, match="losses"):
        run(optax.contrib.sam(WHOLE, WHOLE), losses=LOSSES)


AROUND_WORKS = {
    "lookahead": None,
    "schedule_free": optax.contrib.schedule_free(WHOLE, 1e-2),
    "split_real_and_imaginary": optax.contrib.split_real_and_imaginary(WHOLE),
    "skip_nonfinite": mtl.skip_nonfinite(WHOLE),
    "accumulate": mtl.accumulate(WHOLE, T, 2),
    "MultiSteps after": optax.chain(
        BALANCE, optax.MultiSteps(optax.sgd(1e-2), 2).gradient_transformation()
    ),
    "apply_if_finite after": optax.chain(BALANCE, optax.apply_if_finite(optax.sgd(1e-2), 2)),
    "mechanize after": optax.chain(BALANCE, optax.contrib.mechanize(optax.sgd(1e-2))),
}


@pytest.mark.parametrize("name", [name for name in AROUND_WORKS if name != "lookahead"])
def test_wrappers_that_work(name):
    assert traced(AROUND_WORKS[name]) == shape_of(PARAMS)


def test_lookahead_works():
    tx = optax.lookahead(WHOLE, 2, 0.5)
    params = optax.LookaheadParams.init_synced(PARAMS)
    update, _ = tx.update(GRADS, tx.init(params), params)
    assert shape_of(update.fast) == shape_of(PARAMS)


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


def test_inject_hyperparams_with_static_num_tasks():
    inject = optax.inject_hyperparams(mtl.cagrad, static_args=("num_tasks", "rescale"))
    tx = inject(num_tasks=T, c=lambda step: 0.1 + 0.1 * step)
    assert traced(tx, losses=LOSSES) == shape_of(PARAMS)
    state = jax.eval_shape(tx.init, PARAMS)
    assert state.hyperparams["c"].shape == ()


def test_inject_hyperparams_hands_options_on():
    inject = optax.inject_hyperparams(mtl.metabalance, static_args=("num_tasks", "target"))
    tx = inject(num_tasks=T, relax_factor=0.5, blocks="all")
    assert tx.init(PARAMS).inner_state.weights.shape == (T,)
    inject = optax.inject_hyperparams(mtl.mgda, static_args=("num_tasks",))
    shapes = jax.eval_shape(lambda: run(inject(num_tasks=T, reduce=False))[0])
    assert shape_of(shapes) == shape_of(GRADS)


@pytest.mark.parametrize("name", ["positional", "lambda", "factory"])
def test_inject_hyperparams_other_ways(name):
    made = {
        "positional": lambda: optax.inject_hyperparams(functools.partial(mtl.cagrad, T, rescale=0))(
            c=0.3
        ),
        "lambda": lambda: optax.inject_hyperparams(lambda c: mtl.cagrad(T, c=c))(c=0.3),
        "factory": lambda: optax.inject_hyperparams(mtl.rlw, static_args="num_tasks")(T, seed=3),
    }
    if name == "positional":
        # The keyword is still in the signature, so it is traced all the same.
        with pytest.raises(TypeError, match="rescale must be a Python integer"):
            jax.eval_shape(made[name]().init, PARAMS)
    else:
        assert traced(made[name]()) == shape_of(PARAMS)


# --- E5: extra arguments -----------------------------------------------------------------------------


def test_a_plain_transformation_never_sees_losses():
    seen = []

    def update_fn(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    plain = optax.GradientTransformation(lambda params: (), update_fn)
    run(optax.chain(BALANCE, plain), losses=LOSSES)
    assert seen == [{}]


@pytest.mark.parametrize(
    "search",
    [lambda: optax.scale_by_backtracking_linesearch(3), lambda: optax.scale_by_zoom_linesearch(3)],
    ids=["backtracking", "zoom"],
)
def test_line_searches_need_the_losses_dropped(search):
    value_fn = lambda params: sum(jnp.sum(p**2) for p in jax.tree.leaves(params))  # noqa: E731
    given = {"value": jnp.ones(()), "grad": PARAMS, "value_fn": value_fn, "losses": LOSSES}
    with pytest.raises(TypeError, match="losses"):
        run(optax.chain(mtl.scale_invariant(T), search()), **given)
    tx = optax.chain(mtl.scale_invariant(T), mtl.drop_extra_args(search(), "losses"))
    update, _ = jax.eval_shape(lambda: run(tx, **given))
    assert shape_of(update) == shape_of(PARAMS)


def test_value_must_be_a_scalar():
    with pytest.raises((TypeError, ValueError)):
        traced(optax.chain(BALANCE, optax.polyak_sgd()), value=LOSSES)
    assert traced(optax.chain(BALANCE, optax.polyak_sgd()), value=LOSSES.sum()) == shape_of(PARAMS)
    tx = optax.chain(BALANCE, optax.contrib.reduce_on_plateau())
    with pytest.raises((TypeError, ValueError)):
        traced(tx, value=LOSSES)
    assert traced(tx, value=LOSSES.sum()) == shape_of(PARAMS)


def test_methods_as_aggregators():
    tx = aggregating.process(optax.identity(), BALANCE, optax.adam(1e-2))
    update, _ = jax.eval_shape(lambda: run(tx))
    assert shape_of(update) == shape_of(PARAMS)
    adapted = map(optax.with_extra_args_support, (optax.identity(), optax.adam(1e-2)))
    first, last = adapted
    tx = aggregating.process(first, mtl.scale_invariant(T), last)
    update, _ = jax.eval_shape(lambda: run(tx, losses=LOSSES))
    assert shape_of(update) == shape_of(PARAMS)


# --- E6: state tools ---------------------------------------------------------------------------------


def test_state_tools_find_the_fields():
    tx = optax.chain(BALANCE, optax.adam(1e-2))
    _, state = run(tx)
    assert optax.tree.get(state, "weights").tolist() == [1.0] * T
    assert int(optax.tree.get(state, "balance_count")) == 1
    assert isinstance(optax.tree.get(state, "BalanceState"), mtl.BalanceState)
    assert int(optax.tree.get(state, "count")) == 1  # Adam's, and nobody else's
    moved = optax.tree.set(state, weights=jnp.zeros(T))
    assert optax.tree.get(moved, "weights").tolist() == [0.0] * T


@pytest.mark.parametrize("name", ["mgda", "moco", "mtadam", "metabalance", "adatask"])
def test_map_params_gives_back_any_state(name):
    tx = mtl.METHODS[name].make(T)
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


# Their own Adam does not pass in strict mode, which is optax's code.
WITH_ADAM = ("adatask", "famo", "gradnorm", "imtl", "imtl_l", "uncertainty")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", sorted(set(mtl.METHODS) - set(WITH_ADAM)))
def test_strict_dtypes_for_our_part(name, dtype, strict_dtypes):
    params = {"w": jnp.ones((4,), dtype)}
    grads = {"w": jnp.ones((T, 4), dtype)}
    tx = optax.chain(mtl.METHODS[name].make(T), optax.sgd(1e-2))
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
        tx = optax.chain(mtl.METHODS[name].make(T), optax.adam(1e-2))
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
    assert isinstance(weights, nnx.Variable) and weights[...].shape == (T,)
