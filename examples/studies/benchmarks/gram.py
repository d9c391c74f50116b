"""Section on the Gram matrix of one CPU: what `mtl_optax/core/gram_cpu.py` saves in a whole step."""

from collections.abc import Iterator
from unittest import mock

import mtl_optax as mtl
from examples.studies.benchmarks.problems import TINY, Problem
from examples.studies.benchmarks.report import Row
from examples.studies.benchmarks.steps import steps
from examples.studies.harness.timing import interleaved, ratio
from mtl_optax.core import gram

# Shared parameters, which "per_task" stacks, and numbers of a representation, which "fork" keeps apart.
SIZES = {
    "1e4": Problem(tables=0, dense=64, bottom=(96, 64), batch=160),
    "1e6": Problem(tables=0, dense=512, bottom=(1024, 512), batch=2048),
}


def forms(quick: bool) -> Iterator[Row]:
    """The time of a step with XLA's own form of the Gram matrix over that of the step as it is."""
    for num_tasks in (2,) if quick else (4, 8, 16):
        for size, problem in {"tiny": TINY["dense"]}.items() if quick else SIZES.items():
            for place in ("per_task", "fork"):
                made = {"ours": steps(problem, num_tasks, [place], mtl.mgda(num_tasks))[place]}
                with mock.patch.object(gram, "_unsharded", lambda leaves: False):
                    made["XLA's"] = steps(problem, num_tasks, [place], mtl.mgda(num_tasks))[place]
                seconds = interleaved(made, 1 if quick else 9)
                case = f"{place}, T={num_tasks}, {size} elements"
                yield Row("XLA's Gram matrix", case, ratio(seconds, "XLA's", "ours"), "x")
