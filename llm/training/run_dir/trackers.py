"""Records of a run: lines in metrics.jsonl, and the experiment trackers of Accelerate."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import uuid
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker, get_available_trackers

from llm.config.errors import UserError, first_line
from llm.config.flags import flags_of
from llm.config.options import Options, TrackingOptions
from llm.files.atomic import write_text
from llm.training.run_dir.folder import RunDirectory
from llm.training.run_dir.layout import TENSORBOARD

log = logging.getLogger(__name__)


def choose_trackers(options: TrackingOptions) -> list[str]:
    """Return the names of the trackers that this run reports to, TensorBoard first.

    Raises:
        UserError: a requested tracker is unknown, not installed, or not logged in.
    """
    chosen = ["tensorboard"]
    if not options.with_tracking:
        if options.report_to != "all":
            log.info(
                "--report_to %s has no effect without --with_tracking: records go to TensorBoard only",
                options.report_to,
            )
        return chosen
    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    requested = [name.strip() for name in options.report_to.split(",") if name.strip()]
    for name in requested:
        if name == "all":
            # `all` means all installed trackers; one that needs a login is left out with a warning.
            chosen += [other for other in sorted(available) if _is_usable(other)]
        elif name != "none":
            _check_tracker(name, known, available)
            chosen.append(name)
    return list(dict.fromkeys(chosen))


def _check_tracker(name: str, known: list[str], available: set[str]) -> None:
    if name not in known:
        raise UserError(f"--report_to {name}: unknown tracker; choose all, or from {', '.join(known)}")
    if name not in available:
        raise UserError(f"--report_to {name} needs a package that is not installed: pip install {name}")
    if name == "wandb" and not _wandb_is_logged_in():
        raise UserError(
            "--report_to wandb is not logged in: run wandb login, or set WANDB_API_KEY or WANDB_MODE=offline"
        )


def _is_usable(name: str) -> bool:
    if name == "wandb" and not _wandb_is_logged_in():
        log.warning("wandb is installed but not logged in: no records go there (run wandb login)")
        return False
    return True


def _wandb_is_logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    wandb = importlib.import_module("wandb")
    return bool(wandb.api.api_key)


class Tracking:
    """Writes the records of a run. Every rank has one; only rank 0 writes.

    Args:
        accelerator: opens the trackers.
        run_dir: the run's folder; None if nothing is kept.
    """

    def __init__(self, accelerator: Accelerator, run_dir: RunDirectory | None) -> None:
        self.accelerator = accelerator
        self.metrics = run_dir.metrics if run_dir else None
        self._run_id_file = run_dir.trackers if run_dir else None
        self._sampled_steps: set[int] = set()

    def start(self, trackers: list[str], options: Options, *, first_step: int) -> None:
        """Open the trackers, and remove the records after step `first_step` from metrics.jsonl.

        Args:
            trackers: their names, as `choose_trackers` returns them.
            options: of the run; trackers record them without secrets.
            first_step: finished updates at the start; 0 for a run from scratch.

        Raises:
            UserError: a tracker refuses to start.
        """
        if self.metrics is None:
            return
        if self.accelerator.is_main_process:
            self._sampled_steps = _truncate_records(self.metrics, first_step)
        # Accelerate would name the folder of a tracker that it builds itself after the project.
        purge = {"purge_step": first_step + 1} if first_step else {}
        tensorboard = TensorBoardTracker(TENSORBOARD, self.metrics.parent, **purge)
        self.accelerator.project_configuration.set_directories(str(self.metrics.parent))
        self.accelerator.log_with = [tensorboard, *(name for name in trackers if name != "tensorboard")]
        try:
            # A resumed run continues under the same id in the tracker.
            init_kwargs = {"wandb": {"id": self._run_id(first_step), "resume": "allow"}}
            name = options.output.run_name or self.metrics.parent.resolve().name
            self.accelerator.init_trackers(name, init_kwargs=init_kwargs)
            for tracker in self.accelerator.trackers:
                if tracker is not tensorboard:
                    tracker.store_init_configuration(_flatten_options(options))
        except Exception as error:  # every tracker has its own kinds of failure
            names = ", ".join(trackers)
            raise UserError(f"--report_to: one of the trackers {names} does not start: {first_line(error)}") from error

    def has_samples(self, step: int) -> bool:
        """Return whether an earlier start of the run has recorded samples of this step; valid on rank 0 only."""
        return step in self._sampled_steps

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Write one record: all values to metrics.jsonl, and the numbers among them to the trackers.

        Args:
            step: finished updates.
            values: by key; nan and infinite numbers become None, because JSON has no nan.

        Raises:
            UserError: the record cannot be written.
        """
        if self.metrics is None or not self.accelerator.is_main_process:
            return
        values = {key: None if _is_nan_or_inf(value) else value for key, value in values.items()}
        try:
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            self._track(step, values)
        except OSError as error:
            raise UserError(
                f"the records of step {step} cannot be written into {self.metrics.parent} ({error.strerror or error}); "
                "make room; the finished checkpoints are complete"
            ) from error

    def _track(self, step: int, values: dict[str, Any]) -> None:
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        for tracker in self.accelerator.trackers if numbers else ():
            # W&B accepts no record for a step that a killed start of this run has sent already.
            if tracker.name != "wandb" or step >= tracker.tracker.step:
                tracker.log(numbers, step=step)

    def _run_id(self, first_step: int) -> str:
        """Return the id of this run in trackers; all starts of a run use the id in its folder."""
        assert self._run_id_file is not None
        try:
            stored = json.loads(self._run_id_file.read_text())["run_id"] if first_step else None
        except (OSError, ValueError, KeyError, TypeError):
            stored = None
        run_id = str(stored or uuid.uuid4().hex)
        if self.accelerator.is_main_process and stored is None:
            write_text(self._run_id_file, json.dumps({"run_id": run_id}) + "\n")
        return run_id

    def close(self) -> None:
        """Close the trackers. Accelerate's `end_training` is not used, because it destroys the process group too."""
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except OSError as error:
                # Not raised, because it would hide the error that ended the run.
                log.info("tracker %s could not be closed (%s)", tracker.name, error.strerror or error)


def _is_nan_or_inf(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _flatten_options(options: Options) -> dict[str, Any]:
    """Return the options as trackers accept them: by flag name, without secrets, as numbers and strings."""
    values: dict[str, Any] = {}
    for flag in flags_of(Options).values():
        value = getattr(getattr(options, flag.group), flag.name)
        if value is not None and not flag.secret:
            values[flag.name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return values


def _truncate_records(metrics: Path, last_step: int) -> set[int]:
    """Remove the records after step `last_step`, so that a resumed run does not write records twice.

    Returns:
        The steps up to `last_step` that have samples. Samples are drawn after the checkpoint of their step is saved, so
        that a start that resumes from it has to know whether they exist.
    """
    if not metrics.exists():
        return set()
    kept = []
    sampled_steps = set()
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut by the kill that made the resume necessary
        if record["step"] <= last_step:
            kept.append(line + "\n")
            if "samples" in record:
                sampled_steps.add(int(record["step"]))
    write_text(metrics, "".join(kept))
    return sampled_steps
