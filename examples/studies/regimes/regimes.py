"""The regimes: how each task's loss is made of its pairs, fixed before anything is trained."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.studies.recommender.data import Dataset

CROSS_ENTROPY, SOFTMAX = "cross-entropy", "softmax"
NEGATIVES = 4.0  # for each positive, in expectation
LEVELS = (0.0, 0.5, 1.0)  # the share of an auxiliary's pairs that is permuted


class Knobs(NamedTuple):
    """The numbers of a regime, so that one program trains all with the same kinds of losses.

    Attributes:
      summed: 0 for a mean over the task's positives, 1 for their sum over `positives`.
      positives: of the target in a batch, so that its sum is about its mean.
      unit: of the auxiliaries' losses.
      level: the place of the share in `LEVELS`.
    """

    summed: Any
    positives: Any
    unit: Any
    level: Any


@dataclass(frozen=True)
class Regime:
    """A way to make the losses.

    Attributes:
      name, text: for tables and files.
      target, auxiliary: the kind of the loss.
      summed: over all positives of the batch, in place of a mean.
      permuted: the share of the auxiliaries' pairs whose items are permuted.
      unit: a factor of the auxiliaries' losses.
    """

    name: str
    text: str
    target: str = CROSS_ENTROPY
    auxiliary: str = CROSS_ENTROPY
    summed: bool = False
    permuted: float = 0.0
    unit: float = 1.0

    @property
    def kinds(self) -> tuple[str, str]:
        """Of the target's loss and of the auxiliaries'."""
        return self.target, self.auxiliary

    def knobs(self, positives_a_batch: float) -> Knobs:
        """The numbers."""
        level = float(LEVELS.index(self.permuted))
        return Knobs(float(self.summed), positives_a_batch, self.unit, level)


REGIMES = (
    Regime("a", "cross-entropy, means"),
    Regime("b", "cross-entropy, sums at natural frequency", summed=True),
    Regime("c", "softmax target, cross-entropy auxiliaries", target=SOFTMAX),
    Regime("d", "cross-entropy target, softmax auxiliaries", auxiliary=SOFTMAX),
    Regime("s", "softmax, means", target=SOFTMAX, auxiliary=SOFTMAX),
    Regime("f50", "as s, half of the auxiliaries' labels permuted", SOFTMAX, SOFTMAX, permuted=0.5),
    Regime("f100", "as s, all of the auxiliaries' labels permuted", SOFTMAX, SOFTMAX, permuted=1.0),
    Regime("e", "as c, auxiliaries in a unit 100 times smaller", SOFTMAX, unit=100.0),
    Regime(
        "ef", "as f100, in a unit 100 times smaller", SOFTMAX, SOFTMAX, permuted=1.0, unit=100.0
    ),
    Regime("u", "as a, auxiliaries in a unit 100 times larger", unit=0.01),
)


def task_loss(
    logits: jax.Array, known: jax.Array, positive: jax.Array, kind: str, knobs: Knobs
) -> jax.Array:
    """One task's loss on a batch of users, all `[B, I]`.

    The negatives of a user are the items that she never touched: a positive of another task only is
    neither a positive nor a negative. Cross-entropy has the expectation over random negatives, `NEGATIVES`
    for each positive of the same user; the softmax is over a user's positives and negatives.
    """
    negative = (~known & ~positive).astype(logits.dtype)
    positive = positive.astype(logits.dtype)
    each_user = positive.sum(axis=1, keepdims=True)
    number = each_user.sum()

    if kind == SOFTMAX:
        over = jax.nn.logsumexp(logits, axis=1, keepdims=True, b=positive + negative)
        total = (each_user * over).sum() - (positive * logits).sum()
    else:
        drawn = NEGATIVES * each_user / jnp.maximum(negative.sum(axis=1, keepdims=True), 1)
        each = (positive + drawn * negative) * jax.nn.softplus(logits) - positive * logits
        total = each.sum() / (1 + NEGATIVES)
    mean = total / jnp.maximum(number, 1)
    return mean * (1 + knobs.summed * (number / knobs.positives - 1))


def label_codes(dataset: Dataset, seed: int = 0) -> np.ndarray:
    """The training positives with the auxiliaries' permuted at each of `LEVELS`, uint16 `[U, I]`.

    A pair has bit `level * T + task` if it is a positive of the task at that level; see `has`. Permuted:
    the items of the chosen pairs in another order, so that users keep their number of pairs and items
    their popularity (but for pairs that fall together). The target's are never permuted.
    """
    generator, num_tasks = np.random.default_rng(seed), len(dataset.tasks)
    codes = np.zeros((dataset.num_users, dataset.num_items), np.uint16)
    for task in range(num_tasks):
        users, items = dataset.train.positives(task).T
        for level, share in enumerate(LEVELS):
            moved = items.copy()
            if task > 0:
                chosen = generator.permutation(len(items))[: round(share * len(items))]
                moved[chosen] = items[generator.permutation(chosen)]
            codes[users, moved] |= 1 << (level * num_tasks + task)
    return codes


def has(codes: Any, task: int, num_tasks: int, level: Any = 0) -> jax.Array:
    """Which pairs of `label_codes` are positives of a task at a level, bool."""
    bit = jnp.asarray(level * num_tasks + task, jnp.uint16)
    return (codes >> bit) & 1 > 0
