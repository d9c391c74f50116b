"""Acrobot in JAX, with what `examples.ppo_actor_critic` asks of an environment."""

from functools import partial

import jax
import jax.numpy as jnp


class Acrobot:
    """Two links hang from a joint; a torque of -1, 0 or 1 between them has to swing the tip up.

    Sutton and Barto's task with the constants of their book: links of mass, length and inertia 1, gravity
    9.8. A step costs 1 and takes 0.2 seconds; an episode has at most 500.
    """

    observations, actions, limit = 6, 3, 500

    @staticmethod
    def reset(key: jax.Array) -> jax.Array:
        """Both links hang almost straight down."""
        return _observed(jax.random.uniform(key, (4,), minval=-0.1, maxval=0.1))

    @staticmethod
    def step(state: jax.Array, action: jax.Array) -> tuple[jax.Array, float, jax.Array]:
        """Returns the next state, the reward, and whether the tip is a link's length above the joint."""
        cos1, sin1, cos2, sin2, *speeds = state
        angles = jnp.stack([jnp.arctan2(sin1, cos1), jnp.arctan2(sin2, cos2), *speeds])
        slope = partial(_slope, torque=action - 1.0)
        k1 = slope(angles)
        k2 = slope(angles + 0.1 * k1)
        k3 = slope(angles + 0.1 * k2)
        k4 = slope(angles + 0.2 * k3)
        angles = angles + 0.2 / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        fastest = jnp.array([jnp.inf, jnp.inf, 4 * jnp.pi, 9 * jnp.pi])
        angles = jnp.clip(angles, -fastest, fastest)
        return _observed(angles), -1.0, -jnp.cos(angles[0]) - jnp.cos(angles[0] + angles[1]) > 1


def _observed(angles: jax.Array) -> jax.Array:
    first, second, *speeds = angles
    return jnp.stack([jnp.cos(first), jnp.sin(first), jnp.cos(second), jnp.sin(second), *speeds])


def _slope(angles: jax.Array, torque: jax.Array) -> jax.Array:
    """The time derivative of both angles and speeds; the second angle is relative to the first."""
    first, second, speed1, speed2 = angles
    whole, lower = 3.5 + jnp.cos(second), 1.25 + 0.5 * jnp.cos(second)  # moments of inertia
    lower_pull = 4.9 * jnp.sin(first + second)
    pull = 14.7 * jnp.sin(first) + lower_pull
    pull -= 0.5 * speed2 * (speed2 + 2 * speed1) * jnp.sin(second)
    push = torque + lower / whole * pull - 0.5 * speed1**2 * jnp.sin(second) - lower_pull
    change2 = push / (1.25 - lower**2 / whole)
    return jnp.stack([speed1, speed2, -(lower * change2 + pull) / whole, change2])
