"""What a compiled program exchanges between devices, read from its text."""

import math
import re
from typing import NamedTuple

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
# An asynchronous collective is a start and a done; the start alone is counted.
_COLLECTIVE = re.compile(rf"= (?P<shape>.+?) (?P<kind>{_KINDS})(?:-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b[a-z]+\d*(?:e\d\w*)?\[(?P<dims>[\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=(%?[\w.\-]+))"
)


class Collective(NamedTuple):
    """One exchange between devices.

    Attributes:
      kind: "all-reduce", "all-gather", ...
      numbers: how many numbers every device receives.
      conditional: whether it waits in a branch of a conditional, and so may never run.
    """

    kind: str
    numbers: int
    conditional: bool


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program, from `compiled.as_text()`."""
    bodies = _computations(text)
    branches = {
        name.strip().lstrip("%")
        for lines in bodies.values()
        for line in lines
        for group in _BRANCHES.findall(line)
        for name in "".join(group).split(",")
    }
    conditional = _reachable(branches, bodies)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match:
                numbers = _numbers(match["shape"], match["kind"], f"{match['kind']}-start(" in line)
                found.append(Collective(match["kind"], numbers, name in conditional))
    return found


def _computations(text: str) -> dict[str, list[str]]:
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            lines = bodies.setdefault(match["name"], [])
        elif line.startswith("  "):
            lines.append(line)
    return bodies


def _reachable(names: set[str], bodies: dict[str, list[str]]) -> set[str]:
    seen: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        todo += [called for line in bodies.get(name, ()) for called in _CALLED.findall(line)]
    return seen


def _numbers(shape: str, kind: str, started: bool) -> int:
    sizes = [math.prod(int(d) for d in dims.split(",") if d) for dims in _ARRAY.findall(shape)]
    # The start of a gather or a permutation returns its operands before its results.
    if started and kind != "all-reduce":
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)
