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
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

import mtl_optax as mtl
from examples.models.segnet_mtan import TASKS, Predictions, SegNetMTAN, SegNetSingle, as_prediction
from examples.studies.emtl import dense_report
from examples.studies.emtl.dense_metrics import TESTED, loss, measure
from examples.studies.emtl.dense_report import BASE
from examples.studies.emtl.rows import BANDIT, emtl_rows
from examples.studies.emtl.scenes import CLASSES, Scenes, synthetic_scenes
from examples.studies.emtl.scenes_nyuv2 import NUM_CLASSES, read_nyuv2
from examples.studies.harness import trainer
from examples.studies.harness.choices import WEIGHS_HEADS, Choice
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
      epochs: parts of a run, of which the losses and weights are kept.
      seeds, trials: of each row.
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
    seeds: int = 3
    trials: int = 6
    weight_decay: float = 0.0
    patience: int | None = None


# As the paper trains, but for the network's size: 200 epochs of 397 steps.
NYUV2 = replace(
    Config(), widths=(32, 64, 128), batch=2, steps=79_400, learning_rate=1e-4, epochs=200
)
QUICK = replace(
    Config(), height=16, width=24, train=10, test=4, held_out=2, widths=(4, 8), steps=4, epochs=2, trials=2
)  # fmt: skip


