"""Tests of EMTL's experiments on tiny data: the toy problem, the tables, the command line."""

import csv
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.models import toy
from examples.studies.emtl import figure1, tables
from examples.studies.emtl.__main__ import main
from examples.studies.harness.choices import Choice
from examples.studies.harness.data import BINARY
from examples.studies.harness.runs import Plan, Run, Setting
from examples.studies.harness.trainer import Trainer
from examples.studies.ranking.data import Dataset
from examples.studies.ranking.synthetic import LogConfig, synthetic


def test_losses_at_points_computed_by_hand() -> None:
    below = np.tanh(4.0)
    cases = {
        (7.0, -8.0): (-20 * below, (19.6 - 20) * below),
        (-7.0, -8.0): ((19.6 - 20) * below, -20 * below),
        (0.0, 0.0): (0.0, 0.0),
        # The bottoms of the two valleys, where the other distance is 7 - 2 tanh(5).
        (-7 + 2 * np.tanh(5.0), 5.0): (
            np.tanh(2.5) * (np.log(5e-6) + 6),
            np.tanh(2.5) * (np.log(7 - 2 * np.tanh(5.0)) + 6),
        ),
        (7 - 2 * np.tanh(5.0), 5.0): (
            np.tanh(2.5) * (np.log(7 - 2 * np.tanh(5.0)) + 6),
            np.tanh(2.5) * (np.log(5e-6) + 6),
        ),
    }
    for point, expected in cases.items():
        # The logarithm is clipped at 5e-6; a float32 coordinate is 5e-7 off.
        found = toy.losses(jnp.array(point))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_no_point_dominates_the_pareto_front() -> None:
    front = toy.pareto_front(201)
    points = jax.random.uniform(jax.random.key(0), (20_000, 2), minval=-11.0, maxval=11.0)
    found = np.asarray(jax.vmap(toy.losses)(points))
    # 1e-4: the losses are float32 numbers of size 20, and y is taken from a grid.
    assert not (found[:, None] < front - 1e-4).all(axis=2).any()
    assert (np.diff(front[:, 0]) > 0).all()
    assert (np.diff(front[:, 1]) < 0).all()
    np.testing.assert_allclose(front.mean(axis=1).min(), -15.09, atol=0.01)


@pytest.mark.slow
def test_ends_are_measured_against_the_front() -> None:
    front = toy.pareto_front()
    at_best = (0.0, -8.3552)  # Nash-MTL's program has this height
    positions = jnp.array([at_best, (2.0, -8.3552), (0.0, -3.8)])[:, None]
    ends = figure1.ends_of(positions, front)
    assert ends.distance[:2] == pytest.approx(0.0, abs=0.05)
    assert ends.distance[2] > 0.1
    assert ends.excess[0] == pytest.approx(0.0, abs=0.01)
    # The mean of the bowls is x^2 / 10 higher.
    assert ends.excess[1] == pytest.approx(0.4, abs=0.02)
    assert ends.counts() == ("2", "1")


