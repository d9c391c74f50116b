"""MetaBalance's study (He et al., 2022, sections 5 and A) on data of your own.

    python -m examples.studies.metabalance data --data ../data/tmall
    python -m examples.studies.metabalance table2 --data ml-100k --out results
    python -m examples.studies.metabalance figure3 --data synthetic-ijcai --scale 1/64

What is run: `data` (sizes, and the rows that train nothing), `tune` (the optimizer's settings for the plain
sum), `table1` (strategies), `table2` (all methods), `table3` (chains), `table4` (no moving average),
`figure1` (gradient magnitudes by task and layer over training, for several relax factors, as in the paper's
Figures 1 and 2), `figure3` (relax factors), `figure4` (training loss), `figure5` (optimizers). Each prints
a table and writes a CSV file, a Markdown table and a picture to `--out`; `--resume` goes on from there.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np

import mtl_optax as mtl
from examples.compare import digest
from examples.studies.harness import tables
from examples.studies.harness.choices import parse_choice
from examples.studies.harness.command import OneLineParser, check_numbers, run_command
from examples.studies.harness.runner import Job, Runner
from examples.studies.harness.search import Entry, setting_in_words, tuned
from examples.studies.harness.statistics import paired_difference
from examples.studies.metabalance import pictures
from examples.studies.metabalance.knn import item_knn_scores
from examples.studies.metabalance.readers import read_raw
from examples.studies.metabalance.study import (
    FIGURES,
    METABALANCE,
    RELAX_FACTORS,
    TABLES,
    TRAIN,
    VANILLA,
    relax_entries,
)
from examples.studies.metabalance.synthetic import oracle_scores, synthetic_log
from examples.studies.recommender import report
from examples.studies.recommender.data import PAPER_SPLIT, Dataset, Log, make_dataset
from examples.studies.recommender.download import write_atomically
from examples.studies.recommender.evaluation import COLUMNS, METRICS, rank_by_item_scores
from examples.studies.recommender.sources import folder, movielens_nested
from examples.studies.recommender.training import Plan, Run, TrainConfig, Trainer, popularity

SYNTHETIC = "synthetic-"
COMMANDS = ("data", "tune", *TABLES, *FIGURES)
GRID = {"learning_rate": (1e-3, 2e-3, 5e-3, 1e-2), "weight_decay": (0.1, 0.3, 1.0)}


@dataclass(frozen=True)
class StudyConfig:
    """What is run, on what, and how thoroughly."""

    command: str
    data: str
    scale: Fraction = Fraction(1, 64)
    relatedness: float = 0.7
    seeds: int = 5
    trials: int = 8
    out: Path | None = None
    resume: bool = False
    train: TrainConfig = TRAIN


def parse(arguments: list[str] | None) -> StudyConfig:
    """The configuration that the command line asks for."""
    parser = OneLineParser(
        prog="python -m examples.studies.metabalance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add(
        "--data",
        default="synthetic-ijcai",
        help="a folder with buy.csv[.gz], view.csv[.gz], ...; the raw file of UserBehavior-2017 or "
        "IJCAI-2015; ml-100k; synthetic-ijcai or synthetic-userbehavior",
    )
    add("--scale", type=Fraction, default=Fraction(1, 64), help="of synthetic data: 1, 1/8 or 1/64")
    add("--relatedness", type=float, default=0.7, help="of synthetic tasks to the target, 0 to 1")
    add("--seeds", type=int, default=5, help="training seeds of each row (default 5)")
    add("--trials", type=int, default=8, help="validation trials of each row (default 8)")
    add("--epochs", type=int, default=TRAIN.epochs, help=f"at most (default {TRAIN.epochs})")
    add("--batch-pairs", type=int, default=TRAIN.batch_pairs, help=f"default {TRAIN.batch_pairs}")
    add("--out", type=Path, help="folder for the CSV file, the Markdown table and the picture")
    add("--resume", action="store_true", help="go on from what --out holds")
    options = parser.parse_args(arguments)
    check_numbers(options, ("seeds", "trials", "epochs", "batch_pairs"))
    given = vars(options)
    train = {name: given.pop(name) for name in ("epochs", "batch_pairs")}
    return StudyConfig(**given, train=replace(TRAIN, **train))


def load(config: StudyConfig) -> Log:
    """The log that `--data` names."""
    if config.data == "ml-100k":
        return movielens_nested()
    if config.data.startswith(SYNTHETIC):
        return synthetic_log(*_synthetic(config))
    path = Path(config.data)
    return read_raw(path) if path.is_file() else folder(path, "buy")


def _synthetic(config: StudyConfig) -> tuple[str, float, float]:
    return config.data.removeprefix(SYNTHETIC), float(config.scale), config.relatedness


@dataclass
class Study:
    """A command under way."""

    config: StudyConfig
    dataset: Dataset

    def runner(self, **changes: Any) -> Runner:
        """A runner for the configuration with some changes."""
        probe = changes.pop("probe_norms", False)
        train = replace(self.config.train, **changes)
        trainer = Trainer(self.dataset, train, probe_norms=probe)
        versions = {"mtl_optax": mtl.__version__, "jax": jax.__version__}
        fingerprint = {
            "versions": versions,
            "train": asdict(train),
            "data": digest(self.dataset),
            "norms": probe,
        }
        return Runner(trainer, fingerprint, self.config.out, self.config.resume)

    def tuned(
        self, runner: Runner, entries: Sequence[Entry]
    ) -> tuple[list[report.Row], dict[str, Plan]]:
        """Every entry with the best of its trials, over all seeds."""
        found = tuned(runner, entries, self.config.trials, self.config.seeds)
        rows = [self.row(row.entry, [*row.searched, *row.runs], row.runs) for row in found]
        return rows, {row.entry.label: row.plan for row in found}

    def row(self, entry: Entry, all_runs: Sequence[Run], measured: Sequence[Run]) -> report.Row:
        """A row of the measured runs that counts all."""
        names = [task.name for task in self.dataset.tasks]
        tasks = names[:1] if entry.choice == "single" else names
        seconds = sum(run.seconds for run in all_runs)
        return report.row_of_runs(measured, tasks, runs=len(all_runs), seconds=seconds)

    def reference_rows(self) -> list[report.Row]:
        """Popularity and item-kNN, which train nothing, and for synthetic data the true scores."""
        dataset = self.dataset
        counts = popularity(dataset)
        scored = {
            "popularity": lambda users: np.broadcast_to(counts, (len(users), len(counts))),
            "item-kNN, target": item_knn_scores(dataset, [0]),
            "item-kNN, all tasks": item_knn_scores(dataset, dataset.ranking_tasks),
        }
        if self.config.data.startswith(SYNTHETIC):
            scored["oracle"] = oracle_scores(*_synthetic(self.config))
        target = dataset.tasks[0].name
        return [
            report.Row(label, {}, {target: rank_by_item_scores(dataset, scores)[None]})
            for label, scores in scored.items()
        ]

    def show(self, rows: Sequence[report.Row], note: str, baseline: str | None) -> None:
        """Print and write the table."""
        target = self.dataset.tasks[0]
        columns = [report.Column(target, f"{metric}, all") for metric in METRICS]
        base = next((row for row in rows if row.label == baseline), None)
        against = report.differences(rows, base, target) if base else {}
        title = f"{self.config.command}, {self.dataset.name}"
        text = f"{report.caption(columns, self.config.seeds, baseline)} {note}".strip()
        lines = report.lines_of(rows, columns, against)
        tables.show(lines, title, text)
        self.write("table.md", tables.markdown(lines, title, text))
        self.write("metrics.csv", report.metrics_csv(rows, self.dataset.tasks))

    def path(self, name: str) -> Path | None:
        """Where a file of this command goes."""
        return self.config.out and self.config.out / f"{self.config.command}-{name}"

    def write(self, name: str, text: str) -> None:
        """Write a file of this command, where `--out` was given."""
        path = self.path(name)
        if path is not None:
            write_atomically(path, text.encode())

    def tuning_note(self, plans: dict[str, Plan]) -> str:
        """What was searched, and what was found."""
        train = self.config.train
        chosen = "; ".join(f"{label}: {setting_in_words(plan)}" for label, plan in plans.items())
        return (
            f"{train.optimizer}, batches of {train.batch_pairs} pairs with {train.negatives} random items "
            f"each, at most {train.epochs} epochs, early stopping by the validation NDCG@10. Every "
            f"row had {self.config.trials} trials of one seed on the validation set: the first with the "
            "default settings, the others with a learning rate and a decay up to 3 times smaller or larger "
            f"and random options of its own. Chosen: {chosen}."
        )

    def statistics(self) -> None:
        """The sizes of the data, as in Table 5, and the rows that train nothing."""
        dataset = self.dataset
        cells = dataset.num_users * dataset.num_items
        parts = (dataset.train, dataset.validation, dataset.test)
        tables.say(f"{dataset.name}: {dataset.num_users} users, {dataset.num_items} items")
        for place, task in enumerate(dataset.tasks):
            counts = [len(part.positives(place)) for part in parts]
            tables.say(
                f"{task.name}: {sum(counts)} pairs, density {sum(counts) / cells:.4%}; training "
                f"{counts[0]}, validation {counts[1]}, test {counts[2]}"
            )
        self.show(self.reference_rows(), "", None)

    def tune(self) -> None:
        """The optimizer's settings for the plain sum."""
        runner = self.runner()
        grid = list(itertools.product(*GRID.values()))
        default = runner.trainer.default_setting()
        plans = [
            Plan(0, default._replace(**dict(zip(GRID, values, strict=True)))) for values in grid
        ]
        (runs,) = runner.train([Job(parse_choice("sum"), plans, measure=False)])
        for values, run in zip(grid, runs, strict=True):
            named = ", ".join(f"{name} {value:g}" for name, value in zip(GRID, values, strict=True))
            value = f"{run.best_value:.4f} in epoch {run.best_epoch}"
            print(f"{named}: validation NDCG@10 {value}")

    def table(self) -> None:
        """Tables 1 to 4."""
        entries = TABLES[self.config.command]
        if VANILLA not in entries:
            entries = (VANILLA, *entries)
        rows, plans = self.tuned(self.runner(), entries)
        improvement = self.improvement(rows) if self.config.command == "table2" else ""
        note = f"{self.tuning_note(plans)} {improvement}".strip()
        self.show([*self.reference_rows(), *rows], note, VANILLA.label)
        if self.config.out is not None:
            pictures.bars(rows, self.dataset.tasks[0].name, self.path("picture.png"))

    def improvement(self, rows: Sequence[report.Row]) -> str:
        """MetaBalance against the strongest baseline of each metric, as in Table 2's last line."""
        target = self.dataset.tasks[0].name
        ours = next(row for row in rows if row.label == METABALANCE.label)
        said = []
        for metric in METRICS:
            place = COLUMNS.index(f"{metric}, all")
            values = {row.label: row.test[target][..., place] for row in rows if row is not ours}
            strongest = max(values, key=lambda label: np.nanmean(values[label]))
            mine = ours.test[target][..., place]
            ratio = np.nanmean(mine) / np.nanmean(values[strongest]) - 1
            p_value = paired_difference(mine, values[strongest]).p_value
            said.append(f"{metric} {ratio:+.1%} ({strongest}, p = {p_value:.2g})")
        return f"MetaBalance against the strongest baseline, without correction: {', '.join(said)}."

    def relax(self) -> None:
        """Figure 3: the relax factor, with nothing else searched."""
        runner, entries = self.runner(), relax_entries(RELAX_FACTORS)
        rows = self.untuned(runner, entries)
        self.show(rows, "Nothing was searched.", VANILLA.label)
        if self.config.out is not None:
            pictures.relax(
                rows, RELAX_FACTORS, self.dataset.tasks[0].name, self.path("picture.png")
            )

    def untuned(self, runner: Runner, entries: Sequence[Entry]) -> list[report.Row]:
        """Every entry with its starting knobs, over all seeds."""
        tasks = len(self.dataset.tasks)
        jobs = []
        for entry in entries:
            (start,) = entry.trials(1, tasks, runner.trainer.config)
            plans = [replace(start, seed=seed) for seed in range(self.config.seeds)]
            jobs.append(Job(entry.parsed(), plans))
        found = runner.train(jobs)
        return [self.row(entry, runs, runs) for entry, runs in zip(entries, found, strict=True)]

    def magnitudes(self) -> None:
        """Figures 1 and 2: gradient norms by task and part of the network, over training."""
        runner = self.runner(probe_norms=True)
        rows = self.untuned(runner, relax_entries((0.2, 0.7, 1.0)))
        tasks = [task.name for task in self.dataset.tasks]
        self.show(rows, "Nothing was searched.", VANILLA.label)
        self.write(
            "norms.json", json.dumps({row.label: row.history["norms"].tolist() for row in rows})
        )
        if self.config.out is not None:
            pictures.norms(rows, tasks, self.path("picture.png"))

    def training_loss(self) -> None:
        """Figure 4: the target's training loss, epoch by epoch."""
        shown = {"Vanilla-Multi", "GradSimilarity", "GradSurgery", "OL-AUX", "MetaBalance"}
        entries = [entry for entry in TABLES["table2"] if entry.label in shown]
        rows = self.untuned(self.runner(), entries)
        self.show(rows, "Nothing was searched.", VANILLA.label)
        if self.config.out is not None:
            pictures.losses(rows, self.path("picture.png"))

    def optimizers(self) -> None:
        """Figure 5: the plain sum and MetaBalance under three optimizers, each tuned."""
        rows: list[report.Row] = []
        notes = []
        for name in ("adam", "adagrad", "rmsprop"):
            runner = self.runner(optimizer=name)
            labelled = [replace(e, label=f"{e.label}, {name}") for e in (VANILLA, METABALANCE)]
            found, plans = self.tuned(runner, labelled)
            rows += found
            notes.append(self.tuning_note(plans))
        self.show(rows, " ".join(notes), f"{VANILLA.label}, adam")
        if self.config.out is not None:
            pictures.bars(rows, self.dataset.tasks[0].name, self.path("picture.png"))

    def run(self) -> None:
        """Run the command."""
        commands = {
            "data": self.statistics,
            "tune": self.tune,
            "figure1": self.magnitudes,
            "figure3": self.relax,
            "figure4": self.training_loss,
            "figure5": self.optimizers,
        }
        commands.get(self.config.command, self.table)()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; see `run_command` for what it returns."""

    def work(config: StudyConfig) -> None:
        Study(config, make_dataset(load(config), PAPER_SPLIT)).run()

    return run_command("examples.studies.metabalance", lambda: parse(arguments), work)


if __name__ == "__main__":
    sys.exit(main())
