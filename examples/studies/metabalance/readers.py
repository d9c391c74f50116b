"""The raw logs of the MetaBalance paper, filtered as its appendix A.2 says.

Both files come from Alibaba Tianchi and are larger than many a computer's memory. They are read twice, in
chunks: the first time for the purchases, which alone decide which users and items stay; the second time
for what those users did with those items.
"""

import gzip
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from examples.studies.harness.errors import UserError
from examples.studies.recommender.data import Log, behaviours

ROWS_AT_ONCE = 2**21
BUY = "buy"


@dataclass(frozen=True)
class Format:
    """What a raw file looks like, and what is left of it.

    Attributes:
      name: of the log.
      columns: all of the file, in its order; "user", "item" and "behaviour" are read.
      header: whether the first line names the columns, in the file's own words.
      names: the log's name of each behaviour of the file, the target first; None for one that is dropped.
      least_items, least_users: a user stays with at least so many different items bought, an item with at
        least so many different buyers.
    """

    name: str
    columns: tuple[str, ...]
    header: str | None
    names: Mapping[str, str | None]
    least_items: int
    least_users: int


USERBEHAVIOR = Format(
    name="UserBehavior-2017",
    columns=("user", "item", "category", "behaviour", "time"),
    header=None,
    names={"buy": BUY, "cart": "cart", "fav": "fav", "pv": "view"},
    least_items=10,
    least_users=10,
)
IJCAI = Format(
    name="IJCAI-2015",
    columns=("user", "item", "category", "seller", "brand", "time", "behaviour"),
    header="user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type",
    # Add-to-cart is dropped, as in the paper: 1,693 rows are left of it.
    names={"2": BUY, "1": None, "3": "fav", "0": "view"},
    least_items=20,
    least_users=10,
)


def userbehavior_2017(path: Path | str, repeat: bool = False) -> Log:
    """The log of `UserBehavior.csv`: buy, cart, fav and view.

    The file has no header; its columns are user, item, category, behaviour (pv, buy, cart, fav) and time.

    Args:
      path: of the file, which may be compressed by gzip.
      repeat: how the filters are applied; see `filtered`. Table 5 has 16,089 users, 25,813 items and
        89,404 purchases. A user has 5.6 purchases there, an item 3.5. With `repeat=True` every user and
        every item would have 10, hence 258,130 purchases at least, so that the paper cannot have
        repeated the filters; nor applied the items' filter to what the users' filter had left.
        With `repeat=False` these counts are possible. Not checked here: the raw file was not at hand.
    """
    return _read(Path(path), USERBEHAVIOR, repeat)


def ijcai_2015(path: Path | str, repeat: bool = False) -> Log:
    """The log of `user_log_format1.csv`, of the IJCAI-15 contest: buy, fav and view.

    The file has a header; its last column is 0 for a click, 1 for add-to-cart (dropped, as in the paper),
    2 for a purchase and 3 for add-to-favourite.

    Args:
      path: of the file, which may be compressed by gzip.
      repeat: how the filters are applied; see `filtered`. Table 5 has 19,839 users, 50,973 items and
        390,600 purchases. A user has 19.7 purchases there, an item 7.7. With `repeat=True` every user
        would have 20 and every item 10, hence 509,730 purchases at least, so that the paper cannot have
        repeated the filters; nor applied the items' filter to what the users' filter had left.
        With `repeat=False` these counts are possible. Not checked here: the raw file was not at hand.
    """
    return _read(Path(path), IJCAI, repeat)


def read_raw(path: Path | str, repeat: bool = False) -> Log:
    """The log of either file, which is recognised by its first line."""
    path = Path(path)
    line = _first_line(path)
    if line == IJCAI.header:
        return ijcai_2015(path, repeat)
    fields = line.split(",")
    if (
        len(fields) == len(USERBEHAVIOR.columns)
        and fields[3] in USERBEHAVIOR.names
        and all(field.isdigit() for field in fields[:3])
    ):
        return userbehavior_2017(path, repeat)
    raise UserError(
        f"{path}: unknown format; the first line must be {IJCAI.header} (IJCAI-2015) or a row "
        f"user,item,category,pv|buy|cart|fav,time (UserBehavior-2017), not {line[:80]!r}"
    )


