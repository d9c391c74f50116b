"""Clocks that survive a busy machine: what is compared runs in turns, and medians are taken."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from examples.studies.harness.steps import Step


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 3,
) -> dict[str, list[float]]:
    """Seconds of each call, one of each in every round; compiled and warmed up before."""
    for call in calls.values():
        for _ in range(warm_up):
            jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def cores() -> int:
    """How many cores the process may use: where it is bound to some of them, only those count."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine() -> str:
    """What the measurements were made on: the accelerator, or how many cores the process may use."""
    if jax.default_backend() != "cpu":
        return jax.devices()[0].device_kind
    return f"{cores()} CPU core{'s' * (cores() != 1)}"


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """The median over the rounds of one call's time over that of another in the same round."""
    pairs = zip(seconds[name], seconds[base], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def interleaved_ratios(
    calls: Mapping[str, Callable[[], Any]], base: str, rounds: int
) -> dict[str, float]:
    """The ratio of every other call to `base`."""
    seconds = interleaved(calls, rounds)
    return {name: ratio(seconds, name, base) for name in calls if name != base}


def step_times(
    calls: Mapping[str, Callable[[], Any]], steps: int, base: str, rounds: int
) -> list[tuple[str, float, float]]:
    """Of calls of so many steps: the milliseconds of a step, and its time over that of `base`."""
    seconds = interleaved(calls, rounds, warm_up=1)
    return [
        (name, 1e3 * statistics.median(taken) / steps, ratio(seconds, name, base))
        for name, taken in seconds.items()
    ]


def compiled_call(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """A call of a function that is compiled already."""
    compiled = jax.jit(function).lower(*arguments).compile()
    return lambda: compiled(*arguments)


def several(call: Callable[[], Any], times: int) -> Callable[[], Any]:
    """Runs a short call so often that one reading of the clock does not count."""

    def run() -> Any:
        result = None
        for _ in range(times):
            result = call()
        return result

    return run


class Training:
    """A compiled training step with the state it runs on, each result the next step's input.

    The buffers of parameters and state are donated, as in a real training loop.
    """

    def __init__(self, step: Step, params: Any, batch: Any) -> None:
        state = params, step.init(params)
        jitted = jax.jit(lambda *arguments: step.update(*arguments)[:3], donate_argnums=(0, 1))
        self.compiled = jitted.lower(*state, batch).compile()
        self.state = jax.tree.map(lambda x: x.copy(), state)
        self.batch = batch

    def __call__(self) -> Any:
        *state, losses = self.compiled(*self.state, self.batch)
        self.state = tuple(state)
        return losses, self.state

    @property
    def temporary_mebibytes(self) -> float:
        """What XLA says the step needs beyond its arguments and results."""
        return self.compiled.memory_analysis().temp_size_in_bytes / 2**20

    @property
    def operations(self) -> float:
        """Floating-point operations of one step, as XLA counts them."""
        return self.compiled.cost_analysis()["flops"]
