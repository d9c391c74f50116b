"""What a training is asked for, what it leaves, and how that is kept on disk."""

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.studies.harness.command import write_atomically


class Setting(NamedTuple):
    """What may differ between runs of one compiled program.

    Attributes:
      learning_rate, weight_decay: of the optimizer.
      knobs: options of the method, numbers or arrays.
    """

    learning_rate: Any
    weight_decay: Any
    knobs: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """A run to be trained."""

    seed: int
    setting: Setting


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      validation, test: what was measured, by task: one number a metric, or a row of them for each user.
      best_epoch: the epoch that was kept; the metrics are of this epoch.
      seconds: of training and validation, without compilation.
      history: by epoch: validation `[E]`, losses and weights `[E, ..., T]`, and what else was recorded.
    """

    label: str
    seed: int
    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    best_epoch: int
    seconds: float
    history: dict[str, np.ndarray]

    @property
    def best_value(self) -> float:
        """The validation value of the epoch that was kept.

        Side by side, a run that ran out of patience goes on beside the others, but nothing of it is kept.
        """
        return float(self.history["validation"][self.best_epoch - 1])


PARTS = ("validation", "test", "history")


def store_run(run: Run, path: Path, settings: dict[str, Any]) -> None:
    """Keep a finished run, whole or not at all, with what it was trained with."""
    about = dict(vars(run))
    arrays = {
        f"{part}/{name}": values for part in PARTS for name, values in about.pop(part).items()
    }
    stream = io.BytesIO()
    text = json.dumps({"settings": settings, **about})
    np.savez_compressed(stream, about=text, **arrays)
    write_atomically(path, stream.getvalue())


def load_run(path: Path) -> Run:
    """A stored run.

    On the main thread only: numpy parses the header of an array with `ast.literal_eval`, which fails at
    random in threads of Python 3.11.

    Raises:
      Exception: of any class for a damaged file, as zip, zlib, numpy and json all read from it.
    """
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():  # numpy does not look at checksums
            raise zipfile.BadZipFile(f"{damaged} is damaged")
    with np.load(path) as stored:
        about = json.loads(str(stored["about"]))
        del about["settings"]
        parts: dict[str, dict[str, np.ndarray]] = {part: {} for part in PARTS}
        for name in stored.files:
            part, _, rest = name.partition("/")
            if part in parts:
                parts[part][rest] = stored[name]
        return Run(**about, **parts)
