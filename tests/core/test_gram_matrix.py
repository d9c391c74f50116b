"""The Gram matrix and the norms against NumPy in float64, on one device, on meshes, and their programs."""

import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling import sampled

from mtl_optax.core.gram import gram_matrices, squared_norms
from mtl_optax.core.leaves import TaskRows

# The elements per task of a large leaf.
_LARGE = 262_144
# What later releases fuse, XLA of 0.8 stores; and it adds a product's terms one after the other.
OLD_XLA = jax.__version_info__ < (0, 9)
SHAPES = ((), (0,), (7,), (3, 5), (0, 4), (129, 33), (2, 3))


def _random(shapes, num_tasks, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [
        TaskRows(tuple(jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(num_tasks)))
        for shape in shapes
    ]


def _reference(leaves, blocks, num_blocks):
    num_tasks = len(leaves[0].rows)
    grams = np.zeros((num_blocks, num_tasks, num_tasks))
    for leaf, block in zip(leaves, blocks, strict=True):
        rows = np.stack([np.asarray(row, np.float64).ravel() for row in leaf.rows])
        grams[block] += rows @ rows.T
    return grams


def _check(leaves, blocks, num_blocks, tolerance=1e-5):
    if OLD_XLA and max(leaf.rows[0].size for leaf in leaves) >= _LARGE:
        pytest.skip("a plain product of jaxlib 0.8 on a CPU is that inexact")
    want = _reference(leaves, blocks, num_blocks)
    size = np.sqrt(np.einsum("bs,bt->bst", *[np.einsum("btt->bt", want)] * 2))
    stacked = [jnp.stack(leaf.rows) for leaf in leaves]
    for form in (leaves, stacked):
        gram, norms = jax.jit(
            lambda x: (gram_matrices(x, blocks, num_blocks), squared_norms(x, blocks, num_blocks))
        )(form)
        assert np.all(np.abs(gram - want) <= tolerance * size + 1e-30)
        np.testing.assert_array_equal(gram, np.swapaxes(gram, 1, 2))
        np.testing.assert_allclose(norms, np.einsum("btt->bt", want), rtol=tolerance)
    return gram


@pytest.mark.parametrize("num_tasks", sampled([1, 3, 6], [6]))
def test_odd_shapes_scalars_empties_and_blocks(num_tasks):
    _check(_random(SHAPES, num_tasks), (0, 1, 0, 3, 1, 3, 0), 5)


@pytest.fixture
def one_device(monkeypatch):
    """As on a machine with one device, where a CPU reads large leaves in pieces."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.parametrize("num_tasks", sampled([1, 3, 6, 17], [3, 17]))
def test_large_leaves_with_a_remainder(num_tasks):
    _check(_random([(_LARGE + 77,), (9,)], num_tasks), (0, 0), 1)


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pieces_of_large_leaves_on_one_device(dtype):
    shapes = [(2 * _LARGE + 77,), (64, 8192), (9,)]
    assert _check(_random(shapes, 6, dtype), (0, 1, 0), 2).dtype == jnp.float32


@pytest.mark.usefixtures("one_device")
def test_pieces_are_read_in_place():
    leaf = jax.ShapeDtypeStruct((6, 4 * _LARGE), jnp.float32)
    compiled = jax.jit(lambda x: gram_matrices([x], (0,), 1)).lower(leaf).compile()
    assert "while" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


@pytest.mark.parametrize(
    ("dtype", "num_tasks"),
    sampled(
        itertools.product([jnp.bfloat16, jnp.float16], [3, 5]),
        [(jnp.bfloat16, 3), (jnp.float16, 5)],
    ),
)
def test_half_precision_accumulates_in_float32(dtype, num_tasks):
    gram = _check(_random([(_LARGE + 5,), (40, 40)], num_tasks, dtype), (0, 1), 2)
    assert gram.dtype == jnp.float32


def test_float16_does_not_overflow():
    rows = TaskRows((jnp.full((1000,), 300, jnp.float16),) * 2)
    assert float(gram_matrices([rows], (0,), 1)[0, 0, 1]) == 9e7


@pytest.mark.slow
def test_float64_and_mixed_dtypes():
    with jax.enable_x64(True):
        leaves = _random([(50,)], 3, jnp.float64) + _random([(60,)], 3, jnp.bfloat16)
        assert _check(leaves, (0, 0), 1, 1e-14).dtype == jnp.float64


@pytest.mark.slow
def test_a_nonfinite_task_stays_in_its_own_row_and_column():
    rows = (*_random([(_LARGE,)], 5)[0].rows, jnp.full((_LARGE,), jnp.nan))
    gram = gram_matrices([TaskRows(rows)], (0,), 1)[0]
    assert np.all(np.isfinite(gram[:5, :5])) and np.all(np.isnan(gram[5]))


@pytest.mark.slow
def test_inside_vmap_scan_and_shard_map():
    x = jnp.stack([jnp.stack(leaf.rows) for leaf in _random([(4, 3), (4, 3)], 3)])
    want = jnp.stack([gram_matrices([one], (0,), 1) for one in x])
    np.testing.assert_allclose(jax.vmap(lambda one: gram_matrices([one], (0,), 1))(x), want, 1e-5)
    scanned = jax.lax.scan(lambda c, one: (c, gram_matrices([one], (0,), 1)), 0, x)[1]
    np.testing.assert_allclose(scanned, want, 1e-5)

    big = _random([(_LARGE,)], 5)[0]
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    summed = jax.shard_map(
        lambda *rows: jax.lax.psum(gram_matrices([TaskRows(rows)], (0,), 1), "i"),
        mesh=mesh,
        in_specs=jax.P("i"),
        out_specs=jax.P(),
    )
    np.testing.assert_allclose(
        jax.jit(summed)(*big.rows), gram_matrices([big], (0,), 1), 1e-4, 1e-2
    )


@pytest.mark.parametrize("num_tasks", [3, 6])
def test_separate_gradients_are_never_copied_into_one_array(num_tasks):
    rows = _random([(512, 1024)], num_tasks)[0].rows

    def from_stack(*rows):
        stack = jnp.stack([row * 2 for row in rows])
        return gram_matrices([TaskRows(tuple(stack[t] for t in range(num_tasks)))], (0,), 1)

    compiled = jax.jit(from_stack).lower(*rows).compile()
    assert f"f32[{num_tasks},512,1024]" not in compiled.as_text()
    assert f"f32[{num_tasks},524288]" not in compiled.as_text()


def test_a_stacked_leaf_is_read_in_place():
    x = jax.ShapeDtypeStruct((6, 4 * _LARGE), jnp.float32)
    compiled = jax.jit(lambda x: gram_matrices([x], (0,), 1)).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20


def test_a_branch_does_not_copy_its_operands():
    x = jax.ShapeDtypeStruct((6, 4 * _LARGE), jnp.float32)

    def branch(x):
        return jax.lax.cond(
            x[0, 0] > 0, lambda: gram_matrices([x], (0,), 1), lambda: jnp.zeros((1, 6, 6), x.dtype)
        )

    assert jax.jit(branch).lower(x).compile().memory_analysis().temp_size_in_bytes < 2**20


@pytest.mark.parametrize(
    ("bad", "dtype"),
    sampled(
        itertools.product([np.nan, np.inf, -np.inf], [jnp.float32, jnp.bfloat16, jnp.float16]),
        [(np.inf, jnp.float32), (np.nan, jnp.float16)],
    ),
)
def test_one_number_that_is_not_finite_is_found(bad, dtype):
    big, small = (leaf.rows for leaf in _random([(_LARGE + 77,), (9,)], 3, dtype))
    large = jnp.full_like(big[2], min(float(jnp.finfo(dtype).max), 1e16))
    big = TaskRows((big[0], big[1].at[_LARGE + 5].set(bad), large))
    small = TaskRows((small[0].at[0].set(bad), *small[1:]))
    for leaf, want in ((big, [True, False, True]), (small, [False, True, True])):
        for form in (leaf, jnp.stack(leaf.rows)):
            found = jax.jit(lambda x: jnp.isfinite(squared_norms([x], (0,), 1)[0]))(form)
            np.testing.assert_array_equal(found, want)


@pytest.mark.skipif(OLD_XLA, reason="fused by later releases")
def test_the_norms_alone_copy_nothing():
    rows = TaskRows((jax.ShapeDtypeStruct((4 * _LARGE,), jnp.float32),) * 6)
    for form in (rows, jax.ShapeDtypeStruct((6, 4 * _LARGE), jnp.float32)):
        compiled = jax.jit(lambda x: squared_norms([x], (0,), 1)).lower(form).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 2**16


@pytest.mark.parametrize("one_block", [True, False])
def test_the_program_of_500_leaves_stays_small(one_block):
    shapes = [
        (8, *((64, 64), (64,), (128, 256), (3, 3, 16, 16), (512, 600))[i % 5]) for i in range(500)
    ]
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    blocks, num_blocks = ((0,) * 500, 1) if one_block else (tuple(range(500)), 500)
    program = jax.jit(lambda x: gram_matrices(x, blocks, num_blocks)).lower(leaves).as_text()
    assert program.count(" = stablehlo.") < 8 * 500


ON_A_MESH = """
import jax, jax.numpy as jnp, numpy as np, re
from jax.sharding import AxisType
from mtl_optax.core.gram import gram_matrices, squared_norms
from mtl_optax.core.leaves import TaskRows
rng = np.random.default_rng(0)
shapes = [(64, 32), (64,), (8, 6), (5,), ()]
one_axis = [jax.P("a"), jax.P("a"), jax.P("a"), jax.P(), jax.P()]
two_axes = [jax.P("a", "b"), jax.P(("a", "b")), jax.P("a", "b"), jax.P(), jax.P()]
values = [rng.standard_normal((4, *shape)).astype(np.float32) for shape in shapes]
blocks = (0, 0, 0, 1, 1)
want = np.zeros((2, 4, 4))
for value, block in zip(values, blocks):
    want[block] += value.reshape(4, -1) @ value.reshape(4, -1).T
def both(x):
    return gram_matrices(x, blocks, 2), squared_norms(x, blocks, 2)
# XLA combines all sums over one set of axes; an array split along two dimensions takes two steps.
for kind, specs, exchanges in (
    (AxisType.Auto, one_axis, 1),
    (AxisType.Explicit, one_axis, 1),
    (AxisType.Auto, two_axes, 3),
    (AxisType.Explicit, two_axes, 3),
):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        put = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
        separate = [TaskRows(tuple(put(x, p) for x in v)) for v, p in zip(values, specs)]
        stacked = [put(v, jax.P(None, *p)) for v, p in zip(values, specs)]
        many = separate * 20
        for leaves in (separate, stacked):
            compiled = jax.jit(both).lower(leaves).compile()
            text = compiled.as_text()
            assert "all-gather" not in text and "all-to-all" not in text, text
            assert len(re.findall(r" all-reduce(?:-start)?\\(", text)) <= exchanges, text
            gram, norms = compiled(leaves)
            assert gram.sharding.is_fully_replicated
            np.testing.assert_allclose(gram, want, 1e-5, 1e-4)
            np.testing.assert_allclose(norms, np.einsum("btt->bt", want), 1e-5)
        gram = jax.jit(lambda x: gram_matrices(x, blocks * 20, 2))(many)
        np.testing.assert_allclose(gram / 20, want, 1e-5, 1e-4)
print("done")
"""


@pytest.mark.slow
def test_on_eight_devices_only_the_sums_are_exchanged():
    run = subprocess.run(
        [sys.executable, "-c", ON_A_MESH],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.endswith("done\n"), run.stderr[-2000:]
