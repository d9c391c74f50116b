"""Train one multi-task recommender with several balancing methods and compare them.

    python -m examples.compare                    # MovieLens-100K, tasks in unlike units, three seeds
    python -m examples.compare --quick            # a look in under half a minute
    python -m examples.compare --tasks nested     # three nested labels of one kind
    python -m examples.compare --tasks retrieval  # two losses of one size: nothing is to win
    python -m examples.compare --method sum "metabalance(relax_factor=1)" --data synthetic --out results

Is one run of balancing worth a search over loss weights? The tasks are what the data file holds, in its
own units: which films a user rates 5 (the target) or rates at all, to be ranked; the stars, and the days
since the user's first rating, to be predicted. Every row trains the same network on the same batches with
the same optimizer; `single` is the target's loss alone, and `standardised labels` is the sum with every
squared error divided by its labels' variance. `searched weights` trains with fixed weights that a
random search on the validation set chose, and its row counts what the search cost. The last lines say what
`mtl_optax.advise` makes of the gradients in the first steps of the plain sum.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import optax

import mtl_optax as mtl
from examples.studies.harness.choices import SINGLE, SUM, Choice, known_methods, parse_choice
from examples.studies.harness.command import CommandLine, nearest, unknown
from examples.studies.harness.errors import UserError
from examples.studies.harness.report import Row, metrics_csv, publish, reference, row, say
from examples.studies.harness.runner import Job, Runner
from examples.studies.harness.runs import Plan, Run
from examples.studies.harness.search import tune
from examples.studies.harness.statistics import expected_best, paired_difference
from examples.studies.harness.timing import interleaved, ratio
from examples.studies.harness.trainer import TEST
from examples.studies.recommender import report
from examples.studies.recommender.data import Dataset, Split, make_dataset
from examples.studies.recommender.evaluation import rank_by_item_scores
from examples.studies.recommender.network import NetworkConfig
from examples.studies.recommender.sources import MOVIELENS, load_log
from examples.studies.recommender.training import TrainConfig, Trainer, popularity
from mtl_optax.methods.losses.sum_tasks import MEASURED_STEPS

SEARCHED, STANDARDISED = "searched weights", "standardised labels"
FIXED = (SEARCHED, STANDARDISED)  # rows with weights that this command finds
METHODS = (
    SINGLE, SUM, STANDARDISED, SEARCHED,
    "metabalance", "metabalance(relax_factor=1)",
    "metabalance(relax_factor=1, place='representation')",
    "multibalance", "inverse_norm", "imtl_g", "mgda",
    'emtl(base="mgda", epsilon=0.3, rho=0.3)',  # as in the stored table
    "db_mtl", "gradnorm", "famo", "uncertainty",
)  # fmt: skip
# What is not asked for: of a whole run, and of a quick one.
DEFAULTS = {"method": METHODS, "seeds": 3, "search_runs": 12, "epochs": 5}
QUICK = {"method": (SUM, "metabalance(relax_factor=1)"), "seeds": 1, "search_runs": 2, "epochs": 1}
# The optimizer's settings: the best for the plain sum on the validation set of MovieLens-100K. Running
# `--tune` prints the search again.
GRID = {"learning_rate": (3e-3, 1e-2, 3e-2, 1e-1), "weight_decay": (0.3, 1.0, 3.0)}
TRAIN = TrainConfig(
    epochs=5, negatives=1, validation_users=400, learning_rate=3e-2, weight_decay=1.0,
    network=NetworkConfig(embedding=32, tower=(16,)),
)  # fmt: skip
SOFTMAX_NEGATIVES = 4  # random items of a pair, where a softmax is over them
# The weights of the search, beside 1 for the target: the powers of 10 are uniform.
SEARCH_POWERS = (-6.0, 1.0)
TIMED_ROUNDS = 3
OPTIONS = {
    "method": {
        "nargs": "+",
        "metavar": "METHOD",
        "help": "name, name(option=value), or a chain 'name + name'; place='losses', 'representation' or "
        f"'parameters' is an option too. Names: {', '.join((*FIXED, *known_methods()))}",
    },
    "data": {"default": "movielens", "help": "movielens, synthetic, or a folder of behaviours"},
    "tasks": {"choices": tuple(MOVIELENS), "default": "units", "help": "of MovieLens"},
    "target": {"help": "the behaviour of a folder to rank for (default: buy)"},
    "search_runs": {"type": int, "help": "runs of the random search over weights (default 12)"},
    "tune": {"action": "store_true", "help": "search the plain sum's settings, and stop"},
    "quick": {"help": "two methods, one seed, one epoch"},
}


class Search(NamedTuple):
    """The weights that a search found, and its runs."""

    weights: np.ndarray
    runs: list[Run]


def complete(options: argparse.Namespace) -> None:
    """Fill in what was not asked for, and refuse what is no method."""
    for name, value in (QUICK if options.quick else DEFAULTS).items():
        setattr(options, name, getattr(options, name) or value)
    options.method = tuple(dict.fromkeys(options.method))
    negatives = SOFTMAX_NEGATIVES if options.tasks == "retrieval" else TRAIN.negatives
    options.train = replace(TRAIN, epochs=options.epochs, negatives=negatives)
    for method in set(options.method) - set(FIXED):
        if nearest(method, FIXED):
            raise UserError(unknown("method", method, FIXED))
        parse_choice(method)


def compare(options: argparse.Namespace) -> None:
    """Train everything, print the table and write the files."""
    started, out = time.perf_counter(), options.out
    dataset = make_dataset(load_log(options.data, options.target, options.tasks), Split())
    say(dataset.describe())
    trainer = Trainer(dataset, options.train)
    runner = Runner(trainer, trainer.fingerprint, out, options.resume)
    if options.tune:
        return tune(runner, GRID, "NDCG@10")
    trained, search = train(runner, options)
    rows = rows_of(trainer, options, trained, search)
    target, columns = dataset.tasks[0].name, report.headline(dataset.tasks)
    lines = report.lines_of(rows, columns, report.differences(rows, SUM, target))
    title = f"{dataset.name} ({options.tasks})" if options.data == "movielens" else dataset.name
    caption = report.caption(columns, options.seeds, SUM if SUM in rows else None)
    said = [f"{caption} {settings(options, search)}", look(trainer), f"Made by `{options.line}`."]
    if search is not None:
        said.insert(1, against_search(rows, search, target))
    runs = {label: entry.runs for label, entry in rows.items()}
    files = {"metrics.csv": metrics_csv(runs, report.metrics(dataset.tasks))}
    publish(out, "table", lines, title, "\n\n".join(said), files)
    if out is not None:
        report.draw(rows, dataset.tasks, out / "picture.png")
    print(f"total {time.perf_counter() - started:.0f} s")
    return None


def train(
    runner: Runner, options: argparse.Namespace
) -> tuple[dict[str, list[Run]], Search | None]:
    """The measured runs by label, and what the search found."""
    trainer, dataset = runner.trainer, runner.trainer.dataset

    def job(choice: Choice, **knobs: np.ndarray) -> Job:
        setting = trainer.default_setting(**knobs)
        return Job(choice, [Plan(seed, setting) for seed in range(options.seeds)])

    jobs = {name: job(parse_choice(name)) for name in options.method if name not in FIXED}
    if STANDARDISED in options.method and dataset.regression_tasks:
        jobs[STANDARDISED] = job(fixed(STANDARDISED), weights=standardising_weights(dataset))
    if SEARCHED not in options.method:
        return dict(zip(jobs, runner.train(list(jobs.values())), strict=True)), None
    # First, since it takes longest.
    weights = random_weights(len(dataset.tasks), options.search_runs)
    tried = [Plan(0, trainer.default_setting(weights=chosen)) for chosen in weights]
    searching = Job(fixed(SEARCHED), tried, measure=False)
    searched, *found = runner.train([searching, *jobs.values()])
    best = weights[int(np.argmax([run.best_value for run in searched]))]
    (runs,) = runner.train([job(fixed(SEARCHED), weights=best)])
    return {SEARCHED: runs, **dict(zip(jobs, found, strict=True))}, Search(best, searched)


def fixed(label: str) -> Choice:
    """Fixed weights under a label."""
    return replace(parse_choice("fixed_weights"), label=label)


def standardising_weights(dataset: Dataset) -> np.ndarray:
    """`[T]`: 1 for a ranking, 1 / variance of the training labels for a regression."""
    weights = np.ones(len(dataset.tasks))
    for place in dataset.regression_tasks:
        weights[place] = 1 / dataset.train.values[:, place].var()
    return weights


def random_weights(num_tasks: int, runs: int) -> np.ndarray:
    """`[runs, T]`: 1 for the target, the others of any size; the first row is the plain sum."""
    powers = np.random.default_rng(0).uniform(*SEARCH_POWERS, (runs, num_tasks))
    powers[:, 0] = powers[0] = 0.0
    return 10.0**powers


def rows_of(
    trainer: Trainer,
    options: argparse.Namespace,
    trained: Mapping[str, list[Run]],
    search: Search | None,
) -> dict[str, Row]:
    """The rows of the table: those that train nothing, then the trained ones as they were asked for."""
    rows = {"popularity": popular(trainer.dataset), "untrained": untrained(trainer, options.seeds)}
    steps = step_times(trainer, list(trained))
    for label in filter(trained.get, options.method):
        runs = of_target(trained[label], trainer.dataset) if label == SINGLE else trained[label]
        searched = search.runs if search is not None and label == SEARCHED else ()
        rows[label] = row(runs, searched)._replace(step=steps.get(label))
    return rows


def of_target(runs: Sequence[Run], dataset: Dataset) -> list[Run]:
    """Runs that say nothing of the other tasks, which they did not train."""
    target = dataset.tasks[0].name
    return [replace(run, test={k: v for k, v in run.test.items() if k == target}) for run in runs]


def step_times(trainer: Trainer, labels: Sequence[str]) -> dict[str, float]:
    """The time of a step over the plain sum's, where that is a row; fixed weights cost what it costs."""
    if SUM not in labels:
        return {}
    choices = [parse_choice(name) for name in labels if name not in FIXED]
    # Their training has compiled them; after --resume the median leaves out the round that compiles.
    seconds = interleaved(trainer.step_calls(choices), TIMED_ROUNDS, warm_up=0)
    return {name: ratio(seconds, SUM if name in FIXED else name, SUM) for name in labels}


