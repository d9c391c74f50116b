"""What goes wrong for a reason that the user can mend."""

import argparse
from typing import NoReturn


class UserError(Exception):
    """One line that says what is wrong and what to do; the command prints it and exits with 2."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, like every other error of a command."""

    def error(self, message: str) -> NoReturn:
        """Raise what `main` prints."""
        raise UserError(message)
