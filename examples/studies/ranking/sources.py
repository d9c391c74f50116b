"""Where ranking data comes from: two public tables, a folder in AliExpress's form, a generated log.

Nothing is downloaded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.studies.harness.errors import UserError
from examples.studies.ranking.data import Dataset, Task, make_examples, split_rows
from examples.studies.ranking.synthetic import LogConfig, synthetic

CLICK, CONVERSION, CONVERSION_OF_CLICK = "CTR", "Conv|imp", "CVR"
FUNNEL = (CLICK, CONVERSION_OF_CLICK, CONVERSION)
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
    for pattern, read in (("*hillstrom*.csv*", hillstrom), ("*census*income*.csv*", census)):
        if path.is_file() and path.match(pattern):
            return read(path)
        found = sorted(path.glob(pattern)) if path.is_dir() else []
        if found:
            return read(found[0])
    if path.is_dir():
        return impressions(path)
    raise UserError(f"--data {data}: no such file or folder; or use synthetic")


def hillstrom(path: Path) -> Dataset:
    """Hillstrom's e-mail challenge (2008): a visit, a purchase of those who visit, and a purchase at all.

    One CSV file of 64,000 customers with the columns recency, history_segment, history, mens, womens,
    zip_code, newbie, channel, segment, visit, conversion, spend.
    """
    table = _read(path, ("history", "visit", "conversion"))
    visit, bought = (np.asarray(table[name], np.float32) for name in ("visit", "conversion"))
    columns = ("history_segment", "zip_code", "channel", "segment", "mens", "womens", "newbie")
    return _whole(
        "hillstrom",
        {name: np.asarray(table[name], np.float64) for name in ("recency", "history")},
        {name: np.asarray(table[name], str) for name in columns},
        tuple(map(Task, FUNNEL)),
        (visit, bought, bought),
        (None, visit, None),
    )


def census(path: Path) -> Dataset:
    """UCI Census-Income (KDD), first group of the MMoE paper: an income above 50,000, and never married.

    One CSV file with the column names of `CENSUS_NUMBERS`, marital_stat, income_50k and others.
    """
    table = _read(path, (*CENSUS_NUMBERS, "marital_stat", "income_50k"))
    left = [name for name in table.columns if name not in (*CENSUS_NUMBERS, *CENSUS_LEFT_OUT)]
    income = np.asarray(table["income_50k"], str)
    married = np.asarray(table["marital_stat"], str)
    return _whole(
        "census income",
        {name: np.asarray(table[name], np.float64) for name in CENSUS_NUMBERS},
        {name: np.asarray(table[name], str) for name in left},
        (Task("income > 50K"), Task("never married")),
        (np.char.startswith(income, "50000+"), married == "Never married"),
        (None, None),
    )


def impressions(folder: Path) -> Dataset:
    """A folder in the form of preprocessed AliExpress or Ali-CCP files.

    CSV files whose names hold "train", "test" and, if there is one, "val" or "dev" (else a tenth of the
    training rows is the validation set). Columns: click, conversion or purchase; numerical_* hold
    numbers; search_id is left out; all others are categories.
    """
    words = {"train": ["train"], "validation": ["val", "dev"], "test": ["test"]}
    files = {
        part: next((p for name in names for p in sorted(folder.glob(f"*{name}*.csv*"))), None)
        for part, names in words.items()
    }
    if files["train"] is None or files["test"] is None:
        raise UserError(f"--data {folder}: no CSV files with train and test in their names")
    tables = {part: _read(path, ("click",)) for part, path in files.items() if path is not None}
    import pandas as pd

    sizes = {part: len(table) for part, table in tables.items()}
    table = pd.concat(tables.values(), ignore_index=True)
    label = next((name for name in ("conversion", "purchase") if name in table), None)
    if label is None:
        raise UserError(f"{files['train']}: no column conversion or purchase")
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()])[:-1], strict=True))
    rows = {part: np.arange(sizes[part]) + starts[part] for part in sizes}
    if "validation" not in rows:
        rows["validation"], rows["train"] = split_rows(sizes["train"], (0.1,))
    left = [name for name in table.columns if name not in ("search_id", "click", label)]
    numbers = [name for name in left if name.startswith("numerical")]
    click, bought = (np.asarray(table[name], np.float32) for name in ("click", label))
    return _parts(
        folder.resolve().name,
        {name: np.asarray(table[name], np.float64) for name in numbers},
        {name: np.asarray(table[name]) for name in left if name not in numbers},
        tuple(map(Task, FUNNEL)),
        (click, bought, bought),
        (None, click, None),
        [rows[part] for part in ("train", "validation", "test")],
    )


def _whole(
    name: str, numerical: Any, categorical: Any, tasks: Any, labels: Any, masks: Any
) -> Dataset:
    """A dataset of one file, split at random: 60 % training, 20 % validation, 20 % test."""
    rows = split_rows(len(labels[0]), SHARES)
    return _parts(name, numerical, categorical, tasks, labels, masks, rows)


def _parts(
    name: str,
    numerical: Any,
    categorical: Any,
    tasks: tuple[Task, ...],
    labels: Any,
    masks: Any,
    rows: Sequence[np.ndarray],
) -> Dataset:
    examples, features = make_examples(numerical, categorical, labels, masks, rows[0])
    return Dataset(name, features, tasks, *(examples.where(chosen) for chosen in rows))


def _read(path: Path, needed: Sequence[str]) -> Any:
    import pandas as pd

    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)}")
    return table
