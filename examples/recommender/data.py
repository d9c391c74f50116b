"""Behaviours (who did what with which item) and the training, validation and test sets made of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from examples.recommender.errors import UserError

MAX_TASKS = 8  # one bit a task in a byte
MAX_TABLE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Behaviours:
    """Distinct (user, item) pairs `[N, 2]` per behaviour; the first behaviour is the target."""

    name: str
    num_users: int
    num_items: int
    pairs: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Dataset:
    """What training and evaluation read.

    Attributes:
        tasks: names of the tasks, the target first.
        positives: `[P, 2]` training pairs with at least one behaviour.
        labels: `[users, items]`, bit `t` set where the pair is a training positive of task `t`.
        held_out: `[users, items]`, 1 for a target pair of the validation set, 2 of the test set.
    """

    name: str
    tasks: tuple[str, ...]
    positives: np.ndarray
    labels: np.ndarray
    held_out: np.ndarray

    @property
    def num_users(self) -> int:
        return self.labels.shape[0]

    @property
    def num_items(self) -> int:
        return self.labels.shape[1]


def split_target(
    pairs: np.ndarray, validation: float = 0.2, test: float = 0.2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split the target's pairs user by user into training, validation and test sets.

    Each user's pairs are shuffled and the same shares are cut from everybody, rounded down, so that
    a user with few pairs keeps them for training. The seed is the data's, not the training's.
    """
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    shuffled = pairs[np.lexsort((np.random.default_rng(seed).random(len(pairs)), pairs[:, 0]))]
    _, starts, counts = np.unique(shuffled[:, 0], return_index=True, return_counts=True)
    place = np.arange(len(shuffled)) - np.repeat(starts, counts)
    count = np.repeat(counts, counts)
    in_test = place < np.floor(test * count)
    in_validation = ~in_test & (place < np.floor((test + validation) * count))
    return shuffled[~in_test & ~in_validation], shuffled[in_validation], shuffled[in_test]


def build_dataset(behaviours: Behaviours, seed: int = 0) -> Dataset:
    """Split the target and remove its held-out pairs from every auxiliary behaviour.

    Without the removal the test set leaks: a rating of 5 is also "a rating", a purchase nearly always
    also a view, and the auxiliary task would teach the shared bottom the very pairs to be ranked.
    """
    if len(behaviours.pairs) > MAX_TASKS:
        raise UserError(f"{len(behaviours.pairs)} behaviours; at most {MAX_TASKS} are supported")
    shape = (behaviours.num_users, behaviours.num_items)
    if shape[0] * shape[1] > MAX_TABLE_BYTES:
        raise UserError(f"{shape[0]} users x {shape[1]} items is too large for a label table")
    (_, target), *auxiliaries = behaviours.pairs.items()
    train, validation, test = split_target(target, seed=seed)
    if not len(train) or not len(validation) or not len(test):
        raise UserError("the target behaviour has too few pairs a user to hold some out (5 needed)")
    held_out = np.zeros(shape, np.uint8)
    held_out[tuple(validation.T)] = 1
    held_out[tuple(test.T)] = 2
    labels = np.zeros(shape, np.uint8)
    labels[tuple(train.T)] = 1
    for bit, (_, pairs) in enumerate(auxiliaries, start=1):
        kept = pairs[held_out[tuple(pairs.T)] == 0]
        labels[tuple(kept.T)] |= np.uint8(1 << bit)
    positives = np.argwhere(labels > 0).astype(np.int32)
    return Dataset(behaviours.name, tuple(behaviours.pairs), positives, labels, held_out)
