"""Where behaviours come from: MovieLens-100K, a folder of CSV files, or a generator."""

import subprocess
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from examples import retrieval_and_rating
from examples.studies.harness.data import REGRESSION, Task
from examples.studies.harness.errors import UserError
from examples.studies.recommender.data import Interactions, Log, behaviours

NOT_THERE = OSError, ValueError, subprocess.SubprocessError, zipfile.BadZipFile, SystemExit
WAYS_OUT = "use --data synthetic, or --data PATH with a folder of behaviours"
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


def movielens_ratings() -> np.ndarray:
    """Rows `user, item, stars, seconds` of MovieLens-100K, from the cache or a first download."""
    try:
        ratings = retrieval_and_rating.movielens(None)
        if len(ratings) != 100_000:
            raise ValueError("ml-100k.csv in the cache is cut short: remove it")
    except NOT_THERE as error:
        raise UserError(f"MovieLens-100K is not available: {error}; {WAYS_OUT}") from None
    return ratings


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
    files = {file.name.removesuffix(".gz")[:-4]: file for file in path.glob("*.csv*")}
    names = [target, *(auxiliaries or sorted(set(files) - {target}))]
    if missing := [name for name in names if name not in files]:
        found = ", ".join(sorted(files)) or "no such folder or no CSV file"
        raise UserError(
            f"--data {path}: no {missing[0]}.csv[.gz] (found: {found}); name the target by "
            f"--target, or {WAYS_OUT}"
        )
    how = {"usecols": ["user", "item"], "dtype": str, "keep_default_na": False, "na_values": ""}
    try:
        tables = {name: pd.read_csv(files[name], **how) for name in names}
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path} cannot be read as CSV files ({error}); {WAYS_OUT}") from None
    rows = pd.concat(tables)
    if rows.isna().any(axis=None):
        raise UserError(f"{path}: a row has no user or no item")
    users, user_ids = pd.factorize(rows["user"], sort=True)
    items, item_ids = pd.factorize(rows["item"], sort=True)
    pairs, of_row = np.stack([users, items], axis=1), rows.index.get_level_values(0)
    by_name = {name: pairs[of_row == name] for name in names}
    return behaviours(path.name, len(user_ids), len(item_ids), by_name)


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
