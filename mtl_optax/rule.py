"""Rules, and `from_rule`, which makes an optax transformation from a rule.

"A method of your own" in docs/recipes/own_method.md shows how to write one.
"""

from mtl_optax.core.pipeline import from_rule
from mtl_optax.core.rule import GradientAverage, StepInputs, UpdateRule, WeightRule

__all__ = ["GradientAverage", "StepInputs", "UpdateRule", "WeightRule", "from_rule"]
