"""Runs the examples of all docstrings against the installed package, as a user without extras has it.

Run it outside the checkout: `cd "$(mktemp -d)" && python CHECKOUT/.github/wheel_check.py`.
"""

import doctest
import importlib
import pkgutil
import sys
from pathlib import Path

import mtl_optax

CHECKOUT = Path(__file__).resolve().parent.parent
# What needs the extra `plot`.
NEEDS_AN_EXTRA = {"mtl_optax.plotting"}


def main() -> str | None:
    """A message if something is wrong."""
    assert mtl_optax.__file__ is not None
    if Path(mtl_optax.__file__).is_relative_to(CHECKOUT):
        return f"found the checkout, not an installed package: {mtl_optax.__file__}"
    names = {module.name for module in pkgutil.walk_packages(mtl_optax.__path__, "mtl_optax.")}
    failed = attempted = 0
    for name in sorted(names - NEEDS_AN_EXTRA):
        module = importlib.import_module(name)
        result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
        failed, attempted = failed + result.failed, attempted + result.attempted
    print(f"mtl_optax {mtl_optax.__version__}: {attempted - failed} of {attempted} examples pass")
    return "examples fail" if failed or not attempted else None


if __name__ == "__main__":
    sys.exit(main())
