"""MetaBalance's tables and figures: every row, its trials, and what is shown of them."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from examples.studies.harness import report as harness_report
from examples.studies.harness import search
from examples.studies.harness.command import given
from examples.studies.harness.report import Row, curve, metrics_csv, picture, publish, say
from examples.studies.harness.runner import Runner
from examples.studies.harness.runs import Plan, Run
from examples.studies.harness.search import Entry, log_uniform, tuning_note, uniform
from examples.studies.harness.statistics import paired_difference, standard_error
from examples.studies.metabalance.knn import item_knn_scores
from examples.studies.metabalance.readers import read_raw
from examples.studies.metabalance.synthetic import synthetic_log, truth
from examples.studies.recommender import report
from examples.studies.recommender.comparison import of_target, popular
from examples.studies.recommender.data import PAPER_SPLIT, Log, make_dataset
from examples.studies.recommender.evaluation import COLUMNS, METRICS, rank_by_item_scores
from examples.studies.recommender.sources import folder, movielens
from examples.studies.recommender.training import PARTS, TrainConfig, Trainer

# The network is that of Figure 6 with the sizes of appendix A.2, and a bias of the items that starts at
# their popularity. The optimizer's settings were chosen for the plain sum on tmall_ijcai15, the best of 12
# (`python -m examples.studies.metabalance tune`), and are where every method's trials start.
TRAIN = TrainConfig(
    epochs=15, patience=5, batch_pairs=2048, negatives=3, learning_rate=2e-3, weight_decay=1.0,
    validation_users=2000,
)  # fmt: skip


def _weights(generator: np.random.Generator, num_tasks: int) -> np.ndarray:
    """1 for the target, the others of any size."""
    return np.concatenate([[1.0], 10.0 ** generator.uniform(-2.0, 1.0, num_tasks - 1)])


RELAX: Any = {"knobs": {"relax_factor": uniform(0.1, 1.0)}, "start": {"relax_factor": 0.7}}
METABALANCE = Entry("MetaBalance", "metabalance", **RELAX)
VANILLA = Entry("Vanilla-Multi", "sum")
BASELINES = (
    Entry("Single-Loss", "single"),
    VANILLA,
    Entry("Weights-Tuning", "fixed_weights", {"weights": _weights}, {"weights": None}),
    Entry("Uncertainty", "uncertainty"),
    Entry("GradNorm", "gradnorm", {"alpha": uniform(0.0, 2.0)}, {"alpha": 0.75}),
    Entry("DWA", "dwa(window=5)", {"temperature": log_uniform(0.5, 8.0)}, {"temperature": 2.0}),
    Entry("MGDA", "mgda"),
    Entry("MTAdam", "scale_by_mtadam", {"b3": uniform(0.5, 0.99)}, {"b3": 0.9}),
    Entry("GradSimilarity", "grad_similarity"),
    Entry("GradSurgery", "grad_surgery"),
    Entry("OL-AUX", "ol_aux", {"weight_lr": log_uniform(1e-3, 1.0)}, {"weight_lr": 0.1}),
)
TABLES: Mapping[str, tuple[Entry, ...]] = {
    "table1": (
        Entry("Strategy A", "metabalance(strategy='shrink')", **RELAX),
        Entry("Strategy B", "metabalance(strategy='enlarge')", **RELAX),
        Entry("Strategy C", "metabalance(strategy='both')", **RELAX),
    ),
    "table2": (*BASELINES, METABALANCE),
    "table3": (
        METABALANCE,
        Entry("MetaBalance + GradSimilarity", "metabalance + grad_similarity", **RELAX),
        Entry("MetaBalance + GradSurgery", "metabalance + grad_surgery", **RELAX),
        Entry("MetaBalance + OL-AUX", "metabalance + ol_aux", **RELAX),
    ),
    "table4": (
        METABALANCE,
        Entry("MetaBalance - Moving Average", "metabalance(ema_decay=0)", **RELAX),
    ),
}
RELAX_FACTORS = tuple(round(0.1 * step, 1) for step in range(1, 11))
GRID = {"learning_rate": (1e-3, 2e-3, 5e-3, 1e-2), "weight_decay": (0.1, 0.3, 1.0)}
SYNTHETIC = "synthetic-"


def relax_entries(factors: Sequence[float]) -> list[Entry]:
    """A row for each relax factor, and the plain sum."""
    made = [
        Entry(f"MetaBalance, r = {r:g}", "metabalance", {}, {"relax_factor": r}) for r in factors
    ]
    return [VANILLA, *made]


def load(data: str, scale: Fraction, relatedness: float) -> Log:
    """The log that `--data` names."""
    if data == "ml-100k":
        return movielens("nested")
    if data.startswith(SYNTHETIC):
        return synthetic_log(data.removeprefix(SYNTHETIC), float(scale), relatedness)
    path = Path(data)
    return read_raw(path) if path.is_file() else folder(path, "buy")


class Study:
    """A command under way."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.name = options, options.command
        log = load(options.data, options.scale, options.relatedness)
        self.dataset = make_dataset(log, PAPER_SPLIT)
        self.target = self.dataset.tasks[0].name
        self.train = replace(TRAIN, **given(options, "epochs", "batch_pairs"))

    def runner(self, *, probe_norms: bool = False, **changes: Any) -> Runner:
        """A runner for the configuration with some changes."""
        train = replace(self.train, **changes)
        trainer = Trainer(self.dataset, train, probe_norms=probe_norms)
        return Runner(trainer, trainer.fingerprint, self.options.out, self.options.resume)

    def tuned(
        self, entries: Sequence[Entry], **changes: Any
    ) -> tuple[dict[str, Row], dict[str, Plan]]:
        """Every entry with the best of its trials, over all seeds."""
        options = self.options
        found = search.tuned(self.runner(**changes), entries, options.trials, options.seeds)
        rows = {t.entry.label: self.row(t.entry, t.runs, t.searched) for t in found}
        return rows, {t.entry.label: t.plan for t in found}

    def untuned(self, entries: Sequence[Entry], **changes: Any) -> dict[str, Row]:
        """Every entry with its starting knobs, over all seeds, as a table."""
        found = search.untuned(self.runner(**changes), entries, self.options.seeds)
        rows = {entry.label: self.row(entry, found[entry.label]) for entry in entries}
        self.show(rows, "Nothing was searched.", VANILLA.label)
        return rows

    def row(self, entry: Entry, runs: Sequence[Run], searched: Sequence[Run] = ()) -> Row:
        """The row of an entry, which counts the runs of a search too."""
        runs = of_target(runs, self.dataset) if entry.choice == "single" else runs
        return harness_report.row(runs, searched)

    def reference_rows(self) -> dict[str, Row]:
        """Popularity and item-kNN, which train nothing, and for synthetic data the true scores."""
        dataset, options = self.dataset, self.options
        scored = {
            "item-kNN, target": item_knn_scores(dataset, [0]),
            "item-kNN, all tasks": item_knn_scores(dataset, dataset.ranking_tasks),
        }
        if options.data.startswith(SYNTHETIC):
            name = options.data.removeprefix(SYNTHETIC)
            scored["oracle"] = truth(name, float(options.scale), options.relatedness).scores
        return {"popularity": popular(dataset)} | {
            label: harness_report.reference(
                label, {}, {self.target: rank_by_item_scores(dataset, scores)}
            )
            for label, scores in scored.items()
        }

    def show(self, rows: Mapping[str, Row], note: str, baseline: str | None) -> None:
        """Print and write the table."""
        task = self.dataset.tasks[0]
        columns = [report.metric(task, f"{metric}, all") for metric in METRICS]
        against = report.differences(rows, baseline, self.target) if baseline else {}
        text = f"{report.caption(columns, self.options.seeds, baseline)} {note}".strip()
        runs = {label: entry.runs for label, entry in rows.items()}
        files = {f"{self.name}.csv": metrics_csv(runs, report.metrics(self.dataset.tasks))}
        lines = report.lines_of(rows, columns, against)
        title = f"{self.name}, {self.dataset.name}"
        publish(self.options.out, self.name, lines, title, text, files)

    def draw(self, lines: int = 1, columns: int = 1, **options: Any) -> Any:
        """A picture beside the table, where `--out` was given."""
        out = self.options.out
        return picture(out and out / f"{self.name}.png", lines, columns, **options)

    def tuning_note(self, plans: Mapping[str, Plan], optimizer: str = TRAIN.optimizer) -> str:
        """How every row was trained and what was searched."""
        train = self.train
        return (
            f"{optimizer}, batches of {train.batch_pairs} pairs with {train.negatives} random items "
            f"each, at most {train.epochs} epochs, early stopping by the validation NDCG@10. "
            f"{tuning_note(self.options.trials, plans)}"
        )


