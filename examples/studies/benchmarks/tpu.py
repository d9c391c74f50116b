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
from examples.studies.benchmarks.problems import decode
from examples.studies.benchmarks.steps import PLACES, step_functions
from examples.studies.harness.command import Program
from examples.studies.harness.report import publish

TOPOLOGIES = {4: "v5e:2x2", 256: "v5e:16x16"}


class Problem(NamedTuple):
    """A recommender's ranking model and its batch.

    Attributes:
      tables: embedding tables.
      rows: rows of each table.
      width: width of an embedding.
      dense: number of dense features.
      bottom: widths of the shared layers.
      tasks: T.
      batch: examples per chip.
      sharded_tables: whether each table is spread over all chips by its rows; else every chip holds all.
      fields: lookups per example in each table.
    """

    tables: int = 26
    rows: int = 10_000
    width: int = 16
    dense: int = 13
    bottom: tuple[int, ...] = (256, 128, 64)
    tasks: int = 4
    batch: int = 2048
    sharded_tables: bool = False
    fields: int = 1


RECSYS = Problem()
# One hashed table for all features, as large systems have it: 256 GB in float32.
INTERNET = Problem(
    tables=1,
    rows=1_000_000_000,
    width=64,
    bottom=(1024, 512, 256),
    tasks=8,
    batch=256,
    sharded_tables=True,
    fields=26,
)

# A network whose gradients are what memory holds: 134 MB of layers in float32 on every chip.
LARGE = Problem(tables=1, rows=1000, dense=2032, bottom=(2048,) * 8, batch=1024)

