"""Multi-task gradient balancing for JAX, as optax transformations that remove the task axis."""

from mtl_optax.checking import check
from mtl_optax.core.method import Method, MethodOptions
from mtl_optax.core.shared_rules import BargainingState
from mtl_optax.core.state import BalanceState
from mtl_optax.core.trained_values import TrainedState
from mtl_optax.methods.gradients.adatask import adatask
from mtl_optax.methods.gradients.db_mtl import db_mtl
from mtl_optax.methods.gradients.excess_mtl import ExcessMTLState, excess_mtl
from mtl_optax.methods.gradients.graddrop import graddrop
from mtl_optax.methods.gradients.lr_annealing import LRAnnealingState, lr_annealing
from mtl_optax.methods.gradients.moco import MoCoState, moco
from mtl_optax.methods.gradients.scale_by_mtadam import MTAdamState, scale_by_mtadam
from mtl_optax.methods.gradients.trimmed_mean import trimmed_mean
from mtl_optax.methods.gram.aligned_mtl import aligned_mtl
from mtl_optax.methods.gram.cagrad import cagrad
from mtl_optax.methods.gram.conflict_free import conflict_free
from mtl_optax.methods.gram.cr_mogm import CRMOGMState, cr_mogm
from mtl_optax.methods.gram.emtl import EMTLState, emtl
from mtl_optax.methods.gram.fairgrad import fairgrad
from mtl_optax.methods.gram.grad_similarity import grad_similarity
from mtl_optax.methods.gram.grad_surgery import grad_surgery
from mtl_optax.methods.gram.grad_vaccine import GradVaccineState, grad_vaccine
from mtl_optax.methods.gram.imtl import imtl
from mtl_optax.methods.gram.imtl_g import imtl_g
from mtl_optax.methods.gram.krum import krum
from mtl_optax.methods.gram.mgda import mgda
from mtl_optax.methods.gram.modo import MoDoState, modo
from mtl_optax.methods.gram.multibalance import MultiBalanceState, multibalance
from mtl_optax.methods.gram.nash_mtl import nash_mtl
from mtl_optax.methods.gram.ol_aux import OLAuxState, OLAuxWindow, ol_aux
from mtl_optax.methods.gram.pcd import PCDState, pcd
from mtl_optax.methods.gram.pcgrad import pcgrad
from mtl_optax.methods.gram.sdmgrad import SDMGradState, sdmgrad
from mtl_optax.methods.gram.upgrad import dualproj, upgrad
from mtl_optax.methods.losses.bandit_mtl import BanditMTLState, bandit_mtl
from mtl_optax.methods.losses.cosmos import cosmos
from mtl_optax.methods.losses.dwa import DWAState, dwa
from mtl_optax.methods.losses.famo import FAMOState, famo
from mtl_optax.methods.losses.fixed_weights import fixed_weights
from mtl_optax.methods.losses.gls import gls
from mtl_optax.methods.losses.go4align import GO4AlignState, go4align
from mtl_optax.methods.losses.imtl_l import imtl_l
from mtl_optax.methods.losses.lagrangian import LagrangianState, lagrangian
from mtl_optax.methods.losses.mean_tasks import mean_tasks
from mtl_optax.methods.losses.ntk import NTKState, ntk, ntk_trace
from mtl_optax.methods.losses.pbi import pbi
from mtl_optax.methods.losses.relobralo import ReLoBRaLoState, relobralo
from mtl_optax.methods.losses.rlw import rlw
from mtl_optax.methods.losses.scale_invariant import scale_invariant
from mtl_optax.methods.losses.softadapt import SoftAdaptState, softadapt
from mtl_optax.methods.losses.stch import STCHState, stch
from mtl_optax.methods.losses.sum_tasks import sum_tasks
from mtl_optax.methods.losses.uncertainty import uncertainty
from mtl_optax.methods.norms.gradnorm import GradNormState, gradnorm
from mtl_optax.methods.norms.inverse_norm import InverseNormState, inverse_norm
from mtl_optax.methods.norms.metabalance import MetaBalanceState, metabalance
from mtl_optax.methods.norms.rotograd_scale import RotoGradState, rotograd_scale
from mtl_optax.methods.table import METHODS, MethodRow
from mtl_optax.placement.fork.carrier import fork_init, fork_state
from mtl_optax.placement.fork.operator import ForkToken, fork, join
from mtl_optax.placement.losses import weigh_losses
from mtl_optax.placement.one_task import one_task_value_and_grad
from mtl_optax.placement.parameters import (
    per_task_value_and_grad,
    split_value_and_grad,
    stack_tasks,
)
from mtl_optax.placement.representation import fork_value_and_grad
from mtl_optax.placement.weighted import weighted_value_and_grad
from mtl_optax.rule import GradientAverage, StepInputs, UpdateRule, WeightRule, from_rule
from mtl_optax.states import diagnostics, head_weights
from mtl_optax.wrappers.accumulate import AccumulateState, accumulate
from mtl_optax.wrappers.drop_extra_args import drop_extra_args
from mtl_optax.wrappers.per_task import per_task
from mtl_optax.wrappers.remember import RememberState, remember
from mtl_optax.wrappers.skip_nonfinite import SkipNonfiniteState, skip_nonfinite

