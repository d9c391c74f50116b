"""The study of QM9: its reader, its splits, how learning rates and searches are judged, and the command."""

import csv
import io
import json
import zipfile

import numpy as np
import pytest

import mtl_optax as mtl
from examples.studies.harness.errors import UserError
from examples.studies.molecules import data, report
from examples.studies.molecules.__main__ import main
from examples.studies.molecules.arms import ALONE, ARMS, LOG_ALONE, METHODS, NUM_TASKS, SEARCH, SUM
from examples.studies.molecules.messages import CENTRES, SPACING
from examples.studies.molecules.training import Config, Result, Store, Trainer, line_of

TINY = Config(steps=6, chunk=3, batch=8, rates=(1e-3, 1e-2), sizes=(40, 20, 20), searched=3)
WATER = {
    "Elements": "['O','H','H']",
    "XYZ_Ang": "[[0.,0.,0.],[0.96,0.,0.],[-0.*^-6,9.6*^-1,0.]]",
}


@pytest.fixture
def wheel(tmp_path):
    """A wheel of two molecules, in two files; a third kind of file is left alone."""
    path = tmp_path / "qm9pack-1.0.3-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for part, value in (("1", "1.5"), ("2", "-2.*^-3")):
            stream = io.StringIO()
            writer = csv.DictWriter(stream, ["Index", *WATER, *data.COLUMNS.values()])
            writer.writeheader()
            stream.write("\n")
            writer.writerow(WATER | {"Index": part} | dict.fromkeys(data.COLUMNS.values(), value))
            archive.writestr(f"qm9pack/data/qm9_part{part}.csv", stream.getvalue())
        archive.writestr("qm9pack/data/qm9_polarizability.csv", "a,b\n1,2\n")
    return path


@pytest.fixture
def molecules():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(240, 6)).astype(np.float16)
    y = 5 + x @ rng.normal(size=(6, NUM_TASKS)) + rng.normal(size=(240, NUM_TASKS))
    return data.Molecules(x, y)


@pytest.fixture
def file(molecules, tmp_path):
    path = tmp_path / "molecules.npz"
    np.savez(path, **molecules._asdict())
    return path


# --- the molecules ----------------------------------------------------------------------------------


def test_the_wheel_is_read_with_its_numbers(wheel):
    found = data.load(wheel)
    assert found.descriptors.shape == (2, 5 + 15 * len(CENTRES))
    assert found.descriptors.dtype == np.float16
    np.testing.assert_array_equal(found.properties[:, 0], [1.5, -2e-3])
    np.testing.assert_array_equal(found.descriptors[0, :5], [2, 0, 0, 1, 0])  # of H, C, N, O, F


def test_the_histogram_holds_each_pair_of_elements_at_its_distance(wheel):
    histograms = data.load(wheel).descriptors[0, 5:].reshape(15, -1).astype(float)
    names = [a + b for k, a in enumerate("HCNOF") for b in "HCNOF"[k:]]
    assert {names[k] for k in np.flatnonzero(histograms.sum(axis=1))} == {"HH", "HO"}
    for pair, count, distance in (("HO", 2, 0.96), ("HH", 1, 0.96 * 2**0.5)):
        bumps = count * np.exp(-0.5 * ((distance - CENTRES) / SPACING) ** 2)
        np.testing.assert_allclose(histograms[names.index(pair)], bumps, atol=2e-3)


def test_another_file_is_refused_with_the_ways_out(tmp_path, wheel):
    empty = tmp_path / "other.whl"
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("something", "else")
    damaged = tmp_path / "damaged.npz"
    damaged.write_bytes(b"no archive")
    for path in (empty, damaged, tmp_path / "absent.npz"):
        with pytest.raises(UserError, match="pip download --no-deps qm9pack"):
            data.load(path)


def test_without_a_network_the_error_names_both_ways_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MTL_OPTAX_CACHE", str(tmp_path))

    monkeypatch.setattr(data, "WHEEL", "/no/such.whl")
    assert main(["--quick"]) == 2
    error = capsys.readouterr().err
    assert "QM9 cannot be fetched; allow the package index" in error
    assert "--data" in error


def test_the_download_is_read_once(tmp_path, monkeypatch, wheel):
    monkeypatch.setenv("MTL_OPTAX_CACHE", str(tmp_path / "cache"))
    fetched = []
    monkeypatch.setattr(data, "download", lambda folder: fetched.append(folder) or wheel)
    for _ in range(2):
        assert len(data.load(None).properties) == 2
    assert len(fetched) == 1


