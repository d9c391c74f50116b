"""Which runs answer the question, in the order of their importance, and their rows on disk."""

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.studies.harness.choices import SINGLE, SUM, parse_choice
from examples.studies.harness.command import in_threads, write_atomically
from examples.studies.harness.errors import UserError
from examples.studies.harness.report import say
from examples.studies.harness.runs import Plan, Run
from examples.studies.metabalance.knn import item_knn_scores
from examples.studies.recommender.data import PAPER_SPLIT, Dataset, make_dataset
from examples.studies.recommender.evaluation import COLUMNS, rank_by_item_scores
from examples.studies.recommender.sources import folder, synthetic
from examples.studies.regimes import report
from examples.studies.regimes.regimes import REGIMES, Regime
from examples.studies.regimes.training import TrainConfig, Trainer, sparse

# One for all auxiliaries, most important first.
WEIGHTS = (1.0, 0.0, 0.1, 10.0, 100.0, 0.01, 0.3, 3.0)
RATES, DECAYS = (3e-3, 1e-3, 1e-2), (3.0, 0.3)
POOL, POOL_POWERS = 16, (-2.0, 2.0)  # the random weightings of a search
TUNING_SEED = 1000  # and the next ones; what is measured has seeds from 0
FIXED = "fixed weights"
# Whose arms are measured in any case: losses of two kinds (c), where the question came from, auxiliaries
# that dominate (e), and auxiliaries that would help (weight 0 is worse in a) but are too small (u).
ALWAYS = ("c", "e", "u")
# On the parameters, whatever their cost: the towers of all arms have weight 1, as MetaBalance's do.
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    SINGLE: ("fixed_weights(place='parameters')", {}),
    SUM: ("fixed_weights(place='parameters')", {}),
    FIXED: ("fixed_weights(place='parameters')", {}),
    "metabalance, r = 0.5": ("metabalance", {"relax_factor": 0.5}),
    "metabalance, r = 1": ("metabalance", {"relax_factor": 1.0}),
    "inverse_norm": ("inverse_norm", {}),
    "imtl_g": ("imtl_g", {}),
    "multibalance": ("multibalance", {}),
    "gradnorm": ("gradnorm", {}),
}
METHODS = tuple(CHOICES)[3:]
SIDE_BY_SIDE = 27  # runs of a program on an accelerator
ROWS = "rows.jsonl"


class Trial(NamedTuple):
    """A run, and what it is for: "tuning", "curve", "arm" or "pool"."""

    part: str
    regime: str
    arm: str
    seed: int
    rate: float
    decay: float
    weights: tuple[float, ...] = ()

    @property
    def key(self) -> str:
        """The same for the same run."""
        return json.dumps(self)


class Rows:
    """The finished runs, one line of a file each, written at once; several files may be put together."""

    def __init__(self, out: Path | None, about: dict[str, Any], resume: bool):
        self._path = out and out / ROWS
        self._lock = threading.Lock()
        self.about, self.found = about, {}
        if self._path is None:
            return
        if resume and self._path.exists():
            self.about, self.found = read_rows(self._path)
            if self.about["fingerprint"] != about["fingerprint"]:
                raise UserError(f"{self._path} has runs of other data or another training")
        # Anew without the line that was cut off, if one was.
        lines = [{"about": self.about}, *self.found.values()]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(self._path, text.encode())

    def add(self, trial: Trial, row: dict[str, Any]) -> None:
        """Keep a run."""
        row = {**trial._asdict(), **row}
        with self._lock:
            self.found[trial.key] = row
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(row) + "\n")

    def of(self, **wanted: Any) -> list[dict[str, Any]]:
        """The rows with these fields."""
        return report.where(self.found.values(), **wanted)


