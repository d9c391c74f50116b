"""A tiny training run that checkpoints every step, for `test_checkpoints.py` and its processes.

`python checkpointed_training.py FOLDER KIND STEPS [KILL_AT]` goes on from the newest checkpoint in FOLDER,
to STEPS steps in all. At KILL_AT the process dies between writing that step's checkpoint and naming it.
"""

import os
import signal
import sys

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import mtl_optax as mtl

T = 3
P = jax.P


def parameters():
    keys = jax.random.split(jax.random.key(0))
    return {
        "heads": jax.random.normal(keys[0], (T, 8)),
        "shared": jax.random.normal(keys[1], (4, 8)),
    }


def losses_of(heads, copies, target):
    return jnp.stack([((copy * heads[t]).sum() - target[t]) ** 2 for t, copy in enumerate(copies)])


def batch(step):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), step))
    return jax.random.normal(keys[0], (4,)), jax.random.normal(keys[1], (T,))


def encode(shared, x):
    # A product and a sum, which every mesh takes.
    return jnp.tanh((x[:, None] * shared).sum(0))


def on_parameters(tx):
    """`(first state, step)` of a method on the parameters."""

    def step(params, state, count):
        x, target = batch(count)

        def loss_fn(params):
            return losses_of(params["heads"], [encode(params["shared"], x)] * T, target)

        losses, grads = mtl.per_task_value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, losses=losses)
        return optax.apply_updates(params, updates), state

    return tx.init, step


def on_representation(init_balance, value_and_grad):
    """The same of a method in a fork; its state, or its carrier, is part of the state."""
    optimizer = optax.adam(1e-2)

    def init(params):
        return init_balance(jnp.zeros(8)), optimizer.init(params)

    def step(params, state, count):
        balance, optimizer_state = state
        x, target = batch(count)
        grads, balance = value_and_grad(params, balance, x, target)
        updates, optimizer_state = optimizer.update(grads, optimizer_state, params)
        return optax.apply_updates(params, updates), (balance, optimizer_state)

    return init, step


def by_value_and_grad(method):
    def loss_fn(params, fork, x, target):
        return losses_of(params["heads"], fork(encode(params["shared"], x)), target)

    step = mtl.fork_value_and_grad(loss_fn, method)
    return on_representation(method.init, lambda *args: step(*args)[1])


def by_operator(method):
    def loss_fn(params, carrier, x, target):
        copies, token = mtl.fork(method, carrier, encode(params["shared"], x))
        return mtl.join(losses_of(params["heads"], copies, target), token)

    return on_representation(lambda h: mtl.fork_init(method, h), jax.grad(loss_fn, argnums=(0, 1)))


FORKED = optax.chain(mtl.rlw(T, reduce=False), mtl.multibalance(T))
KINDS = {
    "chain": lambda: on_parameters(
        mtl.skip_nonfinite(
            optax.chain(
                mtl.per_task(optax.trace(0.9), T),
                mtl.metabalance(T, reduce=False),
                mtl.pcgrad(T),
                optax.add_noise(0.01, 0.5, jax.random.key(2)),
                optax.adam(1e-2),
            )
        )
    ),
    "accumulated buffers": lambda: on_parameters(
        mtl.accumulate(optax.chain(mtl.moco(T), optax.adam(1e-2)), T, 2)
    ),
    "fork": lambda: by_value_and_grad(FORKED),
    "carrier": lambda: by_operator(FORKED),
}


def start(kind):
    """`((params, state), step function)` of a kind of run."""
    init, step = KINDS[kind]()
    params = parameters()
    return (params, init(params)), jax.jit(lambda carry, count: step(*carry, count))


def advance(step, carry, first, last):
    for count in range(first, last):
        carry = step(carry, jnp.asarray(count, jnp.int32))
    return carry


def manager(folder):
    return ocp.CheckpointManager(folder)


def save(checkpoints, count, carry):
    checkpoints.save(count, args=ocp.args.StandardSave(carry))


def restore(checkpoints, like):
    """The newest checkpoint and its step, in the shapes (and shardings) of `like`."""
    count = checkpoints.latest_step()
    return count, checkpoints.restore(count, args=ocp.args.StandardRestore(like))


def die_before_naming():
    """Kills this process when the next finished checkpoint is about to get its name."""

    def hook(event, args):
        if event == "os.rename":
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(folder, kind, steps, kill_at=None):
    carry, step = start(kind)
    with manager(folder) as checkpoints:
        count = 0
        if checkpoints.latest_step() is not None:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, carry)
            count, carry = restore(checkpoints, like)
        while count < steps:
            carry = advance(step, carry, count, count + 1)
            count += 1
            if count == kill_at:
                die_before_naming()
            save(checkpoints, count, carry)
            checkpoints.wait_until_finished()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *map(int, sys.argv[4:]))
