"""Where ranking data comes from: two public tables, a folder in AliExpress's form, a generated log.

Nothing is downloaded.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from examples.studies.harness.data import Task
from examples.studies.harness.errors import UserError
from examples.studies.ranking.data import Dataset, make_examples, split_rows
from examples.studies.ranking.synthetic import LogConfig, synthetic

CLICK, CONVERSION, CONVERSION_OF_CLICK = "CTR", "Conv|imp", "CVR"
Labels = Mapping[str, tuple[np.ndarray, np.ndarray]]  # of a task, and for which rows it counts
CENSUS_NUMBERS = (
    "age", "wage_per_hour", "capital_gains", "capital_losses", "stock_dividends", "num_emp",
    "weeks_worked",
)  # fmt: skip
# `instance_weight` is how many people a row of the survey stands for, and no property of the person.
CENSUS_LEFT_OUT = ("marital_stat", "income_50k", "instance_weight")
SHARES = (0.6, 0.2)  # training and validation; the rest is the test set


def load(data: str, log: LogConfig | None = None) -> Dataset:
    """The data that `--data` names: `synthetic`, or a folder whose files say what they are."""
    if data == "synthetic":
        return synthetic(log or LogConfig())
    path = Path(data)
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        for pattern, read in (("*hillstrom*.csv*", hillstrom), ("*census*income*.csv*", census)):
            if file.is_file() and file.match(pattern):
                return read(file)
    if path.is_dir():
        return impressions(path)
    raise UserError(f"--data {data}: no such file or folder; or use synthetic")


def hillstrom(path: Path) -> Dataset:
    """Hillstrom's e-mail challenge (2008): a visit, a purchase of those who visit, and a purchase at all.

    One CSV file of 64,000 customers with the columns recency, history_segment, history, mens, womens,
    zip_code, newbie, channel, segment, visit, conversion, spend.
    """
    table = _read(path, ("history", "visit", "conversion"))
    columns = ["history_segment", "zip_code", "channel", "segment", "mens", "womens", "newbie"]
    numbers, funnel = table[["recency", "history"]], table[["visit", "conversion"]]
    return _dataset("hillstrom", numbers, _words(table[columns]), _funnel(funnel))


def census(path: Path) -> Dataset:
    """UCI Census-Income (KDD), first group of the MMoE paper: an income above 50,000, and never married.

    One CSV file with the column names of `CENSUS_NUMBERS`, marital_stat, income_50k and others.
    """
    table = _read(path, (*CENSUS_NUMBERS, "marital_stat", "income_50k"))
    left = table.columns.difference([*CENSUS_NUMBERS, *CENSUS_LEFT_OUT], sort=False)
    rich = table["income_50k"].astype(str).str.startswith("50000+").to_numpy()
    single = (table["marital_stat"] == "Never married").to_numpy()
    counts = np.ones(len(table))
    labels = {"income > 50K": (rich, counts), "never married": (single, counts)}
    return _dataset("census income", table[list(CENSUS_NUMBERS)], _words(table[left]), labels)


def impressions(folder: Path) -> Dataset:
    """A folder in the form of preprocessed AliExpress or Ali-CCP files.

    CSV files whose names hold "train", "test" and, if there is one, "val" or "dev" (else a tenth of the
    training rows is the validation set). Columns: click, conversion or purchase; numerical_* hold
    numbers; search_id is left out; all others are categories.
    """
    words = {"train": ["train"], "validation": ["val", "dev"], "test": ["test"]}
    tables = {
        part: _read(files[0], ("click",))
        for part, names in words.items()
        if (files := [file for name in names for file in sorted(folder.glob(f"*{name}*.csv*"))])
    }
    if not {"train", "test"} <= set(tables):
        raise UserError(f"--data {folder}: no CSV files with train and test in their names")
    table = pd.concat(tables)
    label = next((name for name in ("conversion", "purchase") if name in table), None)
    if label is None:
        raise UserError(f"--data {folder}: no column conversion or purchase")
    of_part = table.index.get_level_values(0)
    rows = {part: np.flatnonzero(of_part == part) for part in tables}
    if "validation" not in rows:
        rows["validation"], rows["train"] = split_rows(len(rows["train"]), (0.1,))
    left = table.columns.difference(["search_id", "click", label], sort=False)
    numbers = [name for name in left if name.startswith("numerical")]
    categories = table[left.difference(numbers, sort=False)]
    labels = _funnel(table[["click", label]])
    parts = [rows[part] for part in words]
    return _dataset(folder.resolve().name, table[numbers], categories, labels, parts)


def _funnel(funnel: pd.DataFrame) -> Labels:
    """The tasks of clicks and purchases, which are the columns of `funnel`."""
    click, bought = funnel.to_numpy(np.float32).T
    every = np.ones_like(click)
    return {
        CLICK: (click, every),
        CONVERSION_OF_CLICK: (bought, click),
        CONVERSION: (bought, every),
    }


def _dataset(
    name: str,
    numbers: pd.DataFrame,
    categories: pd.DataFrame,
    labels: Labels,
    rows: Sequence[np.ndarray] | None = None,
) -> Dataset:
    """A dataset of the rows for training, validation and test: by default 60, 20 and 20 % at random."""
    rows = split_rows(len(numbers), SHARES) if rows is None else rows
    numerical = numbers.to_numpy(np.float64).T
    categorical = [column.to_numpy() for _, column in categories.items()]
    values, masks = zip(*labels.values(), strict=True)
    examples, features = make_examples(numerical, categorical, values, masks, rows[0])
    return Dataset(name, tuple(map(Task, labels)), *map(examples.where, rows), features)


def _words(table: pd.DataFrame) -> pd.DataFrame:
    """Every value as a string, also where there is none."""
    return table.astype(str).fillna("nan")


def _read(path: Path, needed: Sequence[str]) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}")
    return table
