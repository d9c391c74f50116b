"""Training of tabular models on example-wise labels: sources, metrics, network, training, report."""

import gzip
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

import mtl_optax as mtl
from examples.models.dcn_v2 import DCNv2
from examples.models.mmoe import MMoE
from examples.models.shared_bottom import SharedBottom
from examples.studies.harness import report
from examples.studies.harness.choices import parse_choice
from examples.studies.harness.data import REGRESSION, Task
from examples.studies.harness.errors import UserError
from examples.studies.harness.runner import Job, Runner
from examples.studies.harness.runs import Plan, Run
from examples.studies.harness.statistics import compare, paired_difference
from examples.studies.multibalance.study import gains_of
from examples.studies.ranking import sources, synthetic
from examples.studies.ranking.data import encode, split_rows, standardise
from examples.studies.ranking.metrics import (
    all_metrics,
    auc,
    measure,
    metric,
    normalized_entropy,
    normalized_loss,
    of_truth,
)
from examples.studies.ranking.network import Network
from examples.studies.ranking.synthetic import LogConfig
from examples.studies.ranking.training import TrainConfig, Trainer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SMALL = LogConfig(impressions=600, ctr=0.3, ctcvr=0.1)
MODEL = partial(SharedBottom, embedding=2, bottom=(4,), tower=(3,))
CONFIG = TrainConfig(epochs=4, patience=2, batch=90, learning_rate=1e-2)


@pytest.fixture(scope="module")
def log():
    return synthetic.synthetic(SMALL).only(["CTR", "CVR", "Conv|imp"])


@pytest.fixture(scope="module")
def trainer(log):
    return Trainer(log, MODEL, CONFIG)


# --- metrics -----------------------------------------------------------------------------------------


def logits(probabilities):
    p = np.asarray(probabilities)
    return np.log(p / (1 - p))


def test_normalized_entropy_by_hand():
    # -(ln 0.8 + ln 0.6 + 2 ln 0.9) / 4 over the entropy of 1/4.
    entropy = -(np.log(0.8) + np.log(0.6) + 2 * np.log(0.9)) / 4
    base = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    found = normalized_entropy(np.array([1, 0, 0, 0]), logits([0.8, 0.4, 0.1, 0.1]))
    assert found == pytest.approx(entropy / base, rel=1e-12)
    assert found == pytest.approx(0.41999, abs=1e-5)  # 0.236173 / 0.562335


def test_a_constant_has_the_normalized_entropy_one():
    labels = np.array([1, 0, 0, 0, 1])
    assert normalized_entropy(labels, np.full(5, logits([0.4]))) == pytest.approx(1)
    assert normalized_entropy(labels, np.full(5, logits([0.5]))) > 1
    # Logits at which a probability would be rounded to 0 or 1 keep a finite entropy.
    assert normalized_entropy(labels, np.array([900.0, -900, -900, -900, 900])) == 0
    assert np.isfinite(normalized_entropy(labels, np.array([-900.0, 0, 0, 0, 0])))


def test_auc_by_hand():
    # Of the 2 * 3 pairs of a positive and a negative, 4 are in order and one is a tie.
    labels, scores = np.array([1, 1, 0, 0, 0]), np.array([0.9, 0.3, 0.3, 0.1, 0.5])
    assert auc(labels, scores) == pytest.approx((4 + 0.5) / 6)


def test_metrics_of_one_kind_of_label_are_nan():
    for labels in (np.zeros(3), np.ones(3)):
        assert np.isnan(normalized_entropy(labels, np.zeros(3)))
        assert np.isnan(auc(labels, np.arange(3.0)))
    assert np.isnan(auc(np.array([0, 1]), np.array([np.nan, 1.0])))


def test_errors_of_a_regression_by_hand():
    task = Task("minutes", REGRESSION)
    found = measure(task, np.array([1.0, 2, 3]), np.array([2.0, 2, 1]))
    assert found == pytest.approx([np.sqrt(5 / 3), 1.0])
    # The labels' variance is 2 / 3.
    assert normalized_loss(task, np.array([1.0, 2, 3]), np.array([2.0, 2, 1])) == pytest.approx(2.5)
    assert np.isnan(normalized_loss(task, np.ones(3), np.zeros(3)))


