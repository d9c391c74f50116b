"""EMTL's Tables 1 and 3: rankings of tabular data with MMoE and PLE, each row tuned as much as the others.

Table 1: both networks with each method, and the tasks of each network alone (STL), on two binary tasks.
Table 3: a click, a completion rate and a watch time of a SYNTHETIC log, as the paper's data is private:
DCN for the click alone, and MMoE with each method.

Methods stand where their papers put them: on the losses, or on the shared parameters, where EMTL, MGDA and
Nash-MTL weigh the towers too. The best epoch is that with the smallest mean of normalized losses on the
validation set, where the paper takes the best average AUC: that has no meaning for a regression.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from examples.models.dcn_v2 import DCNv2
from examples.models.mmoe import MMoE
from examples.models.ple import PLE
from examples.studies.harness import report
from examples.studies.harness.command import given
from examples.studies.harness.data import BINARY, Task
from examples.studies.harness.report import Metric
from examples.studies.harness.runner import Runner
from examples.studies.harness.runs import Plan, Run
from examples.studies.harness.search import Entry, log_uniform, tuned, tuning_note, uniform
from examples.studies.harness.statistics import compare
from examples.studies.harness.timing import machine
from examples.studies.ranking.data import Dataset
from examples.studies.ranking.metrics import all_metrics, metric, of_truth
from examples.studies.ranking.network import MakeModel
from examples.studies.ranking.sources import CLICK, CONVERSION, load
from examples.studies.ranking.synthetic import LogConfig
from examples.studies.ranking.training import TrainConfig, Trainer

SINGLE, SUM = "STL", "plain sum"
Runs = Sequence[Run]  # one a seed
RHOS = (0.1, 0.3, 0.5, 0.8, 1.0, 1.2)  # the paper's grid
BANDIT = Entry(  # the default of 1.2 is more than log(T), which bounds nothing
    "BanditMTL", "bandit_mtl", {"kl_radius": log_uniform(0.1, 0.5)}, {"kl_radius": 0.3}
)


def emtl_rows(num_tasks: int) -> tuple[Entry, ...]:
    """EMTL with its defaults and the paper's grid of rho, its base, and the same on raw gradients.

    Every rho from log(T)^2 on is no constraint, so the first of these stands for all.
    """
    bounds = sum(rho < math.log(num_tasks) ** 2 for rho in RHOS)
    raw = {"epsilon": uniform(0.0, 0.5), "rho": log_uniform(0.1, 0.5)}
    return (
        Entry("MGDA", "mgda"),
        Entry("MGDA on unit gradients", 'mgda(normalize="l2")'),
        Entry("EMTL on raw gradients", 'emtl(base="mgda")', raw, {"epsilon": 0.3, "rho": 0.3}),
        Entry("EMTL", "emtl", {"rho": RHOS[: bounds + 1]}, {"rho": RHOS[0]}),
    )


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
    """The paper's networks."""
    sizes: dict[str, Any] = {"embedding": config.embedding, "expert": (config.expert,)}
    return {
        "MMoE": partial(MMoE, experts=8, **sizes),
        "PLE": partial(PLE, shared_experts=4, task_experts=4, **sizes),
        "DCN": partial(DCNv2, embedding=config.embedding, deep=(config.expert,)),
    }


