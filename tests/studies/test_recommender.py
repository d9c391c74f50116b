"""The parts of the recommender example: data, tables of pairs, metrics, tests, choices, steps, training."""

from dataclasses import replace
from functools import partial
from itertools import combinations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sampling import sampled
from scipy import stats
from sklearn.metrics import ndcg_score

import mtl_optax as mtl
from examples.studies.harness import report as tables
from examples.studies.harness import steps
from examples.studies.harness.choices import known_methods, parse_choice
from examples.studies.harness.data import BINARY, REGRESSION, Task
from examples.studies.harness.errors import UserError
from examples.studies.harness.runs import Plan, Run
from examples.studies.harness.statistics import best_of, expected_best, holm, paired_difference
from examples.studies.harness.steps import make_step
from examples.studies.harness.trainer import TEST, VALIDATION
from examples.studies.recommender import evaluation, report, sources
from examples.studies.recommender.data import (
    PAPER_SPLIT,
    Dataset,
    Interactions,
    Split,
    behaviours,
    make_dataset,
)
from examples.studies.recommender.evaluation import COLUMNS, METRICS
from examples.studies.recommender.network import Batch, Network, NetworkConfig, sampled_softmax
from examples.studies.recommender.pairs import pair_table
from examples.studies.recommender.training import TrainConfig, Trainer, popularity

TINY = TrainConfig(
    epochs=2,
    batch_pairs=64,
    negatives=1,
    network=NetworkConfig(embedding=4, mlp=(4, 4), tower=(4,)),
)
USERS, ITEMS = 40, 60
DAY = 86400


def fake_ratings() -> np.ndarray:
    """Rows like MovieLens's, in no order: user, item (both from 1), stars, seconds.

    The first user rates nothing 5, all others at least 8 items, so that they have some held out.
    """
    generator = np.random.default_rng(0)
    pairs = np.argwhere(generator.random((USERS, ITEMS)) < 0.4) + 1
    stars = generator.integers(1, 5, len(pairs))
    for user in range(2, USERS + 1):
        stars[generator.choice(np.flatnonzero(pairs[:, 0] == user), 8, replace=False)] = 5
    seconds = generator.integers(0, 100 * DAY, len(pairs))
    return generator.permutation(np.column_stack([pairs, stars, seconds]))


def dense(interactions: Interactions) -> tuple[np.ndarray, np.ndarray]:
    """The labels `[users, items, T]` and whether a pair is known `[users, items]`."""
    users, items = interactions.pairs.T
    values = np.zeros((USERS, ITEMS, interactions.values.shape[1]), np.float32)
    known = np.zeros((USERS, ITEMS), bool)
    values[users, items], known[users, items] = interactions.values, True
    return values, known


def codes(interactions: Interactions) -> np.ndarray:
    return interactions.pairs[:, 0] * ITEMS + interactions.pairs[:, 1]


def tree_allclose(one, other, **tolerances) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, **tolerances), one, other)


@pytest.fixture(scope="module")
def nested():
    return make_dataset(sources.synthetic(USERS, ITEMS), Split())


@pytest.fixture(scope="module")
def units():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "movielens_ratings", fake_ratings)
        return make_dataset(sources.load_log("movielens"), Split())


@pytest.fixture(scope="module")
def trainer(nested):
    return Trainer(nested, TINY)


@pytest.fixture(scope="module")
def units_trainer(units):
    # One step an epoch: the losses of the first are those of the untrained network.
    config = replace(TINY, batch_pairs=10**6, learning_rate=0.1)
    return Trainer(units, config, probe_norms=True)


