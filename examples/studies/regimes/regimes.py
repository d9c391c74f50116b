"""The regimes: how each task's loss is made of its pairs, fixed before anything is trained."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.studies.recommender.data import Dataset

CROSS_ENTROPY, SOFTMAX = 0.0, 1.0
NEGATIVES = 4.0  # for each positive, in expectation
LEVELS = (0.0, 0.5, 1.0)  # the share of an auxiliary's pairs that is permuted


class Knobs(NamedTuple):
    """A regime as numbers, so that one program trains all of them.

    Attributes:
      kinds: `[T]`, `SOFTMAX` or `CROSS_ENTROPY`.
      summed: 0 for a mean over the task's positives, 1 for their sum over `positives`.
      positives: of the target in a batch, so that its sum is about its mean.
      level: the place of the share in `LEVELS`.
    """

    kinds: Any
    summed: Any
    positives: Any
    level: Any


@dataclass(frozen=True)
class Regime:
    """A way to make the losses.

    Attributes:
      name, text: for tables and files.
      target, auxiliary: the kind of the loss.
      summed: over all positives of the batch, in place of a mean.
      permuted: the share of the auxiliaries' pairs whose items are permuted.
    """

    name: str
    text: str
    target: float = CROSS_ENTROPY
    auxiliary: float = CROSS_ENTROPY
    summed: bool = False
    permuted: float = 0.0

    def knobs(self, num_tasks: int, positives_a_batch: float) -> Knobs:
        """The numbers."""
        kinds = np.array([self.target] + [self.auxiliary] * (num_tasks - 1))
        level = float(LEVELS.index(self.permuted))
        return Knobs(kinds, float(self.summed), positives_a_batch, level)


REGIMES = (
    Regime("a", "cross-entropy, means"),
    Regime("b", "cross-entropy, sums at natural frequency", summed=True),
    Regime("c", "softmax target, cross-entropy auxiliaries", target=SOFTMAX),
    Regime("d", "cross-entropy target, softmax auxiliaries", auxiliary=SOFTMAX),
    Regime("s", "softmax, means", target=SOFTMAX, auxiliary=SOFTMAX),
    Regime("f50", "as s, half of the auxiliaries' labels permuted", SOFTMAX, SOFTMAX, permuted=0.5),
    Regime("f100", "as s, all of the auxiliaries' labels permuted", SOFTMAX, SOFTMAX, permuted=1.0),
)


def task_loss(
    logits: jax.Array, known: jax.Array, labels: jax.Array, task: int, knobs: Knobs
) -> jax.Array:
    """One task's loss on a batch of users.

    The negatives of a user are the items that she never touched: a positive of another task only is
    neither a positive nor a negative. Cross-entropy has the expectation over random negatives, `NEGATIVES`
    for each positive of the same user; the softmax of a positive is over itself and all negatives.
    """
    positive = labels[task].astype(logits.dtype)
    negative = 1 - jnp.maximum(known, positive)
    number = positive.sum()

    def cross_entropy() -> jax.Array:
        drawn = NEGATIVES * positive.sum(axis=1) / jnp.maximum(negative.sum(axis=1), 1)
        softplus = jax.nn.softplus(logits)
        each = positive * (softplus - logits) + drawn[:, None] * negative * softplus
        return each.sum() / (1 + NEGATIVES)

    def softmax() -> jax.Array:
        others = jax.nn.logsumexp(logits, axis=1, keepdims=True, b=negative)
        return (positive * (jnp.logaddexp(others, logits) - logits)).sum()

    # A branch on a CPU; both under `vmap`, as on an accelerator.
    total = jax.lax.cond(knobs.kinds[task] == SOFTMAX, softmax, cross_entropy)
    mean = total / jnp.maximum(number, 1)
    return mean * (1 + knobs.summed * (number / knobs.positives - 1))


def label_tables(dataset: Dataset, seed: int = 0) -> np.ndarray:
    """The training positives, bool `[levels, T, U, I]`, with the auxiliaries' permuted at each of `LEVELS`.

    Permuted: the items of the chosen pairs in another order, so that users keep their number of pairs and
    items their popularity (but for pairs that fall together). The target's are never permuted.
    """
    generator = np.random.default_rng(seed)
    shape = len(LEVELS), len(dataset.tasks), dataset.num_users, dataset.num_items
    tables = np.zeros(shape, bool)
    for task in range(len(dataset.tasks)):
        users, items = dataset.train.positives(task).T
        for level, share in enumerate(LEVELS):
            moved = items.copy()
            if task > 0:
                chosen = generator.permutation(len(items))[: round(share * len(items))]
                moved[chosen] = items[generator.permutation(chosen)]
            tables[level, task, users, moved] = True
    return tables
