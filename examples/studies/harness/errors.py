"""What goes wrong for a reason that the user can mend."""


class UserError(Exception):
    """One line that says what is wrong and what to do; the command prints it and exits with 2."""
