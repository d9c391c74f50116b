"""Type aliases of arguments that many functions share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax
import numpy as np

# A Python number, or a scalar array, which `optax.inject_hyperparams` can schedule.
Number: TypeAlias = float | jax.Array
# One number per task.
PerTask: TypeAlias = Mapping[str, Number] | Sequence[Number] | jax.Array | np.ndarray
# The raw losses of a step: `[T]`, or one scalar per task.
Losses: TypeAlias = jax.Array | Mapping[str, jax.Array] | Sequence[jax.Array]
# Which tasks are in this batch.
Active: TypeAlias = jax.Array | np.ndarray | Mapping[str, bool | jax.Array] | Sequence[bool]
# Mapped axes of `shard_map` or `pmap`.
AxisName: TypeAlias = str | tuple[str, ...] | None
# A function from the path and the shape of a leaf to the label of its block.
Label: TypeAlias = Callable[[tuple[object, ...], jax.ShapeDtypeStruct], object]
DType: TypeAlias = np.dtype
