"""What the tests alone know of each method: how to make one, and which properties it has."""

import optax
import pytest

import mtl_optax as mtl

# What a property means is in test_properties.py. "non_conflicting": no task's loss rises to first order;
# "permutation": tasks in another order give the same update; "scale": all gradients times c give the
# update times c; "task_scale": one task's loss, and so its gradient, times c > 0 changes nothing;
# "simplex": weights >= 0 that sum to 1; "stationary": 0 in the convex hull gives update 0; "split": how
# vectors are cut into leaves does not matter.
PROPERTIES = {
    "adatask": {"permutation", "split"},
    "aligned_mtl": {"permutation", "scale", "split"},
    "bandit_mtl": {"permutation", "scale", "split"},
    "cagrad": {"permutation", "scale", "split"},
    "conflict_free": {"permutation", "scale", "split"},
    "cosmos": {"permutation", "scale", "split"},
    "cr_mogm": {"permutation", "scale", "simplex", "split"},
    "db_mtl": {"permutation", "split", "task_scale"},
    "dualproj": {"non_conflicting", "permutation", "scale", "split"},
    "dwa": {"permutation", "scale", "split"},
    "emtl": {"permutation", "split", "task_scale"},
    "epo": {"permutation", "scale", "simplex", "split"},
    "excess_mtl": {"permutation", "simplex", "split"},
    "fairgrad": {"non_conflicting", "permutation", "split", "stationary", "task_scale"},
    "famo": {"permutation", "scale", "simplex", "split"},
    "fixed_weights": {"scale", "split"},
    "gls": {"permutation", "scale", "split"},
    "go4align": {"permutation", "scale", "split"},
    "grad_similarity": {"scale", "split"},
    "grad_surgery": {"scale", "split"},
    "grad_vaccine": {"split"},
    "gradcraft": {"permutation", "scale", "split"},
    "graddrop": {"permutation", "scale"},
    "gradnorm": {"permutation", "split"},
    "igb": {"permutation", "scale", "split", "task_scale"},
    "imtl": {"permutation", "scale", "split"},
    "imtl_g": {"permutation", "scale", "split"},
    "imtl_l": {"permutation", "scale", "split"},
    "inverse_norm": {"permutation", "scale", "split"},
    "lagrangian": {"scale", "split"},
    "ldc_mtl": {"scale", "split"},
    "lr_annealing": {"scale", "split"},
    "ntk": {"permutation", "scale", "split"},
    "relobralo": {"permutation", "scale", "split"},
    "softadapt": {"permutation", "scale", "simplex", "split"},
    "krum": {"permutation", "scale", "simplex", "split"},
    "mean_tasks": {"permutation", "scale", "simplex", "split"},
    "metabalance": {"scale"},
    "mgda": {"non_conflicting", "permutation", "scale", "simplex", "split", "stationary"},
    "moco": {"permutation", "simplex", "split"},
    "modo": {"permutation", "simplex", "split"},
    "multibalance": {"permutation", "scale", "split"},
    "nash_mtl": {"non_conflicting", "permutation", "split", "stationary", "task_scale"},
    "ol_aux": {"split"},
    "pbi": {"permutation", "scale", "split"},
    "pcd": {"split"},
    "pcgrad": {"scale", "split"},
    "rlw": {"scale", "simplex", "split"},
    "rotograd_scale": {"permutation", "scale", "split"},
    "scale_by_mtadam": set(),
    "scale_by_pub": {"permutation", "split"},
    "scale_invariant": {"permutation", "scale", "split", "task_scale"},
    "sdmgrad": {"simplex"},
    "stch": {"permutation", "scale", "split", "task_scale"},
    "sum_tasks": {"permutation", "scale", "split"},
    "trimmed_mean": {"permutation", "scale", "simplex", "split"},
    "uncertainty": {"permutation", "scale", "split"},
    "uw_so": {"permutation", "scale", "simplex", "split"},
    "upgrad": {"non_conflicting", "permutation", "scale", "split"},
}
# Those whose result depends on a random draw.
RANDOM = {"grad_vaccine", "graddrop", "pcgrad", "relobralo", "rlw"}
# Those whose tasks are one target and its auxiliaries.
WITH_TARGET = {"grad_similarity", "grad_surgery", "lr_annealing", "metabalance", "ol_aux", "pcd"}
# One of each kind, for what the shared code decides whatever the method.
SAMPLE = ("metabalance", "multibalance", "mgda", "gradnorm")
# And of each kind of mathematics, for the properties that a method has of its own.
BROAD = (*SAMPLE, "upgrad", "db_mtl", "moco", "graddrop", "famo", "scale_by_mtadam")
# Where a factory has no default for an argument, or none that fits every number of tasks.
_ARGUMENTS = {
    "adatask": lambda count: {"inner": optax.scale_by_adam()},
    "fixed_weights": lambda count: {"weights": [1 / (1 + t) for t in range(count)]},
    "go4align": lambda count: {"num_groups": min(2, count)},
    "lagrangian": lambda count: {"limits": [None] + [1.0] * (count - 1), "step_size": 0.1},
    "trimmed_mean": lambda count: {"trim_number": min(1, (count - 1) // 2)},
}


def every_method(quick=None, group=""):
    """All methods for `parametrize`, those not in `quick` as slow tests.

    A method's tests run on one worker, which compiles it once. Files that share nothing differ in `group`.
    """
    return [
        pytest.param(
            name,
            id=name,
            marks=[
                pytest.mark.xdist_group(f"{group}{name}"),
                *([pytest.mark.slow] if quick is not None and name not in quick else []),
            ],
        )
        for name in sorted(mtl.METHODS)
    ]


def make(name, tasks, **options):
    """A method by name for a number of tasks or their names; `options` override the arguments above.

    Where tasks have names, the target is the first one unless `options` say another.
    """
    count = tasks if isinstance(tasks, int) else len(tasks)
    arguments = _ARGUMENTS.get(name, lambda count: {})(count)
    if name in WITH_TARGET and not isinstance(tasks, int):
        arguments["target"] = min(tasks)
    return mtl.METHODS[name].factory(tasks, **(arguments | options))
