"""Advice from measured gradients: whether balancing may pay."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import optax
from numpy.typing import ArrayLike

from mtl_optax.core.method import Method
from mtl_optax.core.state import BalanceState, states_in
from mtl_optax.methods.losses.sum_tasks import MeasuredState

# The thresholds, and the experiments behind them: docs/choose.md has the tables.
LARGEST_RATIO = 10.0
"""The largest ratio of two norms at which no balancing is advised.

Above it, one balanced run was worth a search over weights on MovieLens in different units and in PPO.
Below it, as for retrieval and rating with scaled stars, no method was better than the sum in the task that
counts. QM9 is an exception, for which the advice names `scale_invariant`: its norms are within a factor of
two in the first hundred steps, but its losses fall to levels far apart, and its errors are compared in
percent (notebooks/05_molecules.ipynb).
"""
HELPFUL_COSINE = 0.3
"""From this cosine with the target on, an auxiliary helps it.

It was read off the regimes of `python -m examples.studies.regimes`, which are one data set. Auxiliaries
whose labels were permuted, and so cannot help, had cosines of 0.1 to 0.3 with the target, since popular
items are popular in every task. Where auxiliaries with norms like the target's raised its metric, their
cosines were 0.5 and 0.6. In one regime auxiliaries with cosines of 0.1 raised it, so a low cosine does not
prove that a task is useless.
"""
CONFLICT_COSINE = -0.3
"""Below this cosine, two tasks of similar norms conflict.