@pytest.fixture(scope="module")
def params(trainer):
    return jax.jit(trainer.network.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def batch(trainer):
    return jax.jit(trainer.batch)(trainer.data, (jnp.arange(24), jax.random.key(1)))


# --- data ---------------------------------------------------------------------------------------


def test_behaviours_are_distinct_sorted_pairs_with_a_label_per_task():
    pairs = {"buy": [[1, 0], [0, 1]], "view": [[0, 1], [1, 0], [0, 0], [0, 0]]}
    log = behaviours("x", 2, 2, {name: np.array(found) for name, found in pairs.items()})
    assert log.tasks == (Task("buy"), Task("view"))
    np.testing.assert_array_equal(log.interactions.pairs, [[0, 0], [0, 1], [1, 0]])
    np.testing.assert_array_equal(log.interactions.values, [[0, 1], [1, 1], [1, 1]])
    np.testing.assert_array_equal(log.interactions.positives(0), [[0, 1], [1, 0]])


def test_the_same_shares_are_cut_from_every_user_rounded_down():
    bought = [[0, item] for item in range(10)] + [[1, item] for item in range(4)]
    viewed = [[0, item] for item in range(10, 30)]
    log = behaviours("x", 2, 30, {"buy": np.array(bought), "view": np.array(viewed)})
    dataset = make_dataset(log, Split(validation=0.3, test=0.2, others=0.1))
    found = [
        [np.sum((part.pairs[:, 0] == user) & (part.values[:, 0] == buy)) for user, buy in cases]
        for cases in ([(0, 1), (1, 1), (0, 0)],)
        for part in (dataset.train, dataset.validation, dataset.test)
    ]
    assert found == [[5, 2, 16], [3, 2, 2], [2, 0, 2]]


def test_split_depends_on_its_seed_alone():
    pairs = {name: sources.synthetic().interactions.positives(t) for t, name in enumerate("ab")}
    shuffled = {name: np.random.default_rng(1).permutation(found) for name, found in pairs.items()}
    one, same = (make_dataset(behaviours("x", 400, 300, p), Split()) for p in (pairs, shuffled))
    other = make_dataset(behaviours("x", 400, 300, pairs), Split(seed=1))
    for part in ("train", "validation", "test"):
        chex.assert_trees_all_equal(vars(getattr(one, part)), vars(getattr(same, part)))
    assert not np.array_equal(one.test.pairs, other.test.pairs)


@pytest.mark.parametrize("split", [Split(), PAPER_SPLIT], ids=["default", "paper"])
def test_split_loses_nothing_and_holds_pairs_out_with_all_of_their_labels(split):
    log = sources.synthetic(USERS, ITEMS)
    dataset = make_dataset(log, split)
    parts = dataset.train, dataset.validation, dataset.test
    found = np.concatenate([codes(part) for part in parts])
    order = np.argsort(found)
    np.testing.assert_array_equal(found[order], codes(log.interactions))  # each exactly once
    values = np.concatenate([part.values for part in parts])
    np.testing.assert_array_equal(values[order], log.interactions.values)
    for part in parts:
        assert np.all(np.diff(codes(part)) > 0)
    held_out = np.concatenate([dataset.validation.values, dataset.test.values])
    assert np.any(held_out[:, 0] > 0) and np.all(held_out[held_out[:, 0] > 0, 2] == 1)
    # With others=0 every auxiliary pair that is not a held-out target pair is trained on.
    assert np.all(held_out[:, 0] > 0) == (split.others == 0)


def test_too_little_data_to_hold_out_is_an_error():
    pairs = np.array([[0, 0], [1, 1]], np.int32)
    with pytest.raises(UserError, match="too few pairs a user"):
        make_dataset(behaviours("x", 2, 2, {"buy": pairs}), Split())


RATINGS = [[2, 1, 5, 10 * DAY], [1, 2, 3, 99], [1, 1, 4, 99 + DAY // 2], [2, 2, 1, 12.5 * DAY]]


def test_movielens_in_units(monkeypatch):
    monkeypatch.setattr(sources, "movielens_ratings", lambda: np.array(RATINGS).astype(np.int64))
    log = sources.load_log("movielens", tasks="units")
    assert [task.kind for task in log.tasks] == [BINARY, BINARY, REGRESSION, REGRESSION]
    np.testing.assert_array_equal(log.interactions.pairs, [[0, 0], [0, 1], [1, 0], [1, 1]])
    # rated 5, rated, stars, days since the user's first rating
    expected = [[0, 1, 4, 0.5], [0, 1, 3, 0], [1, 1, 5, 0], [0, 1, 1, 2.5]]
    np.testing.assert_array_equal(log.interactions.values, expected)


def test_movielens_retrieval(monkeypatch):
    monkeypatch.setattr(sources, "movielens_ratings", lambda: np.array(RATINGS).astype(np.int64))
    log = sources.load_log("movielens", tasks="retrieval")
    assert [(task.kind, task.softmax) for task in log.tasks] == [
        (BINARY, True),
        (REGRESSION, False),
    ]
    np.testing.assert_allclose(
        log.interactions.values, [[1, 0.8], [1, 0.6], [1, 1], [1, 0.2]], rtol=1e-6
    )


def test_a_softmax_is_over_a_pair_and_its_own_negatives():
    """Three pairs with two drawn items each; the second pair is no positive, one drawn item is."""
    scores = jnp.array([1.0, 2.0, 3.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    labels = jnp.array([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    mask = jnp.array([1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    first, third = (np.exp([1.0, 0.1]), np.exp([3.0, 0.6]))
    expected = -np.mean([np.log(found[0] / found.sum()) for found in (first, third)])
    differentiate = jax.jit(jax.value_and_grad(sampled_softmax), static_argnums=3)
    loss, gradient = differentiate(scores, labels, mask, 2)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_array_equal(gradient != 0, [1, 0, 1, 1, 0, 0, 0, 0, 1])


def test_movielens_nested(monkeypatch):
    monkeypatch.setattr(sources, "movielens_ratings", lambda: np.array(RATINGS).astype(np.int64))
    log = sources.load_log("movielens", tasks="nested")
    assert [task.name for task in log.tasks] == ["rated 5", "rated 4 or 5", "rated"]
    expected = [[0, 1, 1], [0, 0, 1], [1, 1, 1], [0, 0, 1]]
    np.testing.assert_array_equal(log.interactions.values, expected)


# --- tables of pairs ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("longest", sampled([None, 1], [1]), ids=["many", "one"])
def test_pair_table_equals_a_dense_table(longest):
    generator = np.random.default_rng(0)
    known = generator.random((USERS, ITEMS)) < 0.3
    if longest == 1:
        known &= np.cumsum(known, axis=1) == 1
    known[[0, 7, USERS - 1]] = False
    known[1, 0] = known[2, ITEMS - 1] = longest is None  # the ends of a row
    pairs = np.argwhere(known).astype(np.int32)
    values = generator.integers(0, 3, (len(pairs), 3)).astype(np.float32)
    expected, _ = dense(Interactions(pairs, values))
    table = pair_table(Interactions(pairs, values), USERS)
    assert table.longest == known.sum(axis=1).max()

    users, items = generator.permutation(np.argwhere(np.ones_like(known))).T
    find = jax.jit(lambda table, users, items: table.find(users, items))
    found = find(table, users, items)
    tree_allclose(found, (expected[users, items], known[users, items]), rtol=0)
    in_rows = (users.reshape(USERS, -1), items.reshape(USERS, -1))
    by_row = jax.jit(jax.vmap(table.find))(*in_rows)
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x.reshape(users.size, *x.shape[2:]), by_row),
                                found)  # fmt: skip

    some = generator.integers(0, USERS, 25)  # repeated and out of order
    rows = jax.jit(lambda table, users: table.rows(users, ITEMS))(table, some)
    np.testing.assert_array_equal(rows, np.moveaxis(expected[some] > 0, -1, 0))
    one_each = jax.vmap(lambda user: table.rows(user[None], ITEMS))(jnp.asarray(some))
    np.testing.assert_array_equal(jnp.moveaxis(one_each[:, :, 0], 0, 1), rows)


# --- metrics ------------------------------------------------------------------------------------


def slow_metrics(scores: np.ndarray, hidden: np.ndarray, relevant: np.ndarray) -> list[float]:
    """One user's METRICS, by sorting."""
    if not relevant.any():
        return [np.nan] * len(METRICS)
    ranked = [item for item in np.argsort(-scores, kind="stable") if not hidden[item]]
    found = []
    for k in evaluation.CUTOFFS:
        hits = relevant[ranked[:k]]
        best = sum(1 / np.log2(place + 2) for place in range(min(k, relevant.sum())))
        gained = sum(1 / np.log2(place + 2) for place in np.flatnonzero(hits))
        found += [gained / best, hits.sum() / relevant.sum(), hits.sum() / k]
    return found


@pytest.mark.slow
def test_ranking_metrics_equal_a_reference():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(20, 50)).astype(np.float32)
    hidden = generator.random((20, 50)) < 0.2
    relevant = (generator.random((20, 50)) < 0.3) & ~hidden
    relevant[0] = False
    relevant[1] = ~hidden[1]
    found = np.asarray(evaluation.ranking_metrics(*map(jnp.asarray, (scores, hidden, relevant))))
    assert np.all(np.isnan(found[0]))
    for user in range(1, 20):
        shown = np.where(hidden[user], -1e9, scores[user])
        expected = []
        for k in evaluation.CUTOFFS:
            hits = relevant[user][np.argsort(-shown)[:k]].sum()
            expected += [
                ndcg_score(relevant[user][None], shown[None], k=k),
                hits / relevant[user].sum(),
                hits / k,
            ]
        np.testing.assert_allclose(found[user], expected, rtol=1e-5)
        slow = slow_metrics(scores[user], hidden[user], relevant[user])
        np.testing.assert_allclose(slow, expected)


@pytest.mark.slow
def test_fewer_items_than_the_cutoff():
    scores = jnp.array([[3.0, 2.0, 1.0]])
    found = evaluation.ranking_metrics(scores, scores > 9, jnp.array([[False, True, False]]))
    np.testing.assert_allclose(found[0, :3], [1 / np.log2(3), 1.0, 0.1], rtol=1e-6)


@pytest.mark.slow
def test_both_protocols_equal_a_slow_computation(units, monkeypatch):
    scores = np.random.default_rng(0).permutation(USERS * ITEMS).reshape(USERS, ITEMS)
    scores = scores.astype(np.float32)
    sets = {1: units.train, 2: units.validation, 3: units.test}
    positive = {number: dense(part)[0] > 0 for number, part in sets.items()}
    tables = evaluation.pair_tables(units)
    monkeypatch.setattr(evaluation, "PAIRS_AT_ONCE", {"cpu": 7 * ITEMS})  # blocks of 7 users
    table = jnp.asarray(scores)
    blocks = jax.jit(
        partial(evaluation.rank_users, lambda users, items: table[users, items], tables, ITEMS)
    )
    assert units.ranking_tasks == [0, 1] and units.regression_tasks == [2, 3]
    seen = []
    for part in (VALIDATION, TEST):
        for task in units.ranking_tasks:
            users = evaluation.held_out_users(units, task, part)
            seen.append(len(users))
            # In the test everything before it is known; in the validation the training set alone.
            known = positive[1] | positive[2] if part == TEST else positive[1]
            relevant = positive[part + 1][..., task]
            np.testing.assert_array_equal(users, np.flatnonzero(relevant.any(axis=1)))
            expected = [
                slow_metrics(scores[user], known[user][:, task], relevant[user])
                + slow_metrics(scores[user], known[user].any(axis=1), relevant[user])
                for user in users
            ]
            found = evaluation.rank_by_item_scores(units, scores.__getitem__, task, part)
            assert np.all(np.isnan(np.delete(found, users, axis=0)))
            np.testing.assert_allclose(found[users], expected, rtol=1e-5)
            np.testing.assert_allclose(blocks(users, task, part), found[users], rtol=1e-6)
            differ = np.any(found[users, 0] != found[users, len(METRICS)])
            assert differ == (task == 0)  # whatever is touched is rated
    assert min(seen) >= 10  # more users than a block


def test_items_ranked_by_popularity():
    train = Interactions(
        np.array([[0, 0], [0, 1], [1, 0], [1, 1], [2, 2]], np.int32),
        np.array([[1, 1], [1, 1], [1, 1], [0, 1], [1, 1]], np.float32),  # buy, view
    )
    held_out = Interactions(np.array([[1, 2], [2, 1]], np.int32), np.ones((2, 2), np.float32))
    dataset = Dataset("x", (Task("buy"), Task("view")), train, held_out, held_out, 3, 3)
    counts = popularity(dataset)
    np.testing.assert_array_equal(counts, [2, 1, 1])
    found = evaluation.rank_by_item_scores(
        dataset, lambda users: np.tile(counts, (len(users), 1)), part=VALIDATION
    )
    # User 0 has nothing held out. User 1 bought item 0 and viewed item 1: item 2 is second among "all" (a
    # tie goes to the lower index), first among "new". User 2 bought item 2: item 1 comes after item 0.
    ndcg = found[:, [COLUMNS.index(f"ndcg@10, {protocol}") for protocol in ("all", "new")]]
    second = 1 / np.log2(3)
    np.testing.assert_allclose(ndcg, [[np.nan] * 2, [second, 1], [second, second]], rtol=1e-6)


# --- significance -------------------------------------------------------------------------------


def crossed(generator, seeds, users, seed_effect, user_effect, rest=1.0) -> np.ndarray:
    """Differences `[seeds, users]` with normal effects of seeds and users."""
    return (
        seed_effect * generator.normal(size=(seeds, 1))
        + user_effect * generator.normal(size=users)
        + rest * generator.normal(size=(seeds, users))
    )


def test_one_seed_gives_the_paired_t_test_over_users():
    one, other = np.random.default_rng(0).normal(size=(2, 1, 30))
    found = paired_difference(one, other)
    expected = stats.ttest_rel(one[0], other[0])
    np.testing.assert_allclose(found.p_value, expected.pvalue)
    np.testing.assert_allclose(found.mean / found.error, expected.statistic)


def test_few_seeds_say_little_however_many_users_there_are():
    difference = 0.3 + crossed(np.random.default_rng(1), 3, 1000, 0, 1)
    found = paired_difference(difference, np.zeros((3, 1000)))
    over_users = stats.ttest_1samp(difference.mean(axis=0), 0)
    assert over_users.pvalue < 1e-9
    np.testing.assert_allclose(found.p_value, 2 * stats.t.sf(found.mean / found.error, 2))
    assert found.p_value > 1e-3


def test_seeds_that_differ_much_give_the_t_test_over_seeds():
    difference = 1e4 * np.array([[1.0], [2.0], [-0.5], [3.0]])
    difference = difference + crossed(np.random.default_rng(0), 4, 30, 0, 1)
    found = paired_difference(difference, np.zeros((4, 30)))
    expected = stats.ttest_1samp(difference.mean(axis=1), 0)  # three degrees of freedom
    np.testing.assert_allclose(found.p_value, expected.pvalue, rtol=1e-4)


def test_error_and_freedom_by_hand():
    # Mean 2; sums of squares: seeds 3 * (1 + 1) = 6, users 2 * (1 + 0 + 1) = 4, rest 4 * (0.5 ** 2) = 1.
    difference = 2 + np.array([[-1.0], [1.0]]) + np.array([-1.0, 0.0, 1.0])
    difference = difference + np.array([[0.5, -0.5, 0.0], [-0.5, 0.5, 0.0]])
    found = paired_difference(difference, np.zeros((2, 3)))
    seeds, users, rest = 6 / 1, 4 / 2, 1 / 2
    total = seeds + users - rest
    np.testing.assert_allclose([found.mean, found.error], [2, np.sqrt(total / 6)])
    np.testing.assert_allclose(found.p_value, 2 * stats.t.sf(2 / found.error, 1))


def test_users_without_a_metric_are_dropped_and_equal_rows_do_not_differ():
    one, other = np.random.default_rng(0).normal(size=(2, 3, 20))
    with_gaps = [np.insert(values, [0, 7], np.nan, axis=1) for values in (one, other)]
    assert paired_difference(*with_gaps) == paired_difference(one, other)
    assert paired_difference(with_gaps[0], with_gaps[0]) == (0, 0, 1)
    assert paired_difference(one + 1, one)[1:] == pytest.approx((0, 0), abs=1e-12)


@pytest.mark.parametrize("effects", [(0, 0), (0, 1), (0.3, 1), (1, 0), (1, 1)])
def test_false_positives_are_at_most_five_per_cent(effects):
    generator = np.random.default_rng(0)
    zeros, simulations = np.zeros((4, 40)), 1000
    p_values = [
        paired_difference(crossed(generator, 4, 40, *effects), zeros).p_value
        for _ in range(simulations)
    ]
    # Three standard errors of the simulation are 2 per cent.
    found = np.mean(np.array(p_values) < 0.05)
    assert found < 0.07
    # Cautious where users differ too, exact where seeds alone do.
    assert effects[1] or found > 0.03


def test_holm_correction():
    np.testing.assert_allclose(holm(np.array([[0.01], [0.04], [0.03]]))[:, 0], [0.03, 0.06, 0.06])
    table = np.array([[0.01, 0.9], [0.8, 0.02], [0.012, 0.2]])
    # Sorted 0.01, 0.012, 0.02, 0.2, 0.8, 0.9 by 6, 5, 4, 3, 2, 1: never falling, at most 1.
    np.testing.assert_allclose(holm(table), [[0.06, 1], [1, 0.08], [0.06, 0.6]])


def test_the_expected_best_of_some_runs_is_the_mean_over_all_choices_of_them():
    values = np.array([0.3, 0.1, 0.9, 0.4])
    expected = [
        np.mean([max(chosen) for chosen in combinations(values, drawn)]) for drawn in (1, 2, 3, 4)
    ]
    np.testing.assert_allclose(expected_best(values), expected)
    np.testing.assert_allclose(best_of(2, np.eye(3)), [0, 1 / 3, 2 / 3])


# --- choices ------------------------------------------------------------------------------------


def test_choices_are_names_options_and_chains():
    plain = parse_choice("metabalance")
    assert (plain.name, plain.parts, plain.place) == ("metabalance", (("metabalance", ()),), None)
    given = parse_choice("metabalance(relax_factor=1, target=-1, place='representation')")
    assert given.parts == (("metabalance", (("relax_factor", 1), ("target", -1))),)
    assert given.place == "representation"
    chain = parse_choice(" metabalance(relax_factor=0.7) + grad_surgery + mgda(place='parameters')")
    assert [name for name, _ in chain.parts] == ["metabalance", "grad_surgery", "mgda"]
    assert (chain.name, chain.place) == ("mgda", "parameters")


def test_a_choice_with_a_list_can_be_a_key():
    assert len({parse_choice("fixed_weights(weights=[1, 0.5])") for _ in range(2)}) == 1


def test_a_chain_keeps_the_task_axis_up_to_its_last_part():
    method = parse_choice("metabalance(relax_factor=1) + grad_surgery").method(2, optax.adam(1), {})
    gradients = jnp.array([[3.0, 0.0], [-80.0, 60.0]])
    update, _ = method.update(gradients, method.init(jnp.zeros(2)), jnp.zeros(2))
    # The second gradient at the target's norm is (-2.4, 1.8); grad_surgery takes the conflict out.
    np.testing.assert_allclose(update, [3.0, 1.8], atol=1e-5)


@pytest.mark.slow
def test_a_method_that_another_one_is_built_on():
    gradients, losses = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, 2.0])
    texts = ('emtl(base="mgda", epsilon=1)', "mgda")
    raw, plain = (parse_choice(text).method(2, optax.identity(), {}) for text in texts)
    update, _ = raw.update(gradients, raw.init(jnp.zeros(2)), losses=losses)
    expected, _ = plain.update(gradients, plain.init(jnp.zeros(2)))
    np.testing.assert_allclose(update, expected / 2, rtol=1e-6)
    with pytest.raises(UserError, match="unknown method 'mgdb'"):
        parse_choice('emtl(base="mgdb")').method(2, optax.identity(), {})


def test_known_methods_and_knobs():
    assert known_methods()[:2] == ("single", "sum") and "ntk" not in known_methods()
    assert set(known_methods()) - {"single", "sum"} == set(mtl.METHODS) - {"ntk"}
    gradients, adam = jnp.eye(3), optax.scale_by_adam()
    for text, knobs, expected in (
        ("single", {}, [1, 0, 0]),
        ("sum", {}, [1, 1, 1]),
        ("fixed_weights", {}, [1, 1, 1]),
        ("fixed_weights", {"weights": jnp.array([1.0, 0.5, 0.1])}, [1, 0.5, 0.1]),
        ("fixed_weights(weights=[1, 2, 3])", {}, [1, 2, 3]),
    ):
        method = parse_choice(text).method(3, adam, knobs)
        update, _ = method.update(gradients, method.init(jnp.zeros(3)), jnp.zeros(3))
        np.testing.assert_allclose(update, expected)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("magic", "unknown method 'magic'; choose from single, sum, "),
        ("metabalance + magic", "unknown method 'magic'"),
        ("ntk", "unknown method 'ntk'"),
        ("metabalance(", "metabalance(: write name or name(option=value)"),
        ("metabalance(1)", "write name or name(option=value)"),
        ("metabalance(**{'a': 1})", "write name or name(option=value)"),
        ("mtl.metabalance", "write name or name(option=value)"),
        ("metabalance - mgda", "write name or name(option=value)"),
        ("", "write name or name(option=value)"),
        ("metabalance(relax_factor=x)", "an option's value must be a literal"),
        ("metabalance(relax_factor={[]: 1})", "an option's value must be a literal"),
        ("sum + metabalance", "single and sum can only end a chain"),
        ("mgda(place='head')", "place= is one of losses, representation, parameters, not 'head'"),
    ],
)
def test_choices_that_cannot_be_read(text, shown):
    with pytest.raises(UserError) as raised:
        parse_choice(text)
    assert shown in str(raised.value) and "\n" not in str(raised.value)


# --- steps --------------------------------------------------------------------------------------


def step_of(text: str, network: Network, scaler=None) -> steps.Step:
    """The step of a choice; without a scaler by plain gradient descent."""
    scaler = optax.identity() if scaler is None else scaler
    return make_step(parse_choice(text), network, scaler, optax.scale(-0.1), {})


def one_step(step: steps.Step, params, batch: Batch):
    return step.update(params, step.init(params), batch)


@pytest.mark.slow
@pytest.mark.parametrize("method", known_methods())
def test_every_known_method_makes_a_step(trainer, params, batch, method):
    step = step_of(method, trainer.network, optax.scale_by_adam())
    state = jax.eval_shape(step.init, params)
    *after, losses, weights = jax.eval_shape(step.update, params, state, batch)
    before = jax.eval_shape(lambda: (params, state))
    chex.assert_trees_all_equal_shapes_and_dtypes(before, tuple(after))
    chex.assert_shape((losses, weights), (3,))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    sampled(
        ["uncertainty", "metabalance(place='representation')", "metabalance", "adatask"],
        ["metabalance"],
    ),
)
def test_a_real_step_in_each_place(trainer, params, batch, method):
    step = step_of(method, trainer.network, optax.scale_by_adam())
    new, _, losses, weights = jax.jit(partial(one_step, step))(params, batch)
    chex.assert_tree_all_finite((new, losses, weights))
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), params, new)
    assert all(jax.tree.leaves(moved.shared))
    assert all(jax.tree.leaves(moved.heads["item_bias"]))


