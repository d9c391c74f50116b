"""A SYNTHETIC log of impressions, clicks and conversions, whose true probabilities are known.

Every impression has categories with power-law frequencies (a user, an item, the item's advertiser and
category, the user's segment, a place, an hour) and noisy numbers. The logit of a click and that of a
conversion after a click are sums of effects of single categories, products of latent vectors of two
categories, and terms of the numbers. The two logits share a part of their effects, `relatedness`. Their
constants are found so that the mean probabilities are `ctr` and `ctcvr`. The same impressions have a watch
time, log-normal, and the completed share of the video: min(watch time / length, 1).
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logit, ndtr

from examples.models.layers import Features, FeatureSpec
from examples.studies.harness.data import REGRESSION, Task
from examples.studies.ranking.data import Dataset, Examples, split_rows

TASKS = (
    Task("CTR"),
    Task("CVR"),
    Task("Conv|imp"),
    Task("completion rate", REGRESSION),
    Task("watch time", REGRESSION, "s"),
)
NUM_NUMERICAL = 8
WATCH_NOISE = 0.6  # the standard deviation of the logarithm of a watch time
LATENT = 4
POWER = 1.05  # of the frequencies of users, items and advertisers


@dataclass(frozen=True)
class LogConfig:
    """What is generated.

    Attributes:
      impressions: rows; 60 % are for training, 20 % for validation, 20 % for the test.
      ctr, ctcvr: mean probabilities of a click and of a click with a conversion.
      relatedness: of the effects on conversions to those on clicks, 0 (unrelated) to 1 (equal).
    """

    impressions: int = 200_000
    ctr: float = 0.1
    ctcvr: float = 0.01
    relatedness: float = 0.5

    @property
    def vocabularies(self) -> dict[str, int]:
        """The number of values of every category."""
        users, items = max(10, self.impressions // 20), max(10, self.impressions // 40)
        advertisers = max(5, items // 20)
        sizes = users, items, advertisers, min(40, advertisers), min(30, users), 8, 24
        return dict(zip(SINGLE, sizes, strict=True))


# The standard deviation of the effects of single categories, and of products of two.
SINGLE = dict.fromkeys(("user", "item", "advertiser", "category", "segment"), 0.5)
SINGLE |= {"place": 0.6, "hour": 0.3}
PRODUCTS = {
    ("segment", "category"): 0.7,
    ("segment", "advertiser"): 0.4,
    ("user", "category"): 0.3,
    ("place", "category"): 0.3,
}


def synthetic(config: LogConfig) -> Dataset:
    """The dataset, with the tasks `TASKS`; its truth is exact."""
    number, generator = config.impressions, np.random.default_rng(0)
    ids = _ids(generator, config)
    numbers = generator.normal(size=(number, NUM_NUMERICAL))
    scores = _scores(generator, config, ids, numbers)
    click = scores[0] + _constant(scores[0], np.ones(number), config.ctr)
    clicked = expit(click)
    bought = scores[1] + _constant(scores[1], clicked, config.ctcvr)
    both = logit(clicked * expit(bought))
    clicks = generator.random(number) < clicked
    buys = (generator.random(number) < expit(bought)) * clicks
    # The logarithm of the watch time, and the length of the video: both in seconds.
    watched, length = 2.0 + 0.5 * scores[2], 20 * np.exp(0.4 * numbers[:, 0])
    times = np.exp(watched + WATCH_NOISE * generator.normal(size=number))
    means = mean_completion(watched, np.log(length)), np.exp(watched + WATCH_NOISE**2 / 2)
    truth = np.column_stack([click, bought, both, *means])
    labels = np.column_stack([clicks, buys, buys, np.minimum(times / length, 1), times])
    mask = np.ones((number, len(TASKS)), np.float32)
    mask[:, 1] = clicks
    features = Features(
        numbers.astype(np.float32), np.column_stack(list(ids.values())).astype(np.int32)
    )
    examples = Examples(features, labels.astype(np.float32), mask)
    parts = split_rows(number, (0.6, 0.2))
    name = (
        f"SYNTHETIC impressions ({number:,}, CTR {config.ctr:g}, CTCVR {config.ctcvr:g}, "
        f"relatedness {config.relatedness:g})"
    )
    spec = FeatureSpec(NUM_NUMERICAL, tuple(config.vocabularies.values()))
    return Dataset(name, TASKS, *map(examples.where, parts), spec, truth[parts[2]])


def mean_completion(watched: np.ndarray, length: np.ndarray) -> np.ndarray:
    """E min(X / d, 1) for log X normal around `watched` and log d = `length`."""
    variance = WATCH_NOISE**2
    below = np.exp(watched - length + variance / 2)
    below *= ndtr((length - watched - variance) / WATCH_NOISE)
    return below + 1 - ndtr((length - watched) / WATCH_NOISE)


def _ids(generator: np.random.Generator, config: LogConfig) -> dict[str, np.ndarray]:
    """The categories `[N]` of every impression; an item has one advertiser, a user one segment."""
    sizes, number = config.vocabularies, config.impressions

    def frequent(name: str, count: int, power: float) -> np.ndarray:
        weights = (np.arange(sizes[name]) + 1.0) ** -power
        drawn = generator.choice(sizes[name], count, p=weights / weights.sum())
        return generator.permutation(sizes[name])[drawn]  # the number says nothing of the frequency

    user, item = (frequent(name, number, POWER) for name in ("user", "item"))
    advertiser_of = frequent("advertiser", sizes["item"], POWER)
    category_of = frequent("category", sizes["advertiser"], 0.5)
    segment_of = frequent("segment", sizes["user"], 0.5)
    advertiser = advertiser_of[item]
    place, hour = frequent("place", number, 1.0), generator.integers(sizes["hour"], size=number)
    found = user, item, advertiser, category_of[advertiser], segment_of[user], place, hour
    return dict(zip(sizes, found, strict=True))


def _scores(
    generator: np.random.Generator,
    config: LogConfig,
    ids: dict[str, np.ndarray],
    numbers: np.ndarray,
) -> np.ndarray:
    """Scores `[3, N]` of a click, of a conversion after it, and of the watch time."""
    shared, own = np.sqrt([config.relatedness, 1 - config.relatedness])

    def effects(shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal effects `[3, *shape]`; the others are related to the first."""
        drawn = generator.normal(size=(3, *shape))
        drawn[1:] = shared * drawn[:1] + own * drawn[1:]
        return drawn

    found = np.zeros((3, config.impressions))
    for name, size in SINGLE.items():
        found += size * effects((config.vocabularies[name],))[:, ids[name]]
    for (left, right), size in PRODUCTS.items():
        ours, theirs = (effects((config.vocabularies[name], LATENT)) for name in (left, right))
        products = np.einsum("snk,snk->sn", ours[:, ids[left]], theirs[:, ids[right]])
        found += size / LATENT**0.5 * products
    found += 0.3 * effects((NUM_NUMERICAL,)) @ numbers.T
    return found + 0.3 * effects((1,)) * (numbers[:, 0] * numbers[:, 1])[None]


def _constant(score: np.ndarray, weights: np.ndarray, rate: float) -> float:
    """The constant with which the mean of `weights * expit(score + constant)` is `rate`."""
    return brentq(lambda c: np.mean(weights * expit(score + c)) - rate, -50.0, 50.0, xtol=1e-14)
