"""Train one multi-task recommender with several balancing methods and compare them.

    python -m examples.compare                    # MovieLens-100K, tasks in unlike units, three seeds
    python -m examples.compare --quick            # a look in under half a minute
    python -m examples.compare --tasks nested     # three nested labels of one kind
    python -m examples.compare --method sum "metabalance(relax_factor=1)" --data synthetic --out results

Is one run of balancing worth a search over loss weights? The tasks are what the data file holds, in its
own units: which films a user rates 5 (the target) or rates at all, to be ranked; the stars, and the days
since the user's first rating, to be predicted. Every row trains the same network on the same batches with
the same optimizer; `single` is the target's loss alone, and `standardised labels` is the sum with every
squared error divided by its labels' variance. `searched weights` trains with fixed weights that a
random search on the validation set chose, and its row counts what the search cost.
"""

import argparse
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import jax
import numpy as np

import mtl_optax as mtl
from examples.studies.harness import tables
from examples.studies.harness.choices import SINGLE, SUM, Choice, known_methods, parse_choice
from examples.studies.harness.command import (
    OneLineParser,
    check_numbers,
    nearest,
    run_command,
    unknown,
)
from examples.studies.harness.errors import UserError
from examples.studies.harness.runner import Job, Runner
from examples.studies.harness.statistics import paired_difference
from examples.studies.recommender import report
from examples.studies.recommender.data import Dataset, Split, make_dataset
from examples.studies.recommender.download import write_atomically
from examples.studies.recommender.evaluation import TEST, VALIDATION, rank_by_item_scores
from examples.studies.recommender.network import NetworkConfig
from examples.studies.recommender.sources import load_log
from examples.studies.recommender.step_times import step_seconds
from examples.studies.recommender.training import Plan, Run, TrainConfig, Trainer, popularity

SEARCHED, STANDARDISED = "searched weights", "standardised labels"
FIXED = (SEARCHED, STANDARDISED)  # rows with weights that this command finds
METHODS = (
    SINGLE,
    SUM,
    STANDARDISED,
    SEARCHED,
    "metabalance",
    "metabalance(relax_factor=1)",
    "metabalance(relax_factor=1, place='representation')",
    "multibalance",
    "inverse_norm",
    "imtl_g",
    "mgda",
    'emtl(base="mgda", epsilon=0.3, rho=0.3)',  # as in the stored table
    "db_mtl",
    "gradnorm",
    "famo",
    "uncertainty",
)
QUICK_METHODS = (SUM, "metabalance(relax_factor=1)")
# The optimizer's settings: the best for the plain sum on the validation set of MovieLens-100K. Running
# `--tune` prints the search again.
GRID = {"learning_rate": (3e-3, 1e-2, 3e-2, 1e-1), "weight_decay": (0.3, 1.0, 3.0)}
TRAIN = TrainConfig(
    epochs=5,
    negatives=1,
    validation_users=400,
    learning_rate=3e-2,
    weight_decay=1.0,
    network=NetworkConfig(embedding=32, tower=(16,)),
)
# The weights of the search, beside 1 for the target: the powers of 10 are uniform.
SEARCH_POWERS = (-6.0, 1.0)


@dataclass(frozen=True)
class CompareConfig:
    """What is compared, on what, and where the results go."""

    data: str = "movielens"
    tasks: str = "units"
    target: str | None = None
    methods: tuple[str, ...] = METHODS
    seeds: int = 3
    search_runs: int = 12
    tune: bool = False
    out: Path | None = None
    resume: bool = False
    split: Split = field(default_factory=Split)
    train: TrainConfig = TRAIN