@pytest.mark.slow
def test_figure1_writes_a_table_a_csv_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure1, "ROWS", {"plain sum": "sum"})
    monkeypatch.setattr(figure1, "BASES", {"raw gradients": 'emtl(base="mgda")'})
    monkeypatch.setattr(figure1, "EPSILONS", (0.3,))
    assert main(["figure1", "--steps", "20", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "figure1.md").read_text("utf-8")
    assert "python -m examples.studies.emtl figure1" in text
    assert text.count("\n| plain sum |") == 1
    of_emtl = (tmp_path / "figure1_emtl.md").read_text("utf-8")
    assert "\n| raw gradients | as they are | 0.3 | 0.1 | 0 | 0 |" in of_emtl
    assert of_emtl.count("\n| raw gradients |") == len(figure1.SHIFTS) * len(figure1.RHOS)
    with (tmp_path / "figure1.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == len(toy.STARTS)
    assert (tmp_path / "figure1.png").stat().st_size > 1000


@pytest.mark.slow
def test_paths_repeat_a_plain_loop() -> None:
    visited = np.asarray(figure1.paths("sum", 20))
    position, first, second = np.array(toy.STARTS[0]), np.zeros(2), np.zeros(2)
    scale = jnp.array(toy.SCALE)
    for count in range(1, 21):
        grad = np.asarray(jax.grad(lambda p: (toy.losses(p) * scale).sum())(jnp.asarray(position)))
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        unbiased = first / (1 - 0.9**count), second / (1 - 0.999**count)
        position = position - 1e-3 * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    np.testing.assert_allclose(visited[0, -1], position, atol=1e-5)


@pytest.mark.slow
def test_emtl_reaches_the_best_mean_from_all_five_starts() -> None:
    """Figure 1 of the paper, with the defaults."""
    ends = figure1.ends_of(figure1.paths("emtl", figure1.STEPS), toy.pareto_front())
    assert ends.counts() == ("5", "5")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["table1", "--seeds", "0"], "--seeds must be at least 1"),
        (["table1", "--resume"], "--resume needs --out DIR"),
        (["table9"], "table9"),
        (["figure1", "--seeds", "3"], "--seeds"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("examples.studies.emtl: error: ")
    assert said in error
    assert error.count("\n") == 1


class FakeTrainer:
    """Trains nothing: its metrics are numbers that the choice, the seed and the tasks determine."""

    side_by_side = False
    fingerprint = Trainer.fingerprint
    trained: tuple[tuple[str, int], ...] = ()

    def __init__(self, dataset: Dataset, make_model: Any, config: Any):
        self.dataset, self.config, self.epochs = dataset, config, 1

    def check(self, choice: Choice, setting: Setting) -> None:
        choice.method(len(self.dataset.tasks), optax.identity(), setting.knobs)

    def train(self, choice: Choice, plans: Sequence[Plan], *_: Any, measure: bool) -> list[Run]:
        runs = []
        for plan in plans:
            type(self).trained += ((choice.label, plan.seed),)
            generator = np.random.default_rng([zlib.crc32(choice.label.encode()), plan.seed])
            test = {
                task.name: generator.random(2) + (0 if task.kind == BINARY else 2)
                for task in self.dataset.tasks
            }
            history = {"validation": -generator.random(1)}
            runs.append(Run(choice.label, plan.seed, test, test, 1, 0.0, history))
        return runs


def test_every_row_searches_alike_and_emtl_the_papers_grid() -> None:
    """The same learning rates for all; a rho that bounds nothing once."""
    for num_tasks, grid in ((2, [0.1, 0.3, 0.5]), (3, [0.1, 0.3, 0.5, 0.8, 1.0, 1.2])):
        plans = {e.label: e.trials(6, num_tasks, tables.TRAIN) for e in tables.methods(num_tasks)}
        rates = {tuple(p.setting.learning_rate for p in of_row) for of_row in plans.values()}
        assert len(rates) == 1
        assert [p.setting.knobs["rho"] for p in plans["EMTL"]] == (2 * grid)[:6]
        assert all(set(p.setting.knobs) == {"rho"} for p in plans["EMTL"])


def cells(path: Path) -> dict[str, list[str]]:
    """The rows of a Markdown table by their first cell."""
    lines = [line.strip("| ").split(" | ") for line in path.read_text("utf-8").splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) > 2}


def metrics(path: Path) -> dict[tuple[str, str, str, int], float]:
    """The test metrics of a CSV file by row, task, name and seed."""
    with path.open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["part"] == "test"]
    return {
        (row["method"], row["task"], row["metric"], int(row["seed"])): float(row["value"])
        for row in rows
    }


def test_table1_has_all_rows_and_averages_their_aucs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "Trainer", FakeTrainer)
    command = ["table1", "--quick", "--seeds", "3", "--out", str(tmp_path)]
    assert main(command) == 0
    found = cells(tmp_path / "table1.md")
    expected = {
        f"{network}, {entry.label}" for network in ("MMoE", "PLE") for entry in tables.methods(2)
    }
    assert expected | {"MMoE, STL", "PLE, STL", "truth"} <= set(found)
    numbers = metrics(tmp_path / "table1.csv")

    def aucs(label: str) -> np.ndarray:
        tasks = "CTR", "Conv|imp"
        return np.array(
            [[numbers[label, task, "AUC", seed] for seed in range(3)] for task in tasks]
        )

    for label in ("PLE, STL", "MMoE, EMTL"):
        means = [float(cell.split(" ± ")[0]) for cell in found[label][:2]]
        np.testing.assert_allclose(means, aucs(label).mean(axis=1), atol=6e-5)
        base = aucs(f"{label.split(',')[0]}, plain sum").mean(axis=1)
        gain = 100 * np.mean(aucs(label).mean(axis=1) / base - 1)
        assert float(found[label][2].split(" ± ")[0]) == pytest.approx(gain, abs=1e-3)
    assert found["MMoE, plain sum"][2:] == ["-", "1.0"]
    assert "SYNTHETIC" in (tmp_path / "table1.md").read_text("utf-8")

    FakeTrainer.trained = ()
    assert main([*command, "--resume"]) == 0
    assert FakeTrainer.trained == ()
    # The one trial and the seeds of its setting are there.
    assert main([*command, "--trials", "1", "--resume"]) == 0
    assert FakeTrainer.trained == ()
    assert main([*command, "--trials", "1", "--epochs", "1", "--resume"]) == 0
    assert len(FakeTrainer.trained) == 2 * (2 + len(tables.methods(2))) * 4


