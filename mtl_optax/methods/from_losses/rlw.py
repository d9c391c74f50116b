"""Random loss weighting: weights drawn anew at every step."""

from __future__ import annotations

from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_optax.arguments import check_num_tasks
from mtl_optax.from_rule import Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.solvers.log_weights import log_softmax


def rlw(
    num_tasks: int, *, seed: Any = 0, **options: Unpack[WeightingOptions]
) -> optax.GradientTransformationExtraArgs:
    r"""Draws the weights anew at every step.

    A baseline that asks how much of a method's gain is more than noise: :math:`w =
    \mathrm{softmax}(z)` with :math:`z_t` standard normal, independent at every step. Mean-like: the
    weights sum to 1 and are 1/T on average. Section 3 of the paper (there are other distributions in
    it; this is the one of its code).

    The draw of step k is `fold_in(key(seed), k)`, so that no key is in the state, and a run that is
    resumed goes on as if it had not stopped. Degenerate input: absent tasks do not count in the softmax;
    T = 1: 1.

    Args:
      num_tasks: T, static.
      seed: of the random stream, an integer.
      **options: see `WeightingOptions`.

    Returns:
      A transformation from leaves `[T, *shape]` to `[*shape]`. `update` takes `noise=`, the numbers
      :math:`z` `[T]`, to use instead of a draw. Cost: O(T); it looks at nothing.

    Raises:
      ValueError: where `noise` is not `[T]`.

    Example:

      >>> import jax.numpy as jnp, numpy as np, mtl_optax as mtl
      >>> tx = mtl.rlw(2)
      >>> state = tx.init(jnp.zeros(2))
      >>> print(np.asarray(tx.update(jnp.eye(2), state, noise=jnp.array([0., 1.]))[0]).round(3))
      [0.269 0.731]

    References:
      Lin, Ye, Zhang and Tsang, Reasonable Effectiveness of Random Weighting: A Litmus Test for
      Multi-Task Learning, 2022.
    """
    num_tasks = check_num_tasks("rlw", num_tasks)

    def weigh(evidence: Evidence, state: Any) -> tuple[jax.Array, Any]:
        noise = evidence.extra["noise"]
        if noise is None:
            key = jax.random.fold_in(jax.random.key(seed), evidence.step)
            noise = jax.random.normal(key, (num_tasks,), jnp.float32)
        if np.shape(noise) != (num_tasks,):
            raise ValueError(f"rlw: noise must be [{num_tasks}]; found {np.shape(noise)}.")
        return jnp.exp(log_softmax(jnp.asarray(noise), evidence.active)), state

    rule = Rule("rlw", num_tasks, frozenset(), lambda dtype: (), weigh, ("noise",))
    return from_rule(rule, **options)


METHOD = Method(
    name="rlw",
    factory=rlw,
    needs=(),
    family="from_losses",
    scale="mean",
    reference="Lin et al., Reasonable Effectiveness of Random Weighting, 2022",
    make=rlw,
    properties=frozenset({"scale", "simplex", "split"}),
    random=True,
)
