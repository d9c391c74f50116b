"""The raw logs of the MetaBalance paper, filtered as its appendix A.2 says.

Both files come from Alibaba Tianchi and are larger than many a computer's memory. They are read twice, in
chunks: the first time for the purchases, which alone decide which users and items stay; the second time
for what those users did with those items.

Both filters count all purchases: a user who stays may then have fewer of items that stay. The paper does
not say so, but its Table 5 does: a user has 5.6 purchases there and an item 3.5 (UserBehavior-2017), or
19.7 and 7.7 (IJCAI-2015). That is less than what would stay if the filters were repeated, or the items'
applied to what the users' had left. Not checked here: the raw files were not at hand.
"""

import gzip
import re
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
      first: a pattern of the first line, which is a header where it `has_header`.
      columns: all of the file, in its order; "user", "item" and "behaviour" are read.
      names: the log's name of each behaviour of the file, the target first; None for one that is dropped.
      least_items, least_users: a user stays with at least so many different items bought, an item with at
        least so many different buyers.
    """

    name: str
    first: str
    has_header: bool
    columns: tuple[str, ...]
    names: Mapping[str, str | None]
    least_items: int
    least_users: int


USERBEHAVIOR = Format(
    name="UserBehavior-2017",
    first=r"\d+,\d+,\d+,(pv|buy|cart|fav),[^,]*",
    has_header=False,
    columns=("user", "item", "category", "behaviour", "time"),
    names={"buy": BUY, "cart": "cart", "fav": "fav", "pv": "view"},
    least_items=10,
    least_users=10,
)
IJCAI = Format(
    name="IJCAI-2015",
    first="user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type",
    has_header=True,
    columns=("user", "item", "category", "seller", "brand", "time", "behaviour"),
    # Add-to-cart is dropped, as in the paper: 1,693 rows are left of it.
    names={"2": BUY, "1": None, "3": "fav", "0": "view"},
    least_items=20,
    least_users=10,
)


def read_raw(path: Path) -> Log:
    """The log of `UserBehavior.csv` or `user_log_format1.csv`, which may be compressed by gzip."""
    try:
        return _read(path)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path} cannot be read as a raw log ({error})") from None


def _read(path: Path) -> Log:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as stream:
        line = stream.readline().strip()
    form = next((form for form in (USERBEHAVIOR, IJCAI) if re.fullmatch(form.first, line)), None)
    if form is None:
        raise UserError(
            f"{path}: unknown format; the first line must be {IJCAI.first} (IJCAI-2015) or a row "
            f"user,item,category,pv|buy|cart|fav,time (UserBehavior-2017), not {line[:80]!r}"
        )
    bought = _distinct(chunk[chunk["behaviour"] == BUY] for chunk in _chunks(path, form))
    users, items = (
        np.flatnonzero(np.bincount(bought[column]) >= least)
        for column, least in (("user", form.least_items), ("item", form.least_users))
    )
    if not len(users) or not len(items):
        raise UserError(
            f"{path}: no user with {form.least_items} items bought or no item with "
            f"{form.least_users} buyers is left"
        )
    log = _distinct(
        chunk[chunk["user"].isin(users) & chunk["item"].isin(items)]
        for chunk in _chunks(path, form)
    )
    places = np.searchsorted(users, log["user"]), np.searchsorted(items, log["item"])
    pairs = np.stack(places, axis=1)
    of_behaviour = {name: pairs[log["behaviour"] == name] for name in form.names.values() if name}
    return behaviours(form.name, len(users), len(items), of_behaviour)


def _distinct(chunks: Iterator[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([chunk.drop_duplicates() for chunk in chunks]).drop_duplicates()


def _chunks(path: Path, form: Format) -> Iterator[pd.DataFrame]:
    """The user, item and behaviour of some rows at a time, the behaviour by the log's name."""
    dtypes = {"user": np.int64, "item": np.int64, "behaviour": str}
    header = 0 if form.has_header else None
    with pd.read_csv(
        path, names=list(form.columns), header=header, usecols=list(dtypes), dtype=dtypes,
        keep_default_na=False, chunksize=ROWS_AT_ONCE,
    ) as reader:  # fmt: skip
        for chunk in reader:
            unknown = set(chunk["behaviour"]) - set(form.names)
            if unknown:
                raise UserError(
                    f"{path}: {form.name} has the behaviours {', '.join(form.names)}, not "
                    f"{', '.join(map(repr, sorted(unknown)))}"
                )
            yield chunk.assign(behaviour=chunk["behaviour"].map(form.names))
