"""Two processes, one model: every process reads its own half of each batch.

    python -m examples.several_processes

starts both processes on this machine. They meet over `jax.distributed` on the loopback address and sum over
gloo; on a cluster each host runs `train` on its own, with the coordinator's address. The method needs
nothing special: the inner products of the task gradients are summed over all devices by the compiler, so
both processes find the same weights.

Prints, after 26 seconds of processor time on two CPU cores:

    process 0: plain sum    held-out losses click 0.0633 seconds 0.0039  weights 1.000000 1.000000
    process 0: multibalance held-out losses click 0.0487 seconds 0.0098  weights 0.639255 0.613683
    process 1: plain sum    held-out losses click 0.0633 seconds 0.0039  weights 1.000000 1.000000
    process 1: multibalance held-out losses click 0.0487 seconds 0.0098  weights 0.639255 0.613683
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import mtl_optax as mtl

TASKS = ("click", "seconds")
FEATURES, WIDTH, BATCH = 16, 32, 128
METHODS = {
    "plain sum": mtl.sum_tasks(TASKS),
    "multibalance": mtl.multibalance(TASKS, weight_lr=0.1),
}


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.shared = nnx.Linear(FEATURES, WIDTH, rngs=rngs)
        self.heads = nnx.Dict({task: nnx.Linear(WIDTH, 1, rngs=rngs) for task in TASKS})

    def losses(self, batch: dict[str, jax.Array], fork: Any = None) -> dict[str, jax.Array]:
        h = jnp.tanh(self.shared(batch["x"]))
        copies = dict.fromkeys(TASKS, h) if fork is None else fork(h)
        found = {task: head(copies[task])[:, 0] for task, head in self.heads.items()}
        return {
            "click": optax.sigmoid_binary_cross_entropy(found["click"], batch["click"]).mean(),
            "seconds": jnp.mean((found["seconds"] - batch["seconds"]) ** 2),
        }


def my_share(seed: int) -> dict[str, np.ndarray]:
    """This process's rows of a batch; in earnest, what its own loader reads."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(BATCH, FEATURES))
    columns = {"x": x, "click": x[:, 0] + x[:, 2] > 0, "seconds": 5 * np.tanh(x[:, 0] - x[:, 1])}
    mine = slice(jax.process_index(), None, jax.process_count())
    return {name: column[mine].astype(np.float32) for name, column in columns.items()}


def train(name: str, steps: int) -> dict[str, Any]:
    """Weights, and losses on held-out data: the same in every process."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, split = (jax.NamedSharding(mesh, spec) for spec in (jax.P(), jax.P("data")))
    method, optimizer = METHODS[name], optax.adam(1e-2)
    graph, params = nnx.split(Model(nnx.Rngs(0)))
    representation = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
    mtl.check(method, representation)

    def loss_fn(params, fork, batch):
        return nnx.merge(graph, params).losses(batch, fork)

    @partial(jax.jit, donate_argnums=(0, 1, 2), out_shardings=everywhere)
    def step(params, opt_state, state, batch):
        _, (grads, state) = mtl.fork_value_and_grad(loss_fn, method)(params, state, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state

    def batch(seed):
        share = my_share(seed).items()
        return {k: jax.make_array_from_process_local_data(split, value) for k, value in share}

    carry = params, optimizer.init(params), method.init(representation)
    carry = jax.device_put(carry, everywhere)
    for number in range(steps):
        carry = step(*carry, batch(1 + number))
    evaluate = jax.jit(lambda params, batch: nnx.merge(graph, params).losses(batch))
    losses = evaluate(carry[0], batch(0))
    weights = mtl.head_weights(carry[2]).tolist()
    return {"weights": weights, "losses": {t: float(losses[t]) for t in TASKS}}


def launch(steps: int, processes: int = 2, timeout: float = 300) -> list[dict[str, Any]]:
    """Run this module in several processes of this machine, and collect what each of them finds."""
    with socket.socket() as probe:  # a free port
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "examples.several_processes", "--steps", str(steps)]
    command += ["--address", address, "--processes", str(processes)]
    running = [
        subprocess.Popen([*command, "--process", str(k)], stdout=subprocess.PIPE, text=True)
        for k in range(processes)
    ]
    try:
        found = [process.communicate(timeout=timeout)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    if failed := [str(k) for k, process in enumerate(running) if process.returncode]:
        raise RuntimeError(f"failed: process {', '.join(failed)}; see above")
    return [json.loads(output.splitlines()[-1]) for output in found]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.several_processes")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--process", type=int, help="the number of this process, set by `launch`")
    parser.add_argument("--address", help="the coordinator's address, set by `launch`")
    options = parser.parse_args(argv)
    if options.process is not None:
        # Both must be set before jax first looks for devices.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(options.address, options.processes, options.process)
        print(json.dumps({name: train(name, options.steps) for name in METHODS}))
        return
    for number, found in enumerate(launch(options.steps, options.processes)):
        for name, result in found.items():
            weights = " ".join(f"{weight:.6f}" for weight in result["weights"])
            losses = " ".join(f"{task} {loss:.4f}" for task, loss in result["losses"].items())
            print(f"process {number}: {name:12} held-out losses {losses}  weights {weights}")


if __name__ == "__main__":
    main()
