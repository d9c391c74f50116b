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

    Seeds and users are both drawn at random: d[s, u] = mean + seed[s] + user[u] + rest[s, u]. The variance
    of the mean is then (M_seed + M_user - M_rest) / (S U) with the mean squares M of a two-way analysis of
    variance, and the statistic is compared with Student's t at Satterthwaite's degrees of freedom. A test
    over users alone would speak about these few trained networks, not about the method. With one seed it
    does, for nothing else is known.

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
    parts, freedoms = [user_square], [users - 1]
    if seeds > 1:
        seed_square = users * np.sum((of_seed - mean) ** 2) / (seeds - 1)
        rest = difference - of_seed[:, None] - of_user + mean
        rest_freedom = (seeds - 1) * (users - 1)
        rest_square = np.sum(rest**2) / rest_freedom
        # Where seeds differ by no more than the rest explains, their part is 0, never negative.
        if seed_square > rest_square:
            parts += [seed_square, -rest_square]
            freedoms += [seeds - 1, rest_freedom]
    total = sum(parts)
    if total <= 0:
        return Difference(mean, 0.0, 1.0 if mean == 0 else 0.0)
    error = np.sqrt(total / (seeds * users))
    freedom = total**2 / sum(part**2 / count for part, count in zip(parts, freedoms, strict=True))
    return Difference(mean, error, float(2 * stats.t.sf(abs(mean) / error, freedom)))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down correction over all entries, whatever the shape (methods and metrics)."""
    flat = p_values.ravel()
    order = np.argsort(flat)
    scaled = flat[order] * (len(flat) - np.arange(len(flat)))
    corrected = np.empty_like(flat)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return corrected.reshape(p_values.shape)
