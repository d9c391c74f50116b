"""What the commands of the examples share: arguments, errors, the folder of results, and threads."""

import argparse
import difflib
import os
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from examples.studies.harness.errors import UserError

LOCK = ".lock"
PROBE_BYTES = 2**20  # more than the results of most commands take
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


def check_numbers(options: argparse.Namespace, at_least_one: Iterable[str]) -> None:
    """Refuse numbers below 1, and a `--resume` with nothing to go on from."""
    for name in at_least_one:
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if getattr(options, "resume", False) and options.out is None:
        raise UserError("--resume needs --out DIR, where the finished runs are kept")


def check_writable(folder: Path) -> None:
    """Make a folder, and refuse it before any work is done where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(os.urandom(PROBE_BYTES))
            probe.flush()
    except OSError as error:
        raise UserError(f"--out: cannot write to {folder} ({error.strerror})") from None


@contextmanager
def claimed(out: Path | None) -> Iterator[None]:
    """Keep a folder of results for this program alone, as long as it runs.

    The lock is that of SQLite on an empty file: it works on every system, and ends with the process
    that holds it, however that ends.
    """
    if out is None:
        yield
        return
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is not a folder")
    check_writable(out)
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
    """Parse the options and do the work, alone in the folder `options.out` where there is one.

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
        hint = ""
        if hasattr(options, "resume"):
            hint = "; nothing is kept without --out"
            if options.out is not None:
                hint = "; add --resume to go on"
        print(f"{program}: stopped{hint}", file=sys.stderr)
        return 130
    return 0


def in_threads(
    work: Callable[[ItemT], ResultT],
    items: Sequence[ItemT],
    names: Sequence[str],
    workers: int,
    stopping: threading.Event,
) -> list[ResultT]:
    """The results of all items, in order, with so many threads at work.

    Ctrl-C or an error sets `stopping`, drops what has not begun, and says at once what else has to end:
    `work` looks at `stopping` and raises.
    """
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            under_way = [name for name, f in zip(names, futures, strict=True) if f.running()]
            if under_way:
                text = f"stopping: waiting for the part under way of {'; '.join(under_way)}"
                print(text, file=sys.stderr, flush=True)
            raise
        return [future.result() for future in futures]
