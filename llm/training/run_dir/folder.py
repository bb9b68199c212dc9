"""The folder of a run: its paths, its lock and its status file."""

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
    """The paths in a run's folder, and its status file. Every rank has one; only rank 0 writes.

    Attributes:
        path: the folder itself; the other paths bear the names of `llm.training.run_dir.layout`.
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
        self.save_request = path / layout.SAVE
        self.lock = path / layout.LOCK
        self.claim: Lock | None = None

    def __str__(self) -> str:
        """Return the line that names the folder."""
        return f"output: {self.path}"

    def check(self, options: OutputOptions) -> None:
        """Create the folder, and check that this run does not replace the results of another run.

        Raises:
            UserError: the folder cannot be written, or holds another run that is neither resumed nor overwritten.
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
        if not self._has_a_run():
            external = sorted(path.name for path in self._run_files())
            if external:
                raise UserError(
                    f"--output_dir {self.path} holds {external[0]}, which no run wrote and this run would replace; "
                    "choose another folder"
                )
        is_used = any((self.path / name).exists() for name in layout.SIGNS_OF_TRAINING)
        is_finished = any((self.path / name).exists() for name in layout.WEIGHTS)
        if options.resume_from_checkpoint is True and is_finished and not saved_steps(self.checkpoints):
            raise UserError(
                f"--output_dir {self.path} holds a finished run without a checkpoint to continue from; train it "
                f"further with --model_name_or_path {self.path} into another folder, or replace it with "
                "--overwrite_output_dir and without --resume_from_checkpoint"
            )
        if is_used and not options.overwrite_output_dir and not options.resume_from_checkpoint:
            raise UserError(
                f"--output_dir {self.path} holds another run; continue it with --resume_from_checkpoint, "
                "replace it with --overwrite_output_dir, or choose another folder"
            )

    def remove_run_files(self) -> None:
        """Remove the files and folders of an earlier run, by their names, except the log and the status file."""
        for entry in self._run_files():
            if entry in (self.log, self.status):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def require_lock(self, *, reread: bool = True) -> None:
        """Check that no other run has taken the folder over; called before a file in it is written or removed.

        Args:
            reread: whether to read the lock file now; otherwise the result of the lock's last heartbeat, which is some
                seconds old, is used.

        Raises:
            LockLostError: another run has taken the folder over.
        """
        if self.claim is not None and (reread or self.claim.is_lost):
            self.claim.check()

    def begin(self, options: Options, *, fresh: bool) -> None:
        """Write the options and the status `running`; remove an earlier run's files first if this run is fresh.

        Args:
            options: the resolved options; they are written in a form that `--config` accepts.
            fresh: whether the run starts from scratch. `check` has already refused to overwrite another run.
        """
        if fresh:
            self.remove_run_files()
        write_text(self.config, to_toml(options))
        self.write_status("running")

    def remove_leftovers(self) -> None:
        """Remove the temporary files of a killed run; the caller holds the lock."""
        restore_replaced(self.checkpoints, "step_*")
        for parent, pattern in ((self.path, ".export.*"), (self.checkpoints, ".step_*")):
            for leftover in parent.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)

    def read_status(self) -> str:
        """Return the content of the status file, or an empty string if the file cannot be read."""
        try:
            return self.status.read_text()
        except OSError:
            return ""

    def write_status(
        self, state: str, *, step: int | None = None, reason: str | None = None, exit_code: int | None = None
    ) -> None:
        """Replace status.json, unless another run has taken the folder over; what is None is left out.

        Args:
            state: running, done, stopped or failed.
            step: finished updates.
            reason: why the run ended.
            exit_code: with which the process ends.

        Raises:
            OSError: the file cannot be written.
        """
        if self.claim is not None and not self.claim.is_held():
            return
        facts = {"step": step, "reason": reason, "exit_code": exit_code}
        status = {
            "state": state,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "pid": os.getpid(),
            **{key: value for key, value in facts.items() if value is not None},
        }
        content = json.dumps(status, indent=1) + "\n"
        try:
            write_text(self.status, content)
        except OSError:
            if not self.status.exists():
                raise
            # A full disk has no room for a second file, but the blocks of the existing file can be overwritten.
            with open(self.status, "r+", encoding="utf-8") as file:
                file.write(content)
                file.truncate()

    def write_final_status(self, state: str, *, reason: str, exit_code: int, step: int | None = None) -> None:
        """Call `write_status`; only log a failure to write, so that it does not hide the error that ends the run."""
        try:
            self.write_status(state, step=step, reason=reason, exit_code=exit_code)
        except OSError as error:
            log.warning("%s cannot be written (%s); it still has its earlier content", self.status, error.strerror)

    def write_forced_exit(self, reason: str, exit_code: int) -> None:
        """Write the status `failed` before the process is ended at once; the status of another start is kept."""
        try:
            status = json.loads(self.read_status())
            is_this_start = (status["state"], status["pid"]) == ("running", os.getpid())
        except (ValueError, KeyError, TypeError):
            return
        if is_this_start:
            self.write_final_status("failed", reason=reason, exit_code=exit_code)

    def _run_files(self) -> list[Path]:
        return [
            entry
            for entry in self.path.iterdir()
            if any(fnmatch.fnmatch(entry.name, pattern) for pattern in layout.WRITTEN)
        ]

    def _has_a_run(self) -> bool:
        # A start that was killed early leaves its lock and a log.
        return any(path.exists() for path in (self.status, self.metrics, self.checkpoints, self.lock))


