"""Eleven properties of QM9's molecules from one network: `python -m examples.studies.molecules`.

Without options: one split, the plain sum, a search over 8 weightings and four methods in one run, beside
the stored numbers of a network for each property alone; about two minutes on two cores after the
download. With --all: every arm, and a search over 64 weightings.

With --network messages: the same for a network that passes messages between the atoms. On a CPU it has
4,000 molecules and 1,500 steps, and a search over 4 weightings: 20 networks, those for each property alone
among them, at 3 learning rates, are 60 runs of 30 to 45 seconds of processor time. On an accelerator it has
100,000 molecules and 50,000 steps.

Every arm is trained with the same learning rates, of which the validation molecules choose.
"""

import argparse
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from examples.studies.harness.command import CommandLine, in_threads, one_of
from examples.studies.harness.errors import UserError
from examples.studies.harness.report import publish
from examples.studies.harness.runner import progress_bars
from examples.studies.harness.timing import cores, machine, step_times
from examples.studies.molecules import report
from examples.studies.molecules.arms import ALONE, ARMS, SEARCH, SUM
from examples.studies.molecules.data import HISTOGRAMS, load
from examples.studies.molecules.training import NETWORKS, Config, Store, Trainer, config_of

DEFAULT = (
    SEARCH, SUM, "scale_invariant", "uncertainty", "nash_mtl, representation",
    "inverse_norm, representation",
)  # fmt: skip
QUICK: dict[str, Any] = {
    "steps": 20, "chunk": 10, "batch": 16, "sizes": (100, 50, 50), "rates": (1e-3, 1e-2), "searched": 4,
}  # fmt: skip
OPTIONS = {
    "data": {
        "type": Path,
        "help": "a wheel of qm9pack, or a file of the cache from another machine",
    },
    "seeds": {"default": 1, "help": "splits, each with a start of its own (default %(default)s)"},
    "network": {
        "choices": tuple(NETWORKS),
        "default": HISTOGRAMS,
        "help": "what reads the molecules",
    },
    "steps": {"help": f"training steps (default {Config.steps}; above for messages)"},
    "search": {"type": int, "help": "weightings of a search (8, for messages 4; with --all 64)"},
    "arms": {"nargs": "+", "type": one_of("arm", list(ARMS)), "metavar": "ARM"},
    "all": {"action": "store_true", "help": "all arms"},
    "jobs": {"default": min(2, cores())},
    "part": {
        "type": int,
        "nargs": 2,
        "metavar": ("I", "N"),
        "help": "only train, and of N parts of the runs only the I-th, beside other programs",
    },
    "rounds": {"help": "only time a step of each arm, beside the sum's, in so many turns"},
    "table": {"action": "store_true", "help": "the table of the finished runs in --out"},
}


def complete(options: argparse.Namespace) -> None:
    """The configuration and the arms."""
    few = 8 if options.network == HISTOGRAMS else 4
    config = config_of(options.network, large=jax.default_backend() != "cpu")
    config = replace(
        config,
        steps=options.steps or config.steps,
        searched=options.search or (64 if options.all else few),
    )
    config = replace(config, chunk=min(config.chunk, config.steps))
    if options.quick:
        config = replace(config, **QUICK)
    options.config = config
    options.names = list(ARMS if options.all else options.arms or DEFAULT)
    fits = replace(config, searched=Config.searched) == Config()
    options.alone = report.stored(options.seeds) if fits else None
    if options.part is None and ALONE not in options.names and options.alone is None:
        options.names.insert(0, ALONE)  # what all others are compared with
    if (options.table or options.part) and options.out is None:
        raise UserError("--table and --part need --out DIR, where the finished runs are kept")
    if options.part is not None and not 1 <= options.part[0] <= options.part[1]:
        raise UserError("--part I N: I is one of 1, 2, ... N")


def work(options: argparse.Namespace) -> None:
    """Do what the options ask for."""
    # All devices alike: a GPU would round the inputs of products to 10 bits.
    jax.config.update("jax_default_matmul_precision", "highest")
    config = options.config
    if options.table:
        show(options, Store(options.out, config, resume=True, version=None))
        return
    trainer = Trainer(load(options.data, config.network), config, options.seeds)
    if options.rounds:
        show_times(options, trainer)
        return
    store = Store(options.out, config, options.resume)
    train(options, store, trainer)
    if options.part is None:
        show(options, store)


def train(options: argparse.Namespace, store: Store, trainer: Trainer) -> None:
    """Train what is not stored, two arms at a time, and store it."""
    config, stopping = options.config, threading.Event()
    done = {(result.arm, result.seed, result.rate) for result in store.results}
    part, parts = options.part or (1, 1)
    pairs = [(seed, rate) for seed in range(options.seeds) for rate in config.rates]
    missing = {
        name: [pair for pair in pairs[part - 1 :: parts] if (name, *pair) not in done]
        for name in options.names
    }
    names = [name for name, left in missing.items() if left]
    with progress_bars() as bars:
        trainings = sum(map(len, missing.values()))
        whole = bars.add_task("all", total=config.steps * trainings, note="steps")

        def of_arm(name: str) -> None:
            def advanced(steps: int) -> None:
                if stopping.is_set():
                    raise KeyboardInterrupt
                bars.update(whole, advance=steps, description=name)

            for result in trainer.run(name, missing[name], advanced):
                store.add(result)

        in_threads(of_arm, names, options.jobs, stopping)


def show_times(options: argparse.Namespace, trainer: Trainer) -> None:
    """Print the time of a step of each arm, and write it."""
    names = dict.fromkeys((SUM, *options.names))
    calls = {name: trainer.step_call(name) for name in names}
    times = step_times(calls, options.config.chunk, SUM, options.rounds)
    lines = [("arm", "ms", "over sum"), *((n, f"{ms:.2f}", f"{r:.2f}") for n, ms, r in times)]
    note = (
        f"Time of a training step: medians over {options.rounds} turns of {options.config.chunk} steps "
        f"each, on {machine()}. Made by `{options.line}`."
    )
    publish(options.out, "steps", lines, "QM9: time of a step", note)


def show(options: argparse.Namespace, store: Store) -> None:
    """Print the table and write it."""
    config, out = options.config, options.out
    rows = report.rows_of(store.results, options.seeds, config.rates, options.alone)
    summary = report.summarise(rows)
    title = f"QM9: {len(report.PROPERTIES)} properties, {config.sizes[0]:,} training molecules"
    if config.network != HISTOGRAMS:
        title += f", network of {config.network}"
    shown = report.caption(summary, len(config.rates), options.seeds)
    note = f"{report.verdict(summary)}\n\n{shown}\n\nMade by `{options.line}` with `{config}`."
    files = {"table.csv": report.csv_lines(rows)}
    publish(out, "table", report.lines_of(summary), title, note, files)
    if out is not None:
        report.draw(summary, out / "runs.png")


main = CommandLine(
    "examples.studies.molecules",
    __doc__,
    work,
    f"{' '.join(OPTIONS)} out resume quick",
    OPTIONS,
    complete,
    epilog=f"Arms: {'; '.join(ARMS)}.",
)

if __name__ == "__main__":
    sys.exit(main())