# --- data --------------------------------------------------------------------------------------------


def test_numbers_are_standardised_on_the_training_rows():
    train = np.array([0, 1])
    found = standardise(np.array([1.0, 3.0, np.nan, 5.0]), train)
    assert found.tolist() == [-1, 1, 0, 3] and found.dtype == np.float32
    assert standardise(np.full(4, 7.0), train).tolist() == [0] * 4
    large = standardise(np.array([0.0, 10_000.0, 100.0]), train)
    assert large[:2].tolist() == [-1, 1] and 0 < large[2] < 0.2  # by its logarithm


def test_categories_are_those_of_the_training_rows():
    column = np.array(["b", "a", "b", "new", "zzz", "a"])
    ids, count = encode(column, np.array([0, 1, 2]))
    assert ids.tolist() == [2, 1, 2, 0, 0, 1] and count == 3


def test_sets_are_disjoint_and_hold_all_rows():
    parts = split_rows(101, (0.6, 0.2))
    assert [len(part) for part in parts] == [61, 20, 20]
    assert sorted(np.concatenate(parts)) == list(range(101))
    assert not np.array_equal(parts[0], split_rows(101, (0.6, 0.2), seed=1)[0])


def hillstrom_file(folder, rows=60):
    generator = np.random.default_rng(0)
    lines = [
        "recency,history_segment,history,mens,womens,zip_code,newbie,channel,segment,visit,conversion,spend"
    ]
    for number in range(rows):
        visit, place = number % 2, generator.choice(["Rural", "Urban"])
        bought = int(number % 6 == 1)
        amount = generator.uniform(30, 3000)
        lines.append(f"{number % 12},1) x,{amount},1,0,{place},0,Web,No E-Mail,{visit},{bought},0")
    path = folder / "hillstrom.csv.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def test_hillstrom(tmp_path):
    hillstrom_file(tmp_path)
    data = sources.load(str(tmp_path))
    assert [task.name for task in data.tasks] == ["CTR", "CVR", "Conv|imp"]
    assert (data.train.size, data.validation.size, data.test.size) == (36, 12, 12)
    assert data.features.num_numerical == 2 and len(data.features.vocabulary_sizes) == 7
    visit, of_visit, bought = data.train.labels.T
    assert np.array_equal(data.train.mask[:, 1], visit)  # a conversion rate counts visits alone
    assert np.array_equal(of_visit, bought) and np.all(bought <= visit)
    sizes = np.array(data.features.vocabulary_sizes)
    for part in (data.train, data.validation, data.test):
        assert np.all((part.features.categorical >= 0) & (part.features.categorical < sizes))
    assert "36 + 12 + 12 examples" in data.describe()


def test_census(tmp_path):
    numbers = ",".join(sources.CENSUS_NUMBERS)
    lines = [f"{numbers},education,marital_stat,instance_weight,income_50k"]
    for number in range(50):
        income = "50000+." if number % 5 == 0 else "- 50000."
        married = "Never married" if number % 2 else "Divorced"
        lines.append(f"{number},0,0,0,0,1,52,Masters,{married},1700.5,{income}")
    path = tmp_path / "census_income_test.csv"
    path.write_text("\n".join(lines))
    data = sources.load(str(path))
    assert [task.name for task in data.tasks] == ["income > 50K", "never married"]
    # The second label and the weight of the survey are no inputs.
    assert data.features.num_numerical == 7 and data.features.vocabulary_sizes == (2,)
    everything = np.concatenate([part.labels for part in (data.train, data.validation, data.test)])
    assert everything.sum(axis=0).tolist() == [10, 25]
    assert np.all(data.train.mask == 1)


