"""The table, the files and the pictures of EMTL's Table 2."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.studies.emtl.dense_metrics import METRICS, delta_m
from examples.studies.emtl.scenes import CLASSES, Scenes
from examples.studies.harness.tables import pipe_table
from examples.studies.recommender.download import write_atomically
from examples.studies.recommender.training import Run

Runs = Mapping[str, list[Run]]  # by row; the first row is the base of delta-m
NOTE = """Arrows: higher (↑) or lower (↓) is better. Errors of depth are in units of the scene, angles in
degrees, the rest in percent. delta-m: mean relative loss over the nine metrics against STL, the mean over
its seeds; below 0 is better than STL. Mean over seeds of the last step's metrics on the test images;
after ± the standard error over seeds. Less LS: delta-m less that of the plain sum with the same seed, which
starts from the same parameters and sees the same batches. STL: one SegNet a task without attention. Every
row has the library's defaults (BanditMTL: kl_radius 0.3, since 1.2 is more than log(3)) and the same
learning rate; nothing is tuned or selected. Methods on gradients stand on the shared parameters, the others
on the losses."""
BASE = "LS"
LAST = ("delta-m ↓", f"less {BASE} ↓")
# What a narrow terminal shows first: delta-m and one metric a task.
FIRST = (*LAST, "mIoU ↑", "absolute error ↓", "mean angle ↓")


class About(NamedTuple):
    """What the numbers are.

    Attributes:
      data: its name.
      config: of the run.
      command: that made them.
      sizes: of the data, in words.
      machine: that ran it.
    """

    data: str
    config: Any
    command: str
    sizes: str
    machine: str


def table(runs: Runs) -> np.ndarray:
    """The metrics `[rows, seeds, 9]`."""
    return np.stack([[run.test["metrics"] for run in row] for row in runs.values()])


def deltas(runs: Runs) -> np.ndarray:
    """delta-m `[rows, seeds]` against the mean of the first row."""
    values = table(runs)
    return delta_m(values, values[0].mean(axis=0))


def rows_of(runs: Runs) -> list[tuple[str, ...]]:
    """The header and the cells of the table."""
    lines = [
        ("method", *(f"{m.name} {'↑' if m.higher_is_better else '↓'}" for m in METRICS), *LAST)
    ]
    found = dict(zip(runs, deltas(runs), strict=True))
    for (label, delta), row in zip(found.items(), table(runs), strict=True):
        means = row.mean(axis=0)
        cells = (f"{v:.{metric.digits}f}" for v, metric in zip(means, METRICS, strict=True))
        against = _mean_and_error(delta - found[BASE]) if label != BASE else "0"
        lines.append((label, *cells, _mean_and_error(delta), against))
    return lines


def _mean_and_error(values: np.ndarray) -> str:
    """A mean over seeds, and its standard error where there are some."""
    text = f"{round(values.mean(), 2) + 0:.2f}"  # + 0: not -0.00
    if len(values) > 1:
        text += f" ± {values.std(ddof=1) / len(values) ** 0.5:.2f}"
    return text


def title(about: About) -> str:
    """One line over the table."""
    config = about.config
    height, width = config.height, config.width
    size = f", {height} x {width}" if about.data.startswith("SYNTHETIC") else ""
    return (
        f"{about.data}{size}: {about.sizes}; {config.steps} steps of {config.batch} images, "
        f"{config.seeds} seed{'s' * (config.seeds != 1)}"
    )


def verdict(runs: Runs) -> str:
    """Which row is best in each column, and in delta-m."""
    labels, values = list(runs), table(runs).mean(axis=1)
    signs = np.array([1 if metric.higher_is_better else -1 for metric in METRICS])
    best = np.argmax(values * signs, axis=0)
    wins = {label: int(np.sum(best == row)) for row, label in enumerate(labels)}
    order = np.argsort(deltas(runs).mean(axis=1))
    means = deltas(runs).mean(axis=1).round(2) + 0
    ranked = ", ".join(f"{labels[k]} {means[k]:.2f}" for k in order)
    won = ", ".join(f"{label} {count}" for label, count in wins.items() if count)
    return f"delta-m from the best: {ranked}. Best of the nine metrics: {won}."


def progress(runs: Runs) -> str:
    """How far the training of the base row has come: its sum of losses on images that it does not see."""
    label = BASE if BASE in runs else next(iter(runs))
    curves = np.mean([run.history["validation"] for run in runs[label]], axis=0)
    half, end = curves[(len(curves) - 1) // 2], curves[-1]
    return f"The held-out sum of losses of {label} is {half:.3f} half-way and {end:.3f} at the end."


def markdown(runs: Runs, about: About) -> str:
    """The page."""
    parts = [
        "# EMTL, Table 2: segmentation, depth and surface normals",
        f"**{title(about)}**",
        pipe_table(rows_of(runs)),
        f"{verdict(runs)} {progress(runs)}",
        NOTE,
        f"Made by `{about.command}` on {about.machine} with\n`{about.config}`.",
    ]
    return "\n\n".join(parts) + "\n"


def metrics_csv(runs: Runs) -> str:
    """Every metric of every seed, unrounded."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", "seed", "metric", "value", "seconds"])
    names = [*(f"{metric.task}: {metric.name}" for metric in METRICS), "delta-m"]
    for (label, row), delta in zip(runs.items(), deltas(runs), strict=True):
        for run, value in zip(row, delta, strict=True):
            for name, number in zip(names, [*run.test["metrics"], value], strict=True):
                writer.writerow([label, run.seed, name, f"{number:.6g}", f"{run.seconds:.1f}"])
    return stream.getvalue()


def write(runs: Runs, about: About, out: Path, scenes: Scenes | None) -> None:
    """table2.md, table2.csv, table2.png, and a picture of some rendered scenes."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "table2.md", markdown(runs, about).encode())
    write_atomically(out / "table2.csv", metrics_csv(runs).encode())
    _draw(runs, about, out / "table2.png")
    if scenes is not None:
        _draw_scenes(scenes, out / "table2_scenes.png")


def _draw(runs: Runs, about: About, path: Path) -> None:
    """delta-m of each row with its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    values = deltas(runs)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    rows = np.arange(len(values))
    axes.barh(rows, values.mean(axis=1), color="0.8")
    for seed in range(values.shape[1]):
        axes.plot(values[:, seed], rows, "o", markersize=4, label=f"seed {seed}")
    axes.set(
        yticks=rows,
        yticklabels=list(runs),
        xlabel="delta-m against STL in percent; to the left is better",
        title=about.data,
    )
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_scenes(scenes: Scenes, path: Path, number: int = 4) -> None:
    """Some images and what is to be predicted for them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    number = min(number, len(scenes.images))
    figure, grid = plt.subplots(
        4, number, figsize=(2 * number, 6.4), squeeze=False, layout="constrained"
    )
    shown = (
        ("image", lambda k: scenes.images[k], {}),
        ("segmentation", lambda k: scenes.labels[k], {"cmap": "tab10", "vmin": 0, "vmax": 9}),
        ("depth", lambda k: scenes.depths[k, ..., 0], {"cmap": "viridis"}),
        ("normals", lambda k: (1 - scenes.normals[k]) / 2, {}),
    )
    for line, (name, part, options) in enumerate(shown):
        for k in range(number):
            grid[line, k].imshow(part(k), interpolation="nearest", **options)
            grid[line, k].set(xticks=[], yticks=[])
        grid[line, 0].set_ylabel(name)
    figure.suptitle(f"SYNTHETIC SCENES; classes: {', '.join(CLASSES)}", fontsize=8)
    figure.savefig(path, dpi=70)
    plt.close(figure)
