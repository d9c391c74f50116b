"""Table 2: how many examples a second are trained, with all ways of balancing in one interleaved run.

`MultiBalance` works on the representation, by one backward pass. `MGDA` and `MoCo` work on the parameters
of one module of DCN-v2: that module has one gradient a task, all others that of the plain sum. Each of
these gradients is computed only as far as its module, which is less than T whole backward passes.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import mtl_optax as mtl
from examples.models.dcn_v2 import DCNv2
from examples.models.layers import Features, FeatureSpec
from examples.studies.harness.report import bars, csv_of, publish
from examples.studies.harness.steps import Parameters
from examples.studies.harness.timing import interleaved, machine, ratio
from examples.studies.ranking.data import Dataset, Examples, Task
from examples.studies.ranking.network import Network

BASE = "plain sum"
MODULES = ("interaction", "numerical", "categorical")
METHODS = {"MGDA": mtl.mgda, "MoCo": mtl.moco}
# The numbers of values of Ali-CCP's features after the preparation that is common for it (AITM and others).
ALI_CCP = (
    238635, 98, 14, 3, 8, 4, 4, 3, 5,
    467298, 6929, 263942, 106399, 5888, 104830, 51878, 37148, 4,
)  # fmt: skip
MODEL = {"embedding": 16, "cross_layers": 3, "deep": (512, 256), "tower": (128, 64)}
QUICK_MODEL = {"embedding": 2, "cross_layers": 1, "deep": (4,), "tower": (4,), "numerical": (4,)}
TASKS = (Task("CTR"), Task("CVR"), Task("Conv|imp"))
NUMBERS = 8


def random_data(rows: int, examples: int, seed: int = 0) -> Dataset:
    """A SYNTHETIC batch for tables of Ali-CCP's sizes, scaled to `rows` in all; ids by a power law."""
    generator = np.random.default_rng(seed)
    sizes = tuple(max(3, round(size * rows / sum(ALI_CCP))) for size in ALI_CCP)
    spec = FeatureSpec(NUMBERS, sizes)
    # The rank of an id with a frequency of about 1 / rank is an exponential of a uniform number.
    uniform = generator.random((examples, len(sizes)))
    ids = np.exp(uniform * np.log(np.asarray(sizes) + 1.0)).astype(np.int32) - 1
    features = Features(generator.normal(size=(examples, NUMBERS)).astype(np.float32), ids)
    labels = (generator.random((examples, 3)) < 0.1).astype(np.float32)
    labels[:, 1:] *= labels[:, :1]
    mask = np.ones_like(labels)
    mask[:, 1] = labels[:, 0]
    batch = Examples(features, labels, mask)
    return Dataset(
        f"SYNTHETIC batches for tables of {sum(sizes):,} rows in Ali-CCP's proportions",
        spec,
        TASKS,
        batch,
        batch,
        batch,
    )


