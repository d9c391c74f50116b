"""Tables 3 and 4 and Figure 2: what balancing on the representation does to normalized entropies."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from examples.models.dcn_v2 import DCNv2
from examples.studies.harness import report, search
from examples.studies.harness.command import given
from examples.studies.harness.runner import Runner
from examples.studies.harness.runs import Plan, Run
from examples.studies.harness.search import Entry, ema_decay, log_uniform, uniform
from examples.studies.harness.statistics import compare
from examples.studies.harness.timing import machine
from examples.studies.multibalance.speed import QUICK_MODEL
from examples.studies.ranking.metrics import all_metrics, metric, of_truth
from examples.studies.ranking.network import BATCH, COUNTED
from examples.studies.ranking.sources import load
from examples.studies.ranking.synthetic import LogConfig
from examples.studies.ranking.training import TrainConfig, Trainer

FUNNEL = ("CVR", "Conv|imp", "CTR")  # the tasks and their order in the paper
SUM = Entry("plain sum", "sum")
REPRESENTATION = "place='representation'"
WEIGHT_LR: Any = {"knobs": {"weight_lr": log_uniform(0.1, 10.0)}, "start": {"weight_lr": 1.0}}
MULTIBALANCE = Entry("MultiBalance", f"multibalance({REPRESENTATION})", **WEIGHT_LR)
TABLE3 = (
    SUM,
    Entry("Uncertainty", f"uncertainty({REPRESENTATION})"),
    Entry("PCGrad", f"pcgrad({REPRESENTATION})"),
    Entry(
        "Gradient Vaccine",
        f"grad_vaccine(eps=0.0, {REPRESENTATION})",
        {"ema_decay": ema_decay(1e-3, 1e-1)},  # the paper's beta is 1 minus it
        {"ema_decay": 0.99},
    ),
    Entry("GradDrop", f"graddrop({REPRESENTATION})", {"leak": uniform(0.0, 0.5)}, {"leak": 0.0}),
    # The median is the norm that the paper found the most stable. An average over steps would mix the
    # gradients of unrelated examples here.
    Entry("DB-MTL", f"db_mtl(ema_decay=0.0, norm='median', {REPRESENTATION})"),
    Entry("IMTL-G", f"imtl_g({REPRESENTATION})"),
    Entry(
        "MultiBalance without EMA", f"multibalance(ema_decay=0.0, {REPRESENTATION})", **WEIGHT_LR
    ),
    MULTIBALANCE,
)
WEIGHT_LRS = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0)
# Where all trials start: the best of `tune` for the plain sum on the synthetic log with its defaults. Every
# loss is a sum over the size of the batch, as in section 4.2 of the paper and as the magnitudes of its
# Figure 2 have it, unless one asks otherwise.
TRAIN = {
    BATCH: TrainConfig(learning_rate=3e-3, weight_decay=1.0, mean_over=BATCH),
    COUNTED: TrainConfig(learning_rate=1e-3, weight_decay=0.1, mean_over=COUNTED),
}
# So many positives that every metric of the few examples has a value.
QUICK_LOG = LogConfig(impressions=600, ctr=0.4, ctcvr=0.1)
QUICK = {"epochs": 2, "batch": 64}
MEANS = {
    BATCH: "sums over the size of the batch, for CVR too",
    COUNTED: "means over the examples that count, for CVR the clicks",
}
MODEL = {"embedding": 8, "cross_layers": 2, "deep": (64, 32), "tower": (32,)}
GRID = {"learning_rate": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "weight_decay": (0.1, 1.0, 10.0)}

PANELS = {
    "c": "original gradient magnitude",
    "d": "learned weight",
    "e": "weighted gradient magnitude",
}
POINTS = 200  # of a curve


class Study:
    """A command under way."""

    def __init__(self, options: argparse.Namespace):
        self.options, quick = options, options.quick
        log = QUICK_LOG if quick else LogConfig()
        dataset = load(options.data, replace(log, impressions=options.size or log.impressions))
        if set(FUNNEL) <= {task.name for task in dataset.tasks}:
            dataset = dataset.only(FUNNEL)
        self.dataset, self.tasks = dataset, dataset.tasks
        self.seeds = options.seeds or (2 if quick else 5)
        self.trials = options.trials or (2 if quick else 4)
        changed = {**(QUICK if quick else {}), **given(options, "epochs", "batch")}
        self.train = replace(TRAIN[options.mean_over], **changed)
        self.model = QUICK_MODEL if quick else MODEL
        trainer = Trainer(dataset, partial(DCNv2, **self.model), self.train)
        about = {**trainer.fingerprint, "model": repr(self.model)}
        self.runner = Runner(trainer, about, options.out, options.resume, options.jobs)
        report.say(dataset.describe())

    @property
    def title(self) -> str:
        """What is shown."""
        found = f"{self.options.command}, {self.dataset.name}"
        if self.train.mean_over == COUNTED:
            found += ", every loss a mean over the examples that count for the task"
        return found

    def show(self, rows: Mapping[str, Sequence[Run]], note: str) -> None:
        """Print and write a table of gains over the plain sum."""
        entropies, aucs = ([metric(task, name) for task in self.tasks] for name in ("NE", "AUC"))
        gains = compare(
            {label: gains_of(runs, entropies) for label, runs in rows.items()}, SUM.label
        )
        columns = [*(task.name for task in self.tasks), "average"]
        header = *(f"{name}: NE gain" for name in columns[:-1]), "average NE gain"
        lines = [("method", *header, *(f"{name}: AUC" for name in columns[:-1]))]
        for label, runs in rows.items():
            of_row = map(report.gain_cell, gains[label]) if label in gains else "0" * len(columns)
            lines.append((label, *of_row, *(auc.cell(runs) for auc in aucs)))
        base = ", ".join(f"{ne.task} {ne.cell(rows[SUM.label])}" for ne in entropies)
        text = (
            f"{self.dataset.describe()}. NE gain: test normalized entropy of the plain sum minus that of "
            "the row, times 100; positive is better. Mean ± standard error over "
            f"{self.seeds} seeds, paired; {report.OVER_SEEDS} over rows and columns of the gain. NE of "
            f"the plain sum: {base}."
        )
        truth = of_truth(self.dataset)
        if truth is not None:
            said = (f"{name} NE {ne:.4f} AUC {auc:.4f}" for name, (ne, auc) in truth.items())
            text += f" The true probabilities have: {', '.join(said)}."
        text += f" {note} {self.setup()}\n\nMade by `{self.options.line}`."
        name = self.options.command
        files = {f"{name}.csv": report.metrics_csv(rows, all_metrics(self.tasks))}
        report.publish(self.options.out, name, lines, self.title, text, files)

    def setup(self) -> str:
        """How every row is trained."""
        train = self.train
        return (
            f"Every row: DCN-v2 with {self.model}, AdamW, batches of {train.batch}, at most {train.epochs} "
            f"epochs, early stopping by the mean validation NE with patience {train.patience}. Losses: "
            f"{MEANS[train.mean_over]}. Methods on the representation through `fork`; every tower has the "
            "gradient of its own loss. "
            f"{machine()}, jax {jax.__version__}."
        )


def gains_of(runs: Sequence[Run], entropies: Sequence[Any]) -> np.ndarray:
    """Minus 100 times the entropies and their mean, `[T + 1, seeds]`."""
    found = [-100 * entropy.by_seed(runs) for entropy in entropies]
    return np.stack([*found, np.mean(found, axis=0)])


def tune(options: argparse.Namespace) -> None:
    """The optimizer's settings for the plain sum."""
    search.tune(Study(options).runner, GRID, "NE")


