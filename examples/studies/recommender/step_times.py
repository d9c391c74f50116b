"""Times of training steps, as ratios in one interleaved run."""

import time
from collections.abc import Sequence

import jax
import numpy as np

from examples.studies.harness.choices import Choice
from examples.studies.recommender.training import Trainer

ROUNDS = 3


def step_seconds(trainer: Trainer, choices: Sequence[Choice], rounds: int = ROUNDS) -> np.ndarray:
    """Seconds of a step `[choices]`: the fastest of some turns, all choices once in each turn.

    The programs are those of training, with one run in each.
    """
    keys = jax.random.split(jax.random.key(0), 1)
    setting = jax.tree.map(
        lambda value: np.asarray(value, np.float32)[None], trainer.default_setting()
    )
    carries = []
    for choice in choices:
        program = trainer.program(choice)
        params, state = trainer.fresh(program, keys, setting)
        carries.append((program, params, state))
    order, step_keys = trainer.shuffled(keys)
    found = np.full((rounds + 1, len(choices)), np.inf)
    for turn in range(rounds + 1):  # the first turn compiles what training has not
        for place, (program, params, state) in enumerate(carries):
            began = time.perf_counter()
            result = program.steps(
                trainer.data, params, state, order[:, 0], step_keys[:, 0], setting
            )
            params, state, _ = jax.block_until_ready(result)
            if turn:
                found[turn, place] = time.perf_counter() - began
            carries[place] = program, params, state
    return found.min(axis=0) / trainer.steps_at_once
