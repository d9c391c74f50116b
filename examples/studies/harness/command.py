"""What the commands of the examples share: arguments, errors, the folder of results, and threads."""

import argparse
import difflib
import importlib
import os
import shlex
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from examples.studies.harness.errors import UserError

LOCK = ".lock"
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, like every other error of a command."""

    def error(self, message: str) -> NoReturn:
        """Raise what `run_command` prints."""
        raise UserError(message)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like a wrong one, if any is like it."""
    by_lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[near[0]] if near else None


def unknown(what: str, name: str, known: Sequence[str]) -> str:
    """Say that there is no such name, and which one may be meant."""
    near = nearest(name, known)
    hint = f"did you mean {near!r}?" if near else f"choose from {', '.join(known)}"
    return f"unknown {what} {name!r}; {hint}"


def one_of(what: str, known: Sequence[str]) -> Callable[[str], str]:
    """A `type=` for argparse that takes the known names."""

    def parse(name: str) -> str:
        if name not in known:
            raise argparse.ArgumentTypeError(unknown(what, name, known))
        return name

    return parse


# The options of all studies, so that a word means the same in each.
OPTIONS: dict[str, dict[str, Any]] = {
    "data": {"help": "a folder, or synthetic where the command can generate data"},
    "seeds": {"type": int, "help": "training seeds of each row"},
    "trials": {"type": int, "help": "validation trials of each row"},
    "epochs": {"type": int, "help": "at most so many"},
    "steps": {"type": int, "help": "training steps"},
    "batch": {"type": int, "help": "examples of a step"},
    "examples": {"type": int, "help": "at most so many for training, and as many for validation"},
    "size": {"type": int, "help": "impressions of the generated log; table2: rows of all tables"},
    "rounds": {"type": int, "help": "measurements of each row, in turns"},
    "jobs": {"type": int, "default": 2, "help": "trainings at a time (default %(default)s)"},
    "out": {"type": Path, "metavar": "DIR", "help": "folder for the tables and pictures"},
    "resume": {"action": "store_true", "help": "go on from the finished runs in --out"},
    "quick": {"action": "store_true", "help": "tiny data and few steps, to see that it works"},
}


class Command(NamedTuple):
    """A command of a study: a function of its own name in a module, which is imported when it is asked for.

    `options` are names of `OPTIONS` and of the study's own. What it does stands in the study's description.
    """

    module: str
    options: str


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were asked for."""
    found = {name: getattr(options, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class CommandLine:
    """The `main(arguments=None)` of a program; see `run_command` for what it returns.

    Attributes:
      name: after `python -m`.
      description: shown as it is written.
      work: what the program does with its options.
      options: names of `OPTIONS` and of the program's own.
      own: how the program's own options differ from `OPTIONS`.
      complete: called with the options as they were read, to fill in what follows from them.
      commands: by name; without any the program is one command.
      epilog: below the options.
    """

    name: str
    description: str | None
    work: Callable[[argparse.Namespace], object]
    options: str = ""
    own: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    complete: Callable[[argparse.Namespace], object] = lambda options: None
    commands: Mapping[str, Command] = field(default_factory=dict)
    epilog: str | None = None

    def __call__(self, arguments: Sequence[str] | None = None) -> int:
        """Run the program."""
        return run_command(self.name, lambda: self.parse(arguments), self.work)

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """What the command line asks for, and the `line` itself.

        Refuses whole numbers below 1, and a `--resume` with nothing to go on from.
        """
        arguments = sys.argv[1:] if arguments is None else list(arguments)
        parser = OneLineParser(
            prog=f"python -m {self.name}",
            description=self.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=self.epilog,
        )
        made = {parser: self.options}
        if self.commands:
            choose = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
            for name, command in self.commands.items():
                made[choose.add_parser(name)] = command.options
        for each, names in made.items():
            for name in names.split():
                how = {**OPTIONS.get(name, {}), **self.own.get(name, {})}
                each.add_argument(f"--{name.replace('_', '-')}", **how)
        options = parser.parse_args(arguments)
        for name, value in vars(options).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1")
        if getattr(options, "resume", False) and options.out is None:
            raise UserError("--resume needs --out DIR, where the finished runs are kept")
        options.line = f"{parser.prog} {shlex.join(arguments)}".strip()
        self.complete(options)
        return options


def study(
    name: str,
    description: str | None,
    commands: Mapping[str, Command],
    own: Mapping[str, dict[str, Any]] | None = None,
) -> CommandLine:
    """A program of several commands."""

    def work(options: argparse.Namespace) -> None:
        module = importlib.import_module(f"{name}.{commands[options.command].module}")
        getattr(module, options.command)(options)

    return CommandLine(name, description, work, own=own or {}, commands=commands)


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path` and rename: a reader sees the whole file or none, also after Ctrl-C."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    partial.write_bytes(content)
    os.replace(partial, path)


@contextmanager
def claimed(out: Path | None) -> Iterator[None]:
    """Make a folder of results, and keep it for this program alone as long as it runs.

    The lock is that of SQLite on an empty file: it works on every system, and ends with the process
    that holds it, however that ends.
    """
    if out is None:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # refused before any work if nothing can be written
    with closing(sqlite3.connect(out / LOCK, timeout=0, isolation_level=None)) as lock:
        try:
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise UserError(f"--out {out}: cannot be locked ({error})") from None
            raise UserError(
                f"--out {out}: another program writes there; wait for its end, or choose another folder"
            ) from None
        yield


def say_damaged(path: Path, error: Exception) -> None:
    """Say that what is stored cannot be used."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    print(f"{path} is damaged ({reason}): training it again", file=sys.stderr)


def run_command(program: str, parse: Callable[[], Any], work: Callable[[Any], object]) -> int:
    """Parse the options and do the work, alone in the folder `options.out` if there is one.

    Returns:
      0 on success, 2 when the user can mend what went wrong, 130 when the program was stopped.
    """
    options = None
    try:
        options = parse()
        with claimed(getattr(options, "out", None)):
            work(options)
    except (UserError, OSError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = hasattr(options, "resume") and options.out is not None
        hint = "add --resume to go on" if kept else "nothing is kept"
        print(f"{program}: stopped; {hint}", file=sys.stderr)
        return 130
    return 0


def in_threads(
    work: Callable[[ItemT], ResultT],
    items: Iterable[ItemT],
    workers: int,
    stopping: threading.Event,
) -> list[ResultT]:
    """The results of all items, in order, with so many threads at work.

    Ctrl-C or an error drops what has not begun and sets `stopping`, at which `work` looks and raises.
    """
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            print("stopping: waiting for what is under way", file=sys.stderr, flush=True)
            raise
        return [future.result() for future in futures]
