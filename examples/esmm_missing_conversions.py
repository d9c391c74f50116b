"""ESMM with missing conversions: a task that most batches have no label for.

    python -m examples.esmm_missing_conversions

Clicks are known at once; whether a click became a purchase is known for a fifth of the impressions, which
come in batches of their own. The conversion rate is trained through the product
p(click) p(purchase | click) over all impressions with a known outcome (Ma et al., ESMM, SIGIR 2018).

Two things are needed. A mask leaves unknown outcomes out before the loss is computed. And `active=` tells
the method that a batch has no known outcome at all: without it, MetaBalance averages the zeros of those
batches into the norm of the target, and shrinks the gradient of the clicks to it.

Prints, after 21 seconds of processor time on two CPU cores:

    plain sum                    AUC: click 0.801  purchase after a click 0.614
    metabalance without active=  AUC: click 0.796  purchase after a click 0.620
    metabalance with active=     AUC: click 0.801  purchase after a click 0.619
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.metrics import roc_auc_score

import mtl_optax as mtl

TASKS = ("click", "purchase")
METHODS = {  # and whether they are told which tasks a batch has
    "plain sum": (mtl.sum_tasks(TASKS), True),
    "metabalance without active=": (mtl.metabalance(TASKS, target="purchase"), False),
    "metabalance with active=": (mtl.metabalance(TASKS, target="purchase"), True),
}
USERS, ITEMS, WIDTH, BATCH = 500, 300, 16, 256


class Data(NamedTuple):
    """Impressions; `purchase` is NaN where it is not known."""

    user: np.ndarray
    item: np.ndarray
    click: np.ndarray
    purchase: np.ndarray


class ESMM(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.user = nnx.Embed(USERS, WIDTH, rngs=rngs)
        self.item = nnx.Embed(ITEMS, WIDTH, rngs=rngs)
        self.hidden = nnx.Linear(2 * WIDTH, 64, rngs=rngs)
        self.click = nnx.Linear(64 + WIDTH, 1, rngs=rngs)
        self.conversion = nnx.Linear(64 + WIDTH, 1, rngs=rngs)

    def __call__(self, user: jax.Array, item: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The logits of a click, and of a purchase given a click."""
        u, v = self.user(user), self.item(item)
        h = nnx.relu(self.hidden(jnp.concatenate([u, v], axis=-1)))
        h = jnp.concatenate([h, u * v], axis=-1)
        return self.click(h)[:, 0], self.conversion(h)[:, 0]

    def losses(self, batch: Data) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The losses, and which tasks have a label in this batch."""
        click, conversion = self(batch.user, batch.item)
        known = ~jnp.isnan(batch.purchase)
        purchase = jnp.where(known, batch.purchase, 0)
        # log(p q) and log(1 - p q) = log((1 - p) + p (1 - q)) from the logits of p and q.
        both = jax.nn.log_sigmoid(click) + jax.nn.log_sigmoid(conversion)
        without = jax.nn.log_sigmoid(click) + jax.nn.log_sigmoid(-conversion)
        neither = jnp.logaddexp(jax.nn.log_sigmoid(-click), without)
        likelihood = purchase * both + (1 - purchase) * neither
        losses = {
            "click": optax.sigmoid_binary_cross_entropy(click, batch.click).mean(),
            "purchase": -jnp.sum(likelihood * known) / jnp.maximum(jnp.sum(known), 1),
        }
        return losses, {"click": jnp.asarray(True), "purchase": jnp.any(known)}


def made_data(examples: int, seed: int, known: float = 1.0) -> Data:
    """Impressions, of which a share has a known purchase."""
    world, rng = np.random.default_rng(0), np.random.default_rng(seed)
    user, item = rng.integers(0, USERS, examples), rng.integers(0, ITEMS, examples)
    u, v, w = (world.normal(size=(size, 3)) for size in (USERS, ITEMS, ITEMS))
    click = np.sum(u[user] * v[item], axis=1) - 1 > rng.logistic(size=examples)
    bought = np.sum(u[user] * w[item], axis=1) > rng.logistic(size=examples)
    purchase = np.where(rng.random(examples) < known, click & bought, np.nan)
    return Data(user, item, click.astype(np.float32), purchase.astype(np.float32))


def batches(data: Data, steps: int, rng: np.random.Generator):
    """One batch in five is of impressions with a known purchase, the others have none."""
    known = ~np.isnan(data.purchase)
    rows = {True: np.flatnonzero(known), False: np.flatnonzero(~known)}
    for number in range(steps):
        chosen = rng.choice(rows[number % 5 == 0], BATCH)
        yield Data(*(column[chosen] for column in data))


def train(method: mtl.Method, data: Data, steps: int, tell: bool) -> ESMM:
    graph, params = nnx.split(ESMM(nnx.Rngs(0)))
    tx = optax.chain(method, optax.adamw(5e-3, weight_decay=0.1))
    mtl.check(tx, params)

    def loss_fn(params, batch):
        return nnx.merge(graph, params).losses(batch)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        value_and_grad = mtl.per_task_value_and_grad(loss_fn, has_aux=True)
        (losses, active), grads = value_and_grad(params, batch)
        extra = {"losses": losses} | ({"active": active} if tell else {})
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    opt_state = tx.init(params)
    for batch in batches(data, steps, np.random.default_rng(0)):
        params, opt_state = step(params, opt_state, batch)
    return nnx.merge(graph, params)


def main(examples: int = 200_000, steps: int = 2000) -> None:
    data, held_out = made_data(examples, seed=1, known=0.2), made_data(examples // 4, seed=2)
    for name, (method, tell) in METHODS.items():
        click, conversion = train(method, data, steps, tell)(held_out.user, held_out.item)
        clicked = held_out.click == 1  # the made data know the outcome of every click
        click = roc_auc_score(held_out.click, click)
        conversion = roc_auc_score(held_out.purchase[clicked], conversion[clicked])
        print(f"{name:28} AUC: click {click:.3f}  purchase after a click {conversion:.3f}")


if __name__ == "__main__":
    main()
