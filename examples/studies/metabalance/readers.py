"""The raw logs of the MetaBalance paper, filtered as its appendix A.2 says.

Both files come from Alibaba Tianchi. Of their up to a hundred million rows the user, the item and the
behaviour are read, about a gigabyte. The purchases alone decide which users and items stay.

Both filters count all purchases: a user who stays may then have fewer of items that stay. The paper does
not say so, but its Table 5 does: a user has 5.6 purchases there and an item 3.5 (UserBehavior-2017), or
19.7 and 7.7 (IJCAI-2015). That is less than what would stay if the filters were repeated, or the items'
applied to what the users' had left. Not checked here: the raw files were not at hand.
"""

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from examples.studies.harness.errors import UserError
from examples.studies.recommender.data import Log, behaviours


class Format(NamedTuple):
    """What a raw file looks like, and what is left of it.

    Attributes:
      name: of the log.
      first: a pattern of the first line.
      header: the number of the line that is a header, if one is.
      columns: all of the file, in its order; "user", "item" and "behaviour" are read.
      names: the log's name of each behaviour of the file, the target first; None for one that is dropped.
      least_items: a user stays with at least so many different items bought.
    """

    name: str
    first: str
    header: int | None
    columns: str
    names: Mapping[str, str | None]
    least_items: int


LEAST_USERS = 10  # an item stays with at least so many different buyers
USERBEHAVIOR = Format(
    "UserBehavior-2017", r"\d+,\d+,\d+,(pv|buy|cart|fav),[^,]*", None,
    "user item category behaviour time",
    {"buy": "buy", "cart": "cart", "fav": "fav", "pv": "view"}, 10,
)  # fmt: skip
# Add-to-cart is dropped, as in the paper: 1,693 rows are left of it.
IJCAI = Format(
    "IJCAI-2015", "user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type", 0,
    "user item category seller brand time behaviour",
    {"2": "buy", "1": None, "3": "fav", "0": "view"}, 20,
)  # fmt: skip


def read_raw(path: Path) -> Log:
    """The log of `UserBehavior.csv` or `user_log_format1.csv`, which may be compressed by gzip."""
    try:
        return _read(path)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path} cannot be read as a raw log ({error})") from None


def _read(path: Path) -> Log:
    line = ",".join(pd.read_csv(path, header=None, nrows=1, dtype=str, na_filter=False).iloc[0])
    form = next((form for form in (USERBEHAVIOR, IJCAI) if re.fullmatch(form.first, line)), None)
    if form is None:
        raise UserError(
            f"{path}: unknown format; the first line must be {IJCAI.first} (IJCAI-2015) or a row "
            f"user,item,category,pv|buy|cart|fav,time (UserBehavior-2017), not {line[:80]!r}"
        )
    dtypes = {"user": np.int32, "item": np.int32, "behaviour": "category"}
    log = pd.read_csv(
        path, names=form.columns.split(), header=form.header, usecols=list(dtypes), dtype=dtypes,
        keep_default_na=False,
    )  # fmt: skip
    log["behaviour"] = log["behaviour"].cat.rename_categories(str)  # pandas reads digits as numbers
    if unknown := sorted(set(log["behaviour"].cat.categories) - set(form.names)):
        raise UserError(
            f"{path}: {form.name} has the behaviours {', '.join(form.names)}, not "
            f"{', '.join(map(repr, unknown))}"
        )
    bought = log[log["behaviour"] == next(iter(form.names))].drop_duplicates()
    users = np.flatnonzero(np.bincount(bought["user"]) >= form.least_items)
    items = np.flatnonzero(np.bincount(bought["item"]) >= LEAST_USERS)
    if not len(users) or not len(items):
        raise UserError(
            f"{path}: no user with {form.least_items} items bought or no item with {LEAST_USERS} buyers "
            "is left"
        )
    log = log[log["user"].isin(users) & log["item"].isin(items)].drop_duplicates()
    places = np.searchsorted(users, log["user"]), np.searchsorted(items, log["item"])
    kinds, pairs = log["behaviour"], np.stack(places, axis=1)
    by_name = {ours: pairs[kinds == theirs] for theirs, ours in form.names.items() if ours}
    return behaviours(form.name, len(users), len(items), by_name)