@pytest.mark.slow
def test_the_plain_sum_is_the_same_in_every_place(trainer, params, batch):
    places = ("losses", "representation", "parameters")
    made = [step_of(f"sum(place='{place}')", trainer.network) for place in places]
    found = jax.jit(lambda *args: [one_step(step, *args) for step in made])(params, batch)
    for other in found[1:]:
        tree_allclose(other[0], found[0][0], rtol=1e-5, atol=1e-6)
        tree_allclose(other[2:], found[0][2:], rtol=1e-5)


@pytest.mark.slow
def test_each_loss_is_differentiated_through_its_own_tower(trainer, params, batch):
    network = trainer.network
    broken = batch._replace(labels=batch.labels.at[1].set(jnp.nan))
    fn = jax.jit(mtl.split_value_and_grad(network.encode, network.decode))
    _, (grads, _) = fn(params.shared, params.heads, broken)
    finite = [np.isfinite(leaf).reshape(3, -1).all(axis=1) for leaf in jax.tree.leaves(grads)]
    np.testing.assert_array_equal(np.all(finite, axis=0), [True, False, True])


@pytest.mark.slow
def test_towers_get_the_sum_of_losses_unless_the_method_weighs_them(trainer, params, batch):
    methods = ("sum(place='parameters')", "metabalance(relax_factor=1)", "mgda")
    made = [step_of(method, trainer.network) for method in methods]
    found = jax.jit(lambda *args: [one_step(step, *args) for step in made])(params, batch)
    plain, same, weighed = (
        new.heads["item_bias"][...] - params.heads["item_bias"][...] for new, *_ in found
    )
    weights = found[2][3]
    assert not np.allclose(found[1][3], 1) and not np.allclose(weights, 1)
    np.testing.assert_array_equal(same, plain)
    np.testing.assert_allclose(weighed, weights[:, None] * plain, rtol=1e-5, atol=1e-7)


