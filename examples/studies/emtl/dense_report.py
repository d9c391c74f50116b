"""The table and the pictures of EMTL's Table 2."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from examples.studies.emtl.dense_metrics import METRICS, delta_m
from examples.studies.emtl.scenes import CLASSES, Scenes
from examples.studies.harness.report import Metric, bars, mean_cell, metrics_csv, picture, publish
from examples.studies.harness.runs import Run

Runs = Mapping[str, Sequence[Run]]  # by row; the first row is the base of delta-m
NOTE = """Arrows: higher (↑) or lower (↓) is better. Errors of depth are in units of the scene, angles in
degrees, the rest in percent. delta-m: mean relative loss over the nine metrics against STL, the mean over
its seeds; below 0 is better than STL. Mean over seeds of the last step's metrics on the test images;
after ± the standard error over seeds. Less LS: delta-m less that of the plain sum with the same seed, which
starts from the same parameters and sees the same batches. STL: one SegNet a task without attention. Every
row has the library's defaults (BanditMTL: kl_radius 0.3, since 1.2 is more than log(3)) and the same
learning rate; nothing is tuned or selected. Methods on gradients stand on the shared parameters, the others
on the losses.""".replace("\n", " ")
BASE, TESTED = "LS", "metrics"  # a row, and what a run calls its metrics
COLUMNS = [Metric(TESTED, f"{m.task}: {m.name}", itemgetter(k)) for k, m in enumerate(METRICS)]
LAST = ("delta-m ↓", f"less {BASE} ↓")
# What a narrow terminal shows first: delta-m and one metric a task.
FIRST = (*LAST, "mIoU ↑", "absolute error ↓", "mean angle ↓")


def delta(runs: Runs) -> Metric:
    """delta-m against the mean of the first row."""
    base = np.mean([run.test[TESTED] for run in next(iter(runs.values()))], axis=0)
    return Metric(TESTED, "delta-m", lambda values: delta_m(values, base), digits=2)


def lines_of(runs: Runs) -> list[tuple[str, ...]]:
    """The header and the cells of the table."""
    names = (f"{m.name} {'↑' if m.higher_is_better else '↓'}" for m in METRICS)
    deltas = {label: delta(runs).by_seed(row) for label, row in runs.items()}
    lines = [("method", *names, *LAST)]
    for label, row in runs.items():
        means = (column.by_seed(row).mean() for column in COLUMNS)
        cells = (f"{mean:.{m.digits}f}" for mean, m in zip(means, METRICS, strict=True))
        less = "0" if label == BASE else mean_cell(deltas[label] - deltas[BASE], 2)
        lines.append((label, *cells, mean_cell(deltas[label], 2), less))
    return lines


def verdict(runs: Runs) -> str:
    """Which row is best in each column and in delta-m, and how far the training of the base has come."""
    signs = np.array([1 if metric.higher_is_better else -1 for metric in METRICS])
    means = {
        label: signs * [column.by_seed(row).mean() for column in COLUMNS]
        for label, row in runs.items()
    }
    best = np.argmax(list(means.values()), axis=0)
    wins = {label: int(np.sum(best == place)) for place, label in enumerate(means)}
    deltas = {label: delta(runs).by_seed(row).mean().round(2) + 0 for label, row in runs.items()}
    ranked = ", ".join(f"{label} {deltas[label]:.2f}" for label in sorted(deltas, key=deltas.get))
    won = ", ".join(f"{label} {count}" for label, count in wins.items() if count)
    curves = np.mean([run.history["validation"] for run in runs[BASE]], axis=0)
    half, end = curves[(len(curves) - 1) // 2], curves[-1]
    return (
        f"delta-m from the best: {ranked}. Best of the nine metrics: {won}. The held-out sum of losses of "
        f"{BASE} is {half:.3f} half-way and {end:.3f} at the end."
    )


def write(runs: Runs, data: str, made: str, out: Path | None, scenes: Scenes | None = None) -> None:
    """Print the table, and write table2.md, table2.csv, table2.png and a picture of rendered scenes."""
    title = f"EMTL, Table 2: segmentation, depth and surface normals; {data}"
    files = {"table2.csv": metrics_csv(runs, [*COLUMNS, delta(runs)])}
    note = f"{verdict(runs)}\n\n{NOTE}\n\n{made}"
    publish(out, "table2", lines_of(runs), title, note, files, first=FIRST)
    if out is None:
        return
    deltas = {label: delta(runs).by_seed(row) for label, row in runs.items()}
    bars(out / "table2.png", deltas, "delta-m against STL in percent; to the left is better")
    if scenes is not None:
        _draw_scenes(scenes, out / "table2_scenes.png")


def _draw_scenes(scenes: Scenes, path: Path, number: int = 4) -> None:
    """Some images and what is to be predicted for them."""
    number = min(number, len(scenes.images))
    classes = {"cmap": "tab10", "vmin": 0, "vmax": 9}
    shown: tuple[tuple[str, np.ndarray, dict[str, Any]], ...] = (
        ("image", scenes.images, {}),
        ("segmentation", scenes.labels, classes),
        ("depth", scenes.depths[..., 0], {"cmap": "viridis"}),
        ("normals", (1 - scenes.normals) / 2, {}),
    )
    with picture(path, 4, number, dpi=70, figsize=(2 * number, 6.4)) as (figure, grid):
        for line, (name, part, options) in enumerate(shown):
            for k in range(number):
                grid[line, k].imshow(part[k], interpolation="nearest", **options)
                grid[line, k].set(xticks=[], yticks=[])
            grid[line, 0].set_ylabel(name)
        figure.suptitle(f"SYNTHETIC SCENES; classes: {', '.join(CLASSES)}", fontsize=8)
