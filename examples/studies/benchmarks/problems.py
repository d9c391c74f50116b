"""The networks of the measurements: a recommender's ranking model, a dense one and a transformer."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from examples.studies.harness.steps import Parameters

Layers: TypeAlias = list[tuple[jax.Array, jax.Array]]  # kernels and biases
Shared: TypeAlias = dict[str, Any]  # parts of a network by name
Batch: TypeAlias = dict[str, jax.Array]
HEAD_WIDTH = 64  # of an attention head


class Problem(NamedTuple):
    """A network with a shared bottom and one head per task.

    Attributes:
      tables: embedding tables.
      rows: rows of each table.
      width: width of an embedding.
      dense: number of dense features.
      bottom: widths of the shared layers; the last one is that of the representation.
      head: widths of the hidden layers of each head.
      batch: examples.
      blocks: blocks of a transformer, which reads one table and has no other shared layers.
      length: tokens per example of a transformer; else lookups per example in each table.
    """

    tables: int = 26
    rows: int = 10_000
    width: int = 16
    dense: int = 13
    bottom: tuple[int, ...] = (256, 128, 64)
    head: tuple[int, ...] = (64, 32)
    batch: int = 2048
    blocks: int = 0
    length: int = 1

    @property
    def representation(self) -> int:
        """The width of the representation."""
        return self.width if self.blocks else self.bottom[-1]


RECSYS = Problem()
DENSE = Problem(tables=0, dense=512, bottom=(512, 512, 512))
# Small batches, so that the gradients are what memory holds.
_TRANSFORMER = Problem(tables=1, dense=0, bottom=(), head=())
SMALL = {
    "dense": Problem(tables=0, dense=512, bottom=(512,) * 4, head=(), batch=128),
    "transformer": _TRANSFORMER._replace(rows=4096, width=512, batch=4, blocks=4, length=32),
    "tables": Problem(tables=12, rows=20_000, dense=0, bottom=(256, 64), head=(), batch=1024),
}
LARGE = {
    "dense": Problem(tables=0, dense=4096, bottom=(4096,) * 4, head=(), batch=512),
    "transformer": _TRANSFORMER._replace(rows=32_768, width=1024, batch=2, blocks=6, length=256),
    "tables": Problem(rows=100_000, dense=0, bottom=(1024, 512, 256), head=(), batch=8192),
}
TINY = {
    "dense": Problem(tables=0, dense=8, bottom=(8, 4), head=(4,), batch=16),
    "transformer": _TRANSFORMER._replace(rows=10, width=HEAD_WIDTH, batch=4, blocks=1, length=3),
    "tables": Problem(tables=2, rows=10, width=2, dense=3, bottom=(8, 4), head=(4,), batch=16),
}


def initial(problem: Problem, num_tasks: int) -> tuple[Parameters, Batch]:
    """Parameters, the heads' a list, and a batch."""
    keys = iter(jax.random.split(jax.random.key(0), 5 + problem.blocks + num_tasks))
    inputs = problem.tables * problem.length * problem.width + problem.dense
    shape = (problem.tables, problem.rows, problem.width)
    shared: Shared = {}
    if problem.blocks:
        shared["blocks"] = [_block(next(keys), problem.width) for _ in range(problem.blocks)]
    else:
        shared["layers"] = _layers(next(keys), inputs, *problem.bottom)
    if problem.tables:
        shared["embeddings"] = 0.05 * jax.random.normal(next(keys), shape)
    widths = (problem.representation, *problem.head, 1)
    heads = [_layers(next(keys), *widths) for _ in range(num_tasks)]
    lookups = (problem.tables, problem.batch, problem.length)
    batch = {
        "ids": jax.random.randint(next(keys), lookups, 0, max(problem.rows, 1)),
        "features": jax.random.normal(next(keys), (problem.batch, problem.dense)),
        "labels": jax.random.bernoulli(next(keys), 0.3, (num_tasks, problem.batch)).astype(
            jnp.float32
        ),
    }
    return Parameters(shared, heads), batch


def encode(shared: Shared, batch: Batch) -> jax.Array:
    """The representation `[batch, width]`."""
    if "blocks" in shared:
        return _transformer(shared, batch["ids"][0])
    inputs = batch["features"]
    if "embeddings" in shared:
        look_up = jax.vmap(lambda table, ids: table[ids], out_axes=1)
        found = look_up(shared["embeddings"], batch["ids"])  # [batch, tables, length, width]
        inputs = jnp.concatenate([found.reshape(found.shape[0], -1), inputs], axis=1)
    for weight, bias in shared["layers"]:
        inputs = jax.nn.relu(inputs @ weight + bias[None])
    return inputs


def decode(
    heads: Sequence[Layers], copies: Sequence[jax.Array], batch: Batch
) -> tuple[jax.Array, ...]:
    """The T losses of the heads, each on its copy of the representation."""
    return tuple(
        optax.sigmoid_binary_cross_entropy(_head(head, copy), labels).mean()
        for head, copy, labels in zip(heads, copies, batch["labels"], strict=True)
    )


def example_losses(heads: Sequence[Layers], representation: jax.Array, batch: Batch) -> jax.Array:
    """The losses `[B]` of one head, one per example."""
    logits = _head(heads[0], representation)
    return optax.sigmoid_binary_cross_entropy(logits, batch["labels"])


def _transformer(shared: Shared, ids: jax.Array) -> jax.Array:
    """The mean over the tokens of a causal transformer's last layer."""
    x = shared["embeddings"][0][ids]
    for block in shared["blocks"]:
        heads = (*x.shape[:2], -1, HEAD_WIDTH)
        q, k, v = (part.reshape(heads) for part in jnp.split(_unit(x) @ block["qkv"], 3, axis=-1))
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.reshape(x.shape) @ block["out"]
        x = x + jax.nn.gelu(_unit(x) @ block["up"]) @ block["down"]
    return _unit(x).mean(axis=1)


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def _block(key: jax.Array, width: int) -> dict[str, jax.Array]:
    shapes = {"qkv": (1, 3), "out": (1, 1), "up": (1, 4), "down": (4, 1)}
    return {
        name: jax.random.normal(k, (width * a, width * b)) / (width * a) ** 0.5
        for k, (name, (a, b)) in zip(jax.random.split(key, 4), shapes.items(), strict=True)
    }


def _head(layers: Layers, x: jax.Array) -> jax.Array:
    *hidden, (weight, bias) = layers
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b[None])
    return (x @ weight + bias[None])[:, 0]


def _layers(key: jax.Array, *widths: int) -> Layers:
    pairs = list(itertools.pairwise(widths))
    return [
        (jax.random.normal(k, pair) * (2 / pair[0]) ** 0.5, jnp.zeros(pair[1]))
        for k, pair in zip(jax.random.split(key, len(pairs)), pairs, strict=True)
    ]
