"""ESMM: click and conversion rates on the entire space (Ma et al., Entire Space Multi-Task Model, 2018).

    any model of this folder with two tasks: features -> logits (CTR, CVR) [2, batch]
    here: p(click) = sigmoid(CTR), p(conversion | click) = sigmoid(CVR), CTCVR is their product

A conversion is only seen after a click. Trained on clicks alone, the CVR would be wrong for all other
impressions, so both losses are over all impressions: that of the clicks and that of the conversions after a
click. Both are of the logits, never of a probability that has been rounded to 0 or 1.

On the copies of a `fork` the loss of conversions reads both towers on its own copy:

    losses = (
        esmm.click_loss(model.head(0, copies[0], features), clicks),
        esmm.conversion_loss(*(model.head(t, copies[1], features) for t in (0, 1)), conversions),
    )
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class LogProbabilities(NamedTuple):
    """Logarithms of probabilities, `[batch]` each.

    Attributes:
      click: CTR.
      conversion: CVR, of a conversion given a click.
      click_and_conversion: CTCVR.
      neither: of the opposite of `click_and_conversion`: no click, or a click without conversion.
    """

    click: jax.Array
    conversion: jax.Array
    click_and_conversion: jax.Array
    neither: jax.Array


def log_probabilities(click_logit: jax.Array, conversion_logit: jax.Array) -> LogProbabilities:
    """All four logarithms from the two logits, exact wherever float32 holds them.

    log(1 - p q) is computed as log((1 - p) + p (1 - q)): nothing is subtracted, so neither the value nor
    its gradient is lost where p q is near 0 or 1.
    """
    click, conversion = jax.nn.log_sigmoid(click_logit), jax.nn.log_sigmoid(conversion_logit)
    neither = jnp.logaddexp(
        jax.nn.log_sigmoid(-click_logit), click + jax.nn.log_sigmoid(-conversion_logit)
    )
    return LogProbabilities(click, conversion, click + conversion, neither)


def click_loss(click_logit: jax.Array, clicks: jax.Array) -> jax.Array:
    """The mean cross-entropy of the clicks over all impressions."""
    return jnp.mean(optax.sigmoid_binary_cross_entropy(click_logit, clicks))


def conversion_loss(
    click_logit: jax.Array, conversion_logit: jax.Array, conversions: jax.Array
) -> jax.Array:
    """The mean cross-entropy of the conversions after a click (CTCVR) over all impressions."""
    logs = log_probabilities(click_logit, conversion_logit)
    return -jnp.mean(conversions * logs.click_and_conversion + (1 - conversions) * logs.neither)


def losses(
    logits: jax.Array, clicks: jax.Array, conversions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The losses of clicks and of conversions.

    Args:
      logits: `[2, batch]`, of CTR and CVR.
      clicks: `[batch]`, 1 for a click.
      conversions: `[batch]`, 1 for a click with a conversion.
    """
    return click_loss(logits[0], clicks), conversion_loss(*logits, conversions)
