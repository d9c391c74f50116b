"""Is one method better than another, over seeds and users?"""

from typing import NamedTuple

import numpy as np
from scipy import stats


class Difference(NamedTuple):
    """A mean difference, its standard error, and the p-value of no difference (two-sided)."""

    mean: float
    error: float
    p_value: float


def paired_difference(one: np.ndarray, other: np.ndarray) -> Difference:
    """Compare metrics `[seeds, users]` that were measured on the same seeds and users.

    Seeds and users are both drawn at random: d[s, u] = mean + seed[s] + user[u] + rest[s, u]. With the mean
    squares M of a two-way analysis of variance, the variance of the mean is estimated by
    (M_seed + max(M_user - M_rest, 0)) / (S U), and the statistic is compared with Student's t at S - 1
    degrees of freedom: few seeds say little, however many users there are. A test over users alone would
    speak about these few trained networks, not about the method. With one seed it does, for nothing else
    is known.

    Args:
      one: NaN for users who have nothing held out.
      other: with the same users.
    """
    difference = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    difference = difference[:, ~np.isnan(difference).any(axis=0)]
    seeds, users = difference.shape
    mean = difference.mean()
    of_seed, of_user = difference.mean(axis=1), difference.mean(axis=0)
    user_square = seeds * np.sum((of_user - mean) ** 2) / (users - 1)
    total, freedom = user_square, float(users - 1)
    if seeds > 1:
        seed_square = users * np.sum((of_seed - mean) ** 2) / (seeds - 1)
        rest = difference - of_seed[:, None] - of_user + mean
        rest_square = np.sum(rest**2) / ((seeds - 1) * (users - 1))
        total = seed_square + max(user_square - rest_square, 0.0)
        freedom = float(seeds - 1)
    if total <= 0:
        return Difference(mean, 0.0, 1.0 if mean == 0 else 0.0)
    error = np.sqrt(total / (seeds * users))
    return Difference(mean, error, float(2 * stats.t.sf(abs(mean) / error, freedom)))


def paired_over_seeds(one: np.ndarray, other: np.ndarray) -> Difference:
    """Compare one number a seed, `[seeds]` each: Student's paired test; NaN with a single seed."""
    difference = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    mean, seeds = float(difference.mean()), len(difference)
    if seeds < 2:
        return Difference(mean, float("nan"), float("nan"))
    error = float(difference.std(ddof=1) / seeds**0.5)
    if error == 0:
        return Difference(mean, 0.0, 1.0 if mean == 0 else 0.0)
    return Difference(mean, error, float(2 * stats.t.sf(abs(mean) / error, seeds - 1)))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down correction over all entries, whatever the shape (methods and metrics)."""
    flat = p_values.ravel()
    order = np.argsort(flat)
    scaled = flat[order] * (len(flat) - np.arange(len(flat)))
    corrected = np.empty_like(flat)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected.reshape(p_values.shape)
