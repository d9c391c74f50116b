"""Where behaviours come from: MovieLens-100K, a folder of CSV files, or a generator."""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from examples.studies.harness.errors import UserError
from examples.studies.recommender.data import REGRESSION, Interactions, Log, Task, behaviours
from examples.studies.recommender.download import WAYS_OUT, movielens_ratings

# MovieLens as tasks, and their values from stars and days since the user's first rating `[N]`.
MOVIELENS: dict[str, tuple[Sequence[Task], Callable[..., Sequence[np.ndarray]]]] = {
    # Two rankings and two numbers, in the units of its file.
    "units": (
        (Task("rated 5"), Task("rated"), Task("stars", REGRESSION),
         Task("days", REGRESSION)),
        lambda stars, days: (stars == 5, stars > 0, stars, days),
    ),
    # Three rankings, each a part of the next one.
    "nested": (
        (Task("rated 5"), Task("rated 4 or 5"), Task("rated")),
        lambda stars, days: (stars == 5, stars >= 4, stars > 0),
    ),
    # The two tasks of many tutorials: a softmax over films, and the stars, which are scaled to 1.
    "retrieval": (
        (Task("rated", softmax=True), Task("stars", REGRESSION)),
        lambda stars, days: (stars > 0, stars / 5),
    ),
}  # fmt: skip


def load_log(data: str, target: str | None = None, tasks: str = "units") -> Log:
    """Read `movielens`, `synthetic`, or the folder of behaviours that `data` names.

    `tasks` chooses what MovieLens's tasks are, a key of `MOVIELENS`.
    """
    if data not in ("movielens", "synthetic"):
        return folder(Path(data), target or "buy")
    if target is not None:
        raise UserError(f"--target {target}: only a folder has behaviours to choose from")
    return movielens(tasks) if data == "movielens" else synthetic()


def movielens(tasks: str) -> Log:
    """MovieLens-100K with the tasks of a key of `MOVIELENS`."""
    ratings = movielens_ratings()
    user, item, stars, seconds = ratings[np.lexsort((ratings[:, 1], ratings[:, 0]))].T
    first = pd.Series(seconds).groupby(user).transform("min").to_numpy()
    found, values_of = MOVIELENS[tasks]
    values = np.stack(values_of(stars, (seconds - first) / 86400), axis=1).astype(np.float32)
    pairs = np.stack([user - 1, item - 1], axis=1).astype(np.int32)
    interactions = Interactions(pairs, values)
    return Log("MovieLens-100K", int(user.max()), int(item.max()), tuple(found), interactions)


def folder(path: Path, target: str, auxiliaries: Sequence[str] | None = None) -> Log:
    """A folder with one `NAME.csv` or `NAME.csv.gz` a behaviour: `user,item` rows under a header.

    `auxiliaries` names the other behaviours that are read; without it, all.
    """
    if not path.is_dir():
        raise UserError(f"--data {path}: no such folder (nor is it 'movielens' or 'synthetic')")
    files = {
        file.name.removesuffix(suffix): file
        for suffix in (".csv", ".csv.gz")
        for file in sorted(path.glob(f"*{suffix}"))
    }
    names = [target, *(auxiliaries or sorted(set(files) - {target}))]
    if missing := [name for name in names if name not in files]:
        found = ", ".join(sorted(files)) or "no CSV file"
        raise UserError(
            f"--data {path}: no {missing[0]}.csv[.gz] (found: {found}); name the target by "
            f"--target, or {WAYS_OUT}"
        )
    tables = [_read_pairs(files[name]) for name in names]
    rows = pd.concat(tables)
    users, user_ids = pd.factorize(rows["user"], sort=True)
    items, item_ids = pd.factorize(rows["item"], sort=True)
    parts = np.split(np.stack([users, items], axis=1), np.cumsum(list(map(len, tables)))[:-1])
    return behaviours(path.name, len(user_ids), len(item_ids), dict(zip(names, parts, strict=True)))


def _read_pairs(path: Path) -> pd.DataFrame:
    """The columns `user` and `item` of a CSV file, as strings."""
    columns = ["user", "item"]
    try:
        pairs = pd.read_csv(path, usecols=columns, dtype=str, keep_default_na=False, na_values="")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path} cannot be read as CSV ({error}); {WAYS_OUT}") from None
    if pairs.isna().any(axis=None):
        raise UserError(f"{path}: a row has no user or no item")
    return pairs


def synthetic(num_users: int = 400, num_items: int = 300, rank: int = 6, seed: int = 0) -> Log:
    """Nested behaviours with planted structure: view, like and buy share one low-rank taste.

    A user views the items that suit a noisy taste plus popularity, likes some of what was viewed and
    buys some of what was liked, each step with less noise: the auxiliaries are larger and noisier.
    """
    generator = np.random.default_rng(seed)
    taste = generator.normal(size=(num_users, rank)) @ generator.normal(size=(rank, num_items))
    appeal = taste / np.sqrt(rank) + generator.normal(size=num_items)
    nested = {}
    candidates = np.ones((num_users, num_items), bool)
    for name, share, noise in (("view", 0.2, 1.0), ("like", 0.5, 0.5), ("buy", 0.5, 0.3)):
        score = appeal + noise * generator.normal(size=appeal.shape)
        score = np.where(candidates, score, -np.inf)
        kept = np.quantile(score[candidates], 1 - share)
        candidates = score >= kept
        nested[name] = np.argwhere(candidates).astype(np.int32)
    return behaviours("synthetic", num_users, num_items, dict(reversed(nested.items())))