def test_a_folder_in_aliexpress_form(tmp_path):
    header = "search_id,categorical_1,numerical_1,numerical_2,click,conversion\n"
    train = "".join(f"{n},{n % 3},{n / 7},0.5,{n % 2},{int(n % 4 == 1)}\n" for n in range(40))
    (tmp_path / "train.csv").write_text(header + train)
    (tmp_path / "test.csv").write_text(header + "1,9,0.1,0.5,1,0\n2,1,0.2,0.5,0,0\n")
    data = sources.load(str(tmp_path))
    assert (data.train.size, data.validation.size, data.test.size) == (36, 4, 2)
    assert data.features.num_numerical == 2 and data.features.vocabulary_sizes == (4,)
    assert data.test.features.categorical[0, 0] == 0  # 9 is not in the training rows
    assert data.test.mask[:, 1].tolist() == [1, 0]
    assert data.test.labels.tolist() == [[1, 0, 0], [0, 0, 0]]


def test_a_folder_in_ali_ccp_form(tmp_path):
    for name, rows in {"train": 12, "dev": 5, "test": 4}.items():
        lines = "".join(f"{n % 2},{int(n % 4 == 1)},{n},{n % 3}\n" for n in range(rows))
        (tmp_path / f"ctr_cvr.{name}.csv").write_text("click,purchase,101,121\n" + lines)
    data = sources.load(str(tmp_path))
    assert (data.train.size, data.validation.size, data.test.size) == (12, 5, 4)
    assert data.features.num_numerical == 0 and data.features.vocabulary_sizes == (13, 4)


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        sources.load(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="no CSV files with train and test"):
        sources.load(str(tmp_path))
    (tmp_path / "hillstrom.csv").write_text("visit\n1\n")
    with pytest.raises(UserError, match="no column history, conversion"):
        sources.load(str(tmp_path))
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text("click\n1\n")
    (tmp_path / "hillstrom.csv").unlink()
    with pytest.raises(UserError, match="no column conversion or purchase"):
        sources.load(str(tmp_path))


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data sets are not here")
def test_the_real_files():
    data = sources.load(str(SHARED / "aliexpress_schema_sample"))
    assert (data.train.size, data.validation.size, data.test.size) == (90, 10, 20)
    assert data.features.num_numerical == 63 and len(data.features.vocabulary_sizes) == 16
    data = sources.load(str(SHARED / "hillstrom"))
    parts = (data.train, data.validation, data.test)
    assert sum(part.labels.sum(axis=0) for part in parts).tolist() == [9394, 578, 578]


def test_some_of_the_tasks(log):
    some = log.only(["Conv|imp", "CTR"])
    assert [task.name for task in some.tasks] == ["Conv|imp", "CTR"]
    for part, whole in ((some.train, log.train), (some.test, log.test)):
        assert np.array_equal(part.labels, whole.labels[:, [2, 0]])
    assert np.array_equal(some.truth, log.truth[:, [2, 0]])
    assert (
        some.digest()
        != log.digest()
        == synthetic.synthetic(SMALL).only(["CTR", "CVR", "Conv|imp"]).digest()
    )
    with pytest.raises(UserError, match="no task buy"):
        log.only(["buy"])


# --- the generated log -------------------------------------------------------------------------------


def test_the_generated_log_has_the_stated_rates():
    config = LogConfig(impressions=20_000, ctr=0.2, ctcvr=0.04)
    data = synthetic.synthetic(config)
    assert "SYNTHETIC" in data.name
    parts = (data.train, data.validation, data.test)
    labels = np.concatenate([part.labels for part in parts])
    assert labels[:, 0].mean() == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / 20_000) ** 0.5)
    assert labels[:, 2].mean() == pytest.approx(0.04, abs=4 * (0.04 * 0.96 / 20_000) ** 0.5)
    assert np.all(labels[:, 2] <= labels[:, 0])
    assert np.array_equal(np.concatenate([part.mask for part in parts])[:, 1], labels[:, 0])
    # The truth: a click and then a conversion, and calibrated on the test set.
    click, bought, both = expit(data.truth[:, :3]).T
    assert both == pytest.approx(click * bought, rel=1e-9)
    assert click.mean() == pytest.approx(data.test.labels[:, 0].mean(), abs=0.03)
    found = of_truth(data)
    for name in ("CTR", "CVR", "Conv|imp"):
        assert found[name][0] < 0.95 and found[name][1] > 0.65
    # Nothing else predicts the numbers as well as their true means: not even a scaled one.
    for place, name in ((3, "completion rate"), (4, "watch time")):
        other = measure(data.tasks[place], data.test.labels[:, place], 1.2 * data.truth[:, place])
        assert found[name][0] < other[0]
        errors = data.test.labels[:, place] - data.truth[:, place]
        assert abs(errors.mean()) < 4 * errors.std() / len(errors) ** 0.5


