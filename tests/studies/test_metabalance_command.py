"""MetaBalance's study as a command: rows, trials, and every table and figure on small data."""

import json
from dataclasses import replace

import numpy as np
import pytest

from examples.studies.harness.choices import parse_choice
from examples.studies.metabalance import __main__ as command
from examples.studies.metabalance import study
from examples.studies.recommender import sources
from examples.studies.recommender.data import PAPER_SPLIT, make_dataset
from examples.studies.recommender.network import NetworkConfig
from examples.studies.recommender.training import Trainer

TINY = replace(
    study.TRAIN,
    epochs=2,
    batch_pairs=64,
    negatives=1,
    network=NetworkConfig(embedding=4, mlp=(4, 4), tower=(4,)),
)
ENTRIES = [entry for table in study.TABLES.values() for entry in table]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("log")
    log = sources.synthetic(num_users=40, num_items=30)
    for place, task in enumerate(log.tasks):
        pairs = log.interactions.positives(place)
        rows = "".join(f"{user},{item}\n" for user, item in pairs)
        (path / f"{task.name}.csv").write_text(f"user,item\n{rows}")
    return path


def test_every_row_can_be_read():
    for entry in ENTRIES:
        assert entry.parsed().label == entry.label
        assert entry.parsed().parts == parse_choice(entry.choice).parts
        assert set(entry.knobs) == set(entry.start)


def test_every_row_has_as_many_trials_and_starts_from_the_default():
    for entry in ENTRIES:
        first, *others = entry.trials(8, 3, study.TRAIN)
        assert len(others) == 7
        setting = first.setting
        default = study.TRAIN.learning_rate, study.TRAIN.weight_decay
        assert (setting.learning_rate, setting.weight_decay) == default
        rates = np.array([plan.setting.learning_rate for plan in others])
        assert np.all((rates >= default[0] / 3) & (rates <= default[0] * 3))
        assert len(set(rates)) == 7
        assert {plan.seed for plan in (first, *others)} == {0}
        again = entry.trials(8, 3, study.TRAIN)
        assert str(again) == str([first, *others])


def test_knobs_reach_the_first_method_of_a_chain():
    (entry,) = (e for e in ENTRIES if e.label == "MetaBalance + GradSurgery")
    assert entry.trials(2, 3, study.TRAIN)[1].setting.knobs.keys() == {"relax_factor"}
    entry.parsed().method(3, None, {"relax_factor": 0.3})
    with pytest.raises(TypeError):
        entry.parsed().method(3, None, {"no_such_option": 0.3})


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["table9"], "invalid choice"),
        (["table2", "--trials", "0"], "at least 1"),
        (["table2", "--resume"], "--out DIR"),
        (["data", "--data", "/no/such/folder"], "no such folder"),
        (["data", "--data", "synthetic-nothing"], "choose from"),
        (["data", "--data", "synthetic-ijcai", "--scale", "1/3"], "choose 1, 1/8 or 1/64"),
    ],
)
def test_bad_arguments(arguments, shown, capsys):
    assert command.main(arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("examples.studies.metabalance: error: ") and shown in text


@pytest.mark.slow
def test_data_prints_sizes_and_the_rows_that_train_nothing(folder, capsys):
    assert command.main(["data", "--data", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "40 users, 27 items" in text  # three of the 30 items are in no pair
    for name in ("buy", "like", "view", "popularity", "item-kNN"):
        assert name in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tune", "table4", "figure1", "figure3", "figure4", "figure5"])
def test_every_command(folder, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(study, "TRAIN", TINY)
    monkeypatch.setattr(study, "GRID", {"learning_rate": (1e-3, 1e-2), "weight_decay": (0.1,)})
    monkeypatch.setattr(study, "RELAX_FACTORS", (0.5, 1.0))
    arguments = [name, "--data", str(folder), "--out", str(tmp_path), "--trials", "2"]
    assert command.main([*arguments, "--seeds", "2"]) == 0
    if name == "tune":
        assert capsys.readouterr().out.count("validation NDCG@10") == 2
        return
    table = (tmp_path / f"{name}.md").read_text().replace("\n", " ")
    assert "| MetaBalance" in table and "Vanilla-Multi" in table
    if name in ("table4", "figure5"):
        assert "Every row, the plain sum too, had 2 trials" in table
        assert "item-kNN" in table or name == "figure5"
    else:
        assert "Nothing was searched." in table
    assert (tmp_path / f"{name}.csv").read_text().startswith("method,part,task,metric,seed")
    if name in ("figure1", "figure3", "figure4"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    if name == "figure1":
        norms = json.loads((tmp_path / "figure1-norms.json").read_text())
        for values in norms.values():
            assert np.asarray(values).shape == (2, 3, 4) and np.all(np.asarray(values) > 0)


@pytest.mark.slow
def test_table_2_on_small_data_goes_on_from_what_is_there(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "TRAIN", replace(TINY, epochs=1))
    arguments = ["table2", "--data", str(folder), "--out", str(tmp_path), "--trials", "1"]
    assert command.main([*arguments, "--seeds", "1"]) == 0
    table = (tmp_path / "table2.md").read_text()
    for entry in study.TABLES["table2"]:
        assert f"| {entry.label} |" in table
    assert "MetaBalance against the strongest baseline" in table.replace("\n", " ")

    def fail(*_, **__):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(Trainer, "train", fail)
    assert command.main([*arguments, "--seeds", "1", "--resume"]) == 0
    assert (tmp_path / "table2.md").read_text() == table


@pytest.mark.slow
def test_the_paper_split_trains_on_every_auxiliary_pair_that_does_not_leak(folder):
    dataset = make_dataset(sources.folder(folder, "buy"), PAPER_SPLIT)
    log = sources.folder(folder, "buy")
    held_out = len(dataset.validation) + len(dataset.test)
    assert len(dataset.train) + held_out == len(log.interactions)
    assert np.all(dataset.test.values[:, 0] == 1) and np.all(dataset.validation.values[:, 0] == 1)
