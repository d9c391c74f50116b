"""EMTL's Table 2: segmentation, depth and surface normals with one network and with all its methods.

    python -m examples.studies.emtl table2                  rendered rooms: SYNTHETIC SCENES
    python -m examples.studies.emtl table2 --data FOLDER    NYUv2, see scenes_nyuv2.py

SegNet with MTAN's attention, Adam, the learning rate halved half-way, images mirrored at random: the
paper's protocol, but with smaller images, a smaller network and far fewer steps, so that the rendered table
is made in an hour. The metrics are those of the last step: nothing is selected on the test set, where the
paper takes the best epoch. The trials of a row are compared by the mean logarithm of the losses of held-out
images, so that the scale of a loss has no effect on the choice.

Methods that look at gradients combine those of the shared parameters; methods that look at losses alone
weigh the losses. EMTL, MGDA and Nash-MTL weigh the tasks' own parameters too, as their papers do.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

from examples.models.segnet_mtan import TASKS, Predictions, SegNetMTAN, SegNetSingle, as_prediction
from examples.studies.emtl import dense_report
from examples.studies.emtl.dense_report import BASE, TESTED, loss, measure
from examples.studies.emtl.scenes import CLASSES, Scenes, synthetic_scenes
from examples.studies.emtl.scenes_nyuv2 import NUM_CLASSES, read_nyuv2
from examples.studies.emtl.tables import BANDIT, emtl_rows
from examples.studies.harness import data, steps, trainer
from examples.studies.harness.choices import Choice
from examples.studies.harness.command import given
from examples.studies.harness.runner import Runner
from examples.studies.harness.runs import Plan, Run, Setting
from examples.studies.harness.search import Entry, tuned, tuning_note
from examples.studies.harness.steps import Parameters
from examples.studies.harness.timing import cores, machine

SINGLE = Entry("STL", "sum")


def shared_rows(epoch: int) -> tuple[Entry, ...]:
    """The rows of the network with a shared trunk, in the paper's order; DWA's window is an epoch."""
    return (
        Entry(BASE, "sum"),
        Entry("SI", "scale_invariant"),
        Entry("RLW", "rlw"),
        Entry("DWA", f"dwa(window={epoch})"),
        Entry("Uncertainty", "uncertainty"),
        BANDIT,
        Entry("PCGrad", "pcgrad"),
        Entry("CAGrad", "cagrad"),
        Entry("GradDrop", "graddrop"),
        Entry("IMTL-G", "imtl_g"),
        Entry("Nash-MTL", "nash_mtl"),
        *emtl_rows(len(TASKS)),
    )


@dataclass(frozen=True)
class Config:
    """Sizes of the data, the network and the training, the same for every row.

    Attributes:
      height, width: of rendered images, multiples of 2^len(widths).
      train, test: how many images are rendered.
      held_out: images of the training set that compare the trials; no row learns from them.
      widths: channels of the network's levels.
      batch, steps, learning_rate: of the training, without `patience`: the last step is kept.
      epochs: parts of a run, of which the mean losses and weights are kept.
      separate: whether every task has a network of its own.
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
    separate: bool = False
    weight_decay: float = 0.0
    patience: int | None = None


# As the paper trains, but for the network's size: 200 epochs of 397 steps.
NYUV2 = replace(
    Config(), widths=(32, 64, 128), batch=2, steps=79_400, learning_rate=1e-4, epochs=200
)
QUICK = replace(
    Config(), height=16, width=24, train=10, test=4, held_out=2, widths=(4, 8), steps=4, epochs=2
)  # fmt: skip


@dataclass(frozen=True)
class Dataset(data.Dataset[Scenes]):
    """What a table trains on, compares its trials with, and is measured on."""

    classes: int


class SameImages(nnx.Module):
    """What tasks that share nothing share: the images."""

    def __call__(self, images: jax.Array) -> jax.Array:
        return images