class Study:
    """A table under way."""

    def __init__(self, options: argparse.Namespace, data: str, tasks: Sequence[str]):
        self.options, config = options, QUICK if options.quick else Config()
        config = replace(config, **given(options, "examples", "seeds", "trials"))
        config = replace(config, train=replace(config.train, **given(options, "epochs")))
        self.config, self.chosen = config, dict[str, Plan]()
        dataset = load(data, LogConfig(impressions=config.impressions))
        if set(tasks) <= {task.name for task in dataset.tasks}:
            dataset = dataset.only(tasks)
        self.dataset = cut(dataset, config.examples)

    def train(self, network: str, dataset: Dataset, entries: Sequence[Entry]) -> dict[str, Runs]:
        """The best of the trials of every entry, over all seeds."""
        config = self.config
        trainer = Trainer(dataset, backbones(config)[network], config.train)
        about = {"sizes": (config.embedding, config.expert), "network": network}
        about |= trainer.fingerprint
        runner = Runner(trainer, about, self.options.out, self.options.resume)
        found = tuned(runner, entries, config.trials, config.seeds)
        self.chosen |= {f"{network}, {row.entry.label}": row.plan for row in found}
        return {row.entry.label: row.runs for row in found}

    def alone(self, network: str) -> Runs:
        """A network for each task, with metrics as if they were one."""
        parts = []
        for task in self.dataset.tasks:
            entry, data = Entry(f"{SINGLE}, {task.name}", "sum"), self.dataset.only([task.name])
            parts += self.train(network, data, [entry]).values()
        return [
            replace(
                runs[0],
                best_epoch=max(run.best_epoch for run in runs),
                validation={k: v for run in runs for k, v in run.validation.items()},
                test={k: v for run in runs for k, v in run.test.items()},
            )
            for runs in zip(*parts, strict=True)
        ]

    def show(self, rows: Mapping[str, Mapping[str, Runs]], text: str) -> None:
        """Print the table, and write it with all metrics; `rows` are those of each network."""
        columns = [paper_metric(task) for task in self.dataset.tasks]
        header = (f"{column.task}: {column.name}" for column in columns)
        lines = [("network, method", *header, "gain, %", "best epoch")]
        for network, found in rows.items():
            against = {}
            if SUM in found:
                gains = {label: gain(runs, found[SUM], columns) for label, runs in found.items()}
                against = compare(gains, SUM)
            for label, runs in found.items():
                cells = (column.cell(runs) for column in columns)
                gained = report.gain_cell(against[label][0]) if label in against else "-"
                best = f"{np.mean([run.best_epoch for run in runs]):.1f}"
                lines.append((f"{network}, {label}", *cells, gained, best))
        truth = of_truth(self.dataset)
        if truth is not None:
            best = report.reference("truth", {}, truth).runs
            lines.append(("truth", *(column.cell(best) for column in columns), "-", "-"))
        options, config = self.options, self.config
        note = (
            f"{self.dataset.describe()}. Test set, mean ± standard error over {config.seeds} seeds; "
            f"{report.OVER_SEEDS}. Gain: what is better than the network's plain sum, relative to it, mean "
            f"over the tasks. {text} AdamW, with early stopping by the mean of normalized losses on the "
            f"validation set.\n\n{tuning_note(config.trials, self.chosen)}\n\nMade by `{options.line}` "
            f"on {machine()} with `{config}`."
        )
        title = f"EMTL, {options.command.replace('table', 'Table ')}: {self.dataset.name}"
        runs = {f"{net}, {label}": r for net, found in rows.items() for label, r in found.items()}
        files = {
            f"{options.command}.csv": report.metrics_csv(runs, all_metrics(self.dataset.tasks))
        }
        report.publish(options.out, options.command, lines, title, note, files)


def paper_metric(task: Task) -> Metric:
    """The AUC of a binary task, the squared error of a number."""
    if task.kind == BINARY:
        return metric(task, "AUC")
    return Metric(task.name, "MSE", lambda rmse_and_mae: rmse_and_mae[0] ** 2)


def gain(runs: Runs, base: Runs, columns: Sequence[Metric]) -> np.ndarray:
    """How much better than the base, in percent of it, mean over the columns, `[1, seeds]`."""
    relative = [
        (1 if column.name == "AUC" else -1) * column.by_seed(runs) / column.by_seed(base).mean()
        for column in columns
    ]
    return 100 * np.mean(relative, axis=0, keepdims=True)


def cut(dataset: Dataset, examples: int | None) -> Dataset:
    """The data with at most so many examples, the same random ones, for training and for validation."""
    if examples is None:
        return dataset
    order = np.random.default_rng(0).permutation
    train, validation = (
        part.where(order(part.size)[:examples]) for part in (dataset.train, dataset.validation)
    )
    return replace(dataset, train=train, validation=validation)


def table1(options: argparse.Namespace) -> None:
    """MMoE and PLE with all methods on two binary tasks."""
    study = Study(options, options.data or "synthetic", (CLICK, CONVERSION))
    dataset, rows = study.dataset, dict[str, dict[str, Runs]]()
    for network in ("MMoE", "PLE"):
        shared = study.train(network, dataset, methods(len(dataset.tasks)))
        rows[network] = {SINGLE: study.alone(network), **shared}
    # As the eight experts of MMoE and the four and four of PLE are then mixed by one gate.
    study.show(rows, "With one task both networks are the same, and so are their STL rows.")


def table3(options: argparse.Namespace) -> None:
    """A click, a completion rate and a watch time of a synthetic log."""
    study = Study(options, "synthetic", (CLICK, "completion rate", "watch time"))
    dataset, click = study.dataset, Entry(f"{CLICK} alone", "sum")
    rows = {
        "DCN": study.train("DCN", dataset.only([CLICK]), [click]),
        "MMoE": study.train("MMoE", dataset, methods(len(dataset.tasks))),
    }
    study.show(rows, "DCN is DCN-v2 of examples/models.")
