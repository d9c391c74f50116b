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
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

import mtl_optax as mtl
from examples.studies.harness.choices import SINGLE, SUM, Choice, known_methods, parse_choice
from examples.studies.harness.command import CommandLine, nearest, unknown
from examples.studies.harness.errors import UserError
from examples.studies.harness.report import Row, metrics_csv, publish, reference, row, say
from examples.studies.harness.runner import Job, Runner, versions
from examples.studies.harness.runs import Plan, Run
from examples.studies.harness.search import tune
from examples.studies.harness.statistics import expected_best, paired_difference
from examples.studies.harness.timing import interleaved, ratio
from examples.studies.harness.trainer import TEST, VALIDATION
from examples.studies.recommender import report
from examples.studies.recommender.data import Dataset, Split, make_dataset
from examples.studies.recommender.evaluation import rank_by_item_scores
from examples.studies.recommender.network import NetworkConfig
from examples.studies.recommender.sources import MOVIELENS, load_log
from examples.studies.recommender.training import TrainConfig, Trainer, popularity

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
    trainer = Trainer(dataset, options.train, probe_norms=out is not None)
    runner = Runner(trainer, trainer.fingerprint, out, options.resume)
    if options.tune:
        return tune(runner, GRID, "NDCG@10")
    trained, search = train(runner, options)
    rows = rows_of(trainer, options, trained, search)
    target, columns = dataset.tasks[0].name, report.headline(dataset.tasks)
    lines = report.lines_of(rows, columns, report.differences(rows, SUM, target))
    title = f"{dataset.name} ({options.tasks})" if options.data == "movielens" else dataset.name
    caption = report.caption(columns, options.seeds, SUM if SUM in rows else None)
    how = f"{caption} {settings(options, search)}"
    note = "\n\n".join(
        filter(None, (how, verdict(rows, target), worth(rows, search), look(trainer)))
    )
    runs = {label: entry.runs for label, entry in rows.items()}
    about = {**versions(), **trainer.fingerprint, "seeds": options.seeds}
    files = {
        "metrics.csv": metrics_csv(runs, report.metrics(dataset.tasks)),
        "settings.json": json.dumps(about, indent=1) + "\n",
    }
    publish(out, "table", lines, title, note, files)
    if out is not None:
        report.draw(rows, dataset.tasks, out / "picture.png")
        say(f"table.md, {', '.join(files)} and picture.png are in {out}")
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
    labels = [name for name in options.method if name in trained]
    steps = step_times(trainer, labels)
    for label in labels:
        runs = trained[label]
        if label == SINGLE:
            runs = of_target(runs, trainer.dataset)
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
    seconds = interleaved(trainer.step_calls(choices), TIMED_ROUNDS, warm_up=1)
    return {name: ratio(seconds, SUM if name in FIXED else name, SUM) for name in labels}


def popular(dataset: Dataset) -> Row:
    """The floor: everybody gets the items with the most training positives of the task."""
    found: dict[int, dict[str, np.ndarray]] = {VALIDATION: {}, TEST: {}}
    for place in dataset.ranking_tasks:
        counts = popularity(dataset, place)[None]
        for part, metrics in found.items():
            metrics[dataset.tasks[place].name] = rank_by_item_scores(
                dataset, lambda users, counts=counts: counts.repeat(len(users), 0), place, part
            )
    return reference("popularity", *found.values())


def untrained(trainer: Trainer, seeds: int) -> Row:
    """Networks as they begin."""
    runs = []
    for seed in range(seeds):
        params = trainer.initial(np.array([seed]))
        (validation,), (test,) = (trainer.measure(params, part) for part in (VALIDATION, TEST))
        runs.append(Run("untrained", seed, validation, test, 0, 0.0, {}))
    return Row(runs, 0, 0.0)


