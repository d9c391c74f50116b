"""What a training is asked for, what it leaves, and how that is kept on disk."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import serialization

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


def store_run(run: Run, path: Path) -> None:
    """Keep a finished run, whole or not at all."""
    write_atomically(path, zlib.compress(serialization.msgpack_serialize(vars(run))))


def load_run(path: Path) -> Run:
    """A stored run.

    Raises:
      Exception: of any class for a damaged file, as zlib and msgpack both read from it.
    """
    return Run(**serialization.msgpack_restore(zlib.decompress(path.read_bytes())))