def data(options: argparse.Namespace) -> None:
    """The sizes of the data, as in Table 5, and the rows that train nothing."""
    study = Study(options)
    say(study.dataset.describe())
    study.show(study.reference_rows(), "", None)


def tune(options: argparse.Namespace) -> None:
    """The optimizer's settings for the plain sum."""
    search.tune(Study(options).runner(), GRID, "NDCG@10")


def table(options: argparse.Namespace) -> None:
    """Tables 1 to 4."""
    study, entries = Study(options), TABLES[options.command]
    if VANILLA not in entries:
        entries = (VANILLA, *entries)
    rows, plans = study.tuned(entries)
    note = study.tuning_note(plans)
    if options.command == "table2":
        note += f" {improvement(rows, study.target)}"
    study.show({**study.reference_rows(), **rows}, note, VANILLA.label)


table1 = table2 = table3 = table4 = table


def improvement(rows: Mapping[str, Row], target: str) -> str:
    """MetaBalance against the strongest baseline of each metric, as in Table 2's last line."""
    values = {label: report.of_users(entry, target) for label, entry in rows.items()}
    ours = values.pop(METABALANCE.label)
    said = []
    for metric in METRICS:
        place = COLUMNS.index(f"{metric}, all")
        best = max(values, key=lambda label, place=place: np.nanmean(values[label][place]))
        theirs = values[best][place]
        ratio = np.nanmean(ours[place]) / np.nanmean(theirs) - 1
        p_value = paired_difference(ours[place], theirs).p_value
        said.append(f"{metric} {ratio:+.1%} ({best}, p = {p_value:.2g})")
    return f"MetaBalance against the strongest baseline, without correction: {', '.join(said)}."


