"""Tasks that are not in every batch: an absent task is as if it did not exist, and keeps what it had.

The first part holds for every method. The second part has the few methods whose memory of a task that
comes late, or comes back, is more than an average; their numbers are computed here in plain NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from method_properties import make

import mtl_optax as mtl

# --- every method: an absent task against no such task --------------------------------------------------

ALL = ("a", "b", "c", "d", "e")
PRESENT = ("b", "d", "e")
HERE = np.array([name in PRESENT for name in ALL])
STEPS, N = 4, 6
_DRAW = np.random.default_rng(0)
GRADIENTS = _DRAW.normal(size=(STEPS, len(ALL), N)) * np.array([3.0, 1.0, 0.2, 0.5, 2.0])[:, None]
LOSSES = _DRAW.uniform(0.5, 2.0, size=(STEPS, len(ALL)))
# One number a task, for whatever takes such numbers.
NUMBERS = {"a": 0.9, "b": 0.3, "c": 0.5, "d": 0.7, "e": 0.2}


def by_name(tasks):
    return {name: NUMBERS[name] for name in tasks}


def in_order(tasks):
    return jnp.array([NUMBERS[name] for name in tasks])


# The options with which a method is made of some tasks: the target is there, every number is given for
# the tasks that there are, a random order is fixed, and a memory is short enough to show in a few steps.
_TARGET = {"target": "d"}
CASES = {name: lambda tasks: {} for name in mtl.METHODS} | {
    "fixed_weights": lambda tasks: {"weights": by_name(tasks)},
    "go4align": lambda tasks: {"num_groups": 2},
    "grad_similarity": lambda tasks: _TARGET,
    "grad_surgery": lambda tasks: _TARGET,
    "grad_vaccine": lambda tasks: {"order": "cyclic", "ema_decay": 0.5},
    "lagrangian": lambda tasks: {
        "limits": {name: NUMBERS[name] for name in tasks if name != "d"},
        "step_size": 0.1,
    },
    "lr_annealing": lambda tasks: _TARGET,
    "metabalance": lambda tasks: _TARGET,
    "ol_aux": lambda tasks: {**_TARGET, "update_every": 2, "weight_lr": 0.1},
    "pcd": lambda tasks: _TARGET,
    "pcgrad": lambda tasks: {"order": "cyclic"},
    "relobralo": lambda tasks: {"ema_decay": 0.5, "rho": 0.5},
    "trimmed_mean": lambda tasks: {"trim_number": 1},
}
VARIANTS = {
    ("aligned_mtl", "median"): lambda tasks: {"scale": "median"},
    ("aligned_mtl", "rmse"): lambda tasks: {"scale": "rmse"},
    ("cosmos", "preference"): lambda tasks: {"preference": in_order(tasks)},
    ("db_mtl", "mean"): lambda tasks: {"norm": "mean"},
    ("db_mtl", "median"): lambda tasks: {"norm": "median"},
    ("db_mtl", "min"): lambda tasks: {"norm": "min"},
    ("dualproj", "preference"): lambda tasks: {"preference": in_order(tasks)},
    ("emtl", "two parts"): lambda tasks: {"epsilon": 0.3, "rho": 0.3},
    ("graddrop", "leak"): lambda tasks: {"leak": in_order(tasks)},
    ("inverse_norm", "rms"): lambda tasks: {"reference": "rms", "power": 0.5},
    ("metabalance", "all"): lambda tasks: {**_TARGET, "blocks": "all", "strategy": "shrink"},
    ("multibalance", "prior"): lambda tasks: {"prior": in_order(tasks), "ema_init": "debias"},
    ("ntk", "mean"): lambda tasks: {"reference": "mean", "ema_decay": 0.5},
    ("ol_aux", "window"): lambda tasks: {**_TARGET, "update_every": 2, "filter_window": 2},
    ("pbi", "preference"): lambda tasks: {"preference": in_order(tasks)},
    ("pcd", "tau"): lambda tasks: {**_TARGET, "tau": in_order(tasks)},
    ("scale_by_mtadam", "ranks"): lambda tasks: {"ranks": in_order(tasks)},
    ("softadapt", "loss_weighted"): lambda tasks: {"variant": "loss_weighted"},
    ("softadapt", "normalized"): lambda tasks: {"variant": "normalized"},
    ("stch", "warm-up"): lambda tasks: {"warmup_steps": 1, "nadir_steps": 2},
    ("upgrad", "preference"): lambda tasks: {"preference": in_order(tasks)},
}
CASES |= VARIANTS


@functools.cache
def program(case, tasks):
    """`(active [STEPS, T]) -> (updates [STEPS, N], weights [STEPS, T], states)`, compiled once."""
    name = case if isinstance(case, str) else case[0]
    tx = make(name, tasks, **CASES[case](tasks))
    rows = np.array([ALL.index(task) for task in tasks])
    # What a method draws depends on the number of tasks.
    extra = {"noise": in_order(tasks), "traces": by_name(tasks)}
    if name in ("graddrop", "relobralo"):
        extra["noise"] = (
            0.4 if name == "relobralo" else {"v": jnp.full(4, 0.4), "w": jnp.full(2, 0.6)}
        )

    def tree(flat):
        return {"v": flat[..., :4], "w": flat[..., 4:]}

    def body(state, step):
        gradients, losses, active = step
        update, state = tx.update(
            tree(gradients), state, tree(jnp.zeros(N)), losses=losses, active=active, **extra
        )
        weights = jnp.mean(state.weights, axis=0)
        memory = (state.rule_state, state.averages)
        return state, (jnp.concatenate([update["v"], update["w"]]), weights, memory)

    run = jax.jit(lambda *steps: jax.lax.scan(body, tx.init(tree(jnp.zeros(N))), steps)[1])
    return lambda active: jax.device_get(run(GRADIENTS[:, rows], LOSSES[:, rows], active))


# One with averages of norms, of losses, of gradients, of none, and one that gives the update itself.
QUICK = ("multibalance", "famo", "db_mtl", "upgrad", "scale_by_mtadam")
EVERY_CASE = pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
    ids=lambda case: case if isinstance(case, str) else ", ".join(case),
)


@pytest.mark.usefixtures("x64")
@EVERY_CASE
def test_an_absent_task_is_no_task(case):
    updates, weights, _ = program(case, ALL)(np.tile(HERE, (STEPS, 1)))
    fewer = program(case, PRESENT)(np.ones((STEPS, len(PRESENT)), bool))
    expected, expected_weights, _ = fewer
    np.testing.assert_allclose(weights[:, HERE], expected_weights, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(weights[:, ~HERE], 0)
    np.testing.assert_allclose(updates, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())


@pytest.mark.usefixtures("x64")
@EVERY_CASE
def test_what_is_remembered_of_a_task_stays_while_it_is_absent(case):
    """Its slot in every array of the state with a task axis: nothing else has the size of T."""
    active = np.ones((STEPS, len(ALL)), bool)
    active[2] = HERE
    _, _, memory = program(case, ALL)(active)
    for leaf in jax.tree.leaves(memory):
        before, after = leaf[1], leaf[2]
        for axis in range(before.ndim):
            if before.shape[axis] == len(ALL):
                slots = functools.partial(np.compress, ~HERE, axis=axis)
                np.testing.assert_array_equal(slots(after), slots(before))


def test_rlw_alone_depends_on_the_draw_of_an_absent_task():
    """It draws T numbers at a time, so that made without a task it draws others."""
    tx, grads = mtl.rlw(3), jnp.eye(3)
    state = tx.init(jnp.zeros(3))
    everybody, _ = tx.update(grads, state)
    without, _ = tx.update(grads, state, active=jnp.array([True, False, True]))
    shares = np.asarray(everybody) * [1, 0, 1]
    np.testing.assert_allclose(without, shares / shares.sum(), rtol=1e-6)
    fewer = mtl.rlw(2)
    drawn, _ = fewer.update(jnp.eye(2), fewer.init(jnp.zeros(2)))
    assert not np.allclose(without[np.array([0, 2])], drawn, rtol=1e-3)


# --- present, absent, back; and late --------------------------------------------------------------------

# The third task is away in the second step; the second task comes in the third.
COMINGS = np.array([[1, 0, 1], [1, 0, 0], [1, 1, 1], [1, 1, 1], [0, 1, 1]], bool)
T = COMINGS.shape[1]
ROWS = (
    np.random.default_rng(2).normal(size=(len(COMINGS), T, 4)) * np.array([1.0, 3.0, 0.5])[:, None]
)
OWN_LOSSES = np.random.default_rng(3).uniform(0.5, 3.0, size=(len(COMINGS), T))


@functools.cache
def steps_of(name):
    """The updates, the weights and the last state of a method over the rows of `COMINGS`."""
    tx, extra = TAKEN[name]
    state, updates, weights = tx.init(jnp.zeros(4)), [], []
    for k, active in enumerate(COMINGS):
        update, state = tx.update(
            jnp.asarray(ROWS[k]),
            state,
            losses=jnp.asarray(OWN_LOSSES[k]),
            active=jnp.asarray(active),
            **extra(k),
        )
        updates.append(np.asarray(update))
        weights.append(np.asarray(state.weights[0]))
    return np.stack(updates), np.stack(weights), state


def losses_after(step):
    """What the tasks lost on the batch of the step before, after that step."""
    return 0.8 * OWN_LOSSES[step - 1] + 0.1 * np.arange(T)


TAKEN = {
    "gradnorm": (mtl.gradnorm(T, alpha=0.5, optimizer=optax.sgd(0.05)), lambda k: {}),
    "scale_by_mtadam": (mtl.scale_by_mtadam(T, b3=0.5, eps=0.0), lambda k: {}),
    "grad_vaccine": (mtl.grad_vaccine(T, ema_decay=0.5, order="cyclic", eps=0.0), lambda k: {}),
    "cr_mogm": (mtl.cr_mogm(T, base=mtl.scale_invariant(T), ema_decay=0.75), lambda k: {}),
    "famo": (
        mtl.famo(T, gamma=0.1, weight_lr=0.2),
        lambda k: {"losses_after": jnp.asarray(losses_after(k))} if k else {},
    ),
}


def assert_weighted(name, expected):
    updates, weights, state = steps_of(name)
    np.testing.assert_allclose(weights, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(updates, np.einsum("kt,ktn->kn", expected, ROWS), 1e-4, 1e-5)
    return state


def test_gradnorm_trains_only_who_is_there():
    """An absent task keeps its weight, and those who are there share what they had among them."""
    weights, first, used = np.ones(T), np.full(T, np.nan), []
    for here, losses, rows in zip(COMINGS, OWN_LOSSES, ROWS, strict=True):
        used.append(np.where(here, weights, 0))
        first = np.where(here & np.isnan(first), losses, first)
        old, norms = weights[here], np.linalg.norm(rows, axis=1)[here]
        rate = losses[here] / first[here]
        goal = np.mean(old * norms) * (rate / rate.mean()) ** 0.5
        new = old - 0.05 * np.sign(old * norms - goal) * norms
        assert (new > 0).all()
        weights[here] = new * old.sum() / new.sum()
    state = assert_weighted("gradnorm", np.stack(used))
    np.testing.assert_allclose(state.rule_state.trained_weights.values[0], weights, rtol=1e-5)
    np.testing.assert_allclose(state.rule_state.first_losses[0], first, rtol=1e-6)


def test_mtadam_begins_with_a_task_when_it_comes():
    """Its first norm, its own number of steps; and the largest denominator of those who are there."""
    norms, counts = np.zeros(T), np.zeros(T)
    mu, nu, expected = np.zeros((T, 4)), np.zeros((T, 4)), []
    for here, rows in zip(COMINGS, ROWS, strict=True):
        for t in np.flatnonzero(here):
            length = np.linalg.norm(rows[t])
            norms[t] = 0.5 * norms[t] + 0.5 * length if counts[t] else length
            counts[t] += 1
        for t in np.flatnonzero(here):
            # The first task is the anchor of the others from the first step on.
            scaled = rows[t] / norms[t] * norms[0]
            mu[t] = 0.9 * mu[t] + 0.1 * scaled
            nu[t] = 0.999 * nu[t] + 0.001 * scaled**2
        seen = counts[here][:, None]
        first, second = mu[here] / (1 - 0.9**seen), nu[here] / (1 - 0.999**seen)
        expected.append(first.sum(0) / np.sqrt(second).max(0))
    updates, _, state = steps_of("scale_by_mtadam")
    np.testing.assert_allclose(updates, np.stack(expected), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(state.rule_state.norm_ema, norms, rtol=1e-5)
    np.testing.assert_array_equal(state.rule_state.task_counts, counts)


def test_gradient_vaccine_averages_pairs_that_meet():
    similarity, expected = np.zeros((T, T)), []
    for here, rows in zip(COMINGS, ROWS, strict=True):
        total = np.zeros(4)
        for i in np.flatnonzero(here):
            own = rows[i].copy()
            for j in ((i + 1) % T, (i + 2) % T):
                if not here[j]:
                    continue
                length, other = np.linalg.norm(own), np.linalg.norm(rows[j])
                c, goal = own @ rows[j] / length / other, similarity[i, j]
                similarity[i, j] = (goal + c) / 2
                if c < goal:
                    sine = np.sqrt(1 - goal**2)
                    amount = length * (goal * np.sqrt(1 - c**2) - c * sine) / (other * sine)
                    own += amount * rows[j]
            total += own
        expected.append(total)
    updates, _, state = steps_of("grad_vaccine")
    np.testing.assert_allclose(updates, np.stack(expected), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state.rule_state.similarity_ema[0], similarity, rtol=1e-4, atol=1e-5)


def test_cr_mogm_takes_the_first_weight_of_a_task_as_it_is():
    smoothed, seen, used = np.zeros(T), np.zeros(T, bool), []
    for here, losses in zip(COMINGS, OWN_LOSSES, strict=True):
        average = np.where(seen, 0.75 * smoothed + 0.25 / losses, 1 / losses)
        smoothed, seen = np.where(here, average, smoothed), seen | here
        used.append(np.where(here, smoothed, 0))
    assert_weighted("cr_mogm", np.stack(used))


def test_famo_trains_on_losses_after_the_step_of_those_who_took_it():
    """Not those who were away in that step: they have no loss before it, or an old one."""
    logits, used = np.zeros(T), []
    mu, nu, count = np.zeros(T), np.zeros(T), 0
    for k, (here, losses) in enumerate(zip(COMINGS, OWN_LOSSES, strict=True)):
        if k:
            trains = COMINGS[k - 1]
            shares = np.where(trains, np.exp(logits), 0)
            shares = shares / shares.sum()
            decrease = np.log(OWN_LOSSES[k - 1]) - np.log(losses_after(k))
            gradient = shares * (decrease - shares @ decrease) + 0.1 * logits
            count += 1
            mu = np.where(trains, 0.9 * mu + 0.1 * gradient, mu)
            nu = np.where(trains, 0.999 * nu + 0.001 * gradient**2, nu)
            step = mu / (1 - 0.9**count) / (np.sqrt(nu / (1 - 0.999**count)) + 1e-8)
            logits = np.where(trains, logits - 0.2 * step, logits)
        weights = np.where(here, np.exp(logits) / losses, 0)
        used.append(weights / weights.sum())
    assert_weighted("famo", np.stack(used))


# --- through what surrounds a method --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sum_tasks", "scale_invariant", "metabalance", "mgda"])
def test_a_broken_task_is_left_out_and_counted_on_steps_with_kept_weights(name):
    tx = make(name, 3, update_every=3, blocks="all")
    state = tx.init(jnp.zeros(4))
    _, state = tx.update(jnp.asarray(ROWS[0]), state, losses=jnp.ones(3))
    kept = np.asarray(state.weights[0])
    for k, (gradient, loss) in enumerate([(np.nan, 1.0), (1.0, np.inf)]):
        if gradient == 1.0 and "losses" not in tx.needs:
            continue
        grads = jnp.asarray(ROWS[1 + k]).at[1].multiply(gradient)
        update, state = tx.update(grads, state, losses=jnp.array([1.0, loss, 1.0]))
        np.testing.assert_allclose(update, (kept * [1, 0, 1]) @ ROWS[1 + k], 1e-5, 1e-5)
        np.testing.assert_array_equal(state.weights[0], kept)
        assert state.skipped.tolist() == [0, k + 1, 0]
        assert int(state.balance_count) == k + 2


@pytest.mark.parametrize("strategy", ["shrink", "enlarge", "both"])
def test_metabalance_leaves_the_head_of_an_auxiliary_alone(strategy):
    """The target's gradient is 0 there: it has no magnitude to match."""
    tx = mtl.metabalance(2, target=0, strategy=strategy)
    params = {"head": jnp.zeros(3), "shared": jnp.zeros(3)}
    state = tx.init(params)
    for k in range(3):
        head = jnp.zeros((2, 3)).at[1].set(ROWS[k, 1, :3])
        shared = jnp.asarray(ROWS[k, :2, :3] * [[1.0], [10.0 if strategy != "enlarge" else 0.1]])
        update, state = tx.update({"head": head, "shared": shared}, state)
        np.testing.assert_array_equal(update["head"], head[1])
        assert state.weights[0, 1] == 1 != state.weights[1, 1]


