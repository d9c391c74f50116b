"""What a training step costs on TPU v5e, compiled ahead of time on a host without one.

    python -m examples.studies.benchmarks.tpu [--only TABLE ...] [--out FOLDER]

Nothing runs: XLA's compiler for the TPU says how many FLOPs, how many bytes and how much memory a step
takes on every chip, and which collectives the chips exchange. Needs `libtpu`
(`pip install mtl_optax[tpu-compile]`).
"""

import argparse
import itertools
import os
import re
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import mtl_optax as mtl
from examples.studies.benchmarks.hlo import collectives
from examples.studies.benchmarks.problems import RECSYS, Problem, initial
from examples.studies.benchmarks.steps import PLACES, Network, step_of
from examples.studies.harness.command import CommandLine
from examples.studies.harness.report import publish

TOPOLOGIES = {4: "v5e:2x2", 256: "v5e:16x16"}


class Case(NamedTuple):
    """A recommender's ranking model.

    Attributes:
      problem: whose batch is that of one chip.
      tasks: T.
    """

    problem: Problem
    tasks: int = 4


# A network whose gradients are what memory holds: 134 MB of layers in float32 on every chip.
LARGE = Problem(tables=1, rows=1000, dense=2032, bottom=(2048,) * 8, batch=1024)

# The table of each file: what is compiled, for how many chips, and in which places or modes.
LOOPED = ("map", "products")
TABLES = {
    "recommender_4": (Case(RECSYS), 4, PLACES),
    "recommender_256": (Case(RECSYS), 256, PLACES),
} | {
    f"large_{tasks}_tasks_{chips}": (Case(LARGE, tasks), chips, LOOPED)
    for tasks, chips in itertools.product((4, 16), (4, 256))
}
LOOPS = """XLA counts the operations and bytes in a loop once, here those of the passes for one task; its
temporary memory is that of the whole step."""


class Cost(NamedTuple):
    """What XLA says of one step, on each chip.

    Attributes:
      flops: floating point operations.
      bytes: bytes read and written.
      temporary: bytes of memory beyond arguments and results.
      arguments: bytes of parameters, optimizer state and batch.
      collectives: how many always run, and how many numbers each chip receives from them.
      waiting: the same of those inside conditionals.
    """

    flops: float
    bytes: float
    temporary: int
    arguments: int
    collectives: tuple[int, int]
    waiting: tuple[int, int]


# What the compiler would ask a TPU host; it may be loaded by several processes, as it holds no device.
_COMPILE_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_mesh(chips: int) -> jax.sharding.Mesh:
    """A mesh of TPU v5e chips that exist only for the compiler, one axis "data"."""
    if jax.default_backend() != "tpu":
        os.environ.update(_COMPILE_ONLY | dict(os.environ))
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chips])
    return topologies.make_mesh(topology, (chips,), ("data",))


def measure(place: str, case: Case, mesh: jax.sharding.Mesh) -> Cost:
    """Compiles a step of `benchmarks.steps`, with MultiBalance, for `mesh` and reads what it costs."""
    looped = place in LOOPED
    problem = case.problem._replace(batch=case.problem.batch * mesh.size)
    params, batch = jax.eval_shape(lambda: initial(problem, case.tasks))
    representation = jax.ShapeDtypeStruct((problem.batch, problem.representation), jnp.float32)
    network = Network(case.tasks, representation, as_array=looped)
    method, mode = mtl.multibalance(case.tasks), place if looped else "auto"
    step = step_of("weighted" if looped else place, network, method, optax.adam(1e-3), mode)
    state = jax.eval_shape(step.init, params)
    params, state = jax.tree.map(lambda x: _on(mesh, x), (params, state))
    axes = {"ids": (None, "data"), "features": ("data",), "labels": (None, "data")}
    batch = {name: _on(mesh, batch[name], *spec) for name, spec in axes.items()}
    losses = _on(mesh, jax.ShapeDtypeStruct((case.tasks,), jnp.float32))
    results = jax.tree.map(lambda x: x.sharding, (params, state, losses))
    jitted = jax.jit(
        lambda *arguments: step.update(*arguments)[:3], donate_argnums=(0, 1), out_shardings=results
    )
    compiled = jitted.lower(params, state, batch).compile()
    analysis, memory = compiled.cost_analysis(), compiled.memory_analysis()
    found = collectives(compiled.as_text())
    always, waiting = ([c for c in found if c.conditional is branch] for branch in (False, True))
    return Cost(
        analysis["flops"],
        analysis["bytes accessed"],
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        (len(always), sum(c.numbers for c in always)),
        (len(waiting), sum(c.numbers for c in waiting)),
    )


def _on(mesh: jax.sharding.Mesh, x: Any, *spec: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec)))


def work(options: argparse.Namespace) -> None:
    """Compiles the chosen tables, prints them and writes them."""
    for name in options.only:
        case, chips, places = TABLES[name]
        note = LOOPS if places == LOOPED else ""
        publish(options.out, name, _lines(case, chips, places), _title(case, chips), note)


def _title(case: Case, chips: int) -> str:
    problem = case.problem
    return (
        f"TPU v5e, {chips} chips, compiled ahead of time: {problem.tables} x {problem.rows:,} x "
        f"{problem.width} embeddings, {len(problem.bottom)} layers of at most {max(problem.bottom)}, "
        f"T = {case.tasks}, batch {problem.batch} per chip"
    )


def _lines(case: Case, chips: int, places: tuple[str, ...]) -> list[tuple[str, ...]]:
    lines = [("step", "FLOPs", "bytes", "temporary", "memory", "collectives", "in conditionals")]
    mesh = tpu_mesh(chips)
    plain = measure("plain", case, mesh)
    for name in ("plain", *places):
        try:
            cost = plain if name == "plain" else measure(name, case, mesh)
        except jax.errors.JaxRuntimeError as error:
            lines.append((name, *_reason(error)))
            continue
        cells = (
            f"{cost.flops / plain.flops:.4f} ({cost.flops:.3e})",
            f"{cost.bytes / plain.bytes:.4f} ({cost.bytes:.3e})",
            f"{(cost.temporary - plain.temporary) / 2**20:+.2f} MiB ({cost.temporary / 2**20:.1f})",
            f"{(cost.arguments + cost.temporary) / 2**30:.2f} GiB",
            "{} ({:,} numbers)".format(*cost.collectives),
            "{} ({:,} numbers)".format(*cost.waiting),
        )
        lines.append((name, *cells))
    return lines


def _reason(error: Exception) -> tuple[str, ...]:
    found = re.search(r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", str(error))
    if not found:
        raise error
    return ("does not fit", "", f"{found[1]}B", f"of {found[2]}B", "", "")


ONLY = {"nargs": "+", "choices": TABLES, "default": TABLES, "help": "these tables alone"}
main = CommandLine("examples.studies.benchmarks.tpu", __doc__, work, "only out", {"only": ONLY})

if __name__ == "__main__":
    sys.exit(main())
