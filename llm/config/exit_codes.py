"""The end of a command: its exit code, and one line on the standard error for each mistake."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from llm.config.errors import UserError, first_line

EXIT_INTERRUPTED = 130
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def run_command(command: Callable[[], int]) -> int:
    """Run a command and return its exit code.

    - A `UserError` is printed as ``error: ...`` lines; the exit code is the error's. Only the first
      process of a node prints, because most errors happen in all of them.
    - Ctrl-C prints nothing; the exit code is 130.
    - A closed output pipe (head, less) is not an error; the exit code is 0.
    - A full disk and too little memory are one line each; the exit code is 1.
    - Any other exception is a bug and keeps its traceback.

    Args:
        command: does the work and returns the exit code of its normal end.
    """
    try:
        code = command()
        sys.stdout.flush()
    except UserError as error:
        if not error.reported_elsewhere and os.environ.get("LOCAL_RANK", "0") == "0":
            for line in str(error).splitlines():
                sys.stderr.write(f"error: {line}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes the standard output again when it exits, and would print an error there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        sys.stderr.write(f"error: {error.filename or 'a file'} cannot be written ({error.strerror}); make room\n")
        return UserError.exit_code
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        sys.stderr.write(
            f"error: out of memory ({first_line(error)}); make the batch (--per_device_train_batch_size) or the model"
            " smaller, or train with --gradient_checkpointing\n"
        )
        return UserError.exit_code
    return code


def _is_out_of_memory(error: Exception) -> bool:
    """Whether the memory of the machine or of a device was not enough.

    torch has two errors for it. They are recognised by name and message, because torch may not be imported here.
    """
    is_from_torch = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: " in str(error)
    return isinstance(error, MemoryError) or is_from_torch
