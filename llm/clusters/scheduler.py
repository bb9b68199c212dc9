"""A scheduler's own commands: what they print, or one line that says why they do not."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping

PATIENCE_SECONDS = 5.0


class UnknownError(Exception):
    """The scheduler does not say it; the message says why not."""


def ask_scheduler(command: list[str], environment: Mapping[str, str], *, patience: float | None = None) -> str:
    """What a scheduler's command prints.

    Args:
        command: the program and its words; the program is looked for where the environment's PATH says.
        environment: the whole one that the command sees.
        patience: seconds to wait for its end; None: five.

    Raises:
        UnknownError: it is not there, fails, or takes longer.
    """
    program = shutil.which(command[0], path=environment.get("PATH"))
    if program is None:
        raise UnknownError(f"there is no {command[0]} here")
    seconds = PATIENCE_SECONDS if patience is None else patience
    try:
        result = subprocess.run(
            [program, *command[1:]],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except (OSError, ValueError) as error:
        raise UnknownError(f"{command[0]}: {error}") from error
    except subprocess.TimeoutExpired:
        raise UnknownError(f"{command[0]} gave no answer in {seconds:.0f} s") from None
    if result.returncode != 0:
        said = (result.stderr.strip() or result.stdout.strip() or f"exit code {result.returncode}").splitlines()[0]
        raise UnknownError(f"{command[0]}: {said}")
    return result.stdout
