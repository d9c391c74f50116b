"""Methods inside linen, NNX and bare JAX programs, which must all find the same numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl

flax = pytest.importorskip("flax")
from flax import linen as nn  # noqa: E402
from flax import nnx  # noqa: E402
from flax.training.train_state import TrainState  # noqa: E402

TASKS, LIKE = 2, jnp.zeros((8, 4))
X = jax.random.normal(jax.random.key(0), (8, 3))
Y = jax.random.normal(jax.random.key(1), (8, TASKS)) * jnp.asarray([[1.0, 10.0]])
METHOD = mtl.multibalance(TASKS)


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.shared = nnx.Linear(3, 4, rngs=rngs)
        self.heads = nnx.Linear(4, TASKS, rngs=rngs)

    def encode(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.shared(x))

    def losses(self, copies: Any, y: jax.Array) -> jax.Array:
        errors = [self.heads(copy)[:, t] - y[:, t] for t, copy in enumerate(copies)]
        return jnp.stack([jnp.mean(error**2) for error in errors])


class Balance(nnx.Variable):
    """Holds the carrier of a fork."""


class Balanced(Model):
    """A model that carries its balancer's state with it."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        self.balance = Balance(mtl.fork_init(METHOD, LIKE))

    def loss(self, x: jax.Array, y: jax.Array) -> Any:
        copies, token = mtl.fork(self.encode(x), self.balance.get_value(), METHOD)
        losses = self.losses(copies, y)
        return mtl.join(losses, token), losses


def start() -> dict[str, Any]:
    """The parameters of `Model(nnx.Rngs(0))` as plain dictionaries."""
    model = Model(nnx.Rngs(0))
    return {
        name: {"kernel": layer.kernel[...], "bias": layer.bias[...]}
        for name, layer in (("shared", model.shared), ("heads", model.heads))
    }


def bare_encode(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["shared"]["kernel"] + params["shared"]["bias"][None])


def bare_losses(params: Any, copies: Any, y: jax.Array) -> jax.Array:
    out = [copy @ params["heads"]["kernel"] + params["heads"]["bias"][None] for copy in copies]
    return jnp.stack([jnp.mean((o[:, t] - y[:, t]) ** 2) for t, o in enumerate(out)])


@pytest.fixture(scope="module")
def forked() -> tuple[Any, Any]:
    """Parameters and carrier after two forked steps of bare JAX."""
    optimizer = optax.adam(1e-2)

    def loss_fn(params: Any, fork: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return bare_losses(params, fork(bare_encode(params, x)), y)

    @jax.jit
    def step(params: Any, state: Any, carrier: Any) -> Any:
        _, (grads, carrier) = mtl.fork_value_and_grad(loss_fn, METHOD)(params, carrier, X, Y)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, carrier

    params, carrier = start(), mtl.fork_init(METHOD, LIKE)
    state = optimizer.init(params)
    for _ in range(2):
        params, state, carrier = step(params, state, carrier)
    return params, carrier


@pytest.fixture(scope="module")
def stacked() -> Any:
    """Parameters after two steps of bare JAX with the method on the parameters."""
    tx = optax.chain(METHOD, optax.adam(1e-2))

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        losses, grads = mtl.per_task_value_and_grad(
            lambda p: bare_losses(p, (bare_encode(p, X),) * TASKS, Y)
        )(params)
        updates, state = tx.update(grads, state, params, losses=losses)
        return optax.apply_updates(params, updates), state

    params = start()
    state = tx.init(params)
    for _ in range(2):
        params, state = step(params, state)
    return params


def assert_model(model: Model, params: Any) -> None:
    for name, layer in (("shared", model.shared), ("heads", model.heads)):
        np.testing.assert_allclose(layer.kernel[...], params[name]["kernel"], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(layer.bias[...], params[name]["bias"], rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not hasattr(nnx.Variable, "get_value"), reason="needs Flax 0.12.1")
def test_nnx_variable_holds_the_balancer(forked: Any) -> None:
    params, carrier = forked
    model = Balanced(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model: Balanced, optimizer: Any) -> jax.Array:
        wrt = nnx.DiffState(0, (nnx.Param, Balance))
        grads, losses = nnx.grad(Balanced.loss, argnums=wrt, has_aux=True)(model, X, Y)
        nnx.update(
            model, nnx.filter_state(grads, Balance)
        )  # the new state is the "gradient" of the old
        optimizer.update(model, nnx.filter_state(grads, nnx.Param))
        return losses

    for _ in range(2):
        step(model, optimizer)
    assert_model(model, params)
    told = mtl.diagnostics(model.balance.get_value())
    assert int(told["steps"]) == 2
    np.testing.assert_allclose(told["weights"], mtl.diagnostics(carrier)["weights"], rtol=1e-4)


def test_nnx_split_and_merge(forked: Any) -> None:
    params, _ = forked
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model: Model, optimizer: Any, carrier: Any) -> Any:
        graph, state = nnx.split(model)

        def loss_fn(state: Any, fork: Any) -> jax.Array:
            model = nnx.merge(graph, state)
            return model.losses(fork(model.encode(X)), Y)

        _, (grads, carrier) = mtl.fork_value_and_grad(loss_fn, METHOD)(state, carrier)
        optimizer.update(model, grads)
        return carrier

    carrier = mtl.fork_init(METHOD, LIKE)
    for _ in range(2):
        carrier = step(model, optimizer, carrier)
    assert_model(model, params)


def test_nnx_optimizer_with_the_method_in_its_chain(stacked: Any) -> None:
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(METHOD, optax.adam(1e-2)), wrt=nnx.Param)

    @nnx.jit
    def step(model: Model, optimizer: Any) -> None:
        graph, state = nnx.split(model)

        def loss_fn(state: Any) -> jax.Array:
            model = nnx.merge(graph, state)
            return model.losses((model.encode(X),) * TASKS, Y)

        losses, grads = mtl.per_task_value_and_grad(loss_fn)(state)
        optimizer.update(model, grads, losses=losses)

    for _ in range(2):
        step(model, optimizer)
    assert_model(model, stacked)
    told = mtl.diagnostics(optimizer.opt_state)
    assert int(told["steps"][...]) == 2
    assert mtl.head_weights(optimizer.opt_state).shape == (TASKS,)