def test_frequencies_follow_a_power_law(log):
    users = np.bincount(np.concatenate([log.train.features.categorical[:, 0]]))
    ordered = np.sort(users)[::-1]
    assert ordered[0] > 4 * ordered[len(ordered) // 2]


@pytest.mark.parametrize("relatedness", [0.0, 1.0])
def test_relatedness_is_that_of_the_two_logits(relatedness):
    config = replace(SMALL, impressions=4000, relatedness=relatedness)
    click, bought = synthetic.synthetic(config).truth[:, :2].T
    found = np.corrcoef(click, bought)[0, 1]
    assert found == pytest.approx(1) if relatedness else abs(found) < 0.4


def test_the_mean_completion_is_that_of_the_noise():
    watched, length = np.array([1.0, 2.5, 4.0]), np.array([3.0, 2.5, 2.0])
    # The mean over the normal distribution by quantiles.
    noise = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)[:, None]
    times = np.exp(watched + synthetic.WATCH_NOISE * noise - length)
    expected = np.minimum(times, 1).mean(axis=0)
    assert synthetic.mean_completion(watched, length) == pytest.approx(expected, abs=1e-4)


# --- network -----------------------------------------------------------------------------------------


def losses_of(network, params, batch):
    return jnp.stack(network.decode(params.heads, network.encode(params.shared, batch), batch))


def test_losses_by_hand(log):
    network = Network(log, MODEL, 8)
    params = network.init(jax.random.key(0))
    rows = log.train.where(np.arange(40))
    batch = jax.tree.map(jnp.asarray, rows)
    other = Network(log, MODEL, 8, "batch")
    losses, of_batch, predicted = jax.jit(
        lambda p: (
            losses_of(network, p, batch),
            losses_of(other, p, batch),
            network.predict(p, batch.features),
        )
    )(params)
    predicted = np.asarray(predicted, np.float64)
    for place in range(3):
        counts = rows.mask[:, place] > 0
        found, labels = predicted[counts, place], rows.labels[counts, place]
        each = np.logaddexp(0, found) - labels * found
        assert losses[place] == pytest.approx(each.mean(), rel=1e-5)
    assert 0 < rows.mask[:, 1].sum() < 40
    scaled = np.asarray(losses) * rows.mask.mean(axis=0)
    assert np.asarray(of_batch) == pytest.approx(scaled, rel=1e-4)


