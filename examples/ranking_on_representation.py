"""A ranking model balanced on its representation: one backward pass for all tasks.

    python -m examples.ranking_on_representation

Embedding tables, a cross layer (DCN-v2) and a dense layer make the representation; one tower per task reads
a copy of it. MultiBalance combines the gradients of the tasks with respect to the representation, so the
tables and the layers below it are differentiated once, whatever the number of tasks.

Prints, after 19 seconds of processor time on two CPU cores:

    plain sum     AUC: buy 0.84  cart 0.80  click 0.71  74 million operations a step
    multibalance  AUC: buy 0.84  cart 0.80  click 0.71  75 million operations a step
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.metrics import roc_auc_score

import mtl_optax as mtl

TASKS = ("buy", "cart", "click")
VOCABULARIES = (1000, 500, 30, 7)  # user, item, category, weekday
NUMBERS, EMBEDDING, DEEP, BATCH = 4, 16, 64, 512
METHODS = {
    "plain sum": mtl.sum_tasks(TASKS),
    "multibalance": mtl.multibalance(TASKS),
}


class Batch(NamedTuple):
    ids: np.ndarray  # [B, 4]
    numbers: np.ndarray  # [B, NUMBERS]
    labels: dict[str, np.ndarray]  # [B] each


class Ranker(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.tables = nnx.List(nnx.Embed(size, EMBEDDING, rngs=rngs) for size in VOCABULARIES)
        width = NUMBERS + EMBEDDING * len(VOCABULARIES)
        self.cross = nnx.Linear(width, width, rngs=rngs)
        self.deep = nnx.Linear(width, DEEP, rngs=rngs)
        self.towers = nnx.Dict(
            {
                task: nnx.Sequential(
                    nnx.Linear(width + DEEP, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 1, rngs=rngs)
                )
                for task in TASKS
            }
        )

    def represent(self, batch: Batch) -> jax.Array:
        rows = [table(batch.ids[:, column]) for column, table in enumerate(self.tables)]
        x = jnp.concatenate([batch.numbers, *rows], axis=-1)
        return jnp.concatenate([x * self.cross(x) + x, nnx.relu(self.deep(x))], axis=-1)

    def logits(self, batch: Batch, fork: Callable | None = None) -> dict[str, jax.Array]:
        h = self.represent(batch)
        copies = dict.fromkeys(TASKS, h) if fork is None else fork(h)
        return {task: tower(copies[task])[:, 0] for task, tower in self.towers.items()}


def made_data(examples: int, seed: int) -> Batch:
    """Impressions; a purchase needs an item in the cart, and that needs a click."""
    world, rng = np.random.default_rng(0), np.random.default_rng(seed)
    ids = np.stack([rng.integers(0, size, examples) for size in VOCABULARIES], axis=1)
    factors = [world.normal(size=(size, 4)) for size in VOCABULARIES]
    user, item, category, weekday = (rows[ids[:, k]] for k, rows in enumerate(factors))
    numbers = rng.normal(size=(examples, NUMBERS))
    interest = np.sum(user * (item + category), axis=1) / 3 + numbers[:, 0]
    need = np.sum(category * weekday, axis=1) / 3 + numbers[:, 1] + item[:, 0]
    chance = rng.logistic(
        size=(3, examples)
    )  # an event with the logit z happens if this is below z
    click = chance[0] < interest - 1.5
    cart = click & (chance[1] < interest + need - 1.5)
    buy = cart & (chance[2] < need - user[:, 1] - 0.5)
    labels = {"buy": buy, "cart": cart, "click": click}
    labels = {task: label.astype(np.float32) for task, label in labels.items()}
    return Batch(ids, numbers.astype(np.float32), labels)


def train(method: mtl.Method, model: Ranker, data: Batch, steps: int) -> tuple[Ranker, float]:
    """The trained model, and the floating-point operations of a step, as the compiler counts them."""
    graph, params = nnx.split(model)
    optimizer = optax.adamw(2e-3, weight_decay=0.1)
    representation = jax.eval_shape(model.represent, jax.tree.map(lambda x: x[:BATCH], data))
    mtl.check(method, representation)

    def loss_fn(params, fork, batch):
        logits = nnx.merge(graph, params).logits(batch, fork)
        return {
            task: optax.sigmoid_binary_cross_entropy(logits[task], batch.labels[task]).mean()
            for task in TASKS
        }

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, opt_state, state, batch):
        value_and_grad = mtl.fork_value_and_grad(loss_fn, method)
        _, (grads, state) = value_and_grad(params, state, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state

    carry = params, optimizer.init(params), method.init(representation)
    rng, flops = np.random.default_rng(0), 0.0
    for number in range(steps):
        rows = rng.integers(0, len(data.ids), BATCH)
        batch = jax.tree.map(lambda x, rows=rows: x[rows], data)
        if number == 0:
            flops = step.lower(*carry, batch).compile().cost_analysis()["flops"]
        carry = step(*carry, batch)
    return nnx.merge(graph, carry[0]), flops


def main(examples: int = 120_000, steps: int = 1000) -> None:
    data, held_out = made_data(examples, seed=1), made_data(examples // 4, seed=2)
    for name, method in METHODS.items():
        model, flops = train(method, Ranker(nnx.Rngs(0)), data, steps)
        logits = model.logits(held_out)
        areas = {task: roc_auc_score(held_out.labels[task], logits[task]) for task in TASKS}
        found = "  ".join(f"{task} {area:.2f}" for task, area in areas.items())
        print(f"{name:13} AUC: {found}  {flops / 1e6:.0f} million operations a step")


if __name__ == "__main__":
    main()
