"""PPO with the actor and the critic on one torso: two tasks in unlike units.

    python -m examples.ppo_actor_critic

The critic's squared errors of returns have gradients many times those of the actor's clipped objective, so
that the critic alone forms the torso. The entropy of the policy belongs to the actor's loss: the last row,
where it is a task of its own with the same part in every step, stays at a random policy.

Prints, after 62 seconds of processor time on two CPU cores, means of four seeds to the nearest ten:

    plain sum               return in the last fifth  220
    critic times 0.01       return in the last fifth  380
    imtl_g                  return in the last fifth  420
    imtl_g, entropy a task  return in the last fifth   40
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import mtl_optax as mtl

Batch = dict[str, jax.Array]
TASKS = ("actor", "critic")
METHODS = {
    "plain sum": mtl.sum_tasks(TASKS),
    "critic times 0.01": mtl.fixed_weights(TASKS, {"actor": 1.0, "critic": 0.01}),
    "imtl_g": mtl.imtl_g(TASKS),
    "imtl_g, entropy a task": mtl.imtl_g((*TASKS, "entropy")),
}
WORLDS, HORIZON, EPOCHS, MINIBATCHES = 8, 128, 4, 4
DISCOUNT, TRACE, CLIP, ENTROPY = 0.99, 0.95, 0.2, 0.01


class CartPole:
    """Barto, Sutton and Anderson's pole on a cart with the usual constants; at most 500 steps."""

    observations, actions, limit = 4, 2, 500

    @staticmethod
    def reset(key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)

    @staticmethod
    def step(state: jax.Array, action: jax.Array) -> tuple[jax.Array, float, jax.Array]:
        """Returns the next state, the reward, and whether the pole fell or the cart left the track."""
        _, speed, angle, turn = state
        force = jnp.where(action == 1, 10.0, -10.0)
        push = (force + 0.05 * turn**2 * jnp.sin(angle)) / 1.1
        fall = 9.8 * jnp.sin(angle) - jnp.cos(angle) * push
        fall /= 0.5 * (4 / 3 - 0.1 * jnp.cos(angle) ** 2 / 1.1)
        pull = push - 0.05 * fall * jnp.cos(angle) / 1.1
        state = state + 0.02 * jnp.stack([speed, pull, turn, fall])
        return state, 1.0, (jnp.abs(state[0]) > 2.4) | (jnp.abs(state[2]) > jnp.pi / 15)


class ActorCritic(nnx.Module):
    def __init__(self, env: Any, rngs: nnx.Rngs, width: int = 64):
        layer = partial(nnx.Linear, rngs=rngs)
        hidden = layer(env.observations, width), nnx.tanh, layer(width, width), nnx.tanh
        self.torso, self.critic = nnx.Sequential(*hidden), layer(width, 1)
        self.actor = layer(width, env.actions, kernel_init=nnx.initializers.normal(0.01))

    def __call__(self, observation: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = self.torso(observation)
        return jax.nn.log_softmax(self.actor(h)), self.critic(h)[..., 0]

    def losses(self, batch: Batch, tasks: tuple[str, ...]) -> dict[str, jax.Array]:
        log_policy, value = self(batch["observation"])
        advantage = batch["advantage"]
        chosen = jnp.take_along_axis(log_policy, batch["action"][:, None], axis=1)[:, 0]
        ratio = jnp.exp(chosen - batch["log_prob"])
        unit = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        actor = -jnp.minimum(ratio * unit, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * unit).mean()
        critic = optax.l2_loss(value, batch["value"] + advantage).mean()
        entropy = ENTROPY * jnp.sum(jnp.exp(log_policy) * log_policy, axis=1).mean()
        if "entropy" in tasks:
            return {"actor": actor, "critic": critic, "entropy": entropy}
        return {"actor": actor + entropy, "critic": critic}


def train(method: mtl.Method, key: jax.Array, rate: Any, updates: int, env: Any = CartPole) -> Any:
    """Returns the mean return of the episodes that end during each update, and the optimizer's state."""
    init_key, reset_key, key = jax.random.split(key, 3)
    graph, params = nnx.split(ActorCritic(env, nnx.Rngs(init_key)))
    tx = optax.chain(method, optax.clip_by_global_norm(0.5), optax.adam(rate, eps=1e-5))
    mtl.check(tx, params)
    reset = lambda key: jax.vmap(env.reset)(jax.random.split(key, WORLDS))  # noqa: E731

    def act(carry: Any, key: jax.Array) -> Any:
        params, state, length, total = carry
        step = {"observation": state}
        log_policy, step["value"] = nnx.merge(graph, params)(state)
        step["action"] = jax.random.categorical(key, log_policy)
        step["log_prob"] = jnp.take_along_axis(log_policy, step["action"][:, None], 1)[:, 0]
        state, step["reward"], done = jax.vmap(env.step)(state, step["action"])
        length, total = length + 1, total + step["reward"]
        step["done"] = done | (length >= env.limit)
        step["returned"] = jnp.where(step["done"], total, jnp.nan)
        state = jnp.where(step["done"][:, None], reset(jax.random.fold_in(key, 1)), state)
        return (params, state, *(jnp.where(step["done"], 0, x) for x in (length, total))), step

    def advantages(following: Any, step: Batch) -> Any:
        advantage, value = following
        ahead = DISCOUNT * (1 - step["done"]) * (value + TRACE * advantage)
        return (step["reward"] + ahead - step["value"], step["value"]), step["reward"] + ahead

    def descend(carry: Any, batch: Batch) -> Any:
        params, opt_state = carry
        loss_fn = lambda params: nnx.merge(graph, params).losses(batch, method.task_names)  # noqa: E731
        losses, grads = mtl.per_task_value_and_grad(loss_fn)(params)
        moves, opt_state = tx.update(grads, opt_state, params, losses=losses)
        return (optax.apply_updates(params, moves), opt_state), None

    def update(carry: Any, key: jax.Array) -> Any:
        params, opt_state, world = carry
        act_key, *epochs = jax.random.split(key, 1 + EPOCHS)
        (_, *world), steps = jax.lax.scan(act, (params, *world), jax.random.split(act_key, HORIZON))
        _, value = nnx.merge(graph, params)(world[0])
        _, target = jax.lax.scan(advantages, (jnp.zeros(WORLDS), value), steps, reverse=True)
        steps["advantage"] = target - steps["value"]
        steps = jax.tree.map(lambda x: x.reshape(HORIZON * WORLDS, *x.shape[2:]), steps)
        order = jnp.stack([jax.random.permutation(key, HORIZON * WORLDS) for key in epochs])
        order = order.reshape(EPOCHS * MINIBATCHES, -1)
        batches = jax.tree.map(lambda x: x[order], steps)
        (params, opt_state), _ = jax.lax.scan(descend, (params, opt_state), batches)
        return (params, opt_state, world), jnp.nanmean(steps["returned"])

    carry = params, tx.init(params), [reset(reset_key), jnp.zeros(WORLDS, int), jnp.zeros(WORLDS)]
    (_, opt_state, _), returns = jax.lax.scan(update, carry, jax.random.split(key, updates))
    return returns, opt_state


def main(seeds: int = 4, updates: int = 60, rate: float = 1e-2) -> None:
    for name, method in METHODS.items():
        run = jax.jit(jax.vmap(partial(train, method, rate=rate, updates=updates)))
        returns, _ = run(jax.random.split(jax.random.key(0), seeds))
        late = jnp.nanmean(returns[:, -max(updates // 5, 1) :], axis=1).mean()
        print(f"{name:22}  return in the last fifth {round(float(late), -1):4.0f}")


if __name__ == "__main__":
    main()
