"""The defaults of the methods are those of the papers."""

import inspect

import pytest

import mtl_optax as mtl

# The numbers of the papers or of their programs. Another one changes what everybody trains with.
DEFAULTS = {
    "bandit_mtl": {"step_size": 0.5, "kl_radius": 1.2},
    "cagrad": {"c": 0.4, "rescale": 1},
    "cosmos": {"lam": 1.0},
    "cr_mogm": {"ema_decay": 0.9},
    "db_mtl": {"ema_decay": 0.9, "beta_sigma": 0.0, "log_losses": True, "norm": "max"},
    "dwa": {"temperature": 2.0, "window": 1},
    "emtl": {"epsilon": 0.0, "rho": 0.1, "kl_radius": None, "step_size": 0.5},
    "epo": {"preference": None, "tolerance": 1e-4},
    "excess_mtl": {"step_size": 1.0, "warmup_steps": 0, "eps": 1e-7},
    "fairgrad": {"alpha": 1.0},
    "famo": {"gamma": 1e-2, "weight_lr": 0.025, "min_losses": 0.0},
    "go4align": {"step_size": 1e-4},
    "grad_similarity": {"mode": "unweighted"},
    "grad_vaccine": {"ema_decay": 0.99, "order": "random", "eps": 1e-8},
    "gradcraft": {"relax_factor": 1.0, "margin": 0.0, "ema_decay": 0.0},
    "graddrop": {"leak": 0.0},
    "gradnorm": {"alpha": 1.5},
    "igb": {"warmup_steps": 0, "base_steps": 1},
    "inverse_norm": {"reference": "mean", "power": 1.0, "ema_decay": 0.9, "eps": 0.0},
    "lagrangian": {"damping": 0.0},
    "ldc_mtl": {"penalty": 0.01},
    "lr_annealing": {"ema_decay": 0.9},
    "metabalance": {"relax_factor": 0.7, "strategy": "both", "ema_decay": 0.9},
    "mgda": {"normalize": "none"},
    "moco": {"ema_decay": 0.9, "weight_lr": 0.1, "rho": 0.1},
    "modo": {"weight_lr": 0.1, "rho": 0.1},
    "multibalance": {
        "weight_lr": 1.0,
        "prior": None,
        "prior_strength": 0.1,
        "ema_decay": 0.9,
        "direction": "cosine",
        "ema_init": "first",
    },
    "ntk": {"reference": "sum", "ema_decay": 0.0},
    "ol_aux": {"weight_lr": 0.005, "update_every": 5, "filter_window": 1, "nonnegative": True},
    "pbi": {"theta": 5.0, "reference": 0.0},
    "pcd": {"tau": 0.02, "ema_decay": 0.999, "eps": 1e-8},
    "pcgrad": {"order": "random"},
    "relobralo": {"ema_decay": 0.999, "rho": 0.999, "temperature": 1.0},
    "rotograd_scale": {"burn_in": 20},
    "scale_by_mtadam": {"b1": 0.9, "b2": 0.999, "b3": 0.9, "eps": 1e-8},
    "scale_by_pub": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "scale_invariant": {"eps": 0.0},
    "sdmgrad": {"lam": 0.3, "num_steps": 20, "step_size": 10.0, "momentum": 0.5},
    "softadapt": {"beta": 0.1, "variant": "original"},
    "stch": {"mu": 1.0, "warmup_steps": 0, "nadir_steps": 1},
    "uncertainty": {"form": "half_logvar", "init": 0.0},
    "uw_so": {"temperature": 1.0},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_papers(name):
    parameters = inspect.signature(mtl.METHODS[name].factory).parameters
    assert {key: parameters[key].default for key in DEFAULTS[name]} == DEFAULTS[name]
