"""The recommender example as a command: where its data comes from, what it writes, and its errors."""

import csv
import gzip
import io
import zipfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

import mtl_optax as mtl
from examples.studies.harness import command, report, runner
from examples.studies.harness.data import REGRESSION
from examples.studies.harness.runs import Run, load_run
from examples.studies.recommender import comparison as compare
from examples.studies.recommender import sources
from examples.studies.recommender.data import Interactions
from examples.studies.recommender.evaluation import COLUMNS, held_out_users
from examples.studies.recommender.network import NetworkConfig
from examples.studies.recommender.training import TrainConfig, Trainer

TINY = TrainConfig(
    epochs=2,
    batch_pairs=64,
    negatives=1,
    network=NetworkConfig(embedding=4, mlp=(4, 4), tower=(4,)),
)


def zip_of(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def write_behaviour(folder: Path, name: str, pairs: np.ndarray) -> None:
    rows = "".join(f"{user},{item},0\n" for user, item in pairs)
    (folder / f"{name}.csv.gz").write_bytes(gzip.compress(f"user,item,extra\n{rows}".encode()))


def write_behaviours(folder: Path) -> None:
    """24 views a user and 10 purchases among them, so that every user has something held out."""
    generator = np.random.default_rng(0)
    viewed = [(user, item) for user in range(20) for item in generator.permutation(40)[:24]]
    viewed = np.array(viewed).reshape(20, 24, 2)
    write_behaviour(folder, "view", viewed.reshape(-1, 2))
    write_behaviour(folder, "buy", viewed[:, :10].reshape(-1, 2))


# --- the command --------------------------------------------------------------------------------


def run(*arguments: str, train: TrainConfig = TINY) -> int:
    """Run the command on tiny networks."""
    options = compare.main.parse(list(arguments))
    options.train = train
    return command.run_command("examples.compare", lambda: options, compare.compare)


def no_training(monkeypatch) -> None:
    """Replace what takes time beside the training."""
    monkeypatch.setattr(compare, "step_times", lambda trainer, labels: dict.fromkeys(labels, 1.0))
    monkeypatch.setattr(compare, "untrained", lambda *_: report.reference("untrained", {}, {}))
    monkeypatch.setattr(compare, "popular", lambda *_: report.reference("popularity", {}, {}))
    monkeypatch.setattr(compare, "look", lambda _: "")
    monkeypatch.setattr(compare.report, "draw", lambda *_: None)


def table_of(out: Path) -> dict[str, list[str]]:
    """The cells of `table.md` by the first one."""
    lines = [line for line in (out / "table.md").read_text().splitlines() if line[:1] == "|"]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {first: rest for first, *rest in cells}


def read_metrics(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))