def test_a_split_is_standardised_over_its_training_part(molecules):
    train, validation, test = data.split(molecules, TINY.sizes, 1)
    assert [len(part.properties) for part in (train, validation, test)] == list(TINY.sizes)
    np.testing.assert_allclose(train.properties.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(train.properties.std(axis=0), 1, atol=1e-4)
    seen = np.concatenate([part.properties for part in (train, validation, test)])
    assert len(np.unique(seen, axis=0)) == sum(TINY.sizes)
    assert not np.array_equal(train.properties, data.split(molecules, TINY.sizes, 2)[0].properties)


def test_a_split_of_too_many_molecules_is_refused(molecules):
    with pytest.raises(UserError, match="there are 240"):
        data.split(molecules, (200, 40, 20), 0)


# --- the arms ---------------------------------------------------------------------------------------


def test_weightings_are_positive_with_mean_one_and_a_smaller_search_is_part_of_it():
    weights = ARMS[SEARCH].weightings(8, seed=3)
    assert weights.shape == (8, NUM_TASKS)
    assert (weights > 0).all()
    np.testing.assert_allclose(weights.mean(axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(weights[:4], ARMS[SEARCH].weightings(4, seed=3))
    assert not np.array_equal(weights, ARMS[SEARCH].weightings(8, seed=4))


@pytest.mark.slow
def test_runs_side_by_side_are_those_of_one_at_a_time(molecules):
    pairs = [(seed, rate) for seed in (0, 1) for rate in TINY.rates]
    found = []
    for side_by_side in (True, False):
        trainer = Trainer(molecules, TINY, 2)
        trainer.side_by_side = side_by_side
        found.append(list(trainer.run(SEARCH, pairs)))
    for one, other in zip(*found, strict=True):
        assert one[:3] == other[:3]
        np.testing.assert_allclose(one.validation, other.validation, rtol=1e-4)
        np.testing.assert_allclose(one.test, other.test, rtol=1e-4)


def test_a_network_alone_is_the_best_of_them_at_its_property(molecules):
    config = Config(steps=300, chunk=300, batch=16, rates=(3e-3,), sizes=(60, 30, 30))
    (result,) = Trainer(molecules, config, 1).run(ALONE, [(0, 3e-3)])
    assert result.validation.argmin(axis=0).tolist() == list(range(NUM_TASKS))


# --- what the runs say ------------------------------------------------------------------------------


def result(name, seed, rate, validation, test):
    errors = (np.asarray(part, float) * np.ones((1, NUM_TASKS)) for part in (validation, test))
    return Result(name, seed, rate, *errors, 1.0)


def alone(seed, error=1.0):
    return [
        result(ALONE, seed, r, [[error]] * NUM_TASKS, [[error]] * NUM_TASKS) for r in TINY.rates
    ]


def test_the_validation_molecules_alone_choose_the_learning_rate():
    runs = [
        result(SUM, 0, 1e-3, [[0.5]], [[0.9]]),
        result(SUM, 0, 1e-2, [[0.7]], [[0.1]]),
    ]
    rows = report.rows_of([*alone(0), *runs], 1, TINY.rates)
    np.testing.assert_allclose(rows[SUM].test, 0.9)
    np.testing.assert_allclose(report.delta_m(rows[SUM].test, rows[ALONE].test), -10)


def test_a_training_that_diverged_is_not_chosen():
    runs = [
        result(SUM, 0, 1e-3, [[np.nan]], [[0.2]]),
        result(SUM, 0, 1e-2, [[3.0]], [[4.0]]),
    ]
    np.testing.assert_allclose(report.rows_of([*alone(0), *runs], 1, TINY.rates)[SUM].test, 4)


def test_each_property_alone_has_a_learning_rate_of_its_own():
    better = np.where(np.arange(NUM_TASKS) < 5, 0.5, 2.0)
    runs = [
        result(LOG_ALONE, 0, 1e-3, [[1.0]] * NUM_TASKS, [[1.0]] * NUM_TASKS),
        result(LOG_ALONE, 0, 1e-2, [better] * NUM_TASKS, [better] * NUM_TASKS),
    ]
    rows = report.rows_of([*alone(0), *runs], 1, TINY.rates)
    np.testing.assert_allclose(rows[LOG_ALONE].test[0], np.minimum(better, 1))
    assert rows[LOG_ALONE].runs == NUM_TASKS


def test_the_curve_of_a_search_is_the_expected_best_by_validation():
    validation, test = [[0.3], [0.1], [0.2], [0.4]], [[3.0], [2.0], [1.0], [4.0]]
    runs = [result(SEARCH, 0, rate, validation, test) for rate in TINY.rates]
    rows = report.rows_of([*alone(0), *runs], 1, TINY.rates)
    means = {name: row.test.mean() for name, row in rows.items() if name != ALONE}
    expected = {1: 2.5, 2: (3 * 2 + 2 * 1 + 3) / 6, 4: 2.0}  # of the six pairs
    assert means == pytest.approx({report.searched(SEARCH, n): v for n, v in expected.items()})


def test_the_table_shows_the_largest_search_and_some_of_the_others():
    rng = np.random.default_rng(0)
    errors = rng.uniform(1, 2, (8, NUM_TASKS))
    runs = [result(SEARCH, 0, rate, errors, errors) for rate in TINY.rates]
    summary = report.summarise(report.rows_of([*alone(0), *runs], 1, TINY.rates))
    shown = [line[1] for line in report.lines_of(summary) if line[0].startswith("search")]
    assert shown == ["1", "4", "8"]
    assert len(summary.rows) == 1 + 4


def test_an_arm_without_all_seeds_and_rates_has_no_row():
    runs = [*alone(0), *alone(1), result(SUM, 0, 1e-3, [[1.0]], [[1.0]])]
    assert list(report.rows_of(runs, 2, TINY.rates)) == [ALONE]


def test_sentences_and_ranks_follow_from_the_numbers():
    gain = {SUM: 1.3, "scale_invariant": 0.7, "dwa": 1.31}
    runs = [
        result(name, seed, rate, [[value]], [[value + 0.01 * seed]])
        for name, value in gain.items()
        for seed in (0, 1)
        for rate in TINY.rates
    ]
    runs += [result(SEARCH, seed, rate, [[0.8], [1.2]], [[0.8 + 0.02 * seed], [1.2]])
             for seed in (0, 1) for rate in TINY.rates]  # fmt: skip
    summary = report.summarise(report.rows_of([*alone(0), *alone(1), *runs], 2, TINY.rates))
    assert list(summary.rows) == [
        ALONE,
        SUM,
        "search, 1 run",
        "search, 2 runs",
        "scale_invariant",
        "dwa",
    ]
    assert summary.ranks["scale_invariant"] == 1
    assert report.verdict(summary) == (
        "Of 2 methods in one run each, 1 are below search, 2 runs (-19.0 %), 1 significantly; the best is "
        "scale_invariant with -29.5 %."
    )
    lines = report.lines_of(summary)
    assert {line[0]: line[2] for line in lines}["scale_invariant"].startswith("-29.5 ± 0.5")


# --- files and the command --------------------------------------------------------------------------


def test_a_line_that_was_not_finished_is_trained_again(tmp_path, capsys):
    store = Store(tmp_path, TINY, resume=False)
    store.add(result(SUM, 0, 1e-3, [[0.5]], [[0.25]]))
    with store.path.open("a") as stream:
        stream.write(line_of(result(SUM, 0, 1e-2, [[0.5]], [[0.5]]), store.about)[:50])
    again = Store(tmp_path, TINY, resume=True)
    assert [(r.arm, r.seed, r.rate) for r in again.results] == [(SUM, 0, 1e-3)]
    np.testing.assert_array_equal(again.results[0].test, np.full((1, NUM_TASKS), 0.25))
    assert "damaged" in capsys.readouterr().err
    assert not Store(tmp_path, Config(steps=7), resume=True).results  # another configuration


def test_a_table_has_the_results_of_any_version_and_training_goes_on_from_its_own(tmp_path):
    Store(tmp_path, TINY, resume=False, version="0.0").add(result(SUM, 0, 1e-3, [[0.5]], [[0.5]]))
    assert not Store(tmp_path, TINY, resume=True).results
    assert len(Store(tmp_path, TINY, resume=True, version=None).results) == 1


@pytest.mark.slow
def test_the_command_makes_its_table_and_goes_on(file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    asked = ["--quick", "--data", str(file), "--out", str(out), "--arms", SUM, SEARCH]
    assert main(asked) == 0
    assert {"rows.jsonl", "table.md", "table.csv", "runs.png"} <= {p.name for p in out.iterdir()}
    table = (out / "table.md").read_text()
    for name in (ALONE, SUM, "search, 4 runs"):
        assert f"| {name} |" in table
    first = (out / "rows.jsonl").read_text()
    assert {json.loads(line)["arm"] for line in first.splitlines()} == {ALONE, SUM, SEARCH}
    monkeypatch.setattr(Trainer, "run", lambda *a: pytest.fail("it trains again"))
    assert main([*asked, "--resume"]) == 0
    assert main(["--quick", "--out", str(out), "--table"]) == 0
    assert (out / "rows.jsonl").read_text() == first
    assert "| sum |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_steps_of_arms_are_timed_beside_the_sums(file, tmp_path):
    few = ["--quick", "--data", str(file), "--arms", "dwa", "famo", "--rounds", "2"]
    assert main([*few, "--out", str(tmp_path)]) == 0
    names = [line.split(" | ")[0] for line in (tmp_path / "steps.md").read_text().splitlines()]
    assert {"| sum", "| dwa", "| famo"} <= set(names)
    assert not (tmp_path / "rows.jsonl").exists()


def test_an_unknown_arm_is_named():
    assert main(["--arms", "nash_mlt, representation"]) == 2


def test_every_method_has_an_arm_but_those_that_need_more():
    named = {name.split("(")[0].split(",")[0] for name in METHODS}
    plain = {"sum_tasks", "mean_tasks", "fixed_weights"}  # the sum, and the search
    assert set(mtl.METHODS) - named - plain == {
        "ntk", "lagrangian", "cosmos", "pbi", "epo", "modo", "ol_aux", "grad_similarity", "grad_surgery",
        "rotograd_scale", "scale_by_pub",
    }  # fmt: skip
