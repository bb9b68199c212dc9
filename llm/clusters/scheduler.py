"""Facts about this job from PBS or Slurm (its name, its end, its attributes), and calls of their commands."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 5.0
# How squeue, and ctime() in qstat, print a local time.
_SLURM_TIME = "%Y-%m-%dT%H:%M:%S"
_PBS_TIME = "%a %b %d %H:%M:%S %Y"


class SchedulerError(Exception):
    """The scheduler's answer is missing or cannot be used; the message gives the reason."""


def run_scheduler_command(
    command: list[str], environment: Mapping[str, str], *, timeout_seconds: float | None = None
) -> str:
    """Run a command of the scheduler and return its standard output.

    Args:
        command: the program, which is searched for in the environment's PATH, and its arguments.
        environment: all variables of the command.
        timeout_seconds: how long the command may take; None is `TIMEOUT_SECONDS`, 5 s.

    Raises:
        SchedulerError: the program does not exist, fails, or takes longer.
    """
    program = shutil.which(command[0], path=environment.get("PATH"))
    if program is None:
        raise SchedulerError(f"there is no {command[0]} here")
    seconds = TIMEOUT_SECONDS if timeout_seconds is None else timeout_seconds
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
        raise SchedulerError(f"{command[0]}: {error}") from error
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{command[0]} gave no answer in {seconds:.0f} s") from None
    if result.returncode != 0:
        output = result.stderr.strip() or result.stdout.strip() or f"exit code {result.returncode}"
        raise SchedulerError(f"{command[0]}: {output.splitlines()[0]}")
    return result.stdout


# Name


def job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the name of this process's job, such as `slurm 1234` or `pbs 1234.server`; None outside a job.

    A job that was requeued keeps its name when it runs again.
    """
    for scheduler, name in (("slurm", "SLURM_JOB_ID"), ("pbs", "PBS_JOBID")):
        if environment.get(name):
            return f"{scheduler} {environment[name]}"
    return None


# End


def job_end(environment: Mapping[str, str] = os.environ) -> float | None:
    """Return when the scheduler will end this job, in seconds since the epoch.

    `LLM_END_TIME`, which a job script may set, comes first; then Slurm's `SLURM_JOB_END_TIME`; then the answer of
    `squeue` or `qstat`, which is awaited for five seconds. Never raises.

    Returns:
        None outside a job, without a limit, or when the end is unknown; in the last case one line of the log gives the
        reason.
    """
    try:
        for name in ("LLM_END_TIME", "SLURM_JOB_END_TIME"):
            if environment.get(name):
                return _in_future(_number(name, environment[name]), name)
        if environment.get("SLURM_JOB_ID"):
            return _slurm_end(environment)
        if environment.get("PBS_JOBID"):
            return _pbs_end(environment)
    except SchedulerError as reason:
        log.warning("walltime: unknown (%s); set --max_time, or LLM_END_TIME in the job script", reason)
    return None


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise SchedulerError(f"{name}={text} is not a number of seconds since 1970")
    return number


def _in_future(end: float, source: str) -> float:
    # An interactive shell may have inherited the variable from a job that has ended.
    if end <= time.time():
        raise SchedulerError(f"{source} is in the past")
    return end


def _slurm_end(environment: Mapping[str, str]) -> float | None:
    command = ["squeue", "-h", "-j", environment["SLURM_JOB_ID"], "-o", "%e"]
    answer = run_scheduler_command(command, {**environment, "SLURM_TIME_FORMAT": "standard"}).strip()
    if answer.upper() in ("N/A", "NONE", "UNKNOWN"):  # a partition without a limit
        return None
    return _in_future(_epoch_seconds(answer, _SLURM_TIME, "squeue"), "squeue's end time")


def _pbs_end(environment: Mapping[str, str]) -> float | None:
    """Add the limit to the start time: `stime` of PBS Pro and OpenPBS, `start_time` of Torque."""
    attributes = pbs_job_attributes(environment["PBS_JOBID"], environment)
    if "Resource_List.walltime" not in attributes:
        return None
    limit = _duration_seconds(attributes["Resource_List.walltime"])
    start = attributes.get("stime") or attributes.get("start_time")
    if start is not None:
        end = _epoch_seconds(start, _PBS_TIME, "qstat") + limit
    elif "resources_used.walltime" in attributes:
        end = time.time() + limit - _duration_seconds(attributes["resources_used.walltime"])
    else:
        raise SchedulerError("qstat does not say when the job began")
    return _in_future(end, "qstat's end time")


def pbs_job_attributes(job: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Run `qstat -f JOB` and return its attributes by PBS's own names: `Resource_List.walltime`, `depend`, ...

    Raises:
        SchedulerError: qstat fails, or lists no attribute.
    """
    output = run_scheduler_command(["qstat", "-f", job], {**environment, "LC_ALL": "C"})
    unfolded = re.sub(r"\n\t(?![\w.]+ = )", "", output)  # qstat continues a long value on the next line
    attributes = dict(re.findall(r"^\s*([\w.]+) = (.+)$", unfolded, re.MULTILINE))
    if not attributes:
        raise SchedulerError("qstat lists no attributes of this job")
    return attributes


def _epoch_seconds(text: str, time_format: str, source: str) -> float:
    """Seconds since the epoch of a local time."""
    try:
        return time.mktime(time.strptime(text.strip(), time_format))
    except (ValueError, OverflowError):
        raise SchedulerError(f"{source} answers {text.strip()!r}") from None


def _duration_seconds(text: str) -> float:
    """Seconds of `[[D:]H:]M:S`, or of plain seconds."""
    try:
        parts = [int(part) for part in text.strip().split(":")]
    except ValueError:
        raise SchedulerError(f"qstat answers a walltime of {text.strip()!r}") from None
    units = (1, 60, 3600, 86400)
    if len(parts) > len(units):
        raise SchedulerError(f"qstat answers a walltime of {text.strip()!r}")
    return float(sum(number * unit for number, unit in zip(reversed(parts), units, strict=False)))
