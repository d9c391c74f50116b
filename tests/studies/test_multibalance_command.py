"""MultiBalance's experiments as a command: every table and figure on small data."""

import csv
import io
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl
from examples.studies.multibalance import __main__ as command
from examples.studies.multibalance import speed, study

TINY = [study.SUM, study.MULTIBALANCE]


def run(tmp_path, *arguments):
    assert command.main([*arguments, "--quick", "--out", str(tmp_path)]) == 0
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["table9"], "invalid choice"),
        (["table3", "--seeds", "0"], "at least 1"),
        (["table3", "--resume"], "--out DIR"),
        (["table3", "--data", "/no/such/folder"], "no such file or folder"),
    ],
)
def test_bad_arguments(arguments, shown, capsys):
    assert command.main(arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("examples.studies.multibalance: error: ") and shown in text


def test_gradient_vaccine_searches_the_papers_beta():
    """One minus a decay is the paper's beta, drawn as the stored tables drew it."""
    (row,) = [entry for entry in study.TABLE3 if entry.label == "Gradient Vaccine"]
    plans = row.trials(4, 3, study.TRAIN[study.BATCH])
    found = [1 - plan.setting.knobs["ema_decay"] for plan in plans]
    of_knobs, _ = np.random.default_rng(1).spawn(2)
    drawn = np.exp(of_knobs.uniform(np.log(1e-3), np.log(1e-1), 3))
    np.testing.assert_allclose(found, [0.01, *drawn], rtol=1e-12)


def test_every_row_of_table3_is_on_the_representation_and_has_the_same_budget():
    labels = [entry.label for entry in study.TABLE3]
    assert len(labels) == 9 and labels[0] == "plain sum" and labels[-1] == "MultiBalance"
    for entry in study.TABLE3:
        choice = entry.parsed()
        assert set(entry.knobs) == set(entry.start)
        if entry is not study.SUM:
            assert choice.place == "representation"
        plans = entry.trials(4, 3, study.TRAIN["batch"])
        assert len(plans) == 4 and {plan.seed for plan in plans} == {0}
        for plan in plans:
            choice.method(3, None, plan.setting.knobs)


def read(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def check_table(folder, name, labels):
    text = (folder / f"{name}.md").read_text().replace("\n", " ")
    for label in labels:
        assert f"| {label} |" in text
    assert "SYNTHETIC" in text and "true probabilities" in text
    assert f"python -m examples.studies.multibalance {name}" in text
    rows = read(folder / f"{name}.csv")
    assert {row["method"] for row in rows} == set(labels)
    assert {row["task"] for row in rows} == {"CTR", "CVR", "Conv|imp"}
    assert {row["seed"] for row in rows} == {"0", "1"}


@pytest.mark.slow
def test_table3(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "TABLE3", TINY)
    check_table(run(tmp_path, "table3"), "table3", ["plain sum", "MultiBalance"])
    text = (tmp_path / "table3.md").read_text()
    assert "had 2 trials" in text.replace("\n", " ") and "weight_lr" in text
    assert "nan" not in text and "| - |" not in text
    # What is finished is not trained again.
    monkeypatch.setattr(study.Trainer, "train", lambda *_, **__: pytest.fail("trained again"))
    run(tmp_path, "table3", "--resume")
    assert (tmp_path / "table3.md").read_text().splitlines()[:6] == text.splitlines()[:6]


@pytest.mark.slow
def test_table4(tmp_path):
    labels = ["plain sum", *(f"weight learning rate {rate:g}" for rate in study.WEIGHT_LRS[:2])]
    check_table(run(tmp_path, "table4"), "table4", labels)


@pytest.mark.slow
def test_figure2(tmp_path):
    run(tmp_path, "figure2")
    rows = read(tmp_path / "figure2.csv")
    assert {row["panel"] for row in rows} == {"c", "d", "e"}
    for row in rows:
        if row["panel"] == "d":
            weights = [float(row[name]) for name in study.FUNNEL]
            assert sum(weights) == pytest.approx(1, abs=1e-4)
    assert (tmp_path / "figure2.png").read_bytes().startswith(b"\x89PNG")
    assert "(c) original gradient magnitude" in (tmp_path / "figure2.md").read_text()


@pytest.mark.slow
def test_table2(tmp_path):
    run(tmp_path, "table2")
    rows = read(tmp_path / "table2.csv")
    names = {row["what is balanced"] for row in rows}
    others = {f"{method}, {module}" for method in speed.METHODS for module in speed.MODULES}
    assert names == {"plain sum", "MultiBalance, representation", *others}
    assert len(rows) == 2 * len(names)
    assert "SYNTHETIC" in (tmp_path / "table2.md").read_text()


@pytest.mark.slow
def test_tune(capsys):
    assert command.main(["tune", "--quick", "--jobs", "1"]) == 0
    settings = math.prod(len(values) for values in study.GRID.values())
    assert capsys.readouterr().out.count("validation NE") == settings


@pytest.mark.slow
def test_table3_with_all_rows(tmp_path):
    labels = [entry.label for entry in study.TABLE3]
    check_table(run(tmp_path, "table3", "--trials", "1"), "table3", labels)


# --- the steps of Table 2 ----------------------------------------------------------------------------


def test_tables_have_ali_ccps_sizes():
    data = speed.random_data(sum(speed.ALI_CCP), 10)
    assert data.features.vocabulary_sizes == speed.ALI_CCP and len(speed.ALI_CCP) == 18
    assert np.all(data.train.features.categorical < np.array(speed.ALI_CCP))
    assert np.all(data.train.features.categorical >= 0)


@pytest.mark.slow
@pytest.mark.parametrize("module", speed.MODULES)
def test_only_the_named_module_is_balanced(module):
    """Its gradient is the method's, and all others are the plain sum's."""
    dataset, weights = speed.random_data(500, 32), [2.0, 0.0, 0.5]
    network = speed.Network(dataset, partial(speed.DCNv2, **speed.QUICK_MODEL), 32)
    params, batch = network.init(jax.random.key(0)), jax.tree.map(jnp.asarray, dataset.train)
    descent = optax.sgd(1.0)
    step = speed.on_module(network, mtl.fixed_weights(3, weights), module, descent)
    moved, _, losses, _ = jax.jit(step.update)(params, step.init(params), batch)

    def weighted(params, weights):
        representation = network.encode(params.shared, batch)
        losses = jnp.stack(network.decode(params.heads, representation, batch))
        return weights @ losses, losses

    for part, used in ((module, weights), (None, [1.0, 1.0, 1.0])):
        grads, expected = jax.jit(jax.grad(weighted, has_aux=True))(params, jnp.array(used))
        assert np.asarray(losses) == pytest.approx(np.asarray(expected), rel=1e-6)
        want = jax.tree.map(lambda leaf, grad: leaf - grad, params, grads)
        names = [part] if part else [name for name in speed.MODULES if name != module]
        found = [moved.shared[name] for name in names] + [moved.heads] * (part is None)
        wanted = [want.shared[name] for name in names] + [want.heads] * (part is None)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert np.asarray(one) == pytest.approx(np.asarray(other), rel=1e-4, abs=1e-7)


# --- pictures ----------------------------------------------------------------------------------------


def test_bins_are_means_over_steps():
    values = np.arange(1000.0)[:, None] * [1, 2]
    ends, found = study.bins({"c": values})
    assert len(ends) == study.POINTS and ends[:2].tolist() == [5, 10]
    assert found["c"][0].tolist() == [2, 4]
    ends, found = study.bins({"c": values[:7]})
    assert ends.tolist() == list(range(1, 8)) and np.array_equal(found["c"], values[:7])
