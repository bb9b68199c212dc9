"""Logging of a run: lines on the console (rank 0 only), the same lines in log.txt, and a progress bar on a terminal."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import transformers.utils.logging
from tqdm import tqdm

from llm.distributed.world import LOGGER_NAME

_LOGGER = logging.getLogger("llm")


class ConsoleHandler(logging.Handler):
    """Writes log records as lines on the console, above the progress bar if there is one.

    Args:
        to_stderr: whether all records go to the standard error; otherwise only warnings and errors do.
    """

    def __init__(self, *, to_stderr: bool) -> None:
        super().__init__()
        self.to_stderr = to_stderr

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record as one line, to the stream of this moment, because notebooks and tests replace streams."""
        stream = sys.stderr if self.to_stderr or record.levelno >= logging.WARNING else sys.stdout
        line = self.format(record)
        if stream is None:  # the process was started with this stream closed
            return
        try:
            # A terminal whose encoding has no dash shows \u2013 instead.
            encoding = getattr(stream, "encoding", None) or "utf-8"
            tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding), file=stream)
            stream.flush()
        except (OSError, ValueError):
            # The terminal or the reader of a pipe no longer exists. The run continues, and log.txt has the lines.
            pass


class FileHandler(logging.FileHandler):
    """Appends log records with their time to a file; a failure to write is reported once, and the run continues."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._has_reported_failure = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Report on the standard error, once, that a line could not be written."""
        reason = sys.exc_info()[1]
        if not self._has_reported_failure and sys.stderr is not None:
            self._has_reported_failure = True
            with suppress(OSError, ValueError):
                sys.stderr.write(
                    f"{self.baseFilename} cannot be written ({reason}): the lines that follow are missing there\n"
                )

    def close(self) -> None:
        """Close the file, even if its last lines cannot be written."""
        with suppress(OSError):
            super().close()


def setup_logging(*, is_main: bool, rank: int) -> None:
    """Send the package's log records to the console: on rank 0 all of them, on other ranks only what they wait for.

    Args:
        is_main: whether this process is rank 0.
        rank: of this process, which the lines of other ranks name.
    """
    teardown_logging()
    console = ConsoleHandler(to_stderr=not is_main)
    if not is_main:
        # Other ranks log the same lines about options and text as rank 0: keep only those of the waiting.
        console.addFilter(logging.Filter(LOGGER_NAME))
    console.setFormatter(logging.Formatter("%(message)s" if is_main else f"[rank {rank}] %(message)s"))
    _LOGGER.addHandler(console)
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.propagate = False
    _silence_known_noise()


def add_log_file(path: Path) -> None:
    """Append the log records of this process to a file too, with their time."""
    _LOGGER.addHandler(FileHandler(path))


def teardown_logging() -> None:
    """Remove and close the handlers that `setup_logging` and `add_log_file` added."""
    for handler in list(_LOGGER.handlers):
        _LOGGER.removeHandler(handler)
        handler.close()
    _LOGGER.propagate = True


class ProgressBar:
    """A progress bar of updates below the log lines, shown on a terminal only.

    Args:
        first_step: finished updates at the start.
        num_steps: updates of the run.
        is_main: whether this process is rank 0; other ranks show no bar.
    """

    def __init__(self, first_step: int, num_steps: int, *, is_main: bool) -> None:
        self.bar = tqdm(
            initial=first_step,
            total=num_steps,
            unit="step",
            dynamic_ncols=True,
            leave=False,
            disable=not (is_main and sys.stdout.isatty()),
            file=sys.stdout,
        )

    def advance(self, _: object = None) -> None:
        """Advance the bar by one update."""
        self.bar.update()

    def __enter__(self) -> ProgressBar:
        """Return the bar, which is shown already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar from the terminal."""
        self.bar.close()


def _silence_known_noise() -> None:
    """Suppress messages of libraries that carry no information about this run."""
    warnings.filterwarnings("ignore", message=r".*pin_memory.*no accelerator.*")
    warnings.filterwarnings("ignore", message=r".*`broadcast_buffers` is deprecated.*")
    warnings.filterwarnings("ignore", message=r".*OMP_NUM_THREADS/MKL_NUM_THREADS unset.*")
    for name in ("accelerate", "transformers", "datasets", "huggingface_hub", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Progress bars of libraries would be mixed with the bar and the lines of the run.
    transformers.utils.logging.disable_progress_bar()
    if getattr(threading.excepthook, "__module__", None) != __name__:
        threading.excepthook = _ignoring_tensorboard(threading.excepthook)


def _ignoring_tensorboard(
    report: Callable[[threading.ExceptHookArgs], object],
) -> Callable[[threading.ExceptHookArgs], object]:
    """Return a `threading.excepthook` that ignores TensorBoard's threads: the next record raises their error again."""

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            report(failure)

    return hook
