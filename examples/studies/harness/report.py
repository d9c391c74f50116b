"""Tables of finished runs: for a terminal, as Markdown and CSV, and as pictures."""

import csv
import io
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from examples.studies.harness.command import write_atomically
from examples.studies.harness.runs import Run
from examples.studies.harness.statistics import Difference, standard_error

Lines = Sequence[Sequence[str]]  # the header first
WIDTH = 80  # of the notes in a file
MARKS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
MARKED = ", ".join(f"{mark} p < {limit}" for limit, mark in reversed(MARKS))
OVER_SEEDS = f"{MARKED}, two-sided paired t-test over the seeds, Holm-corrected"


# --- numbers of runs --------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of a table.

    Attributes:
      runs: one a seed, measured.
      trainings: how many the row took, with those of a search; 0 for a row that trains nothing.
      seconds: of all of them.
      step: time of a step over the plain sum's.
    """

    runs: Sequence[Run]
    trainings: int
    seconds: float
    step: float | None = None


def row(runs: Sequence[Run], searched: Sequence[Run] = ()) -> Row:
    """The row of measured runs that counts those of a search too."""
    return Row(runs, len(runs) + len(searched), sum(run.seconds for run in (*runs, *searched)))


def reference(label: str, validation: Mapping[str, Any], test: Mapping[str, Any]) -> Row:
    """A row that trains nothing."""
    return Row([Run(label, 0, dict(validation), dict(test), 0, 0.0, {})], 0, 0.0)


@dataclass(frozen=True)
class Metric:
    """One number of a run.

    Attributes:
      task, name: whose number, and which.
      of: the number, from what a run holds of the task.
      digits: that are shown.
    """

    task: str
    name: str
    of: Callable[[np.ndarray], Any]
    digits: int = 4

    def by_seed(self, runs: Sequence[Run], part: str = "test") -> np.ndarray:
        """`[seeds]`; empty where the runs say nothing of the task."""
        found = [getattr(run, part) for run in runs]
        return np.array([self.of(each[self.task]) for each in found if self.task in each])

    def cell(self, runs: Sequence[Run]) -> str:
        """See `mean_cell`."""
        return mean_cell(self.by_seed(runs), self.digits)


def mean_cell(values: np.ndarray, digits: int = 4, p_value: float = 1.0) -> str:
    """A mean over seeds, with its standard error where there are several; a dash for no number or NaN.

    A metric may have no value: the AUC of a task without a positive in the test set.
    """
    if not len(values) or np.isnan(values.mean()):
        return "-"
    text = f"{round(values.mean(), digits) + 0:.{digits}f}"  # + 0: not -0.00
    if len(values) > 1:
        text += f" ± {standard_error(values):.{digits}f}"
    return text + mark(p_value)


def gain_cell(difference: Difference) -> str:
    """A gain with its standard error and the mark of significance; a dash where there is none."""
    if np.isnan(difference.mean):
        return "-"
    text = f"{difference.mean:+.3f}"
    if not np.isnan(difference.error):
        text += f" ± {difference.error:.3f}"
    return text + mark(difference.p_value)


def mark(p_value: float) -> str:
    """The stars of a p-value."""
    return next((mark for limit, mark in MARKS if p_value < limit), "")


def csv_of(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A CSV file, its numbers with six digits."""
    stream, real = io.StringIO(), (float, np.floating)
    cells = ([f"{cell:.6g}" if isinstance(cell, real) else cell for cell in row] for row in rows)
    csv.writer(stream, lineterminator="\n").writerows([header, *cells])
    return stream.getvalue()


def metrics_csv(rows: Mapping[str, Sequence[Run]], metrics: Sequence[Metric]) -> str:
    """Every metric of every row, seed and part, unrounded."""
    found = (
        (label, part, metric.task, metric.name, run.seed, float(value))
        for label, runs in rows.items()
        for part in ("validation", "test")
        for metric in metrics
        for run, value in zip(runs, metric.by_seed(runs, part), strict=False)
    )
    return csv_of(("method", "part", "task", "metric", "seed", "value"), found)


# --- pictures ---------------------------------------------------------------------------------------


@contextmanager
def picture(
    path: Path | None, lines: int = 1, columns: int = 1, dpi: int = 80, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """A figure and its grid of plots, written to a path at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(lines, columns, squeeze=False, layout="constrained", **options)
    yield figure, grid
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
    plt.close(figure)


def curve(axes: Any, values: np.ndarray, label: str) -> None:
    """Draw values over the epochs 1, 2, ...; a single one is a point."""
    marker = "o" if len(values) == 1 else None
    axes.plot(np.arange(1, len(values) + 1), values, marker=marker, label=label)


# --- tables -----------------------------------------------------------------------------------------


def publish(
    out: Path | None,
    name: str,
    lines: Lines,
    title: str,
    note: str = "",
    files: Mapping[str, str] | None = None,
    *,
    left: int = 1,
) -> None:
    """Print a table, and write it to `out` as `NAME.md` beside other files.

    Args:
      out: a folder, or None.
      name: of the file.
      lines: the header and the rows.
      title: above them.
      note: below them; an empty line separates paragraphs.
      files: further texts by the name of the file.
      left: how many columns are aligned to the left.
    """
    page = markdown(lines, title, note, left=left)
    if sys.stdout.isatty():
        show(Console(markup=False, highlight=False), lines, title, note, left=left)
    else:
        print(page)
    if out is not None:
        for file, text in {f"{name}.md": page, **(files or {})}.items():
            write_atomically(out / file, text.encode())


def show(console: Console, lines: Lines, title: str, note: str, *, left: int = 1) -> None:
    """Print a table that is as wide as the terminal at most."""
    header, *rows = lines
    table = Table(title=title, box=box.SIMPLE, title_justify="left", padding=(0, 1, 0, 0))
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, note)


def say(text: str) -> None:
    """Print a text, broken between words."""
    print(_wrapped(text, shutil.get_terminal_size().columns))


def markdown(lines: Lines, title: str, note: str = "", *, left: int = 1) -> str:
    """The table for a page."""
    wrapped = _wrapped(note, WIDTH)
    # A line may begin with what Markdown takes for an item of a list: "* p < 0.05", or the end of "is 1."
    escaped = re.sub(r"^(\d*)([-+*#>.)])(?= )", r"\1\\\2", wrapped, flags=re.MULTILINE)
    parts = (f"**{title}**", pipe_table(lines, left=left), escaped)
    return "\n\n".join(part for part in parts if part) + "\n"


def pipe_table(lines: Lines, *, left: int = 1) -> str:
    """Cells as Markdown, header first; the columns after the first `left` are aligned to the right."""
    rule = ["---" if place < left else "---:" for place in range(len(lines[0]))]
    # The name of a task may hold a bar, which would end a cell.
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in (lines[0], rule, *lines[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


def _wrapped(text: str, width: int) -> str:
    return "\n\n".join(
        textwrap.fill(paragraph, width, break_long_words=False, break_on_hyphens=False)
        for paragraph in text.split("\n\n")
    )
