"""What the data of the studies have in common: tasks with their losses, and three sets."""

import hashlib
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

BINARY, REGRESSION = "binary", "regression"
SetT = TypeVar("SetT")


@dataclass(frozen=True)
class Task:
    """One label of an example.

    Attributes:
      name: for tables.
      kind: `BINARY` (positive or not; cross-entropy of a logit) or `REGRESSION` (a number; squared error).
      unit: of a regression's number.
      softmax: whether the loss of a binary label is a softmax over a pair and the items drawn with it.
    """

    name: str
    kind: str = BINARY
    unit: str = ""
    softmax: bool = False

    def loss(
        self, outputs: jax.Array, labels: jax.Array, mask: jax.Array, count: Any = None
    ) -> jax.Array:
        """The mean over the examples with a mask, or their sum over a `count`; in the unit of the data."""
        if self.kind == BINARY:
            each = optax.sigmoid_binary_cross_entropy(outputs, labels)
        else:
            each = optax.squared_error(outputs, labels)
        return jnp.sum(each * mask) / (jnp.maximum(jnp.sum(mask), 1) if count is None else count)


@dataclass(frozen=True)
class Dataset(Generic[SetT]):
    """What training and evaluation read.

    Attributes:
      name: for tables; that of generated data holds the word SYNTHETIC.
      tasks: in the order of the labels.
      train, validation, test: disjoint sets, pytrees of arrays.
    """

    name: str
    tasks: tuple[Task, ...]
    train: SetT
    validation: SetT
    test: SetT

    def digest(self) -> str:
        """A number that changes with anything in the data."""
        found = hashlib.sha256(repr((self.name, self.tasks)).encode())
        for array in jax.tree.leaves((self.train, self.validation, self.test)):
            found.update(np.ascontiguousarray(array))
        return found.hexdigest()
