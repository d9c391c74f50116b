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

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
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
from examples.studies.emtl.scenes import CLASSES, Scenes, synthetic_scenes
from examples.studies.emtl.scenes_nyuv2 import NUM_CLASSES, read_nyuv2
from examples.studies.harness import tables
from examples.studies.harness.checkpoints import UnfinishedRun
from examples.studies.harness.choices import WEIGHS_HEADS, Choice, parse_choice
from examples.studies.harness.runner import Job, Runner
from examples.studies.harness.timing import cores, machine
from examples.studies.recommender.network import Parameters
from examples.studies.recommender.training import Plan, Run, Setting

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
      batch, steps, learning_rate: of the training.
      parts: how often the losses and weights are kept.
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
    parts: int = 10
    seeds: int = 2


# As the paper trains, but for the network's size: 200 epochs of 397 steps.
NYUV2 = replace(
    Config(), widths=(32, 64, 128), batch=2, steps=79_400, learning_rate=1e-4, parts=200, seeds=3
)
QUICK = replace(
    Config(), height=16, width=24, train=10, test=4, held_out=2, widths=(4, 8), steps=4, parts=2
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

        self.start = jax.jit(start)
        self._update = jax.jit(update)

    def step(self, params: Any, state: Any, batch: Scenes, flips: np.ndarray) -> Any:
        """New parameters and state, the losses and the weights `[T]`."""
        losses, grads = self.network.compute(params, batch, flips)
        params, state, weights = self._update(params, state, losses, grads)
        return params, state, losses, weights


def mirror(scenes: Scenes, flips: jax.Array) -> Scenes:
    """Some scenes `[N]` with left and right exchanged, and with them the x of their normals."""

    def choose(part: jax.Array) -> jax.Array:
        return jnp.where(flips.reshape(-1, *[1] * (part.ndim - 1)), part[:, :, ::-1], part)

    flipped = Scenes(*map(choose, scenes))
    sign = jnp.where(flips[:, None] & (jnp.arange(3) == 0)[None], -1.0, 1.0)
    return flipped._replace(normals=flipped.normals * sign[:, None, None])


class DenseTrainer:
    """Trains rows; what `Runner` calls a trainer. Its epochs are the `parts` of a run."""

    side_by_side = False

    def __init__(self, classes: int, train: Scenes, test: Scenes, config: Config):
        count = len(train.images) - config.held_out
        self.train_part = Scenes(*(part[:count] for part in train))
        self.held_out = Scenes(*(part[count:] for part in train))
        self.test, self.classes, self.config = test, classes, config
        self._programs: dict[Choice, Program] = {}
        self._networks = {
            separate: DenseNetwork(classes, config.widths, separate) for separate in (False, True)
        }

    @property
    def epochs(self) -> int:
        """How many parts a run has."""
        return self.config.parts

    def check(self, choice: Choice, setting: Setting) -> None:
        """Nothing that a user could choose wrongly."""

    def train(
        self,
        choice: Choice,
        plans: list[Plan],
        on_epoch: Callable[[int, np.ndarray], None],
        unfinished: UnfinishedRun | None,
        *,
        measure: bool,
    ) -> list[Run]:
        """Train every plan. A run that is stopped starts again: `unfinished` is left alone."""
        return [self._train_one(choice, plan.seed, on_epoch) for plan in plans]

    def _program(self, choice: Choice) -> Program:
        if choice not in self._programs:
            network = self._networks[choice.label == SINGLE]
            self._programs[choice] = Program(choice, network, self.config)
        return self._programs[choice]

    def _train_one(
        self, choice: Choice, seed: int, on_epoch: Callable[[int, np.ndarray], None]
    ) -> Run:
        program, config = self._program(choice), self.config
        params = program.network.init(seed)
        rng = np.random.default_rng(seed)
        batches = self._batches(rng)
        state = program.start(params)
        # The first step compiles; it is made again below, where the time is taken.
        jax.block_until_ready(program.step(params, state, *next(batches)))
        history: dict[str, list[Any]] = {"validation": [], "losses": [], "weights": []}
        seconds = 0.0
        ends = np.linspace(0, config.steps, config.parts + 1).astype(int)
        for part, count in enumerate(np.diff(ends), start=1):
            began = time.perf_counter()
            losses, weights = [], []
            for _ in range(count):
                params, state, found, used = program.step(params, state, *next(batches))
                losses.append(found)
                weights.append(used)
            jax.block_until_ready(params)
            seconds += time.perf_counter() - began
            history["losses"].append(np.mean(losses, axis=0))
            history["weights"].append(np.mean(weights, axis=0))
            history["validation"].append(self._held_out_loss(program, params))
            on_epoch(part, np.array([history["validation"][-1]]))
        return Run(
            choice.label,
            seed,
            {},
            {"metrics": self._measure(program, params)},
            config.parts,
            seconds,
            {name: np.array(values) for name, values in history.items()},
        )

    def _batches(self, rng: np.random.Generator) -> Any:
        """One batch after the other, and what to mirror of it; each image once an epoch."""
        size, count = self.config.batch, len(self.train_part.images)
        while True:
            order = rng.permutation(count)
            for start in range(0, count - size + 1, size):
                rows = order[start : start + size]
                yield Scenes(*(part[rows] for part in self.train_part)), rng.random(size) < 0.5

    def _predictions(self, program: Program, params: Any, images: np.ndarray) -> Predictions:
        size = min(32, len(images))
        parts = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            whole = np.pad(part, [(0, size - len(part)), *[(0, 0)] * 3])  # one compiled shape
            found = program.network.predict(params, whole)
            parts.append([np.asarray(array)[: len(part)] for array in found])
        return Predictions(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _held_out_loss(self, program: Program, params: Any) -> float:
        predictions = self._predictions(program, params, self.held_out.images)
        return float(sum(loss(t, part, self.held_out) for t, part in enumerate(predictions)))

    def _measure(self, program: Program, params: Any) -> np.ndarray:
        return measure(self._predictions(program, params, self.test.images), self.test)


def table2(options: argparse.Namespace) -> dict[str, list[Run]]:
    """Trains the rows, prints the table and writes it to `options.out`; returns the runs by row."""
    synthetic = options.data in (None, "synthetic")
    config = QUICK if options.quick else Config() if synthetic else NYUV2
    given = {name: getattr(options, name) for name in ("steps", "seeds")}
    config = replace(config, **{name: value for name, value in given.items() if value})
    config = replace(config, parts=min(config.parts, config.steps))
    classes, train, test = _data(options.data, synthetic, config)
    trainer = DenseTrainer(classes, train, test, config)
    fingerprint = {
        "versions": {"mtl_optax": mtl.__version__, "jax": jax.__version__},
        "train": {**asdict(config), "seeds": None},
        "data": _digest(train, test),
    }
    runner = Runner(trainer, fingerprint, options.out, options.resume, workers=min(2, cores()))
    epoch = len(trainer.train_part.images) // config.batch
    plans = [Plan(seed, Setting(config.learning_rate, 0.0, {})) for seed in range(config.seeds)]
    jobs = [
        Job(replace(parse_choice(text.format(epoch=epoch)), label=label), plans)
        for label, text in ROWS.items()
    ]
    runs = dict(zip(ROWS, runner.train(jobs), strict=True))
    about = dense_report.About(
        "SYNTHETIC SCENES" if synthetic else f"NYUv2 arrays in {Path(options.data).name}",
        config,
        options.line,
        f"{len(trainer.train_part.images)} images to train on, {len(test.images)} to test on",
        machine(),
    )
    lines, note = dense_report.rows_of(runs), dense_report.verdict(runs)
    tables.show(lines, dense_report.title(about), note, first=dense_report.FIRST)
    if options.out:
        dense_report.write(runs, about, options.out, test if synthetic else None)
    return runs


def _data(data: str | None, synthetic: bool, config: Config) -> tuple[int, Scenes, Scenes]:
    if not synthetic:
        return NUM_CLASSES, *read_nyuv2(Path(str(data)))
    parts = [
        synthetic_scenes(number, config.height, config.width, seed)
        for seed, number in enumerate((config.train, config.test))
    ]
    return len(CLASSES), parts[0], parts[1]


def _digest(*scenes: Scenes) -> str:
    """Names the data: the same for the same arrays."""
    found = hashlib.sha256()
    for part in (array for each in scenes for array in each):
        found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()[:16]
