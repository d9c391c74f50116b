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
        copies, token = mtl.fork(METHOD, self.balance.get_value(), self.encode(x))
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
    """Parameters and the method's state after two forked steps of bare JAX."""
    optimizer = optax.adam(1e-2)

    def loss_fn(params: Any, fork: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return bare_losses(params, fork(bare_encode(params, x)), y)

    @jax.jit
    def step(params: Any, opt_state: Any, state: Any) -> Any:
        _, (grads, state) = mtl.fork_value_and_grad(loss_fn, METHOD)(params, state, X, Y)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state

    params, state = start(), METHOD.init(LIKE)
    opt_state = optimizer.init(params)
    for _ in range(2):
        params, opt_state, state = step(params, opt_state, state)
    return params, state


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


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(nnx.Variable, "get_value"), reason="needs Flax 0.12.1")
def test_nnx_variable_holds_the_balancer(forked: Any) -> None:
    params, state = forked
    model = Balanced(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model: Balanced, optimizer: Any) -> jax.Array:
        wrt = nnx.DiffState(0, (nnx.Param, Balance))
        grads, losses = nnx.grad(Balanced.loss, argnums=wrt, has_aux=True)(model, X, Y)
        # The new carrier is the "gradient" of the old one.
        nnx.update(model, nnx.filter_state(grads, Balance))
        optimizer.update(model, nnx.filter_state(grads, nnx.Param))
        return losses

    for _ in range(2):
        step(model, optimizer)
    assert_model(model, params)
    found = mtl.diagnostics(model.balance.get_value())
    assert int(found["steps"]) == 2
    np.testing.assert_allclose(found["weights"], mtl.diagnostics(state)["weights"], rtol=1e-4)


@pytest.mark.slow
def test_nnx_split_and_merge(forked: Any) -> None:
    params, _ = forked
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model: Model, optimizer: Any, state: Any) -> Any:
        graph, params = nnx.split(model)

        def loss_fn(params: Any, fork: Any) -> jax.Array:
            model = nnx.merge(graph, params)
            return model.losses(fork(model.encode(X)), Y)

        _, (grads, state) = mtl.fork_value_and_grad(loss_fn, METHOD)(params, state)
        optimizer.update(model, grads)
        return state

    state = METHOD.init(LIKE)
    for _ in range(2):
        state = step(model, optimizer, state)
    assert_model(model, params)


@pytest.mark.slow
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
    assert int(mtl.diagnostics(optimizer.opt_state)["steps"][...]) == 2
    assert mtl.head_weights(optimizer.opt_state).shape == (TASKS,)


class Noisy(Model):
    """With layers that change a state in their call: batch statistics, and a stream of keys."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def encode(self, x: jax.Array) -> jax.Array:
        return self.dropout(jnp.tanh(self.shared(self.norm(x))))


@pytest.mark.slow
def test_nnx_batch_statistics_and_dropout() -> None:
    """`loss_fn` is traced twice; statistics and keys, which it returns as `aux`, move on once a step."""
    # Flax keeps the statistics in float32, also where JAX computes in float64.
    x, y, like = (array.astype(jnp.float32) for array in (X, Y, LIKE))
    model = Noisy(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def merge(params: Any, rest: Any) -> Noisy:
        # NNX lets a call change only variables that were made in the same trace, as with `jax.grad`.
        return nnx.merge(graph, params, rest, copy=True)

    def loss_fn(params: Any, fork: Any, rest: Any) -> Any:
        model = merge(params, rest)
        losses = model.losses(fork(model.encode(x)), y)
        return losses, nnx.state(model, nnx.Not(nnx.Param))

    @jax.jit
    def forked_step(params: Any, state: Any, rest: Any) -> Any:
        fn = mtl.fork_value_and_grad(loss_fn, METHOD, has_aux=True)
        (losses, rest), (grads, state) = fn(params, state, rest)
        return losses, grads, state, rest

    # The same by one gradient per task, with the same dropout masks.
    @jax.jit
    def split_step(params: Any, state: Any, rest: Any) -> Any:
        def bottom(params: Any) -> jax.Array:
            return merge(params, rest).encode(x)

        h, pull = jax.vjp(bottom, params)
        heads = lambda params, h: merge(params, rest).losses((h,) * TASKS, y)  # noqa: E731
        rows = jax.jacrev(lambda h: heads(params, h))(h)
        update, state = METHOD.update(rows, state, h)
        head_grads = jax.grad(lambda params: heads(params, h).sum())(params)
        return jax.tree.map(jnp.add, pull(update)[0], head_grads), state

    state = METHOD.init(like)
    masks = []
    for step in range(1, 4):
        expected, expected_state = split_step(params, state, rest)
        masks.append(merge(params, rest).encode(x) != 0)
        losses, grads, state, rest = forked_step(params, state, rest)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            (grads, state),
            (expected, expected_state),
        )
        assert np.isfinite(losses).all()
        after = merge(params, rest)
        np.testing.assert_allclose(
            after.norm.mean[...], (1 - 0.9**step) * x.mean(axis=0), rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(
            after.norm.var[...], 0.9**step + (1 - 0.9**step) * x.var(axis=0), rtol=1e-4
        )
        assert int(after.dropout.rngs.count[...]) == step
    assert not (masks[0] == masks[1]).all() and not (masks[1] == masks[2]).all()


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
    def step(state: TrainState, balance: Any) -> Any:
        _, (grads, balance) = mtl.fork_value_and_grad(loss_fn, METHOD)(state.params, balance)
        return state.apply_gradients(grads=grads), balance

    balance = METHOD.init(LIKE)
    for _ in range(2):
        state, balance = step(state, balance)
    assert_params(state.params, params)


def test_an_nnx_model_may_hold_a_counter():
    class Counting(nnx.Module):
        def __init__(self):
            self.w, self.calls = nnx.Param(jnp.ones(3)), nnx.Variable(jnp.int32(7))

    graph, state = nnx.split(Counting())
    method, tx = mtl.sum_tasks(2), optax.adam(0.1)

    def loss_fn(state, fork):
        a, b = fork(nnx.merge(graph, state).w[...])
        return a.sum(), (b**2).sum()

    fn = mtl.fork_value_and_grad(loss_fn, method)
    _, (grads, _) = fn(state, method.init(jnp.ones(3)))
    updates, _ = tx.update(grads, tx.init(state), state)
    moved = optax.apply_updates(state, updates)
    assert moved["calls"][...] == 7 and moved["calls"][...].dtype == jnp.int32
    np.testing.assert_allclose(moved["w"][...], 0.9, 1e-5)
