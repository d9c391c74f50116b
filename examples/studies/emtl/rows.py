"""The rows that EMTL's tables share, with the options that their trials search."""

import math

from examples.studies.harness.search import Entry, log_uniform, uniform

RHOS = (0.1, 0.3, 0.5, 0.8, 1.0, 1.2)  # the paper's grid
BANDIT = Entry(  # the default of 1.2 is more than log(T), which bounds nothing
    "BanditMTL", "bandit_mtl", {"kl_radius": log_uniform(0.1, 0.5)}, {"kl_radius": 0.3}
)


def emtl_rows(num_tasks: int) -> tuple[Entry, ...]:
    """EMTL with its defaults and the paper's grid of rho, its base, and the same on raw gradients.

    Every rho from log(T)^2 on is no constraint, so the first of these stands for all.
    """
    bounds = sum(rho < math.log(num_tasks) ** 2 for rho in RHOS)
    raw = {"epsilon": uniform(0.0, 0.5), "rho": log_uniform(0.1, 0.5)}
    return (
        Entry("MGDA", "mgda"),
        Entry("MGDA on unit gradients", 'mgda(normalize="l2")'),
        Entry("EMTL on raw gradients", 'emtl(base="mgda")', raw, {"epsilon": 0.3, "rho": 0.3}),
        Entry("EMTL", "emtl", {"rho": RHOS[: bounds + 1]}, {"rho": RHOS[0]}),
    )
