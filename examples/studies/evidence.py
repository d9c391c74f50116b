"""The bar chart of the README from the stored results: `python -m examples.studies.evidence`.

For every problem the plain sum, the best of a search over fixed weights, and one run of a method that is
named here; it trains nothing, and leaves out a problem whose results are not stored.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from examples.studies.harness.report import picture
from examples.studies.harness.statistics import standard_error

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "examples" / "studies" / "results"
OUT = ROOT / "docs" / "_static" / "evidence.svg"
BARS = ("plain sum", "best of a search", "one run of balancing")
COLORS = ("tab:gray", "tab:orange", "tab:blue")


class Panel(NamedTuple):
    """One problem of the chart.

    Attributes:
      title: of the panel.
      label: of its axis.
      file: below the results.
      rows: regular expressions for the names of the sum, of the search and of the method in the file, of
        which the last row with such a name counts: the largest search.
      kept: which lines of the file count, as pandas reads it.
      name, value: the columns of a row's name and of the number; the mean of a seed's lines is its number.
      against: a row to compare with line by line, in percent; None takes the numbers as they are.
    """

    title: str
    label: str
    file: str
    rows: tuple[str, str, str]
    kept: str
    name: str
    value: str
    against: str | None = None


PANELS = (
    Panel(
        "QM9: 11 properties",
        "error over a network per property (%)\nlower is better",
        "molecules/table.csv",
        ("sum", r"search, \d+ runs?", "scale_invariant"),
        "seed >= 0",
        "arm",
        "test",
        against="each property alone",
    ),
    Panel(
        "MovieLens in unlike units",
        "NDCG@10 of films rated 5",
        "compare/metrics.csv",
        ("sum", "searched weights", "imtl_g"),
        "part == 'test' and task == 'rated 5' and metric == 'ndcg@10, all'",
        "method",
        "value",
    ),
    *(
        Panel(
            f"PPO: {title}",
            "return",
            "reinforcement/returns.csv",
            ("sum", "searched weight of the critic", "imtl_g"),
            f"environment == {task!r}",
            "method",
            "return",
        )
        for task, title in (("cartpole", "CartPole"), ("acrobot", "Acrobot"))
    ),
)


def values_of(panel: Panel, results: Path) -> list[np.ndarray] | None:
    """The numbers of the three rows, one a seed; None if the file has not all of them."""
    if not (file := results / panel.file).exists():
        return None
    lines = pd.read_csv(file).query(panel.kept)
    groups = lines.groupby(panel.name, sort=False)
    by_name = {name: found.set_index("seed")[panel.value] for name, found in groups}
    means = []
    for row in panel.rows:
        named = [values for name, values in by_name.items() if re.fullmatch(row, name)]
        if not named or panel.against not in (None, *by_name):
            return None
        values = named[-1]
        if panel.against is not None:
            values = 100 * (values / np.asarray(by_name[panel.against]) - 1)
        means.append(np.asarray(values.groupby("seed").mean()))
    return means


def draw(results: Path, out: Path) -> list[str]:
    """Draw the panels that have results, and return their titles."""
    drawn = [
        (panel, values) for panel in PANELS if (values := values_of(panel, results)) is not None
    ]
    with picture(out, columns=max(len(drawn), 1), figsize=(3.2 * len(drawn), 3)) as (figure, grid):
        for axes, (panel, values) in zip(grid[0], drawn, strict=False):
            means = [of_seeds.mean() for of_seeds in values]
            errors = [standard_error(of_seeds) or np.nan for of_seeds in values]
            axes.bar(range(3), means, yerr=errors, color=COLORS, capsize=4, label=BARS)
            axes.set_title(panel.title, fontsize=10)
            axes.set_ylabel(panel.label, fontsize=8)
            axes.set_xticks(range(3), ["sum", "search", panel.rows[2]], fontsize=8)
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return [panel.title for panel, _ in drawn]


if __name__ == "__main__":
    titles = draw(RESULTS, OUT)
    print(f"{OUT}: {', '.join(titles)}")
    sys.exit(not titles)