@pytest.mark.slow
def test_command_from_folder_to_files_and_resume(tmp_path, monkeypatch, capsys):
    write_behaviours(tmp_path)
    out = tmp_path / "out"
    arguments = ["--data", str(tmp_path), "--out", str(out), "--seeds", "2", "--method", "sum"]
    assert run(*arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "20 users, 40 items; 360 training pairs (120 of the target)" in shown
    assert "60 validation pairs (40 of the target), 60 test pairs (40 of the target)" in shown

    found = read_metrics(out)
    assert list(dict.fromkeys(row["method"] for row in found)) == ["popularity", "untrained", "sum"]
    assert {row["task"] for row in found} == {"buy", "view"}
    assert {row["metric"] for row in found} == set(COLUMNS)
    assert {row["seed"] for row in found if row["method"] == "sum"} == {"0", "1"}
    assert all(0 <= float(row["value"]) <= 1 for row in found)
    told = {(row["method"], row["part"], row["seed"], row["metric"]): float(row["value"])
            for row in found if row["task"] == "buy"}  # fmt: skip
    values = [told["sum", "test", seed, "ndcg@10, all"] for seed in "01"]
    assert table_of(out)["sum"][0].startswith(f"{np.mean(values):.4f} ± ")
    assert table_of(out)["sum"][-3:-1] == ["1.00", "2"]
    # Untrained networks start from the logits of popularity, and noise that is small beside them.
    floor, start = (told[row, "test", "0", "ndcg@10, all"] for row in ("popularity", "untrained"))
    assert abs(floor - start) < 0.1
    assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")

    def fail(*_, **__):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(Trainer, "train", fail)
    no_training(monkeypatch)
    assert run(*arguments, "--resume") == 0
    again = [row for row in read_metrics(out) if row["method"] == "sum"]
    assert again == [row for row in found if row["method"] == "sum"]


# Commands that train nothing: what they do with the runs that training returns.


def many_ratings() -> np.ndarray:
    generator = np.random.default_rng(0)
    pairs = np.argwhere(generator.random((40, 60)) < 0.4) + 1
    numbers = generator.integers([1, 0], [6, 10**7], (len(pairs), 2))
    return np.column_stack([pairs, numbers])


@pytest.fixture
def trained(monkeypatch):
    """Replaces training by random metrics; returns what was to be trained: label, plan, measured or not."""
    calls = []

    def metrics(dataset, part: Interactions, which: int, generator) -> dict[str, np.ndarray]:
        found = {}
        for place, task in enumerate(dataset.tasks):
            if task.kind == REGRESSION:
                found[task.name] = generator.random(len(part))
                continue
            users = held_out_users(dataset, place, which)
            found[task.name] = np.full((dataset.num_users, len(COLUMNS)), np.nan)
            found[task.name][users] = generator.random((len(users), len(COLUMNS)))
        return found

    def train(self, choice, plans, on_epoch=None, *, measure=True):
        runs, dataset = [], self.dataset
        for plan in plans:
            calls.append((choice.label, plan, measure))
            generator = np.random.default_rng(len(calls))
            shape = self.config.epochs, len(dataset.tasks)
            history = {name: generator.random(shape) for name in ("losses", "weights")}
            history["validation"] = generator.random(len(history["losses"]))
            parts = [
                metrics(dataset, part, which, generator) if measure else {}
                for which, part in enumerate((dataset.validation, dataset.test), start=1)
            ]
            runs.append(Run(choice.label, plan.seed, *parts, 1, 10.0, history))
        return runs

    monkeypatch.setattr(Trainer, "train", train)
    no_training(monkeypatch)
    monkeypatch.setattr(sources, "movielens_ratings", many_ratings)
    monkeypatch.setattr(runner.Runner, "workers", 1)
    return calls


def test_searched_weights_count_what_the_search_cost(trained, capsys, tmp_path):
    methods = ["single", "sum", "searched weights", "metabalance"]
    arguments = ["--search-runs", "5", "--out", str(tmp_path), "--seeds", "2"]
    assert run(*arguments, "--method", *methods) == 0
    search = [plan for label, plan, measure in trained if label == "searched weights"]
    tried, final = search[:5], search[5:]
    measured = [measure for label, _, measure in trained if label == "searched weights"]
    assert measured == [False] * 5 + [True] * 2  # the search never saw the test set
    assert [plan.seed for plan in final] == [0, 1] and {plan.seed for plan in tried} == {0}
    weights = np.array([plan.setting.knobs["weights"] for plan in tried])
    np.testing.assert_array_equal(weights[:, 0], 1)
    np.testing.assert_array_equal(weights[0], 1)  # the plain sum is one of them
    assert len(np.unique(weights[:, 1])) == 5 and np.all((weights >= 1e-6) & (weights <= 10))
    best = final[0].setting.knobs["weights"]
    assert best.tolist() in weights.tolist()
    np.testing.assert_array_equal(best, final[1].setting.knobs["weights"])

    page, table = (tmp_path / "table.md").read_text(), table_of(tmp_path)
    assert table["method"] == [
        "rated 5: NDCG@10", "rated 5: NDCG@10, new items", "rated: NDCG@10", "stars: RMSE",
        "days: RMSE", "step", "runs", "seconds",
    ]  # fmt: skip
    assert table["searched weights"][-2:] == ["7", "70"]
    assert table["sum"][-2:] == table["metabalance"][-2:] == ["2", "20"]
    assert table["single"][2:5] == ["-"] * 3  # it trained the target alone
    shown = capsys.readouterr().out
    told = "Does one run reach the searched weights"
    assert told in page and told in shown
    page = " ".join(page.split())
    assert "NDCG@10? metabalance: " in page and "the plain sum and 4 random draws" in page


@pytest.mark.slow
def test_the_last_lines_say_what_the_gradients_say(monkeypatch):
    """Days since the first rating are squares of large numbers: they dominate at the start."""
    monkeypatch.setattr(sources, "movielens_ratings", many_ratings)
    dataset = compare.make_dataset(sources.load_log("movielens"), compare.Split())
    text = compare.look(Trainer(dataset, TINY))
    assert text.startswith("The first ") and "Ratios of gradient norms: rated 5 1, rated " in text
    assert "days dominate rated 5" in text


def test_the_search_takes_the_weights_with_the_best_validation(trained, monkeypatch):
    plain = Trainer.train

    def train(self, choice, plans, *rest, measure=True):
        runs = plain(self, choice, plans, *rest, measure=measure)
        for made, plan in zip(runs, plans, strict=True):
            if "weights" in plan.setting.knobs:
                made.history["validation"][:] = -abs(np.log(plan.setting.knobs["weights"][1]) + 2)
        return runs

    monkeypatch.setattr(Trainer, "train", train)
    arguments = ["--search-runs", "8", "--seeds", "1", "--method", "searched weights"]
    assert run(*arguments) == 0
    *tried, final = [plan.setting.knobs["weights"] for _, plan, _ in trained]
    nearest = min(tried, key=lambda weights: abs(np.log(weights[1]) + 2))
    np.testing.assert_array_equal(final, nearest)


@pytest.mark.slow
def test_a_stored_run_is_used_again_only_where_all_is_the_same(trained, monkeypatch, tmp_path):
    def trains(*more: str, train: TrainConfig = TINY) -> int:
        trained.clear()
        arguments = ["--data", "movielens", "--method", "sum", "--out", str(tmp_path), *more]
        assert run(*arguments, train=train) == 0
        return len(trained)

    assert trains("--seeds", "2") == 2
    assert trains("--seeds", "2", "--resume") == 0
    assert trains("--seeds", "3", "--resume") == 1
    assert trains("--seeds", "3", "--tasks", "nested", "--resume") == 3
    other = compare.replace(TINY, learning_rate=0.5)
    assert trains("--seeds", "3", "--resume", train=other) == 3
    assert trains("--seeds", "3", "--resume") == 0
    for module in (mtl, jax):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "0.0.0")
            assert trains("--seeds", "3", "--resume") == 3
    assert trains("--seeds", "3") == 3  # without --resume everything is trained


