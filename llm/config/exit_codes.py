"""How a command ends: its exit code, and a line on the standard error for each mistake."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from llm.config.errors import UserError

EXIT_INTERRUPTED = 130
_FULL = (errno.ENOSPC, errno.EDQUOT)


def run_command(command: Callable[[], int]) -> int:
    """Runs a command and returns its exit code.

    A `UserError` becomes ``error: ...`` lines and its own code; Ctrl-C says nothing and is 130; a
    reader of the output that left (head, less) is no error; a full disk is one line, whatever was
    written to it, and so is memory that was not enough. Anything else is a bug and keeps its
    traceback. Of the processes of a node, which all meet most mistakes, the first one says them.
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
        # Python flushes once more at its exit, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _FULL:
            raise
        sys.stderr.write(f"error: {error.filename or 'a file'} cannot be written ({error.strerror}); make room\n")
        return UserError.exit_code
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        what = str(error).splitlines()[0] if str(error) else "no memory"
        sys.stderr.write(
            f"error: out of memory ({what}); make the batch smaller (--per_device_train_batch_size), or the model, or"
            " train it with --gradient_checkpointing\n"
        )
        return UserError.exit_code
    return code


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory of the machine or of a device was not enough; torch, which may not be imported, has two ways."""
    is_torchs = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: " in str(error)
    return isinstance(error, MemoryError) or is_torchs
