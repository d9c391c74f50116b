"""A row of the one table of methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Method(NamedTuple):
    """What the README's table, the common tests and the examples' `--method` know of a method.

    Attributes:
      name: the public name.
      factory: the public factory.
      needs: what it looks at: "losses", "norms", "gram" or "gradients" (element by element).
      family: the folder it lives in: "from_losses", "from_norms", "from_gram", "from_gradients".
      scale: "sum" where T equal gradients give T times one of them, "mean" where they give one,
        "own" where the method sets the length itself.
      reference: authors, title and year.
      make: `num_tasks -> transformation` with the defaults (and a stated choice where there are none).
      properties: what holds for every finite input, by the names of tests/test_properties.py:
        "non_conflicting" (no task's loss rises to first order), "permutation" (tasks in another order
        give the same update), "scale" (all gradients times c give the update times c), "task_scale"
        (one task's gradient times c > 0 changes nothing), "simplex" (weights >= 0 that sum to 1),
        "stationary" (0 in the convex hull gives update 0), "split" (how vectors are cut into leaves
        does not matter).
      random: True where the result depends on a random draw.
    """

    name: str
    factory: Callable[..., Any]
    needs: tuple[str, ...]
    family: str
    scale: str
    reference: str
    make: Callable[[int], Any]
    properties: frozenset[str] = frozenset()
    random: bool = False
