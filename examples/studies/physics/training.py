"""Training of small networks on a problem: the rows of the comparison, and where each is placed."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_optax as mtl
from examples.studies.harness import trainer
from examples.studies.harness.choices import Choice
from examples.studies.harness.runs import Setting
from examples.studies.harness.steps import Step, one_optimizer
from examples.studies.physics.pointwise import residual_attention
from examples.studies.physics.problems import Network, Problem

ERROR, FIELD = "relative L2 error", "field"  # what a run's test holds


@dataclass(frozen=True)
class Config:
    """Sizes of the network and of the training, the same for every method and problem.

    Attributes:
      steps, seeds: of the training.
      width, depth: of the network.
      input_scale: factor on the first layer's weights at the start, for solutions that oscillate.
      interior, edge: points a step, drawn anew for each step.
      learning_rate: of Adam at the start; it falls to 0 along a cosine.
      period: steps between two computations of the weights, for the rows that keep them.
      probes: random vectors that estimate an NTK trace.
      pool: batches of interior points that come back in turn, for weights of points.
      chunk: steps of an epoch, of which the mean weights are kept.
      grid: points along each axis at which the error is measured.
    """

    steps: int = 3000
    seeds: int = 3
    width: int = 64
    depth: int = 2
    input_scale: float = 2.0
    interior: int = 192
    edge: int = 32
    learning_rate: float = 5e-3
    period: int = 100
    probes: int = 16
    pool: int = 16
    chunk: int = 500
    grid: int = 64
    weight_decay: float = 0.0
    patience: int | None = None

    @property
    def epochs(self) -> int:
        """How many chunks the steps are."""
        return -(-self.steps // self.chunk)


Params = list[tuple[jax.Array, jax.Array]]  # of the layers: weights and biases
State = Any  # of a placement
# `(params, state, step, points of the interior, of the boundary) -> (direction for Adam, new state)`
Direction = Callable[..., tuple[Params, State]]
Placed = tuple[Callable[[Params], State], Direction]  # the state's init beside it


def every_gradient(problem: Problem, method: mtl.Method, config: Config) -> Placed:
    """T backward passes a step."""
    value_and_grad = mtl.per_task_value_and_grad(_losses(problem))

    def direction(params: Params, state: State, k: jax.Array, *points: jax.Array) -> Any:
        losses, grads = value_and_grad(params, *points)
        return method.update(grads, state, params, losses=losses)

    return method.init, direction


def kept_weights(problem: Problem, method: mtl.Method, config: Config) -> Placed:
    """T backward passes where weights are due (`update_every`), and one in between: jaxpi's scheme."""
    value_and_grad = mtl.weighted_value_and_grad(_losses(problem), method)
    return method.init, lambda params, state, k, *points: value_and_grad(params, state, *points)[1]


def one_gradient(problem: Problem, method: mtl.Method, config: Config) -> Placed:
    """One backward pass a step, of the loss whose turn it is."""
    remembered = mtl.remember(method, decay=0.0)
    value_and_grad = mtl.one_task_value_and_grad(_losses(problem), method.tasks.names)

    def direction(params: Params, state: State, k: jax.Array, *points: jax.Array) -> Any:
        losses, (grads, active) = value_and_grad(k, params, *points)
        return remembered.update(grads, state, params, losses=losses, active=active)

    return remembered.init, direction


def on_losses(problem: Problem, method: mtl.Method, config: Config) -> Placed:
    """One backward pass a step, of the weighted sum; NTK traces where the method asks for them."""
    loss_fn, names = _losses(problem), method.tasks.names

    def residuals(params: Params, points: tuple[jax.Array, ...], name: str) -> jax.Array:
        values = problem.residuals(network(problem, params), *points)[name]
        return values / values.size**0.5  # the loss is the sum of their squares

    def traces(params: Params, k: jax.Array, points: tuple[jax.Array, ...]) -> jax.Array:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), k), len(names))
        estimate = partial(mtl.ntk_trace, residuals, params, points, num_samples=config.probes)
        return jnp.stack([estimate(name, key=key) for name, key in zip(names, keys, strict=True)])

    def direction(params: Params, state: State, k: jax.Array, *points: jax.Array) -> Any:
        extra = {}
        if "traces" in method.rule.extra:
            # Zeros, which `ntk` passes over, in between.
            due, none = k % config.period == 0, lambda *_: jnp.zeros(len(names))
            extra["traces"] = jax.lax.cond(due, traces, none, params, k, points)

        def weighted(params: Params) -> Any:
            return mtl.weigh_losses(loss_fn(params, *points), state, method, **extra)

        return jax.grad(weighted, has_aux=True)(params)

    return method.init, direction


def on_points(problem: Problem, method: mtl.Method, config: Config) -> Placed:
    """Weights of the points of a fixed pool, whose batches come in turn; the other losses are added.

    `method` has the names of the losses; it weighs them after `residual_attention` has weighed the points.
    """
    attention = residual_attention(config.pool * config.interior)
    pool = problem.place(jax.random.uniform(jax.random.key(1), (config.pool, config.interior, 2)))

    def direction(
        params: Params, state: State, k: jax.Array, _: jax.Array, boundary: jax.Array
    ) -> Any:
        batch = k % config.pool
        active = jnp.repeat(jnp.arange(config.pool) == batch, config.interior)

        def weighted(params: Params) -> Any:
            found = problem.residuals(network(problem, params), pool[batch], boundary)
            squares = found.pop("equation") ** 2
            losses = {name: jnp.mean(values * values) for name, values in found.items()}
            squares = jnp.where(active, jnp.tile(squares, config.pool), 0)
            total, points = mtl.weigh_losses(squares, state[1], attention, active=active)
            losses["equation"] = total / config.interior
            total, tasks = mtl.weigh_losses(losses, state[0], method)
            return total, (tasks, points)

        return jax.grad(weighted, has_aux=True)(params)

    return lambda params: (method.init(params), attention.init(params)), direction


