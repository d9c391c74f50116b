"""Where behaviours come from: MovieLens-100K, a folder of CSV files, or a generator."""

import csv
import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.studies.harness.errors import UserError
from examples.studies.recommender.data import (
    REGRESSION,
    Interactions,
    Log,
    Task,
    behaviours,
    with_target,
)
from examples.studies.recommender.download import WAYS_OUT, movielens_ratings

SUFFIXES = (".csv.gz", ".csv")


def load_log(data: str, target: str | None = None, tasks: str = "units") -> Log:
    """Read `movielens`, `synthetic`, or the folder of behaviours that `data` names.

    `tasks` chooses what MovieLens's tasks are, a key of `MOVIELENS`.
    """
    if data == "movielens":
        log = MOVIELENS[tasks]()
    elif data == "synthetic":
        log = synthetic()
    else:
        return folder(Path(data), target or "buy")
    return log if target is None else with_target(log, target)


def movielens_units() -> Log:
    """MovieLens-100K as four tasks in the units of its file.

    Whether a film was rated 5 (the target) and whether it was rated at all, to be ranked by cross-entropy;
    the rating in stars and the days since the user's first rating, by squared error.
    """
    pairs, stars, seconds = _movielens()
    users = pairs[:, 0]
    first = np.full(users.max() + 1, seconds.max())
    np.minimum.at(first, users, seconds)
    days = (seconds - first[users]) / 86400.0
    values = np.stack([stars == 5, np.ones(len(stars)), stars, days], axis=1)
    tasks = (
        Task("rated 5"),
        Task("rated"),
        Task("stars", REGRESSION, "stars"),
        Task("days", REGRESSION, "days"),
    )
    found = Interactions(pairs, values.astype(np.float32))
    return Log("MovieLens-100K", int(users.max()) + 1, int(pairs[:, 1].max()) + 1, tasks, found)


def movielens_nested() -> Log:
    """MovieLens-100K as three nested tasks: a rating of 5 (the target), of at least 4, any."""
    pairs, stars, _ = _movielens()
    nested = {"rated 5": pairs[stars == 5], "rated 4 or 5": pairs[stars >= 4], "rated": pairs}
    return behaviours(
        "MovieLens-100K", int(pairs[:, 0].max()) + 1, int(pairs[:, 1].max()) + 1, nested
    )


def movielens_retrieval() -> Log:
    """MovieLens-100K as the two tasks of many tutorials: which films are rated, and how.

    A softmax over films, and the squared error of the stars, which are scaled to 1.
    """
    pairs, stars, _ = _movielens()
    values = np.stack([np.ones(len(stars)), stars / 5], axis=1).astype(np.float32)
    tasks = Task("rated", softmax=True), Task("stars", REGRESSION, "of five")
    users, items = (int(column.max()) + 1 for column in pairs.T)
    return Log("MovieLens-100K", users, items, tasks, Interactions(pairs, values))


MOVIELENS = {
    "units": movielens_units,
    "nested": movielens_nested,
    "retrieval": movielens_retrieval,
}


def _movielens() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs `[N, 2]` sorted by user and item, stars `[N]` and seconds `[N]`."""
    ratings = movielens_ratings()
    ratings = ratings[np.lexsort((ratings[:, 1], ratings[:, 0]))]
    return (ratings[:, :2] - 1).astype(np.int32), ratings[:, 2], ratings[:, 3]


def folder(path: Path, target: str, auxiliaries: Sequence[str] | None = None) -> Log:
    """A folder with one `NAME.csv` or `NAME.csv.gz` a behaviour: `user,item` rows under a header.

    `auxiliaries` names the other behaviours that are read; without it, all.
    """
    if not path.is_dir():
        raise UserError(f"--data {path}: no such folder (nor is it 'movielens' or 'synthetic')")
    files = {
        file.name[: -len(suffix)]: file
        for suffix in reversed(SUFFIXES)
        for file in sorted(path.glob(f"*{suffix}"))
    }
    names = [target, *(auxiliaries or sorted(set(files) - {target}))]
    found = ", ".join(sorted(files)) or "no CSV file"
    if target not in files:
        raise UserError(
            f"--data {path}: no target behaviour {target}.csv[.gz] (found: {found}); "
            f"name one by --target, or {WAYS_OUT}"
        )
    if missing := [name for name in names if name not in files]:
        raise UserError(f"--data {path}: no {missing[0]}.csv[.gz] (found: {found}); or {WAYS_OUT}")
    read = [_read_pairs(files[name]) for name in names]
    users, items = (np.concatenate([rows[:, column] for rows in read]) for column in (0, 1))
    user_ids, users = np.unique(users, return_inverse=True)
    item_ids, items = np.unique(items, return_inverse=True)
    coded = np.stack([users, items], axis=1).astype(np.int32)
    parts = np.split(coded, np.cumsum([len(rows) for rows in read])[:-1])
    pairs = dict(zip(names, parts, strict=True))
    return behaviours(path.name, len(user_ids), len(item_ids), pairs)


def _read_pairs(path: Path) -> np.ndarray:
    """The `user` and `item` columns of a CSV file as strings `[N, 2]`."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="") as stream:
            rows = csv.reader(stream)
            header = next(rows, [])
            if not {"user", "item"} <= set(header):
                raise UserError(f"{path}: the first line must name the columns user and item")
            user, item = header.index("user"), header.index("item")
            pairs = [(row[user], row[item]) for row in rows]
    except IndexError:
        raise UserError(f"{path}: a row has fewer columns than the first line") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV ({error}); {WAYS_OUT}") from None
    return np.array(pairs, dtype=np.str_).reshape(-1, 2)


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
