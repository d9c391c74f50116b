"""PPO whose actor and critic share a torso, by several methods: `python -m examples.studies.reinforcement`.

`examples.ppo_actor_critic` trains. Every row has the best of the same learning rates, found on some seeds,
and is measured on others; one row searches the critic's weight as well.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

import mtl_optax as mtl
from examples.ppo_actor_critic import TASKS, CartPole, train
from examples.studies.harness.command import CommandLine, write_atomically
from examples.studies.harness.report import OVER_SEEDS, csv_of, mean_cell, publish
from examples.studies.harness.statistics import compare
from examples.studies.reinforcement.acrobot import Acrobot

ENVIRONMENTS = {"cartpole": CartPole, "acrobot": Acrobot}
BASE, SEARCHED = "sum", "searched weight of the critic"
# A method from the critic's weight, which only the searched row uses.
METHODS: dict[str, Callable[[Any], mtl.Method]] = {
    BASE: lambda _: mtl.sum_tasks(TASKS),
    SEARCHED: lambda weight: mtl.fixed_weights(TASKS, {"actor": 1.0, "critic": weight}),
    "inverse_norm": lambda _: mtl.inverse_norm(TASKS),
    "imtl_g": lambda _: mtl.imtl_g(TASKS),
    "mgda": lambda _: mtl.mgda(TASKS),
    "upgrad": lambda _: mtl.upgrad(TASKS),
    "imtl_g, entropy a task": lambda _: mtl.imtl_g((*TASKS, "entropy")),
}
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
WEIGHTS = (1.0, 0.1, 0.01, 0.001)
UPDATES, TUNING_SEEDS = 60, 4  # updates of 1024 steps; seeds of each setting of the tuning
OPTIONS = {"seeds": {"default": 8}, "quick": {"help": "two updates of two seeds"}}


class Arm(NamedTuple):
    """What a row found: its settings, and the returns in the last fifth of the training, one a seed."""

    rate: float
    weight: float
    returns: Sequence[float]
    runs: int
    seconds: float


def arm(name: str, env: Any, updates: int, tuning_seeds: int, seeds: int) -> Arm:
    """Tune a row on seeds of its own, and measure it on others."""

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None, None))
    @partial(jax.vmap, in_axes=(None, 0, 0))
    def late(key: jax.Array, rate: jax.Array, weight: jax.Array) -> jax.Array:
        returns, _ = train(METHODS[name](weight), key, rate, updates, env)
        return jnp.nanmean(returns[-max(updates // 5, 1) :])

    started = time.perf_counter()
    weights = WEIGHTS if name == SEARCHED else WEIGHTS[:1]
    settings = np.array([(rate, weight) for weight in weights for rate in RATES])
    keys = jax.random.split(jax.random.key(1), tuning_seeds)
    found = np.asarray(late(keys, *settings.T))
    best = settings[[np.argmax(np.nan_to_num(found.mean(axis=0), nan=-np.inf))]]
    keys = jax.random.split(jax.random.key(0), seeds)
    returns = np.asarray(late(keys, *best.T))[:, 0]
    rate, weight = best[0].tolist()
    seconds = time.perf_counter() - started
    return Arm(rate, weight, returns.tolist(), found.size + len(returns), seconds)


def work(options: argparse.Namespace) -> None:
    """Train everything, print the table and write the files."""
    sizes = (2, 2, 2) if options.quick else (UPDATES, TUNING_SEEDS, options.seeds)
    found: dict[str, dict[str, Arm]] = {env: {} for env in ENVIRONMENTS}
    for env, name in track(list(product(ENVIRONMENTS, METHODS)), "arms", transient=True):
        path = options.out and options.out / "runs" / f"{env}-{list(METHODS).index(name)}.json"
        stored = json.loads(path.read_text()) if options.resume and path.exists() else None
        if stored and stored[0] == list(sizes):
            found[env][name] = Arm(*stored[1])
            continue
        found[env][name] = arm(name, ENVIRONMENTS[env], *sizes)
        if path:
            write_atomically(path, json.dumps([sizes, found[env][name]]).encode())
    rows = (
        (env, name, seed, value, each.rate, each.weight)
        for env, arms in found.items()
        for name, each in arms.items()
        for seed, value in enumerate(each.returns)
    )
    header = ("environment", "method", "seed", "return", "learning_rate", "critic_weight")
    title = f"PPO: return in the last fifth of {sizes[0]} updates of 1024 steps"
    rates, weights = (", ".join(f"{value:g}" for value in values) for values in (RATES, WEIGHTS))
    advice = "\n\n".join(map(look, ENVIRONMENTS))
    note = (
        f"Mean ± standard error over {sizes[2]} seeds. {OVER_SEEDS} over methods, against {BASE}. "
        f"Settings: the best mean of {sizes[1]} other seeds, of the learning rates {rates}, and for "
        f"{SEARCHED} also of {weights} times the critic's loss. The entropy belongs to the actor's loss "
        "but in the row that makes it a task. runs: for one environment, those of the tuning among them."
        f"\n\n{advice}\n\nMade by `{options.line}`."
    )
    files = {"returns.csv": csv_of(header, rows)}
    publish(options.out, "table", lines_of(found), title, note, files)


def lines_of(found: Mapping[str, Mapping[str, Arm]]) -> list[tuple[str, ...]]:
    """The header and the rows: mean return, standard error, the mark of significance, the settings."""
    columns = [["method", *METHODS]]
    for env, arms in found.items():
        returns = {name: np.array([each.returns]) for name, each in arms.items()}
        against = compare(returns, BASE)
        cells, settings = [env], ["learning rate"]
        for name, each in arms.items():
            p_value = against[name][0].p_value if name in against else 1.0
            cells.append(mean_cell(returns[name][0], 0, p_value))
            weight = f", critic times {each.weight:g}" if name == SEARCHED else ""
            settings.append(f"{each.rate:g}{weight}")
        columns += [cells, settings]
    runs = ["runs", *(str(each.runs) for each in next(iter(found.values())).values())]
    return list(zip(*columns, runs, strict=True))


def look(name: str) -> str:
    """What the gradients of the first 112 steps of the plain sum say."""
    method = mtl.sum_tasks(TASKS, measure=True)
    _, state = jax.jit(partial(train, method, rate=RATES[0], updates=7, env=ENVIRONMENTS[name]))(
        jax.random.key(0)
    )
    return f"{name}, the first steps of the plain sum. {mtl.advise(state, method)}"


main = CommandLine(
    "examples.studies.reinforcement", __doc__, work, "seeds out resume quick", OPTIONS
)

if __name__ == "__main__":
    sys.exit(main())
