"""EMTL's Figure 1: the paths of eight methods from five starting points, in the plane of the losses."""

import argparse
import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_optax as mtl
from examples.models.toy import SCALE, STARTS, losses, pareto_front
from examples.studies.harness.choices import parse_choice
from examples.studies.harness.report import csv_of, picture, publish
from mtl_optax.plotting import plot_pareto

# The paper's text names five of its eight panels: BanditMTL, MGDA, NashMTL, IMTL and EMTL. The others here
# are those of Nash-MTL's figure. All have the library's defaults.
ROWS = {
    "plain sum": "sum",
    "PCGrad": "pcgrad",
    "CAGrad": "cagrad",
    "MGDA": "mgda",
    "BanditMTL": "bandit_mtl",
    "IMTL-G": "imtl_g",
    "Nash-MTL": "nash_mtl",
    "EMTL": "emtl",
}
# EMTL's options: the gradients on which MGDA runs, and the paper's grids. With two tasks every rho from
# 0.481 on is no constraint.
BASES = {"unit gradients": "emtl", "raw gradients": 'emtl(base="mgda")'}
EPSILONS, RHOS = (0.0, 0.1, 0.3, 0.5), (0.1, 0.3, 0.5)
SHIFTS = {0.0: "as they are", 21.0: "plus 21, so positive"}
STEPS, LEARNING_RATE, KEPT = 35_000, 1e-3, 500  # Adam, as in Nash-MTL's program; positions kept
NEAR = 0.1  # in unscaled losses, whose optimum is -20


class Ends(NamedTuple):
    """Where the five paths of a row end.

    Attributes:
      positions: `[5, 2]`.
      losses: `[5, 2]`, unscaled.
      distance: `[5]`, to the Pareto front, in the plane of the unscaled losses.
      excess: `[5]`, the mean of the unscaled losses over the best mean.
    """

    positions: np.ndarray
    losses: np.ndarray
    distance: np.ndarray
    excess: np.ndarray

    def counts(self) -> tuple[str, str]:
        """How many starts lead to the front, and how many to the best mean."""
        return str(int((self.distance < NEAR).sum())), str(int((self.excess < NEAR).sum()))