class Linen(nn.Module):
    def setup(self) -> None:
        self.shared = nn.Dense(4)
        self.heads = nn.Dense(TASKS)

    def encode(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.shared(x))

    def __call__(self, x: jax.Array, y: jax.Array, fork: Any = lambda h: (h,) * TASKS) -> jax.Array:
        errors = [self.heads(c)[:, t] - y[:, t] for t, c in enumerate(fork(self.encode(x)))]
        return jnp.stack([jnp.mean(error**2) for error in errors])


class BalancedState(TrainState):
    def apply_balanced(self, grads: Any, **extra: Any) -> "BalancedState":
        updates, state = self.tx.update(grads, self.opt_state, self.params, **extra)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=state)


def assert_params(got: Any, want: Any) -> None:
    for name in want:
        for part in want[name]:
            np.testing.assert_allclose(got[name][part], want[name][part], rtol=1e-4, atol=1e-6)


def test_linen_train_state_passes_losses(stacked: Any) -> None:
    model, tx = Linen(), optax.chain(METHOD, optax.adam(1e-2))
    state = BalancedState.create(apply_fn=model.apply, params=start(), tx=tx)

    @jax.jit
    def step(state: BalancedState) -> BalancedState:
        loss_fn = lambda params: state.apply_fn({"params": params}, X, Y)  # noqa: E731
        losses, grads = mtl.per_task_value_and_grad(loss_fn)(state.params)
        return state.apply_balanced(grads, losses=losses)

    for _ in range(2):
        state = step(state)
    assert_params(state.params, stacked)
    assert int(state.step) == 2


def test_linen_fork(forked: Any) -> None:
    params, _ = forked
    model = Linen()
    loss_fn = lambda params, fork: model.apply({"params": params}, X, Y, fork)  # noqa: E731
    state = TrainState.create(apply_fn=model.apply, params=start(), tx=optax.adam(1e-2))

    @jax.jit
    def step(state: TrainState, carrier: Any) -> Any:
        _, (grads, carrier) = mtl.fork_value_and_grad(loss_fn, METHOD)(state.params, carrier)
        return state.apply_gradients(grads=grads), carrier

    carrier = mtl.fork_init(METHOD, LIKE)
    for _ in range(2):
        state, carrier = step(state, carrier)
    assert_params(state.params, params)