def read_rows(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What the runs of a file have in common, and the runs by key; a line that was cut off is left out."""
    about: dict[str, Any] = {}
    found = {}
    for line in path.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "about" in row:
            about = row["about"]
            continue
        fields = {name: row[name] for name in Trial._fields}
        found[Trial(**fields | {"weights": tuple(fields["weights"])}).key] = row
    return about, found


class Study:
    """The command under way."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.dataset = load(options.data)
        config = TrainConfig()
        if options.epochs:
            config = TrainConfig(epochs=options.epochs, patience=options.epochs)
        # A program for each pair of losses.
        self.trainers = {
            kinds: Trainer(self.dataset, config, kinds)
            for kinds in dict.fromkeys(regime.kinds for regime in REGIMES)
        }
        self.trainer = next(iter(self.trainers.values()))
        self.tasks = len(self.dataset.tasks)
        about = {
            "fingerprint": self.trainer.fingerprint,
            "data": self.dataset.name,
            "tasks": [task.name for task in self.dataset.tasks],
            "references": references(self.dataset),
        }
        self.rows = Rows(options.out, about, options.resume)
        self._stopping = threading.Event()

    # --- the plan -----------------------------------------------------------------------------------

    def tuning(self, arms: Sequence[str], regimes: Sequence[str]) -> list[Trial]:
        """Every arm with every setting, a few seeds each."""
        return [
            Trial("tuning", regime, arm, TUNING_SEED + seed, rate, decay, self.weights(arm))
            for arm in arms
            for regime in regimes
            for seed in range(self.options.tuning_seeds)
            for rate in RATES
            for decay in DECAYS
        ]

    def curves(self) -> list[Trial]:
        """One common weight of the auxiliaries, with the setting of the regime's sum."""
        return [
            Trial("curve", regime.name, FIXED, seed, *self.best(SUM, regime.name),
                  (1.0, *[weight] * (self.tasks - 1)))
            for weight in WEIGHTS
            for seed in range(self.options.curve_seeds)
            for regime in REGIMES
        ]  # fmt: skip

    def arms(self, regimes: Sequence[str]) -> list[Trial]:
        """Every arm with its best setting, over fresh seeds."""
        pairs = [(SUM, regime) for regime in dict.fromkeys((*regimes, "s", "a"))]
        pairs += [(arm, regime) for regime in regimes for arm in (SINGLE, *METHODS)]
        return [
            Trial("arm", regime, arm, seed, *self.best(arm, regime), self.weights(arm))
            for arm, regime in pairs
            for seed in range(self.options.seeds)
        ]

    def pool(self, regimes: Sequence[str]) -> list[Trial]:
        """Random weightings, the first the plain sum, with its setting."""
        powers = np.random.default_rng(0).uniform(*POOL_POWERS, (POOL, self.tasks))
        powers[:, 0] = powers[0] = 0.0
        return [
            Trial("pool", regime, FIXED, seed, *self.best(SUM, regime), tuple(map(float, weights)))
            for regime in regimes
            for seed in range(self.options.seeds)
            for weights in np.round(10.0**powers, 4)
        ]

    def weights(self, arm: str) -> tuple[float, ...]:
        """Of an arm with fixed weights."""
        others = {SUM: 1.0, SINGLE: 0.0}
        return (1.0, *[others[arm]] * (self.tasks - 1)) if arm in others else ()

    def best(self, arm: str, regime: str) -> tuple[float, float]:
        """The rate and decay with the best mean validation value."""
        found = report.by_setting(self.rows.of(part="tuning", arm=arm, regime=regime))
        default = self.trainer.config.learning_rate, self.trainer.config.weight_decay
        return max(found, key=lambda s: found[s], default=default)

    # --- the work -----------------------------------------------------------------------------------

    def train(self, trials: Iterable[Trial]) -> None:
        """Train what is missing; on an accelerator many runs of one program side by side."""
        size = SIDE_BY_SIDE if self.trainer.side_by_side else 1
        programs: dict[Any, list[Trial]] = {}
        for trial in trials:
            if trial.key not in self.rows.found:
                program = self._regime(trial).kinds, CHOICES[trial.arm][0]
                programs.setdefault(program, []).append(trial)
        # The first runs of every program before the others, so that no two threads compile the same.
        for first in (True, False):
            groups = [
                missing[start : start + size]
                for missing in programs.values()
                for start in range(0, len(missing), size)
                if (start == 0) == first
            ]
            in_threads(self._train_group, groups, self.options.jobs, self._stopping)

    def _train_group(self, group: list[Trial]) -> None:
        began = time.monotonic()
        plans = [Plan(trial.seed, self._setting(trial)) for trial in group]
        size = SIDE_BY_SIDE if self.trainer.side_by_side else 1
        plans += plans[-1:] * (size - len(plans))  # of one shape, so that nothing compiles again
        try:
            trainer = self.trainers[self._regime(group[0]).kinds]
            runs = trainer.train(parse_choice(CHOICES[group[0].arm][0]), plans)
        except Exception as error:  # the other groups are worth having
            print(f"failed: {group[0].arm}: {type(error).__name__}: {error}", file=sys.stderr)
            return
        for trial, run in zip(group, runs, strict=False):
            self.rows.add(trial, self._row(trial, run))
        print(
            f"{len(self.rows.found)} runs; {group[0].part}, {group[0].arm}: {len(group)} in "
            f"{time.monotonic() - began:.1f} s",
            file=sys.stderr,
            flush=True,
        )

    def _regime(self, trial: Trial) -> Regime:
        return next(regime for regime in REGIMES if regime.name == trial.regime)

    def _setting(self, trial: Trial) -> Any:
        knobs = dict(CHOICES[trial.arm][1])
        if trial.weights:
            knobs["weights"] = np.array(trial.weights)
        return self.trainer.setting(self._regime(trial), trial.rate, trial.decay, **knobs)

    def _row(self, trial: Trial, run: Run) -> dict[str, Any]:
        target = self.dataset.tasks[0].name
        test, upto = run.test[target], slice(run.best_epoch)
        geometric = {
            name: np.exp(run.history[f"log_{name}"][upto].mean(axis=0)).round(6).tolist()
            for name in ("weights", "norms")
        }
        row = {
            "validation": run.best_value,
            "ndcg": test.mean(axis=0).tolist(),
            "epoch": run.best_epoch,
            "seconds": round(run.seconds, 2),
            **{f"relative_{name}": values for name, values in geometric.items()},
            "cosines": run.history["cosines"][upto].mean(axis=0).round(4).tolist(),
        }
        if trial.part in ("arm", "pool"):
            row |= {"users": sparse(test[:, 0]), "num_users": len(test)}
        return row


def load(data: str) -> Dataset:
    """Purchases with views and favourites, or generated behaviours; MetaBalance's split without leaks."""
    if data == "synthetic":
        return make_dataset(synthetic(), PAPER_SPLIT)
    return make_dataset(folder(Path(data), "buy", ("fav", "view")), PAPER_SPLIT)


def references(dataset: Dataset) -> dict[str, list[float]]:
    """NDCG@10 of item-kNN under both protocols, by the target's pairs and by all."""
    shown = [COLUMNS.index(f"ndcg@10, {protocol}") for protocol in report.PROTOCOLS]
    found = {}
    for label, tasks in (("target", [0]), ("all", dataset.ranking_tasks)):
        metrics = rank_by_item_scores(dataset, item_knn_scores(dataset, tasks))
        found[label] = np.nanmean(metrics[:, shown], axis=0).tolist()
    return found


def run(options: argparse.Namespace) -> None:
    """Train everything, most important first, and show it."""
    study = Study(options)
    found = study.rows.found.values()
    every = [regime.name for regime in REGIMES]
    sizes = {
        "tuning of the sum in every regime": len(study.tuning([SUM], every)),
        "curves": len(study.curves()),
        "tuning of the arms": len(study.tuning((SINGLE, *METHODS), every[:6])),
        "arms": len(study.arms(every[:6])),
        "random weightings": len(study.pool(every[:6])),
    }
    for text, count in sizes.items():
        say(f"{text}: {count} runs")
    say(f"in all about {sum(sizes.values())} runs, of which {len(study.rows.found)} are stored")
    study.train(study.tuning([SUM], every))
    study.train(study.curves())
    say(report.admission(found, study.rows.about["references"]))
    for regime in dict.fromkeys((*ALWAYS, *report.chosen_regimes(found))):
        study.train(study.tuning((SINGLE, *METHODS), [regime]))
        study.train(study.arms([regime]))
        study.train(study.pool([regime]))
    report.show(found, study.rows.about["references"], options.out)


def tables(options: argparse.Namespace) -> None:
    """The tables and pictures of stored rows, which may come from another machine."""
    read = [read_rows(path) for path in options.rows]
    found = {key: row for _, rows in read for key, row in rows.items()}
    report.show(found.values(), read[0][0]["references"], options.out)