class Steps:
    """Compiled steps that share parameters and the state of Adam: one copy of large tables for all."""

    def __init__(self, dataset: Dataset, batch: int, model: Mapping[str, Any]):
        make = lambda features, tasks, *, rngs: DCNv2(features, tasks, rngs=rngs, **model)  # noqa: E731
        self.network = Network(dataset, make, batch)
        self.batch = jax.tree.map(lambda column: jnp.asarray(column[:batch]), dataset.train)
        self.params = self.network.init(jax.random.key(0))
        self.optimizer = optax.adam(1e-3)
        self.opt_state = self.optimizer.init(self.params)
        self.memory: dict[str, float] = {}
        self.operations: dict[str, float] = {}

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that the model has: without numbers there is none for them."""
        return tuple(name for name in MODULES if name in self.params.shared)

    def calls(self) -> dict[str, Callable[[], Any]]:
        """The steps of the table by the name of the row."""
        found = {BASE: self._call(BASE, self._plain, ())}
        balance = mtl.multibalance(self.network.num_tasks)
        state = balance.init(self.network.representation)
        found["MultiBalance, representation"] = self._call(
            "MultiBalance, representation", self._forked(balance), state
        )
        for label, factory in METHODS.items():
            for module in self.modules:
                method, name = factory(self.network.num_tasks), f"{label}, {module}"
                state = method.init(self.params.shared[module])
                found[name] = self._call(name, self._on_module(method, module), state)
        return found

    def _call(self, name: str, gradients: Any, state: Any) -> Callable[[], Any]:
        """A step whose result is the next step's input, whichever row comes next."""

        def step(params: Any, opt_state: Any, state: Any, batch: Examples) -> Any:
            losses, grads, state = gradients(params, state, batch)
            updates, opt_state = self.optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, state, losses

        inputs = self.params, self.opt_state, state, self.batch
        compiled = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*inputs).compile()
        self.memory[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        self.operations[name] = compiled.cost_analysis()["flops"]
        held = [jax.tree.map(jnp.copy, state)]

        def call() -> Any:
            self.params, self.opt_state, held[0], losses = compiled(
                self.params, self.opt_state, held[0], self.batch
            )
            return losses, self.params

        return call

    def _losses(self, params: Parameters, batch: Examples) -> tuple[jax.Array, ...]:
        representation = self.network.encode(params.shared, batch)
        return self.network.decode(params.heads, representation, batch)

    def _sum_and_losses(self, params: Parameters, batch: Examples) -> Any:
        losses = self._losses(params, batch)
        return sum(losses), losses

    def _plain(self, params: Parameters, state: Any, batch: Examples) -> Any:
        grads, losses = jax.grad(self._sum_and_losses, has_aux=True)(params, batch)
        return losses, grads, state

    def _forked(self, method: Any) -> Any:
        def losses_of(params: Parameters, fork: Any, batch: Examples) -> tuple[jax.Array, ...]:
            copies = fork(self.network.encode(params.shared, batch))
            return self.network.losses(params.heads, copies, batch)

        value_and_grad = mtl.fork_value_and_grad(losses_of, method)

        def gradients(params: Parameters, state: Any, batch: Examples) -> Any:
            losses, (grads, state) = value_and_grad(params, state, batch)
            return losses, grads, state

        return gradients

    def _on_module(self, method: Any, module: str) -> Any:
        def gradients(params: Parameters, state: Any, batch: Examples) -> Any:
            def losses_of(target: Any) -> tuple[jax.Array, ...]:
                return self._losses(_replaced(params, module, target), batch)

            target = params.shared[module]
            losses, per_task = mtl.per_task_value_and_grad(losses_of)(target)
            update, state = method.update(per_task, state, target, losses=losses)
            # XLA finds the forward pass that both have in common, and leaves out what is replaced here.
            grads = jax.grad(lambda params: sum(self._losses(params, batch)))(params)
            return losses, _replaced(grads, module, update), state

        return gradients


def _replaced(params: Parameters, module: str, part: nnx.State) -> Parameters:
    """The parameters with those of one module replaced."""
    shared: Any = params.shared
    mapping = {**shared.raw_mapping, module: part.raw_mapping}
    return params._replace(shared=nnx.State(mapping))


TITLE = "Table 2: training speed"
HEADER = (
    "what is balanced", "examples / s", "time to the sum's", "speed lost (%)", "operations",
    "temporaries (MiB)",
)  # fmt: skip


def table2(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Measure, print and write the table; returns its rows."""
    batch = options.batch or (32 if options.quick else 2048)
    if options.data == "synthetic":
        rows = options.size or (500 if options.quick else sum(ALI_CCP))
        dataset = random_data(rows, batch)
    else:
        from examples.studies.ranking.sources import load

        dataset = load(options.data)
    batch = min(batch, dataset.train.size)
    model = QUICK_MODEL if options.quick else MODEL
    steps = Steps(dataset, batch, model)
    count = 2 + len(METHODS) * len(steps.modules)
    print(f"{dataset.name}: compiling {count} steps", file=sys.stderr, flush=True)
    calls = steps.calls()
    rounds = options.rounds or (2 if options.quick else 15)

    def on_round(done: int) -> None:
        end = "\n" if done == rounds else ""
        print(f"\rround {done} of {rounds}", end=end, file=sys.stderr, flush=True)

    seconds = interleaved(calls, rounds, on_round)
    lines = [_line(steps, seconds, name, batch) for name in calls]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(steps.params))
    note = (
        f"{dataset.name}; {len(dataset.tasks)} tasks. DCN-v2 with {model}, {parameters:,} parameters, Adam "
        f"on all of them, batches of {batch}. Medians of {rounds} rounds in which every row has one turn; "
        "the ratio is the median over the rounds. operations and temporaries: of a compiled step, as XLA "
        "counts them; operations over those of the sum. MGDA and MoCo: one gradient a task for the named "
        "module, as far as the module, the plain sum's for all others. "
        f"{machine()}, jax {jax.__version__}.\n\nMade by `{options.line}`."
    )
    rows = ((name, number, value) for name, taken in seconds.items()
            for number, value in enumerate(taken))  # fmt: skip
    files = {"table2.csv": csv_of(("what is balanced", "round", "seconds"), rows)}
    publish(options.out, "table2", [HEADER, *lines], TITLE, note, files)
    if options.out is not None:
        slower = {name: np.divide(taken, seconds[BASE]) for name, taken in seconds.items()}
        bars(options.out / "table2.png", slower, "time of a step over the plain sum's, by round")
    return lines


def _line(
    steps: Steps, seconds: Mapping[str, list[float]], name: str, batch: int
) -> tuple[str, ...]:
    times = ratio(seconds, name, BASE)
    return (
        name,
        f"{batch / statistics.median(seconds[name]):,.0f}",
        f"{times:.2f}",
        f"{100 * (1 - 1 / times):.1f}",
        f"{steps.operations[name] / steps.operations[BASE]:.2f}",
        f"{steps.memory[name]:,.0f}",
    )