def test_a_damaged_run_is_trained_again(trained, tmp_path, capsys):
    arguments = ["--method", "sum", "--seeds", "1", "--out", str(tmp_path), "--resume"]
    assert run(*arguments) == 0
    (stored,) = (tmp_path / "runs").iterdir()
    whole = stored.read_bytes()
    middle = len(whole) // 2
    wrong_number = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damaged in (b"", b"no run", whole[:middle], wrong_number):
        stored.write_bytes(damaged)
        trained.clear()
        capsys.readouterr()
        assert run(*arguments) == 0
        assert len(trained) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"{stored} is damaged (") and error.count("\n") == 1
        trained.clear()
        assert run(*arguments) == 0
        assert trained == []


@pytest.mark.parametrize("epochs", [1, 2])
def test_one_epoch_draws_points(epochs):
    figure, axes = plt.subplots()
    report.curve(axes, np.ones(epochs), "buy")
    (line,) = axes.get_lines()
    assert (line.get_marker() == "o") == (epochs == 1)
    assert line.get_xdata().tolist() == list(range(1, epochs + 1))
    plt.close(figure)


def test_the_output_of_a_file_is_the_table_for_a_page(trained, tmp_path, capsys):
    assert run("--method", "sum", "mgda", "--out", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() in shown
    assert max(len(line) for line in shown.splitlines() if line[:1] != "|") <= 82


def test_tune_prints_the_grid_and_never_sees_the_test_set(trained, capsys):
    assert run("--data", "synthetic", "--tune") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "learning_rate" in line]
    settings = [(plan.setting.learning_rate, plan.setting.weight_decay) for _, plan, _ in trained]
    assert settings == [
        (rate, decay)
        for rate in compare.GRID["learning_rate"]
        for decay in compare.GRID["weight_decay"]
    ]
    assert {(label, measure) for label, _, measure in trained} == {("sum", False)}
    assert len(lines) == len(settings)
    for line, (rate, decay) in zip(lines, settings, strict=True):
        start = f"learning_rate {rate:g}, weight_decay {decay:g}: validation NDCG@10 "
        assert line.startswith(start) and 0 < float(line[len(start) :].split()[0]) < 1


def test_methods_are_held_against_the_search():
    values = np.random.default_rng(0).normal(0.5, 0.1, (2, 200, len(COLUMNS)))
    noise = 0.1 * np.random.default_rng(1).normal(size=values.shape)

    def row(more: float, *validation: float) -> report.Row:
        """Runs that are better in the test, with these validation values."""
        found = values + noise * (more != 0) + more
        runs = [Run("", seed, {}, {"buy": users}, 1, 0.0, {"validation": np.array([value])})
                for seed, (users, value) in enumerate(zip(found, validation, strict=True))]  # fmt: skip
        return report.row(runs)

    rows = {"popularity": row(1, 0, 0)._replace(trainings=0), "sum": row(1, 1, 1)}
    rows[compare.SEARCHED] = row(0, 0.3, 0.3)
    rows |= {"far": row(-0.1, 0.1, 0.3), "above": row(0.1, 0.21, 0.21)}
    rows |= {"equal": row(0, 0.3, 0.3), "beyond": row(0.1, 0.31, 0.31)}
    tried = [row(0, value, value).runs[0] for value in (0.1, 0.2, 0.3)]
    # The expected best of 1, 2 and 3 runs is 0.2, 0.267 and 0.3.
    said = compare.against_search(rows, compare.Search(np.ones(2), tried), "buy")
    assert said.endswith("? far: no, 1; above: yes, 2; equal: yes, 3; beyond: yes, more than 3.")


