"""The rows of a table, each tuned with as many trials as the others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np

from examples.studies.harness.choices import Choice, parse_choice
from examples.studies.harness.runner import Job, Runner
from examples.studies.harness.runs import Plan, Run, Setting

Draw = Callable[[np.random.Generator, int], Any]


def uniform(low: float, high: float) -> Draw:
    """A knob between two bounds."""
    return lambda generator, num_tasks: generator.uniform(low, high)


def log_uniform(low: float, high: float) -> Draw:
    """A knob whose logarithm is uniform."""
    return lambda generator, num_tasks: np.exp(generator.uniform(np.log(low), np.log(high)))


def ema_decay(low: float, high: float) -> Draw:
    """A decay; the logarithm of what it leaves out, between two bounds, is uniform."""
    left_out = log_uniform(low, high)
    return lambda generator, num_tasks: 1.0 - left_out(generator, num_tasks)


@dataclass(frozen=True)
class Entry:
    """A row: what is trained, and what its trials search beside the learning rate.

    Attributes:
      label: as the paper calls it.
      choice: as `--method` of `examples.compare` reads it.
      knobs: the options that are searched: drawn at random, or the values of a grid in turn.
      start: the knobs of the first trial: the paper's value, or the method's default.
    """

    label: str
    choice: str
    knobs: Mapping[str, Draw | Sequence[float]] = field(default_factory=dict)
    start: Mapping[str, Any] = field(default_factory=dict)

    def parsed(self) -> Choice:
        """The choice under the row's label."""
        found = parse_choice(self.choice)
        return Choice(self.label, found.parts, found.place)

    def trials(self, count: int, num_tasks: int, config: Any) -> list[Plan]:
        """Settings of seed 0: the first is the start, the others are drawn, or the next of a grid.

        `config` has the learning rate and the weight decay of the first. A trial has the same two in every
        row, whatever options the row has.
        """
        of_knobs, of_settings = np.random.default_rng(1).spawn(2)
        rate, decay = config.learning_rate, config.weight_decay
        start = {k: np.ones(num_tasks) if k == "weights" else v for k, v in self.start.items()}
        plans = [Plan(0, Setting(rate, decay, start))]
        factor = log_uniform(1 / 3, 3)
        for trial in range(1, count):
            drawn = {
                name: knob(of_knobs, num_tasks) if callable(knob) else knob[trial % len(knob)]
                for name, knob in self.knobs.items()
            }
            scaled = (value * factor(of_settings, num_tasks) for value in (rate, decay))
            plans.append(Plan(0, Setting(*scaled, drawn)))
        return plans


@dataclass(frozen=True)
class Tuned:
    """A row with the best of its trials.

    Attributes:
      entry: what was trained.
      plan: the best trial's.
      searched: the runs of the trials.
      runs: of the best trial's setting, one a seed, with test metrics.
    """

    entry: Entry
    plan: Plan
    searched: Sequence[Run]
    runs: Sequence[Run]


def tuned(runner: Runner, entries: Sequence[Entry], trials: int, seeds: int) -> list[Tuned]:
    """Every entry with the best of its trials on the validation set, over all seeds.

    The runner's trainer has a `dataset` with tasks and a `config` with the settings to start from.
    """
    trainer = runner.trainer
    tasks = len(trainer.dataset.tasks)
    plans = [entry.trials(trials, tasks, trainer.config) for entry in entries]
    jobs = [
        Job(entry.parsed(), found, measure=False)
        for entry, found in zip(entries, plans, strict=True)
    ]
    searched = runner.train(jobs)
    best = [
        of_entry[int(np.argmax([run.best_value for run in runs]))]
        for of_entry, runs in zip(plans, searched, strict=True)
    ]
    measured = _over_seeds(runner, entries, best, seeds)
    return [Tuned(*row) for row in zip(entries, best, searched, measured, strict=True)]


def untuned(runner: Runner, entries: Sequence[Entry], seeds: int) -> dict[str, list[Run]]:
    """Every entry with its starting knobs, over all seeds, by label."""
    tasks, config = len(runner.trainer.dataset.tasks), runner.trainer.config
    plans = [entry.trials(1, tasks, config)[0] for entry in entries]
    found = _over_seeds(runner, entries, plans, seeds)
    return {entry.label: runs for entry, runs in zip(entries, found, strict=True)}


def _over_seeds(
    runner: Runner, entries: Sequence[Entry], plans: Sequence[Plan], seeds: int
) -> list[list[Run]]:
    jobs = [
        Job(entry.parsed(), [replace(plan, seed=seed) for seed in range(seeds)])
        for entry, plan in zip(entries, plans, strict=True)
    ]
    return runner.train(jobs)


def tune(runner: Runner, grid: Mapping[str, Sequence[float]], name: str) -> None:
    """Print the validation value of the plain sum, called `name`, for all settings of a grid."""
    settings = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    default = runner.trainer.default_setting()
    plans = [Plan(0, default._replace(**setting)) for setting in settings]
    (runs,) = runner.train([Job(parse_choice("sum"), plans, measure=False)])
    for setting, run in zip(settings, runs, strict=True):
        named = ", ".join(f"{key} {value:g}" for key, value in setting.items())
        value = f"{abs(run.best_value):.4f} in epoch {run.best_epoch}, {run.seconds:.1f} s"
        print(f"{named}: validation {name} {value}")


def tuning_note(trials: int, chosen: Mapping[str, Plan]) -> str:
    """What was searched for every row, and what was found."""
    found = "; ".join(f"{label}: {setting_in_words(plan)}" for label, plan in chosen.items())
    return (
        f"Every row, the plain sum too, had {trials} trials of seed 0 on the validation set: the first "
        "with the default settings, the others with a learning rate and a decay of the tables up to 3 "
        f"times smaller or larger and other options of its own. Chosen: {found}."
    )


def setting_in_words(plan: Plan) -> str:
    """The learning rate, the decay and the options of a plan."""
    rate, decay = float(plan.setting.learning_rate), float(plan.setting.weight_decay)
    found = [f"learning rate {rate:.2g}, decay {decay:.2g}"]
    for name, value in plan.setting.knobs.items():
        numbers = ", ".join(f"{number:.2g}" for number in np.ravel(value))
        found.append(f"{name} {numbers}")
    return ", ".join(found)