def test_options_that_a_method_does_not_have(trainer):
    with pytest.raises(UserError, match=r"--method mgda\(magic=1\): .*magic"):
        step_of("mgda(magic=1)", trainer.network)
    with pytest.raises(UserError, match=r"--method metabalance\(relax_factor=7\): "):
        step_of("metabalance(relax_factor=7)", trainer.network)
    for text in ("mgda(place='losses')", "metabalance + mgda(place='losses')"):
        with pytest.raises(UserError, match="looks at gradients, so not with place='losses'"):
            step_of(text, trainer.network)


# --- training -----------------------------------------------------------------------------------


def test_a_batch_has_the_labels_and_masks_of_its_pairs(units_trainer):
    chosen = jnp.asarray(np.random.default_rng(0).integers(0, len(units_trainer.dataset.train), 50))
    trainer = Trainer(units_trainer.dataset, replace(TINY, negatives=3))
    batch = jax.jit(trainer.batch)(trainer.data, (chosen, jax.random.key(0)))
    values, known = dense(units_trainer.dataset.train)
    users, items = np.asarray(batch.users), np.asarray(batch.items)
    np.testing.assert_array_equal(np.stack([users, items], 1)[:50], trainer.data.pairs[chosen])
    np.testing.assert_array_equal(users[50:], np.repeat(users[:50], 3))
    np.testing.assert_array_equal(batch.labels, values[users, items].T)
    is_known = known[users, items]
    assert 10 < is_known[50:].sum() < 140  # some drawn pairs are in the training set
    for task in (0, 1):
        positive = values[users, items, task] > 0
        other = is_known & ~positive  # a positive of another task only
        np.testing.assert_array_equal(batch.mask[task], ~other)
    for task in (2, 3):
        np.testing.assert_array_equal(batch.mask[task], is_known)
    assert np.any(batch.mask[0] == 0) and not np.all(batch.mask[0] == batch.mask[1])


