"""The data of the MetaBalance study: raw logs and their filters, the generator, item-kNN."""

import gzip
from fractions import Fraction

import numpy as np
import pytest

from examples.studies.harness.errors import UserError
from examples.studies.metabalance import readers, synthetic
from examples.studies.metabalance.knn import item_knn_scores
from examples.studies.metabalance.readers import read_raw
from examples.studies.metabalance.synthetic import TABLE_5, synthetic_log, truth
from examples.studies.recommender.data import PAPER_SPLIT, Split, behaviours, make_dataset

USERS, ITEMS = 100, 5000  # what the raw files call their first user and item


def purchases_of_block(size: int, extra: int = 0) -> set[tuple[int, int]]:
    """`size` users who each bought the same `size` items.

    With `extra`: one more user, who bought all but one of these items and a rare one. The user stays with
    fewer purchases of items that stay than are asked for.
    """
    block = {(user, item) for user in range(size) for item in range(size)}
    if extra:
        block |= {(size, item) for item in range(size - 1)} | {(size, size)}
    return block


def write(path, lines):
    text = "".join(f"{line}\n" for line in lines)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def userbehavior_lines(buys, others=()):
    """Rows for purchases, and for (user, item, behaviour), the last purchase twice."""
    rows = [(user, item, "buy") for user, item in sorted(buys)]
    for user, item, behaviour in [rows[-1], *rows, *others]:
        yield f"{user + USERS},{item + ITEMS},77,{behaviour},1511544070"


def ijcai_lines(buys, others=()):
    yield readers.IJCAI.first
    rows = [(user, item, 2) for user, item in sorted(buys)]
    for user, item, action in [rows[-1], *rows, *others]:
        # The real file leaves some brands empty.
        yield f"{user + USERS},{item + ITEMS},7,8,{'' if item % 2 else 9},1111,{action}"


def positives(log):
    return {
        task.name: set(map(tuple, log.interactions.positives(place).tolist()))
        for place, task in enumerate(log.tasks)
    }


@pytest.mark.parametrize("name", ["UserBehavior.csv", "UserBehavior.csv.gz"])
def test_userbehavior(tmp_path, name):
    buys = purchases_of_block(10)
    # User 20 bought 9 items only, and item 30 has one buyer.
    few = {(20, item) for item in range(9)} | {(0, 30)}
    others = [
        (1, 3, "pv"),
        (1, 3, "pv"),
        (2, 4, "cart"),
        (9, 9, "fav"),
        *[(5, 6, "pv")] * 9,
        (20, 3, "pv"),  # of nobody who stays
        (1, 30, "cart"),  # of nothing that stays
        (99, 99, "fav"),  # of neither
    ]
    log = read_raw(write(tmp_path / name, userbehavior_lines(buys | few, others)))
    assert (log.name, log.num_users, log.num_items) == ("UserBehavior-2017", 10, 10)
    assert positives(log) == {
        "buy": buys,
        "cart": {(2, 4)},
        "fav": {(9, 9)},
        "view": {(1, 3), (5, 6)},
    }


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz"])
def test_ijcai(tmp_path, name):
    buys = purchases_of_block(20)
    few = {(30, item) for item in range(19)} | {(user, 40) for user in range(9)}
    others = [(1, 3, 0), (1, 3, 0), (2, 4, 1), (19, 19, 3), (30, 3, 0), (1, 40, 3)]
    log = read_raw(write(tmp_path / name, ijcai_lines(buys | few, others)))
    assert (log.name, log.num_users, log.num_items) == ("IJCAI-2015", 20, 20)
    assert positives(log) == {"buy": buys, "fav": {(19, 19)}, "view": {(1, 3)}}


def test_items_keep_their_order_and_numbers_have_no_gaps(tmp_path):
    # Item 5 of 11 has no buyer; the user and item numbers of the file start far from 0.
    buys = {(3 * user, item + (item >= 5)) for user, item in purchases_of_block(10)}
    log = read_raw(write(tmp_path / "u.csv", userbehavior_lines(buys)))
    assert positives(log)["buy"] == purchases_of_block(10)


def test_filters_count_the_whole_log_once(tmp_path):
    path = write(tmp_path / "u.csv", userbehavior_lines(purchases_of_block(10, extra=1)))
    log = read_raw(path)
    assert (log.num_users, log.num_items) == (11, 10)
    path = write(tmp_path / "i.csv", ijcai_lines(purchases_of_block(20, extra=1)))
    log = read_raw(path)
    assert (log.num_users, log.num_items) == (21, 20)


