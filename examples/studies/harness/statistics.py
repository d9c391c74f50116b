"""Is one method better than another, over seeds and users?"""

from collections.abc import Mapping
from math import comb
from typing import NamedTuple

import numpy as np
from scipy import stats


class Difference(NamedTuple):
    """A mean difference, its standard error, and the p-value of no difference (two-sided)."""

    mean: float
    error: float
    p_value: float


def standard_error(values: np.ndarray) -> np.ndarray:
    """Of the mean over the last axis; 0 of a single value."""
    count = values.shape[-1]
    return values.std(axis=-1, ddof=min(1, count - 1)) / count**0.5


def paired_difference(one: np.ndarray, other: np.ndarray) -> Difference:
    """Compare metrics `[seeds, users]` that were measured on the same seeds and users.

    Seeds and users are both drawn at random: d[s, u] = mean + seed[s] + user[u] + rest[s, u]. With the mean
    squares M of a two-way analysis of variance, the variance of the mean is estimated by
    (M_seed + max(M_user - M_rest, 0)) / (S U), and the statistic is compared with Student's t at S - 1
    degrees of freedom: few seeds say little, however many users there are. A test over users alone would
    speak about these few trained networks, not about the method. With one seed it does, for nothing else
    is known.

    Args:
      one: NaN for users who have nothing held out. One column, where there is one number a seed, gives
        Student's paired test over the seeds; NaN with one seed.
      other: with the same users.
    """
    difference = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    difference = difference[:, ~np.isnan(difference).any(axis=0)]
    seeds, users = difference.shape
    if not users:
        return Difference(np.nan, np.nan, np.nan)
    mean = difference.mean()
    if seeds == users == 1:
        return Difference(mean, np.nan, np.nan)
    of_seed, of_user = difference.mean(axis=1), difference.mean(axis=0)
    user_square = seeds * np.sum((of_user - mean) ** 2) / max(users - 1, 1)
    total, freedom = user_square, float(users - 1)
    if seeds > 1:
        seed_square = users * np.sum((of_seed - mean) ** 2) / (seeds - 1)
        rest = difference - of_seed[:, None] - of_user + mean
        rest_square = np.sum(rest**2) / ((seeds - 1) * max(users - 1, 1))
        total = seed_square + max(user_square - rest_square, 0.0)
        freedom = float(seeds - 1)
    if total <= 0:
        return Difference(mean, 0.0, 1.0 if mean == 0 else 0.0)
    error = np.sqrt(total / (seeds * users))
    return Difference(mean, error, float(2 * stats.t.sf(abs(mean) / error, freedom)))


def compare(values: Mapping[str, np.ndarray], baseline: str) -> dict[str, list[Difference]]:
    """What each row `[columns, seeds, users]` has more than the baseline, column by column.

    Holm-corrected over all rows and columns. Rows `[columns, seeds]` have one number a seed: their test is
    Student's paired test over the seeds, and one seed says nothing of differences.
    """
    whole = {label: np.atleast_3d(rows) for label, rows in values.items()}
    found = {
        label: [paired_difference(*pair) for pair in zip(rows, whole[baseline], strict=True)]
        for label, rows in whole.items()
        if label != baseline
    }
    p_values = np.array([[d.p_value for d in entry] for entry in found.values()])
    corrected = np.where(np.isnan(p_values), np.nan, holm(np.nan_to_num(p_values, nan=1.0)))
    return {
        label: [d._replace(p_value=float(p)) for d, p in zip(entry, row, strict=True)]
        for (label, entry), row in zip(found.items(), corrected, strict=True)
    }


def best_of(count: int, values: np.ndarray) -> np.ndarray:
    """The best of `count` runs, in the mean over all choices from `values` `[runs, ...]`, the best last."""
    ways = [comb(rank, count - 1) for rank in range(len(values))]
    return np.tensordot(ways, values, 1) / comb(len(values), count)


def expected_best(values: np.ndarray) -> np.ndarray:
    """The expected best of 1, 2, ... runs that are drawn from the `values` `[runs]` of a search."""
    ordered = np.sort(values)
    return np.array([best_of(count, ordered) for count in range(1, len(values) + 1)])


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down correction over all entries, whatever the shape (methods and metrics)."""
    flat = p_values.ravel()
    order = np.argsort(flat)
    scaled = flat[order] * (len(flat) - np.arange(len(flat)))
    corrected = np.empty_like(flat)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected.reshape(p_values.shape)
