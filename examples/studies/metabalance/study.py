"""The rows of MetaBalance's tables and figures, each tuned with as many trials as the others."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from examples.studies.harness.search import Entry, log_uniform, uniform
from examples.studies.recommender.training import TrainConfig

# The network is that of Figure 6 with the sizes of appendix A.2, and a bias of the items that starts at
# their popularity. The optimizer's settings were chosen for the plain sum on tmall_ijcai15, the best of 12
# (`python -m examples.studies.metabalance tune`), and are where every method's trials start.
TRAIN = TrainConfig(
    epochs=15,
    patience=5,
    batch_pairs=2048,
    negatives=3,
    learning_rate=2e-3,
    weight_decay=1.0,
    validation_users=2000,
)


def _weights(generator: np.random.Generator, num_tasks: int) -> np.ndarray:
    """1 for the target, the others of any size."""
    return np.concatenate([[1.0], 10.0 ** generator.uniform(-2.0, 1.0, num_tasks - 1)])


RELAX: Any = {"knobs": {"relax_factor": uniform(0.1, 1.0)}, "start": {"relax_factor": 0.7}}
METABALANCE = Entry("MetaBalance", "metabalance", **RELAX)
VANILLA = Entry("Vanilla-Multi", "sum")
BASELINES = (
    Entry("Single-Loss", "single"),
    VANILLA,
    Entry("Weights-Tuning", "fixed_weights", {"weights": _weights}, {"weights": None}),
    Entry("Uncertainty", "uncertainty"),
    Entry("GradNorm", "gradnorm", {"alpha": uniform(0.0, 2.0)}, {"alpha": 0.75}),
    Entry("DWA", "dwa(window=5)", {"temperature": log_uniform(0.5, 8.0)}, {"temperature": 2.0}),
    Entry("MGDA", "mgda"),
    Entry("MTAdam", "scale_by_mtadam", {"b3": uniform(0.5, 0.99)}, {"b3": 0.9}),
    Entry("GradSimilarity", "grad_similarity"),
    Entry("GradSurgery", "grad_surgery"),
    Entry("OL-AUX", "ol_aux", {"weight_lr": log_uniform(1e-3, 1.0)}, {"weight_lr": 0.1}),
)
TABLES: Mapping[str, tuple[Entry, ...]] = {
    "table1": (
        Entry("Strategy A", "metabalance(strategy='shrink')", **RELAX),
        Entry("Strategy B", "metabalance(strategy='enlarge')", **RELAX),
        Entry("Strategy C", "metabalance(strategy='both')", **RELAX),
    ),
    "table2": (*BASELINES, METABALANCE),
    "table3": (
        METABALANCE,
        Entry("MetaBalance + GradSimilarity", "metabalance + grad_similarity", **RELAX),
        Entry("MetaBalance + GradSurgery", "metabalance + grad_surgery", **RELAX),
        Entry("MetaBalance + OL-AUX", "metabalance + ol_aux", **RELAX),
    ),
    "table4": (
        METABALANCE,
        Entry("MetaBalance - Moving Average", "metabalance(ema_decay=0)", **RELAX),
    ),
}
RELAX_FACTORS = tuple(round(0.1 * step, 1) for step in range(1, 11))
FIGURES = ("figure1", "figure3", "figure4", "figure5")


def relax_entries(factors: Sequence[float]) -> list[Entry]:
    """A row for each relax factor, and the plain sum."""
    made = [
        Entry(f"MetaBalance, r = {r:g}", "metabalance", {}, {"relax_factor": r}) for r in factors
    ]
    return [VANILLA, *made]