@pytest.mark.slow
@pytest.mark.parametrize("method", sampled(["sum", "metabalance"], ["metabalance"]))
def test_embeddings_alone_are_decayed(trainer, params, batch, method):
    setting = trainer.default_setting()
    step = trainer.make_step(parse_choice(method), setting)
    batch = batch._replace(mask=jnp.zeros_like(batch.mask))  # all gradients are 0
    new, *_ = jax.jit(partial(one_step, step))(params, batch)
    kept = 1 - setting.learning_rate * setting.weight_decay
    tables = jax.tree.map(lambda table: kept * table, params.shared.tables)
    expected = params._replace(shared=params.shared._replace(tables=tables))
    tree_allclose(new, expected, rtol=1e-6)


def test_an_epoch_shows_every_pair(nested):
    trainer = Trainer(nested, replace(TINY, batch_pairs=7))
    (order,), (step_keys,) = trainer.slots(1, np.array([0]))
    assert order.shape == (trainer.parts, trainer.steps_at_once, 7) and trainer.parts > 1
    assert step_keys.shape == order.shape[:2]
    times = np.bincount(order.ravel(), minlength=len(nested.train))
    assert times.min() == 1 and times.max() == 2
    assert order.size - len(nested.train) < trainer.parts * 7 + 7
    for epoch, seed in ((2, 0), (1, 1)):
        (again,), _ = trainer.slots(epoch, np.array([seed]))
        assert not np.array_equal(order, again)