class DenseNetwork(steps.Network):
    """A shared trunk and a head per task, as functions of parameters that are vectors.

    One vector for the trunk and one for each head: what a method and Adam do with them compiles in a
    moment, where a hundred arrays would take half a minute for every row.

    With `separate`, each head is a SegNet of its own and the trunk only hands the images on: as the
    gradients of the sum of losses are then those of each task, its training is single-task learning.
    """

    num_tasks = len(TASKS)

    def __init__(self, classes: int, widths: tuple[int, ...], separate: bool):
        def modules() -> tuple[nnx.Module, ...]:
            rngs = nnx.Rngs(0)
            if separate:
                tasks, sizes = range(len(TASKS)), {"widths": widths, "rngs": rngs}
                return SameImages(), *(SegNetSingle(task, classes, **sizes) for task in tasks)
            model = SegNetMTAN(classes, widths=widths, rngs=rngs)
            return model.segnet, *model.towers

        split = [nnx.split(module) for module in nnx.eval_shape(modules)]
        self._graphs, self._shapes = zip(*split, strict=True)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._shapes)
        self._unravel = [ravel_pytree(state)[1] for state in zeros]

    def init(self, seed: int) -> Parameters:
        """Fresh parameters, made by numpy: their many shapes would take a minute to compile."""
        rng = np.random.default_rng(seed)
        trunk, *heads = (ravel_pytree(_fresh(shapes, rng))[0] for shapes in self._shapes)
        return Parameters(trunk, tuple(heads))

    def _module(self, place: int, vector: jax.Array) -> Any:
        return nnx.merge(self._graphs[place], self._unravel[place](vector))

    def _predict(self, task: int, head: jax.Array, representation: Any) -> jax.Array:
        return as_prediction(task, self._module(1 + task, head)(representation))

    def predict(self, params: Parameters, images: jax.Array) -> Predictions:
        """What all heads make of images."""
        representation = self._module(0, params.shared)(images)
        heads = enumerate(params.heads)
        return Predictions(*(self._predict(t, head, representation) for t, head in heads))

    def encode(self, shared: jax.Array, batch: Scenes) -> Any:
        """The representation of a batch."""
        return self._module(0, shared)(batch.images)

    def losses(
        self, heads: tuple[jax.Array, ...], copies: tuple[Any, ...], batch: Scenes
    ) -> tuple[jax.Array, ...]:
        """The T losses."""
        pairs = enumerate(zip(heads, copies, strict=True))
        return tuple(loss(t, self._predict(t, *pair), batch) for t, pair in pairs)

    def weigh_heads(
        self, head_grads: tuple[jax.Array, ...], weights: jax.Array
    ) -> tuple[jax.Array, ...]:
        """The gradients of the heads, each times the weight of its task."""
        return tuple(weights[t] * head for t, head in enumerate(head_grads))


