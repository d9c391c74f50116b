"""The parts of every method, also of your own: `from_rule` and the types of rules.

The page "A method of your own" of the documentation has an example.
"""

from mtl_optax.core.method import Method, MethodOptions
from mtl_optax.core.pipeline import from_rule
from mtl_optax.core.rule import GradientAverage, StepInputs, UpdateRule, WeightRule

__all__ = [
    "GradientAverage",
    "Method",
    "MethodOptions",
    "StepInputs",
    "UpdateRule",
    "WeightRule",
    "from_rule",
]
