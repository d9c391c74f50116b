"""What the finished runs say: the best learning rate of each network, the curve of a search, the table."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from examples.studies.harness.errors import UserError
from examples.studies.harness.report import MARKED, csv_of, mark, picture
from examples.studies.harness.statistics import Difference, best_of, compare, standard_error
from examples.studies.molecules import arms
from examples.studies.molecules.arms import ALONE, METHODS, NUM_TASKS, SUM
from examples.studies.molecules.data import PROPERTIES
from examples.studies.molecules.training import Result

STORED = Path(__file__).parents[1] / "results" / "molecules" / "table.csv"
HEADER = ("arm", "runs", "seed", "property", "validation", "test")


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      runs: how many networks were trained for it, at each learning rate.
      validation, test: mean absolute errors `[seeds, T]`.
    """

    runs: int
    validation: np.ndarray
    test: np.ndarray


def delta_m(errors: np.ndarray, alone: np.ndarray) -> np.ndarray:
    """The mean relative change of the errors `[..., T]` against a network for each property, in percent."""
    return 100 * np.mean(errors / alone - 1, axis=-1)


def tuned(name: str, results: Sequence[Result], alone: np.ndarray | None) -> np.ndarray:
    """The validation and test errors `[K, 2, T]` of an arm's networks, each at its best learning rate.

    `results` are those of all learning rates on one split. The value that chooses is `delta_m` of the
    validation errors, by which the best network is the last; one for one property is chosen by this
    property's error.
    """
    errors = np.array([(result.validation, result.test) for result in results])  # [R, 2, K, T]
    # A training that diverged is the worst.
    validation = errors[:, 0] = np.where(np.isfinite(errors[:, 0]), errors[:, 0], np.inf)
    if name in (ALONE, arms.LOG_ALONE):
        own = np.diagonal(errors, axis1=2, axis2=3)  # [R, 2, T]
        best = np.diagonal(validation, axis1=1, axis2=2).argmin(axis=0)
        return own[best, :, np.arange(NUM_TASKS)].T[None]
    values = delta_m(validation, alone)
    order = values.min(axis=0).argsort(kind="stable")[::-1]
    return errors[values.argmin(axis=0)[order], :, order]


def rows_of(
    results: Iterable[Result], seeds: int, rates: Sequence[float], alone: Row | None = None
) -> dict[str, Row]:
    """The rows of all arms that have every seed and learning rate.

    A search has a row for 1, 2, 4, ... runs: the expectation over all subsets of its networks of the one
    that is the best by validation.

    The networks for each property alone are `alone` where the results have none.
    """
    found = {(result.arm, result.seed, result.rate): result for result in results}
    complete = {
        name: [[found[name, seed, rate] for rate in rates] for seed in range(seeds)]
        for name in dict.fromkeys(name for name, *_ in found)
        if all((name, seed, rate) in found for seed in range(seeds) for rate in rates)
    }
    if ALONE in complete:
        alone = _row([tuned(ALONE, of_seed, None) for of_seed in complete.pop(ALONE)], NUM_TASKS)
    if alone is None:
        raise UserError(f"{ALONE!r}, what all arms are compared with, is not finished")
    rows = {ALONE: alone}
    for name, by_seed in complete.items():
        errors = [tuned(name, by_seed[seed], alone.validation[seed]) for seed in range(seeds)]
        if name in (arms.SEARCH, arms.LOG_SEARCH):
            rows |= {searched(name, n): _row(errors, n) for n in sizes(len(errors[0]))}
        else:
            rows[name] = _row(errors, NUM_TASKS if name == arms.LOG_ALONE else 1)
    return rows


def _row(errors: Sequence[np.ndarray], runs: int) -> Row:
    found = [best_of(min(runs, len(of_seed)), of_seed) for of_seed in errors]
    return Row(runs, *np.stack(found, axis=1))


def sizes(count: int) -> list[int]:
    """1, 2, 4, ... and the whole search."""
    return sorted({*(2**k for k in range(count.bit_length()) if 2**k <= count), count})


def searched(name: str, runs: int) -> str:
    """The label of a search with so many runs."""
    label = f"search, {runs} run{'s' * (runs != 1)}"
    return label if name == arms.SEARCH else f"{label}, log of the sum"


def stored(seeds: int) -> Row | None:
    """The networks for each property alone as the stored table has them, if it has all seeds."""
    parts = {part: np.full((seeds, NUM_TASKS), np.nan) for part in ("validation", "test")}
    if STORED.exists():
        with STORED.open() as stream:
            for line in csv.DictReader(stream):
                if line["arm"] == ALONE and int(line["seed"]) < seeds:
                    place = int(line["seed"]), PROPERTIES.index(line["property"])
                    for part, values in parts.items():
                        values[place] = float(line[part])
    return None if np.isnan(parts["test"]).any() else Row(NUM_TASKS, **parts)


# --- the table --------------------------------------------------------------------------------------


class Summary(NamedTuple):
    """What the table and the sentences are made of.

    Attributes:
      rows: see `rows_of`, in the order of the table.
      gains: `delta_m` on the test molecules by row `[seeds]`.
      ranks: the mean rank over properties and seeds.
      against: the difference of `delta_m` to the largest search or, where there is none, to the sum.
      baseline: the row that `against` compares with.
    """

    rows: dict[str, Row]
    gains: dict[str, np.ndarray]
    ranks: dict[str, float]
    against: dict[str, Difference]
    baseline: str | None


def curve(rows: Iterable[str], log: bool = False) -> list[str]:
    """The rows of a search, which are in the order of their runs."""
    return [name for name in rows if name.startswith("search") and ("log" in name) == log]


