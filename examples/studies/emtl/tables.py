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

import mtl_optax as mtl
from examples.models.dcn_v2 import DCNv2
from examples.models.mmoe import MMoE
from examples.models.ple import PLE
from examples.studies.harness import tables
from examples.studies.harness.runner import Runner
from examples.studies.harness.search import (
    Entry,
    Tuned,
    log_uniform,
    setting_in_words,
    tuned,
    uniform,
)
from examples.studies.ranking import report
from examples.studies.ranking.data import BINARY, Dataset, Task
from examples.studies.ranking.metrics import of_truth
from examples.studies.ranking.network import MakeModel
from examples.studies.ranking.sources import CLICK, CONVERSION, load
from examples.studies.ranking.synthetic import LogConfig
from examples.studies.ranking.training import TrainConfig, Trainer
from examples.studies.recommender.download import write_atomically
from examples.studies.recommender.training import Run

SINGLE, SUM, BEST_EPOCH = "STL", "plain sum", "best epoch"
# The stored tables have MGDA on raw gradients in EMTL, where the library's default is unit gradients.
# The ranges are those of the paper's grids for EMTL; BanditMTL has the same radius, as its default of
# 1.2 is more than log(T), which bounds nothing.
EMTL: Any = {
    "knobs": {"epsilon": uniform(0.0, 0.5), "rho": log_uniform(0.1, 0.5)},
    "start": {"epsilon": 0.3, "rho": 0.3},
}
BANDIT: Any = {"knobs": {"kl_radius": log_uniform(0.1, 0.5)}, "start": {"kl_radius": 0.3}}
METHODS = (
    Entry(SUM, "sum"),
    Entry("MGDA", "mgda"),
    Entry("Nash-MTL", "nash_mtl"),
    Entry("IMTL-G", "imtl_g"),
    Entry("Uncertainty", "uncertainty"),
    Entry("BanditMTL", "bandit_mtl", **BANDIT),
    Entry("EMTL", 'emtl(base="mgda")', **EMTL),
)
TRAIN = TrainConfig(epochs=60, patience=2, batch=512, learning_rate=2e-3)


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
    seeds: int = 3
    trials: int = 3
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

    def __init__(self, options: argparse.Namespace, config: Config):
        self.options = options
        given = {name: getattr(options, name) for name in ("examples", "seeds", "trials")}
        config = replace(config, **{k: v for k, v in given.items() if v is not None})
        if options.epochs is not None:
            config = replace(config, train=replace(config.train, epochs=options.epochs))
        self.config = config
        self.chosen: list[str] = []

    def train(
        self, name: str, make_model: MakeModel, dataset: Dataset, entries: Sequence[Entry]
    ) -> list[Tuned]:
        """The best of the trials of every entry, over all seeds."""
        config = self.config
        trainer = Trainer(dataset, make_model, config.train)
        fingerprint = {
            "versions": {"mtl_optax": mtl.__version__, "jax": jax.__version__},
            "config": {**asdict(config), "seeds": None, "trials": None},
            "network": name,
            "data": dataset.digest(),
        }
        runner = Runner(trainer, fingerprint, self.options.out, self.options.resume)
        found = tuned(runner, entries, config.trials, config.seeds)
        self.chosen += [f"{name}, {row.entry.label}: {setting_in_words(row.plan)}" for row in found]
        return found

    def alone(self, name: str, make_model: MakeModel, dataset: Dataset) -> list[Run]:
        """A network for each task, with metrics as if they were one."""
        parts = []
        for task in dataset.tasks:
            entry = Entry(f"{SINGLE}, {task.name}", "sum")
            (row,) = self.train(name, make_model, dataset.only([task.name]), [entry])
            parts.append(row.runs)
        return [
            replace(
                runs[0],
                best_epoch=max(run.best_epoch for run in runs),
                validation={k: v for run in runs for k, v in run.validation.items()},
                test={k: v for run in runs for k, v in run.test.items()},
            )
            for runs in zip(*parts, strict=True)
        ]

    def note(self, dataset: Dataset) -> str:
        """How every row was trained."""
        config, train = self.config, self.config.train
        return (
            f"{dataset.describe()}. Test set, mean ± standard error over {config.seeds} seeds; * p < 0.05, "
            "** p < 0.01, *** p < 0.001, two-sided paired t-test over the seeds, Holm-corrected. Every "
            f"row had {config.trials} trials of seed 0 on the validation set: the first with the default "
            "settings, the others with a learning rate and a decay of the tables up to 3 times smaller or "
            f"larger and random options of its own. AdamW, batches of {train.batch}, at most "
            f"{train.epochs} epochs, early stopping by the mean of normalized losses on the validation "
            f"set with patience {train.patience}. Embeddings of width {config.embedding}, experts of "
            f"width {config.expert}. Two CPU cores at most, jax {jax.__version__}."
        )

    def show(
        self, lines: Sequence[Sequence[str]], runs: report.Runs, dataset: Dataset, text: str
    ) -> None:
        """Print the table, and write it with all metrics."""
        title = f"EMTL, {self.options.command.replace('table', 'Table ')}: {dataset.name}"
        made, settings = f"Made by `{self.options.line}`.", f"Settings: {'; '.join(self.chosen)}."
        note = "\n\n".join([text, settings, made])
        tables.show(lines, title, note)
        out = self.options.out
        if out is not None:
            file = out / self.options.command
            page = tables.markdown(lines, title, note)
            write_atomically(file.with_suffix(".md"), page.encode())
            text = report.metrics_csv(runs, dataset.tasks)
            write_atomically(file.with_suffix(".csv"), text.encode())


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


