"""EMTL's Tables 1 and 3: rankings of tabular data with MMoE and PLE, each row tuned as much as the others.

Table 1: both networks with each method, and the tasks of each network alone (STL), on two binary tasks.
Table 3: a click, a completion rate and a watch time of a SYNTHETIC log, as the paper's data is private:
DCN for the click alone, MMoE, and MMoE with EMTL.

Methods stand where their papers put them: on the losses, or on the shared parameters, where EMTL, MGDA and
Nash-MTL weigh the towers too. The best epoch is that with the smallest mean of normalized losses on the
validation set, where the paper takes the best average AUC: that has no meaning for a regression.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from examples.models.dcn_v2 import DCNv2
from examples.models.mmoe import MMoE
from examples.models.ple import PLE
from examples.studies.emtl.rows import BANDIT, emtl_rows
from examples.studies.harness.report import (
    OVER_SEEDS,
    gain_cell,
    mean_cell,
    metrics_csv,
    publish,
)
from examples.studies.harness.runner import Runner
from examples.studies.harness.runs import Plan, Run
from examples.studies.harness.search import Entry, tuned, tuning_note
from examples.studies.harness.statistics import compare
from examples.studies.ranking.data import BINARY, Dataset, Task
from examples.studies.ranking.metrics import all_metrics, metric, of_truth
from examples.studies.ranking.network import MakeModel
from examples.studies.ranking.sources import CLICK, CONVERSION, load
from examples.studies.ranking.synthetic import LogConfig
from examples.studies.ranking.training import TrainConfig, Trainer

SINGLE, SUM, BEST_EPOCH = "STL", "plain sum", "best epoch"


def methods(num_tasks: int) -> tuple[Entry, ...]:
    """The rows of a network with shared parameters."""
    return (
        Entry(SUM, "sum"),
        Entry("Nash-MTL", "nash_mtl"),
        Entry("IMTL-G", "imtl_g"),
        Entry("Uncertainty", "uncertainty"),
        BANDIT,
        *emtl_rows(num_tasks),
    )


TRAIN = TrainConfig(epochs=60, patience=3, batch=512, learning_rate=2e-3)


@dataclass(frozen=True)
class Config:
    """Sizes of a table; the numbers of experts are the paper's.

    Attributes:
      examples: at most so many of the training set, and as many of the validation set.
      seeds, trials: of each row.
      impressions: of the generated log.
      embedding, expert: widths.
    """

    examples: int | None = None
    seeds: int = 5
    trials: int = 6
    impressions: int = 50_000
    embedding: int = 8
    expert: int = 32
    train: TrainConfig = TRAIN


QUICK = Config(200, 2, 2, 3000, 2, 4, TrainConfig(epochs=2, batch=64))


def backbones(config: Config) -> dict[str, MakeModel]:
    """The paper's two networks."""
    sizes: dict[str, Any] = {"embedding": config.embedding, "expert": (config.expert,)}
    return {
        "MMoE": partial(MMoE, experts=8, **sizes),
        "PLE": partial(PLE, shared_experts=4, task_experts=4, **sizes),
    }


class Study:
    """A table under way."""

    def __init__(self, options: argparse.Namespace, data: str, tasks: Sequence[str]):
        self.options, config = options, QUICK if options.quick else Config()
        given = {name: getattr(options, name) for name in ("examples", "seeds", "trials")}
        config = replace(config, **{k: v for k, v in given.items() if v is not None})
        if options.epochs is not None:
            config = replace(config, train=replace(config.train, epochs=options.epochs))
        self.config, self.chosen = config, dict[str, Plan]()
        dataset = load(data, LogConfig(impressions=config.impressions))
        if set(tasks) <= {task.name for task in dataset.tasks}:
            dataset = dataset.only(tasks)
        self.dataset = cut(dataset, config.examples)

    def train(
        self, name: str, make_model: MakeModel, dataset: Dataset, entries: Sequence[Entry]
    ) -> dict[str, list[Run]]:
        """The best of the trials of every entry, over all seeds."""
        config = self.config
        trainer = Trainer(dataset, make_model, config.train)
        about = {**asdict(config), "seeds": None, "trials": None}
        about = {"config": about, "network": name, "data": dataset.digest()}
        runner = Runner(trainer, about, self.options.out, self.options.resume)
        found = tuned(runner, entries, config.trials, config.seeds)
        self.chosen |= {f"{name}, {row.entry.label}": row.plan for row in found}
        return {row.entry.label: list(row.runs) for row in found}

    def alone(self, name: str, make_model: MakeModel) -> list[Run]:
        """A network for each task, with metrics as if they were one."""
        parts = []
        for task in self.dataset.tasks:
            entry, data = Entry(f"{SINGLE}, {task.name}", "sum"), self.dataset.only([task.name])
            parts += self.train(name, make_model, data, [entry]).values()
        return [
            replace(
                runs[0],
                best_epoch=max(run.best_epoch for run in runs),
                validation={k: v for run in runs for k, v in run.validation.items()},
                test={k: v for run in runs for k, v in run.test.items()},
            )
            for runs in zip(*parts, strict=True)
        ]

    def show(
        self, lines: Sequence[Sequence[str]], runs: Mapping[str, Sequence[Run]], text: str
    ) -> None:
        """Print the table, and write it with all metrics."""
        options, config, train = self.options, self.config, self.config.train
        note = (
            f"{self.dataset.describe()}. Test set, mean ± standard error over {config.seeds} seeds; "
            f"{OVER_SEEDS}. AdamW, batches of {train.batch}, at most {train.epochs} epochs, early stopping "
            f"by the mean of normalized losses on the validation set with patience {train.patience}. "
            f"Embeddings of width {config.embedding}, experts of width {config.expert}. Two CPU cores at "
            f"most, jax {jax.__version__}. {text}\n\n{tuning_note(config.trials, self.chosen)}"
            f"\n\nMade by `{options.line}`."
        )
        title = f"EMTL, {options.command.replace('table', 'Table ')}: {self.dataset.name}"
        files = {f"{options.command}.csv": metrics_csv(runs, all_metrics(self.dataset.tasks))}
        publish(options.out, options.command, lines, title, note, files)