def popular(dataset: Dataset) -> Row:
    """The floor: everybody gets the items with the most training positives of the task."""
    found = {}
    for place in dataset.ranking_tasks:
        counts = popularity(dataset, place)[None]
        scores = lambda users, counts=counts: counts.repeat(len(users), 0)  # noqa: E731
        found[dataset.tasks[place].name] = rank_by_item_scores(dataset, scores, place)
    return reference("popularity", {}, found)


def untrained(trainer: Trainer, seeds: int) -> Row:
    """Networks as they begin."""
    runs = []
    for seed in range(seeds):
        (test,) = trainer.measure(trainer.initial(np.array([seed])), TEST)
        runs.append(Run("untrained", seed, {}, test, 0, 0.0, {}))
    return Row(runs, 0, 0.0)


def settings(options: argparse.Namespace, search: Search | None) -> str:
    """How every row was trained."""
    text = (
        f"Every row is trained with `{options.train}`; learning rate and decay are the best of --tune "
        f"for {SUM} with --tasks units, and nothing was searched for any other row. {SINGLE}: the "
        f"target's loss alone. {SUM}: weights of 1. {STANDARDISED}: the sum with each squared error "
        "divided by its labels' variance. Methods have their defaults, and the place of their paper "
        "where place= is not written."
    )
    if search is not None:
        weights = ", ".join(f"{weight:.2g}" for weight in search.weights)
        low, high = (10.0**power for power in SEARCH_POWERS)
        text += (
            f" {SEARCHED}: ({weights}) is the best of the plain sum and {len(search.runs) - 1} random "
            f"draws, log-uniform in [{low:g}, {high:g}] beside 1 for the target, by the validation NDCG@10 "
            "of one seed."
        )
    return text