def table3(options: argparse.Namespace) -> None:
    """All methods on the representation, with as many trials for each."""
    study = Study(options)
    found = search.tuned(study.runner, TABLE3, study.trials, study.seeds)
    note = search.tuning_note(study.trials, {row.entry.label: row.plan for row in found})
    study.show({row.entry.label: row.runs for row in found}, note)


def table4(options: argparse.Namespace) -> None:
    """The learning rate of MultiBalance's weights, with nothing else searched."""
    study = Study(options)
    rates = WEIGHT_LRS[:2] if options.quick else WEIGHT_LRS
    entries = [SUM] + [
        Entry(f"weight learning rate {rate:g}", MULTIBALANCE.choice, {}, {"weight_lr": rate})
        for rate in rates
    ]
    default = search.setting_in_words(Plan(0, study.runner.trainer.default_setting()))
    rows = search.untuned(study.runner, entries, study.seeds)
    study.show(rows, f"Nothing was searched: {default}.")


def figure2(options: argparse.Namespace) -> None:
    """Gradient magnitudes, MultiBalance's weights and weighted magnitudes over the steps of one run."""
    options.seeds = options.seeds or 1
    study = Study(options)
    run = search.untuned(study.runner, [MULTIBALANCE], study.seeds)[MULTIBALANCE.label][0]
    names = [task.name for task in study.tasks]
    norms, weights, simplex = (
        run.history[name].reshape(-1, len(names))
        for name in ("norms", "weights", "simplex weights")
    )
    shown = {"c": norms, "d": simplex, "e": norms * weights}
    steps, binned = bins(shown)
    said = []
    for panel, title in PANELS.items():
        last = np.mean(shown[panel][-len(norms) // 4 :], axis=0)
        values = ", ".join(f"{name} {value:.3g}" for name, value in zip(names, last, strict=True))
        said.append((f"({panel}) {title}", values))
    note = (
        "MultiBalance with its defaults, seed 0; means over the last quarter of the steps. The magnitudes "
        "are norms of the gradients of a batch's representation.\n\n"
        f"{study.setup()}\n\nMade by `{options.line}`."
    )
    rows = ((step, panel, *row) for panel, found in binned.items()
            for step, row in zip(steps, found, strict=True))  # fmt: skip
    files = {"figure2.csv": report.csv_of(["step", "panel", *names], rows)}
    lines = [("panel", "mean at the end"), *said]
    report.publish(options.out, "figure2", lines, study.title, note, files, left=2)
    if options.out is None:
        return
    with report.picture(options.out / "figure2.png", 1, 3, figsize=(11, 3)) as (_, grid):
        for axes, (panel, title) in zip(grid[0], PANELS.items(), strict=True):
            axes.plot(steps, binned[panel], label=names)
            axes.set(xlabel="step", yscale="linear" if panel == "d" else "log")
            axes.set_title(f"({panel}) {title}", fontsize=9)
        grid[0, 0].legend(title="task")


def bins(curves: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Means over as many steps as leave at most `POINTS` points, and the last step of each."""
    steps = len(next(iter(curves.values())))
    size = -(-steps // POINTS)
    ends = np.arange(size, steps + 1, size)
    means = {
        name: values[: len(ends) * size].reshape(len(ends), size, -1).mean(axis=1)
        for name, values in curves.items()
    }
    return ends, means
