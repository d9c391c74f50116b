"""What goes wrong for a reason that the user can mend."""

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(Exception):
    """One line that says what is wrong and what to do; the command prints it and exits with 2."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, like every other error of a command."""

    def error(self, message: str) -> NoReturn:
        """Raise what `main` prints."""
        raise UserError(message)


def check_numbers(options: argparse.Namespace, at_least_one: Iterable[str]) -> None:
    """Refuse numbers below 1, and a `--resume` with nothing to go on from."""
    for name in at_least_one:
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1")
    if getattr(options, "resume", False) and options.out is None:
        raise UserError("--resume needs --out DIR, where the finished runs are kept")


def exit_code(program: str, work: Callable[[], None]) -> int:
    """Do the work; 0 on success, 2 when the user can mend what went wrong, 130 when it was stopped."""
    try:
        work()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: stopped; --resume goes on from what --out holds", file=sys.stderr)
        return 130
    return 0