def against_search(rows: Mapping[str, Row], search: Search, target: str) -> str:
    """Which methods reached the searched weights, and how many runs of the search do as well as one."""
    base = report.of_users(rows[SEARCHED], target)[0]
    best = expected_best(np.array([run.best_value for run in search.runs]))
    said = []
    for label, entry in rows.items():
        if entry.trainings and label not in (*FIXED, SUM, SINGLE):
            found = paired_difference(report.of_users(entry, target)[0], base)
            reached = "yes" if found.mean >= -found.error else "no"
            needed = np.searchsorted(best, np.mean([run.best_value for run in entry.runs])) + 1
            worth = needed if needed <= len(best) else f"more than {len(best)}"
            said.append(f"{label}: {reached}, {worth}")
    return (
        f"Does one run reach the {SEARCHED}, with a mean test NDCG@10 of {target!r} at most one standard "
        "error of the paired difference lower (no test of equality)? And how many runs of the search are "
        f"expected to reach its validation NDCG@10? {'; '.join(said)}."
    )


def look(trainer: Trainer) -> str:
    """What the gradients of the shared bottom in the first steps of the plain sum say."""
    plan = Plan(0, trainer.default_setting())
    choice = parse_choice("sum_tasks(measure=True, place='parameters')")
    program, setting, params, state = trainer.begin(choice, [plan])
    calls = -(-MEASURED_STEPS // trainer.steps_at_once)
    for part in trainer.epoch_parts(1, np.zeros(1, np.int32))[:calls]:
        params, state, _ = program.steps(trainer.data, params, state, part, setting)
    products = np.asarray(optax.tree.get(state, "products"))[0].sum(axis=0)
    norms = np.sqrt(np.diagonal(products))
    # By name, since the target is first here and tasks with names are sorted.
    names = [task.name for task in trainer.dataset.tasks]
    of_norms, *cosines = (
        dict(zip(names, row.tolist(), strict=True))
        for row in (norms, *(products / norms / norms[:, None]))
    )
    by_name = {"norms": of_norms, "cosines": dict(zip(names, cosines, strict=True))}
    steps = min(MEASURED_STEPS, int(mtl.diagnostics(state)["steps"][0]))
    return f"The first {steps} steps of the plain sum. {mtl.advise(by_name, target=names[0])}"


main = CommandLine(
    "examples.compare",
    __doc__,
    compare,
    "method data tasks target seeds search_runs epochs tune out resume quick",
    OPTIONS,
    complete,
)
