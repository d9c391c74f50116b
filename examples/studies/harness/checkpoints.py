"""Unfinished training on disk: a command that was stopped goes on from the last epoch that was saved."""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax import serialization

from examples.studies.harness.command import say_damaged, write_atomically

TreeT = TypeVar("TreeT")
History = list[dict[str, np.ndarray]]  # of every epoch


class UnfinishedRun:
    """The newest saved epoch of one training, in a file under `folder`.

    What the run was started with is part of the file's name, so that a run with other settings finds
    nothing. A save that is cut short leaves the epoch before it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        """`settings` is anything that JSON can hold."""
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self._path = folder / digest[:16]

    def restore(self, carry: TreeT) -> tuple[TreeT, History]:
        """What was saved, or `carry` and no history where there is nothing to go on from."""
        if self._path.exists():
            try:
                saved = serialization.msgpack_restore(self._path.read_bytes())
                structure = jax.tree.structure(carry)
                return jax.tree.unflatten(structure, saved["leaves"]), saved["history"]
            except Exception as error:
                say_damaged(self._path, error)
        return carry, []

    def save(self, carry: Any, history: History) -> None:
        """Keep an epoch in place of the one before."""
        content = {"leaves": jax.device_get(jax.tree.leaves(carry)), "history": history}
        write_atomically(self._path, serialization.msgpack_serialize(content))

    def remove(self) -> None:
        """Forget the run: it is finished, and kept elsewhere."""
        self._path.unlink(missing_ok=True)