def _fresh(shapes: nnx.State, rng: np.random.Generator) -> Any:
    """Kernels uniform with variance 2 / fan-in, scales 1 and biases 0, as the modules start."""

    def draw(path: Any, leaf: Any) -> np.ndarray:
        names = jax.tree_util.keystr(path)
        if "kernel" in names:
            limit = (6 / np.prod(leaf.shape[:-1])) ** 0.5
            return rng.uniform(-limit, limit, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, "scale" in names, np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def mirror(scenes: Scenes, flips: jax.Array) -> Scenes:
    """Some scenes `[N]` with left and right exchanged, and with them the x of their normals."""

    def choose(part: jax.Array) -> jax.Array:
        return jnp.where(flips.reshape(-1, *[1] * (part.ndim - 1)), part[:, :, ::-1], part)

    flipped = Scenes(*map(choose, scenes))
    sign = jnp.where(flips[:, None] & (jnp.arange(3) == 0)[None], -1.0, 1.0)
    return flipped._replace(normals=flipped.normals * sign[:, None, None])


class DenseTrainer(trainer.Trainer):
    """Trains rows; an epoch is one of the parts of a run."""

    def __init__(self, dataset: Dataset, config: Config):
        super().__init__()
        self.dataset, self.config = dataset, config
        self.data = Scenes(*map(jnp.asarray, dataset.train))
        self.network = DenseNetwork(dataset.classes, config.widths, config.separate)
        self._predict = self.compiled(lambda images, params: self.network.predict(params, images))

    def make_step(self, choice: Choice, setting: Setting) -> steps.Step:
        """See the base class."""
        halved = {max(1, self.config.steps // 2): 0.5}
        rate = optax.piecewise_constant_schedule(setting.learning_rate, halved)
        descent = optax.scale_by_learning_rate(rate)
        return steps.make_step(choice, self.network, optax.scale_by_adam(), descent, setting.knobs)

    def initial(self, seeds: np.ndarray) -> Any:
        """See the base class."""
        fresh = (self.network.init(int(seed)) for seed in seeds)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *fresh)

    def order(self, data: Scenes, epoch: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The images of each step in random order, and which are mirrored, `[1, steps, batch]`."""
        order_key, flip_key = jax.random.split(jax.random.fold_in(key, epoch))
        shape = 1, self.config.steps // self.epochs, self.config.batch
        order = jax.random.permutation(order_key, len(data.images))
        return jnp.resize(order, shape), jax.random.bernoulli(flip_key, 0.5, shape)

    def batch(self, data: Scenes, slot: tuple[jax.Array, jax.Array]) -> Scenes:
        """Some images, mirrored or not."""
        rows, flips = slot
        return mirror(Scenes(*(part[rows] for part in data)), flips)

    def validate(self, params: Any) -> np.ndarray:
        """Minus the mean logarithm of the losses of the held-out images."""
        held_out = self.dataset.validation
        found = self.predictions(params, held_out.images)
        losses = [[loss(t, part, held_out) for t, part in enumerate(parts)] for parts in found]
        values = -np.log(np.array(losses)).mean(axis=1)
        return np.where(np.isnan(values), -np.inf, values)

    def results(self, params: Any) -> list[Any]:
        """The metrics of the test images."""
        test = self.dataset.test
        found = self.predictions(params, test.images)
        return [({}, {TESTED: measure(predictions, test)}) for predictions in found]

    def predictions(self, params: Any, images: np.ndarray) -> list[Predictions]:
        """The predictions of every run, some images at a time."""
        size = min(32, len(images))
        blocks = -(-len(images) // size)
        # The first images fill the last block: one compiled shape.
        filled = np.resize(images, (blocks, size, *images.shape[1:]))
        parts = zip(*(self._predict(block, params) for block in filled), strict=True)
        whole = (np.concatenate(arrays, axis=1)[:, : len(images)] for arrays in parts)
        return [Predictions(*arrays) for arrays in zip(*whole, strict=True)]


def load(folder: str | None, config: Config) -> Dataset:
    """Rendered scenes, or NYUv2 from a folder."""
    if folder is None:
        name, classes = f"SYNTHETIC SCENES, {config.height} x {config.width}", len(CLASSES)
        sizes = enumerate((config.train, config.test))
        parts = (synthetic_scenes(n, config.height, config.width, seed) for seed, n in sizes)
    else:
        name, classes = f"NYUv2 arrays in {Path(folder).name}", NUM_CLASSES
        parts = read_nyuv2(Path(folder))
    train, test = parts
    learned, held_out = zip(*(np.split(part, [-config.held_out]) for part in train), strict=True)
    tasks = tuple(map(data.Task, TASKS))
    return Dataset(name, tasks, Scenes(*learned), Scenes(*held_out), test, classes)


def table2(options: argparse.Namespace) -> None:
    """Trains the rows, prints the table and writes it."""
    folder = None if options.data == "synthetic" else options.data
    config = QUICK if options.quick else Config() if folder is None else NYUV2
    config = replace(config, **given(options, "steps"))
    config = replace(config, epochs=math.gcd(config.epochs, config.steps))
    seeds, trials = options.seeds or 3, options.trials or (2 if options.quick else 6)
    dataset = load(folder, config)
    count = len(dataset.train.images)
    runs, chosen = dict[str, Sequence[Run]](), dict[str, Plan]()
    for separate, entries in ((True, (SINGLE,)), (False, shared_rows(count // config.batch))):
        trainer = DenseTrainer(dataset, replace(config, separate=separate))
        out, resume, workers = options.out, options.resume, min(2, cores())
        runner = Runner(trainer, trainer.fingerprint, out, resume, workers)
        for row in tuned(runner, entries, trials, seeds):
            runs[row.entry.label], chosen[row.entry.label] = row.runs, row.plan
    sizes = f"{count} images to train on, {len(dataset.test.images)} to test on"
    length = f"{config.steps} steps of {config.batch} images, {seeds} seeds"
    made = f"Made by `{options.line}` on {machine()} with `{config}`."
    note = f"{tuning_note(trials, chosen)}\n\n{made}"
    scenes = dataset.test if folder is None else None
    dense_report.write(runs, f"{dataset.name}: {sizes}; {length}", note, options.out, scenes)