def aucs(runs: Sequence[Run], tasks: Sequence[Task]) -> np.ndarray:
    """The test AUC of every task, and their mean, `[T + 1, seeds]`."""
    found = [report.by_seed(runs, task, "AUC") for task in tasks]
    return np.stack([*found, np.mean(found, axis=0)])


def best_epoch(runs: Sequence[Run]) -> str:
    """The mean of the best epochs: a row that has the last one might gain from more."""
    return f"{np.mean([run.best_epoch for run in runs]):.1f}"


def table1(options: argparse.Namespace) -> dict[str, list[Run]]:
    """Table 1."""
    study = Study(options, QUICK if options.quick else Config())
    config = study.config
    dataset = load(options.data or "synthetic", LogConfig(impressions=config.impressions))
    if {CLICK, CONVERSION} <= {task.name for task in dataset.tasks}:
        dataset = dataset.only((CLICK, CONVERSION))
    dataset = cut(dataset, config.examples)
    runs, lines = {}, []
    for name, make_model in backbones(config).items():
        rows = {f"{name}, {SINGLE}": study.alone(name, make_model, dataset)}
        for row in study.train(name, make_model, dataset, METHODS):
            rows[f"{name}, {row.entry.label}"] = list(row.runs)
        values = {label: aucs(found, dataset.tasks) for label, found in rows.items()}
        averages = {label: 100 * found[-1:] for label, found in values.items()}
        against = report.compare(averages, f"{name}, {SUM}")
        for label, found in values.items():
            gain = report.gain_cell(against[label][0]) if label in against else "0"
            lines.append((label, *map(report.mean_cell, found), gain, best_epoch(rows[label])))
        runs |= rows
    truth = of_truth(dataset)
    if truth is not None:
        best = np.array([truth[task.name][1] for task in dataset.tasks])
        lines.append(("true probabilities", *(f"{v:.4f}" for v in (*best, best.mean())), "-", "-"))
    names = [task.name for task in dataset.tasks]
    gain = "average - plain sum's, × 100"
    header = ("network, method", *(f"{name}: AUC" for name in names), "average", gain, BEST_EPOCH)
    # As the eight experts of MMoE and the four and four of PLE are then mixed by one gate.
    text = f"{study.note(dataset)} With one task both networks are the same, and so are their STL rows."
    study.show([header, *lines], runs, dataset, text)
    return runs


def table3(options: argparse.Namespace) -> dict[str, list[Run]]:
    """Table 3."""
    study = Study(options, QUICK if options.quick else Config())
    config = study.config
    log = LogConfig(impressions=config.impressions)
    dataset = load("synthetic", log).only((CLICK, "completion rate", "watch time"))
    dataset = cut(dataset, config.examples)
    sizes: dict[str, Any] = {"embedding": config.embedding, "deep": (config.expert,)}
    alone = study.train(
        "DCN", partial(DCNv2, **sizes), dataset.only([CLICK]), [Entry(CLICK, "sum")]
    )
    entries = [entry for entry in METHODS if entry.label in (SUM, "EMTL")]
    plain, ours = study.train("MMoE", backbones(config)["MMoE"], dataset, entries)
    runs = {"DCN": alone[0].runs, "MMoE": plain.runs, "MMoE + EMTL": ours.runs}
    lines = [
        (label, *(_cell(found, task) for task in dataset.tasks), best_epoch(found))
        for label, found in runs.items()
    ]
    truth = of_truth(dataset)
    assert truth is not None
    best = [
        f"{truth[t.name][1]:.4f}" if t.kind == BINARY else f"{truth[t.name][0] ** 2:.4f}"
        for t in dataset.tasks
    ]
    header = ("model", *(f"{t.name}: {_metric(t)}" for t in dataset.tasks), BEST_EPOCH)
    text = f"{study.note(dataset)} {_gains(runs, dataset.tasks)} DCN is DCN-v2 of examples/models."
    study.show([header, *lines, ("truth", *best, "-")], runs, dataset, text)
    return runs


def _metric(task: Task) -> str:
    return "AUC" if task.kind == BINARY else "MSE"


def _values(runs: Sequence[Run], task: Task) -> np.ndarray:
    """The paper's metric of a task, `[seeds]`."""
    if task.kind == BINARY:
        return report.by_seed(runs, task, "AUC")
    return report.by_seed(runs, task, "RMSE") ** 2


def _cell(runs: Sequence[Run], task: Task) -> str:
    return report.mean_cell(_values(runs, task)) if task.name in runs[0].test else "-"


def _gains(runs: Mapping[str, Sequence[Run]], tasks: Sequence[Task]) -> str:
    """EMTL against the plain sum, in words."""
    values = {label: [] for label in ("MMoE", "MMoE + EMTL")}
    for task in tasks:
        base = _values(runs["MMoE"], task).mean()
        for label, rows in values.items():
            found = _values(runs[label], task)
            rows.append(100 * found / (1 if task.kind == BINARY else base))
    stacked = {label: np.stack(rows) for label, rows in values.items()}
    differences = report.compare(stacked, "MMoE")["MMoE + EMTL"]
    said = [
        f"{task.name} {report.gain_cell(difference)}"
        + (" points of AUC" if task.kind == BINARY else " % of the MSE")
        for task, difference in zip(tasks, differences, strict=True)
    ]
    return f"MMoE + EMTL minus MMoE: {', '.join(said)}."
