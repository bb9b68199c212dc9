"""A run's folder: what lies where in it, whose it is, and how the run in it stands."""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from llm.clusters.scheduler import job_id
from llm.config.errors import Stopped, UserError
from llm.config.options import Options, OutputOptions
from llm.config.toml import to_toml
from llm.distributed.world import World
from llm.files.atomic import restore_replaced, write_text
from llm.files.lock import Lock, locked
from llm.training.checkpoints.layout import saved_steps
from llm.training.run_dir import layout
from llm.training.run_dir.console import add_log_file

log = logging.getLogger(__name__)


class RunDirectory:
    """Paths of a run's folder, and its status file. Made on every rank; only rank 0 writes.

    Attributes:
        claim: the lock, while rank 0 holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / layout.CONFIG
        self.status = path / layout.STATUS
        self.metrics = path / layout.METRICS
        self.log = path / layout.LOG
        self.trackers = path / layout.TRACKERS
        self.curves = path / layout.CURVES
        self.checkpoints = path / layout.CHECKPOINTS
        self.unverified = path / layout.UNVERIFIED
        self.results = path / layout.RESULTS
        self.model_card = path / layout.MODEL_CARD
        self.lock = path / layout.LOCK
        self.claim: Lock | None = None

    def __str__(self) -> str:
        """One line: where it is."""
        return f"output: {self.path}"

    def check(self, options: OutputOptions) -> None:
        """Makes the folder, and makes sure that no other run's results are in the way.

        Raises:
            UserError: it cannot be written, or holds another run that is neither resumed nor overwritten.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".{os.getpid()}.probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"--output_dir {self.path} cannot be written ({error.strerror}); choose another folder"
            ) from error
        strange = sorted(path.name for path in self._written() if not self._is_ours())
        if strange:
            raise UserError(
                f"--output_dir {self.path} holds {strange[0]}, which no run wrote and this one would replace; choose "
                "another folder"
            )
        used = any((self.path / name).exists() for name in layout.SIGNS_OF_TRAINING)
        finished = any((self.path / name).exists() for name in layout.WEIGHTS)
        if options.resume_from_checkpoint is True and finished and not saved_steps(self.checkpoints):
            raise UserError(
                f"--output_dir {self.path} holds a finished run without a checkpoint to continue from; train it "
                f"further with --model_name_or_path {self.path} into another folder, or replace it with "
                "--overwrite_output_dir and without --resume_from_checkpoint"
            )
        if used and not options.overwrite_output_dir and not options.resume_from_checkpoint:
            raise UserError(
                f"--output_dir {self.path} holds another run; continue it with --resume_from_checkpoint, "
                "replace it with --overwrite_output_dir, or choose another folder"
            )

    def empty(self) -> None:
        """Removes what an earlier run wrote, by its names, and nothing else; not the log and the status."""
        for entry in self._written():
            if entry in (self.log, self.status):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def require_lock(self, *, reread: bool = True) -> None:
        """Makes sure that no other run took the folder over; before anything of it is written or removed.

        Args:
            reread: whether to read the lock; otherwise what its heartbeat saw, some seconds ago, must do.

        Raises:
            LockLostError: one did.
        """
        if self.claim is not None and (reread or self.claim.is_lost):
            self.claim.check()

    def begin(self, options: Options, *, fresh: bool) -> None:
        """The run is going to train: clears the place of an earlier one, if it starts anew, and says how it runs.

        Args:
            options: as they were resolved; written in a form that `--config` takes back.
            fresh: whether nothing is continued; `check` has seen to it that then nothing is lost unasked.
        """
        if fresh:
            self.empty()
        write_text(self.config, to_toml(options))
        self.write_status("running")

    def _written(self) -> list[Path]:
        return [
            entry
            for entry in self.path.iterdir()
            if any(fnmatch.fnmatch(entry.name, pattern) for pattern in layout.WRITTEN)
        ]

    def _is_ours(self) -> bool:
        # A start that was killed early leaves its lock, and a log.
        return any(path.exists() for path in (self.status, self.metrics, self.checkpoints, self.lock))

    def remove_leftovers(self) -> None:
        """Removes what a killed run left half written; called under the lock."""
        restore_replaced(self.checkpoints, "step_*")
        for parent, pattern in ((self.path, ".export.*"), (self.checkpoints, ".step_*")):
            for leftover in parent.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)

    def read_status(self) -> str:
        """The status file as it is; empty where there is none."""
        try:
            return self.status.read_text()
        except OSError:
            return ""

    def write_status(self, state: str, **facts: Any) -> None:
        """Replaces status.json, unless it is another run's by now: `state` is running, done, stopped or failed.

        Raises:
            OSError: it cannot be written.
        """
        if self.claim is not None and not self.claim.is_held():
            return
        status = {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "pid": os.getpid(), **facts}
        text = json.dumps(status, indent=1) + "\n"
        try:
            write_text(self.status, text)
        except OSError:
            if not self.status.exists():
                raise
            # A full disk has no room for a second file, but that of the first one.
            with open(self.status, "r+", encoding="utf-8") as file:
                file.write(text)
                file.truncate()

    def write_final_status(self, state: str, **facts: Any) -> None:
        """`write_status` where something else ends the run, which must be heard whether this can be written or not."""
        try:
            self.write_status(state, **facts)
        except OSError as error:
            log.warning("%s cannot be written (%s): it says what was before", self.status, error.strerror)

    def write_forced_exit(self, reason: str, exit_code: int) -> None:
        """`write_final_status` of a start that does not come to it any more; that of another start stays."""
        try:
            status = json.loads(self.read_status())
            is_ours = (status["state"], status["pid"]) == ("running", os.getpid())
        except (ValueError, KeyError, TypeError):
            return
        if is_ours:
            self.write_final_status("failed", reason=reason, exit_code=exit_code)