@pytest.fixture(scope="module")
def runs(units_trainer):
    """Finished runs by method and seed; `single` without measuring them."""
    found = {}
    for method, seed in (("sum", 0), ("single", 0), ("single", 1)):
        plan, choice = Plan(seed, units_trainer.default_setting()), parse_choice(method)
        (run,) = units_trainer.train(choice, [plan], measure=method == "sum")
        found[method, seed] = run
    return found


@pytest.mark.slow
def test_every_choice_sees_the_same_batches(units_trainer, runs):
    assert units_trainer.steps_per_epoch == 1
    losses = {key: run.history["losses"][0] for key, run in runs.items()}
    np.testing.assert_allclose(losses["sum", 0], losses["single", 0], rtol=1e-6)
    assert not np.allclose(losses["single", 0], losses["single", 1], rtol=1e-6)
    np.testing.assert_array_equal(runs["single", 0].history["weights"], [[1, 0, 0, 0]] * 2)
    np.testing.assert_array_equal(runs["sum", 0].history["weights"], 1)


@pytest.mark.slow
def test_a_run_has_every_metric_and_keeps_the_best_epoch(units, runs):
    run = runs["sum", 0]
    assert runs["single", 0].test == runs["single", 0].validation == {}
    validation = run.history["validation"]
    assert validation.shape == (2,) and len(np.unique(validation)) == 2
    assert run.best_epoch == 1 + np.argmax(validation)
    column = COLUMNS.index("ndcg@10, all")
    best = np.nanmean(run.validation["rated 5"][:, column])
    np.testing.assert_allclose(best, validation.max(), rtol=1e-5)
    assert set(run.validation) == {"rated 5"}  # what training was stopped by
    for part, held_out in ((run.validation, units.validation), (run.test, units.test)):
        for place, task in enumerate(units.tasks):
            if task.name not in part:
                continue
            if task.kind == REGRESSION:
                assert part[task.name].shape == (len(held_out),)
                continue
            users = np.unique(held_out.positives(place)[:, 0])
            assert part[task.name].shape == (USERS, len(COLUMNS))
            measured = ~np.isnan(part[task.name]).any(axis=1)
            np.testing.assert_array_equal(np.flatnonzero(measured), users)
    assert np.isnan(run.test["rated 5"][0]).all()
    assert run.history["norms"].shape == (2, 4, 4) and np.all(run.history["norms"][0] > 0)