def test_raw_log_does_not_leak(tmp_path):
    # Everything bought was viewed before, as most purchases really are.
    buys = purchases_of_block(10)
    views = [(*pair, "pv") for pair in sorted(buys)] + [
        (*pair, "cart") for pair in sorted(buys)[::2]
    ]
    log = read_raw(write(tmp_path / "u.csv", userbehavior_lines(buys, views)))
    dataset = make_dataset(log, PAPER_SPLIT)
    trained = set(map(tuple, dataset.train.pairs.tolist()))
    for held_out, count in ((dataset.validation, 10), (dataset.test, 20)):
        of_target = set(map(tuple, held_out.positives(0).tolist()))
        assert len(of_target) == count
        assert not of_target & trained
    assert len(dataset.train.positives(0)) == 70


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["user,item", "1,2"], "unknown format"),
        (["1,2,3,view,5"], "unknown format"),
        (["a,2,3,pv,5"], "unknown format"),
        ([], "cannot be read"),
        (["1,2,3,pv,5", "1,2,3,look,5"], "not 'look'"),
        (["1,2,3,pv,5", "1,2,3,,5"], "not ''"),
        (["1,2,3,pv,5", "1,x,3,pv,5"], "cannot be read"),
        (["1,2,3,pv,5", "1"], "cannot be read"),
        (["1,2,3,buy,5"], "is left"),
        ([readers.IJCAI.first], "is left"),
        ([readers.IJCAI.first, "1,2,3,4,5,6,7"], "not '7'"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read_raw(write(tmp_path / "raw.csv", lines))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_raw(tmp_path / "missing.csv")
    (tmp_path / "broken.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="cannot be read"):
        read_raw(tmp_path / "broken.csv.gz")
    whole = gzip.compress("\n".join(userbehavior_lines(purchases_of_block(30))).encode())
    (tmp_path / "cut.csv.gz").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        read_raw(tmp_path / "cut.csv.gz")


COUNTS_AT_1_64 = {
    "ijcai": (310, 796, {"buy": 6103, "fav": 3504, "view": 31655}),
    "userbehavior": (251, 403, {"buy": 1397, "cart": 832, "fav": 306, "view": 6160}),
}


def counts(log):
    return log.num_users, log.num_items, {n: len(pairs) for n, pairs in positives(log).items()}


@pytest.mark.parametrize("name", TABLE_5)
def test_synthetic_counts(name):
    log = synthetic_log(name, Fraction(1, 64))
    assert counts(log) == COUNTS_AT_1_64[name]
    assert "SYNTHETIC" in log.name and "1/64" in log.name
    found = positives(log)
    viewed = len(found["buy"] & found["view"])
    assert viewed == round(0.81 * len(found["buy"]))  # exactly: other views avoid what was bought
    bought = np.bincount(log.interactions.positives(0)[:, 0], minlength=log.num_users)
    assert bought.min() >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE_5)
def test_synthetic_counts_at_scale_1(name):
    log = synthetic_log(name)
    full = TABLE_5[name]
    assert (log.num_users, log.num_items) == (full.users, full.items)
    assert [task.name for task in log.tasks] == list(full.pairs)
    assert log.interactions.values.sum(axis=0, dtype=np.int64).tolist() == list(full.pairs.values())


def test_table_5():
    """The densities that the paper prints beside its counts."""
    for name, density in (("ijcai", 0.039), ("userbehavior", 0.022)):
        full = TABLE_5[name]
        assert round(100 * full.pairs["buy"] / (full.users * full.items), 3) == density


@pytest.mark.parametrize("relatedness", [0.0, 0.5, 1.0])
def test_relatedness(relatedness):
    known = truth("ijcai", 1 / 64, relatedness)
    users = np.arange(310)
    target = known.affinity(users)
    # About 310 x 8 + 796 x 8 independent numbers: a correlation of affinities is right to a few hundredths.
    assert abs(target.std() - 1) < 0.05
    for task in (1, 2):
        other = known.affinity(users, task)
        assert abs(other.std() - 1) < 0.05
        correlation = np.corrcoef(target.ravel(), other.ravel())[0, 1]
        if relatedness == 1:
            np.testing.assert_allclose(other, target, rtol=1e-5, atol=1e-5)
        else:
            assert abs(correlation - relatedness) < 0.05
    popularity = known.scores(users) - target
    np.testing.assert_allclose(popularity, popularity[:1].repeat(310, axis=0), atol=1e-5)


def test_synthetic_is_determined_by_its_arguments():
    first, again, other, unrelated = (
        synthetic_log("userbehavior", 1 / 64, **options).interactions
        for options in ({}, {}, {"seed": 1}, {"relatedness": 0.0})
    )
    np.testing.assert_array_equal(first.pairs, again.pairs)
    np.testing.assert_array_equal(first.values, again.values)
    assert not np.array_equal(first.positives(0), other.positives(0))
    # The knob moves the other behaviours and leaves the target alone.
    np.testing.assert_array_equal(first.positives(0), unrelated.positives(0))
    assert not np.array_equal(first.positives(1), unrelated.positives(1))


def test_what_is_drawn_follows_the_true_scores():
    log = synthetic_log("ijcai", 1 / 64)
    scores = truth("ijcai", 1 / 64).scores(np.arange(log.num_users))
    ranks = scores.argsort(axis=1).argsort(axis=1) / (log.num_items - 1)
    users, items = log.interactions.positives(0).T
    # At random: 0.5, with a standard error of 0.29 / sqrt(6103) = 0.004.
    assert ranks[users, items].mean() > 0.9


def test_draws_without_replacement_have_the_right_probabilities():
    weights = np.array([4.0, 2.0, 1.0, 0.0, 1.0])
    generator = np.random.default_rng(0)
    runs = 4000
    rows = np.tile(weights, (runs, 1))
    found = synthetic.without_replacement(rows, np.full(runs, 2), generator).reshape(runs, 2)
    assert (found[:, 0] != found[:, 1]).all()
    total = weights.sum()
    expected = weights[:, None] / total * weights / (total - weights[:, None])
    np.fill_diagonal(expected, 0)
    seen = np.zeros((5, 5))
    np.add.at(seen, tuple(found.T), 1 / runs)
    # Five standard errors of a share of at most 1/4 in 4,000 runs are 0.034.
    np.testing.assert_allclose(seen, expected, atol=0.034)
    everything = synthetic.without_replacement(rows[:2], np.array([4, 0]), generator)
    assert sorted(everything) == [0, 1, 2, 4]


def test_spread():
    activity = np.array([1.0, 2.0, 3.0, 1000.0])
    found = synthetic.spread(20, activity, least=1, most=np.array([9, 9, 9, 10]))
    assert found.sum() == 20 and found[3] == 10 and (np.diff(found) >= 0).all()
    # The other three share 10 in proportion 1 : 2 : 3, that is 1.67, 3.33 and 5.
    assert found.tolist() == [2, 3, 5, 10]
    with pytest.raises(ValueError, match="different signs"):  # they do not fit
        synthetic.spread(38, activity, least=1, most=np.array([9, 9, 9, 10]))


@pytest.mark.parametrize(
    "arguments", [("movies", 1), ("ijcai", 1 / 3), ("ijcai", 1 / 64, 1.5), ("ijcai", 1 / 64, -0.1)]
)
def test_synthetic_arguments(arguments):
    with pytest.raises(UserError, match="synthetic data"):
        synthetic_log(*arguments)


@pytest.mark.parametrize("tasks", [[0], [0, 1], [1]])
@pytest.mark.parametrize(("neighbours", "shrink"), [(3, 0.0), (3, 2.0), (100, 0.5)])
def test_item_knn_against_a_dense_computation(tasks, neighbours, shrink):
    generator = np.random.default_rng(0)
    likely = generator.uniform(0.1, 0.5, (2, 1, 12))
    tables = generator.random((2, 900, 12)) < likely
    tables[:, :, 7] = False  # nobody's item
    log = behaviours("small", 900, 12, dict(zip("ab", map(np.argwhere, tables), strict=True)))
    dataset = make_dataset(log, Split(validation=0.2, test=0.2, others=0.0))
    known = np.zeros((900, 12))
    for task in tasks:
        users, items = dataset.train.positives(task).T
        known[users, items] = 1
    together = known.T @ known
    norms = np.sqrt(np.diag(together))
    cosine = together / np.maximum(norms[:, None] * norms + shrink, 1e-9)
    np.fill_diagonal(cosine, 0)
    order = -np.sort(-cosine, axis=1)
    least = order[:, min(neighbours, 12) - 1]
    if neighbours < 12:  # else it would be a matter of chance who is a neighbour
        assert (order[:, neighbours - 1] > order[:, neighbours])[norms > 0].all()
    expected = known @ np.where(cosine >= least[:, None], cosine, 0)
    chosen = np.array([3, 899, 0])
    found = item_knn_scores(dataset, tasks, neighbours, shrink)(chosen)
    assert found.shape == (3, 12)
    np.testing.assert_allclose(found, expected[chosen], rtol=1e-5)
