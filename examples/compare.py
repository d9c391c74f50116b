"""Train one multi-task recommender with several balancing methods and compare them.

    python -m examples.compare                    # MovieLens-100K, six methods, three seeds
    python -m examples.compare --quick            # a look in under half a minute
    python -m examples.compare --method sum metabalance --data synthetic --out results

The target task is what the folder's `buy` says, or a rating of 5 in MovieLens; the others are there to
help it. Every method trains the same network with the same optimizer on the same batches; `single`, which
has no use for the other tasks' pairs, draws as many of the target's alone.
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from examples.recommender import report
from examples.recommender.checkpoints import UnfinishedRun
from examples.recommender.data import Dataset, build_dataset
from examples.recommender.download import write_atomically
from examples.recommender.errors import UserError
from examples.recommender.metrics import popularity
from examples.recommender.placements import SINGLE, SUM, known_methods
from examples.recommender.sources import load_behaviours
from examples.recommender.training import Run, TrainConfig, Trainer

METHODS = (SINGLE, SUM, "metabalance", "multibalance", "emtl", "mgda")
QUICK_METHODS = (SUM, "metabalance")
UNFINISHED = "unfinished"  # the folder under --out with the training that was stopped


@dataclass(frozen=True)
class CompareConfig:
    """What is compared, on what, and where the results go."""

    data: str = "movielens"
    target: str | None = None
    methods: tuple[str, ...] = METHODS
    seeds: int = 3
    out: Path | None = None
    resume: bool = False
    train: TrainConfig = field(default_factory=TrainConfig)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, like every other error of the command."""

    def error(self, message: str) -> NoReturn:
        """Raise what `main` prints."""
        raise UserError(message)


def parse(arguments: list[str] | None) -> CompareConfig:
    """The configuration that the command line asks for."""
    parser = OneLineParser(prog="python -m examples.compare", description=__doc__.split("\n")[0])
    parser.add_argument("--method", nargs="+", metavar="NAME", help=", ".join(known_methods()))
    parser.add_argument(
        "--data",
        default="movielens",
        help="movielens, synthetic, or a folder with buy.csv[.gz], ...",
    )
    parser.add_argument("--target", help="the behaviour to rank for (default: buy, or rated_5)")
    parser.add_argument("--seeds", type=int, help="number of training seeds (default 3)")
    parser.add_argument("--epochs", type=int, help="at most so many epochs (early stopping)")
    parser.add_argument("--out", type=Path, help="folder for results.json, table.md, picture.png")
    parser.add_argument("--resume", action="store_true", help="go on from what --out holds")
    parser.add_argument(
        "--quick", action="store_true", help="two methods, one seed, short training"
    )
    given = parser.parse_args(arguments)

    config = CompareConfig(given.data, given.target, out=given.out, resume=given.resume)
    if given.quick:
        short = replace(config.train, epochs=2, max_steps_per_epoch=30)
        short = replace(short, validation_users=128, test_users=256)
        config = replace(config, methods=QUICK_METHODS, seeds=1, train=short)
    if given.method:
        config = replace(config, methods=tuple(dict.fromkeys(given.method)))
    if given.seeds is not None:
        config = replace(config, seeds=given.seeds)
    if given.epochs is not None:
        config = replace(config, train=replace(config.train, epochs=given.epochs))
    _check(config)
    return config


def _check(config: CompareConfig) -> None:
    for method in config.methods:
        if method not in known_methods():
            raise UserError(f"unknown method {method!r}; choose from {', '.join(known_methods())}")
    if config.seeds < 1 or config.train.epochs < 1:
        raise UserError("--seeds and --epochs must be at least 1")
    if config.resume and config.out is None:
        raise UserError("--resume needs --out DIR, where the finished runs are kept")
    if config.out is not None and config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out {config.out}: is not a folder")


def compare(config: CompareConfig, console: Console) -> list[report.Row]:
    """Train everything, print the table, write the files; return the rows."""
    started = time.perf_counter()
    dataset = build_dataset(load_behaviours(config.data, config.target))
    counts = ((dataset.labels[None] >> np.arange(len(dataset.tasks))[:, None, None]) & 1).sum(
        (1, 2)
    )
    console.print(
        f"{dataset.name}: {dataset.num_users} users, {dataset.num_items} items; training pairs: "
        + ", ".join(f"{name} {count}" for name, count in zip(dataset.tasks, counts, strict=True))
    )
    runs = _train_all(dataset, config, console)
    baseline = SUM if SUM in runs and len(runs) > 1 else None
    rows = report.make_rows(runs, popularity(dataset.labels, dataset.held_out), baseline)
    title = f"{dataset.name}: ranking all items for the target {dataset.tasks[0]}"
    note = report.caption(config.seeds, baseline)
    console.print(report.rich_table(rows, title, note))
    if config.out is not None:
        _write(config, dataset, runs, rows, title, note)
        console.print(f"results.json, table.md and picture.png are in {config.out}")
    console.print(f"total {time.perf_counter() - started:.0f} s")
    return rows