def settings(options: argparse.Namespace, search: Search | None) -> str:
    """How every row was trained."""
    train = options.train
    text = (
        f"Every row: {train.optimizer}, learning rate {train.learning_rate:g}, decay of the embeddings "
        f"{train.weight_decay:g} (the best for {SUM} on the validation set of MovieLens-100K with --tasks "
        f"units, see --tune; nothing was searched for any other row), at most {train.epochs} epochs of all "
        f"training pairs in batches of {train.batch_pairs} with {train.negatives} random items each, "
        f"patience {train.patience}, the epoch with the best validation NDCG@10 of "
        f"{train.validation_users or 'all'} users. {SINGLE}: the target's loss alone. {SUM}: weights of 1. "
        "Methods have their defaults, and the place of their paper where place= is not written."
    )
    if STANDARDISED in options.method:
        text += f" {STANDARDISED}: the sum with each squared error divided by its labels' variance."
    if search is not None:
        weights = ", ".join(f"{weight:.2g}" for weight in search.weights)
        low, high = (10.0**power for power in SEARCH_POWERS)
        text += (
            f" {SEARCHED}: ({weights}) is the best of the plain sum and {len(search.runs) - 1} random "
            f"draws, log-uniform in [{low:g}, {high:g}] beside 1 for the target, by the validation NDCG@10 "
            "of one seed."
        )
    return text


def balanced(rows: Mapping[str, Row]) -> dict[str, Row]:
    """The rows that a balancing method trained."""
    others = *FIXED, SUM, SINGLE
    return {k: entry for k, entry in rows.items() if entry.trainings and k not in others}


def verdict(rows: Mapping[str, Row], target: str) -> str:
    """The answer in words: which methods reached the searched weights."""
    if SEARCHED not in rows:
        return ""
    base = report.of_users(rows[SEARCHED], target)[0]
    said: dict[str, list[str]] = {"Reached by one run of": [], "Not reached by": []}
    yes, no = said.values()
    for label, entry in balanced(rows).items():
        found = paired_difference(report.of_users(entry, target)[0], base)
        (yes if found.mean >= -found.error else no).append(label)
    return (
        f"A row reaches the {SEARCHED} ({rows[SEARCHED].trainings} runs) where its mean test NDCG@10 of "
        f"{target!r} is at most one standard error of the paired difference lower; this is no test of "
        "equality."
    ) + "".join(f" {verb}: {', '.join(names)}." for verb, names in said.items() if names)


def worth(rows: Mapping[str, Row], search: Search | None) -> str:
    """How many runs of the search are expected to find what one run of each method reached."""
    if search is None:
        return ""
    best = expected_best(np.array([run.best_value for run in search.runs]))
    said = []
    for label, entry in balanced(rows).items():
        reached = np.mean([run.best_value for run in entry.runs])
        needed = int(np.searchsorted(best, reached)) + 1
        said.append(f"{label} {needed if needed <= len(best) else f'more than {len(best)}'}")
    start = "Runs of the search whose best validation NDCG@10 is expected to reach that of one run"
    return f"{start}: {', '.join(said)}." if said else ""


def look(trainer: Trainer) -> str:
    """What the gradients of the shared bottom in the first steps of the plain sum say."""
    choice = parse_choice("sum_tasks(measure=True, place='parameters')")
    step = trainer.make_step(choice, trainer.default_setting())

    @jax.jit
    def state_after(params: Any, slots: Any) -> mtl.BalanceState:
        def one(carry: Any, slot: Any) -> Any:
            params, state, *_ = step.update(*carry, trainer.batch(trainer.data, slot))
            return (params, state), None

        (_, (state, *_)), _ = jax.lax.scan(one, (params, step.init(params)), slots)
        return state

    seeds = np.zeros(1, np.int32)
    slots = jax.tree.map(lambda x: x[0].reshape(-1, *x.shape[3:])[:100], trainer.slots(1, seeds))
    state = state_after(jax.tree.map(lambda x: x[0], trainer.initial(seeds)), slots)
    products = np.asarray(state.rule_state.products).sum(axis=0)
    norms = np.sqrt(np.diagonal(products))
    # By name, since the target is first here and tasks with names are sorted.
    by_name = lambda values: dict(zip(names, values, strict=True))  # noqa: E731
    names = [task.name for task in trainer.dataset.tasks]
    cosines = by_name(map(by_name, products / norms / norms[:, None]))
    advice = mtl.advise({"norms": by_name(norms), "cosines": cosines}, target=names[0])
    return f"The first {int(state.balance_count)} steps of the plain sum. {advice}"


main = CommandLine(
    "examples.compare",
    __doc__,
    compare,
    "method data tasks target seeds search_runs epochs tune out resume quick",
    OPTIONS,
    complete,
)