# The table of each file: what is compiled, for how many chips, and in which places or modes.
LOOPED = ("map", "products")
TABLES = {
    "recommender_4": (RECSYS, 4, PLACES),
    "recommender_256": (RECSYS, 256, PLACES),
    "internet_256": (INTERNET, 256, PLACES),
} | {
    f"large_{tasks}_tasks_{chips}": (LARGE._replace(tasks=tasks), chips, LOOPED)
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


def measure(name: str, problem: Problem, mesh: jax.sharding.Mesh) -> Cost:
    """Compiles a step of `benchmarks.steps`, with MultiBalance, for `mesh` and reads what it costs."""

    def encode(shared: Any, batch: Any) -> jax.Array:
        x = _embed(shared["tables"], batch["ids"], problem, mesh)
        x = jnp.concatenate([x, batch["x"]], axis=-1)
        for weight, bias in shared["bottom"]:
            x = jax.nn.relu(x @ weight + bias[None])
        return x

    method = mtl.multibalance(problem.tasks)
    looped = name in LOOPED
    mode = name if looped else "auto"
    made = step_functions(encode, decode, method, optax.adam(1e-3), mode, as_array=looped)
    step = made["weighted" if looped else name]
    arguments = _arguments(problem, mesh, forked=name == "fork")
    results = jax.tree.map(lambda x: x.sharding, (*arguments[:3], _like((problem.tasks,), mesh)))
    jitted = jax.jit(step, donate_argnums=(0, 1, 2), out_shardings=results)
    compiled = jitted.lower(*arguments).compile()
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


def work(options: argparse.Namespace) -> None:
    """Compiles the chosen tables, prints them and writes them."""
    for name in options.only:
        problem, chips, places = TABLES[name]
        note = LOOPS if places == LOOPED else ""
        publish(options.out, name, _lines(problem, chips, places), _title(problem, chips), note)


def _title(problem: Problem, chips: int) -> str:
    return (
        f"TPU v5e, {chips} chips, compiled ahead of time: {problem.tables} x {problem.rows:,} x "
        f"{problem.width} embeddings, {len(problem.bottom)} layers of at most {max(problem.bottom)}, "
        f"T = {problem.tasks}, batch {problem.batch} per chip"
    )


def _lines(problem: Problem, chips: int, places: tuple[str, ...]) -> list[tuple[str, ...]]:
    lines = [("step", "FLOPs", "bytes", "temporary", "memory", "collectives", "in conditionals")]
    mesh = tpu_mesh(chips)
    plain = measure("plain", problem, mesh)
    for name in ("plain", *places):
        try:
            cost = plain if name == "plain" else measure(name, problem, mesh)
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


def _embed(tables: jax.Array, ids: jax.Array, problem: Problem, mesh: Any) -> jax.Array:
    """`[batch, tables * fields * width]` from tables `[tables, rows, width]`."""
    if not problem.sharded_tables:
        rows = jax.vmap(lambda table, i: table[i], in_axes=(0, 1), out_axes=1)(tables, ids)
        return rows.reshape(rows.shape[0], -1)

    # Each chip looks up what it holds for the whole batch and returns to every chip its examples.
    def lookup(shard: jax.Array, ids: jax.Array) -> jax.Array:
        local = jax.lax.all_gather(ids, "data", tiled=True)
        local = local - jax.lax.axis_index("data") * shard.shape[1]
        held = (local >= 0) & (local < shard.shape[1])
        found = jax.vmap(lambda table, i: table[i], in_axes=(0, 1), out_axes=1)(
            shard, jnp.where(held, local, 0)
        )
        found = jnp.where(held[..., None], found, 0)
        return jax.lax.psum_scatter(found, "data", tiled=True)

    spec = jax.P(None, "data"), jax.P("data")
    rows = jax.shard_map(lookup, mesh=mesh, in_specs=spec, out_specs=jax.P("data"))(tables, ids)
    return rows.reshape(rows.shape[0], -1)


def _like(shape: tuple[int, ...], mesh: Any, dtype: Any = jnp.float32, *spec: Any) -> Any:
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _arguments(problem: Problem, mesh: jax.sharding.Mesh, *, forked: bool) -> tuple[Any, ...]:
    """Shapes and shardings of parameters, optimizer state, balance state and batch: no array."""
    spread = (None, "data") if problem.sharded_tables else ()
    table_shape = (problem.tables, problem.rows, problem.width)

    def layers(*widths: int) -> Any:
        pairs = itertools.pairwise(widths)
        return [(_like((a, b), mesh), _like((b,), mesh)) for a, b in pairs]

    inputs = problem.tables * problem.fields * problem.width + problem.dense
    shared = {
        "tables": _like(table_shape, mesh, jnp.float32, *spread),
        "bottom": layers(inputs, *problem.bottom),
    }
    heads = [layers(problem.bottom[-1], 64, 32, 1) for _ in range(problem.tasks)]
    params = {"shared": shared, "heads": heads}

    def placed(tree: Any) -> Any:
        # The tables' moments lie where the tables lie; everything else is small.
        return jax.tree.map(
            lambda x: _like(x.shape, mesh, x.dtype, *(spread if x.shape == table_shape else ())),
            tree,
        )

    opt_state = placed(jax.eval_shape(optax.adam(1e-3).init, params))
    method = mtl.multibalance(problem.tasks)
    examples = problem.batch * mesh.size
    h = jax.ShapeDtypeStruct((examples, problem.bottom[-1]), jnp.float32)
    balance = jax.eval_shape(method.init, h if forked else shared)
    batch = {
        "ids": _like((examples, problem.tables, problem.fields), mesh, jnp.int32, "data"),
        "x": _like((examples, problem.dense), mesh, jnp.float32, "data"),
        "labels": _like((problem.tasks, examples), mesh, jnp.float32, None, "data"),
    }
    return params, opt_state, placed(balance), batch


ONLY = {"nargs": "+", "choices": TABLES, "default": TABLES, "help": "these tables alone"}
main = Program("examples.studies.benchmarks.tpu", __doc__, work, "only out", {"only": ONLY})

if __name__ == "__main__":
    sys.exit(main())