def _train_all(dataset: Dataset, config: CompareConfig, console: Console) -> dict[str, list[Run]]:
    if config.out is not None and not config.resume:
        shutil.rmtree(config.out / UNFINISHED, ignore_errors=True)
    trainer = Trainer(dataset, config.train, probe_norms=config.out is not None)
    fingerprint = {"train": asdict(config.train), "data": _digest(dataset)}
    fingerprint = json.loads(json.dumps(fingerprint))  # as it reads back: tuples become lists
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    runs: dict[str, list[Run]] = {}
    with Progress(
        *columns, MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"),
        console=console,
    ) as progress:  # fmt: skip
        for method in config.methods:
            bar = progress.add_task(method, total=config.train.epochs, note="compiling")
            seeds = list(range(config.seeds))
            stored = {seed: _stored(config, method, seed, fingerprint) for seed in seeds}
            finished = {seed: run for seed, run in stored.items() if run is not None}
            missing = [seed for seed in seeds if seed not in finished]

            def on_epoch(epoch: int, values: np.ndarray, bar: Any = bar) -> None:
                progress.update(bar, completed=epoch, note=f"validation {values.mean():.4f}")

            for run in _train(trainer, config, method, missing, on_epoch, fingerprint):
                finished[run.seed] = run
            runs[method] = [finished[seed] for seed in seeds]
            progress.update(bar, total=len(runs[method][0].history["validation"]))
            progress.update(bar, completed=len(runs[method][0].history["validation"]))
    return runs


def _train(
    trainer: Trainer,
    config: CompareConfig,
    method: str,
    seeds: list[int],
    on_epoch: Callable[[int, np.ndarray], None],
    fingerprint: dict[str, Any],
) -> list[Run]:
    """Train the seeds that no finished run is stored of, keeping every epoch under `--out`."""
    if not seeds:
        return []
    if config.out is None:
        return trainer.train(method, seeds, on_epoch)
    settings = {**fingerprint, "method": method, "seeds": seeds}
    with UnfinishedRun(config.out / UNFINISHED, settings) as unfinished:
        runs = trainer.train(method, seeds, on_epoch, unfinished)
        for run in runs:
            report.store_run(run, _run_path(config.out, method, run.seed), fingerprint)
        unfinished.remove()
    return runs


def _stored(
    config: CompareConfig, method: str, seed: int, fingerprint: dict[str, Any]
) -> Run | None:
    if not config.resume or config.out is None:
        return None
    return report.load_run(_run_path(config.out, method, seed), fingerprint)


def _run_path(out: Path, method: str, seed: int) -> Path:
    return out / "runs" / f"{method}-{seed}.json"


def _digest(dataset: Dataset) -> str:
    digest = hashlib.sha256(repr((dataset.name, dataset.tasks, dataset.labels.shape)).encode())
    digest.update(dataset.labels.tobytes())
    digest.update(dataset.held_out.tobytes())
    return digest.hexdigest()


def _write(
    config: CompareConfig,
    dataset: Dataset,
    runs: dict[str, list[Run]],
    rows: list[report.Row],
    title: str,
    note: str,
) -> None:
    assert config.out is not None
    settings = {
        "data": dataset.name,
        "tasks": list(dataset.tasks),
        "seeds": config.seeds,
        "train": asdict(config.train),
        "note": note,
    }
    write_atomically(config.out / "results.json", report.json_results(rows, settings).encode())
    write_atomically(config.out / "table.md", report.markdown_table(rows, title, note).encode())
    report.draw(runs, dataset.tasks, config.out / "picture.png")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 on success, 2 when the user can mend what went wrong."""
    try:
        config = parse(arguments)
        compare(config, Console())
    except UserError as error:
        print(f"examples.compare: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "add --resume to go on" if "--out" in sys.argv else "nothing is kept without --out"
        print(f"examples.compare: stopped; {hint}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
