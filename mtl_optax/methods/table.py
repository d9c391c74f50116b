"""The table of methods, which the README, the documentation and the `--method` of examples read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mtl_optax.core.method import Method
from mtl_optax.methods.gradients.adatask import adatask
from mtl_optax.methods.gradients.db_mtl import db_mtl
from mtl_optax.methods.gradients.excess_mtl import excess_mtl
from mtl_optax.methods.gradients.graddrop import graddrop
from mtl_optax.methods.gradients.lr_annealing import lr_annealing
from mtl_optax.methods.gradients.moco import moco
from mtl_optax.methods.gradients.scale_by_mtadam import scale_by_mtadam
from mtl_optax.methods.gradients.trimmed_mean import trimmed_mean
from mtl_optax.methods.gram.aligned_mtl import aligned_mtl
from mtl_optax.methods.gram.cagrad import cagrad
from mtl_optax.methods.gram.conflict_free import conflict_free
from mtl_optax.methods.gram.cr_mogm import cr_mogm
from mtl_optax.methods.gram.emtl import emtl
from mtl_optax.methods.gram.fairgrad import fairgrad
from mtl_optax.methods.gram.grad_similarity import grad_similarity
from mtl_optax.methods.gram.grad_surgery import grad_surgery
from mtl_optax.methods.gram.grad_vaccine import grad_vaccine
from mtl_optax.methods.gram.imtl import imtl
from mtl_optax.methods.gram.imtl_g import imtl_g
from mtl_optax.methods.gram.krum import krum
from mtl_optax.methods.gram.mgda import mgda
from mtl_optax.methods.gram.modo import modo
from mtl_optax.methods.gram.multibalance import multibalance
from mtl_optax.methods.gram.nash_mtl import nash_mtl
from mtl_optax.methods.gram.ol_aux import ol_aux
from mtl_optax.methods.gram.pcd import pcd
from mtl_optax.methods.gram.pcgrad import pcgrad
from mtl_optax.methods.gram.sdmgrad import sdmgrad
from mtl_optax.methods.gram.upgrad import dualproj, upgrad
from mtl_optax.methods.losses.bandit_mtl import bandit_mtl
from mtl_optax.methods.losses.cosmos import cosmos
from mtl_optax.methods.losses.dwa import dwa
from mtl_optax.methods.losses.famo import famo
from mtl_optax.methods.losses.fixed_weights import fixed_weights
from mtl_optax.methods.losses.gls import gls
from mtl_optax.methods.losses.go4align import go4align
from mtl_optax.methods.losses.imtl_l import imtl_l
from mtl_optax.methods.losses.lagrangian import lagrangian
from mtl_optax.methods.losses.mean_tasks import mean_tasks
from mtl_optax.methods.losses.ntk import ntk
from mtl_optax.methods.losses.pbi import pbi
from mtl_optax.methods.losses.relobralo import relobralo
from mtl_optax.methods.losses.rlw import rlw
from mtl_optax.methods.losses.scale_invariant import scale_invariant
from mtl_optax.methods.losses.softadapt import softadapt
from mtl_optax.methods.losses.stch import stch
from mtl_optax.methods.losses.sum_tasks import sum_tasks
from mtl_optax.methods.losses.uncertainty import uncertainty
from mtl_optax.methods.norms.gradnorm import gradnorm
from mtl_optax.methods.norms.inverse_norm import inverse_norm
from mtl_optax.methods.norms.metabalance import metabalance
from mtl_optax.methods.norms.rotograd_scale import rotograd_scale


class MethodRow(NamedTuple):
    """A row of the table.

    Attributes:
      name: the public name.
      factory: the public factory, `factory(tasks, ...) -> Method`.
      needs: what the method reads by default: "losses", "norms", "gram" or "gradients" (element by
        element).
      family: the folder of the method, which determines its cost: "losses", "norms", "gram" or
        "gradients" (element by element, or with buffers of their size).
      scale: "sum" if the update of T equal gradients is T times this gradient, "mean" if it is this
        gradient, "own" if the method determines the length.
      reference: authors, title and year.
    """

    name: str
    factory: Callable[..., Method]
    needs: tuple[str, ...]
    family: str
    scale: str
    reference: str


_CARUANA = "Caruana, Multitask Learning, 1997"
_KURIN = "Kurin et al., In Defense of the Unitary Scalarization, 2022"

# fmt: off
_ROWS = (
    (fixed_weights, (), "losses", "sum", _KURIN),
    (mean_tasks, (), "losses", "mean", _CARUANA),
    (sum_tasks, (), "losses", "sum", _CARUANA),
    (bandit_mtl, ("losses",), "losses", "own", "Mao et al., BanditMTL, 2021"),
    (cosmos, ("losses",), "losses", "own", "Ruchte and Grabocka, Scalable Pareto Front Approximation, 2021"),
    (dwa, ("losses",), "losses", "sum", "Liu et al., End-to-End Multi-Task Learning with Attention, 2019"),
    (famo, ("losses",), "losses", "mean", "Liu et al., FAMO, 2023"),
    (gls, ("losses",), "losses", "own", "Chennupati et al., MultiNet++, 2019"),
    (go4align, ("losses",), "losses", "own", "Shen et al., GO4Align, 2024"),
    (imtl_l, ("losses",), "losses", "own", "Liu et al., Towards Impartial Multi-Task Learning, 2021"),
    (lagrangian, ("losses",), "losses", "own", "Platt and Barr, Constrained Differential Optimization, 1988"),
    (ntk, (), "losses", "sum", "Wang, Yu and Perdikaris, When and Why PINNs Fail to Train, 2022"),
    (pbi, ("losses",), "losses", "own", "Zhang and Li, MOEA/D, 2007"),
    (relobralo, ("losses",), "losses", "sum", "Bischof and Kraus, Multi-Objective Loss Balancing, 2021"),
    (rlw, (), "losses", "mean", "Lin et al., Reasonable Effectiveness of Random Weighting, 2022"),
    (scale_invariant, ("losses",), "losses", "own", "Navon et al., Multi-Task Learning as a Bargaining Game, 2022"),
    (softadapt, ("losses",), "losses", "mean", "Heydari et al., SoftAdapt, 2019"),
    (stch, ("losses",), "losses", "own", "Lin et al., Smooth Tchebycheff Scalarization, 2024"),
    (uncertainty, ("losses",), "losses", "own", "Kendall et al., Multi-Task Learning Using Uncertainty, 2018"),
    (gradnorm, ("losses", "norms"), "norms", "sum", "Chen et al., GradNorm, 2018"),
    (inverse_norm, ("norms",), "norms", "sum", "Wang et al., An Expert's Guide to Training PINNs, 2023"),
    (metabalance, ("norms",), "norms", "sum", "He et al., MetaBalance, 2022"),
    (rotograd_scale, ("norms",), "norms", "sum", "Javaloy and Valera, RotoGrad, 2022"),
    (aligned_mtl, ("gram",), "gram", "sum", "Senushkin et al., Independent Component Alignment, 2023"),
    (cagrad, ("gram",), "gram", "own", "Liu et al., Conflict-Averse Gradient Descent, 2021"),
    (conflict_free, ("gram",), "gram", "sum", "Liu, Chu and Thuerey, ConFIG, 2024"),
    (cr_mogm, ("gram",), "gram", "mean", "Zhou et al., On the Convergence of Stochastic Multi-Objective Gradient Manipulation, 2022"),
    (dualproj, ("gram",), "gram", "mean", "Lopez-Paz and Ranzato, Gradient Episodic Memory, 2017"),
    (emtl, ("losses", "gram"), "gram", "own", "Yuan et al., Equitable Multi-Task Learning, 2023"),
    (fairgrad, ("gram",), "gram", "own", "Ban and Ji, Fair Resource Allocation in Multi-Task Learning, 2024"),
    (grad_similarity, ("gram",), "gram", "sum", "Du et al., Adapting Auxiliary Losses Using Gradient Similarity, 2018"),
    (grad_surgery, ("gram",), "gram", "sum", "He et al., MetaBalance, 2022, equation 7"),
    (grad_vaccine, ("gram",), "gram", "sum", "Wang et al., Gradient Vaccine, 2021"),
    (imtl, ("losses", "gram"), "gram", "own", "Liu et al., Towards Impartial Multi-task Learning, 2021"),
    (imtl_g, ("gram",), "gram", "mean", "Liu et al., Towards Impartial Multi-task Learning, 2021"),
    (krum, ("gram",), "gram", "mean", "Blanchard et al., Machine Learning with Adversaries, 2017"),
    (mgda, ("gram",), "gram", "mean", "Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization, 2018"),
    (modo, ("gram",), "gram", "mean", "Chen et al., Three-Way Trade-Off in Multi-Objective Learning, 2023"),
    (multibalance, ("gram",), "gram", "mean", "He et al., MultiBalance, 2024"),
    (nash_mtl, ("gram",), "gram", "own", "Navon et al., Multi-Task Learning as a Bargaining Game, 2022"),
    (ol_aux, ("gram",), "gram", "sum", "Lin et al., Adaptive Auxiliary Task Weighting for Reinforcement Learning, 2019"),
    (pcd, ("gram",), "gram", "own", "Priority-Constrained Descent, 2026"),
    (pcgrad, ("gram",), "gram", "sum", "Yu et al., Gradient Surgery for Multi-Task Learning, 2020"),
    (sdmgrad, ("gram",), "gram", "mean", "Xiao, Ban and Ji, Direction-oriented Multi-objective Learning, 2023"),
    (upgrad, ("gram",), "gram", "mean", "Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024"),
    (adatask, ("gradients",), "gradients", "own", "Yang et al., AdaTask, 2023"),
    (db_mtl, ("losses", "norms"), "gradients", "sum", "Lin et al., Dual-Balancing for Multi-Task Learning, 2023"),
    (excess_mtl, ("norms",), "gradients", "mean", "He et al., Robust Multi-Task Learning with Excess Risks, 2024"),
    (graddrop, ("gradients",), "gradients", "sum", "Chen et al., Just Pick a Sign, 2020"),
    (lr_annealing, ("gradients",), "gradients", "sum", "Wang, Teng and Perdikaris, Gradient Flow Pathologies, 2021"),
    (moco, ("gram",), "gradients", "mean", "Fernando et al., Mitigating Gradient Bias in Multi-objective Learning, 2023"),
    (scale_by_mtadam, ("gradients",), "gradients", "own", "Malkiel and Wolf, MTAdam, 2021"),
    (trimmed_mean, ("gradients",), "gradients", "mean", "Yin et al., Byzantine-Robust Distributed Learning, 2018"),
)
# fmt: on

METHODS: dict[str, MethodRow] = {row[0].__name__: MethodRow(row[0].__name__, *row) for row in _ROWS}
"""All methods by name."""
