"""Plots of weights, norms, conflicts and losses over training; they need the extra `plot` (matplotlib).

Every function draws on one `Axes` and returns it, so that plots can be placed side by side, restyled and
saved like any other. A *history* is an entry of `diagnostics`, stacked over the steps: the second output
of a `lax.scan` that returns `diagnostics(state, method)["weights"]`, for example. It is an array
`[steps, T]` or, for named tasks, a mapping from task names to arrays `[steps]`. For several blocks it is a
mapping from block names to mappings from task names to arrays `[steps]` or, with `task_names=`, to arrays
`[steps, T]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.typing import LineStyleType

# `[steps, T]`, or `[steps]` by task name.
_ByTask: TypeAlias = ArrayLike | Mapping[str, ArrayLike]
_History: TypeAlias = _ByTask | Mapping[str, _ByTask]
_Names: TypeAlias = Sequence[str] | None
_Cosines: TypeAlias = ArrayLike | Mapping[str, Mapping[str, ArrayLike]]

# One line style per block; they repeat from the ninth block on.
_STYLES: tuple[LineStyleType, ...] = (
    "-",
    "--",
    ":",
    "-.",
    (0, (8, 3)),
    (0, (1, 5)),
    (0, (6, 2, 1, 2, 1, 2)),
    (0, (8, 2, 3, 2)),
)
# Tick labels with more characters in total overlap below a heat map.
_LONGEST_TICKS = 30


def plot_weights(history: _History, *, task_names: _Names = None, ax: Axes | None = None) -> Axes:
    """Draws the weight of every task over the steps.

    Args:
      history: `[steps, T]`, a mapping from task names to arrays `[steps]`, or a mapping from block names
        to mappings from task names; tasks differ in colour, and blocks (up to 8) in the style of their
        lines.
      task_names: T labels for arrays `[steps, T]`; "task 0", ... by default. With them, a mapping to arrays
        is from block names to arrays `[steps, T]`.
      ax: the `Axes` to draw on; a new figure's by default.

    Returns:
      The `Axes`. A single step is drawn as a point.

    Raises:
      ImportError: if matplotlib is not installed.
      ValueError: if the history or the names have the wrong shape.

    Example:

      >>> import matplotlib; matplotlib.use("Agg")
      >>> from mtl_optax.plotting import plot_weights
      >>> ax = plot_weights({"buy": [0.5, 0.4], "click": [0.5, 0.6]})
      >>> ax.get_ylabel(), [line.get_label() for line in ax.get_lines()]
      ('weight', ['buy', 'click'])
    """
    return _plot_lines("plot_weights", history, "weight", task_names, ax)


def plot_norms(history: _History, *, task_names: _Names = None, ax: Axes | None = None) -> Axes:
    """Draws the gradient norm of every task over the steps, on a logarithmic scale.

    Args:
      history: as in `plot_weights`.
      task_names: as in `plot_weights`.
      ax: the `Axes` to draw on; a new figure's by default.

    Returns:
      The `Axes`. A norm of 0 is drawn as a gap.

    Raises:
      ImportError: if matplotlib is not installed.
      ValueError: if the history or the names have the wrong shape.

    Example:

      >>> import matplotlib; matplotlib.use("Agg")
      >>> from mtl_optax.plotting import plot_norms
      >>> plot_norms({"w": [[1.0, 10.0], [2.0, 0.0]]}, task_names=["buy", "click"]).get_yscale()
      'log'
    """
    ax = _plot_lines("plot_norms", history, "gradient norm", task_names, ax)
    ax.set_yscale("log", nonpositive="mask")
    return ax


def plot_conflicts(
    cosines: _Cosines,
    *,
    task_names: _Names = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the cosines between task gradients as a heat map; negative ones are conflicts.

    Args:
      cosines: `[..., T, T]`, or a mapping from task names to mappings from task names to arrays `[...]`;
        the mean over the leading axes, such as that of the steps, is drawn.
      task_names: T labels for arrays; "task 0", ... by default.
      ax: the `Axes` to draw on; a new figure's by default.

    Returns:
      The `Axes`.

    Raises:
      ImportError: if matplotlib is not installed.
      ValueError: if the cosines or the names have the wrong shape.

    Example:

      >>> import matplotlib; matplotlib.use("Agg")
      >>> from mtl_optax.plotting import plot_conflicts
      >>> ax = plot_conflicts([[1.0, -0.5], [-0.5, 1.0]])
      >>> [text.get_text() for text in ax.texts]
      ['1.00', '-0.50', '-0.50', '1.00']
    """
    if isinstance(cosines, Mapping) and task_names is None:
        task_names = list(cosines)
    values = _matrix(cosines)
    names = _labels("plot_conflicts", task_names, values.shape[0])
    ax = _axes(ax)
    image = ax.imshow(values, vmin=-1, vmax=1, cmap="RdBu")
    for row, column in np.ndindex(*values.shape):
        value = round(float(values[row, column]), 2) + 0.0  # no "-0.00"
        color = "white" if abs(value) > 0.6 else "black"
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
    long = len("".join(names)) > _LONGEST_TICKS
    tilt = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if long else {}
    ax.set_xticks(range(len(names)), names, **tilt)
    ax.set_yticks(range(len(names)), names)
    ax.figure.colorbar(image, ax=ax, label="cosine", ticks=[-1, -0.5, 0, 0.5, 1])
    return ax


