"""Every method in one file; the folders say what a method looks at, and so what it costs."""

from mtl_optax.combinators import fixed_weights, mean_tasks, sum_tasks
from mtl_optax.method import Method
from mtl_optax.methods import from_gradients, from_gram, from_losses, from_norms

_LINEAR = frozenset({"permutation", "scale", "split"})
_CARUANA = "Caruana, Multitask Learning, 1997"

_REDUCERS = (
    Method("sum_tasks", sum_tasks, (), "from_losses", "sum", _CARUANA, sum_tasks, _LINEAR),
    Method(
        "mean_tasks",
        mean_tasks,
        (),
        "from_losses",
        "mean",
        _CARUANA,
        mean_tasks,
        _LINEAR | {"simplex"},
    ),
    Method(
        "fixed_weights",
        fixed_weights,
        (),
        "from_losses",
        "sum",
        "Kurin et al., In Defense of the Unitary Scalarization, 2022",
        lambda num_tasks: fixed_weights(num_tasks, [1 / (1 + t) for t in range(num_tasks)]),
        frozenset({"scale", "split"}),
    ),
)

METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        *_REDUCERS,
        *from_losses.TABLE,
        *from_norms.TABLE,
        *from_gram.TABLE,
        *from_gradients.TABLE,
    )
}
"""The one table that the README, the common tests and the examples' `--method` read."""
