"""A small two-layer model of three tasks and its training step in every placement."""

import jax
import jax.numpy as jnp
from method_properties import make

import mtl_optax as mtl

T = 3
P = jax.P

MODEL_SHAPES = {"kernel": (6, 8), "bias": (8,), "heads": (T, 8)}
MODEL_SPECS = {"kernel": P(None, "model"), "bias": P("model"), "heads": P(None, "model")}
BATCH_SPECS = {"x": P("data"), "y": P("data", None)}
ROWS = 16


def encode(shared, batch):
    return jnp.tanh(batch["x"] @ shared["kernel"] + shared["bias"][None])


def decode(heads, copies, batch):
    # A product and a sum, which every mesh takes: the contracted axis is split over "model".
    outputs = [(copy * heads["heads"][t][None]).sum(-1) for t, copy in enumerate(copies)]
    return jnp.stack([((o - batch["y"][:, t]) ** 2).mean() for t, o in enumerate(outputs)])


def divide(params):
    return {"kernel": params["kernel"], "bias": params["bias"]}, {"heads": params["heads"]}


def per_task_step(params, state, batch, method):
    def loss_fn(params):
        shared, heads = divide(params)
        return decode(heads, [encode(shared, batch)] * T, batch)

    losses, grads = mtl.per_task_value_and_grad(loss_fn, mode="vmap")(params)
    return method.update(grads, state, params, losses=losses)


def split_step(params, state, batch, method):
    shared, heads = divide(params)
    value_and_grad = mtl.split_value_and_grad(
        encode, lambda heads, h, batch: decode(heads, [h] * T, batch)
    )
    losses, (shared_grads, head_grads) = value_and_grad(shared, heads, batch)
    updates, state = method.update(shared_grads, state, shared, losses=losses)
    return updates | head_grads, state


def fork_step(params, state, batch, method):
    def loss_fn(params, fork, batch):
        shared, heads = divide(params)
        return decode(heads, fork(encode(shared, batch)), batch)

    _, result = mtl.fork_value_and_grad(loss_fn, method)(params, state, batch)
    return result


def weighed_step(params, state, batch, method):
    def loss_fn(params):
        shared, heads = divide(params)
        losses = decode(heads, [encode(shared, batch)] * T, batch)
        return mtl.weigh_losses(losses, state, method)

    return jax.grad(loss_fn, has_aux=True)(params)


PLACEMENTS = {
    "per_task": per_task_step,
    "split": split_step,
    "fork": fork_step,
    "weigh_losses": weighed_step,
}
# One method of every kind: what a placement does depends on no more than that.
ON_GRADIENTS = {n: make(n, T) for n in ("multibalance", "metabalance", "db_mtl")}
ON_LOSSES = {"scale_invariant": mtl.scale_invariant(T)}


def chosen_for(placement):
    """Methods that a placement takes."""
    return ON_LOSSES if placement == "weigh_losses" else ON_GRADIENTS


def initial_state(placement, method, params, batch):
    if placement == "fork":
        return method.init(encode(divide(params)[0], batch))
    return method.init(divide(params)[0] if placement == "split" else params)
