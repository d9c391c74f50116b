"""EMTL's Table 2: segmentation, depth and surface normals with one network and with all its methods.

    python -m examples.studies.emtl table2                  rendered rooms: SYNTHETIC SCENES
    python -m examples.studies.emtl table2 --data FOLDER    NYUv2, see scenes_nyuv2.py

SegNet with MTAN's attention, Adam, the learning rate halved half-way, images mirrored at random: the
paper's protocol, but with smaller images, a smaller network and far fewer steps, so that the rendered table
is made in minutes on one core. The metrics are those of the last step: nothing is selected on the test set,
where the paper takes the best epoch. Every method has the library's defaults and the same learning rate;
none is tuned. BanditMTL alone has another radius than its default, which is more than log(3) and so lets
all weight go to one task.

Methods that look at gradients combine those of the shared parameters; methods that look at losses alone
weigh the losses. EMTL, MGDA and Nash-MTL weigh the tasks' own parameters too, as their papers do.
"""

import argparse
import hashlib
import itertools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

import mtl_optax as mtl
from examples.models.segnet_mtan import (
    TASKS,
    Predictions,
    SegNetMTAN,
    SegNetSingle,
    as_prediction,
)
from examples.studies.emtl import dense_report
from examples.studies.emtl.dense_metrics import loss, measure
from examples.studies.emtl.dense_report import TESTED
from examples.studies.emtl.scenes import CLASSES, Scenes, synthetic_scenes
from examples.studies.emtl.scenes_nyuv2 import NUM_CLASSES, read_nyuv2
from examples.studies.harness import trainer
from examples.studies.harness.choices import WEIGHS_HEADS, Choice, parse_choice
from examples.studies.harness.runner import Job, Runner
from examples.studies.harness.runs import Plan, Run, Setting
from examples.studies.harness.steps import Parameters
from examples.studies.harness.timing import cores, machine

SINGLE = "STL"
# The paper's rows in its order; an epoch is a window of DWA. The stored table has MGDA on raw gradients in
# EMTL, where the library's default is unit gradients.
ROWS = {
    SINGLE: "sum",
    "LS": "sum",
    "SI": "scale_invariant",
    "RLW": "rlw",
    "DWA": "dwa(window={epoch})",
    "Uncertainty": "uncertainty",
    "BanditMTL": "bandit_mtl(kl_radius=0.3)",
    "MGDA": "mgda",
    "PCGrad": "pcgrad",
    "CAGrad": "cagrad",
    "GradDrop": "graddrop",
    "IMTL-G": "imtl_g",
    "Nash-MTL": "nash_mtl",
    "EMTL": 'emtl(base="mgda", epsilon=0.3, rho=0.3)',
}


@dataclass(frozen=True)
class Config:
    """Sizes of the data, the network and the training, the same for every row.

    Attributes:
      height, width: of rendered images, multiples of 2^len(widths).
      train, test: how many images are rendered.
      held_out: images of the training set whose losses are shown while it trains; no row learns from them.
      widths: channels of the network's levels.
      batch, steps, learning_rate: of the training, without `patience`: the last step is kept.
      epochs: parts of a run, of which the losses and weights are kept.
    """

    height: int = 32
    width: int = 48
    train: int = 288
    test: int = 128
    held_out: int = 32
    widths: tuple[int, ...] = (8, 16, 32)
    batch: int = 4
    steps: int = 200
    learning_rate: float = 3e-3
    epochs: int = 10
    seeds: int = 2
    weight_decay: float = 0.0
    patience: int | None = None


# As the paper trains, but for the network's size: 200 epochs of 397 steps.
NYUV2 = replace(
    Config(), widths=(32, 64, 128), batch=2, steps=79_400, learning_rate=1e-4, epochs=200, seeds=3
)
QUICK = replace(
    Config(), height=16, width=24, train=10, test=4, held_out=2, widths=(4, 8), steps=4, epochs=2
)


class SameImages(nnx.Module):
    """What tasks that share nothing share: the images."""

    def __call__(self, images: jax.Array) -> jax.Array:
        return images


