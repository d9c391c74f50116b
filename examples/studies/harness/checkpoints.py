"""Unfinished training on disk: a command that was stopped goes on from the last epoch that was saved."""

import hashlib
import json
import shutil
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from examples.studies.harness.command import say_damaged

# Orbax's managers share event loops: two threads must not use them at once.
LOCK = threading.Lock()


class UnfinishedRun:
    """The newest saved epoch of one training, as an orbax checkpoint under `folder`.

    What the run was started with is part of the checkpoint's name, so that a run with other settings
    finds nothing. A save that is cut short leaves the epoch before it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        """`settings` is anything that JSON can hold."""
        import orbax.checkpoint as ocp  # a second to import, for those alone who keep something

        self._ocp = ocp
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        self._folder = (folder / digest[:16]).resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        with LOCK:
            self._manager = ocp.CheckpointManager(self._folder, options=options)

    def restore(self, like: Any) -> tuple[int, Any]:
        """The last saved epoch and what was saved, or `(0, like)` where there is nothing to go on from."""
        described = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, like)
        with LOCK:
            epoch = self._manager.latest_step()
            if epoch is None:
                return 0, like
            try:
                saved = self._ocp.args.StandardRestore(described)
                return epoch, self._manager.restore(epoch, args=saved)
            except Exception as error:
                say_damaged(self._folder, error)
                self._manager.delete(epoch)
        return 0, like

    def save(self, epoch: int, carry: Any) -> None:
        """Keep an epoch in place of the one before."""
        with LOCK:
            self._manager.save(epoch, args=self._ocp.args.StandardSave(carry))

    def remove(self) -> None:
        """Forget the run: it is finished, and kept elsewhere."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "UnfinishedRun":
        """The run itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with LOCK:
            self._manager.close()
