"""Measures training steps of programs on other packages, with the plain sum and with a method.

    python -m examples.studies.benchmarks.clients [--quick] [--out FOLDER]

What is compared runs in turns; the method stands before the optimizer and sees all parameters. Packages
that are not installed are left out: pip install dm-haiku numpyro diffrax equinox. The lines that change:
docs/coming_from/trainers.md.
"""

import argparse
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import mtl_optax as mtl
from examples.studies.harness.command import CommandLine
from examples.studies.harness.report import publish
from examples.studies.harness.steps import Step
from examples.studies.harness.timing import Training, machine, step_times

Losses: TypeAlias = Callable[[Any, Any], Mapping[str, jax.Array]]
TASKS = ("large", "small")
ARMS = {
    "plain": None,
    "metabalance": mtl.metabalance(TASKS, target="small"),
    "upgrad": mtl.upgrad(TASKS),
}
WIDTH = 256


class Client(NamedTuple):
    losses_of: Losses
    params: Any
    batch: Any


def data() -> tuple[jax.Array, dict[str, jax.Array]]:
    x = jax.random.normal(jax.random.key(0), (512, 32))
    return x, {"small": x[:, 0], "large": 30 * x[:, 1]}


def squares(outputs: Mapping[str, jax.Array], y: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {task: jnp.mean((outputs[task][:, 0] - y[task]) ** 2) for task in TASKS}


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(32, WIDTH, rngs=rngs)
        self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.large, self.small = (nnx.Linear(WIDTH, 1, rngs=rngs) for _ in TASKS)

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        h = nnx.tanh(self.second(nnx.tanh(self.first(x))))
        return {"large": self.large(h), "small": self.small(h)}


def of_flax() -> Client:
    """A module of NNX, split into graph and parameters."""
    graph, params = nnx.split(Network(nnx.Rngs(0)))
    return Client(lambda p, batch: squares(nnx.merge(graph, p)(batch[0]), batch[1]), params, data())


def of_haiku() -> Client:
    """A transformed function."""
    import haiku as hk

    @hk.without_apply_rng
    @hk.transform
    def network(x: jax.Array) -> dict[str, jax.Array]:
        h = hk.nets.MLP([WIDTH, WIDTH], activation=jnp.tanh, activate_final=True)(x)
        return {task: hk.Linear(1, name=task)(h) for task in TASKS}

    params = network.init(jax.random.key(1), data()[0])
    return Client(lambda p, batch: squares(network.apply(p, batch[0]), batch[1]), params, data())


def of_numpyro() -> Client:
    """Two observed sites, whose log-likelihoods are the tasks."""
    from numpyro import distributions, handlers, sample

    graph, params = nnx.split(Network(nnx.Rngs(0)))

    def model(params: Any, x: jax.Array, y: Mapping[str, jax.Array]) -> None:
        for task, output in nnx.merge(graph, params)(x).items():
            sample(task, distributions.Normal(output[:, 0], 1.0), obs=y[task])

    def losses_of(params: Any, batch: Any) -> dict[str, jax.Array]:
        trace = handlers.trace(model).get_trace(params, *batch)
        return {t: -trace[t]["fn"].log_prob(trace[t]["value"]).mean() for t in TASKS}

    return Client(losses_of, params, data())


def of_diffrax() -> Client:
    """A neural differential equation of equinox and diffrax: the path, and the radius at its end."""
    import diffrax
    import equinox as eqx

    times, spiral = jnp.linspace(0.0, 4.0, 20), jnp.array([[-0.1, 2.0], [-2.0, -0.1]])
    starts = jax.random.uniform(jax.random.key(0), (64, 2), minval=-1.0, maxval=1.0)
    field = eqx.nn.MLP(2, 2, 32, 2, jnp.tanh, key=jax.random.key(1))
    params, static = eqx.partition(field, eqx.is_inexact_array)

    def solve(field: Callable[[jax.Array], jax.Array]) -> jax.Array:
        term, steps = diffrax.ODETerm(lambda t, y, _: field(y)), diffrax.SaveAt(ts=times)
        of = lambda y: diffrax.diffeqsolve(term, diffrax.Tsit5(), 0.0, 4.0, 0.1, y, saveat=steps).ys  # noqa: E731
        return jax.vmap(of)(starts)

    def losses_of(params: Any, expected: jax.Array) -> dict[str, jax.Array]:
        found = solve(eqx.combine(params, static))
        radius = jnp.linalg.norm(found[:, -1], axis=1) - jnp.linalg.norm(expected[:, -1], axis=1)
        return {"large": 100 * jnp.mean(radius**2), "small": jnp.mean((found - expected) ** 2)}

    return Client(losses_of, params, solve(lambda y: spiral @ y**3))


# The package whose version is shown, what must be importable, and the client.
CLIENTS: dict[str, tuple[str, str, Callable[[], Client]]] = {
    "a network of Flax NNX": ("flax", "flax", of_flax),
    "a network of Haiku": ("dm-haiku", "haiku", of_haiku),
    "NumPyro, two likelihoods above a network": ("numpyro", "numpyro", of_numpyro),
    "equinox and diffrax, 64 trajectories": ("diffrax", "diffrax", of_diffrax),
}


def training(client: Client, method: mtl.Method | None) -> Training:
    """The step of the plain sum, or with a method before the optimizer."""
    losses_of, params, batch = client
    tx = optax.adam(1e-3) if method is None else optax.chain(method, optax.adam(1e-3))

    def update(params: Any, opt_state: Any, batch: Any) -> Any:
        if method is None:
            total = lambda params: sum(losses_of(params, batch).values())  # noqa: E731
            losses, grads = jax.value_and_grad(total)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
        else:
            losses, grads = mtl.per_task_value_and_grad(losses_of)(params, batch)
            updates, opt_state = tx.update(grads, opt_state, params, losses=losses)
        return optax.apply_updates(params, updates), opt_state, losses, None

    return Training(Step(tx.init, update), params, batch)


def work(options: argparse.Namespace) -> None:
    """Prints the table, and writes it."""
    lines = [("program", "version", "plain, ms", *list(ARMS)[1:])]
    for name, (package, module, make) in CLIENTS.items():
        if importlib.util.find_spec(module) is None:
            continue
        client = make()
        calls = {arm: training(client, method) for arm, method in ARMS.items()}
        (_, plain, _), *others = step_times(calls, 1, "plain", 1 if options.quick else 30)
        version = f"{package} {importlib.metadata.version(package)}"
        lines.append((name, version, f"{plain:.1f}", *(f"{ratio:.2f}" for _, _, ratio in others)))
    note = f"Medians of rounds; for a method the ratio to the plain step. Made by `{options.line}`."
    publish(options.out, "clients", lines, f"Steps in other programs, on {machine()}", note, left=2)


main = CommandLine("examples.studies.benchmarks.clients", __doc__, work, "out quick")

if __name__ == "__main__":
    sys.exit(main())
