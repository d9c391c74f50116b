"""The reference numbers of a method, of which its file says all: a new method needs no test here.

In such a file, `golden/loss/NAME.json` or `golden/gradient/NAME.json`, the hyperparameters of a case are
arguments of the method's factory; it may name an `optimizer` and its `lr` apart. A case has one of
- `losses`, `grad_norms` or `traces` of each step, and weights: the gradients are orthogonal,
- `G`, the gradients of each step or of the only one, and weights or updates,
- `steps`, each with its gradients `G` and its update.
A file that has other hyperparameters is read by a test of its own, `test_NAME.py`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_cases import GOLDEN, error

import mtl_optax as mtl
from mtl_optax.core.method import MethodOptions

# What the reference numbers call by the letter of a paper.
ARGUMENTS: dict[str, str] = {"alpha": "ema_decay"}
OPTIMIZERS = {"adam": optax.adam, "sgd": optax.sgd}
GIVEN = ("losses", "traces", "noise")


def arguments(case: Any) -> dict[str, Any]:
    given: dict[str, Any] = case["hyperparameters"]
    given = {ARGUMENTS.get(key, key): x for key, x in given.items()}
    if "optimizer" in case:
        given["optimizer"] = OPTIMIZERS[case["optimizer"]](case["lr"])
    return given


def says_all(name: str, case: Any) -> bool:
    known = {
        *inspect.signature(mtl.METHODS[name].factory).parameters,
        *MethodOptions.__annotations__,
    }
    shape = {"steps", "G"} & set(case) or {"T", "outputs"} <= set(case)
    return bool(shape) and "hyperparameters" in case and arguments(case).keys() <= known


def found_files() -> dict[str, Any]:
    """The files of this form by the names of their methods."""
    files = {}
    for path in sorted(GOLDEN.glob("*/*.json")):
        if path.stem in mtl.METHODS:
            file = json.loads(path.read_text("utf-8"))
            if all(says_all(path.stem, case) for case in file["cases"]):
                files[f"{path.parent.name}/{path.stem}"] = file
    return files


FILES = found_files()


# How an output is read off the updates and the states of all steps.
READ = {
    "update": lambda updates, states: updates,
    "weights": lambda updates, states: states.weights[:, 0],
    "values_before": lambda updates, states: states.rule_state.values[:-1, 0],
    "multipliers": lambda updates, states: states.rule_state.multipliers[:, 0],
}


class Steps(NamedTuple):
    """What a case gives at each step, and what is expected."""

    gradients: np.ndarray
    given: dict[str, np.ndarray]
    wanted: dict[str, np.ndarray]


def steps_of(case: Any) -> Steps:
    given = {key: np.array(case[key], float) for key in GIVEN if key in case}
    if "steps" in case:
        gradients, updates = (np.array([s[key] for s in case["steps"]]) for key in ("G", "update"))
        return Steps(gradients, given, {"update": updates})
    wanted = {key: np.array(value, float) for key, value in case["outputs"].items() if key in READ}
    if "values_before" in wanted:  # of each step; states hold what is there after it
        wanted["values_before"] = wanted["values_before"][1:]
    if "G" in case:
        steps = Steps(np.array(case["G"]), given, wanted)
        return steps if steps.gradients.ndim == 3 else jax.tree.map(lambda x: x[None], steps)
    lengths = np.broadcast_to(case.get("grad_norms", 1.0), wanted["weights"].shape)
    update = wanted["weights"] * lengths
    return Steps(lengths[:, :, None] * np.eye(case["T"]), given, wanted | {"update": update})


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(name: str, static: Any, traced: Any, gradients: Any, given: Any) -> tuple[Any, Any]:
    """The updates and states of a sequence of steps; cases that differ in numbers share a program."""
    _, num_tasks, size = gradients.shape
    method = mtl.METHODS[name].factory(num_tasks, **dict(static), **traced)

    def step(state: Any, inputs: Any) -> Any:
        grads, given = inputs
        update, state = method.update(grads, state, **given)
        return state, (update, state)

    return jax.lax.scan(step, method.init(jnp.zeros(size)), (gradients, given))[1]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("path", FILES)
def test_reference_numbers(path: str) -> None:
    """Of a file with a `tolerance`, relative to the longest gradient, the updates alone are compared."""
    tolerance = FILES[path].get("tolerance")
    for case in FILES[path]["cases"]:
        gradients, given, wanted = steps_of(case)
        options = {k: tuple(x) if isinstance(x, list) else x for k, x in arguments(case).items()}
        # One number per task may be traced, unless it may be None.
        traced = {k: np.array(x) for k, x in options.items() if type(x) is tuple and None not in x}
        static = tuple((k, x) for k, x in options.items() if k not in traced)
        updates, states = run(path.split("/")[1], static, traced, gradients, given)
        assert not np.any(getattr(states.rule_state, "fallback_count", 0)), case["name"]
        if tolerance is not None:
            longest = np.linalg.norm(gradients, axis=-1).max()
            np.testing.assert_allclose(updates, wanted["update"], rtol=0, atol=tolerance * longest)
            continue
        assert wanted, case["name"]
        for key, want in wanted.items():
            # What other programs did at each step is known to fewer digits than exact arithmetic.
            allowed = 1e-10 if "steps" in case else 1e-12
            for found, expected in zip(READ[key](updates, states), want, strict=True):
                assert error(found, expected) <= allowed, (case["name"], key)


def test_every_file_is_read() -> None:
    """Here, or by a test that names it in full: "gradient/mgda"."""
    assert {"gradient/gradcraft", "gradient/lr_annealing", "loss/igb", "loss/ntk"} <= set(FILES)
    strings = {
        node.value
        for path in Path(__file__).parents[1].rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    stored = {
        path.relative_to(GOLDEN).with_suffix("").as_posix() for path in GOLDEN.rglob("*.json")
    }
    assert stored <= strings | set(FILES)


def test_cases_have_different_names() -> None:
    for path in GOLDEN.rglob("*.json"):
        names = [case["name"] for case in json.loads(path.read_text("utf-8"))["cases"]]
        assert names and len(set(names)) == len(names), path.name
