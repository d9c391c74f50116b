"""The table of methods, which the README, the documentation and the `--method` of examples read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import optax

from mtl_optax.core.factory import FACTORIES
from mtl_optax.core.method import Method

# The arguments for which a factory has no default, for three tasks.
_REQUIRED: dict[str, dict[str, object]] = {
    "adatask": {"inner": optax.identity()},
    "fixed_weights": {"weights": (1.0, 1.0, 1.0)},
    "go4align": {"num_groups": 1},
    "lagrangian": {"limits": (None, 1.0, 1.0), "step_size": 1.0},
}


@dataclasses.dataclass(frozen=True)
class MethodRow:
    """A row of the table: all of it follows from the factory.

    Attributes:
      factory: the public factory, `factory(tasks, ...) -> Method`.
    """

    factory: Callable[..., Method]

    @property
    def name(self) -> str:
        """The public name."""
        return self.factory.__name__

    @property
    def needs(self) -> tuple[str, ...]:
        """What the method reads by default: "losses", "norms", "gram" or "gradients" (elements)."""
        needs = self.factory(3, **_REQUIRED.get(self.name, {})).needs
        if "gram" in needs:
            needs = needs - {"norms"}
        return tuple(need for need in ("losses", "norms", "gram", "gradients") if need in needs)

    @property
    def family(self) -> str:
        """The folder of the method, which determines its cost.

        It is "losses", "norms", "gram" or "gradients" (element by element, or with buffers of their size).
        """
        return self.factory.__module__.split(".")[-2]

    @property
    def scale(self) -> str:
        """How long the update is.

        "sum" if the update of T equal gradients is T times this gradient, "mean" if it is this gradient,
        "own" if the method determines the length.
        """
        found = re.search(r"Scale:\s+(sum|mean)-like", self._docstring)
        return found[1] if found else "own"

    @property
    def reference(self) -> str:
        """The authors, the title and the year of the first reference."""
        _, _, references = self._docstring.partition("References:")
        found = re.match(r".+?, \d{4}", " ".join(references.split()))
        return found[0] if found else ""

    @property
    def _docstring(self) -> str:
        return self.factory.__doc__ or ""


def method_table() -> dict[str, MethodRow]:
    """Returns the rows of all factories that were imported, by name.

    Returns:
      A dictionary from the public name of a method to its `MethodRow`.

    Example:

      >>> import mtl_optax as mtl
      >>> row = mtl.METHODS["metabalance"]
      >>> row.family, row.needs, row.scale
      ('norms', ('norms',), 'sum')
    """
    return {name: MethodRow(make) for name, make in FACTORIES.items()}
