"""The table and the pictures of EMTL's Table 2."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.studies.emtl.dense_metrics import DIRECTIONS, METRICS, SIGNS, TESTED, delta_m
from examples.studies.emtl.scenes import CLASSES, Scenes
from examples.studies.harness.report import Metric, mean_cell, metrics_csv, picture, publish
from examples.studies.harness.runs import Run

Runs = Mapping[str, Sequence[Run]]  # by row; the first row is the base of delta-m
NOTE = """Arrows: higher (↑) or lower (↓) is better. Errors of depth are in units of the scene, angles in
degrees, the rest in percent. delta-m: mean relative loss over the nine metrics against STL, the mean over
its seeds; below 0 is better than STL. Mean over seeds of the last step's metrics on the test images;
after ± the standard error over seeds. Less LS: delta-m less that of the plain sum with the same seed, which
starts from the same parameters and sees the same batches. STL: one SegNet a task without attention. Trials
are compared by the mean logarithm of the losses of held-out images; nothing is selected on the test images.
Methods on gradients stand on the shared parameters, the others on the losses.""".replace("\n", " ")
BASE = "LS"
LAST = ("delta-m ↓", f"less {BASE} ↓")


def delta(runs: Runs) -> Metric:
    """delta-m against the mean of the first row."""
    base = np.mean([run.test[TESTED] for run in next(iter(runs.values()))], axis=0)
    return Metric(TESTED, "delta-m", lambda values: delta_m(values, base), digits=2)


def lines_of(runs: Runs, deltas: Mapping[str, np.ndarray]) -> list[tuple[str, ...]]:
    """The header and the cells of the table."""
    arrows = {name.split(": ")[1]: "↑" if sign > 0 else "↓" for name, sign in DIRECTIONS.items()}
    lines = [("method", *map(" ".join, arrows.items()), *LAST)]
    for label, row in runs.items():
        cells = (f"{metric.by_seed(row).mean():.{metric.digits}f}" for metric in METRICS)
        less = "0" if label == BASE else mean_cell(deltas[label] - deltas[BASE], 2)
        lines.append((label, *cells, mean_cell(deltas[label], 2), less))
    return lines


def verdict(runs: Runs, deltas: Mapping[str, np.ndarray]) -> str:
    """Which row is best in each column and in delta-m, and how far the training of the base has come."""
    means = {
        label: np.mean([run.test[TESTED] for run in row], axis=0) for label, row in runs.items()
    }
    best = np.argmax([SIGNS * values for values in means.values()], axis=0)
    wins = {label: int(np.sum(best == place)) for place, label in enumerate(means)}
    ranked = sorted(deltas, key=lambda label: deltas[label].mean())
    said = ", ".join(f"{label} {deltas[label].mean().round(2) + 0:.2f}" for label in ranked)
    won = ", ".join(f"{label} {count}" for label, count in wins.items() if count)
    curve = np.mean([run.history["validation"] for run in runs[BASE]], axis=0)
    return (
        f"delta-m from the best: {said}. Best of the nine metrics: {won}. The mean logarithm of the "
        f"held-out losses of {BASE} is {-curve[(len(curve) - 1) // 2]:.3f} half-way and "
        f"{-curve[-1]:.3f} at the end."
    )


def write(runs: Runs, data: str, made: str, out: Path | None, scenes: Scenes | None = None) -> None:
    """Print the table, and write table2.md, table2.csv and a picture of rendered scenes."""
    title = f"EMTL, Table 2: segmentation, depth and surface normals; {data}"
    files = {"table2.csv": metrics_csv(runs, [*METRICS, delta(runs)])}
    deltas = {label: delta(runs).by_seed(row) for label, row in runs.items()}
    note = f"{verdict(runs, deltas)}\n\n{NOTE}\n\n{made}"
    publish(out, "table2", lines_of(runs, deltas), title, note, files)
    if out is not None and scenes is not None:
        _draw_scenes(scenes, out / "table2_scenes.png")


def _draw_scenes(scenes: Scenes, path: Path, number: int = 4) -> None:
    """Some images and what is to be predicted for them."""
    number = min(number, len(scenes.images))
    shown: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        "image": (scenes.images, {}),
        "segmentation": (scenes.labels, {"cmap": "tab10", "vmin": 0, "vmax": 9}),
        "depth": (scenes.depths[..., 0], {"cmap": "viridis"}),
        "normals": ((1 - scenes.normals) / 2, {}),
    }
    with picture(path, 4, number, dpi=70, figsize=(2 * number, 6.4)) as (figure, grid):
        for axes, (name, (part, options)) in zip(grid, shown.items(), strict=True):
            axes[0].set_ylabel(name)
            for k in range(number):
                axes[k].imshow(part[k], interpolation="nearest", **options)
                axes[k].set(xticks=[], yticks=[])
        figure.suptitle(f"SYNTHETIC SCENES; classes: {', '.join(CLASSES)}", fontsize=8)
