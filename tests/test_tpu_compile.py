"""Every method and placement compiles for TPU v5e, on one host and on 256 chips, without a TPU."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from method_properties import make
from small_model import (
    BATCH_SPECS,
    MODEL_SHAPES,
    PLACEMENTS,
    T,
    chosen_for,
    initial_state,
)

import mtl_optax as mtl

tpu = pytest.importorskip("examples.studies.benchmarks.tpu", reason="needs a checkout")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]
FAMILIES = ["losses", "norms", "gram", "gradients"]


def abstract(tree, specs, mesh):
    """Shapes of `tree` on `mesh`: chips that do not exist hold no arrays."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, s)),
        tree,
        specs,
    )


def floats(shapes):
    return {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}


def everywhere(tree, mesh):
    return abstract(tree, jax.tree.map(lambda _: jax.P(), tree), mesh)


@pytest.mark.parametrize("chips", [4, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_compiles(family, chips):
    """As on a representation split over the batch, which also stands for split parameters."""
    mesh = tpu.tpu_mesh(chips)
    methods = {n: make(n, T) for n, row in mtl.METHODS.items() if row.family == family}
    representation = floats({"h": (2 * chips, 128)})
    grads = floats({"h": (T, 2 * chips, 128)})

    def run(states, grads, representation, losses):
        return {
            name: method.update(grads, states[name], representation, losses=losses)
            for name, method in methods.items()
        }

    states = {n: jax.eval_shape(method.init, representation) for n, method in methods.items()}
    jax.jit(run).lower(
        everywhere(states, mesh),
        abstract(grads, {"h": jax.P(None, "data")}, mesh),
        abstract(representation, {"h": jax.P("data")}, mesh),
        everywhere(jax.ShapeDtypeStruct((T,), jnp.float32), mesh),
    ).compile()


@pytest.mark.parametrize("chips", [4, 256])
def test_every_placement_compiles(chips):
    mesh = tpu.tpu_mesh(chips)
    params = floats(MODEL_SHAPES)
    batch = floats({"x": (2 * chips, 6), "y": (2 * chips, T)})
    chosen = {
        (placement, name): method
        for placement in PLACEMENTS
        for name, method in chosen_for(placement).items()
    }

    def run(params, states, batch):
        return {
            key: PLACEMENTS[key[0]](params, states[key], batch, method)
            for key, method in chosen.items()
        }

    states = {
        (placement, name): jax.eval_shape(
            lambda p, b, m=method, q=placement: initial_state(q, m, p, b), params, batch
        )
        for (placement, name), method in chosen.items()
    }
    jax.jit(run).lower(
        everywhere(params, mesh), everywhere(states, mesh), abstract(batch, BATCH_SPECS, mesh)
    ).compile()


def test_a_fork_adds_one_small_all_reduce():
    """On a small recommender; the benchmark `tpu` has bytes and memory of a real one.

    All of this one's temporaries fit the memory on the chip, so they say nothing of a larger one's.
    """
    case = tpu.Case(tpu.Problem(tables=2, rows=4096))
    mesh = tpu.tpu_mesh(4)
    plain, fork = (tpu.measure(name, case, mesh) for name in ("plain", "fork"))
    assert fork.flops <= 1.01 * plain.flops
    added = [more - less for more, less in zip(fork.collectives, plain.collectives, strict=True)]
    assert added[0] == 1
    assert 0 < added[1] <= case.tasks**2
