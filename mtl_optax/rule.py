"""What a method of one's own is made of: a rule, and `from_rule`, which makes it an optax transformation.

See "A method of your own" in docs/recipes/own_method.md.
"""

from mtl_optax.core.pipeline import from_rule
from mtl_optax.core.rule import GradientAverage, StepInputs, UpdateRule, WeightRule

__all__ = ["GradientAverage", "StepInputs", "UpdateRule", "WeightRule", "from_rule"]
