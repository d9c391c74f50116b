"""States of chains and carriers of forks in checkpoints: a run goes on bit for bit."""

import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

ocp = pytest.importorskip("orbax.checkpoint")
import checkpointed_training as training  # noqa: E402

pytestmark = pytest.mark.slow
STEPS = 5
SCRIPT = training.__file__


def in_a_process(root, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def describe(carry):
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, carry)


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right), strict=True
    ):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("kind", training.KINDS)
def test_a_fresh_process_goes_on_bit_for_bit(kind, tmp_path, root):
    carry, step = training.start(kind)
    middle = training.advance(step, carry, 0, 2)
    with training.manager(tmp_path) as checkpoints:
        training.save(checkpoints, 2, middle)
    done = in_a_process(root, tmp_path, kind, STEPS)
    assert done.returncode == 0, done.stderr
    with training.manager(tmp_path) as checkpoints:
        count, carry = training.restore(checkpoints, describe(carry))
    assert count == STEPS
    assert_same_bits(carry, training.advance(step, middle, 2, STEPS))


def sharded(carry, mesh):
    """Shapes with everything of the width of the representation split over the mesh."""

    def one(leaf):
        split = leaf.ndim and leaf.shape[-1] == 8
        spec = training.P(*(None,) * (leaf.ndim - 1), "model") if split else training.P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, carry)


@pytest.mark.parametrize("kind", ["chain", "fork"])
def test_on_another_mesh(kind, tmp_path):
    carry, step = training.start(kind)
    middle = training.advance(step, carry, 0, 2)
    with training.manager(tmp_path) as checkpoints:
        training.save(checkpoints, 2, middle)
        checkpoints.wait_until_finished()
        mesh = jax.make_mesh((4,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
        like = sharded(middle, mesh)
        _, restored = training.restore(checkpoints, like)
    assert_same_bits(restored, middle)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    # The file adds nothing: the same as if the state had moved from device to device.
    moved = jax.tree.map(lambda leaf, wanted: jax.device_put(leaf, wanted.sharding), middle, like)
    there = training.advance(step, restored, 2, STEPS)
    assert_same_bits(there, training.advance(step, moved, 2, STEPS))
    # Sums over a split axis have another order, so that against one device it is no longer bits.
    here = training.advance(step, middle, 2, STEPS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), there[0], here[0])


@pytest.mark.parametrize("kind", ["fork"])
def test_a_process_killed_in_the_middle_of_a_save_loses_nothing_before_it(kind, tmp_path, root):
    killed = in_a_process(root, tmp_path, kind, STEPS, 3)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    unfinished = [entry.name for entry in tmp_path.iterdir() if "tmp" in entry.name]
    assert len(unfinished) == 1 and unfinished[0].startswith("3")
    carry, step = training.start(kind)
    with training.manager(tmp_path) as checkpoints:
        count, restored = training.restore(checkpoints, describe(carry))
    assert count == 2
    assert_same_bits(restored, training.advance(step, carry, 0, 2))
    done = in_a_process(root, tmp_path, kind, STEPS)
    assert done.returncode == 0, done.stderr
    with training.manager(tmp_path) as checkpoints:
        count, finished = training.restore(checkpoints, describe(carry))
    assert count == STEPS
    assert_same_bits(finished, training.advance(step, carry, 0, STEPS))