def cut(dataset: Dataset, examples: int | None) -> Dataset:
    """The data with at most so many examples, the same random ones, for training and for validation."""
    if examples is None:
        return dataset
    order = np.random.default_rng(0).permutation
    parts = {
        part: getattr(dataset, part).where(order(getattr(dataset, part).size)[:examples])
        for part in ("train", "validation")
    }
    return replace(dataset, **parts)


def best_epoch(runs: Sequence[Run]) -> str:
    """The mean of the best epochs: a row that has the last one might gain from more."""
    return f"{np.mean([run.best_epoch for run in runs]):.1f}"


def aucs(runs: Sequence[Run], tasks: Sequence[Task]) -> np.ndarray:
    """The test AUC of every task, and their mean, `[T + 1, seeds]`."""
    found = [metric(task, "AUC").by_seed(runs) for task in tasks]
    return np.stack([*found, np.mean(found, axis=0)])


def table1(options: argparse.Namespace) -> None:
    """MMoE and PLE with all methods on two binary tasks."""
    study = Study(options, options.data or "synthetic", (CLICK, CONVERSION))
    runs: dict[str, list[Run]] = {}
    lines, tasks = [], study.dataset.tasks
    for name, make_model in backbones(study.config).items():
        rows = {f"{name}, {SINGLE}": study.alone(name, make_model)}
        for label, found in study.train(
            name, make_model, study.dataset, methods(len(tasks))
        ).items():
            rows[f"{name}, {label}"] = found
        values = {label: aucs(found, tasks) for label, found in rows.items()}
        averages = {label: 100 * found[-1:] for label, found in values.items()}
        against = compare(averages, f"{name}, {SUM}")
        for label, found in values.items():
            gain = gain_cell(against[label][0]) if label in against else "0"
            lines.append((label, *map(mean_cell, found), gain, best_epoch(rows[label])))
        runs |= rows
    truth = of_truth(study.dataset)
    if truth is not None:
        best = np.array([truth[task.name][1] for task in tasks])
        lines.append(("true probabilities", *(f"{v:.4f}" for v in (*best, best.mean())), "-", "-"))
    gain = "average - plain sum's, × 100"
    header = ("network, method", *(f"{t.name}: AUC" for t in tasks), "average", gain, BEST_EPOCH)
    # As the eight experts of MMoE and the four and four of PLE are then mixed by one gate.
    text = "With one task both networks are the same, and so are their STL rows."
    study.show([header, *lines], runs, text)


def table3(options: argparse.Namespace) -> None:
    """A click, a completion rate and a watch time of a synthetic log."""
    study = Study(options, "synthetic", (CLICK, "completion rate", "watch time"))
    dataset, config = study.dataset, study.config
    sizes: dict[str, Any] = {"embedding": config.embedding, "deep": (config.expert,)}
    clicks = dataset.only([CLICK])
    alone = study.train("DCN", partial(DCNv2, **sizes), clicks, [Entry(CLICK, "sum")])
    both = study.train("MMoE", backbones(config)["MMoE"], dataset, methods(len(dataset.tasks)))
    runs = {"DCN": alone[CLICK], "MMoE": both.pop(SUM)}
    runs |= {f"MMoE + {label}": found for label, found in both.items()}
    lines = [
        (label, *(mean_cell(_values(found, task)) for task in dataset.tasks), best_epoch(found))
        for label, found in runs.items()
    ]
    truth = of_truth(dataset)
    assert truth is not None
    best = [truth[t.name][1] if t.kind == BINARY else truth[t.name][0] ** 2 for t in dataset.tasks]
    names = (f"{t.name}: {'AUC' if t.kind == BINARY else 'MSE'}" for t in dataset.tasks)
    header = ("model", *names, BEST_EPOCH)
    text = f"{_gains(runs, dataset.tasks)} DCN is DCN-v2 of examples/models."
    study.show([header, *lines, ("truth", *(f"{v:.4f}" for v in best), "-")], runs, text)


def _values(runs: Sequence[Run], task: Task) -> np.ndarray:
    """The paper's metric of a task, `[seeds]`."""
    if task.kind == BINARY:
        return metric(task, "AUC").by_seed(runs)
    return metric(task, "RMSE").by_seed(runs) ** 2


def _gains(runs: Mapping[str, Sequence[Run]], tasks: Sequence[Task]) -> str:
    """EMTL against the plain sum, in words."""
    scales = [100 if t.kind == BINARY else 100 / _values(runs["MMoE"], t).mean() for t in tasks]
    stacked = {
        label: np.stack([s * _values(runs[label], t) for s, t in zip(scales, tasks, strict=True)])
        for label in ("MMoE", "MMoE + EMTL")
    }
    said = [
        f"{task.name} {gain_cell(difference)}"
        + (" points of AUC" if task.kind == BINARY else " % of the MSE")
        for task, difference in zip(tasks, compare(stacked, "MMoE")["MMoE + EMTL"], strict=True)
    ]
    return f"MMoE + EMTL minus MMoE: {', '.join(said)}."