@pytest.mark.slow
def test_squared_errors_of_held_out_numbers(units, units_trainer):
    network, pairs = units_trainer.network, jnp.asarray(units.test.pairs.T)

    @jax.jit
    def predicted():
        params = network.init(jax.random.key(3))
        return params, [network.predict(params, task, *pairs) for task in units.regression_tasks]

    params, numbers = predicted()
    (found,) = units_trainer.measure(jax.tree.map(lambda leaf: leaf[None], params), TEST)
    for task, predictions in zip(units.regression_tasks, numbers, strict=True):
        errors = (predictions - units.test.values[:, task]) ** 2
        np.testing.assert_allclose(found[units.tasks[task].name], errors, rtol=1e-4, atol=1e-4)
        # Before training the number is the mean of the training set, and little beside it.
        np.testing.assert_allclose(predictions, units.train.values[:, task].mean(), atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fixed_weights", "metabalance", "multibalance"])
def test_runs_side_by_side_equal_runs_one_by_one(units, method):
    config = replace(TINY, learning_rate=0.03)
    alone, together = Trainer(units, config), Trainer(units, config)
    together.side_by_side = True  # before anything is traced
    knobs = ({}, {})
    if method == "fixed_weights":
        knobs = ({"weights": [1.0, 1, 1, 1]}, {"weights": [1.0, 0.1, 0.3, 0.01]})
    choice, plans = parse_choice(method), [
        Plan(seed, alone.default_setting(**knob)) for seed, knob in enumerate(knobs)
    ]  # fmt: skip
    expected, found = alone.train(choice, plans), together.train(choice, plans)
    assert len(found) == len(expected) == 2
    for run, same in zip(found, expected, strict=True):
        assert (run.seed, run.best_epoch) == (same.seed, same.best_epoch)
        tree_allclose(run.history, same.history, rtol=1e-4, atol=1e-4)
        tree_allclose(run.test, same.test, rtol=1e-4, atol=1e-4)
    assert not np.allclose(found[0].history["losses"], found[1].history["losses"], rtol=1e-3)


# --- rows ---------------------------------------------------------------------------------------


def test_rows_are_compared_with_the_baseline_over_all_columns_of_the_target():
    generator = np.random.default_rng(0)
    base = generator.random((4, 50, len(COLUMNS)))
    base[:, 0] = np.nan
    better = base + 0.1 + 0.01 * generator.random(base.shape)
    task = Task("buy")

    def row(values, trainings=4):
        runs = [Run("", seed, {}, {"buy": users}, 1, 0.0, {}) for seed, users in enumerate(values)]
        return tables.Row(runs, trainings, 0.0)

    rows = {"floor": row(base, 0), "sum": row(base), "same": row(base), "better": row(better)}
    found = report.differences(rows, "sum", "buy")
    assert list(found) == ["same", "better"]
    assert all(d.p_value == 1 for d in found["same"])
    # Two rows with all columns are one family.
    plain = paired_difference(better[..., 0], base[..., 0])
    assert plain.p_value < found["better"][0].p_value < 2 * len(COLUMNS) * plain.p_value * 1.01
    _, *lines = report.lines_of(rows, report.headline([task]), found)
    cells = {label: first for label, first, *_ in lines}
    assert cells["better"].endswith("***") and not cells["same"].endswith("*")
    means = np.nanmean(base[..., 0], axis=1)
    error = f"{means.std(ddof=1) / 2:.4f}"
    assert cells["sum"] == f"{means.mean():.4f} ± {error}"


def test_a_bar_in_a_cell_does_not_end_it():
    lines = tables.pipe_table([("method", "Conv|imp: AUC"), ("sum", "0.9")]).splitlines()
    assert lines == [r"| method | Conv\|imp: AUC |", "| --- | ---: |", "| sum | 0.9 |"]
