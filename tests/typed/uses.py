"""Right and wrong uses of the public signatures: a type checker must refuse the lines marked as wrong."""

import jax
import jax.numpy as jnp
import optax

import mtl_optax as mtl

method: mtl.Method = mtl.upgrad(3)
mtl.upgrad(("buy", "click"), preference={"buy": 2.0, "click": 1.0})
mtl.metabalance({"buy", "click"}, target="buy", relax_factor=0.5, update_every=10)
mtl.metabalance(2, relax_factor=jnp.float32(0.5))
tx: optax.GradientTransformation = optax.chain(mtl.emtl(2, base=mtl.mgda(2)), optax.adam(1e-3))
state: mtl.BalanceState = method.init({"w": jnp.zeros(2)})
weights: jax.Array = state.weights
total, state = mtl.weigh_losses({"a": jnp.ones(()), "b": jnp.ones(())}, state, mtl.gls(2))


def losses_of(params: dict[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
    return {"a": (params["w"] * x).sum(), "b": params["w"].sum()}


params = {"w": jnp.ones(2)}
losses, (update, state) = mtl.weighted_value_and_grad(losses_of, method)(params, state, jnp.ones(2))
new_params: dict[str, jax.Array] = update
losses, grads = mtl.per_task_value_and_grad(losses_of)(params, jnp.ones(2))
loss: jax.Array = losses["a"]

number: int = mtl.weighted_value_and_grad(losses_of, method)(params, state)[0]  # wrong
mtl.weighted_value_and_grad(losses_of, optax.adam(1e-3))  # wrong
mtl.weighted_value_and_grad(losses_of, method, mode="least memory")  # wrong
mtl.per_task_value_and_grad(losses_of, mode="products")  # wrong
mtl.upgrad(2.5)  # wrong
mtl.upgrad()  # wrong
mtl.metabalance(2, relax_factor="high")  # wrong
mtl.metabalance(2, target=1.5)  # wrong
mtl.metabalance(2, strategy="grow")  # wrong
mtl.mgda(2, reduce="no")  # wrong
mtl.mgda(2, normalise="l2")  # wrong
mtl.nash_mtl(2, update_every="often")  # wrong
mtl.cagrad(2, c=None)  # wrong
mtl.famo(2, weight_lr=[0.1])  # wrong
mtl.accumulate(tx, 2, every_k="all")  # wrong
mtl.weigh_losses(jnp.ones(2), state, optax.adam(1e-3))  # wrong