def summarise(rows: Mapping[str, Row]) -> Summary:
    """All numbers of the table."""
    alone = rows[ALONE].test
    gains = {name: delta_m(row.test, alone) for name, row in rows.items()}
    fixed = [name for name in (ALONE, arms.LOG_ALONE, SUM, arms.LOG_SUM) if name in rows]
    methods = sorted(set(METHODS) & set(rows), key=lambda name: gains[name].mean())
    order = [*fixed, *curve(rows), *curve(rows, log=True), *methods]
    places = rankdata(np.nan_to_num([rows[name].test for name in order], nan=np.inf), axis=0)
    ranks = dict(zip(order, places.mean((1, 2)), strict=True))
    baseline = next(reversed(curve(rows)), SUM if SUM in rows else None)
    against = {}
    if baseline is not None and alone.shape[0] > 1:
        compared = {name: gains[name][None] for name in (baseline, *methods)}
        against = {name: found[0] for name, found in compare(compared, baseline).items()}
    return Summary({n: rows[n] for n in order}, gains, ranks, against, baseline)


def lines_of(summary: Summary) -> list[tuple[str, ...]]:
    """The header and the rows; errors of the properties in percent of their standard deviations."""
    lines = [("arm", "runs", "delta-m %", "rank", *PROPERTIES)]
    searches = {name: row.runs for name, row in summary.rows.items() if name.startswith("search")}
    for name, row in summary.rows.items():
        if name in searches and row.runs not in (1, 4, 16, max(searches.values())):
            continue  # in the picture and the CSV file
        gain, found = summary.gains[name], summary.against.get(name)
        cell = f"{gain.mean() + 0:+.1f}"
        if len(gain) > 1:
            cell += f" ± {standard_error(gain):.1f}"
        cell += mark(found.p_value) if found else ""
        errors = (f"{error:.1f}" for error in 100 * row.test.mean(axis=0))
        lines.append((name, str(row.runs), cell, f"{summary.ranks[name]:.1f}", *errors))
    return lines


def caption(summary: Summary, rates: int, seeds: int) -> str:
    """What the numbers of the table are."""
    text = (
        "delta-m: mean over the eleven properties of the relative change of the mean absolute error on the "
        "test molecules against a network for each property alone; lower is better; mean"
        f"{' ± standard error' if seeds > 1 else ''} over {seeds} split{'s' * (seeds != 1)}, each with a "
        f"start of its own. runs: networks trained, each at {rates} learning rates, of which the "
        "validation molecules chose, in every row alike. A search takes the best of its random weightings "
        "by validation: the expectation over all choices of so many from the largest. rank: mean over "
        "properties and splits among these rows. The properties: mean absolute error in percent of the "
        "property's standard deviation."
    )
    if summary.against:
        text += f" {MARKED}: against {summary.baseline}, two-sided paired t-test over the splits, "
        text += "Holm-corrected over the methods."
    return text


def verdict(summary: Summary) -> str:
    """What the table says of the methods, in a sentence."""
    methods = {name: float(summary.gains[name].mean()) for name in summary.rows if name in METHODS}
    if not methods or summary.baseline is None:
        return ""
    limit = float(summary.gains[summary.baseline].mean())
    below = sum(gain < limit for gain in methods.values())
    sure = sum(found.p_value < 0.05 and found.mean < 0 for found in summary.against.values())
    best, gain = next(iter(methods.items()))
    return (
        f"Of {len(methods)} methods in one run each, {below} are below {summary.baseline} "
        f"({limit:+.1f} %), {sure} significantly; the best is {best} with {gain:+.1f} %."
    )


def csv_lines(rows: Mapping[str, Row]) -> str:
    """Every row, seed and property, unrounded."""
    found = (
        (name, row.runs, seed, title, float(row.validation[seed, t]), float(row.test[seed, t]))
        for name, row in rows.items()
        for seed in range(len(row.test))
        for t, title in enumerate(PROPERTIES)
    )
    return csv_of(HEADER, found)


def draw(summary: Summary, path: Path) -> None:
    """Quality against the number of runs: the curves of the searches, and a mark for every other row."""
    rows, gains = summary.rows, summary.gains
    methods = [name for name in rows if name in METHODS]
    series = [
        ("search over fixed weights", curve(rows), "o-", 1.0),
        ("search, log of the sum", curve(rows, log=True), "o-", 1.0),
        *((name, [name], "s", 1.0) for name in (ALONE, arms.LOG_ALONE, SUM, arms.LOG_SUM) if name in rows),
        *((f"one run of a method on the {place}",
           [name for name in methods if METHODS[name].method.place == place], "_", shift)
          for place, shift in zip(arms.PLACES, (1.0, 1.1, 1.2), strict=True)),
    ]  # fmt: skip
    with picture(path, dpi=100, figsize=(8, 6)) as (_, ((axes,),)):
        for label, names, form, shift in filter(itemgetter(1), series):
            runs, means = [shift * rows[n].runs for n in names], [gains[n].mean() for n in names]
            errors = None if form == "_" else [standard_error(gains[n]) for n in names]
            axes.errorbar(runs, means, errors, fmt=form, markersize=8, label=label)
        # A method that fails would flatten the rest of the picture.
        top = max(gains[name].mean() for name in rows if name not in METHODS)
        axes.set_ylim(min(gain.mean() for gain in gains.values()) - 10, 1.3 * top + 1)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set(xscale="log", xlabel="networks trained (each at all learning rates)",
                 ylabel="delta-m in % (lower is better)")  # fmt: skip
        ticks = sorted({row.runs for row in rows.values()})
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.minorticks_off()
        axes.legend(fontsize=8)
