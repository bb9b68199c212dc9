"""The run's words: lines on the console (rank 0 only), the same lines in log.txt, a bar on a terminal."""

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
    """Writes lines above a progress bar, where there is one."""

    def __init__(self, *, to_stderr: bool) -> None:
        super().__init__()
        self.to_stderr = to_stderr

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record as one line; the stream is looked up now, since tests and notebooks swap it."""
        stream = sys.stderr if self.to_stderr or record.levelno >= logging.WARNING else sys.stdout
        text = self.format(record)
        if stream is None:  # started with its output closed
            return
        try:
            # A terminal of another encoding gets \u2013 where it has no dash.
            encoding = getattr(stream, "encoding", None) or "utf-8"
            tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)
            stream.flush()
        except (OSError, ValueError):
            # The terminal, or the reader of a pipe, went away; the run goes on and log.txt has the lines.
            pass


class FileHandler(logging.FileHandler):
    """Appends lines with their time to a file; where it cannot, it says so once, and the run goes on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self._is_said = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Called where a line could not be written."""
        reason = sys.exc_info()[1]
        if not self._is_said and sys.stderr is not None:
            self._is_said = True
            with suppress(OSError, ValueError):
                sys.stderr.write(f"{self.baseFilename} takes no more lines ({reason})\n")

    def close(self) -> None:
        """Closes the file, with or without what it did not take."""
        with suppress(OSError):
            super().close()


def setup_logging(*, is_main: bool, rank: int) -> None:
    """Sends the package's lines to the console: all of rank 0's; of the others', what they wait for."""
    teardown_logging()
    console = ConsoleHandler(to_stderr=not is_main)
    if not is_main:
        # What they say of options and text, rank 0 says too.
        console.addFilter(logging.Filter(LOGGER_NAME))
    console.setFormatter(logging.Formatter("%(message)s" if is_main else f"[rank {rank}] %(message)s"))
    _LOGGER.addHandler(console)
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.propagate = False
    _silence_known_noise()


def add_log_file(path: Path) -> None:
    """Appends the lines of this process to a file too, with their time."""
    _LOGGER.addHandler(FileHandler(path))


def teardown_logging() -> None:
    """Closes what `setup_logging` and `add_log_file` opened."""
    for handler in list(_LOGGER.handlers):
        _LOGGER.removeHandler(handler)
        handler.close()
    _LOGGER.propagate = True


class ProgressBar:
    """A progress bar of updates below the lines; on a terminal only."""

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
        """One more update."""
        self.bar.update()

    def __enter__(self) -> ProgressBar:
        """Shows the bar."""
        return self

    def __exit__(self, *_: object) -> None:
        """Removes the bar."""
        self.bar.close()


def _silence_known_noise() -> None:
    """Lines of libraries that say nothing about this run."""
    warnings.filterwarnings("ignore", message=r".*pin_memory.*no accelerator.*")
    warnings.filterwarnings("ignore", message=r".*`broadcast_buffers` is deprecated.*")
    warnings.filterwarnings("ignore", message=r".*OMP_NUM_THREADS/MKL_NUM_THREADS unset.*")
    for name in ("accelerate", "transformers", "datasets", "huggingface_hub", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Bars of libraries would tear ours and the lines apart.
    transformers.utils.logging.disable_progress_bar()
    if getattr(threading.excepthook, "__module__", None) != __name__:
        threading.excepthook = _without_tensorboard(threading.excepthook)


def _without_tensorboard(
    say: Callable[[threading.ExceptHookArgs], object],
) -> Callable[[threading.ExceptHookArgs], object]:
    """What a thread's failure is told to; that of TensorBoard's own is raised again by the next record."""

    def hook(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            say(failure)

    return hook
