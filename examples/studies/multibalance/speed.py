"""Table 2: how many examples a second are trained, with all ways of balancing in one interleaved run.

`MultiBalance` works on the representation, by one backward pass. `MGDA` and `MoCo` work on the parameters
of one module of DCN-v2: that module has one gradient a task, all others that of the plain sum. Each of
these gradients is computed only as far as its module, which is less than T whole backward passes.
"""

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import mtl_optax as mtl
from examples.models.dcn_v2 import DCNv2
from examples.models.layers import Features, FeatureSpec
from examples.studies.harness.choices import parse_choice
from examples.studies.harness.data import Task
from examples.studies.harness.report import csv_of, publish
from examples.studies.harness.steps import Parameters, Step, make_step, one_optimizer
from examples.studies.harness.timing import Training, interleaved, machine, ratio
from examples.studies.ranking.data import Dataset, Examples
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


def random_data(rows: int, examples: int) -> Dataset:
    """A SYNTHETIC batch for tables of Ali-CCP's sizes, scaled to `rows` in all; ids by a power law."""
    generator = np.random.default_rng(0)
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
    name = f"SYNTHETIC batches for tables of {sum(sizes):,} rows in Ali-CCP's proportions"
    return Dataset(name, TASKS, batch, batch, batch, spec)


def trainings(dataset: Dataset, batch: int, model: Mapping[str, Any]) -> dict[str, Training]:
    """The compiled steps of the table by the name of the row."""
    network = Network(dataset, partial(DCNv2, **model), batch)
    examples = jax.tree.map(lambda column: jnp.asarray(column[:batch]), dataset.train)
    params = network.init(jax.random.key(0))
    scaler, descent = optax.scale_by_adam(), optax.scale_by_learning_rate(1e-3)
    steps = {
        label: make_step(parse_choice(choice), network, scaler, descent, {})
        for label, choice in {BASE: "sum", "MultiBalance, representation": "multibalance"}.items()
    }
    for label, factory in METHODS.items():
        for module in MODULES:
            method, adam = factory(network.num_tasks), optax.chain(scaler, descent)
            steps[f"{label}, {module}"] = on_module(network, method, module, adam)
    return {label: Training(step, params, examples) for label, step in steps.items()}


def on_module(
    network: Network, method: mtl.Method, module: str, optimizer: optax.GradientTransformation
) -> Step:
    """One gradient a task for a module, that of the plain sum for all others."""

    def losses_of(params: Parameters, batch: Examples) -> tuple[jax.Array, ...]:
        return network.decode(params.heads, network.encode(params.shared, batch), batch)

    def value_and_grad(params: Parameters, state: Any, batch: Examples) -> Any:
        def of_module(target: nnx.State) -> tuple[jax.Array, ...]:
            return losses_of(_replaced(params, module, target), batch)

        target = params.shared[module]
        losses, per_task = mtl.per_task_value_and_grad(of_module)(target)
        combined, state = method.update(per_task, state, target, losses=losses)
        # XLA finds the forward pass that both have in common, and leaves out what is replaced here.
        grads = jax.grad(lambda params: sum(losses_of(params, batch)))(params)
        return losses, (_replaced(grads, module, combined), state)

    return one_optimizer(value_and_grad, lambda p: method.init(p.shared[module]), optimizer)


def _replaced(params: Parameters, module: str, part: nnx.State) -> Parameters:
    """The parameters with those of one module replaced."""
    mapping = {**params.shared.raw_mapping, module: part.raw_mapping}
    return params._replace(shared=nnx.State(mapping))


TITLE = "Table 2: training speed"
HEADER = (
    "what is balanced", "examples / s", "time to the sum's", "speed lost (%)", "operations",
    "temporaries (MiB)",
)  # fmt: skip


def table2(options: argparse.Namespace) -> None:
    """Measure, print and write the table."""
    batch = options.batch or (32 if options.quick else 2048)
    dataset = random_data(options.size or (500 if options.quick else sum(ALI_CCP)), batch)
    model = QUICK_MODEL if options.quick else MODEL
    print(f"{dataset.name}: compiling the steps", file=sys.stderr, flush=True)
    made = trainings(dataset, batch, model)
    rounds = options.rounds or (2 if options.quick else 15)
    seconds = interleaved(made, rounds)
    lines = [HEADER]
    for name, training in made.items():
        times = ratio(seconds, name, BASE)
        numbers = (
            f"{batch / np.median(seconds[name]):,.0f}",
            f"{times:.2f}",
            f"{100 * (1 - 1 / times):.1f}",
            f"{training.operations / made[BASE].operations:.2f}",
            f"{training.temporary_mebibytes:,.0f}",
        )
        lines.append((name, *numbers))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(made[BASE].state[0]))
    note = (
        f"{dataset.name}; {len(dataset.tasks)} tasks. DCN-v2 with {model}, {parameters:,} parameters, Adam "
        f"on all of them, batches of {batch}. Medians of {rounds} rounds in which every row has one turn; "
        "the ratio is the median over the rounds. operations and temporaries: of a compiled step, as XLA "
        "counts them; operations over those of the sum. MGDA and MoCo: one gradient a task for the named "
        "module, as far as the module, the plain sum's for all others. "
        f"{machine()}, jax {jax.__version__}.\n\nMade by `{options.line}`."
    )
    cells = ((name, number, value) for name, taken in seconds.items()
             for number, value in enumerate(taken))  # fmt: skip
    files = {"table2.csv": csv_of(("what is balanced", "round", "seconds"), cells)}
    publish(options.out, "table2", lines, TITLE, note, files)
