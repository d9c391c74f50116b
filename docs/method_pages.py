"""Writes one page a method, and their overview, from `mtl_optax.METHODS` and the docstrings.

`conf.py` calls `write` before each build; the pages are not under version control.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import mtl_optax as mtl

LOOKS_AT = {
    "losses": "losses",
    "norms": "gradient norms",
    "gram": "the Gram matrix of the gradients",
    "gradients": "the gradients element by element",
}
FAMILIES = {
    "losses": (
        "Losses or nothing",
        "These methods fit all three places, and one backward pass is enough for them.",
    ),
    "norms": (
        "Norms of the task gradients",
        "They read the T gradients once for their norms, and once for the weighted sum.",
    ),
    "gram": (
        "Gram matrix of the task gradients",
        "They read the T gradients once for T(T+1)/2 inner products, and once for the weighted sum. "
        "What they solve is a problem of size T.",
    ),
    "gradients": (
        "Gradients element by element, or buffers of their size",
        "They need all entries of the T gradients, or keep copies of them from step to step.",
    ),
}
SCALES = {
    "sum": "comparable to the gradient of the summed losses",
    "mean": "comparable to the gradient of the mean loss, about 1/T of the sum",
    "own": "set by the method itself: tune the learning rate anew",
}
PLACES = {
    "losses": "parameters, representation, losses",
    "others": "parameters, representation",
}
# Programs by the authors of the papers; GitHub repositories.
AUTHORS_CODE = {
    "adatask": "EnnengYang/AdaTask",
    "aligned_mtl": "SamsungLabs/MTL",
    "cagrad": "Cranial-XIX/CAGrad",
    "conflict_free": "tum-pbs/ConFIG",
    "db_mtl": "median-research-group/LibMTL",
    "dualproj": "TorchJD/torchjd",
    "dwa": "lorenmt/mtan",
    "epo": "dbmptr/EPOSearch",
    "excess_mtl": "yifei-he/ExcessMTL",
    "fairgrad": "OptMN-Lab/fairgrad",
    "famo": "Cranial-XIX/FAMO",
    "go4align": "autumn9999/GO4Align",
    "gradcraft": "baiyimeng/GradCraft",
    "igb": "YanqiDai/IGB4MTL",
    "inverse_norm": "PredictiveIntelligenceLab/jaxpi",
    "ldc_mtl": "OptMN-Lab/LDC-MTL",
    "lr_annealing": "PredictiveIntelligenceLab/GradientPathologiesPINNs",
    "metabalance": "facebookresearch/MetaBalance",
    "mgda": "isl-org/MultiObjectiveOptimization",
    "moco": "heshandevaka/Trade-Off-MOL",
    "modo": "heshandevaka/Trade-Off-MOL",
    "nash_mtl": "AvivNavon/nash-mtl",
    "ntk": "PredictiveIntelligenceLab/PINNsNTK",
    "ol_aux": "Xingyu-Lin/auxiliary-tasks-rl",
    "pcgrad": "tianheyu927/PCGrad",
    "relobralo": "rbischof/relative_balancing",
    "rlw": "median-research-group/LibMTL",
    "rotograd_scale": "adrianjav/rotograd",
    "scale_by_mtadam": "ItzikMalkiel/MTAdam",
    "scale_by_pub": "yjdy/Multitask-Optimization-Recommendation-Library",
    "sdmgrad": "OptMN-Lab/sdmgrad",
    "softadapt": "dr-aheydari/SoftAdapt",
    "stch": "Xi-L/STCH",
    "upgrad": "TorchJD/torchjd",
}
# What a reader of one method must know first.
NOTES = {
    "metabalance": [
        '**Weights:** one per task *and tensor*; `blocks="all"` makes it one per task, and a callable '
        "one per task and group of tensors.",
        "**Heads:** keep weight 1 with one weight per tensor: in the head of an auxiliary task the target "
        'has no gradient, so that there is no magnitude to match. With `blocks="all"` on all parameters '
        "heads are weighted like the rest; `split_value_and_grad` keeps them out.",
    ],
}
# How a method runs on the toy problem where its defaults are not all; see toy_paths.py.
RUN_WITH = {
    "adatask": "`adatask` with `inner=optax.scale_by_adam()`, whose steps are taken as they are",
    "fixed_weights": "`fixed_weights` with `weights=[10, 1]` and Adam",
    "go4align": "`go4align` with `num_groups=2` and Adam",
    "lagrangian": "`lagrangian` with `limits=[None, 5.0]`, `step_size=0.01` and Adam",
    "ntk": "`ntk` without `traces=`, so that it is the plain sum, and Adam",
    "scale_by_mtadam": "the defaults of `scale_by_mtadam`, whose steps are taken as they are",
    "scale_by_pub": "the defaults of `scale_by_pub`, whose steps are taken as they are",
    "trimmed_mean": "`trimmed_mean` with `trim_number=0`, which is the plain mean, and Adam",
}


def places(row: mtl.MethodRow) -> str:
    """Where a method can stand."""
    return PLACES["losses" if set(row.needs) <= {"losses"} else "others"]


def facts(row: mtl.MethodRow) -> str:
    """What the table knows of a method, as a list."""
    looks_at = ", ".join(LOOKS_AT[need] for need in row.needs) or "nothing"
    lines = [
        f"**Looks at:** {looks_at}.",
        f"**Places:** {places(row)}.",
        f"**Scale:** {SCALES[row.scale]}.",
        f"**Paper:** {row.reference}.",
    ]
    if row.name in AUTHORS_CODE:
        name = AUTHORS_CODE[row.name]
        lines.append(f"**Authors' program:** [{name}](https://github.com/{name}).")
    if "target" in inspect.signature(row.factory).parameters:
        lines.append(
            "**Target:** `target=`, a name, which must be given where tasks have names; with a number of "
            "tasks an index, 0 by default."
        )
    lines += NOTES.get(row.name, [])
    return "\n".join(f"- {line}" for line in lines)


def path_section(name: str, ends: dict[str, list[list[float]]]) -> str:
    """The picture of the method's path, and where its five runs ended."""
    if name not in ends:
        return ""
    rows = "\n".join(
        f"| {number} | {first:.2f} | {second:.2f} | {(first + second) / 2:.2f} |"
        for number, (first, second) in enumerate(ends[name], 1)
    )
    run_with = RUN_WITH.get(name, f"the defaults of `{name}` and Adam")
    return f"""
## Path on the toy problem

Two parameters, two losses, five starting points ([the problem](toy_problem.md)); {run_with}.

![The five paths of {name} from the black dots to the red stars](paths/{name}.png){{width=420px}}

| start | first loss | second loss | mean |
|---|---:|---:|---:|
{rows}

The best mean is -15.1, in the middle of the Pareto set.
"""