@contextmanager
def claim_run_dir(
    folder: RunDirectory,
    options: Options,
    world: World,
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[None]:
    """Holds a run's folder for one start of the run.

    Nothing of an earlier run is touched before this one is going to train (`RunDirectory.begin`). However the
    block ends after that, status.json says so: `done` and `stopped` are written by the run itself, a mistake,
    a crash or a stop before the first update here.

    Args:
        folder: the run's.
        options: of the run.
        world: its processes.
        interruptible: what waiting for another run's lock is done in.

    Raises:
        UserError: on every rank, when the folder is another run's or cannot be written.
        Stopped: on every rank, by `interruptible`.
    """
    with ExitStack() as stack:

        def claim() -> None:
            folder.check(options.output)
            resumes = bool(options.output.resume_from_checkpoint)
            with interruptible():
                folder.claim = stack.enter_context(locked(folder.lock, job=job_id(), wait_for_stale=resumes))
                stack.callback(setattr, folder, "claim", None)
            if options.output.overwrite_output_dir and not options.output.resume_from_checkpoint:
                _refuse_to_remove_what_is_read(folder, options)
            folder.remove_leftovers()
            add_log_file(folder.log)

        earlier = folder.read_status() if world.is_main else ""
        world.run_on_main(claim)
        try:
            yield
        except Stopped as stopped:
            if world.is_main:
                steps = [step for step, _ in saved_steps(folder.checkpoints)]
                facts = {"step": max(steps, default=0), "reason": str(stopped), "exit_code": stopped.exit_code}
                folder.write_final_status("stopped", **facts)
            raise
        except BaseException as error:
            if world.is_main and (not earlier or folder.read_status() != earlier):
                code = getattr(error, "exit_code", 1)
                folder.write_final_status("failed", reason=f"{type(error).__name__}: {error}", exit_code=code)
            raise


def _refuse_to_remove_what_is_read(folder: RunDirectory, options: Options) -> None:
    named = {
        "--model_name_or_path": options.model.model_name_or_path,
        "--config_name": options.model.config_name,
        "--tokenizer_name": options.tokenizer.tokenizer_name,
    }
    for flag, name in named.items():
        if name and Path(name).exists() and Path(name).resolve().is_relative_to(folder.path.resolve()):
            raise UserError(
                f"--overwrite_output_dir would remove {flag} {name} before it is read; choose another --output_dir"
            )
