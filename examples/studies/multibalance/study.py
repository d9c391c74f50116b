"""Tables 3 and 4 and Figure 2: what balancing on the representation does to normalized entropies."""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax
import numpy as np

import mtl_optax as mtl
from examples.models.dcn_v2 import DCNv2
from examples.studies.harness import tables
from examples.studies.harness.choices import parse_choice
from examples.studies.harness.runner import Job, Runner
from examples.studies.harness.search import (
    Entry,
    ema_decay,
    log_uniform,
    setting_in_words,
    tuned,
    uniform,
)
from examples.studies.harness.timing import machine
from examples.studies.multibalance import pictures
from examples.studies.ranking import report
from examples.studies.ranking.data import Dataset, Task
from examples.studies.ranking.metrics import of_truth
from examples.studies.ranking.network import BATCH, COUNTED
from examples.studies.ranking.sources import load
from examples.studies.ranking.synthetic import LogConfig
from examples.studies.ranking.training import TrainConfig, Trainer
from examples.studies.recommender.download import write_atomically
from examples.studies.recommender.training import Plan

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
QUICK_MODEL = {"embedding": 2, "cross_layers": 1, "deep": (4,), "tower": (4,), "numerical": (4,)}
GRID = {"learning_rate": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "weight_decay": (0.1, 1.0, 10.0)}


class Study:
    """A command under way."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        log = QUICK_LOG if options.quick else LogConfig()
        dataset = load(options.data, replace(log, impressions=options.size or log.impressions))
        names = [task.name for task in dataset.tasks]
        if set(FUNNEL) <= set(names):
            dataset = dataset.only(FUNNEL)
        self.dataset: Dataset = dataset
        self.seeds = options.seeds or (2 if options.quick else 5)
        self.trials = options.trials or (2 if options.quick else 4)
        given = {name: getattr(options, name) for name in ("epochs", "batch")}
        given = {k: v for k, v in given.items() if v is not None}
        train = replace(TRAIN[options.mean_over], **(QUICK if options.quick else {}))
        self.train = replace(train, **given)
        self.model = QUICK_MODEL if options.quick else MODEL
        trainer = Trainer(dataset, partial(DCNv2, **self.model), self.train)
        fingerprint = {
            "versions": {"mtl_optax": mtl.__version__, "jax": jax.__version__},
            "train": asdict(self.train),
            "model": repr(self.model),
            "data": dataset.digest(),
        }
        self.runner = Runner(trainer, fingerprint, options.out, options.resume, options.jobs)
        tables.say(dataset.describe())

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks, in the order of the columns."""
        return self.dataset.tasks

    @property
    def title(self) -> str:
        """What is shown."""
        found = f"{self.options.command}, {self.dataset.name}"
        if self.train.mean_over == COUNTED:
            found += ", every loss a mean over the examples that count for the task"
        return found

    def untuned(self, entries: Sequence[Entry]) -> dict[str, list[Any]]:
        """Every entry with its starting knobs, over all seeds."""
        jobs = []
        for entry in entries:
            (start,) = entry.trials(1, len(self.tasks), self.train)
            plans = [replace(start, seed=seed) for seed in range(self.seeds)]
            jobs.append(Job(entry.parsed(), plans))
        found = self.runner.train(jobs)
        return {entry.label: runs for entry, runs in zip(entries, found, strict=True)}

    def show(self, rows: report.Runs, note: str) -> None:
        """Print and write a table of gains over the plain sum."""
        names = [task.name for task in self.tasks]
        header = (
            "method",
            *(f"{name}: NE gain" for name in names),
            "average NE gain",
            *(f"{name}: AUC" for name in names),
        )
        gains = report.gains(rows, SUM.label, self.tasks)
        lines = []
        for label, runs in rows.items():
            found = gains.get(label)
            shown = ["0" for _ in range(len(names) + 1)]
            if found is not None:
                shown = [report.gain_cell(difference) for difference in found]
            aucs = [report.mean_cell(report.by_seed(runs, task, "AUC")) for task in self.tasks]
            lines.append((label, *shown, *aucs))
        base = ", ".join(
            f"{task.name} {report.mean_cell(report.by_seed(rows[SUM.label], task, 'NE'))}"
            for task in self.tasks
        )
        text = (
            f"{self.dataset.describe()}. NE gain: test normalized entropy of the plain sum minus that of "
            "the row, times 100; positive is better. Mean ± standard error over "
            f"{self.seeds} seeds, paired; * p < 0.05, ** p < 0.01, *** p < 0.001, two-sided paired t-test "
            "over the seeds, "
            f"Holm-corrected over rows and columns of the gain. NE of the plain sum: {base}."
        )
        truth = of_truth(self.dataset)
        if truth is not None:
            said = ", ".join(
                f"{name} NE {ne:.4f} AUC {auc:.4f}" for name, (ne, auc) in truth.items()
            )
            text += f" The true probabilities have: {said}."
        text += f" {note} {self.setup()}"
        text += f"\n\nMade by `{self.options.line}`."
        lines = [header, *lines]
        tables.show(lines, self.title, text, first=("average NE gain",))
        self.write(".md", tables.markdown(lines, self.title, text))
        self.write(".csv", report.metrics_csv(rows, self.tasks))
        if self.options.out is not None:
            columns = [*names, "average"]
            pictures.gains(gains, columns, self.path(".png"), f"over the {SUM.label}")

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

    def path(self, suffix: str) -> Any:
        """Where a file of this command goes."""
        return self.options.out and self.options.out / f"{self.options.command}{suffix}"

    def write(self, suffix: str, text: str) -> None:
        """Write a file of this command, where `--out` was given."""
        if self.options.out is not None:
            write_atomically(self.path(suffix), text.encode())


