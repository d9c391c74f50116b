"""MetaBalance with embedding tables: T gradients of the rows that a batch reads, or of whole tables."""

from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.studies.benchmarks.report import Row
from examples.studies.harness.choices import parse_choice
from examples.studies.harness.steps import make_step
from examples.studies.harness.timing import Training, interleaved_ratios
from examples.studies.recommender import network as rows
from examples.studies.recommender.data import Task
from examples.studies.recommender.network import Batch, Network, NetworkConfig

_PAIRS, _TASKS, _USERS = 2048, 3, 10_000


def vocabulary(quick: bool) -> Iterator[Row]:
    """Step time over the plain sum's, and memory beyond it, at two numbers of items."""
    for items in (100, 200) if quick else (10_000, 1_000_000):
        made = _steps(items)
        ratios = interleaved_ratios(made, "sum", 1 if quick else 9)
        for name, ratio in ratios.items():
            case = f"MetaBalance, {name}, {items:,} items"
            beyond = made[name].temporary_mebibytes - made["sum"].temporary_mebibytes
            target = 2.5 if name == "distinct rows" else None
            yield Row("vocabulary: step time / plain", case, ratio, "x", target)
            yield Row("vocabulary: memory beyond plain", case, beyond, "MiB")


def _steps(items: int) -> dict[str, Training]:
    tasks = tuple(Task(f"task {place}") for place in range(_TASKS))
    bias = np.zeros((_TASKS, items), np.float32)
    network = Network(_USERS, items, tasks, bias, NetworkConfig())
    params = network.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 3)
    ids = (
        jax.random.randint(keys[0], (_PAIRS,), 0, _USERS),
        jax.random.randint(keys[1], (_PAIRS,), 0, items),
    )
    labels = jax.random.bernoulli(keys[2], 0.3, (_TASKS, _PAIRS)).astype(jnp.float32)
    batch = Batch(*ids, labels, jnp.ones_like(labels), jax.random.key(2), ids)

    def training(choice: str) -> Training:
        scaler, descent = optax.scale_by_adam(), optax.scale_by_learning_rate(1e-3)
        step = make_step(parse_choice(choice), network, scaler, descent, {})
        return Training(step, params, batch)

    made = {"sum": training("sum"), "distinct rows": training("metabalance")}
    with mock.patch.object(rows, "keeps_rows", lambda method, shared: True):
        made["whole tables"] = training("metabalance")
    return made