@pytest.mark.slow
def test_a_batch_without_clicks_has_no_loss_and_no_gradient(log):
    network = Network(log, MODEL, 8)
    params = network.init(jax.random.key(0))
    chosen = np.flatnonzero(log.train.labels[:, 0] == 0)[:10]
    batch = jax.tree.map(jnp.asarray, log.train.where(chosen))

    def loss(params):
        return losses_of(network, params, batch)[1]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert value == 0 and all(not np.any(leaf) for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_outputs_start_at_the_base_rates(log):
    network = Network(log, MODEL, 8)
    params = jax.tree.map(jnp.zeros_like, network.init(jax.random.key(0)))
    features = jax.tree.map(jnp.asarray, log.train.where(np.arange(3)).features)
    found = expit(np.asarray(network.predict(params, features)))[0]
    rates = log.train.labels.sum(axis=0) / log.train.mask.sum(axis=0)
    assert found == pytest.approx(rates, abs=0.01)
    whole = synthetic.synthetic(SMALL).only(["watch time"])
    network = Network(whole, MODEL, 8)
    params = jax.tree.map(jnp.zeros_like, network.init(jax.random.key(0)))
    mean = whole.train.labels.mean()
    assert network.predict(params, features)[0, 0] == pytest.approx(mean, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [MODEL, partial(MMoE, embedding=2, experts=2, expert=(3,), tower=(3,))]
)
def test_heads_are_weighed_by_task(log, model):
    network = Network(log, model, 8)
    params = network.init(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, log.train.where(np.arange(40)))
    weights = jnp.array([2.0, 0.0, 0.5])

    @jax.jit
    @jax.grad
    def gradient(heads, weights):
        return jnp.vdot(weights, losses_of(network, params._replace(heads=heads), batch))

    expected = gradient(params.heads, weights)
    found = network.weigh_heads(gradient(params.heads, jnp.ones(3)), weights)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(one) == pytest.approx(np.asarray(other), rel=1e-5, abs=1e-8)


# --- training ----------------------------------------------------------------------------------------


def plan(trainer, seed=0, **knobs):
    return Plan(seed, trainer.default_setting(**knobs))


@pytest.mark.slow
def test_the_sum_is_the_same_in_all_places(trainer):
    choices = ["sum", "sum_tasks(place='representation')", "sum_tasks(place='parameters')"]
    first, *others = (trainer.train(parse_choice(text), [plan(trainer)])[0] for text in choices)
    assert first.history["losses"].shape[1:] == (4, 3)
    for other in others:
        # The same gradients, added in another order.
        assert other.history["losses"] == pytest.approx(first.history["losses"], rel=1e-3)
    assert np.all(first.history["weights"] == 1)


@pytest.mark.slow
def test_a_run_says_what_happened(trainer):
    choice = parse_choice("multibalance(place='representation')")
    seen = []
    (run,) = trainer.train(choice, [plan(trainer)], lambda value: seen.append(float(value[0])))
    assert run.best_value == max(seen)
    assert seen[run.best_epoch - 1] == run.best_value and len(seen) == len(
        run.history["validation"]
    )
    simplex, norms = run.history["simplex weights"], run.history["norms"]
    assert simplex.sum(axis=-1) == pytest.approx(1, abs=1e-5) and np.all(norms > 0)
    # The method's weights multiply raw gradients: lambda times the average norm over the norm.
    first = run.history["weights"][0, 0]
    assert first == pytest.approx(simplex[0, 0], rel=1e-5)
    assert run.test["CTR"].shape == (2,) and np.isfinite(run.test["CTR"]).all()


@pytest.mark.slow
def test_training_stops_when_nothing_gets_better(trainer):
    idle = Plan(0, trainer.default_setting()._replace(learning_rate=0.0))
    (run,) = trainer.train(parse_choice("sum"), [idle], measure=False)
    assert run.best_epoch == 1 and len(run.history["validation"]) == 3 < trainer.epochs
    assert run.test == {} == run.validation


@pytest.mark.slow
def test_a_run_that_diverges_is_no_error(trainer):
    broken = Plan(0, trainer.default_setting()._replace(learning_rate=1e30))
    (run,) = trainer.train(parse_choice("sum"), [broken], measure=False)
    assert run.best_value == -np.inf or run.best_value < -1


@pytest.mark.slow
def test_runs_of_a_seed_are_the_same_and_of_another_are_not(trainer):
    choice = parse_choice("sum")
    runs = trainer.train(choice, [plan(trainer), plan(trainer), plan(trainer, 1)], measure=False)
    one, same, other = (run.history["losses"] for run in runs)
    assert np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.mark.slow
def test_finished_runs_are_read_again(trainer, tmp_path, monkeypatch):
    jobs = [Job(parse_choice("sum"), [plan(trainer), plan(trainer, 1)])]
    fingerprint = {"data": trainer.dataset.digest()}
    (first,) = Runner(trainer, fingerprint, tmp_path).train(jobs)
    monkeypatch.setattr(trainer, "train", lambda *_, **__: pytest.fail("trained again"))
    (again,) = Runner(trainer, fingerprint, tmp_path, resume=True).train(jobs)
    for one, other in zip(first, again, strict=True):
        assert one.test["CVR"] == pytest.approx(other.test["CVR"])
        assert np.array_equal(one.history["losses"], other.history["losses"])
    # Another method under the same label is another run.
    jobs = [replace(jobs[0], choice=replace(parse_choice("mgda"), label="sum"))]
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        Runner(trainer, fingerprint, tmp_path, resume=True).train(jobs)


def test_wrong_options_are_said_before_training(trainer):
    with pytest.raises(UserError, match="multibalance"):
        trainer.check(parse_choice("multibalance(no_such_option=1)"), trainer.default_setting())


@pytest.mark.slow
def test_a_real_model_finds_most_of_the_truth():
    data = synthetic.synthetic(LogConfig(impressions=60_000, ctr=0.2, ctcvr=0.04)).only(["CTR"])
    trainer = Trainer(data, DCNv2, TrainConfig(epochs=6, weight_decay=3.0))
    (run,) = trainer.train(parse_choice("sum"), [plan(trainer)])
    bound = of_truth(data)["CTR"]
    assert bound[0] < run.test["CTR"][0] < 1 - 0.4 * (1 - bound[0])
    assert 0.65 < run.test["CTR"][1] < bound[1]


# --- report ------------------------------------------------------------------------------------------


def fake_run(label, seed, entropy):
    test = {"a": np.array([entropy, 0.5]), "b": np.array([entropy + 0.1, 0.6])}
    return Run(label, seed, test, test, 1, 1.0, {})


def gains(rows, tasks):
    entropies = [metric(task, "NE") for task in tasks]
    return compare({label: gains_of(runs, entropies) for label, runs in rows.items()}, "sum")


def test_gains_by_hand():
    base = [fake_run("sum", seed, value) for seed, value in enumerate([0.9, 0.8, 0.7])]
    better = [fake_run("x", seed, value) for seed, value in enumerate([0.89, 0.78, 0.69])]
    rows, tasks = {"sum": base, "x": better, "y": base}, (Task("a"), Task("b"))
    found = gains(rows, tasks)
    assert list(found) == ["x", "y"] and len(found["x"]) == 3
    differences = np.array([1.0, 2.0, 1.0])  # times 100
    first = found["x"][0]
    assert first.mean == pytest.approx(4 / 3)
    assert first.error == pytest.approx(differences.std(ddof=1) / 3**0.5)
    p_value = stats.ttest_1samp(differences, 0).pvalue
    # Six tests; those of a row that equals the baseline have p = 1.
    assert first.p_value == pytest.approx(min(1, 6 * p_value), rel=1e-6)
    assert all(d.mean == 0 and d.p_value == 1 for d in found["y"])
    assert report.gain_cell(first) == "+1.333 ± 0.333"
    assert report.gain_cell(first._replace(mean=np.nan, error=np.nan)) == "-"
    assert report.mean_cell(np.array([0.5, np.nan])) == "-"
    assert report.gain_cell(first._replace(p_value=0.009)).endswith("**")
    text = report.metrics_csv(rows, all_metrics(tasks))
    assert "x,test,b,NE,1,0.88" in text and "sum,validation,a,AUC,0,0.5" in text


def test_one_seed_says_nothing_of_differences():
    rows = {"sum": [fake_run("sum", 0, 0.9)], "x": [fake_run("x", 0, 0.8)]}
    found = gains(rows, (Task("a"),))["x"][0]
    assert found.mean == pytest.approx(10) and np.isnan(found.p_value)
    assert report.gain_cell(found) == "+10.000"


def test_the_paired_test_is_students():
    one, other = np.random.default_rng(0).normal(size=(2, 6))
    found = paired_difference(one[:, None], other[:, None])
    expected = stats.ttest_rel(one, other)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.mean / found.error == pytest.approx(expected.statistic)


@pytest.mark.slow
def test_the_norms_are_of_the_representation(trainer):
    """What Figure 2 shows as original magnitudes."""
    network = trainer.network
    params = network.init(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, trainer.dataset.train.where(np.arange(90)))
    method = mtl.multibalance(3)

    def loss_fn(params, fork, batch):
        return network.losses(params.heads, fork(network.encode(params.shared, batch)), batch)

    value_and_grad = mtl.fork_value_and_grad(loss_fn, method)
    _, (_, state) = value_and_grad(params, method.init(network.representation), batch)
    h = network.encode(params.shared, batch)
    rows = jax.jacrev(lambda h: network.decode(params.heads, h, batch))(h)
    expected = np.linalg.norm(np.asarray(rows).reshape(3, -1), axis=1)
    assert np.asarray(mtl.diagnostics(state)["norms"]) == pytest.approx(expected, rel=1e-4)
