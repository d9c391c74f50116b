"""Where behaviours come from: MovieLens-100K, a folder of CSV files, or a generator."""

import csv
import gzip
import zlib
from pathlib import Path

import numpy as np

from examples.recommender.data import Behaviours
from examples.recommender.download import WAYS_OUT, movielens_ratings
from examples.recommender.errors import UserError

SUFFIXES = (".csv.gz", ".csv")


def load_behaviours(data: str, target: str | None = None) -> Behaviours:
    """Read `movielens`, `synthetic`, or the folder of behaviours that `data` names."""
    if data == "movielens":
        behaviours = movielens()
    elif data == "synthetic":
        behaviours = synthetic()
    else:
        return folder(Path(data), target or "buy")
    return behaviours if target is None else _target_first(behaviours, target)


def movielens() -> Behaviours:
    """MovieLens-100K as three nested behaviours: a rating of 5 (target), of at least 4, any."""
    ratings = movielens_ratings()
    users, items = ratings[:, 0] - 1, ratings[:, 1] - 1
    pairs = np.stack([users, items], axis=1).astype(np.int32)
    stars = ratings[:, 2]
    nested = {"rated_5": pairs[stars == 5], "rated_4_up": pairs[stars >= 4], "rated": pairs}
    return Behaviours("MovieLens-100K", int(users.max()) + 1, int(items.max()) + 1, nested)


def folder(path: Path, target: str) -> Behaviours:
    """A folder with one `NAME.csv` or `NAME.csv.gz` a behaviour: `user,item` rows under a header."""
    if not path.is_dir():
        raise UserError(f"--data {path}: no such folder (nor is it 'movielens' or 'synthetic')")
    files = {
        file.name[: -len(suffix)]: file
        for suffix in reversed(SUFFIXES)
        for file in sorted(path.glob(f"*{suffix}"))
    }
    if target not in files:
        found = ", ".join(sorted(files)) or "no CSV file"
        raise UserError(
            f"--data {path}: no target behaviour {target}.csv[.gz] (found: {found}); "
            f"name one by --target, or {WAYS_OUT}"
        )
    names = [target, *sorted(set(files) - {target})]
    read = [_read_pairs(files[name]) for name in names]
    users, items = (np.concatenate([rows[:, column] for rows in read]) for column in (0, 1))
    user_ids, users = np.unique(users, return_inverse=True)
    item_ids, items = np.unique(items, return_inverse=True)
    coded = np.stack([users, items], axis=1).astype(np.int32)
    parts = np.split(coded, np.cumsum([len(rows) for rows in read])[:-1])
    pairs = {name: np.unique(part, axis=0) for name, part in zip(names, parts, strict=True)}
    return Behaviours(path.name, len(user_ids), len(item_ids), pairs)


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


def synthetic(
    num_users: int = 400, num_items: int = 300, rank: int = 6, seed: int = 0
) -> Behaviours:
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
    return Behaviours("synthetic", num_users, num_items, dict(reversed(nested.items())))


def _target_first(behaviours: Behaviours, target: str) -> Behaviours:
    if target not in behaviours.pairs:
        known = ", ".join(behaviours.pairs)
        raise UserError(f"--target {target}: {behaviours.name} has the behaviours {known}")
    pairs = {target: behaviours.pairs[target], **behaviours.pairs}
    return Behaviours(behaviours.name, behaviours.num_users, behaviours.num_items, pairs)