class DenseNetwork:
    """A shared trunk and a head per task, as functions of parameters that are vectors.

    One vector for the trunk and one for each head: what a method and Adam do with them compiles in a
    moment, where a hundred arrays would take half a minute for every row.

    With `separate`, each head is a SegNet of its own and the trunk only hands the images on: as the
    gradients of the sum of losses are then those of each task, its training is single-task learning.
    """

    def __init__(self, classes: int, widths: tuple[int, ...], separate: bool):
        modules = nnx.eval_shape(lambda: _modules(classes, widths, separate, nnx.Rngs(0)))
        split = [nnx.split(module) for module in modules]
        self._graphs = [graph for graph, _ in split]
        self._shapes = [shapes for _, shapes in split]
        zeros = [
            jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), s) for s in self._shapes
        ]
        self._unravel = [ravel_pytree(state)[1] for state in zeros]
        self.compute = jax.jit(self._losses_and_grads)
        self.predict = jax.jit(self._predict_all)

    def init(self, seed: int) -> Parameters:
        """Fresh parameters, made by numpy: their many shapes would take a minute to compile."""
        rng = np.random.default_rng(seed)
        trunk, *heads = (ravel_pytree(_fresh(shapes, rng))[0] for shapes in self._shapes)
        return Parameters(trunk, tuple(heads))

    def _module(self, place: int, vector: jax.Array) -> Any:
        return nnx.merge(self._graphs[place], self._unravel[place](vector))

    def _predict(self, heads: Any, task: int, representation: Any) -> jax.Array:
        return as_prediction(task, self._module(1 + task, heads[task])(representation))

    def encode(self, shared: jax.Array, batch: Scenes) -> Any:
        """The representation of a batch."""
        return self._module(0, shared)(batch.images)

    def decode(self, heads: Any, representation: Any, batch: Scenes) -> tuple[jax.Array, ...]:
        """The T losses."""
        return tuple(
            loss(t, self._predict(heads, t, representation), batch) for t in range(len(TASKS))
        )

    def _losses_and_grads(self, params: Parameters, batch: Scenes, flips: jax.Array) -> Any:
        """The losses `[T]`, and the gradients of the trunk `[T, P]` and of the heads."""
        value_and_grad = mtl.split_value_and_grad(self.encode, self.decode)
        losses, grads = value_and_grad(*params, mirror(batch, flips))
        return jnp.stack(losses), grads

    def _predict_all(self, params: Parameters, images: jax.Array) -> Predictions:
        """The predictions of all tasks."""
        representation = self._module(0, params.shared)(images)
        return Predictions(
            *(self._predict(params.heads, t, representation) for t in range(len(TASKS)))
        )


def _modules(
    classes: int, widths: tuple[int, ...], separate: bool, rngs: nnx.Rngs
) -> tuple[nnx.Module, ...]:
    if separate:
        heads = (SegNetSingle(t, classes, widths=widths, rngs=rngs) for t in range(len(TASKS)))
        return SameImages(), *heads
    model = SegNetMTAN(classes, widths=widths, rngs=rngs)
    return model.segnet, *model.towers


