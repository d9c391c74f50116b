"""Trains the jobs of a table, two at a time on a CPU, with a progress bar and files to go on from."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import progress
from rich.console import Console

import mtl_optax as mtl
from examples.studies.harness.choices import Choice
from examples.studies.harness.command import in_threads, say_damaged
from examples.studies.harness.runs import Plan, Run, load_run, store_run


def progress_bars() -> progress.Progress:
    """Bars with the time left, on standard error: standard output is for the results."""
    console = Console(stderr=True)
    columns = (
        "{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(), "left", progress.TimeRemainingColumn(), "{task.fields[note]}",
    )  # fmt: skip
    return progress.Progress(*columns, console=console, disable=not console.is_terminal)


def versions() -> dict[str, Any]:
    """What stored runs are made with."""
    return {"versions": {"mtl_optax": mtl.__version__, "jax": jax.__version__}}


@dataclass(frozen=True)
class Job:
    """The runs of one choice; `measure=False` leaves the test set alone, as a search must."""

    choice: Choice
    plans: Sequence[Plan]
    measure: bool = True


@dataclass
class Runner:
    """Runs jobs, and keeps what is finished under `out`.

    Attributes:
      trainer: a `harness.trainer.Trainer`.
      fingerprint: what a stored run must agree on to be used again, beside versions: data, configuration.
      workers: how many jobs at a time. On an accelerator, where a job's runs go side by side, one compiles
        while another trains.
    """

    trainer: Any
    fingerprint: dict[str, Any]
    out: Path | None = None
    resume: bool = False
    workers: int = 2

    def train(self, jobs: Sequence[Job]) -> list[list[Run]]:
        """The runs of every job, in order."""
        for job in jobs:
            self.trainer.check(job.choice, job.plans[0].setting)
        stored = [[self._stored(job, plan) for plan in job.plans] for job in jobs]
        missing, stopping = sum(runs.count(None) for runs in stored), threading.Event()
        with progress_bars() as bars:
            bar = bars.add_task("", total=missing * self.trainer.epochs, note="")

            def advance(epochs: int, **shown: str) -> None:
                if stopping.is_set():
                    raise KeyboardInterrupt
                bars.update(bar, advance=epochs, **shown)

            def work(place: int) -> list[Run]:
                return self._train(jobs[place], stored[place], advance)

            return in_threads(work, range(len(jobs)), self.workers, stopping)

    def _train(self, job: Job, stored: list[Run | None], advance: Callable[..., None]) -> list[Run]:
        """What is not stored, plan by plan, so that each is kept when it is done, or all together."""

        def on_epoch(values: np.ndarray) -> None:
            shown = f"validation {values.mean():.4f}"
            advance(len(values), description=job.choice.label, note=shown)

        missing = [plan for plan, run in zip(job.plans, stored, strict=True) if run is None]
        size = max(1, len(missing)) if self.trainer.side_by_side else 1
        trained: list[Run] = []
        for start in range(0, len(missing), size):
            plans = missing[start : start + size]
            runs = self.trainer.train(job.choice, plans, on_epoch, measure=job.measure)
            if self.out is not None:
                for plan, run in zip(plans, runs, strict=True):
                    store_run(run, self._path(job, plan))
            # Of early stopping: what is left of the epochs.
            advance(len(runs) * (self.trainer.epochs - len(runs[0].history["validation"])))
            trained += runs
        made = iter(trained)
        return [next(made) if run is None else run for run in stored]

    def _stored(self, job: Job, plan: Plan) -> Run | None:
        if not self.resume or not (path := self._path(job, plan)).exists():
            return None
        try:
            return load_run(path)
        except Exception as error:
            say_damaged(path, error)
            return None

    def _path(self, job: Job, plan: Plan) -> Path:
        """Where a run is kept; the name holds a digest of all that the run depends on."""
        assert self.out is not None
        (rate, decay, knobs), choice = plan.setting, job.choice
        options = {name: np.asarray(value).tolist() for name, value in knobs.items()}
        made = versions(), self.fingerprint, choice, plan.seed, job.measure
        settings = repr((*made, float(rate), float(decay), options))
        digest = hashlib.sha256(settings.encode()).hexdigest()
        name = "".join(c if c.isalnum() else "-" for c in choice.label)
        return self.out / "runs" / f"{name}-{plan.seed}-{digest[:16]}.msgpack"