@partial(jax.jit, static_argnames=("choice", "steps"))
def paths(choice: str, steps: int, shift: Any = 0.0, knobs: Any = None) -> jax.Array:
    """The positions `[5, kept + 1, 2]`; `shift` is added to the unscaled losses."""
    method = parse_choice(choice).method(2, optax.identity(), knobs or {})
    tx = optax.chain(method, optax.adam(LEARNING_RATE))

    def loss_fn(position: jax.Array) -> jax.Array:
        return (losses(position) + shift) * jnp.array(SCALE)

    def step(carry: Any, _: None) -> Any:
        position, state = carry
        values, grads = mtl.per_task_value_and_grad(loss_fn)(position)
        update, state = tx.update(grads, state, position, losses=values)
        return (optax.apply_updates(position, update), state), position

    def run(start: jax.Array) -> jax.Array:
        (last, _), visited = jax.lax.scan(step, (start, tx.init(start)), length=steps)
        return jnp.concatenate([visited[:: max(1, steps // KEPT)], last[None]])

    return jax.vmap(run)(jnp.asarray(STARTS))


def ends_of(positions: jax.Array, front: np.ndarray) -> Ends:
    """Measure the ends of paths `[5, kept + 1, 2]` against the front."""
    found = np.asarray(jax.vmap(losses)(positions[:, -1]), float)
    distance = np.linalg.norm(found[:, None] - front, axis=2).min(axis=1)
    excess = found.mean(axis=1) - front.mean(axis=1).min()
    return Ends(np.asarray(positions[:, -1], float), found, distance, excess)


def lines_of_methods(found: Mapping[str, Ends]) -> list[tuple[str, ...]]:
    """The table of the methods, header first."""
    starts = (f"start {k}" for k in range(1, 6))
    lines = [("method", *starts, "on the front", "at the best mean")]
    for name, ends in found.items():
        lines.append((name, *(f"{one:.1f}, {two:.1f}" for one, two in ends.losses), *ends.counts()))
    return lines


def lines_of_emtl(steps: int, front: np.ndarray) -> list[tuple[str, ...]]:
    """The table of EMTL's options, header first; those of a base are trained side by side."""
    counts = "on the front", "at the best mean"
    lines = [("MGDA on", "losses", "epsilon", "rho", *counts, "first loss at the ends")]
    grid = list(itertools.product(SHIFTS, EPSILONS, RHOS))
    shifts, epsilons, rhos = (jnp.array(part) for part in zip(*grid, strict=True))
    for base, choice in BASES.items():
        knobs = {"epsilon": epsilons, "rho": rhos}
        found = jax.vmap(partial(paths, choice, steps))(shifts, knobs)
        for (shift, epsilon, rho), positions in zip(grid, found, strict=True):
            ends = ends_of(positions, front)
            first = ", ".join(f"{value:.1f}" for value in ends.losses[:, 0])
            options = f"{epsilon:g}", f"{rho:g}"
            lines.append((base, SHIFTS[shift], *options, *ends.counts(), first))
    return lines


def draw(positions: dict[str, jax.Array], front: np.ndarray, path: Path) -> None:
    """One panel a method: the five paths in the plane of the scaled losses, over the Pareto front."""
    size, shared = (10.8, 5.7), {"sharex": True, "sharey": True}
    with picture(path, 2, 4, dpi=90, figsize=size, **shared) as (figure, grid):
        for axes, (name, found) in zip(grid.flat, positions.items(), strict=False):
            visited = np.asarray(jax.vmap(jax.vmap(losses))(found)) * SCALE
            paths_of = {f"start {k}": values for k, values in enumerate(visited, 1)}
            plot_pareto(paths_of, front=front * SCALE, ax=axes, task_names=["task 1", "task 2"])
            axes.get_legend().remove()
            axes.set_title(name)
            axes.label_outer()
        handles = grid.flat[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=6)


def figure1(options: argparse.Namespace) -> None:
    """Run the command."""
    steps = options.steps or (200 if options.quick else STEPS)
    front = pareto_front()
    positions = {name: paths(choice, steps) for name, choice in ROWS.items()}
    found = {name: ends_of(visited, front) for name, visited in positions.items()}
    rows = (
        [name, start, *place, *values, *rest]
        for name, ends in found.items()
        for start, (place, values, *rest) in enumerate(zip(*ends, strict=True), 1)
    )
    header = ("method", "start", "x", "y", "loss 1", "loss 2", "distance", "excess mean")
    note = f"{_note(steps, front)}\n\nMade by `{options.line}`."
    title, files = "EMTL, Figure 1: a toy problem", {"figure1.csv": csv_of(header, rows)}
    publish(options.out, "figure1", lines_of_methods(found), title, note, files)
    title = "EMTL over the paper's grids on the toy problem"
    publish(options.out, "figure1_emtl", lines_of_emtl(steps, front), title)
    if options.out is not None:
        draw(positions, front, options.out / "figure1.png")


def _note(steps: int, front: np.ndarray) -> str:
    return (
        "The problem is that of CAGrad and Nash-MTL, the first loss at a tenth; that EMTL used the same "
        f"is likely, not certain (examples/models/toy.py). {steps} steps of Adam at {LEARNING_RATE:g}, the "
        "library's defaults for every method. Cells: the two losses at the end of a path, unscaled; each "
        f"has its optimum at -20. On the front: of five starts, those that end less than {NEAR:g} from "
        "it in the plane of these losses. At the best mean: those whose mean loss ends less than "
        f"{NEAR:g} above {front.mean(axis=1).min():.2f}, the best; the paper says that EMTL gets there "
        "from all five. The losses are negative near the front: a constant that makes them positive, in "
        "the second table, changes no gradient, but EMTL's weights depend on the losses."
    )
