"""Two processes, one model: every process reads its own half of the batch.

    python -m examples.multi_process

starts both processes on this machine. They meet over `jax.distributed` on the loopback address and sum
over gloo; on a cluster each host would run `train` on its own, with the coordinator's address. The
balancing needs nothing special: the Gram matrix of the task gradients is summed over all devices by the
compiler, so both processes find the same weights.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_optax as mtl
from examples.studies.harness.command import OneLineParser, run_command


@dataclass(frozen=True)
class Config:
    """What both processes must agree on."""

    steps: int = 20
    examples: int = 64
    features: int = 8
    hidden: int = 16
    learning_rate: float = 1e-2
    seed: int = 0
    timeout: float = 300.0


TASKS = 2


def train(config: Config) -> dict[str, Any]:
    """Trains on all devices of all processes; returns weights and losses, the same on each of them."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.NamedSharding(mesh, jax.P())
    batch = _my_share(config, jax.NamedSharding(mesh, jax.P("data")))
    method = mtl.multibalance(TASKS, weight_lr=0.1)
    optimizer = optax.adam(config.learning_rate)

    @jax.jit
    def start() -> Any:
        params = _init(config)
        h = jnp.zeros((config.examples, config.hidden))
        return params, optimizer.init(params), method.init(h)

    def losses_of(params: Any, fork: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(batch["x"] @ params["shared"])
        first, second = (copy @ head for copy, head in zip(fork(h), params["heads"], strict=True))
        mean_square = jnp.mean((first[:, 0] - batch["y"][:, 0]) ** 2)
        cross_entropy = optax.sigmoid_binary_cross_entropy(second[:, 0], batch["y"][:, 1]).mean()
        return mean_square, cross_entropy

    @partial(jax.jit, out_shardings=everywhere)
    def step(params: Any, opt_state: Any, balance: Any, batch: Any) -> Any:
        value_and_grad = mtl.fork_value_and_grad(losses_of, method)
        losses, (grads, balance) = value_and_grad(params, balance, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, balance, losses

    params, opt_state, balance = jax.device_put(start(), everywhere)
    history = []
    for _ in range(config.steps):
        params, opt_state, balance, losses = step(params, opt_state, balance, batch)
        history.append([loss.item() for loss in losses])
    return {
        "processes": jax.process_count(),
        "weights": mtl.head_weights(balance).tolist(),
        "losses": history,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see `run_command` for what it returns."""
    return run_command("examples.multi_process", lambda: parse(arguments), work)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = OneLineParser(
        prog="python -m examples.multi_process", description="Two processes, one model."
    )
    parser.add_argument("--steps", type=int, default=Config.steps)
    parser.add_argument("--process", type=int, help="number of this process (set by the launcher)")
    parser.add_argument("--address", help="the coordinator's address (set by the launcher)")
    return parser.parse_args(arguments)


def work(options: argparse.Namespace) -> None:
    """Starts two processes, or is one of them; prints what they found."""
    config = Config(steps=options.steps)
    if options.process is not None:
        # Both must be set before jax first looks for devices.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            options.address,
            num_processes=2,
            process_id=options.process,
            initialization_timeout=int(config.timeout),
        )
        print(json.dumps(train(config)))
        return
    results = launch(config)
    for number, result in enumerate(results):
        weights = ", ".join(f"{w:.6f}" for w in result["weights"])
        before, after = (sum(result["losses"][k]) for k in (0, -1))
        print(f"process {number}: weights [{weights}], sum of losses {before:.4f} -> {after:.4f}")
    if results[0]["weights"] != results[1]["weights"]:
        raise SystemExit("the processes disagree")


def launch(config: Config, processes: int = 2) -> list[dict[str, Any]]:
    """Runs this module in two processes of this machine and collects what each of them returns."""
    address = f"127.0.0.1:{_free_port()}"
    command = [sys.executable, "-m", "examples.multi_process", "--steps", str(config.steps)]
    running = [
        subprocess.Popen(
            [*command, "--process", str(number), "--address", address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    results = []
    try:
        for number, process in enumerate(running):
            output, errors = process.communicate(timeout=config.timeout)
            if process.returncode:
                raise RuntimeError(f"process {number} failed:\n{errors}")
            results.append(json.loads(output.splitlines()[-1]))
    finally:
        for process in running:
            process.kill()
            process.communicate()
    return results


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _init(config: Config) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(config.seed), TASKS + 1)
    shared = jax.random.normal(keys[0], (config.features, config.hidden))
    heads = [jax.random.normal(key, (config.hidden, 1)) for key in keys[1:]]
    return {"shared": shared / config.features**0.5, "heads": heads}


def _my_share(config: Config, sharding: jax.NamedSharding) -> dict[str, jax.Array]:
    """This process's examples, as its part of an array that spans all processes."""
    rng = np.random.default_rng(config.seed)
    x = rng.normal(size=(config.examples, config.features)).astype(np.float32)
    y = np.stack([x[:, 0] - x[:, 1], x[:, 0] + x[:, 2] > 0], axis=1).astype(np.float32)
    share = config.examples // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    return {
        name: jax.make_array_from_process_local_data(sharding, value[mine])
        for name, value in {"x": x, "y": y}.items()
    }


if __name__ == "__main__":
    sys.exit(main())