@pytest.mark.parametrize(("out", "hint"), [(False, "nothing is kept"), (True, "--resume to go on")])
def test_a_stopped_command_says_how_to_go_on(trained, monkeypatch, capsys, tmp_path, out, hint):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", stopped)
    arguments = ["--out", str(tmp_path)] if out else []
    assert run(*arguments, "--method", "sum") == 130
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1].startswith("examples.compare: stopped; ") and hint in shown


@pytest.mark.slow
def test_a_stopped_command_goes_on_from_its_last_run_bit_for_bit(tmp_path, monkeypatch):
    three_epochs = compare.replace(TINY, epochs=3, learning_rate=0.03)

    def command(out: str, *more: str, stop: int | None = None):
        epochs, train = [], Trainer.train

        def stopping(self, choice, plans, on_epoch, **options):
            def then(values):
                epochs.append(plans[0].seed)
                if len(epochs) == stop:
                    raise KeyboardInterrupt
                on_epoch(values)

            return train(self, choice, plans, then, **options)

        arguments = ["--data", "synthetic", "--method", "multibalance", "--seeds", "2"]
        arguments += ["--out", str(tmp_path / out), *more]
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train", stopping)
            return run(*arguments, train=three_epochs), epochs

    def stored(out: str) -> list[dict[str, object]]:
        runs = map(vars, map(load_run, sorted((tmp_path / out / "runs").iterdir())))
        return [jax.tree.map(lambda x: np.asarray(x).tobytes(), {**r, "seconds": 0}) for r in runs]

    assert command("whole") == (0, [0, 0, 0, 1, 1, 1])
    assert command("stopped", stop=5) == (130, [0, 0, 0, 1, 1])
    assert len(stored("stopped")) == 1
    assert command("stopped", "--resume") == (0, [1, 1, 1])
    assert len(stored("whole")) == 2 and stored("stopped") == stored("whole")
    assert read_metrics(tmp_path / "stopped") == read_metrics(tmp_path / "whole")


def error_line(capsys, *arguments: str) -> str:
    assert compare.main(list(arguments)) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("examples.compare: error: ")
    assert shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize(
    ("ratings", "shown"),
    [(OSError("cannot be reached"), "cannot be reached"), (np.ones((9, 4)), "cut short: remove")],
)
def test_movielens_that_is_not_there(ratings, shown, monkeypatch, capsys):
    def movielens(path):
        if isinstance(ratings, Exception):
            raise ratings
        return ratings

    monkeypatch.setattr(sources.retrieval_and_rating, "movielens", movielens)
    line = error_line(capsys)
    assert shown in line and "--data synthetic" in line and "--data PATH" in line


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--method", "magic"], "unknown method 'magic'; choose from single, sum, "),
        (["--method", "metabalence"], "unknown method 'metabalence'; did you mean 'metabalance'?"),
        (["--method", "sum", "mgda + PCGard(x=1)"], "'PCGard'; did you mean 'pcgrad'?"),
        (["--method", "standardized labels"], "did you mean 'standardised labels'?"),
        (["--epochs", "0"], "at least 1"),
        (["--seeds", "many"], "invalid int"),
        (["--resume"], "--out DIR"),
        (["--search-runs", "0"], "at least 1"),
        (["--method", "mgda(place='head')"], "place= is one of losses"),
        (["--method", "mgda("], "write name or name(option=value)"),
        (["--tasks", "all"], "invalid choice: 'all'"),
        (["--out", __file__], "File exists"),
        (["--colour"], "--colour"),
        (["--data", "/no/such/folder"], "no such folder"),
        (
            ["--data", "synthetic", "--target", "view"],
            "--target view: only a folder has behaviours",
        ),
    ],
)
def test_bad_arguments(arguments, shown, capsys):
    assert shown in error_line(capsys, *arguments)


def test_folder_without_the_target(tmp_path, capsys):
    write_behaviour(tmp_path, "view", np.array([[0, 0]]))
    line = error_line(capsys, "--data", str(tmp_path))
    assert "buy.csv" in line and "found: view" in line and "--data synthetic" in line


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (b"\x1f\x8bnot gzip", "cannot be read"),
        (gzip.compress(b"user,item\n1,2\n" * 99)[:-9], "cannot be read"),
        (gzip.compress(b"who,what\n1,2\n"), "columns expected but not found"),
        (gzip.compress(b"user,item\n1\n"), "no user or no item"),
        (gzip.compress(b"\xff\xfe\x00"), "cannot be read"),
    ],
    ids=["no gzip", "cut short", "wrong header", "short row", "not text"],
)
def test_unreadable_folder(tmp_path, capsys, content, shown):
    (tmp_path / "buy.csv.gz").write_bytes(content)
    assert shown in error_line(capsys, "--data", str(tmp_path))
