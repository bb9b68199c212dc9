"""Records: one line on the console, one in metrics.jsonl, and the trackers of Accelerate."""

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
    """The trackers that this run reports to, TensorBoard first, checked before any work.

    Raises:
        UserError: a tracker is unknown, not installed, or not logged in.
    """
    chosen = ["tensorboard"]
    if not options.with_tracking:
        if options.report_to != "all":
            log.info("--report_to %s needs --with_tracking; records go to TensorBoard alone", options.report_to)
        return chosen
    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    asked = [name.strip() for name in options.report_to.split(",") if name.strip()]
    for name in asked:
        if name == "all":
            # `all` is what the machine has; a tracker that waits for a login is left out, aloud.
            chosen += [other for other in sorted(available) if _is_usable(other)]
        elif name != "none":
            _check_tracker(name, known, available)
            chosen.append(name)
    return list(dict.fromkeys(chosen))


def _check_tracker(name: str, known: list[str], available: set[str]) -> None:
    if name not in known:
        raise UserError(f"--report_to {name} is no tracker that is known here; known are all, {', '.join(known)}")
    if name not in available:
        raise UserError(f"--report_to {name} needs a package that is not installed: pip install {name}")
    if name == "wandb" and not _wandb_is_logged_in():
        raise UserError(
            "--report_to wandb is not logged in: run wandb login, or set WANDB_API_KEY or WANDB_MODE=offline"
        )


def _is_usable(name: str) -> bool:
    if name == "wandb" and not _wandb_is_logged_in():
        log.warning("wandb is installed but not logged in: it is left out (run wandb login)")
        return False
    return True


def _wandb_is_logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return True
    wandb = importlib.import_module("wandb")
    return bool(wandb.api.api_key)


class Tracking:
    """Where the records of a run go. Made on every rank; only rank 0 writes."""

    def __init__(self, accelerator: Accelerator, folder: RunDirectory | None) -> None:
        self.accelerator = accelerator
        self.metrics = folder.metrics if folder else None
        self.identity = folder.trackers if folder else None
        self._sampled: set[int] = set()

    def start(self, trackers: list[str], options: Options, *, first_step: int) -> None:
        """Opens the trackers and cuts metrics.jsonl back to update `first_step`.

        Raises:
            UserError: a tracker refuses to start.
        """
        if self.metrics is None:
            return
        if self.accelerator.is_main_process:
            self._sampled = _cut_back(self.metrics, first_step)
        # Built here and not by name, because its folder is not called after the project.
        purge = {"purge_step": first_step + 1} if first_step else {}
        tensorboard = TensorBoardTracker(TENSORBOARD, self.metrics.parent, **purge)
        self.accelerator.project_configuration.set_directories(str(self.metrics.parent))
        self.accelerator.log_with = [tensorboard, *(name for name in trackers if name != "tensorboard")]
        try:
            # A run that is resumed goes on under its name in the tracker, too.
            continued = {"wandb": {"id": self._run_id(first_step), "resume": "allow"}}
            name = options.output.run_name or self.metrics.parent.resolve().name
            self.accelerator.init_trackers(name, init_kwargs=continued)
            for tracker in self.accelerator.trackers:
                if tracker is not tensorboard:
                    tracker.store_init_configuration(_flat(options))
        except Exception as error:  # every tracker has its own kinds of failure
            names = ", ".join(trackers)
            raise UserError(f"one of the trackers {names} does not start: {first_line(error)}") from error

    def has_samples(self, step: int) -> bool:
        """Whether an earlier start has recorded the samples of this update already; asked on rank 0."""
        return step in self._sampled

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Writes one record: finite numbers go to the trackers, everything to metrics.jsonl (JSON has no nan).

        Raises:
            UserError: it cannot be written.
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
                "make room: the checkpoints are whole"
            ) from error

    def _track(self, step: int, values: dict[str, Any]) -> None:
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        for tracker in self.accelerator.trackers if numbers else ():
            # What a killed start of this run has sent already cannot be sent again, or taken back.
            if tracker.name != "wandb" or step >= tracker.tracker.step:
                tracker.log(numbers, step=step)

    def _run_id(self, first_step: int) -> str:
        """The name of this run in trackers, kept in its folder over all its starts."""
        assert self.identity is not None
        try:
            kept = json.loads(self.identity.read_text())["run_id"] if first_step else None
        except (OSError, ValueError, KeyError, TypeError):
            kept = None
        run_id = str(kept or uuid.uuid4().hex)
        if self.accelerator.is_main_process and kept is None:
            write_text(self.identity, json.dumps({"run_id": run_id}) + "\n")
        return run_id

    def close(self) -> None:
        """Ends the trackers (Accelerate's `end_training` would give up the process group too)."""
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except OSError as error:
                # The run's end, good or bad, must be heard, not this.
                log.info("%s did not end well (%s)", tracker.name, error.strerror or error)


def _is_nan_or_inf(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _flat(options: Options) -> dict[str, Any]:
    """Options as trackers take them: flat, no secrets, numbers and text."""
    values: dict[str, Any] = {}
    for flag in flags_of(Options).values():
        value = getattr(getattr(options, flag.group), flag.name)
        if value is not None and not flag.secret:
            values[flag.name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return values


def _cut_back(metrics: Path, last_step: int) -> set[int]:
    """Keeps the records up to update `last_step`, so that a resumed run writes none of them twice.

    Returns:
        The updates that samples are kept of: those are made after the checkpoint at a run's end.
    """
    if not metrics.exists():
        return set()
    kept, sampled = [], set()
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # torn by the kill that made the resume necessary
        if record["step"] <= last_step:
            kept.append(line + "\n")
            if "samples" in record:
                sampled.add(int(record["step"]))
    write_text(metrics, "".join(kept))
    return sampled