def row(make: Callable[..., mtl.Method], place: Any = every_gradient, **options: Any) -> Any:
    """One row of the table: what makes a method of the names of the losses, and where it is placed."""
    return partial(make, **options), place


def hundredfold(names: tuple[str, ...]) -> mtl.Method:
    """Weight 1 for the equation and 100 for every condition on the boundary."""
    weights = {name: 1.0 if name == "equation" else 100.0 for name in names}
    return mtl.fixed_weights(names, weights)


SLOW = {"ema_decay": 0.999}
ROWS = {
    "plain sum": row(mtl.sum_tasks, on_losses),
    "fixed weights, 100": row(hundredfold, on_losses),
    "inverse_norm": row(mtl.inverse_norm),
    "inverse_norm, slow average": row(mtl.inverse_norm, **SLOW),
    "inverse_norm, slow average, one gradient": row(mtl.inverse_norm, one_gradient, **SLOW),
    "inverse_norm, kept weights": row(
        mtl.inverse_norm, kept_weights, update_every=Config.period, eps=1e-5
    ),
    "lr_annealing": row(mtl.lr_annealing, target="equation"),
    "ntk": row(mtl.ntk, on_losses),
    "metabalance": row(mtl.metabalance, target="equation", relax_factor=1.0, blocks="all"),
    "upgrad": row(mtl.upgrad),
    "conflict_free": row(mtl.conflict_free),
    "conflict_free, one gradient": row(mtl.conflict_free, one_gradient),
    "mgda": row(mtl.mgda),
    "imtl_g": row(mtl.imtl_g),
    "multibalance": row(mtl.multibalance),
    "gradnorm": row(mtl.gradnorm),
    "db_mtl": row(mtl.db_mtl),
    "softadapt": row(mtl.softadapt, on_losses, variant="normalized"),
    "relobralo": row(mtl.relobralo, on_losses),
    "residual attention": row(mtl.sum_tasks, on_points),
}


def init_network(key: jax.Array, config: Config) -> Params:
    """A tanh network from 2 numbers to 1."""
    sizes = [2, *[config.width] * config.depth, 1]
    keys = jax.random.split(key, len(sizes) - 1)
    layers = [
        (jax.random.normal(k, (a, b)) * (2 / (a + b)) ** 0.5, jnp.zeros(b))
        for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]
    return [(layers[0][0] * config.input_scale, layers[0][1]), *layers[1:]]


def network(problem: Problem, params: Params) -> Network:
    """The function u of points `[n, 2]`."""

    def u(points: jax.Array) -> jax.Array:
        hidden = problem.scale(points)
        for weight, bias in params[:-1]:
            hidden = jnp.tanh(hidden @ weight + bias[None])
        weight, bias = params[-1]
        return (hidden @ weight + bias[None])[:, 0]

    return u


class Trainer(trainer.Trainer):
    """Trains the rows on one problem; an epoch is `config.chunk` steps."""

    def __init__(self, problem: Problem, config: Config):
        super().__init__()
        self.side_by_side = False  # `vmap` would take both branches on the number of a step
        self.problem, self.config = problem, config
        self.points = problem.grid(config.grid)
        self.exact = problem.solution(self.points)
        self._solve = jax.jit(lambda params, points: network(problem, params)(points))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a stored run must agree on."""
        return {"problem": self.problem.name, "train": {**asdict(self.config), "seeds": None}}

    def init(self, key: jax.Array) -> Params:
        """See the base class."""
        return init_network(key, self.config)

    def make_step(self, choice: Choice, setting: Setting) -> Step:
        """The step of the row that the choice names; the batch is its number and its points."""
        (make, place), config = ROWS[choice.label], self.config
        init_state, direction = place(self.problem, make(self.problem.terms), config)
        adam = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps))

        def value_and_grad(params: Params, state: State, batch: Any) -> Any:
            number, points = batch
            return (), direction(params, state, number, *points)

        return one_optimizer(value_and_grad, init_state, adam)

    def order(self, data: None, epoch: jax.Array, key: jax.Array) -> Any:
        """The numbers of the steps, and a key for the points of each, `[1, chunk]`."""
        numbers = (epoch - 1) * self.config.chunk + jnp.arange(self.config.chunk)
        return numbers[None], jax.vmap(partial(jax.random.fold_in, key))(numbers)[None]

    def batch(self, data: None, slot: Any) -> Any:
        """The number of the step and its points."""
        number, key = slot
        return number, self.problem.draw(key, self.config.interior, self.config.edge)

    def recorded(self, losses: Any, weights: jax.Array, state: Any) -> dict[str, jax.Array]:
        """The weights alone: not every placement computes all losses."""
        return {"weights": weights}

    def result(self, params: Any) -> Any:
        """The relative L2 error, and the solution on the grid `[grid * grid]`."""
        field = np.asarray(self._solve(params, jnp.asarray(self.points, jnp.float32)), np.float64)
        error = np.linalg.norm(field - self.exact) / np.linalg.norm(self.exact)
        return {}, {ERROR: np.array(error), FIELD: field}


def choose(name: str) -> Choice:
    """A row as the trainer and the runner take it."""
    return Choice(name, ((name, ()),))


def _losses(problem: Problem) -> Callable[..., dict[str, jax.Array]]:
    return lambda params, *points: problem.losses(network(problem, params), *points)