def test_table1_reads_a_folder_in_the_form_of_aliexpress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "Trainer", FakeTrainer)
    generator = np.random.default_rng(0)
    for part, size in (("train", 40), ("test", 20)):
        clicks = generator.integers(0, 2, size)
        lines = ["search_id,categorical_1,numerical_1,click,conversion"]
        lines += [
            f"{row},{generator.integers(5)},{generator.random():.3f},{click},{click * (row % 2)}"
            for row, click in enumerate(clicks)
        ]
        (tmp_path / f"{part}.csv").write_text("\n".join(lines) + "\n", "utf-8")
    out = tmp_path / "out"
    assert main(["table1", "--quick", "--data", str(tmp_path), "--out", str(out)]) == 0
    found = cells(out / "table1.md")
    assert found["network, method"][:2] == ["CTR: AUC", r"Conv\|imp: AUC"]
    assert "truth" not in found
    assert "36 + 4 + 20 examples" in (out / "table1.md").read_text("utf-8")


def test_table3_has_squared_errors_and_the_mean_gain_over_the_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "Trainer", FakeTrainer)
    assert main(["table3", "--quick", "--seeds", "3", "--out", str(tmp_path)]) == 0
    found, numbers = cells(tmp_path / "table3.md"), metrics(tmp_path / "table3.csv")
    assert {"DCN, CTR alone", "MMoE, plain sum", "MMoE, EMTL", "truth"} <= set(found)
    assert found["DCN, CTR alone"][1:4] == ["-", "-", "-"]

    def means(label: str) -> np.ndarray:
        """The mean AUC and the two mean squared errors."""
        auc = [numbers[label, "CTR", "AUC", seed] for seed in range(3)]
        errors = [
            [numbers[label, task, "RMSE", seed] ** 2 for seed in range(3)]
            for task in ("completion rate", "watch time")
        ]
        return np.mean([auc, *errors], axis=1)

    ours, base = means("MMoE, EMTL"), means("MMoE, plain sum")
    shown = [float(cell.split(" ± ")[0]) for cell in found["MMoE, EMTL"][:4]]
    gain = 100 * np.mean(np.array([1, -1, -1]) * (ours / base - 1))
    np.testing.assert_allclose(shown, [*ours, gain], atol=6e-4)
    assert "SYNTHETIC" in (tmp_path / "table3.md").read_text("utf-8")


def test_cut_keeps_the_test_set_and_the_same_examples() -> None:
    dataset = synthetic(LogConfig(impressions=300))
    small = tables.cut(dataset, 50)
    assert (small.train.size, small.validation.size) == (50, 50)
    assert small.test is dataset.test
    again = tables.cut(dataset, 50)
    np.testing.assert_array_equal(small.train.labels, again.train.labels)
    whole = {row.tobytes() for row in dataset.train.features.numerical}
    kept = {row.tobytes() for row in small.train.features.numerical}
    assert len(kept) == 50
    assert kept <= whole
    assert tables.cut(dataset, None) is dataset
    assert tables.cut(dataset, 10_000).train.size == dataset.train.size


@pytest.mark.slow
@pytest.mark.parametrize("command", ["table1", "table3"])
def test_tables_train(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [entry for entry in tables.methods(2) if entry.label in ("plain sum", "EMTL")]
    monkeypatch.setattr(tables, "methods", lambda num_tasks: shown)
    assert main([command, "--quick", "--out", str(tmp_path)]) == 0
    found = list(metrics(tmp_path / f"{command}.csv").values())
    assert np.isfinite(found).all()


@pytest.mark.slow
def test_figure1_runs_quickly_with_all_methods(tmp_path: Path) -> None:
    assert main(["figure1", "--quick", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "figure1.md").read_text("utf-8")
    assert all(f"\n| {name} |" in text for name in figure1.ROWS)
    options = len(figure1.EPSILONS) * len(figure1.RHOS)
    of_emtl = (tmp_path / "figure1_emtl.md").read_text("utf-8")
    assert all(of_emtl.count(f"| {sign} |") == 2 * options for sign in figure1.SHIFTS.values())
    assert "nan" not in text
