"""Who did what with which item, and the training, validation and test sets made of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
import pandas as pd
from flax import struct

from examples.studies.harness import data
from examples.studies.harness.data import BINARY, REGRESSION, Task
from examples.studies.harness.errors import UserError


@struct.dataclass
class Interactions:
    """Distinct pairs with their labels.

    Attributes:
      pairs: `[P, 2]` int32, users and items, sorted by user, then by item.
      values: `[P, T]` float32. Ranking, a binary task: 1 where the pair is a positive, else 0.
        Regression: the number.
    """

    pairs: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.pairs)

    def where(self, chosen: np.ndarray) -> "Interactions":
        """The chosen rows, in the same order."""
        return jax.tree.map(lambda rows: rows[chosen], self)

    def positives(self, task: int) -> np.ndarray:
        """The pairs `[N, 2]` that are positives of a ranking task."""
        return self.pairs[self.values[:, task] > 0]


@dataclass(frozen=True)
class Log:
    """Everything that was recorded; the first task is the target."""

    name: str
    num_users: int
    num_items: int
    tasks: tuple[Task, ...]
    interactions: Interactions


@dataclass(frozen=True)
class Dataset(data.Dataset[Interactions]):
    """What training and evaluation read; no pair is in two of the three sets."""

    num_users: int
    num_items: int

    @property
    def ranking_tasks(self) -> list[int]:
        """The places of the ranking tasks; the target's is 0."""
        return [place for place, task in enumerate(self.tasks) if task.kind == BINARY]

    @property
    def regression_tasks(self) -> list[int]:
        """The places of the regression tasks."""
        return [place for place, task in enumerate(self.tasks) if task.kind == REGRESSION]

    def describe(self) -> str:
        """Sizes in a few words: of the sets, and of all pairs of each ranking task."""
        parts = {"training": self.train, "validation": self.validation, "test": self.test}
        sizes = ", ".join(
            f"{len(part)} {name} pairs ({len(part.positives(0))} of the target)"
            for name, part in parts.items()
        )
        said = [f"{self.num_users} users, {self.num_items} items", sizes]
        for place in self.ranking_tasks:
            count = sum(len(part.positives(place)) for part in parts.values())
            density = count / self.num_users / self.num_items
            said.append(f"{self.tasks[place].name}: {count} pairs, density {density:.4%}")
        return f"{self.name}: {'; '.join(said)}"


@dataclass(frozen=True)
class Split:
    """Shares of the pairs that are held out.

    Attributes:
      validation, test: of the target's positives.
      others: of all other pairs, in each of the two sets; 0 keeps every auxiliary pair for training.
      by_user: cut the same shares from every user, rather than from all pairs together.
      seed: of the data's split, not of the training.
    """

    validation: float = 0.2
    test: float = 0.2
    others: float = 0.1
    by_user: bool = True
    seed: int = 0


# MetaBalance, appendix A.2: purchases at random, and all auxiliary pairs that are left for training.
PAPER_SPLIT = Split(validation=0.1, test=0.2, others=0.0, by_user=False)


def behaviours(name: str, num_users: int, num_items: int, pairs: Mapping[str, np.ndarray]) -> Log:
    """A log of ranking tasks from the pairs `[N, 2]` of each behaviour, the target first."""
    stacked = np.concatenate([np.asarray(found).reshape(-1, 2) for found in pairs.values()])
    keys = stacked[:, 0].astype(np.int64) * num_items + stacked[:, 1]
    task = np.repeat(np.arange(len(pairs)), [len(found) for found in pairs.values()])
    distinct, place = np.unique(keys, return_inverse=True)
    values = np.zeros((len(distinct), len(pairs)), np.float32)
    values[place, task] = 1
    both = np.stack([distinct // num_items, distinct % num_items], axis=1).astype(np.int32)
    tasks = tuple(Task(behaviour) for behaviour in pairs)
    return Log(name, num_users, num_items, tasks, Interactions(both, values))


def make_dataset(log: Log, split: Split) -> Dataset:
    """Hold pairs out for validation and test.

    A pair is held out with all of its labels. Otherwise the test set leaks: a rating of 5 is also "a
    rating", four of five purchases are also views, and an auxiliary task would teach the shared bottom
    the very pairs that are to be ranked.
    """
    is_target = log.interactions.values[:, 0] > 0
    part = np.zeros(len(is_target), np.int8)
    generator = np.random.default_rng(split.seed)
    for group, validation, test in (
        (is_target, split.validation, split.test),
        (~is_target, split.others, split.others),
    ):
        users = log.interactions.pairs[group, 0]
        groups = users if split.by_user else np.zeros_like(users)
        part[group] = _split_groups(groups, validation, test, generator)
    sets = [log.interactions.where(part == which) for which in range(3)]
    if not all(len(found.positives(0)) for found in sets):
        raise UserError("the target task has too few pairs a user to hold some out (5 are needed)")
    return Dataset(log.name, log.tasks, *sets, log.num_users, log.num_items)


def _split_groups(
    groups: np.ndarray, validation: float, test: float, generator: np.random.Generator
) -> np.ndarray:
    """0 (training), 1 (validation) or 2 (test) for each pair of the `groups`.

    The same shares are cut from each, rounded down: a user with few pairs keeps them for training.
    """
    drawn = pd.Series(generator.random(len(groups))).groupby(groups)
    # The place of each pair in its group, from 1, and the group's size.
    place, count = np.asarray(drawn.rank()), np.asarray(drawn.transform("size"))
    all_held_out = place <= np.floor((test + validation) * count)
    return np.where(place <= np.floor(test * count), 2, all_held_out)