@contextmanager
def claim_run_dir(
    run_dir: RunDirectory,
    options: Options,
    world: World,
    interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[None]:
    """Hold the lock of a run's folder during one start of the run.

    No file of an earlier run is changed before this run begins to train (`RunDirectory.begin`). After that,
    status.json always records how the block ended: the run itself writes `done` and `stopped`; this function writes the
    status after an error, a crash or a stop before the first update.

    Args:
        run_dir: the run's folder.
        options: of the run.
        world: the processes of the run.
        interruptible: makes the context in which rank 0 waits for the lock of another run.

    Raises:
        UserError: on every rank, if the folder belongs to another run or cannot be written.
        Stopped: on every rank, if `interruptible` raises it on rank 0.
    """
    with ExitStack() as stack:

        def claim() -> None:
            run_dir.check(options.output)
            resumes = bool(options.output.resume_from_checkpoint)
            with interruptible():
                run_dir.claim = stack.enter_context(locked(run_dir.lock, job=job_id(), wait_for_stale=resumes))
                stack.callback(setattr, run_dir, "claim", None)
            if options.output.overwrite_output_dir and not resumes:
                _refuse_to_remove_inputs(run_dir, options)
            run_dir.remove_leftovers()
            add_log_file(run_dir.log)

        earlier = run_dir.read_status() if world.is_main else ""
        world.run_on_main(claim)
        try:
            yield
        except Stopped as stopped:
            if world.is_main:
                last_step = max((step for step, _ in saved_steps(run_dir.checkpoints)), default=0)
                run_dir.write_final_status("stopped", step=last_step, reason=str(stopped), exit_code=stopped.exit_code)
            raise
        except BaseException as error:
            if world.is_main and (not earlier or run_dir.read_status() != earlier):
                code = getattr(error, "exit_code", 1)
                run_dir.write_final_status("failed", reason=f"{type(error).__name__}: {error}", exit_code=code)
            raise


def _refuse_to_remove_inputs(run_dir: RunDirectory, options: Options) -> None:
    inputs = {
        "--model_name_or_path": options.model.model_name_or_path,
        "--config_name": options.model.config_name,
        "--tokenizer_name": options.tokenizer.tokenizer_name,
    }
    for flag, name in inputs.items():
        if name and Path(name).exists() and Path(name).resolve().is_relative_to(run_dir.path.resolve()):
            raise UserError(
                f"--overwrite_output_dir would remove {flag} {name} before it is read; choose another --output_dir"
            )