def _fresh(shapes: nnx.State, rng: np.random.Generator) -> Any:
    """Kernels uniform with variance 2 / fan-in, scales 1 and biases 0, as the modules start."""

    def draw(path: Any, leaf: Any) -> np.ndarray:
        names = jax.tree_util.keystr(path)
        if "kernel" in names:
            limit = (6 / np.prod(leaf.shape[:-1])) ** 0.5
            return rng.uniform(-limit, limit, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, "scale" in names, np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


class Program:
    """One row: the method and Adam, on gradients that the same program computes for every row.

    To compile that program takes a minute, and the rest of a row a second. So every row computes the
    gradients of the tasks one by one, also where those of the weighted sum of losses would do: the
    gradient of a weighted sum is the weighted sum of these.
    """

    def __init__(self, choice: Choice, network: DenseNetwork, config: Config):
        self.network = network
        method = choice.method(len(TASKS), optax.identity(), {})
        assert isinstance(method, mtl.Method)  # none of the rows is a chain
        weighs_heads = method.needs <= {"losses"} or choice.name in WEIGHS_HEADS
        schedule = optax.piecewise_constant_schedule(
            config.learning_rate, {max(1, config.steps // 2): 0.5}
        )
        adam = optax.adam(schedule)

        def start(params: Parameters) -> Any:
            return method.init(params.shared), adam.init(params)

        def update(params: Parameters, state: Any, losses: jax.Array, grads: Any) -> Any:
            method_state, adam_state = state
            shared, heads = grads
            shared, method_state = method.update(shared, method_state, params.shared, losses=losses)
            weights = mtl.head_weights(method_state)
            if weighs_heads:
                heads = tuple(weights[t] * head for t, head in enumerate(heads))
            updates, adam_state = adam.update(Parameters(shared, heads), adam_state, params)
            return optax.apply_updates(params, updates), (method_state, adam_state), weights

        self._start, self._update = jax.jit(start), jax.jit(update)

    def start(self, common: None, params: Parameters, setting: Setting) -> Any:
        """See `harness.trainer.Program`; there is one run."""
        return _many(self._start(_one(params)))

    def steps(self, data: Scenes, params: Any, state: Any, slots: Any, setting: Setting) -> Any:
        """One step after the other: to compile a loop of them would take a minute for every row."""
        params, state, (rows, flips) = _one(params), _one(state), _one(slots)
        found = []
        for step in range(len(rows)):
            batch = Scenes(*(part[rows[step]] for part in data))
            losses, grads = self.network.compute(params, batch, flips[step])
            params, state, weights = self._update(params, state, losses, grads)
            found.append({"losses": losses, "weights": weights})
        record = jax.tree.map(lambda *each: jnp.mean(jnp.stack(each), axis=0), *found)
        return _many(params), _many(state), _many(record)


def _one(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _many(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[None], tree)


def mirror(scenes: Scenes, flips: jax.Array) -> Scenes:
    """Some scenes `[N]` with left and right exchanged, and with them the x of their normals."""

    def choose(part: jax.Array) -> jax.Array:
        return jnp.where(flips.reshape(-1, *[1] * (part.ndim - 1)), part[:, :, ::-1], part)

    flipped = Scenes(*map(choose, scenes))
    sign = jnp.where(flips[:, None] & (jnp.arange(3) == 0)[None], -1.0, 1.0)
    return flipped._replace(normals=flipped.normals * sign[:, None, None])


class DenseTrainer(trainer.Trainer):
    """Trains rows, one run after the other; an epoch is one of the parts of a run."""

    one_by_one = True

    def __init__(
        self, classes: int, train: Scenes, test: Scenes, config: Config, separate: bool = False
    ):
        super().__init__()
        count = len(train.images) - config.held_out
        self.data = Scenes(*(jnp.asarray(part[:count]) for part in train))
        self.held_out = Scenes(*(part[count:] for part in train))
        self.test, self.config = test, config
        self.separate = separate
        self.network = DenseNetwork(classes, config.widths, separate)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a stored run must agree on."""
        found = hashlib.sha256()
        for part in (*self.data, *self.held_out, *self.test):
            found.update(np.ascontiguousarray(part).tobytes())
        train = {**asdict(self.config), "seeds": None, "separate": self.separate}
        return {"train": train, "data": found.hexdigest()}

    def make_program(self, choice: Choice) -> Program:
        """See the base class."""
        return Program(choice, self.network, self.config)

    def check(self, choice: Choice, setting: Setting) -> None:
        """Nothing that a user could choose wrongly."""

    def initial(self, seeds: np.ndarray) -> Any:
        """See the base class."""
        return _many(self.network.init(int(seeds[0])))

    def slots(self, epoch: int, seeds: np.ndarray) -> Any:
        """The images of each step, and which are mirrored; each image once in a pass over the data."""
        size, count, rng = self.config.batch, len(self.data.images), np.random.default_rng(seeds[0])

        def batches() -> Any:
            while True:
                order = rng.permutation(count)
                for start in range(0, count - size + 1, size):
                    yield order[start : start + size], rng.random(size) < 0.5

        ends = np.linspace(0, self.config.steps, self.epochs + 1).astype(int) + 1
        chosen = itertools.islice(batches(), ends[epoch - 1], ends[epoch])
        return tuple(np.stack(part)[None, None] for part in zip(*chosen, strict=True))

    def validate(self, params: Any) -> np.ndarray:
        """The sum of losses on held-out images, from which no row learns."""
        predictions = self._predictions(params, self.held_out.images)
        return np.array([sum(loss(t, p, self.held_out) for t, p in enumerate(predictions))])

    def results(self, params: Any) -> list[Any]:
        """The metrics of the test images."""
        return [({}, {TESTED: measure(self._predictions(params, self.test.images), self.test)})]

    def _predictions(self, params: Any, images: np.ndarray) -> Predictions:
        size, params = min(32, len(images)), _one(params)
        parts = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            whole = np.pad(part, [(0, size - len(part)), *[(0, 0)] * 3])  # one compiled shape
            found = self.network.predict(params, whole)
            parts.append([np.asarray(array)[: len(part)] for array in found])
        return Predictions(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def table2(options: argparse.Namespace) -> None:
    """Trains the rows, prints the table and writes it."""
    synthetic = options.data in (None, "synthetic")
    config = QUICK if options.quick else Config() if synthetic else NYUV2
    given = {name: getattr(options, name) for name in ("steps", "seeds")}
    config = replace(config, **{name: value for name, value in given.items() if value})
    config = replace(config, epochs=min(config.epochs, config.steps))
    data = _data(options.data, synthetic, config)
    runs: dict[str, list[Run]] = {}
    for separate in (True, False):
        trainer = DenseTrainer(*data, config, separate)
        count = len(trainer.data.images)
        plans = [Plan(seed, trainer.default_setting()) for seed in range(config.seeds)]
        choices = {
            label: replace(parse_choice(text.format(epoch=count // config.batch)), label=label)
            for label, text in ROWS.items()
            if (label == SINGLE) == separate
        }
        workers = min(2, cores())
        runner = Runner(trainer, trainer.fingerprint, options.out, options.resume, workers)
        found = runner.train([Job(choice, plans) for choice in choices.values()])
        runs |= dict(zip(choices, found, strict=True))
    named = f"NYUv2 arrays in {Path(str(options.data)).name}"
    if synthetic:
        named = f"SYNTHETIC SCENES, {config.height} x {config.width}"
    sizes = f"{count} images to train on, {len(data[2].images)} to test on"
    steps = f"{config.steps} steps of {config.batch} images, {config.seeds} seeds"
    made = f"Made by `{options.line}` on {machine()} with `{config}`."
    scenes = data[2] if synthetic else None
    dense_report.write(runs, f"{named}: {sizes}; {steps}", made, options.out, scenes)


def _data(data: str | None, synthetic: bool, config: Config) -> tuple[int, Scenes, Scenes]:
    if not synthetic:
        return NUM_CLASSES, *read_nyuv2(Path(str(data)))
    parts = [
        synthetic_scenes(number, config.height, config.width, seed)
        for seed, number in enumerate((config.train, config.test))
    ]
    return len(CLASSES), parts[0], parts[1]
