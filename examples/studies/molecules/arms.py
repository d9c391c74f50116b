"""The rows of the table: fixed weights, alone or in a search, and the library's methods in three places."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.studies.harness.choices import (
    LOSSES,
    PARAMETERS,
    REPRESENTATION,
    Choice,
    parse_choice,
)
from examples.studies.harness.steps import Network, Parameters, Step, make_step, one_optimizer
from examples.studies.molecules.data import PROPERTIES

NUM_TASKS = len(PROPERTIES)
WIDTH = 128
SPREAD = 1.5  # standard deviation of the logarithm of a weight in a search


class Arm(NamedTuple):
    """A row: one method, or several fixed weightings beside one another.

    Attributes:
      method: and where it stands; None for fixed weights.
      weights: "alone" (a network for each property), "sum" or "search"; None for a method.
      log: whether the logarithm of the weighted sum is minimised, whose scale follows the losses.
    """

    method: Choice | None = None
    weights: str | None = None
    log: bool = False

    def weightings(self, searched: int, seed: int) -> np.ndarray:
        """The weights `[K, T]`, one row a network; a method has one network and no use for them."""
        if self.weights == "alone":
            return np.eye(NUM_TASKS, dtype=np.float32)
        if self.weights == "search":
            drawn = np.random.default_rng([seed, NUM_TASKS]).normal(
                0, SPREAD, (searched, NUM_TASKS)
            )
            weights = np.exp(drawn)
            return (weights / weights.mean(axis=1, keepdims=True)).astype(np.float32)
        return np.ones((1, NUM_TASKS), np.float32)


ALONE, SUM, LOG_SUM, SEARCH = "each property alone", "sum", "log of the sum", "search"
LOG_ALONE, LOG_SEARCH = "each property alone, log losses", "search, log of the sum"
FIXED = {
    ALONE: Arm(weights="alone"),
    LOG_ALONE: Arm(weights="alone", log=True),
    SUM: Arm(weights="sum"),
    LOG_SUM: Arm(weights="sum", log=True),
    SEARCH: Arm(weights="search"),
    LOG_SEARCH: Arm(weights="search", log=True),
}
# The sum of log losses is `scale_invariant`. Left out: methods that need limits, a preference, a target,
# residuals, two batches or rotations.
ON_LOSSES = (
    "scale_invariant", "uncertainty", "famo", "dwa", "rlw", "igb", "uw_so", "gls", "imtl_l", "stch",
    "softadapt", "relobralo", "bandit_mtl", "go4align", "ldc_mtl",
)  # fmt: skip
ON_GRADIENTS = (
    "nash_mtl", "inverse_norm", "metabalance(relax_factor=1.0)", "metabalance(relax_factor=0.5)",
    "imtl_g", "fairgrad", "mgda", "cagrad", "upgrad", "dualproj", "aligned_mtl", "multibalance",
    "gradnorm", "conflict_free", "pcgrad", "emtl",
)  # fmt: skip
# Averages of past gradients, and one optimizer a task, make sense where gradients belong to no batch.
ON_PARAMETERS = (
    "db_mtl", "moco", "sdmgrad", "grad_vaccine", "graddrop", "excess_mtl", "lr_annealing", "adatask",
    "scale_by_mtadam", "pcd", "cr_mogm", "gradcraft", "imtl", "trimmed_mean", "krum",
)  # fmt: skip


PLACES = {LOSSES: ON_LOSSES, REPRESENTATION: ON_GRADIENTS, PARAMETERS: ON_GRADIENTS + ON_PARAMETERS}
METHODS = {
    text if place == LOSSES else f"{text}, {place}": Arm(replace(parse_choice(text), place=place))
    for place, texts in PLACES.items()
    for text in texts
}
ARMS = {**FIXED, **METHODS}


class Shared(Network):
    """Two hidden layers that all properties share, and a linear head for each; squared errors.

    Attributes:
      small: whether an accelerator holds all networks of an arm.
    """

    num_tasks = NUM_TASKS
    small = True

    def __init__(self, batch: int):
        self.representation = jax.ShapeDtypeStruct((batch, WIDTH), jnp.float32)

    def init(self, key: jax.Array, inputs: int) -> Parameters:
        """Fresh parameters."""
        *keys, head = jax.random.split(key, 3)
        w = jax.random.normal(head, (NUM_TASKS, WIDTH)) / WIDTH**0.5
        return Parameters(self.init_shared(keys, inputs), {"w": w, "b": jnp.zeros(NUM_TASKS)})

    @staticmethod
    def init_shared(keys: Sequence[jax.Array], inputs: int) -> Any:
        """Fresh parameters of what all properties share."""
        return {
            "w1": jax.random.normal(keys[0], (inputs, WIDTH)) * (2 / inputs) ** 0.5,
            "b1": jnp.zeros(WIDTH),
            "w2": jax.random.normal(keys[1], (WIDTH, WIDTH)) * (2 / WIDTH) ** 0.5,
            "b2": jnp.zeros(WIDTH),
        }

    def encode(self, shared, batch):
        """See the base class."""
        hidden = jax.nn.relu(batch.descriptors @ shared["w1"] + shared["b1"][None])
        return jax.nn.relu(hidden @ shared["w2"] + shared["b2"][None])

    def losses(self, heads, copies, batch):
        """See the base class."""
        parts = zip(copies, heads["w"], heads["b"], strict=True)
        return squared(jnp.stack([copy @ w + b for copy, w, b in parts], 1), batch)

    def decode(self, heads, representation, batch):
        """See the base class."""
        return squared(self.predict(heads, representation), batch)

    def weigh_heads(self, head_grads, weights):
        """See the base class."""
        return {"w": head_grads["w"] * weights[:, None], "b": head_grads["b"] * weights}

    @staticmethod
    def predict(heads, representation):
        """The properties `[B, T]`."""
        return representation @ heads["w"].T + heads["b"][None]


def squared(predictions: jax.Array, batch: Any) -> tuple[jax.Array, ...]:
    """The T losses."""
    return tuple(jnp.mean((predictions - batch.properties) ** 2, axis=0))


def step_of(arm: Arm, network: Network, rate: jax.Array, weights: jax.Array, steps: int) -> Step:
    """The step of an arm: Adam, whose rate falls to 0 along a cosine."""
    scaler = optax.scale_by_adam()
    descent = optax.scale_by_learning_rate(
        lambda count: rate * optax.cosine_decay_schedule(1.0, steps)(count)
    )
    if arm.method is not None:
        return make_step(arm.method, network, scaler, descent, {})

    def value_and_grad(params, state, batch):
        def objective(params):
            losses = network.decode(params.heads, network.encode(params.shared, batch), batch)
            losses = jnp.stack(losses)
            total = weights @ losses
            return jnp.log(total) if arm.log else total, losses

        grads, losses = jax.grad(objective, has_aux=True)(params)
        return losses, (grads, state)

    return one_optimizer(value_and_grad, lambda _: (), optax.chain(scaler, descent))
