"""What the tabular models share: their inputs, embedding tables, perceptrons, towers and interface.

    represent: features -> representation                  shared parameters alone
    head(t):   representation, features -> logit of task t     parameters of task t alone

`heads` stacks the logits of all tasks, `[T, batch]`. The representation is an array or a NamedTuple of
arrays with a leading axis `[batch]`; treat it as a pytree, as `mtl.fork` does. To split the parameters:

    graphdef, heads, shared = nnx.split(model, is_head, ...)
"""

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

# Uniform rather than truncated normal: the same variance, and much less to compile.
KERNEL_INIT = nnx.initializers.lecun_uniform()
# Small: what the embeddings start with is noise, which Adam outgrows in a few steps.
TABLE_INIT = nnx.initializers.variance_scaling(0.01, "fan_out", "uniform")
# The lists of a model that hold one item per task. All else is shared.
OF_TASKS = ("towers", "gates", "task_experts")


class Features(NamedTuple):
    """A batch of inputs.

    Attributes:
      numerical: float `[batch, F]`, best with mean 0 and variance 1.
      categorical: int32 `[batch, C]`; column c counts from 0 to `vocabulary_sizes[c] - 1`.
    """

    numerical: jax.Array
    categorical: jax.Array


@dataclass(frozen=True)
class FeatureSpec:
    """What the columns of `Features` are: F numbers, and C ids with these numbers of values."""

    num_numerical: int
    vocabulary_sizes: tuple[int, ...]


def head_task(path: tuple[Any, ...]) -> int | None:
    """The task that the parameter at a path belongs to; None for a shared one."""
    return path[1] if path[0] in OF_TASKS else None


def is_head(path: tuple[Any, ...], _: Any = None) -> bool:
    """Whether a parameter belongs to one task, as a filter of `nnx.split` and `nnx.state`."""
    return head_task(path) is not None


class Perceptron(nnx.Module):
    """Dense layers, each followed by ReLU."""

    def __init__(self, widths: tuple[int, ...], rngs: nnx.Rngs):
        self.layers = nnx.List(
            nnx.Linear(fan_in, fan_out, kernel_init=KERNEL_INIT, rngs=rngs)
            for fan_in, fan_out in itertools.pairwise(widths)
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        for layer in self.layers:
            inputs = nnx.relu(layer(inputs))
        return inputs


class Tower(nnx.Module):
    """A perceptron and a linear layer to one logit: `[batch, width]` to `[batch]`."""

    def __init__(self, width: int, hidden: tuple[int, ...], rngs: nnx.Rngs):
        widths = (width, *hidden)
        self.hidden = Perceptron(widths, rngs)
        self.output = nnx.Linear(widths[-1], 1, kernel_init=KERNEL_INIT, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self.output(self.hidden(inputs))[..., 0]


class Tables(nnx.Module):
    """One embedding table per categorical feature: `[batch, C]` to `[batch, C, width]`."""

    def __init__(self, spec: FeatureSpec, width: int, rngs: nnx.Rngs):
        self.width = width
        self.tables = nnx.List(
            nnx.Embed(size, width, embedding_init=TABLE_INIT, rngs=rngs)
            for size in spec.vocabulary_sizes
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        if not len(self.tables):
            return jnp.zeros((len(ids), 0, self.width))
        return jnp.stack([table(ids[:, c]) for c, table in enumerate(self.tables)], axis=1)


class Inputs(nnx.Module):
    """The numbers beside the embeddings: `Features` to `[batch, F + C * embedding]`."""

    def __init__(self, spec: FeatureSpec, embedding: int, rngs: nnx.Rngs):
        self.width = spec.num_numerical + len(spec.vocabulary_sizes) * embedding
        self.tables = Tables(spec, embedding, rngs)

    def __call__(self, features: Features) -> jax.Array:
        return jnp.concatenate(
            [features.numerical, flatten_rows(self.tables(features.categorical))], axis=1
        )


def flatten_rows(rows: jax.Array) -> jax.Array:
    """`[batch, n, width]` to `[batch, n * width]`."""
    return rows.reshape(rows.shape[0], rows.shape[1] * rows.shape[2])


class TabularModel(nnx.Module):
    """The interface of the tabular models; each adds `represent`, and some a `head` of their own.

    A head is computed for its own task alone. A `vmap` over the towers would be shorter, but the gradient
    of one task's loss would then pass through the towers of all tasks.
    """

    num_tasks: int
    towers: nnx.List[Tower]

    def represent(self, features: Features) -> Any:
        """What all tasks share: the place for `mtl.fork`."""
        raise NotImplementedError

    def head(self, task: int, representation: Any, features: Features) -> jax.Array:
        """The logits `[batch]` of one task: by default those of its tower."""
        return self.towers[task](representation)

    def heads(self, representation: Any, features: Features) -> jax.Array:
        """The logits `[T, batch]` of all tasks on one representation."""
        return self.heads_on_copies((representation,) * self.num_tasks, features)

    def heads_on_copies(self, copies: tuple[Any, ...], features: Features) -> jax.Array:
        """The logits `[T, batch]`, each task on its own copy of the representation, as `fork` makes."""
        return jnp.stack([self.head(task, copy, features) for task, copy in enumerate(copies)])

    def __call__(self, features: Features) -> jax.Array:
        """The logits `[T, batch]`."""
        return self.heads(self.represent(features), features)