A cosine nearer to 0 can be the noise of mini-batches. Where one task loses what the other gains, as in
notebooks/04_which_method.ipynb, a method chooses another compromise and none is better for both.
"""

_WIDTH = 100  # of the lines that are printed

Task = str | int
Action = Literal["sum", "compromise", "balance"]


@dataclasses.dataclass(frozen=True)
class Advice:
    """What `advise` found; `str` of it is the advice in words.

    Attributes:
      norm_ratios: the norm of each task's gradient, divided by that of the target or, without a target, by
        the smallest one.
      smallest_cosine: between the gradients of two tasks; None if cosines were not measured.
      dominant: the task with the largest norm.
      action: "sum": keep the plain sum. "compromise": a method can only choose between the tasks.
        "balance": compare a balancing method with the sum.
      text: the advice, in sentences.
    """

    norm_ratios: dict[Task, float]
    smallest_cosine: float | None
    dominant: Task
    action: Action
    text: str

    def __str__(self) -> str:
        """Returns what was measured, and the advice."""
        ratios = ", ".join(f"{task} {ratio:.3g}" for task, ratio in self.norm_ratios.items())
        cosine = (
            "" if self.smallest_cosine is None else f"; smallest cosine {self.smallest_cosine:.2f}"
        )
        measured = f"Ratios of gradient norms: {ratios}{cosine}."
        return "\n".join([textwrap.fill(measured, _WIDTH), textwrap.fill(self.text, _WIDTH)])


def advise(
    found: optax.OptState | Mapping[str, Any],
    method: Method | None = None,
    *,
    target: Task | None = None,
) -> Advice:
    """Says from the norms and cosines of the task gradients whether balancing may pay.

    Train the plain sum with `sum_tasks(tasks, measure=True)` for a hundred steps and give its state. If
    all tasks count:

    * two norms differ by a factor of more than 10: compare a balancing method with the sum;
    * all norms are similar, and two gradients oppose each other (cosine below -0.3): a method can only
      choose a compromise between their tasks;
    * otherwise: keep the sum, and tune its weights before you try a method, but `scale_invariant` if the
      losses fall to levels far apart and the relative error of each counts.

    If one task is the `target`, only the ratios to its norm count. Compare a balancing method if an
    auxiliary is more than 10 times as large without helping the target (cosine below 0.3, or not
    measured), or if one that would help is less than a tenth as large. Keep the sum if all those that are
    more than 10 times as large help, or if those that are less than a tenth as large would not. If all
    norms are similar, the advice is as above.

    These rules summarise the experiments in docs/choose.md. They say where a comparison is worth its runs,
    not what comes out of it. They cannot know that a loss is a regulariser, which is no task.

    Args:
      found: the state of an optimizer with a method that computes norms. Blocks in which only one task
        has a gradient, such as heads with one block per leaf, are left out. Or what `diagnostics(state,
        method)` read from the state of a method with one block.
      method: the `Method` of the state, for the names of tasks.
      target: the task that counts, by name or index; None if all tasks count.

    Returns:
      An `Advice`.

    Raises:
      ValueError: if `found` has no norms of at least two tasks, or diagnostics of several steps or blocks,
        or `target` is not one of the tasks.

    Example:

      >>> import jax.numpy as jnp, mtl_optax as mtl
      >>> tx = mtl.sum_tasks(("click", "spend"), measure=True)
      >>> state = tx.init(jnp.zeros(2))
      >>> for _ in range(3):
      ...     _, state = tx.update(jnp.array([[1., 0.], [0., 40.]]), state)
      >>> print(mtl.advise(state, tx))
      Ratios of gradient norms: click 1, spend 40; smallest cosine 0.00.
      The gradient of spend is 40 times that of click, and all tasks count: compare inverse_norm, imtl_g
      or mgda with the sum; scale_invariant and uncertainty need the losses alone.
      >>> mtl.advise(state, tx, target="click").action
      'balance'
    """
    tasks, norms, cosines = _read(found, method)
    if target is not None and target not in tasks:
        raise ValueError(
            f"advise: target must be one of the measured tasks {tasks}, found {target!r}."
        )
    reference = norms.min() if target is None else norms[tasks.index(target)]
    apart = ~np.eye(len(tasks), dtype=bool)
    smallest = float(np.min(cosines[apart]))
    ratios = dict(zip(tasks, (norms / reference).tolist(), strict=True))
    if target is None:
        action, text = _for_all(tasks, ratios, cosines)
    else:
        with_target = dict(zip(tasks, cosines[tasks.index(target)].tolist(), strict=True))
        action, text = _for_target(target, ratios, with_target)
    return Advice(
        norm_ratios=ratios,
        smallest_cosine=None if np.isnan(smallest) else smallest,
        dominant=tasks[int(np.argmax(norms))],
        action=action,
        text=text,
    )


_ALIKE = (
    f"The norms are within {LARGEST_RATIO:g} times of each other: keep the sum, and search its weights "
    "before anything else. If the losses fall to levels far apart and the relative error of each counts, "
    "compare scale_invariant."
)


def _for_all(
    tasks: list[Task], ratios: Mapping[Task, float], cosines: np.ndarray
) -> tuple[Action, str]:
    """Returns the advice where all tasks count."""
    least, most = min(tasks, key=ratios.__getitem__), max(tasks, key=ratios.__getitem__)
    if ratios[most] > LARGEST_RATIO:
        return "balance", (
            f"The gradient of {most} is {ratios[most]:.3g} times that of {least}, and all tasks count: "
            "compare inverse_norm, imtl_g or mgda with the sum; scale_invariant and uncertainty need "
            "the losses alone."
        )
    one, other = divmod(int(np.argmin(cosines)), len(tasks))
    if cosines[one, other] < CONFLICT_COSINE:
        return "compromise", _opposed(tasks[one], tasks[other])
    return "sum", _ALIKE


def _for_target(
    target: Task, ratios: Mapping[Task, float], cosines: Mapping[Task, float]
) -> tuple[Action, str]:
    """Returns the advice where one task counts."""
    others = [task for task in ratios if task != target]
    helpful = {task for task in others if cosines[task] >= HELPFUL_COSINE}
    large = [task for task in others if ratios[task] > LARGEST_RATIO]
    small = [task for task in others if ratios[task] < 1 / LARGEST_RATIO]
    methods = (
        f"compare metabalance(tasks, target={target!r}, relax_factor=1) and imtl_g with the sum."
    )
    if harmful := [task for task in large if task not in helpful]:
        return "balance", (
            f"{_listed(harmful)} dominate {target} and do not help it (cosine below {HELPFUL_COSINE}): "
            f"{methods}"
        )
    if large:
        return "sum", (
            f"{_listed(large)} dominate {target} and help it (cosine at least {HELPFUL_COSINE}): keep the "
            "sum, since balancing would reduce this help."
        )
    if useful := [task for task in small if task in helpful]:
        return "balance", (
            f"{_listed(useful)} would help {target} (cosine at least {HELPFUL_COSINE}) but are too small "
            f"to: {methods}"
        )
    if small:
        return "sum", (
            f"{_listed(small)} are too small to have an effect, and would not help {target} (cosine below "
            f"{HELPFUL_COSINE}): keep the sum."
        )
    opposed = min(others, key=cosines.__getitem__)
    if cosines[opposed] < CONFLICT_COSINE:
        return "compromise", _opposed(opposed, target)
    return "sum", _ALIKE


def _opposed(one: Task, other: Task) -> str:
    return (
        f"The gradients of {one} and {other} are of similar length and oppose each other: upgrad, cagrad, "
        "nash_mtl and fixed weights choose different compromises between them, and none is better for both."
    )


def _listed(tasks: list[Task]) -> str:
    return f"The gradients of {', '.join(map(str, tasks))}"


def _read(found: Any, method: Method | None) -> tuple[list[Task], np.ndarray, np.ndarray]:
    """Returns the tasks with a gradient, their norms `[T]` and cosines `[T, T]`, NaN if not measured."""
    names = None if method is None else method.task_names
    if isinstance(found, Mapping) and "norms" in found:
        names, products = _of_diagnostics(names, found["norms"], found.get("cosines"))
    else:
        products = _of_states(states_in(found))
    norms = np.sqrt(np.diagonal(products))
    (known,) = np.nonzero(norms > 0)
    if len(known) < 2:
        raise ValueError(
            "advise: needs the norms of at least two tasks on parameters that they share: give the state "
            "of sum_tasks(tasks, measure=True), or of a method that computes norms, after a step."
        )
    if method is not None and method.num_tasks != len(norms):
        raise ValueError(
            f"advise: the tasks of {method!r} are not the {len(norms)} tasks of the state."
        )
    norms, products = norms[known], products[np.ix_(known, known)]
    tasks = [place if names is None else names[place] for place in known.tolist()]
    return tasks, norms, products / norms / norms[:, None]


def _of_states(states: list[BalanceState]) -> np.ndarray:
    """Returns the inner products `[T, T]` in the blocks that tasks share, of the first state with norms."""
    for state in states:
        if isinstance(state.rule_state, MeasuredState):
            products = np.asarray(state.rule_state.products, np.float64)
        elif state.norms is not None:
            products = _products(state.norms, state.cosine)
        else:
            continue
        # The trainings of a vmap over seeds count like blocks.
        products = products.reshape(-1, *products.shape[-2:])
        shared = np.sum(np.diagonal(products, axis1=1, axis2=2) > 0, axis=1) > 1
        return products[shared].sum(axis=0)
    return np.zeros((0, 0))


def _of_diagnostics(
    names: Sequence[str] | None, norms: Any, cosines: Any
) -> tuple[Sequence[str] | None, np.ndarray]:
    """Returns the names of the tasks, if they have any, and their inner products `[T, T]`."""
    if isinstance(norms, Mapping):
        names, norms = list(norms), list(norms.values())
    if any(isinstance(norm, Mapping) or np.ndim(norm) for norm in norms):
        raise ValueError(
            "advise: expected the diagnostics of one step and one block, with one norm per task; found "
            "several steps or blocks. Give the state, in which advise tells the blocks that tasks share."
        )
    if isinstance(cosines, Mapping):
        cosines = [[cosines[task][other] for other in names or ()] for task in names or ()]
    return names, _products(norms, cosines)


def _products(norms: ArrayLike, cosines: ArrayLike | None) -> np.ndarray:
    """Returns inner products from lengths and angles; NaN off the diagonal if no angle is known."""
    norms = np.asarray(norms, np.float64)
    own = np.eye(norms.shape[-1], dtype=bool)
    cosines = np.where(own, 1.0, np.nan) if cosines is None else np.asarray(cosines, np.float64)
    return cosines * norms[..., None, :] * norms[..., :, None]
