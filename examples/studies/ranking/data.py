"""Examples with features and one label a task, and the training, validation and test sets of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import numpy as np

from examples.models.layers import Features, FeatureSpec
from examples.studies.harness import data
from examples.studies.harness.data import REGRESSION
from examples.studies.harness.errors import UserError


class Examples(NamedTuple):
    """Rows of a table.

    Attributes:
      features: numerical `[N, F]` float32 and categorical `[N, C]` int32.
      labels: `[N, T]` float32; 0 where there is none.
      mask: `[N, T]` float32, 1 where the example counts for the task: a conversion rate counts clicks.
    """

    features: Features
    labels: np.ndarray
    mask: np.ndarray

    @property
    def size(self) -> int:
        """How many examples there are."""
        return len(self.labels)

    def where(self, rows: np.ndarray) -> "Examples":
        """The chosen rows."""
        return jax.tree.map(lambda column: column[rows], self)


@dataclass(frozen=True)
class Dataset(data.Dataset[Examples]):
    """What training and evaluation read.

    Attributes:
      features: the widths of the features.
      truth: for generated data what the best possible model says of the test set, `[N, T]`: the logit of
        the true probability, or the true mean of a regression.
    """

    features: FeatureSpec
    truth: np.ndarray | None = None

    def only(self, names: Sequence[str]) -> "Dataset":
        """The same data with some of the tasks, in the order of `names`."""
        known = [task.name for task in self.tasks]
        if unknown := ", ".join(sorted(set(names) - set(known))):
            raise UserError(f"{self.name}: no task {unknown}; choose from {', '.join(known)}")
        places = [known.index(name) for name in names]
        parts = {
            name: (part := getattr(self, name))._replace(
                labels=part.labels[:, places], mask=part.mask[:, places]
            )
            for name in ("train", "validation", "test")
        }
        truth = None if self.truth is None else self.truth[:, places]
        return replace(self, tasks=tuple(map(self.tasks.__getitem__, places)), truth=truth, **parts)

    def describe(self) -> str:
        """Sizes and rates in a few words."""
        sizes = f"{self.train.size:,} + {self.validation.size:,} + {self.test.size:,} examples"
        said = []
        for place, task in enumerate(self.tasks):
            labels = self.train.labels[:, place][self.train.mask[:, place] > 0]
            text = f"{task.name} {labels.mean():.4g}"
            if task.kind == REGRESSION:
                text += f" ± {labels.std():.3g} {task.unit}".rstrip()
            if len(labels) < self.train.size:
                text += f" of {len(labels):,}"
            said.append(text)
        return f"{self.name}: {sizes}; training means: {', '.join(said)}"


def split_rows(number: int, shares: Sequence[float], seed: int = 0) -> list[np.ndarray]:
    """Disjoint random sets of rows, the last with all that the others leave; sorted."""
    order = np.random.default_rng(seed).permutation(number)
    ends = np.cumsum([round(share * number) for share in shares])
    return [np.sort(rows) for rows in np.split(order, ends)]


def standardise(column: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1 on the training rows; an unknown number becomes the mean.

    A column of large numbers, such as an amount of money, goes through asinh first, which is the
    logarithm of a large number and keeps a small one as it is.
    """
    column = np.asarray(column, np.float64)
    if np.nanmax(np.abs(column[train]), initial=0.0) > 100:
        column = np.arcsinh(column)
    mean, deviation = np.nanmean(column[train]), np.nanstd(column[train])
    scaled = (column - mean) / (deviation if deviation > 0 else 1.0)
    return np.nan_to_num(scaled).astype(np.float32)


def encode(column: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, int]:
    """Integers from 1 for the values of the training rows, 0 for any other; and how many there are."""
    known = np.unique(column[train])
    place = np.minimum(np.searchsorted(known, column), len(known) - 1)
    return np.where(known[place] == column, place + 1, 0).astype(np.int32), len(known) + 1


def make_examples(
    numerical: Iterable[np.ndarray],
    categorical: Iterable[np.ndarray],
    labels: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    train: np.ndarray,
) -> tuple[Examples, FeatureSpec]:
    """Columns of all rows as features and labels; what is learned of them is of the rows `train`."""
    none = len(labels[0]), 0  # so that there may be no column
    numbers = [standardise(column, train) for column in numerical]
    encoded = [encode(column, train) for column in categorical]
    features = Features(
        np.column_stack([np.empty(none, np.float32), *numbers]),
        np.column_stack([np.empty(none, np.int32), *(ids for ids, _ in encoded)]),
    )
    mask = np.stack(masks, axis=1).astype(np.float32)
    found = Examples(features, np.stack(labels, axis=1).astype(np.float32) * mask, mask)
    return found, FeatureSpec(len(numbers), tuple(count for _, count in encoded))
