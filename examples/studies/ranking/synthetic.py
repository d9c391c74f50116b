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

from examples.models.layers import Features, FeatureSpec
from examples.studies.ranking.data import REGRESSION, Dataset, Examples, Task, split_rows

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


@dataclass(frozen=True)
class LogConfig:
    """What is generated.

    Attributes:
      impressions: rows; 60 % are for training, 20 % for validation, 20 % for the test.
      ctr, ctcvr: mean probabilities of a click and of a click with a conversion.
      relatedness: of the effects on conversions to those on clicks, 0 (unrelated) to 1 (equal).
      users, items: how many; by default a twentieth and a fortieth of the impressions.
      power: the exponent of the frequencies of users, items and advertisers.
      seed: of everything.
    """

    impressions: int = 200_000
    ctr: float = 0.1
    ctcvr: float = 0.01
    relatedness: float = 0.5
    users: int | None = None
    items: int | None = None
    power: float = 1.05
    seed: int = 0

    @property
    def vocabularies(self) -> dict[str, int]:
        """The number of values of every category."""
        users = self.users or max(10, self.impressions // 20)
        items = self.items or max(10, self.impressions // 40)
        advertisers = max(5, items // 20)
        return {
            "user": users,
            "item": items,
            "advertiser": advertisers,
            "category": min(40, advertisers),
            "segment": min(30, users),
            "place": 8,
            "hour": 24,
        }


# The standard deviation of the effects of single categories, and of products of two.
SINGLE = {
    "user": 0.5,
    "item": 0.5,
    "advertiser": 0.5,
    "category": 0.5,
    "segment": 0.5,
    "place": 0.6,
    "hour": 0.3,
}
PRODUCTS = {
    ("segment", "category"): 0.7,
    ("segment", "advertiser"): 0.4,
    ("user", "category"): 0.3,
    ("place", "category"): 0.3,
}


def synthetic(config: LogConfig) -> Dataset:
    """The dataset, with the tasks `TASKS`; its truth is exact."""
    generator = np.random.default_rng(config.seed)
    ids = _ids(generator, config)
    numbers = generator.normal(size=(config.impressions, NUM_NUMERICAL))
    scores = _scores(generator, config, ids, numbers)
    click = scores[0] + _constant(scores[0], np.ones(config.impressions), config.ctr)
    clicked = sigmoid(click)
    bought = scores[1] + _constant(scores[1], clicked, config.ctcvr)
    both = logit(clicked * sigmoid(bought))
    labels = np.zeros((config.impressions, len(TASKS)), np.float32)
    labels[:, 0] = generator.random(config.impressions) < clicked
    labels[:, 1] = (generator.random(config.impressions) < sigmoid(bought)) * labels[:, 0]
    labels[:, 2] = labels[:, 1]
    # The logarithm of the watch time, and the length of the video: both in seconds.
    watched, length = 2.0 + 0.5 * scores[2], 20 * np.exp(0.4 * numbers[:, 0])
    times = np.exp(watched + WATCH_NOISE * generator.normal(size=config.impressions))
    labels[:, 3] = np.minimum(times / length, 1)
    labels[:, 4] = times
    truth = np.stack(
        [
            click,
            bought,
            both,
            mean_completion(watched, np.log(length)),
            np.exp(watched + WATCH_NOISE**2 / 2),
        ],
        axis=1,
    )
    mask = np.ones_like(labels)
    mask[:, 1] = labels[:, 0]
    categorical = np.stack(list(ids.values()), axis=1).astype(np.int32)
    examples = Examples(Features(numbers.astype(np.float32), categorical), labels, mask)
    parts = split_rows(config.impressions, (0.6, 0.2), config.seed)
    return Dataset(
        f"SYNTHETIC impressions ({config.impressions:,}, CTR {config.ctr:g}, CTCVR {config.ctcvr:g}, "
        f"relatedness {config.relatedness:g})",
        FeatureSpec(NUM_NUMERICAL, tuple(config.vocabularies.values())),
        TASKS,
        *(examples.where(rows) for rows in parts),
        truth=truth[parts[2]],
    )


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(0, -x))


def logit(p: np.ndarray) -> np.ndarray:
    """The inverse of `sigmoid`."""
    return np.log(p) - np.log1p(-p)


def mean_completion(watched: np.ndarray, length: np.ndarray) -> np.ndarray:
    """E min(X / d, 1) for log X normal around `watched` and log d = `length`."""
    from scipy.special import ndtr

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

    user, item = (frequent(name, number, config.power) for name in ("user", "item"))
    advertiser_of = frequent("advertiser", sizes["item"], config.power)
    category_of = frequent("category", sizes["advertiser"], 0.5)
    segment_of = frequent("segment", sizes["user"], 0.5)
    advertiser = advertiser_of[item]
    return {
        "user": user,
        "item": item,
        "advertiser": advertiser,
        "category": category_of[advertiser],
        "segment": segment_of[user],
        "place": frequent("place", number, 1.0),
        "hour": generator.integers(sizes["hour"], size=number),
    }


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
        for place in range(3):
            product = np.einsum("nk,nk->n", ours[place][ids[left]], theirs[place][ids[right]])
            found[place] += size / LATENT**0.5 * product
    found += 0.3 * effects((NUM_NUMERICAL,)) @ numbers.T
    return found + 0.3 * effects((1,)) * (numbers[:, 0] * numbers[:, 1])[None]


def _constant(score: np.ndarray, weights: np.ndarray, rate: float) -> float:
    """The constant with which the mean of `weights * sigmoid(score + constant)` is `rate`."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        too_low = np.mean(weights * sigmoid(score + middle)) < rate
        low, high = (middle, high) if too_low else (low, middle)
    return (low + high) / 2