__version__ = "0.1.0"

# In the groups of the documentation.
__all__ = [  # noqa: RUF022
    "__version__",
    # The table of methods, and the type of all of them.
    "METHODS",
    "MethodRow",
    "Method",
    "MethodOptions",
    # Methods on losses or nothing.
    "bandit_mtl",
    "cosmos",
    "dwa",
    "famo",
    "fixed_weights",
    "gls",
    "go4align",
    "imtl_l",
    "lagrangian",
    "mean_tasks",
    "ntk",
    "ntk_trace",
    "pbi",
    "relobralo",
    "rlw",
    "scale_invariant",
    "softadapt",
    "stch",
    "sum_tasks",
    "uncertainty",
    # Methods on norms.
    "gradnorm",
    "inverse_norm",
    "metabalance",
    "rotograd_scale",
    # Methods on the Gram matrix.
    "aligned_mtl",
    "cagrad",
    "conflict_free",
    "cr_mogm",
    "dualproj",
    "emtl",
    "fairgrad",
    "grad_similarity",
    "grad_surgery",
    "grad_vaccine",
    "imtl",
    "imtl_g",
    "krum",
    "mgda",
    "modo",
    "multibalance",
    "nash_mtl",
    "ol_aux",
    "pcd",
    "pcgrad",
    "sdmgrad",
    "upgrad",
    # Methods on gradients element by element, or with buffers of their size.
    "adatask",
    "db_mtl",
    "excess_mtl",
    "graddrop",
    "lr_annealing",
    "moco",
    "scale_by_mtadam",
    "trimmed_mean",
    # Placement: parameters, losses, representation.
    "per_task_value_and_grad",
    "split_value_and_grad",
    "weighted_value_and_grad",
    "stack_tasks",
    "one_task_value_and_grad",
    "weigh_losses",
    "fork_value_and_grad",
    # The fork as an operator.
    "fork",
    "join",
    "fork_init",
    "fork_state",
    "ForkToken",
    # Wrappers.
    "accumulate",
    "drop_extra_args",
    "per_task",
    "remember",
    "skip_nonfinite",
    # Reading states, and checking a whole optimizer.
    "check",
    "diagnostics",
    "head_weights",
    # A method of one's own.
    "from_rule",
    "WeightRule",
    "UpdateRule",
    "GradientAverage",
    "StepInputs",
    # States.
    "AccumulateState",
    "RememberState",
    "BalanceState",
    "BanditMTLState",
    "BargainingState",
    "CRMOGMState",
    "DWAState",
    "EMTLState",
    "ExcessMTLState",
    "FAMOState",
    "GO4AlignState",
    "GradNormState",
    "SoftAdaptState",
    "ReLoBRaLoState",
    "NTKState",
    "LagrangianState",
    "LRAnnealingState",
    "InverseNormState",
    "GradVaccineState",
    "MTAdamState",
    "MetaBalanceState",
    "MoCoState",
    "MoDoState",
    "MultiBalanceState",
    "OLAuxState",
    "OLAuxWindow",
    "PCDState",
    "RotoGradState",
    "SDMGradState",
    "STCHState",
    "SkipNonfiniteState",
    "TrainedState",
]
