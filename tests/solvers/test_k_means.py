"""k-means on a line against all partitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_optax.solvers.k_means import k_means_on_line


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
def test_k_means_on_a_line_is_the_best_of_all_partitions(groups):
    rng = np.random.default_rng(groups)
    points = jnp.asarray(rng.normal(size=(6, 6)) * 10.0 ** rng.integers(-6, 6, (6, 1)), jnp.float32)
    active = jnp.asarray([True] * 5 + [False])
    found = jax.jit(jax.vmap(lambda x: k_means_on_line(x, active, groups)))(points)
    for x, got in zip(np.asarray(points, float), np.asarray(found, float), strict=True):
        values = np.sort(x[:5])
        scale = (values**2).sum()
        assert ((got[:5] - x[:5]) ** 2).sum() <= best_error(values, groups) + 1e-10 * scale
        assert len(np.unique(got[:5])) <= groups
        assert got[5] == 0


def best_error(values, groups):
    if groups == 1 or len(values) <= 1:
        return ((values - values.mean()) ** 2).sum() if len(values) else 0.0
    return min(
        ((values[:i] - values[:i].mean()) ** 2).sum() + best_error(values[i:], groups - 1)
        for i in range(1, len(values) + 1)
    )