@pytest.mark.parametrize("second", [[False, False], [True, False]], ids=["in none", "in one"])
def test_accumulate_over_micro_batches_that_a_task_is_not_in(second):
    """A plain mean shows over how many tasks it is, and over how many micro-batches each is."""
    tx = mtl.accumulate(mtl.mean_tasks(2), 2, every_k=2)
    state = tx.init(jnp.zeros(4))
    for k in range(2):
        active = jnp.array([True, second[k]])
        update, state = tx.update(jnp.asarray(ROWS[k, :2]), state, active=active)
    first = (ROWS[0, 0] + ROWS[1, 0]) / 2
    expected = (first + ROWS[0, 1]) / 2 if any(second) else first
    np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_a_gradient_that_is_not_finite_in_one_block_is_left_out_of_all():
    method = mtl.metabalance(2, blocks="leaf")
    grads = {"a": jnp.array([[1.0, 2.0], [3.0, jnp.nan]]), "b": jnp.ones((2, 2))}
    update, state = method.update(grads, method.init({"a": jnp.zeros(2), "b": jnp.zeros(2)}))
    assert update["a"].tolist() == [1.0, 2.0]
    assert update["b"].tolist() == [1.0, 1.0]
    assert state.skipped.tolist() == [0, 1]


def test_a_task_whose_loss_is_not_finite_is_left_out_and_counted():
    method = mtl.scale_invariant(2)
    state = method.init(jnp.zeros(2))
    update, state = method.update(jnp.eye(2), state, losses=jnp.array([2.0, jnp.nan]))
    assert update.tolist() == [0.5, 0.0]
    assert state.skipped.tolist() == [0, 1]