def tune(options: argparse.Namespace) -> None:
    """The optimizer's settings for the plain sum."""
    study = Study(options)
    grid = list(itertools.product(*GRID.values()))
    default = study.runner.trainer.default_setting()
    plans = [Plan(0, default._replace(**dict(zip(GRID, values, strict=True)))) for values in grid]
    (runs,) = study.runner.train([Job(parse_choice("sum"), plans, measure=False)])
    for values, run in zip(grid, runs, strict=True):
        named = ", ".join(f"{name} {value:g}" for name, value in zip(GRID, values, strict=True))
        found = (
            f"validation NE {-run.best_value:.4f} in epoch {run.best_epoch}, {run.seconds:.1f} s"
        )
        print(f"{named}: {found}")


def table3(options: argparse.Namespace) -> None:
    """All methods on the representation, with as many trials for each."""
    study = Study(options)
    found = tuned(study.runner, TABLE3, study.trials, study.seeds)
    chosen = "; ".join(f"{row.entry.label}: {setting_in_words(row.plan)}" for row in found)
    note = (
        f"Every row, the plain sum too, had {study.trials} trials of seed 0 on the validation set: the "
        "first with the default settings, the others with a learning rate and a decay of the tables up to "
        f"3 times smaller or larger and random options of its own. Chosen: {chosen}."
    )
    study.show({row.entry.label: row.runs for row in found}, note)


def table4(options: argparse.Namespace) -> None:
    """The learning rate of MultiBalance's weights, with nothing else searched."""
    study = Study(options)
    rates = WEIGHT_LRS[:2] if options.quick else WEIGHT_LRS
    entries = [
        Entry(f"weight learning rate {rate:g}", MULTIBALANCE.choice, {}, {"weight_lr": rate})
        for rate in rates
    ]
    default = setting_in_words(Plan(0, study.runner.trainer.default_setting()))
    study.show(study.untuned([SUM, *entries]), f"Nothing was searched: {default}.")


def figure2(options: argparse.Namespace) -> None:
    """Gradient magnitudes, MultiBalance's weights and weighted magnitudes over the steps of one run."""
    options.seeds = options.seeds or 1
    study = Study(options)
    (runs,) = study.untuned([MULTIBALANCE]).values()
    history = {
        name: runs[0].history[name].reshape(-1, len(study.tasks))
        for name in ("norms", "weights", "simplex weights")
    }
    shown = {
        "c": history["norms"],
        "d": history["simplex weights"],
        "e": history["norms"] * history["weights"],
    }
    steps, binned = pictures.bins(shown)
    names = [task.name for task in study.tasks]
    lines = ["step,panel," + ",".join(names)]
    for panel, rows in binned.items():
        for step, row in zip(steps, rows, strict=True):
            lines.append(f"{step},{panel}," + ",".join(f"{value:.6g}" for value in row))
    study.write(".csv", "\n".join(lines) + "\n")
    said = []
    for panel, title in pictures.PANELS.items():
        last = np.mean(shown[panel][-len(shown[panel]) // 4 :], axis=0)
        values = ", ".join(f"{name} {value:.3g}" for name, value in zip(names, last, strict=True))
        said.append(f"- ({panel}) {title}: {values}")
    text = (
        f"**{study.title}**\n\nMultiBalance with its defaults, seed 0; means over the last "
        "quarter of the steps. The magnitudes are norms of the gradients of a batch's representation.\n\n"
        + "\n".join(said)
        + f"\n\n{study.setup()}\n\nMade by `{options.line}`.\n"
    )
    print(text)
    study.write(".md", text)
    if options.out is not None:
        pictures.magnitudes(steps, binned, names, study.path(".png"))
