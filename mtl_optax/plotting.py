"""Pictures of the balance of the tasks over training; needs the extra `plot` (matplotlib).

Every function draws on one `Axes` and returns it, so that pictures can be placed side by side, restyled
and saved as any other. A *history* is what `diagnostics` told, stacked over steps: the second output of a
`lax.scan` that returns `diagnostics(state)["weights"]`, or a list of arrays `[T]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def plot_weights(history: Any, *, task_names: Sequence[str] | None = None, ax: Any = None) -> Any:
    """Draws the weight of every task over the steps.

    Args:
      history: `[steps, T]`, or a mapping from block names to such arrays, each drawn in a line style of
        its own.
      task_names: T labels; "task 0", ... by default.
      ax: the `Axes` to draw on; a new figure's by default.

    Returns:
      The `Axes`.

    Raises:
      ImportError: where matplotlib is not installed.
      ValueError: for a history or names of the wrong shape.

    Example:

      >>> import matplotlib; matplotlib.use("Agg")
      >>> from mtl_optax.plotting import plot_weights
      >>> ax = plot_weights([[0.5, 0.5], [0.4, 0.6]], task_names=["click", "buy"])
      >>> ax.get_ylabel(), [line.get_label() for line in ax.get_lines()]
      ('weight', ['click', 'buy'])
    """
    return _plot_lines(history, "weight", task_names, ax)


def plot_norms(history: Any, *, task_names: Sequence[str] | None = None, ax: Any = None) -> Any:
    """Draws the gradient norm of every task over the steps, on a logarithmic scale.

    Args:
      history: `[steps, T]`, or a mapping from block names to such arrays.
      task_names: T labels; "task 0", ... by default.
      ax: the `Axes` to draw on; a new figure's by default.

    Returns:
      The `Axes`. A norm of 0 is a gap in its line.

    Raises:
      ImportError: where matplotlib is not installed.
      ValueError: for a history or names of the wrong shape.

    Example:

      >>> import matplotlib; matplotlib.use("Agg")
      >>> from mtl_optax.plotting import plot_norms
      >>> plot_norms({"w": [[1.0, 10.0], [2.0, 0.0]]}).get_yscale()
      'log'
    """
    ax = _plot_lines(history, "gradient norm", task_names, ax, positive=True)
    ax.set_yscale("log")
    return ax


def plot_conflicts(cosines: Any, *, task_names: Sequence[str] | None = None, ax: Any = None) -> Any:
    """Draws the cosines between task gradients as a heat map; negative ones are conflicts.

    Args:
      cosines: `[T, T]`, or `[steps, T, T]`, of which the mean over steps is drawn.
      task_names: T labels; "task 0", ... by default.
      ax: the `Axes` to draw on; a new figure's by default.

    Returns:
      The `Axes`.

    Raises:
      ImportError: where matplotlib is not installed.
      ValueError: for cosines or names of the wrong shape.

    Example:

      >>> import matplotlib; matplotlib.use("Agg")
      >>> from mtl_optax.plotting import plot_conflicts
      >>> ax = plot_conflicts([[1.0, -0.5], [-0.5, 1.0]])
      >>> [text.get_text() for text in ax.texts]
      ['1.00', '-0.50', '-0.50', '1.00']
    """
    values = np.asarray(cosines, dtype=float)
    if values.ndim == 3:
        values = values.mean(axis=0)
    if values.ndim != 2 or values.shape[0] != values.shape[1]:
        raise ValueError(
            f"plot_conflicts: cosines must be [T, T] or [steps, T, T]; found {np.shape(cosines)}."
        )
    names = _names(task_names, values.shape[0])
    ax = _axes(ax)
    image = ax.imshow(values, vmin=-1, vmax=1, cmap="RdBu")
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        color = "white" if abs(value) > 0.6 else "black"
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    ax.figure.colorbar(image, ax=ax, label="cosine")
    return ax


def plot_pareto(
    trajectories: Any,
    *,
    tasks: tuple[int, int] = (0, 1),
    task_names: Sequence[str] | None = None,
    front: Any = None,
    ax: Any = None,
) -> Any:
    """Draws how the losses of two tasks move over training, one path a run.

    Args:
      trajectories: losses `[steps, T]`, or a mapping from labels (methods, seeds) to such arrays. A dot
        marks the start of a path, a star its end.
      tasks: the two tasks to draw.
      task_names: T labels; "task 0", ... by default.
      front: `[points, 2]`, a known Pareto front to draw below, in the order of `tasks`.
      ax: the `Axes` to draw on; a new figure's by default.

    Returns:
      The `Axes`.

    Raises:
      ImportError: where matplotlib is not installed.
      ValueError: for losses, names or tasks of the wrong shape.

    Example:

      >>> import matplotlib; matplotlib.use("Agg")
      >>> from mtl_optax.plotting import plot_pareto
      >>> ax = plot_pareto({"sum": [[3.0, 2.0], [1.0, 1.5]]}, task_names=["click", "buy"])
      >>> ax.get_xlabel(), ax.get_ylabel()
      ('loss of click', 'loss of buy')
    """
    runs = _blocks(trajectories, "trajectories")
    num_tasks = next(iter(runs.values())).shape[1]
    names = _names(task_names, num_tasks)
    if not all(0 <= task < num_tasks for task in tasks):
        raise ValueError(f"plot_pareto: tasks must be two of 0 to {num_tasks - 1}; found {tasks}.")
    ax = _axes(ax)
    if front is not None:
        points = np.asarray(front, dtype=float)
        ax.plot(points[:, 0], points[:, 1], color="0.7", linewidth=4, label="Pareto front")
    for label, losses in runs.items():
        path = losses[:, list(tasks)]
        (line,) = ax.plot(path[:, 0], path[:, 1], label=label or None)
        ax.plot(*path[0], "o", color=line.get_color())
        ax.plot(*path[-1], "*", color=line.get_color(), markersize=12)
    ax.set_xlabel(f"loss of {names[tasks[0]]}")
    ax.set_ylabel(f"loss of {names[tasks[1]]}")
    if any(runs) or front is not None:
        ax.legend()
    return ax


def _plot_lines(history: Any, what: str, task_names: Any, ax: Any, positive: bool = False) -> Any:
    blocks = _blocks(history, "history")
    names = _names(task_names, next(iter(blocks.values())).shape[1])
    ax = _axes(ax)
    styles = ("-", "--", ":", "-.")
    for number, (block, values) in enumerate(blocks.items()):
        if positive:
            values = np.where(values > 0, values, np.nan)
        for task, name in enumerate(names):
            label = f"{name}, {block}" if block else name
            style = styles[number % len(styles)]
            ax.plot(values[:, task], style, color=f"C{task % 10}", label=label)
    ax.set_xlabel("step")
    ax.set_ylabel(what)
    ax.legend()
    return ax


def _blocks(history: Any, what: str) -> dict[str, np.ndarray]:
    """The arrays `[steps, T]` by block name; one without a name where there are no blocks."""
    blocks = dict(history) if isinstance(history, Mapping) else {"": history}
    arrays = {name: np.asarray(values, dtype=float) for name, values in blocks.items()}
    shapes = [values.shape for values in arrays.values()]
    if not shapes or any(len(s) != 2 or s[1] != shapes[0][-1] for s in shapes):
        raise ValueError(
            f"{what} must be an array [steps, T] or a mapping to such arrays; found {shapes}."
        )
    return arrays


def _names(task_names: Sequence[str] | None, num_tasks: int) -> list[str]:
    names = [f"task {t}" for t in range(num_tasks)] if task_names is None else list(task_names)
    if len(names) != num_tasks:
        raise ValueError(f"task_names must have {num_tasks} entries, found {len(names)}.")
    return names


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            'mtl_optax.plotting needs matplotlib: python -m pip install "mtl_optax[plot]"'
        ) from error
    return pyplot.subplots()[1]
