"""Mistakes that a person can mend: one line that names the cause and the mend, never a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the program is wrong: a file, a folder, a name, a library, the machine.

    The message is one line (or a few, one a mistake); a command prints it after ``error: `` and exits
    with ``exit_code``. An ``reported_elsewhere`` was met by another process of the run, which says it.
    """

    exit_code = 1
    reported_elsewhere = False


class UsageError(UserError):
    """The command line or the TOML file is wrong."""

    exit_code = 2


class Stopped(BaseException):
    """The run was asked to stop and does; the message is the reason, such as SIGTERM or walltime.

    Like KeyboardInterrupt it is no `Exception`, since it may be raised in the middle of a library that takes
    every one of those for a broken file. An ``reported_elsewhere`` was met by another process of the run.
    """

    exit_code = 75
    reported_elsewhere = False
