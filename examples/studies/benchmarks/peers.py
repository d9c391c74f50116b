"""The same work in TorchJD and plain PyTorch, in turns with ours, where they are installed.

They are no dependency: `pip install torch torchjd qpsolvers quadprog`, and what its Nash-MTL and CAGrad
ask for.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from examples.studies.benchmarks.methods import SHAPES, gradients, update_call
from examples.studies.benchmarks.problems import Problem
from examples.studies.benchmarks.report import Row
from examples.studies.harness.timing import compiled_call, interleaved, ratio, several
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

    for num_tasks, size in ((2, 50),) if quick else SHAPES:
        stacked = gradients(num_tasks, size)
        matrix = torch.from_numpy(np.array(stacked))
        gram = compiled_call(lambda g: gram_matrices([g], [0], 1), stacked)
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


def training_steps(by_example: bool, number: int, problem: Problem) -> dict[str, Callable[[], Any]]:
    """PyTorch's plain step and TorchJD's steps with UPGrad, on the dense network of our steps."""
    import torch
    from torch import nn
    from torchjd import aggregation, autogram, autojac

    batch, num_heads = (number, 1) if by_example else (problem.batch, number)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32, as JAX has it
    x = torch.randn(batch, problem.dense, device=device)
    labels = torch.randint(2, (num_heads, batch), device=device).float()
    cross_entropy = nn.functional.binary_cross_entropy_with_logits
    weighting, upgrad = aggregation.UPGradWeighting(), aggregation.UPGrad()

    def dense(*widths: int) -> nn.Sequential:
        pairs = [(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
        return nn.Sequential(*itertools.chain.from_iterable(pairs))

    def plain(losses: Any, *_: Any) -> None:
        losses.sum().backward()

    def jac_to_grad(losses: Any, params: Any, _: Any) -> None:
        autojac.backward(losses)
        autojac.jac_to_grad(params, upgrad)

    def by_gramian(losses: Any, _: Any, engine: autogram.Engine) -> None:
        losses.backward(weighting(engine.compute_gramian(losses)))

    def step(backward: Callable[..., None]) -> Callable[[], None]:
        widths = (problem.bottom[-1], *problem.head)
        heads = [nn.Sequential(dense(*widths), nn.Linear(widths[-1], 1)) for _ in labels]
        bottom = dense(problem.dense, *problem.bottom)
        params = list(nn.ModuleList([bottom, *heads]).to(device).parameters())
        adam = torch.optim.Adam(params, 1e-3)
        # It watches the modules from here on, so that no other step may use them.
        engine = (
            autogram.Engine(bottom, *heads, batch_dim=0 if by_example else None)
            if backward is by_gramian
            else None
        )

        def run() -> None:
            h = bottom(x)
            pairs = zip(heads, labels, strict=True)
            each = [cross_entropy(head(h)[:, 0], y, reduction="none") for head, y in pairs]
            losses = each[0] if by_example else torch.stack([loss.mean() for loss in each])
            backward(losses, params, engine)
            adam.step()
            adam.zero_grad()
            if on_gpu:
                torch.cuda.synchronize()

        return run

    named = {"PyTorch, plain": plain, "TorchJD, jac_to_grad": jac_to_grad}
    return {name: step(f) for name, f in (named | {"TorchJD, autogram": by_gramian}).items()}


def _compare(
    what: str, num_tasks: int, size: int, calls: Any, target: float | None, quick: bool
) -> Row:
    times, rounds = (1, 1) if quick else (5, 15) if size <= 10_000 else (1, 9)
    calls = {name: several(call, times) for name, call in calls.items()}
    value = ratio(interleaved(calls, rounds), "ours", "theirs")
    return Row("against PyTorch", f"{what} [{num_tasks}, {size}]", value, "x", target)
