"""The same work in TorchJD and plain PyTorch, in turns with ours, where they are installed.

They are no dependency: `pip install torch==2.13.0 torchjd` (and what its Nash-MTL and CAGrad ask for).
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from examples.studies.benchmarks.methods import gradients, update_call
from examples.studies.benchmarks.report import Row
from examples.studies.harness.timing import interleaved, ratio, several
from mtl_optax.core.gram import gram_matrices

# Methods whose time is the solver's: at least five times as fast.
_SOLVER_BOUND = ("upgrad", "cagrad", "nash_mtl", "fairgrad")


def installed() -> bool:
    """Whether TorchJD and PyTorch can be imported."""
    return all(importlib.util.find_spec(name) for name in ("torch", "torchjd"))


def aggregators(num_tasks: int) -> dict[str, Callable[[], Any]]:
    """TorchJD's aggregators by our names."""
    from torchjd import aggregation

    return {
        "mgda": aggregation.MGDA,
        "upgrad": aggregation.UPGrad,
        "dualproj": aggregation.DualProj,
        "cagrad": lambda: aggregation.CAGrad(c=0.4),
        "nash_mtl": lambda: aggregation.NashMTL(n_tasks=num_tasks),
        "fairgrad": lambda: aggregation.FairGrad(alpha=1.0),
        "aligned_mtl": aggregation.AlignedMTL,
        "imtl_g": aggregation.IMTLG,
        "pcgrad": aggregation.PCGrad,
        "conflict_free": aggregation.ConFIG,
    }


def peers(quick: bool) -> Iterator[Row]:
    """The time of ours over that of theirs."""
    import torch

    for num_tasks, size in ((2, 50),) if quick else ((8, 10_000), (8, 1_000_000), (16, 1_000_000)):
        stacked = gradients(num_tasks, size)
        matrix = torch.from_numpy(np.array(stacked))
        gram = gram_call(stacked)
        calls = {"ours": gram, "theirs": lambda matrix=matrix: matrix @ matrix.T}
        yield _compare("Gram matrix / torch M @ M.T", num_tasks, size, calls, 1.0, quick)
        for name, make in aggregators(num_tasks).items():
            try:
                aggregate = make()
                aggregate(matrix)
            except ImportError:
                continue
            theirs = lambda aggregate=aggregate, matrix=matrix: aggregate(matrix)  # noqa: E731
            calls = {"ours": update_call(name, stacked), "theirs": theirs}
            small = size <= 10_000
            target = (0.2 if name in _SOLVER_BOUND else None) if small else 1.0
            yield _compare(f"{name} / TorchJD", num_tasks, size, calls, target, quick)
            if quick:
                break


def gram_call(stacked: Any) -> Callable[[], Any]:
    """Our Gram matrix of one stacked leaf, compiled."""
    import jax

    compiled = jax.jit(lambda g: gram_matrices([g], [0], 1)).lower(jnp.asarray(stacked)).compile()
    return lambda: compiled(stacked)


def _compare(
    what: str, num_tasks: int, size: int, calls: Any, target: float | None, quick: bool
) -> Row:
    times, rounds = (1, 1) if quick else (5, 15) if size <= 10_000 else (1, 9)
    calls = {name: several(call, times) for name, call in calls.items()}
    value = ratio(interleaved(calls, rounds), "ours", "theirs")
    return Row("against PyTorch", f"{what} [{num_tasks}, {size}]", value, "x", target)
