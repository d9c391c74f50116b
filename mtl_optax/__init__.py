"""Multi-task gradient balancing for JAX, as optax transformations that remove the task axis."""

from mtl_optax.combinators import (
    AccumulateState,
    SkipNonfiniteState,
    accumulate,
    drop_extra_args,
    fixed_weights,
    mean_tasks,
    per_task,
    skip_nonfinite,
    sum_tasks,
)
from mtl_optax.diagnostics import diagnostics, head_weights
from mtl_optax.from_gradients import TaskGradients, from_gradients
from mtl_optax.from_rule import BalanceState, Evidence, Rule, WeightingOptions, from_rule
from mtl_optax.method import Method
from mtl_optax.methods import METHODS
from mtl_optax.methods.from_gradients.adatask import adatask
from mtl_optax.methods.from_gradients.db_mtl import DBMTLState, db_mtl
from mtl_optax.methods.from_gradients.excess_mtl import ExcessMTLState, excess_mtl
from mtl_optax.methods.from_gradients.graddrop import graddrop
from mtl_optax.methods.from_gradients.moco import MoCoState, moco
from mtl_optax.methods.from_gradients.mtadam import MTAdamState, mtadam
from mtl_optax.methods.from_gradients.trimmed_mean import trimmed_mean
from mtl_optax.methods.from_gram.aligned_mtl import aligned_mtl
from mtl_optax.methods.from_gram.cagrad import cagrad
from mtl_optax.methods.from_gram.config import config
from mtl_optax.methods.from_gram.cr_mogm import CRMOGMState, cr_mogm
from mtl_optax.methods.from_gram.emtl import EMTLState, emtl
from mtl_optax.methods.from_gram.fairgrad import BargainingState, fairgrad
from mtl_optax.methods.from_gram.grad_similarity import grad_similarity
from mtl_optax.methods.from_gram.grad_surgery import grad_surgery
from mtl_optax.methods.from_gram.grad_vaccine import GradVaccineState, grad_vaccine
from mtl_optax.methods.from_gram.imtl import imtl
from mtl_optax.methods.from_gram.imtl_g import imtl_g
from mtl_optax.methods.from_gram.krum import krum
from mtl_optax.methods.from_gram.mgda import mgda
from mtl_optax.methods.from_gram.modo import MoDoState, modo
from mtl_optax.methods.from_gram.multibalance import MultiBalanceState, multibalance
from mtl_optax.methods.from_gram.nash_mtl import nash_mtl
from mtl_optax.methods.from_gram.ol_aux import FilteredOLAuxState, OLAuxState, ol_aux
from mtl_optax.methods.from_gram.pcd import PCDState, pcd
from mtl_optax.methods.from_gram.pcgrad import pcgrad
from mtl_optax.methods.from_gram.sdmgrad import SDMGradState, sdmgrad
from mtl_optax.methods.from_gram.upgrad import dualproj, upgrad
from mtl_optax.methods.from_losses.bandit_mtl import BanditMTLState, bandit_mtl
from mtl_optax.methods.from_losses.cosmos import cosmos
from mtl_optax.methods.from_losses.dwa import DWAState, dwa
from mtl_optax.methods.from_losses.famo import FAMOState, famo
from mtl_optax.methods.from_losses.gls import gls
from mtl_optax.methods.from_losses.go4align import GO4AlignState, go4align
from mtl_optax.methods.from_losses.imtl_l import imtl_l
from mtl_optax.methods.from_losses.pbi import pbi
from mtl_optax.methods.from_losses.rlw import rlw
from mtl_optax.methods.from_losses.scale_invariant import scale_invariant
from mtl_optax.methods.from_losses.stch import STCHState, stch
from mtl_optax.methods.from_losses.uncertainty import uncertainty
from mtl_optax.methods.from_norms.gradnorm import GradNormState, gradnorm
from mtl_optax.methods.from_norms.metabalance import MetaBalanceState, metabalance
from mtl_optax.methods.from_norms.rotograd_scale import RotoGradState, rotograd_scale
from mtl_optax.placement.balanced import balanced_value_and_grad
from mtl_optax.placement.carrier import fork_init, fork_state
from mtl_optax.placement.losses import weigh_losses
from mtl_optax.placement.parameters import per_task_value_and_grad, split_value_and_grad
from mtl_optax.placement.representation import ForkToken, fork, fork_value_and_grad, join
from mtl_optax.trained_values import TrainedState

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "AccumulateState",
    "BalanceState",
    "BanditMTLState",
    "BargainingState",
    "CRMOGMState",
    "DBMTLState",
    "DWAState",
    "EMTLState",
    "Evidence",
    "ExcessMTLState",
    "FAMOState",
    "FilteredOLAuxState",
    "ForkToken",
    "GO4AlignState",
    "GradNormState",
    "GradVaccineState",
    "MTAdamState",
    "MetaBalanceState",
    "Method",
    "MoCoState",
    "MoDoState",
    "MultiBalanceState",
    "OLAuxState",
    "PCDState",
    "RotoGradState",
    "Rule",
    "SDMGradState",
    "STCHState",
    "SkipNonfiniteState",
    "TaskGradients",
    "TrainedState",
    "WeightingOptions",
    "__version__",
    "accumulate",
    "adatask",
    "aligned_mtl",
    "balanced_value_and_grad",
    "bandit_mtl",
    "cagrad",
    "config",
    "cosmos",
    "cr_mogm",
    "db_mtl",
    "diagnostics",
    "drop_extra_args",
    "dualproj",
    "dwa",
    "emtl",
    "excess_mtl",
    "fairgrad",
    "famo",
    "fixed_weights",
    "fork",
    "fork_init",
    "fork_state",
    "fork_value_and_grad",
    "from_gradients",
    "from_rule",
    "gls",
    "go4align",
    "grad_similarity",
    "grad_surgery",
    "grad_vaccine",
    "graddrop",
    "gradnorm",
    "head_weights",
    "imtl",
    "imtl_g",
    "imtl_l",
    "join",
    "krum",
    "mean_tasks",
    "metabalance",
    "mgda",
    "moco",
    "modo",
    "mtadam",
    "multibalance",
    "nash_mtl",
    "ol_aux",
    "pbi",
    "pcd",
    "pcgrad",
    "per_task",
    "per_task_value_and_grad",
    "rlw",
    "rotograd_scale",
    "scale_invariant",
    "sdmgrad",
    "skip_nonfinite",
    "split_value_and_grad",
    "stch",
    "sum_tasks",
    "trimmed_mean",
    "uncertainty",
    "upgrad",
    "weigh_losses",
]
