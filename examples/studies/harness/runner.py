"""Trains the jobs of a table, two at a time on a CPU, with a progress bar and files to go on from."""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import progress
from rich.console import Console

import mtl_optax as mtl
from examples.studies.harness.checkpoints import UnfinishedRun
from examples.studies.harness.choices import Choice
from examples.studies.harness.command import in_threads, say_damaged
from examples.studies.harness.runs import Plan, Run, load_run, store_run

UNFINISHED = "unfinished"  # the folder under --out with the trainings that were stopped


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
    _stopping: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        if self.out is not None and not self.resume:
            shutil.rmtree(self.out / UNFINISHED, ignore_errors=True)

    def train(self, jobs: Sequence[Job]) -> list[list[Run]]:
        """The runs of every job, in order."""
        for job in jobs:
            self.trainer.check(job.choice, job.plans[0].setting)
        epochs = self.trainer.epochs
        stored = [[self._stored(job, plan) for plan in job.plans] for job in jobs]
        with progress_bars() as bars:
            total = sum(len(job.plans) for job in jobs) * epochs
            whole = bars.add_task("all", total=total, note="epochs")

            def work(place: int) -> list[Run]:
                job = jobs[place]
                size = len(job.plans) * epochs
                bar = bars.add_task(job.choice.label, total=size, note="compiling")

                def advance(count: int, value: float) -> None:
                    bars.update(bar, advance=count, note=f"validation {value:.4f}")
                    bars.update(whole, advance=count)

                runs = self._train(job, stored[place], advance)
                bars.remove_task(bar)
                return runs

            labels = [job.choice.label for job in jobs]
            return in_threads(work, range(len(jobs)), labels, self.workers, self._stopping)

    def _train(
        self, job: Job, stored: list[Run | None], advance: Callable[[int, float], None]
    ) -> list[Run]:
        """Plan by plan, so that each can be stored when it is done, or all together."""
        finished = {place: run for place, run in enumerate(stored) if run is not None}
        for run in finished.values():
            advance(self.trainer.epochs, run.best_value)
        missing = [place for place in range(len(job.plans)) if place not in finished]
        size = max(1, len(missing)) if self.trainer.side_by_side else 1
        for start in range(0, len(missing), size):
            group = missing[start : start + size]
            finished |= zip(group, self._train_group(job, group, advance), strict=True)
        return [finished[place] for place in range(len(job.plans))]

    def _train_group(
        self, job: Job, group: list[int], advance: Callable[[int, float], None]
    ) -> list[Run]:
        plans = [job.plans[place] for place in group]
        done = 0

        def on_epoch(epoch: int, values: np.ndarray) -> None:
            nonlocal done
            if self._stopping.is_set():
                raise KeyboardInterrupt
            advance((epoch - done) * len(plans), float(values.mean()))
            done = epoch

        settings = [self._settings(job, plan) for plan in plans]
        unfinished = self.out and UnfinishedRun(self.out / UNFINISHED, {"runs": settings})
        runs = self.trainer.train(job.choice, plans, on_epoch, unfinished, measure=job.measure)
        if unfinished:
            for run, plan in zip(runs, plans, strict=True):
                store_run(run, self._path(job, plan), self._settings(job, plan))
            unfinished.remove()
        advance((self.trainer.epochs - done) * len(plans), runs[0].best_value)
        return runs

    def _stored(self, job: Job, plan: Plan) -> Run | None:
        if self.out is None or not self.resume:
            return None
        path = self._path(job, plan)
        try:
            return load_run(path, self._settings(job, plan))
        except Exception as error:
            say_damaged(path, error)
            return None

    def _settings(self, job: Job, plan: Plan) -> dict[str, Any]:
        (rate, decay, knobs), choice = plan.setting, job.choice
        about = {
            "choice": choice.label, "parts": repr(choice.parts), "place": choice.place,
            "seed": plan.seed, "measure": job.measure, "learning_rate": float(rate),
            "weight_decay": float(decay), "knobs": {k: np.asarray(v).tolist() for k, v in knobs.items()},
        }  # fmt: skip
        # As it reads back.
        return json.loads(json.dumps({**versions(), **self.fingerprint, **about}))

    def _path(self, job: Job, plan: Plan) -> Path:
        assert self.out is not None
        digest = hashlib.sha256(json.dumps(self._settings(job, plan), sort_keys=True).encode())
        name = "".join(c if c.isalnum() else "-" for c in job.choice.label)
        return self.out / "runs" / f"{name}-{plan.seed}-{digest.hexdigest()[:8]}.npz"
