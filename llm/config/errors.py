"""Errors that a person can fix: one line that names the cause and the fix, never a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the program is wrong: a file, a folder, a name, a library, the machine.

    The message is one line, or one line a mistake. A command prints it after ``error: `` and exits with
    ``exit_code``. ``reported_elsewhere`` is True where another process of the run hit the same error and
    prints it.
    """

    exit_code = 1
    reported_elsewhere = False


class UsageError(UserError):
    """The command line or the TOML file is wrong."""

    exit_code = 2


class Stopped(BaseException):
    """The run stops because it was asked to; the message is the reason, such as SIGTERM or walltime.

    Like KeyboardInterrupt it is not an `Exception`: it may be raised inside a library that takes every
    `Exception` for a broken file. ``reported_elsewhere`` is True where another process of the run reports
    the stop.
    """

    exit_code = 75
    reported_elsewhere = False


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not blank; the name of its type if there is none."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
