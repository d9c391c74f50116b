"""The table of EMTL's Table 2, and a picture of its scenes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from examples.studies.emtl.dense_metrics import METRICS, TESTED, delta_m
from examples.studies.emtl.scenes import CLASSES, Scenes
from examples.studies.harness.report import Metric, mean_cell, metrics_csv, picture, publish
from examples.studies.harness.runs import Run

Runs = Mapping[str, Sequence[Run]]  # by row; the first row is the base of delta-m
NOTE = """Arrows: higher (↑) or lower (↓) is better. Errors of depth are in units of the scene, angles in
degrees, the rest in percent. Mean ± standard error over seeds of the last step's metrics on the test
images. delta-m: mean relative loss over the nine metrics against STL, the mean over its seeds. Less LS:
delta-m less that of the plain sum with the same seed, which starts from the same parameters and sees the
same batches. STL: one SegNet a task without attention. Trials are compared by the mean logarithm of the
losses of held-out images; nothing is selected on the test images. Methods on gradients stand on the shared
parameters, the others on the losses.""".replace("\n", " ")
BASE = "LS"


def write(runs: Runs, data: str, made: str, out: Path | None, scenes: Scenes | None = None) -> None:
    """Print the table, and write table2.md, table2.csv and a picture of rendered scenes."""
    base = np.mean([run.test[TESTED] for run in next(iter(runs.values()))], axis=0)
    delta = Metric(TESTED, "delta-m ↓", lambda values: delta_m(values, base), digits=2)
    columns = [*METRICS, delta]
    lines = [("method", *(column.name for column in columns), f"less {BASE} ↓")]
    for label, row in runs.items():
        less = delta.by_seed(row) - delta.by_seed(runs[BASE])
        lines.append((label, *(column.cell(row) for column in columns), mean_cell(less, 2)))
    training = np.mean([run.history["validation"] for run in runs[BASE]], axis=0)
    trained = (
        f"The mean logarithm of the held-out losses of {BASE} is "
        f"{-training[(len(training) - 1) // 2]:.3f} half-way and {-training[-1]:.3f} at the end."
    )
    title = f"EMTL, Table 2: segmentation, depth and surface normals; {data}"
    files = {"table2.csv": metrics_csv(runs, columns)}
    publish(out, "table2", lines, title, f"{NOTE} {trained}\n\n{made}", files)
    if out is not None and scenes is not None:
        _draw_scenes(scenes, out / "table2_scenes.png")


def _draw_scenes(scenes: Scenes, path: Path, number: int = 4) -> None:
    """Some images and what is to be predicted for them."""
    number = min(number, len(scenes.images))
    shown = {
        "image": scenes.images,
        "segmentation": scenes.labels,
        "depth": scenes.depths[..., 0],
        "normals": (1 - scenes.normals) / 2,
    }
    with picture(path, 4, number, dpi=70, figsize=(2 * number, 6.4)) as (figure, grid):
        for axes, (name, part) in zip(grid, shown.items(), strict=True):
            axes[0].set_ylabel(name)
            for k in range(number):
                axes[k].imshow(part[k], interpolation="nearest")
                axes[k].set(xticks=[], yticks=[])
        figure.suptitle(f"SYNTHETIC SCENES; classes: {', '.join(CLASSES)}", fontsize=8)