def figure1(options: argparse.Namespace) -> None:
    """Figures 1 and 2: gradient norms by task and part of the network, over training."""
    study = Study(options)
    rows = study.untuned(relax_entries((0.2, 0.7, 1.0)), probe_norms=True)
    norms = {label: entry.runs[0].history["norms"] for label, entry in rows.items()}
    if options.out is not None:
        text = json.dumps({label: values.tolist() for label, values in norms.items()})
        (options.out / "figure1-norms.json").write_text(text, encoding="utf-8")
    size, shared = (2.8 * len(rows), 2 * len(PARTS)), {"sharex": True, "sharey": "row"}
    with study.draw(len(PARTS), len(rows), figsize=size, **shared) as (figure, grid):
        for column, (label, values) in enumerate(norms.items()):  # [E, T, parts]
            for part, name in enumerate(PARTS):
                axes = grid[part, column]
                for task, entry in enumerate(study.dataset.tasks):
                    curve(axes, values[:, task, part], entry.name)
                axes.set_yscale("log")
                grid[part, 0].set_ylabel(f"gradient norm,\n{name}")
            grid[0, column].set_title(label, fontsize=9)
            grid[-1, column].set_xlabel("epoch")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=8)


def figure3(options: argparse.Namespace) -> None:
    """The relax factor, with nothing else searched."""
    study = Study(options)
    rows = study.untuned(relax_entries(RELAX_FACTORS))
    shown = report.metric(study.dataset.tasks[0])
    plain, *others = (100 * shown.by_seed(entry.runs) for entry in rows.values())
    means, errors = [values.mean() for values in others], list(map(standard_error, others))
    with study.draw(figsize=(5, 3.4)) as (_, ((axes,),)):
        axes.errorbar(RELAX_FACTORS, means, errors, marker="o", capsize=3, label="MetaBalance")
        axes.axhline(plain.mean(), color="tab:orange", label=VANILLA.label)
        axes.set(xlabel="relax factor r", ylabel=f"test NDCG@10 of {study.target!r} (%)")
        axes.legend()


def figure4(options: argparse.Namespace) -> None:
    """The target's training loss, epoch by epoch, of the first seed."""
    shown = {"Vanilla-Multi", "GradSimilarity", "GradSurgery", "OL-AUX", "MetaBalance"}
    study = Study(options)
    rows = study.untuned([entry for entry in TABLES["table2"] if entry.label in shown])
    with study.draw(figsize=(5.5, 3.6)) as (_, ((axes,),)):
        for label, entry in rows.items():
            curve(axes, entry.runs[0].history["losses"][:, 0], label)
        axes.set(xlabel="epoch", ylabel="training loss of the target")
        axes.legend()


def figure5(options: argparse.Namespace) -> None:
    """The plain sum and MetaBalance under three optimizers, each tuned."""
    study = Study(options)
    rows: dict[str, Row] = {}
    notes = []
    for name in ("adam", "adagrad", "rmsprop"):
        labelled = [replace(e, label=f"{e.label}, {name}") for e in (VANILLA, METABALANCE)]
        found, plans = study.tuned(labelled, optimizer=name)
        rows |= found
        notes.append(study.tuning_note(plans, name))
    study.show(rows, " ".join(notes), f"{VANILLA.label}, adam")