class Splits(NamedTuple):
    """What a table trains on, compares its trials with, and is measured on."""

    train: Scenes
    held_out: Scenes
    test: Scenes
    classes: int
    tasks: tuple[str, ...] = TASKS


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

    def predict(self, heads: Any, representation: Any) -> Predictions:
        """What the heads make of a representation."""
        found = (self._module(1 + t, head)(representation) for t, head in enumerate(heads))
        return Predictions(*(as_prediction(t, output) for t, output in enumerate(found)))

    def encode(self, shared: jax.Array, batch: Scenes) -> Any:
        """The representation of a batch."""
        return self._module(0, shared)(batch.images)

    def decode(self, heads: Any, representation: Any, batch: Scenes) -> tuple[jax.Array, ...]:
        """The T losses."""
        predictions = self.predict(heads, representation)
        return tuple(loss(t, part, batch) for t, part in enumerate(predictions))


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

    def __init__(self, dataset: Splits, config: Config, separate: bool = False):
        super().__init__()
        self.dataset, self.config, self.separate = dataset, config, separate
        self.data = Scenes(*map(jnp.asarray, dataset.train))
        self.network = network = DenseNetwork(dataset.classes, config.widths, separate)
        value_and_grad = mtl.split_value_and_grad(network.encode, network.decode)

        def grads(data: Scenes, params: Parameters, slot: Any) -> Any:
            """The losses `[T]`, and the gradients of the trunk `[T, P]` and of the heads."""
            rows, flips = slot
            batch = mirror(Scenes(*(part[rows] for part in data)), flips)
            losses, found = value_and_grad(*params, batch)
            return jnp.stack(losses), found

        def predict(images: jax.Array, params: Parameters) -> Predictions:
            batch = Scenes(images, *[None] * 3)
            return network.predict(params.heads, network.encode(params.shared, batch))

        self.grads, self._predict = self.compiled(grads), self.compiled(predict)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a stored run must agree on."""
        found = hashlib.sha256()
        for part in itertools.chain(*self.dataset[:3]):
            found.update(np.ascontiguousarray(part).tobytes())
        train = {**asdict(self.config), "seeds": None, "trials": None, "separate": self.separate}
        return {"train": train, "data": found.hexdigest()}

    def make_program(self, choice: Choice) -> trainer.Program:
        """The method and Adam, on gradients that the same program computes for every row.

        To compile that program takes a minute, and the rest of a row a second. So every row computes the
        gradients of the tasks one by one, also where those of the weighted sum of losses would do: the
        gradient of a weighted sum is the weighted sum of these. To compile a loop of the steps would take a
        minute for every row too.
        """
        halved = {max(1, self.config.steps // 2): 0.5}

        def optimizers(setting: Setting) -> tuple[Any, optax.GradientTransformation]:
            schedule = optax.piecewise_constant_schedule(setting.learning_rate, halved)
            method = choice.method(len(TASKS), optax.identity(), setting.knobs)
            return method, optax.adam(schedule)

        def start(_: None, params: Parameters, setting: Setting) -> Any:
            method, adam = optimizers(setting)
            return method.init(params.shared), adam.init(params)

        def update(_: None, params: Parameters, state: Any, found: Any, setting: Setting) -> Any:
            (method, adam), (losses, (shared, heads)) = optimizers(setting), found
            shared, method_state = method.update(shared, state[0], params.shared, losses=losses)
            weights = mtl.head_weights(method_state)
            if method.needs <= {"losses"} or choice.name in WEIGHS_HEADS:
                heads = tuple(weights[t] * head for t, head in enumerate(heads))
            updates, adam_state = adam.update(Parameters(shared, heads), state[1], params)
            record = {"losses": losses, "weights": weights}
            return optax.apply_updates(params, updates), (method_state, adam_state), record

        compiled = self.compiled(update)

        def steps(data: Scenes, params: Any, state: Any, slots: Any, setting: Setting) -> Any:
            records = []
            for step in range(slots[0].shape[1]):
                found = self.grads(data, params, tuple(part[:, step] for part in slots))
                params, state, record = compiled(None, params, state, found, setting)
                records.append(record)
            return params, state, jax.tree.map(lambda *each: sum(each) / len(each), *records)

        return trainer.Program(self.compiled(start), steps)

    def check(self, choice: Choice, setting: Setting) -> None:
        """Nothing that a user could choose wrongly."""

    def initial(self, seeds: np.ndarray) -> Any:
        """See the base class."""
        fresh = (self.network.init(int(seed)) for seed in seeds)
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *fresh)

    def slots(self, epoch: int, seeds: np.ndarray) -> Any:
        """The images of each step, and which are mirrored; each image once in a pass over the data."""
        size, count = self.config.batch, len(self.dataset.train.images)
        ends = np.linspace(0, self.config.steps, self.epochs + 1).astype(int)

        def batches(seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            rng = np.random.default_rng(seed)
            while True:
                order = rng.permutation(count)
                for start in range(0, count - size + 1, size):
                    yield order[start : start + size], rng.random(size) < 0.5

        of_seeds = (itertools.islice(batches(seed), *ends[epoch - 1 : epoch + 1]) for seed in seeds)
        stacked = [[np.stack(part) for part in zip(*found, strict=True)] for found in of_seeds]
        return tuple(np.stack(part)[:, None] for part in zip(*stacked, strict=True))

    def validate(self, params: Any) -> np.ndarray:
        """Minus the mean logarithm of the losses of the held-out images."""
        held_out = self.dataset.held_out
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


def load(data: str | None, config: Config) -> Splits:
    """Rendered scenes, or NYUv2 from a folder."""
    if data is None:
        classes, sizes = len(CLASSES), enumerate((config.train, config.test))
        parts = (synthetic_scenes(n, config.height, config.width, seed) for seed, n in sizes)
    else:
        classes, parts = NUM_CLASSES, read_nyuv2(Path(data))
    train, test = parts
    learned, held_out = zip(*(np.split(part, [-config.held_out]) for part in train), strict=True)
    return Splits(Scenes(*learned), Scenes(*held_out), test, classes)


def table2(options: argparse.Namespace) -> None:
    """Trains the rows, prints the table and writes it."""
    data = None if options.data == "synthetic" else options.data
    config = QUICK if options.quick else Config() if data is None else NYUV2
    config = replace(config, **given(options, "steps", "seeds", "trials"))
    config = replace(config, epochs=min(config.epochs, config.steps))
    dataset = load(data, config)
    count = len(dataset.train.images)
    runs, chosen = dict[str, Sequence[Run]](), dict[str, Plan]()
    for separate, entries in ((True, (SINGLE,)), (False, shared_rows(count // config.batch))):
        trainer, workers = DenseTrainer(dataset, config, separate), min(2, cores())
        runner = Runner(trainer, trainer.fingerprint, options.out, options.resume, workers)
        for row in tuned(runner, entries, config.trials, config.seeds):
            runs[row.entry.label], chosen[row.entry.label] = row.runs, row.plan
    named = f"SYNTHETIC SCENES, {config.height} x {config.width}"
    if data is not None:
        named = f"NYUv2 arrays in {Path(data).name}"
    sizes = f"{count} images to train on, {len(dataset.test.images)} to test on"
    steps = f"{config.steps} steps of {config.batch} images, {config.seeds} seeds"
    made = f"Made by `{options.line}` on {machine()} with `{config}`."
    note = f"{tuning_note(config.trials, chosen)}\n\n{made}"
    scenes = dataset.test if data is None else None
    dense_report.write(runs, f"{named}: {sizes}; {steps}", note, options.out, scenes)