def filtered(
    purchases: np.ndarray, least_items: int, least_users: int, repeat: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The users and the items that stay, each sorted.

    Args:
      purchases: distinct pairs `[N, 2]`.
      least_items: a user stays with at least so many different items bought.
      least_users: an item stays with at least so many different buyers.
      repeat: False counts both on all purchases and drops users and items at once. A user who stays may
        then have fewer purchases of items that stay, or none. True counts again on what is left until
        nothing changes.
    """
    while True:
        users = _frequent(purchases[:, 0], least_items)
        items = _frequent(purchases[:, 1], least_users)
        stays = np.isin(purchases[:, 0], users) & np.isin(purchases[:, 1], items)
        if not repeat or stays.all():
            return users, items
        purchases = purchases[stays]


def _frequent(ids: np.ndarray, least: int) -> np.ndarray:
    distinct, counts = np.unique(ids, return_counts=True)
    return distinct[counts >= least]


def _read(path: Path, form: Format, repeat: bool) -> Log:
    purchases = _purchases(path, form)
    users, items = filtered(purchases, form.least_items, form.least_users, repeat)
    if not len(users) or not len(items):
        raise UserError(
            f"{path}: no user with {form.least_items} items bought or no item with "
            f"{form.least_users} buyers is left"
        )
    pairs = _pairs(path, form, users, items)
    return behaviours(form.name, len(users), len(items), pairs)


def _purchases(path: Path, form: Format) -> np.ndarray:
    """All distinct purchases `[N, 2]`, in the file's own numbers."""
    found = [
        chunk.loc[chunk["behaviour"] == BUY, ["user", "item"]].drop_duplicates()
        for chunk in _chunks(path, form)
    ]
    return pd.concat(found).drop_duplicates().to_numpy()


def _pairs(path: Path, form: Format, users: np.ndarray, items: np.ndarray) -> dict[str, np.ndarray]:
    """Distinct pairs `[N, 2]` of each behaviour; users and items by their places."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in form.names.values() if name}
    for chunk in _chunks(path, form):
        user, knows_user = _places(chunk["user"].to_numpy(), users)
        item, knows_item = _places(chunk["item"].to_numpy(), items)
        stays = knows_user & knows_item
        keys = user[stays] * len(items) + item[stays]
        behaviour = chunk["behaviour"].to_numpy()[stays]
        for name, of_behaviour in found.items():
            of_behaviour.append(np.unique(keys[behaviour == name]))
    distinct = {name: np.unique(np.concatenate(keys)) for name, keys in found.items()}
    return {
        name: np.stack([keys // len(items), keys % len(items)], axis=1).astype(np.int32)
        for name, keys in distinct.items()
    }


def _places(ids: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of `ids` stands among the sorted `known`, and whether it does."""
    places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return places, known[places] == ids


def _chunks(path: Path, form: Format) -> Iterator[pd.DataFrame]:
    """The user, item and behaviour of some rows at a time, the behaviour by the log's name."""
    try:
        with pd.read_csv(
            path,
            names=list(form.columns),
            header=None if form.header is None else 0,
            usecols=["user", "item", "behaviour"],
            dtype={"user": np.int64, "item": np.int64, "behaviour": "category"},
            compression="gzip" if path.suffix == ".gz" else None,
            chunksize=ROWS_AT_ONCE,
        ) as reader:
            for chunk in reader:
                yield chunk.assign(behaviour=_named(path, chunk["behaviour"], form))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise _unreadable(path, error) from None


def _named(path: Path, column: pd.Series, form: Format) -> pd.Categorical:
    found = [str(category) for category in column.cat.categories]
    unknown = ["an empty one"] if column.isna().any() else sorted(set(found) - set(form.names))
    if unknown:
        raise UserError(
            f"{path}: {form.name} has the behaviours {', '.join(form.names)}, not {', '.join(unknown)}"
        )
    names = [name for name in form.names.values() if name]
    codes = [names.index(name) if name else -1 for name in map(form.names.get, found)]
    return pd.Categorical.from_codes(np.array(codes, int)[column.cat.codes], names)


def _first_line(path: Path) -> str:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as stream:
            return stream.readline().strip()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read as a raw log ({error})")