def _matrix(cosines: _Cosines) -> np.ndarray:
    """Returns the cosines `[T, T]`, averaged over the leading axes."""
    if isinstance(cosines, Mapping):
        if any(
            not isinstance(row, Mapping) or set(row) != set(cosines) for row in cosines.values()
        ):
            raise ValueError(
                "plot_conflicts: cosines must be a mapping from task names to mappings from task names; "
                f"found the keys {list(cosines)}. Of several blocks give those of one."
            )
        rows = [[row[name] for name in cosines] for row in cosines.values()]
        values = np.moveaxis(np.asarray(rows, dtype=float), (0, 1), (-2, -1))
    else:
        values = np.asarray(cosines, dtype=float)
    if values.ndim < 2 or values.shape[-1] != values.shape[-2]:
        raise ValueError(
            f"plot_conflicts: cosines must be an array [..., T, T]; found the shape {values.shape}."
        )
    return values.reshape(-1, *values.shape[-2:]).mean(axis=0)


def plot_pareto(
    trajectories: _History,
    *,
    tasks: tuple[int | str, int | str] = (0, 1),
    task_names: _Names = None,
    front: ArrayLike | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws how the losses of two tasks change over training, one path per run.

    Args:
      trajectories: losses `[steps, T]`, a mapping from task names to arrays `[steps]`, or a mapping from
        labels of runs (methods, seeds) to mappings from task names. A dot marks the start of a path, a
        star its end.
      tasks: the two tasks to draw, by index or name.
      task_names: T labels for arrays `[steps, T]`; "task 0", ... by default. With them, a mapping to arrays
        is from labels of runs to arrays `[steps, T]`.
      front: `[points, 2]`, a known Pareto front to draw behind the paths, in the order of `tasks`.
      ax: the `Axes` to draw on; a new figure's by default.

    Returns:
      The `Axes`.

    Raises:
      ImportError: if matplotlib is not installed.
      ValueError: if the losses or the names have the wrong shape, or a task is unknown.

    Example:

      >>> import matplotlib; matplotlib.use("Agg")
      >>> from mtl_optax.plotting import plot_pareto
      >>> ax = plot_pareto({"sum": [[3.0, 2.0], [1.0, 1.5]]}, task_names=["click", "buy"])
      >>> ax.get_xlabel(), ax.get_ylabel()
      ('loss of click', 'loss of buy')
    """
    runs, names = _read("plot_pareto", trajectories, "trajectories", task_names)
    numbers: dict[int | str, int] = {t: t for t in range(len(names))}
    numbers |= {name: t for t, name in enumerate(names)}
    if not all(task in numbers for task in tasks):
        raise ValueError(
            f"plot_pareto: tasks must be two of 0 to {len(names) - 1} or of {names}; found {tasks}."
        )
    ax = _axes(ax)
    if front is not None:
        points = np.asarray(front, dtype=float)
        ax.plot(points[:, 0], points[:, 1], color="0.7", linewidth=4, label="Pareto front")
    for label, losses in runs.items():
        path = losses[:, [numbers[task] for task in tasks]]
        (line,) = ax.plot(path[:, 0], path[:, 1], label=label or None)
        ax.plot(*path[0], "o", color=line.get_color())
        ax.plot(*path[-1], "*", color=line.get_color(), markersize=12)
    ax.set_xlabel(f"loss of {names[numbers[tasks[0]]]}")
    ax.set_ylabel(f"loss of {names[numbers[tasks[1]]]}")
    if any(runs) or front is not None:
        ax.legend()
    return ax


def _plot_lines(
    caller: str, history: _History, what: str, task_names: _Names, ax: Axes | None
) -> Axes:
    blocks, names = _read(caller, history, "history", task_names)
    ax = _axes(ax)
    for number, (block, values) in enumerate(blocks.items()):
        for task, name in enumerate(names):
            ax.plot(
                values[:, task],
                color=_color(task),
                linestyle=_STYLES[number % len(_STYLES)],
                marker="o" if len(values) == 1 else None,  # a line needs two steps
                label=f"{name}, {block}" if block else name,
            )
    ax.set_xlabel("step")
    ax.set_ylabel(what)
    if len(blocks) == 1:
        ax.legend()
    else:
        _legend_of_blocks(ax, list(blocks), names)
    return ax


def _legend_of_blocks(ax: Axes, blocks: list[str], names: list[str]) -> None:
    """Adds a legend beside the plot, with one line per task and one per block."""
    from matplotlib.lines import Line2D

    of_tasks = [Line2D([], [], color=_color(task)) for task in range(len(names))]
    of_blocks = [
        Line2D([], [], color="black", linestyle=_STYLES[number % len(_STYLES)])
        for number in range(len(blocks))
    ]
    ax.legend([*of_tasks, *of_blocks], names + blocks, loc="upper left", bbox_to_anchor=(1, 1))


def _color(task: int) -> str:
    return f"C{task % 10}"


def _read(
    caller: str, given: _History, what: str, task_names: _Names
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the arrays `[steps, T]` by block or run ("" if there is only one), and the task labels."""
    if not isinstance(given, Mapping):
        given = {"": given}
    elif task_names is None and not any(isinstance(part, Mapping) for part in given.values()):
        given = {"": cast("Mapping[str, ArrayLike]", given)}
    arrays = {}
    for label, part in given.items():
        if isinstance(part, Mapping):
            task_names = list(part) if task_names is None else task_names
            part = np.asarray(list(part.values()), dtype=float).T
        arrays[label] = np.asarray(part, dtype=float)
    shapes = [values.shape for values in arrays.values()]
    if not shapes or any(len(s) != 2 or s[1] != shapes[0][1] for s in shapes):
        raise ValueError(
            f"{caller}: {what} must be an array [steps, T], a mapping from task names to arrays [steps], "
            "a mapping from labels to such mappings or, with task_names=, to arrays [steps, T]; found "
            f"the shapes {shapes}."
        )
    return arrays, _labels(caller, task_names, shapes[0][1])


def _labels(caller: str, task_names: _Names, num_tasks: int) -> list[str]:
    names = [f"task {t}" for t in range(num_tasks)] if task_names is None else list(task_names)
    if len(names) != num_tasks:
        raise ValueError(f"{caller}: task_names must have {num_tasks} entries, found {len(names)}.")
    return names


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            'mtl_optax.plotting needs matplotlib: python -m pip install "mtl_optax[plot]"'
        ) from error
    return pyplot.subplots()[1]