def page(row: mtl.MethodRow, ends: dict[str, list[list[float]]]) -> str:
    """The page of one method."""
    return f"""# {row.name}

{facts(row)}

```{{eval-rst}}
.. autofunction:: mtl_optax.{row.name}
```
{path_section(row.name, ends)}
## Absent and non-finite tasks

What is the same for all methods: a task that is not in `active=` has weight 0, does not count in means,
norms and inner products, and what the method remembers of it stays as it was. A task whose gradient is not
finite (or its loss, where the method reads losses) is treated as absent in that step and counted in
`diagnostics(state)["skipped"]`. The notes above say what a zero gradient does.
"""


def overview() -> str:
    """The table of all methods, by family."""
    parts = [
        "# Methods",
        "",
        f"{len(mtl.METHODS)} methods, grouped by what they look at, which is what they cost. "
        "[How to choose](../choose.md) asks the questions that lead to one of them.",
        "",
        '*Scale* says what the length of the update compares to: "sum" to the gradient of the '
        'summed losses, "mean" to that of the mean loss (about 1/T of it); "own" is set by the method. '
        "Keep it in mind when you move a learning rate from one method to another.",
        "",
    ]
    for family, (title, sentence) in FAMILIES.items():
        rows = [row for _, row in sorted(mtl.METHODS.items()) if row.family == family]
        parts += [f"## {title}", "", sentence, ""]
        parts += ["| method | looks at | scale | paper |", "|---|---|---|---|"]
        for row in rows:
            looks_at = ", ".join(row.needs) or "nothing"
            parts.append(
                f"| [{row.name}]({row.name}.md) | {looks_at} | {row.scale} | {row.reference} |"
            )
        parts += ["", "```{toctree}", ":hidden:", f":caption: {title}", ""]
        parts += [row.name for row in rows] + ["```", ""]
    return "\n".join(parts)


def public_names() -> list[str]:
    """The public names of `mtl_optax`."""
    return [
        name
        for name, value in vars(mtl).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    ]


def states() -> list[str]:
    """The public names of the states."""
    return sorted(name for name in public_names() if name.endswith(("State", "Window")))


def states_page() -> str:
    """The page of all states."""
    return "\n".join(
        [
            "# States",
            "",
            "`diagnostics` reads them; their fields are here for those who write checkpoints by hand or "
            "look at a method's memory.",
            "",
            "```{eval-rst}",
            *(f".. autoclass:: mtl_optax.{name}" for name in states()),
            "```",
            "",
        ]
    )


def write(folder: Path) -> None:
    """Writes the pages into `folder`; pages that are as they should be are left alone."""
    ends = json.loads((folder / "paths" / "ends.json").read_text("utf-8"))
    missing = mtl.METHODS.keys() - ends.keys()
    if missing:
        import toy_paths

        ends = toy_paths.main(sorted(missing))
    pages = {row.name: page(row, ends) for row in mtl.METHODS.values()}
    pages["index"] = overview()
    pages["states"] = states_page()
    for name, text in pages.items():
        file = folder / f"{name}.md"
        if not file.exists() or file.read_text("utf-8") != text:
            file.write_text(text, "utf-8")
