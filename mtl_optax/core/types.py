"""Names for the types of arguments that many signatures share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax
import numpy as np

# A number of a method: a Python number, or an array of one, which `optax.inject_hyperparams` may schedule.
Number: TypeAlias = float | jax.Array
# One number per task.
PerTask: TypeAlias = Mapping[str, Number] | Sequence[Number] | jax.Array | np.ndarray
# The raw losses of a step: `[T]`, or one scalar per task.
Losses: TypeAlias = jax.Array | Mapping[str, jax.Array] | Sequence[jax.Array]
# Which tasks are in a batch.
Active: TypeAlias = jax.Array | np.ndarray | Mapping[str, bool | jax.Array] | Sequence[bool]
# Mapped axes of `shard_map` or `pmap`.
AxisName: TypeAlias = str | tuple[str, ...] | None
# The granularity at which a method looks at gradients.
Label: TypeAlias = Callable[[tuple[object, ...], jax.ShapeDtypeStruct], object]
DType: TypeAlias = np.dtype
