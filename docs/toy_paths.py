"""Draws the path of every method on one problem with two parameters and two losses.

    python docs/toy_paths.py [NAME ...]

writes `docs/methods/paths/NAME.png` and the losses at the end of each path to
`docs/methods/paths/ends.json`. The pages of the methods show both, and a test repeats some of them.
The problem is the one on which CAGrad (Liu et al., 2021, section 5) and later papers compare methods,
with the first loss at a tenth, as in EMTL's Figure 1 (Yuan et al., 2023). A constant makes both losses
positive, which methods on losses need; it changes no gradient. All methods have the same optimizer.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_optax as mtl

sys.path.append(str(Path(__file__).resolve().parents[1]))  # a script sees its own folder alone

from examples.models import toy

FOLDER = Path(__file__).resolve().parent / "methods" / "paths"
STEPS, LEARNING_RATE = 4000, 0.02
SCALE, SHIFT = jnp.array(toy.SCALE), 21.0
# What a factory has no default for.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "adatask": {"inner": optax.scale_by_adam()},
    "fixed_weights": {"weights": [10.0, 1.0]},
    "go4align": {"num_groups": 2},
    "lagrangian": {"limits": [None, 5.0], "step_size": 0.01},
    "trimmed_mean": {"trim_number": 0},
}
# Directions that Adam must not rescale again.
DIRECTIONS = {"adatask", "scale_by_mtadam", "scale_by_pub"}


def losses_of(position: jax.Array) -> jax.Array:
    """The two losses `[2]` at a point."""
    return (toy.losses(position) + SHIFT) * SCALE


def optimizer_of(name: str) -> optax.GradientTransformation:
    """A method with its defaults, and Adam after it."""
    method = mtl.METHODS[name].factory(2, **ARGUMENTS.get(name, {}))
    after = optax.scale(-LEARNING_RATE) if name in DIRECTIONS else optax.adam(LEARNING_RATE)
    return optax.chain(method, after)


@partial(jax.jit, static_argnums=0)
def paths(name: str) -> jax.Array:
    """The paths `[starts, STEPS + 1, 2]` of one method."""
    tx = optimizer_of(name)

    def run(start: jax.Array) -> jax.Array:
        def step(carry: Any, _: Any) -> Any:
            position, state = carry
            losses, grads = mtl.per_task_value_and_grad(losses_of)(position)
            update, state = tx.update(grads, state, position, losses=losses)
            return (optax.apply_updates(position, update), state), position

        (last, _), visited = jax.lax.scan(step, (start, tx.init(start)), length=STEPS)
        return jnp.concatenate([visited, last[None]])

    return jax.vmap(run)(jnp.asarray(toy.STARTS))


def ends_of(found: jax.Array) -> list[list[float]]:
    """The two losses at the end of each path, unscaled and unshifted."""
    last = jax.vmap(losses_of)(found[:, -1]) / SCALE - SHIFT
    return np.asarray(last, float).round(2).tolist()


def draw(found: np.ndarray, file: Path) -> None:
    """One picture: the mean loss as background, and the five paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    x, y = jnp.meshgrid(jnp.linspace(-10.5, 10.5, 120), jnp.linspace(-10.5, 10.5, 120))
    grid = jax.vmap(losses_of)(jnp.stack([x.ravel(), y.ravel()], axis=1))
    height = np.asarray((grid / SCALE).mean(axis=1)).reshape(120, 120)
    figure, ax = pyplot.subplots(figsize=(4, 4), layout="constrained")
    ax.contour(x, y, height, levels=18, colors="0.8", linewidths=0.8)
    front = np.linspace(-7, 7, 2)
    ax.plot(front, np.full(2, -8.0), color="0.55", linewidth=6, solid_capstyle="round", alpha=0.5)
    ax.text(0, -9.6, "Pareto set", ha="center", color="0.35", fontsize=9)
    order = np.linspace(0, 1, STEPS + 1)
    for path in found:
        ax.scatter(path[::8, 0], path[::8, 1], c=order[::8], cmap="plasma_r", s=2, rasterized=True)
        ax.plot(*path[0], "o", color="black", markersize=6)
        ax.plot(*path[-1], "*", color="tab:red", markersize=11, markeredgecolor="white")
    ax.set(xlim=(-10.5, 10.5), ylim=(-10.5, 10.5), xticks=[-10, 0, 10], yticks=[-10, 0, 10])
    ax.set_aspect("equal")
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
    Image.open(file).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(file, optimize=True)


def main(names: list[str]) -> dict[str, list[list[float]]]:
    """Draws the given methods, or all, and returns the ends of all paths."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / "ends.json"
    ends = json.loads(file.read_text("utf-8")) if file.exists() else {}
    for name in names or mtl.METHODS:
        found = paths(name)
        draw(np.asarray(found), FOLDER / f"{name}.png")
        ends[name] = ends_of(found)
        print(f"{name:18}", ends[name], flush=True)
    ends = {name: ends[name] for name in sorted(ends)}
    lines = [f"  {json.dumps(name)}: {json.dumps(rows)}" for name, rows in ends.items()]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
    return ends


if __name__ == "__main__":
    main(sys.argv[1:])
