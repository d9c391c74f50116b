"""What the finished runs say: the best learning rate of each network, the curve of a search, the table."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from math import comb
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.studies.harness.errors import UserError
from examples.studies.harness.report import MARKED, csv_of, mark, picture
from examples.studies.harness.statistics import Difference, compare, standard_error
from examples.studies.molecules.arms import (
    ALONE,
    LOG_ALONE,
    LOG_SEARCH,
    LOG_SUM,
    METHODS,
    NUM_TASKS,
    SEARCH,
    SUM,
)
from examples.studies.molecules.data import PROPERTIES
from examples.studies.molecules.training import Result

STORED = Path(__file__).parents[1] / "results" / "molecules" / "table.csv"
HEADER = ("arm", "runs", "seed", "property", "validation", "test")


class Tuned(NamedTuple):
    """The networks of an arm on one split, each at its best learning rate.

    Attributes:
      validation, test: mean absolute errors `[K, T]`, the best network by validation first.
    """

    validation: np.ndarray
    test: np.ndarray


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


def tuned(name: str, results: Sequence[Result], alone: np.ndarray | None) -> Tuned:
    """The results of all learning rates of an arm on one split, by validation alone.

    The value that chooses is `delta_m` of the validation errors; a network for one property is chosen by
    this property's error.
    """
    validation, test = (
        np.stack([getattr(result, part) for result in results]) for part in ("validation", "test")
    )  # [R, K, T]
    # A training that diverged is the worst.
    validation = np.where(np.isfinite(validation), validation, np.inf)
    if name in (ALONE, LOG_ALONE):
        validation, test = (np.diagonal(part, axis1=1, axis2=2) for part in (validation, test))
        best = validation.argmin(axis=0), np.arange(NUM_TASKS)
        return Tuned(validation[best][None], test[best][None])
    values = delta_m(validation, alone)
    rate = values.argmin(axis=0)
    networks = np.arange(len(rate))
    order = values[rate, networks].argsort(kind="stable")
    return Tuned(validation[rate, networks][order], test[rate, networks][order])


def best_of(count: int, found: int) -> np.ndarray:
    """How probable it is that the network of each rank `[found]` is the best of `count` at random."""
    ways = [comb(found - rank - 1, count - 1) for rank in range(found)]
    return np.array(ways) / comb(found, count)


def rows_of(
    results: Iterable[Result], seeds: int, rates: Sequence[float], alone: Row | None = None
) -> dict[str, Row]:
    """The rows of all arms that have every seed and learning rate.

    A search has a row for 1, 2, 4, ... runs: the expectation over all subsets of its networks of the one
    that is the best by validation.

    The networks for each property alone are `alone` where the results have none.
    """
    found: dict[str, dict[int, dict[float, Result]]] = {}
    for result in results:
        found.setdefault(result.arm, {}).setdefault(result.seed, {})[result.rate] = result
    complete = {
        name: [[of_arm[seed][rate] for rate in rates] for seed in range(seeds)]
        for name, of_arm in found.items()
        if all(set(rates) <= set(of_arm.get(seed, ())) for seed in range(seeds))
    }
    if ALONE in complete:
        alone = _row([tuned(ALONE, of_seed, None) for of_seed in complete.pop(ALONE)], NUM_TASKS)
    if alone is None:
        raise UserError(f"{ALONE!r}, what all arms are compared with, is not finished")
    rows = {ALONE: alone}
    for name, by_seed in complete.items():
        networks = [tuned(name, by_seed[s], alone.validation[s]) for s in range(seeds)]
        if name == LOG_ALONE:
            rows[name] = _row(networks, NUM_TASKS)
        elif name in (SEARCH, LOG_SEARCH):
            rows |= {searched(name, n): _row(networks, n) for n in sizes(len(networks[0].test))}
        else:
            rows[name] = _row(networks, 1)
    return rows


def _row(networks: Sequence[Tuned], runs: int) -> Row:
    share = best_of(min(runs, len(networks[0].test)), len(networks[0].test))
    return Row(runs, *(np.stack([share @ getattr(each, part) for each in networks])
                       for part in ("validation", "test")))  # fmt: skip


def sizes(count: int) -> list[int]:
    """1, 2, 4, ... and the whole search."""
    return sorted({*(2**k for k in range(count.bit_length()) if 2**k <= count), count})


def searched(name: str, runs: int) -> str:
    """The label of a search with so many runs."""
    label = f"search, {runs} run{'s' * (runs != 1)}"
    return label if name == SEARCH else f"{label}, log of the sum"


def stored(seeds: int) -> Row | None:
    """The networks for each property alone as the stored table has them, if it has all seeds."""
    parts = {part: np.full((seeds, NUM_TASKS), np.nan) for part in ("validation", "test")}
    if STORED.exists():
        with STORED.open() as stream:
            for line in csv.DictReader(stream):
                if line["arm"] == ALONE and int(line["seed"]) < seeds:
                    place = int(line["seed"]), list(PROPERTIES).index(line["property"])
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


def summarise(rows: Mapping[str, Row]) -> Summary:
    """All numbers of the table."""
    alone = rows[ALONE].test
    gains = {name: delta_m(row.test, alone) for name, row in rows.items()}
    fixed = [name for name in (ALONE, LOG_ALONE, SUM, LOG_SUM) if name in rows]
    curves = [name for name in rows if name.startswith("search")]
    methods = sorted(set(METHODS) & set(rows), key=lambda name: gains[name].mean())
    order = [*fixed, *curves, *methods]
    errors = np.stack([rows[name].test for name in order])
    places = (errors[:, None] > errors).sum(1) + 1 + ((errors[:, None] == errors).sum(1) - 1) / 2
    ranks = dict(zip(order, places.mean((1, 2)), strict=True))
    plain = [name for name in curves if "log" not in name]
    baseline = plain[-1] if plain else SUM if SUM in rows else None
    against = {}
    if baseline is not None and alone.shape[0] > 1:
        compared = {name: gains[name][None] for name in (baseline, *methods)}
        against = {name: found[0] for name, found in compare(compared, baseline).items()}
    return Summary({n: rows[n] for n in order}, gains, ranks, against, baseline)


def lines_of(summary: Summary, times: Mapping[str, float]) -> list[tuple[str, ...]]:
    """The header and the rows; errors of the properties in percent of their standard deviations."""
    lines = [("arm", "runs", "delta-m %", "rank", "step", *PROPERTIES)]
    searches = {name: row.runs for name, row in summary.rows.items() if name.startswith("search")}
    for name, row in summary.rows.items():
        if name in searches and row.runs not in (1, 4, 16, max(searches.values())):
            continue  # in the picture and the CSV file
        gain, found = summary.gains[name], summary.against.get(name)
        cell = f"{gain.mean() + 0:+.1f}"
        if len(gain) > 1:
            cell += f" ± {standard_error(gain):.1f}"
        cell += mark(found.p_value) if found else ""
        time = f"{times[name]:.2f}" if name in times else "-"
        errors = (f"{error:.1f}" for error in 100 * row.test.mean(axis=0))
        lines.append((name, str(row.runs), cell, f"{summary.ranks[name]:.1f}", time, *errors))
    return lines


def caption(summary: Summary, rates: int, seeds: int) -> str:
    """What the numbers of the table are."""
    text = (
        "delta-m: mean over the eleven properties of the relative change of the mean absolute error on the "
        "test molecules against a network for each property alone; lower is better; mean"
        f"{' ± standard error' if seeds > 1 else ''} over {seeds} split{'s' * (seeds != 1)}, each with a "
        "start of its own. runs: networks trained, "
        f"each at {rates} learning rates, of which the validation molecules chose, in every row alike. A "
        "search takes the best of its random weightings by validation: the expectation over all choices of "
        "so many from the largest. rank: mean over properties and splits among these rows. step: time of a "
        "training step over that of the sum, measured in turns. The properties: mean absolute error in "
        "percent of the property's standard deviation."
    )
    if summary.against:
        text += f" {MARKED}: against {summary.baseline}, two-sided paired t-test over the splits, "
        text += "Holm-corrected over the methods."
    return text


def worth(summary: Summary, name: str) -> str:
    """How many runs of the search a method is worth."""
    curve = [(row.runs, summary.gains[label].mean()) for label, row in summary.rows.items()
             if label.startswith("search") and "log" not in label]  # fmt: skip
    gain = summary.gains[name].mean()
    reached = [runs for runs, value in curve if value <= gain]
    if not reached:
        return f"more than a search of {curve[-1][0]} runs reaches"
    return f"what a search reaches with {reached[0]} run{'s' * (reached[0] != 1)}"


def verdict(summary: Summary) -> str:
    """What the table says, in sentences."""
    mean = {name: float(gain.mean()) for name, gain in summary.gains.items()}
    methods = [name for name in summary.rows if name in METHODS]
    says = []
    if SUM in mean:
        says.append(f"The plain sum has a delta-m of {mean[SUM]:+.1f} %.")
    if summary.baseline not in (None, SUM):
        says.append(f"{summary.baseline.capitalize()}: {mean[summary.baseline]:+.1f} %.")
    if methods:
        best = methods[0]
        line = f"The best of {len(methods)} methods in one run is {best} with {mean[best]:+.1f} %"
        if summary.baseline not in (None, SUM):
            line += f", {worth(summary, best)}"
            ahead = sum(mean[name] < mean[summary.baseline] for name in methods)
            sure = sum(
                found.p_value < 0.05 and found.mean < 0 for found in summary.against.values()
            )
            line += f"; {ahead} of them are below that search"
            line += f", {sure} significantly" if summary.against else ""
        says.append(line + ".")
        if SUM in mean:
            behind = sum(mean[name] >= mean[SUM] for name in methods)
            says.append(f"{behind} of {len(methods)} methods are no better than the plain sum.")
        logs = [mean[name] for name in methods if name == "scale_invariant"]
        if logs and LOG_SUM in mean:
            says.append(
                "How much is no balance: the logarithm of the sum, whose gradient is that of the sum times "
                f"one factor, has {mean[LOG_SUM]:+.1f} %; the sum of the logarithms (scale_invariant), "
                f"{logs[0]:+.1f} %."
            )
        if LOG_ALONE in mean:
            gap = mean[best] - mean[LOG_ALONE]
            says.append(
                "A network for each property alone with the logarithm of its loss has "
                f"{mean[LOG_ALONE]:+.1f} %: {abs(gap):.1f} points {'below' if gap > 0 else 'above'} "
                "that method."
            )
    return " ".join(says)


def csv_lines(rows: Mapping[str, Row]) -> str:
    """Every row, seed and property, unrounded."""
    found = (
        (name, row.runs, seed, title, float(row.validation[seed, t]), float(row.test[seed, t]))
        for name, row in rows.items()
        for seed in range(len(row.test))
        for t, title in enumerate(PROPERTIES)
    )
    return csv_of(HEADER, found)


# No baseline has the colour of a place.
PLACES = {"losses": "tab:green", "representation": "tab:blue", "parameters": "tab:red"}
BASELINES = {ALONE: "tab:purple", LOG_ALONE: "tab:pink", SUM: "tab:orange", LOG_SUM: "tab:brown"}


def draw(summary: Summary, path: Path) -> None:
    """Quality against the number of runs: the curve of a search, and one point for every method."""
    mean = {name: gain.mean() for name, gain in summary.gains.items()}
    error = {name: standard_error(gain) for name, gain in summary.gains.items()}
    with picture(path, dpi=100, figsize=(8, 6)) as (_, grid):
        axes = grid[0, 0]
        for log, style in ((False, "k"), (True, "tab:gray")):
            curve = [n for n in mean if n.startswith("search") and ("log" in n) == log]
            if curve:
                of_curve: list[Any] = [[part[n] for n in curve] for part in (mean, error)]
                label = "search over fixed weights" + ", log of the sum" * log
                runs = [summary.rows[n].runs for n in curve]
                axes.errorbar(runs, of_curve[0], of_curve[1], color=style, marker="o", label=label)
        for name, color in BASELINES.items():
            if name in mean:
                runs = summary.rows[name].runs
                axes.errorbar(runs, mean[name], error[name], fmt="s", color=color, label=name)
        methods = [name for name in summary.rows if name in METHODS]
        # A method that fails would flatten the rest of the picture.
        top = 1.3 * max(mean[name] for name in mean if name not in METHODS)
        beyond = [f"{name} {mean[name]:+.0f} %" for name in methods if mean[name] > top]
        if beyond:
            axes.set_title(f"above the picture: {', '.join(beyond)}", fontsize=9)
        methods = [name for name in methods if mean[name] <= top]
        colors = {p: c for p, c in PLACES.items() if p in map(_place, methods)}
        for place, color in colors.items():
            values = [mean[name] for name in methods if _place(name) == place]
            offset = 1.0 + 0.12 * list(PLACES).index(place)
            axes.plot([offset] * len(values), values, "_", color=color, markersize=14, mew=2,
                      label=f"one run of a method on the {place}")  # fmt: skip
        shown = [n for p in colors for n in [m for m in methods if _place(m) == p][:2]]
        last = -np.inf
        low, high = axes.get_ylim()
        for name in sorted(shown, key=mean.__getitem__):
            last = max(mean[name], last + (high - low) / 40)  # labels do not overlap
            color = colors[_place(name)]
            axes.text(1.36, last, name.split(", ")[0], color=color, fontsize=8, va="center")
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set(xscale="log", xlabel="networks trained (each at all learning rates)",
                 ylabel="delta-m in % (lower is better)")  # fmt: skip
        most = max(row.runs for row in summary.rows.values())
        ticks = [runs for runs in (1, 2, 4, 8, NUM_TASKS, 16, 32, 64) if runs <= most]
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.minorticks_off()
        axes.legend(fontsize=8)


def _place(name: str) -> str:
    """Where a method stands, from its label."""
    last = name.rsplit(", ", 1)[-1]
    return last if last in ("representation", "parameters") else "losses"