def parse(arguments: list[str] | None) -> CompareConfig:
    """The configuration that the command line asks for."""
    parser = OneLineParser(
        prog="python -m examples.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    known = ", ".join((*FIXED, *known_methods()))
    add(
        "--method",
        nargs="+",
        metavar="METHOD",
        help=f"name, name(option=value), or a chain 'name + name'; place='losses', 'representation' or "
        f"'parameters' is an option too. Names: {known}",
    )
    add(
        "--data",
        default="movielens",
        help="movielens, synthetic, or a folder with buy.csv[.gz], ...",
    )
    add("--tasks", choices=("units", "nested"), default="units", help="the tasks of MovieLens")
    add("--target", help="the task to rank for (default: buy, or rated 5)")
    add("--seeds", type=int, help="number of training seeds (default 3)")
    add("--search-runs", type=int, help="runs of the random search over weights (default 12)")
    add("--epochs", type=int, help="at most so many epochs (early stopping)")
    add(
        "--tune",
        action="store_true",
        help="search the optimizer's settings for the plain sum, and stop",
    )
    add("--out", type=Path, help="folder for table.md, metrics.csv, settings.json, picture.png")
    add("--resume", action="store_true", help="go on from what --out holds")
    add("--quick", action="store_true", help="two methods, one seed, one epoch")
    given = parser.parse_args(arguments)
    check_numbers(given, ("seeds", "search_runs", "epochs"))

    config = CompareConfig(
        given.data, given.tasks, given.target, tune=given.tune, out=given.out, resume=given.resume
    )
    if given.quick:
        config = replace(config, methods=QUICK_METHODS, seeds=1, search_runs=2)
        config = replace(config, train=replace(config.train, epochs=1))
    if given.method:
        config = replace(config, methods=tuple(dict.fromkeys(given.method)))
    for name in ("seeds", "search_runs"):
        if getattr(given, name) is not None:
            config = replace(config, **{name: getattr(given, name)})
    if given.epochs is not None:
        config = replace(config, train=replace(config.train, epochs=given.epochs))
    for method in set(config.methods) - set(FIXED):
        if nearest(method, FIXED):
            raise UserError(unknown("method", method, FIXED))
        parse_choice(method)
    return config


def compare(config: CompareConfig) -> list[report.Row]:
    """Train everything, print the table, write the files; return the rows."""
    started = time.perf_counter()
    dataset = make_dataset(load_log(config.data, config.target, config.tasks), config.split)
    tables.say(_describe(dataset))
    trainer = Trainer(dataset, config.train, probe_norms=config.out is not None)
    fingerprint = {
        "versions": {"mtl_optax": mtl.__version__, "jax": jax.__version__},
        "train": asdict(config.train),
        "data": digest(dataset),
    }
    runner = Runner(trainer, fingerprint, config.out, config.resume)
    if config.tune:
        _tune(runner)
        return []
    trained, search = _train(runner, config)
    rows = _rows(trainer, config, trained, search)
    baseline = next((row for row in rows if row.label == SUM), None)
    against = report.differences(rows, baseline, dataset.tasks[0]) if baseline else {}
    columns = report.headline_columns(dataset.tasks)
    title = f"{dataset.name} ({config.tasks})" if config.data == "movielens" else dataset.name
    note = f"{report.caption(columns, config.seeds, SUM if baseline else None)} {_settings(config, search)}"
    lines = report.lines_of(rows, columns, against)
    note = f"{note}\n\n{_verdict(rows, dataset.tasks[0].name)}".strip()
    usual = [column.title for column in columns if not column.metric.endswith("new")]
    tables.show(lines, title, note, first=(usual[0], "step", "runs", *usual[1:]))
    if config.out is not None:
        files = {"table.md": tables.markdown(lines, title, note)}
        files |= {"metrics.csv": report.metrics_csv(rows, dataset.tasks)}
        files["settings.json"] = json.dumps({**fingerprint, "seeds": config.seeds}, indent=1) + "\n"
        for name, text in files.items():
            write_atomically(config.out / name, text.encode())
        report.draw(rows, dataset.tasks, config.out / "picture.png")
        tables.say(f"{', '.join(files)} and picture.png are in {config.out}")
    print(f"total {time.perf_counter() - started:.0f} s")
    return rows


def _describe(dataset: Dataset) -> str:
    parts = {"training": dataset.train, "validation": dataset.validation, "test": dataset.test}
    sizes = ", ".join(
        f"{len(part)} {name} pairs ({len(part.positives(0))} of the target)"
        for name, part in parts.items()
    )
    return f"{dataset.name}: {dataset.num_users} users, {dataset.num_items} items; {sizes}"


def _train(
    runner: Runner, config: CompareConfig
) -> tuple[dict[str, list[Run]], tuple[np.ndarray, list[Run]] | None]:
    """The measured runs by label, and the searched weights with the runs of the search."""
    trainer = runner.trainer
    plans = [Plan(seed, trainer.default_setting()) for seed in range(config.seeds)]
    jobs = {name: Job(parse_choice(name), plans) for name in config.methods if name not in FIXED}
    if STANDARDISED in config.methods and trainer.dataset.regression_tasks:
        scaled = trainer.default_setting(weights=_standardising_weights(trainer.dataset))
        jobs[STANDARDISED] = Job(
            _fixed(STANDARDISED), [Plan(seed, scaled) for seed in range(config.seeds)]
        )
    if SEARCHED not in config.methods:
        return dict(zip(jobs, runner.train(list(jobs.values())), strict=True)), None
    # First, since it takes longest.
    weights = _random_weights(len(trainer.dataset.tasks), config.search_runs)
    tried = [Plan(0, trainer.default_setting(weights=chosen)) for chosen in weights]
    searching = Job(_fixed(SEARCHED), tried, measure=False)
    search, *found = runner.train([searching, *jobs.values()])
    best = weights[int(np.argmax([run.best_value for run in search]))]
    final = [Plan(seed, trainer.default_setting(weights=best)) for seed in range(config.seeds)]
    (runs,) = runner.train([Job(_fixed(SEARCHED), final)])
    return {SEARCHED: runs, **dict(zip(jobs, found, strict=True))}, (best, search)


def _fixed(label: str) -> Choice:
    return replace(parse_choice("fixed_weights"), label=label)


def _standardising_weights(dataset: Dataset) -> np.ndarray:
    """`[T]`: 1 for a ranking, 1 / variance of the training labels for a regression."""
    weights = np.ones(len(dataset.tasks))
    for place in dataset.regression_tasks:
        weights[place] = 1 / dataset.train.values[:, place].var()
    return weights


def _random_weights(num_tasks: int, runs: int) -> np.ndarray:
    """`[runs, T]`: 1 for the target, the others of any size; the first row is the plain sum."""
    powers = np.random.default_rng(0).uniform(*SEARCH_POWERS, (runs, num_tasks))
    powers[:, 0] = powers[0] = 0.0
    return 10.0**powers


def _rows(
    trainer: Trainer,
    config: CompareConfig,
    trained: dict[str, list[Run]],
    search: tuple[np.ndarray, list[Run]] | None,
) -> list[report.Row]:
    dataset, names = trainer.dataset, [task.name for task in trainer.dataset.tasks]
    rows = [_popularity(dataset), _untrained(trainer, config.seeds)]
    labels = [name for name in config.methods if name in trained]
    steps = dict.fromkeys(labels)
    if SUM in labels:
        # Fixed weights cost what the sum costs.
        choices = [parse_choice(SUM if name in FIXED else name) for name in labels]
        seconds = step_seconds(trainer, choices)
        ratios = seconds / seconds[labels.index(SUM)]
        steps = dict(zip(labels, map(float, ratios), strict=True))
    for label in labels:
        tasks = names[:1] if label == SINGLE else names
        row = report.row_of_runs(trained[label], tasks, step=steps[label])
        if label == SEARCHED and search is not None:
            runs = [*trained[label], *search[1]]
            row = replace(row, runs=len(runs), seconds=sum(run.seconds for run in runs))
        rows.append(row)
    return rows


def _popularity(dataset: Dataset) -> report.Row:
    """The floor: everybody gets the items with the most training positives of the task."""

    def ranked(place: int, part: int) -> np.ndarray:
        counts = popularity(dataset, place)
        scores = lambda users: np.broadcast_to(counts, (len(users), dataset.num_items))  # noqa: E731
        return rank_by_item_scores(dataset, scores, place, part)[None]

    validation, test = (
        {dataset.tasks[place].name: ranked(place, part) for place in dataset.ranking_tasks}
        for part in (VALIDATION, TEST)
    )
    return report.Row("popularity", validation, test)


def _untrained(trainer: Trainer, seeds: int) -> report.Row:
    measured: dict[int, list[dict[str, np.ndarray]]] = {VALIDATION: [], TEST: []}
    for seed in range(seeds):
        params = trainer.initial(jax.random.key(seed)[None])
        for part, found in measured.items():
            found += trainer.measure(params, part)
    stacked = [
        {name: np.stack([entry[name] for entry in found]) for name in found[0]}
        for found in measured.values()
    ]
    return report.Row("untrained", *stacked)


def _settings(config: CompareConfig, search: tuple[np.ndarray, list[Run]] | None) -> str:
    train, settings = config.train, len(list(itertools.product(*GRID.values())))
    text = (
        f"Every row: {train.optimizer}, learning rate {train.learning_rate:g}, decay of the embeddings "
        f"{train.weight_decay:g} (the best of {settings} settings for {SUM} on the validation set of "
        f"MovieLens-100K with --tasks units, see --tune; nothing was searched for any other row), at most "
        f"{train.epochs} epochs of all training pairs in batches of {train.batch_pairs} with "
        f"{train.negatives} random items each, patience {train.patience}, the epoch with the best "
        f"validation NDCG@10 of {train.validation_users or 'all'} users. {SINGLE}: the target's loss "
        f"alone. {SUM}: all weights 1. Balancing methods: options as written, else defaults; "
        "multibalance on the representation, the others on the losses or the parameters where place= is "
        "not written."
    )
    if STANDARDISED in config.methods:
        text += f" {STANDARDISED}: the sum with each squared error divided by its labels' variance."
    if search is not None:
        weights = ", ".join(f"{weight:.2g}" for weight in search[0])
        low, high = (10.0**power for power in SEARCH_POWERS)
        text += (
            f" {SEARCHED}: ({weights}) is the best of the plain sum and {len(search[1]) - 1} random draws, "
            f"log-uniform in [{low:g}, {high:g}] beside 1 for the target, by the validation NDCG@10 of one "
            "seed."
        )
    return text


def _verdict(rows: Sequence[report.Row], target: str) -> str:
    """The answer in words: which methods reached the searched weights."""
    by_label = {row.label: row for row in rows}
    if SEARCHED not in by_label:
        return ""
    searched = by_label[SEARCHED]
    balanced = [row for row in rows if row.runs and row.label not in (*FIXED, SUM, SINGLE)]
    reached: dict[bool, list[str]] = {True: [], False: []}
    for row in balanced:
        found = paired_difference(row.test[target][..., 0], searched.test[target][..., 0])
        reached[found.mean >= -found.error].append(row.label)
    said = " ".join(
        f"{verb} {', '.join(names)}." for verb, names in
        (("Reached by one run of:", reached[True]), ("Not reached by:", reached[False])) if names
    )  # fmt: skip
    return (
        f"A row reaches the {SEARCHED} ({searched.runs} runs) where its mean test NDCG@10 of {target!r} is "
        f"at most one standard error of the paired difference lower; this is no test of equality. {said}"
    )


def _tune(runner: Runner) -> None:
    """Print the validation NDCG@10 of the plain sum for every setting of the grid."""
    grid = list(itertools.product(*GRID.values()))
    plans = [Plan(0, runner.trainer.default_setting()._replace(**dict(zip(GRID, values, strict=True))))
             for values in grid]  # fmt: skip
    (runs,) = runner.train([Job(parse_choice(SUM), plans, measure=False)])
    for values, run in zip(grid, runs, strict=True):
        named = ", ".join(f"{name} {value:g}" for name, value in zip(GRID, values, strict=True))
        print(f"{named}: validation NDCG@10 {run.best_value:.4f}")


def digest(dataset: Dataset) -> str:
    digest = hashlib.sha256(repr((dataset.name, dataset.tasks)).encode())
    for part in (dataset.train, dataset.validation, dataset.test):
        digest.update(part.pairs.tobytes())
        digest.update(part.values.tobytes())
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """Run the command; see `run_command` for what it returns."""
    return run_command("examples.compare", lambda: parse(arguments), compare)


if __name__ == "__main__":
    sys.exit(main())
