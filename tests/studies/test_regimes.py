"""The study of regimes: its network, losses and labels, what is read from rows, and the command."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from examples.studies.harness.choices import parse_choice
from examples.studies.harness.errors import UserError
from examples.studies.harness.runs import Plan
from examples.studies.harness.steps import Parameters
from examples.studies.harness.trainer import TEST, VALIDATION
from examples.studies.recommender.data import PAPER_SPLIT, make_dataset
from examples.studies.recommender.evaluation import COLUMNS, held_out_users, rank_by_item_scores
from examples.studies.recommender.sources import synthetic
from examples.studies.regimes import report, study
from examples.studies.regimes.__main__ import main
from examples.studies.regimes.network import (
    SCALE,
    Heads,
    Network,
    Shared,
    item_vectors,
    predict,
)
from examples.studies.regimes.ranking import held_out, ndcg
from examples.studies.regimes.regimes import (
    CROSS_ENTROPY,
    LEVELS,
    NEGATIVES,
    REGIMES,
    SOFTMAX,
    Regime,
    has,
    label_codes,
    task_loss,
)
from examples.studies.regimes.training import TrainConfig, Trainer, dense, sparse

USERS, ITEMS, SIZE, TASKS = 5, 7, 3, 2
REFERENCES = {"target": [0.02, 0.02], "all": [0.1, 0.1]}


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def some_params(generator: np.random.Generator) -> Parameters:
    draw = lambda *shape: jnp.asarray(generator.normal(size=shape), jnp.float32)  # noqa: E731
    heads = Heads(draw(TASKS, SIZE), draw(TASKS, ITEMS))
    return Parameters(Shared(draw(ITEMS, SIZE), draw(ITEMS, SIZE)), heads)


def some_known(generator: np.random.Generator) -> np.ndarray:
    known = generator.random((USERS, ITEMS)) < 0.4
    known[0] = False  # a user without history
    return known


# --- the network and the losses -----------------------------------------------------------------------


@pytest.mark.parametrize("task", [0, 1])
def test_a_score_is_the_sum_over_the_other_items_of_the_history(generator, task):
    params, known = some_params(generator), some_known(generator)
    read, scored = map(np.asarray, params.shared)
    expected = np.zeros((USERS, ITEMS))
    for user in range(USERS):
        weight = SCALE / np.sqrt(max(known[user].sum(), 1))
        for item in range(ITEMS):
            others = [j for j in np.flatnonzero(known[user]) if j != item]
            vector = np.asarray(params.heads.scale[task]) * scored[item]
            expected[user, item] = weight * sum(read[j] @ vector for j in others)
    expected += np.asarray(params.heads.bias[task])
    # A pair of any task counts, but not its bits at the levels of permuted labels.
    codes = np.where(known, generator.choice([1, 2, 3], known.shape), 0) | 8
    found = predict(params, jnp.asarray(codes, jnp.uint16), task)
    # float32, sums of a few products of numbers up to SCALE
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_item_vectors_are_those_whose_products_are_nearest_to_the_cosines(generator):
    known = generator.random((40, 9)) < 0.4
    cosines = known.T.astype(float) @ known
    cosines /= np.sqrt(np.outer(np.diag(cosines), np.diag(cosines)))
    values, vectors = np.linalg.eigh(cosines)
    expected = (vectors[:, -4:] * values[-4:]) @ vectors[:, -4:].T
    found = item_vectors(known, 4)
    np.testing.assert_allclose(found @ found.T, expected, atol=1e-5)  # float32
    np.testing.assert_array_equal(found, item_vectors(known, 4))


def loss(known, positive, kind: str, logits=None, summed: bool = False) -> jax.Array:
    logits = jnp.zeros(known.shape) if logits is None else jnp.asarray(logits)
    knobs = Regime("", "", summed=summed).knobs(2.0)
    return task_loss(logits, jnp.asarray(known), jnp.asarray(positive), kind, knobs)


def some_labels(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    known = some_known(generator)
    positive = known & (generator.random(known.shape) < 0.6)
    positive[1, np.flatnonzero(~known[1])[0]] = True  # a permuted pair was never touched
    return known, positive, generator.normal(size=known.shape).astype(np.float32)


def test_cross_entropy_is_the_expectation_over_drawn_negatives(generator):
    known, positive, logits = some_labels(generator)
    total = 0.0
    for user in range(USERS):
        own = logits[user, positive[user]]
        drawn = np.log1p(np.exp(logits[user, ~known[user] & ~positive[user]])).mean()
        total += np.log1p(np.exp(-own)).sum() + len(own) * NEGATIVES * drawn
    expected = total / positive.sum() / (1 + NEGATIVES)
    np.testing.assert_allclose(loss(known, positive, CROSS_ENTROPY, logits), expected, rtol=1e-5)


def test_softmax_ranks_positives_among_the_items_never_touched(generator):
    known, positive, logits = some_labels(generator)
    losses = []
    for user in range(USERS):
        ranked = np.flatnonzero(positive[user] | ~known[user])
        losses += [-log_softmax(logits[user, ranked])[positive[user, ranked]]]
    expected = np.concatenate(losses).mean()
    np.testing.assert_allclose(loss(known, positive, SOFTMAX, logits), expected, rtol=1e-5)


def test_sums_count_every_positive_and_means_do_not(generator):
    known = some_known(generator)
    mean, total = (loss(known, known, CROSS_ENTROPY, summed=summed) for summed in (False, True))
    np.testing.assert_allclose(total / mean, known.sum() / 2.0, rtol=1e-6)


def test_only_the_auxiliaries_labels_are_permuted():
    dataset = make_dataset(synthetic(60, 40), PAPER_SPLIT)
    codes, num_tasks = label_codes(dataset), len(dataset.tasks)
    tables = np.array(
        [
            [has(codes, task, num_tasks, level) for task in range(num_tasks)]
            for level in range(len(LEVELS))
        ]
    )
    for task in range(len(dataset.tasks)):
        users, items = dataset.train.positives(task).T
        assert tables[0, task].sum() == len(users) and tables[0, task][users, items].all()
    same = [(tables[level, 1] & tables[0, 1]).sum() / tables[0, 1].sum() for level in (1, 2)]
    assert (tables[:, 0] == tables[0, 0]).all()
    assert LEVELS == (0.0, 0.5, 1.0) and 0.5 < same[0] < 0.8 and same[1] < 0.5
    # Users keep their number of pairs, and items their popularity, but for pairs that fall together.
    for axis in (0, 1):
        assert (tables[2, 1].sum(axis=axis) <= tables[0, 1].sum(axis=axis)).all()


def test_a_regime_reads_the_labels_of_its_level(generator):
    codes = jnp.asarray(some_known(generator) * 0b110000, jnp.uint16)  # positives at level 2 alone
    vectors, bias = generator.normal(size=(ITEMS, SIZE)), np.zeros((TASKS, ITEMS), np.float32)
    found = []
    for permuted in (0.0, 1.0):
        knobs = Regime("", "", permuted=permuted).knobs(2.0)
        network = Network(vectors, bias, USERS, (CROSS_ENTROPY, SOFTMAX), knobs)
        params = network.init(jax.random.key(0))
        copies = (network.encode(params.shared, codes),) * TASKS
        found.append(np.array(network.losses(params.heads, copies, codes)))
    assert (found[0] == 0).all() and (found[1] > 0).all()


def test_norms_and_cosines_are_those_of_the_first_step_of_an_epoch():
    dataset = make_dataset(synthetic(60, 40), PAPER_SPLIT)
    config = TrainConfig(epochs=1, patience=1, embedding=4, batch_users=20)
    trainer = Trainer(dataset, config, REGIMES[2].kinds)
    setting = trainer.setting(REGIMES[2], 1e-2, 0.0, weights=np.ones(3))
    (run,) = trainer.train(parse_choice("fixed_weights"), [Plan(0, setting)])
    (users, _), params = trainer.order(trainer.data, 1, jax.random.key(0)), trainer.init(None)
    network = Network(*trainer._start, 20, REGIMES[2].kinds, setting.knobs["regime"])
    codes = trainer.data[users[0, 0]]

    @jax.jit
    @jax.jacrev
    def jacobian(shared):
        return jnp.stack(network.decode(params.heads, network.encode(shared, codes), codes))

    rows = jacobian(params.shared)
    flat = np.concatenate([np.asarray(leaf).reshape(3, -1) for leaf in rows], axis=1)
    products, norms = flat @ flat[0], np.linalg.norm(flat, axis=1)
    cosines = products[1:] / norms[1:] / norms[0]
    np.testing.assert_allclose(run.history["cosines"][0], cosines, rtol=1e-4)
    np.testing.assert_allclose(np.exp(run.history["log_norms"][0]), norms[1:] / norms[0], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("part", [VALIDATION, TEST])
def test_ndcg_from_counts_is_that_of_a_sort(generator, part):
    dataset = make_dataset(synthetic(60, 40), PAPER_SPLIT)
    scores = generator.normal(size=(60, 40)).round(1).astype(np.float32) + 0  # with ties, no -0
    scores[::7] = np.nan
    pairs = held_out(dataset, part)
    found = ndcg(jnp.asarray(scores)[pairs.users], pairs)
    expected = rank_by_item_scores(dataset, lambda users: scores[users], 0, part)
    users = held_out_users(dataset, 0, part)
    columns = [COLUMNS.index(f"ndcg@10, {protocol}") for protocol in ("all", "new")]
    np.testing.assert_allclose(found, expected[users][:, columns], rtol=1e-5)
    assert (found[:, 0] > 0).any() and (found[:, 0] == 0).any()


# --- what is read from rows ----------------------------------------------------------------------------


def a_row(part: str, regime: str, arm: str, seed: int, **rest) -> dict:
    row = {"part": part, "regime": regime, "arm": arm, "seed": seed, "rate": 0.1, "decay": 1.0}
    row |= {"weights": [], "validation": 0.1, "ndcg": [0.1, 0.1], "epoch": 1, "seconds": 1.0}
    return row | {"relative_weights": [1.0], "relative_norms": [2.0], "cosines": [0.5]} | rest


def curve_rows(regime: str, means: dict[float, float]) -> list[dict]:
    return [
        a_row("curve", regime, "fixed weights", seed, weights=[1.0, w], validation=v, ndcg=[v, v])
        for w, v in means.items()
        for seed in range(2)
    ]


def test_arms_are_measured_where_curves_bend_most_and_least():
    rows = curve_rows("a", {0.0: 0.1, 1.0: 0.1, 3.0: 0.1001})
    rows += curve_rows("b", {0.0: 0.1, 1.0: 0.1, 3.0: 0.2})
    rows += curve_rows("c", {0.0: 0.3, 1.0: 0.1, 3.0: 0.2})
    rows += curve_rows("d", {0.0: 0.1, 1.0: 0.1, 3.0: 0.15})
    assert report.chosen_regimes(rows) == ["c", "b", "a"]
    assert report.chosen_regimes(curve_rows("a", {0.0: 0.1, 1.0: 0.1})) == ["a"]
    np.testing.assert_allclose(report.curve_of(rows, "b").norms, 2.0)


def test_the_law_reads_the_weight_of_equal_norms_off_the_curve():
    curve = report.curve_of(curve_rows("a", {0.25: 0.2, 1.0: 0.1, 4.0: 0.3}), "a")
    np.testing.assert_allclose(curve.equal, 0.5)  # the norms are twice the target's
    np.testing.assert_allclose([curve.gain(w) for w in (0.25, 0.5, 1, 2, 9)], [1, 0.5, 0, 1, 2])
    assert "win more than 3% in: a (+50%)" in report.law(curve_rows("a", {0.25: 0.2, 1.0: 0.1}))
    assert "lose as much in: a (-50%)" in report.law(curve_rows("a", {0.5: 0.1, 1.0: 0.2}))


def test_the_advice_reads_norms_and_cosines_of_the_sum():
    rows = curve_rows("a", {0.0: 0.2, 1.0: 0.1})
    for regime, norm, cosine in (
        ("b", 20.0, 0.0),
        ("c", 20.0, 0.5),
        ("d", 0.05, 0.5),
        ("s", 0.05, 0.0),
    ):
        rows += [
            row | {"regime": regime, "relative_norms": [norm], "cosines": [cosine]}
            for row in rows[:4]
        ]
    _, *lines = report.advice_lines(rows)
    said = {name: action for name, _, _, action, *_ in lines}
    assert said == {"a": "sum", "b": "balance", "c": "sum", "d": "balance", "s": "sum"}
    assert lines[0][-2:] == ("+100.0%", "+10.0%")  # between weight .001 and 1, at .5


def test_a_weight_without_a_run_leaves_no_curve():
    rows = curve_rows("a", {0.0: 0.1, 1.0: 0.1})
    assert report.curve_of(rows[:2], "a") is None and report.curve_of([], "a") is None


def test_curves_of_other_weights_stand_in_one_table():
    rows = curve_rows("a", {0.0: 0.1, 1.0: 0.2}) + curve_rows("b", {0.0: 0.1, 0.3: 0.4, 1.0: 0.2})
    header, *lines = report.curve_lines(rows)
    assert header[2:5] == ("0", "0.3", "1")
    assert [line[3] == "" for line in lines] == [True, False]
    assert {len(line) for line in lines} == {len(header)}


@pytest.mark.parametrize(
    ("value", "word"), [(0.09, "(admitted)"), (0.07, "not admitted: 10% short")]
)
def test_a_network_is_admitted_at_80_per_cent_of_the_neighbours(value, word):
    text = report.admission(curve_rows("a", {0.0: 0.01, 1.0: value}), REFERENCES)
    assert word in text and f"{value:.4f}" in text


def test_a_search_keeps_the_best_by_validation_and_always_tries_the_sum():
    pool = [
        a_row("pool", "a", "fixed weights", seed, weights=[1.0, weight], validation=weight)
        for seed in range(3)
        for weight in (3.0, 1.0, 2.0, 0.5, 0.2)
    ]
    for runs, best in ((1, {1.0}), (5, {3.0})):
        kept = report.searched(pool, runs)
        assert {row["weights"][1] for row in kept.values()} == best and len(kept) == 3
    two = [row["weights"][1] for row in report.searched(pool, 3).values()]
    assert set(two) <= {1.0, 2.0, 3.0}
    assert report.searched(pool, 16) == {}


def test_the_best_of_many_equal_runs_wins_by_chance():
    generator, rows = np.random.default_rng(0), []
    for arm in ("sum", "single"):
        for seed in range(8):
            noise = 1 + 0.05 * generator.normal()  # of validation and test alike
            rows.append(a_row("arm", "a", arm, seed, validation=noise, ndcg=[noise, noise]))
    text = report.chance(rows)
    gain = float(text.split("set and +")[1].split("%")[0])
    assert 5 < gain < 15  # 2.1 standard deviations of a normal, the largest of 27
    assert report.chance([]) == ""


def test_gains_are_over_the_sum_of_the_same_seeds():
    rows = []
    for seed in range(4):
        for arm, level in (("sum", 0.1), ("single", 0.1), ("metabalance, r = 1", 0.15)):
            users = sparse(np.full(6, level + 0.01 * seed))
            rows.append(a_row("arm", "a", arm, seed, users=users, num_users=6, ndcg=[level, level]))
    found = report.compared(rows, "a")
    gain, p_value = found.over_sum["metabalance, r = 1"]
    np.testing.assert_allclose(gain, 0.05 / 0.115, rtol=1e-5)
    assert p_value < 1e-6 and found.over_sum["single"][1] == 1 and not found.over_search


def test_numbers_of_users_survive_the_file():
    values = np.array([0, 0.25, 0, 1.0], np.float32)
    np.testing.assert_array_equal(dense(json.loads(json.dumps(sparse(values))), 4), values)


def test_a_line_that_was_cut_off_is_trained_again(tmp_path):
    rows = study.Rows(tmp_path, {"fingerprint": 1}, resume=False)
    trial = study.Trial("curve", "a", "sum", 0, 0.1, 1.0, (1.0, 1.0))
    rows.add(trial, {"validation": 0.5})
    path = tmp_path / study.ROWS
    path.write_text(path.read_text() + '{"part": "cur')
    again = study.Rows(tmp_path, {"fingerprint": 1}, resume=True)
    assert list(again.found) == [trial.key] and again.found[trial.key]["validation"] == 0.5
    other = trial._replace(seed=1)
    again.add(other, {"validation": 0.6})
    assert list(study.read_rows(path)[1]) == [trial.key, other.key]
    with pytest.raises(UserError, match="other data"):
        study.Rows(tmp_path, {"fingerprint": 2}, resume=True)


def test_purchases_come_with_views_and_favourites_alone(tmp_path):
    generator = np.random.default_rng(0)
    for name, size in (("buy", 200), ("fav", 50), ("view", 300), ("cart", 400)):
        pairs = np.unique(generator.integers(0, 20, (size, 2)), axis=0)
        lines = "".join(f"{user},{item}\n" for user, item in pairs)
        (tmp_path / f"{name}.csv").write_text(f"user,item\n{lines}")
    dataset = study.load(str(tmp_path))
    assert [task.name for task in dataset.tasks] == ["buy", "fav", "view"]
    assert not (dataset.test.values[:, 0] == 0).any()  # auxiliary pairs are all for training
    (tmp_path / "fav.csv").unlink()
    with pytest.raises(UserError, match=r"no fav.csv\[.gz\] \(found: buy, cart, view\)"):
        study.load(str(tmp_path))


# --- the command ---------------------------------------------------------------------------------------


@pytest.mark.slow  # compiles six programs
def test_a_whole_run_goes_on_and_its_rows_give_the_same_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "REGIMES", (*REGIMES[:1], REGIMES[2], REGIMES[4]))
    monkeypatch.setattr(study, "ALWAYS", ("c",))
    monkeypatch.setattr(study, "WEIGHTS", (0.0, 1.0))
    monkeypatch.setattr(study, "RATES", (1e-2,))
    monkeypatch.setattr(study, "POOL", 4)
    monkeypatch.setattr(study, "TrainConfig", lambda **rest: TrainConfig(embedding=4, **rest))
    monkeypatch.setattr(study, "load", lambda data: make_dataset(synthetic(60, 40), PAPER_SPLIT))
    few = ["--epochs", "1", "--seeds", "2", "--curve-seeds", "1", "--tuning-seeds", "1"]
    command = ["run", *few, "--out", str(tmp_path)]
    assert main(command) == 0
    rows, table = ((tmp_path / name).read_text() for name in ("rows.jsonl", "table.md"))
    assert "Regime c" in table and "search, 4 runs" in table and (tmp_path / "curves.png").exists()
    assert main([*command, "--resume"]) == 0
    assert (tmp_path / "rows.jsonl").read_text() == rows
    other = tmp_path / "other"
    assert main(["tables", "--rows", str(tmp_path / "rows.jsonl"), "--out", str(other)]) == 0
    assert (other / "table.md").read_text() == table
