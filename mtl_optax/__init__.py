"""Multi-task gradient balancing for JAX, as optax transformations that remove the task axis."""

from mtl_optax.combinators import (
    AccumulateState,
    SkipNonfiniteState,
    accumulate,
    drop_extra_args,
    fixed_weights,
    mean_tasks,
    per_task,
    skip_nonfinite,
    sum_tasks,
)
from mtl_optax.diagnostics import diagnostics, head_weights
from mtl_optax.from_gradients import TaskGradients, from_gradients
from mtl_optax.from_rule import BalanceState, Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.methods import METHODS
from mtl_optax.methods.from_gram.emtl import EMTLState, emtl
from mtl_optax.methods.from_gram.mgda import mgda
from mtl_optax.methods.from_gram.multibalance import MultiBalanceState, multibalance
from mtl_optax.methods.from_norms.metabalance import MetaBalanceState, metabalance
from mtl_optax.placement.losses import weigh_losses
from mtl_optax.placement.parameters import per_task_value_and_grad, split_value_and_grad
from mtl_optax.placement.representation import (
    ForkToken,
    fork,
    fork_init,
    fork_state,
    fork_value_and_grad,
    join,
)

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "AccumulateState",
    "BalanceState",
    "EMTLState",
    "Evidence",
    "ForkToken",
    "MetaBalanceState",
    "Method",
    "MultiBalanceState",
    "Rule",
    "SkipNonfiniteState",
    "TaskGradients",
    "WeightingOptions",
    "__version__",
    "accumulate",
    "diagnostics",
    "drop_extra_args",
    "emtl",
    "fixed_weights",
    "fork",
    "fork_init",
    "fork_state",
    "fork_value_and_grad",
    "from_gradients",
    "from_rule",
    "head_weights",
    "join",
    "mean_tasks",
    "metabalance",
    "mgda",
    "multibalance",
    "per_task",
    "per_task_value_and_grad",
    "skip_nonfinite",
    "split_value_and_grad",
    "sum_tasks",
    "weigh_losses",
]
