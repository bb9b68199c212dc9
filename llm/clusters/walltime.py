"""When the scheduler will end the job: from its variables, else from its own commands."""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Mapping

from llm.clusters.scheduler import UnknownError, ask_scheduler

log = logging.getLogger(__name__)

# How squeue, and ctime() in qstat, write a moment of local time.
_SLURM_TIME = "%Y-%m-%dT%H:%M:%S"
_PBS_TIME = "%a %b %d %H:%M:%S %Y"


def job_end(environment: Mapping[str, str] = os.environ) -> float | None:
    """When this job ends, in seconds since the epoch; None outside a job, without a limit, or where nobody says.

    `LLM_END_TIME`, which a job script may set, wins; then Slurm's `SLURM_JOB_END_TIME`; then what `squeue` or
    `qstat` answers within five seconds. Why nothing is known is said in one line. Never raises.
    """
    try:
        for name in ("LLM_END_TIME", "SLURM_JOB_END_TIME"):
            if environment.get(name):
                return _in_future(_number(name, environment[name]), name)
        if environment.get("SLURM_JOB_ID"):
            return _slurm_end(environment)
        if environment.get("PBS_JOBID"):
            return _pbs_end(environment)
    except UnknownError as reason:
        log.warning("walltime: not known (%s); --max_time, or LLM_END_TIME in the job script, says it", reason)
    return None


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UnknownError(f"{name}={text} is no number of seconds since 1970")
    return number


def _in_future(end: float, source: str) -> float:
    # Such as a variable that an interactive shell took along from a job that is over.
    if end <= time.time():
        raise UnknownError(f"{source} is in the past")
    return end


def _slurm_end(environment: Mapping[str, str]) -> float | None:
    command = ["squeue", "-h", "-j", environment["SLURM_JOB_ID"], "-o", "%e"]
    answer = ask_scheduler(command, {**environment, "SLURM_TIME_FORMAT": "standard"}).strip()
    if answer.upper() in ("N/A", "NONE", "UNKNOWN"):  # a partition without a limit
        return None
    return _in_future(_moment(answer, _SLURM_TIME, "squeue"), "squeue's end time")


def _pbs_end(environment: Mapping[str, str]) -> float | None:
    """The job's start and its limit: `stime` of PBS Pro and OpenPBS, `start_time` of Torque."""
    facts = pbs_facts(environment["PBS_JOBID"], environment)
    if "Resource_List.walltime" not in facts:
        return None
    limit = _length(facts["Resource_List.walltime"])
    began = facts.get("stime") or facts.get("start_time")
    if began is not None:
        end = _moment(began, _PBS_TIME, "qstat") + limit
    elif "resources_used.walltime" in facts:
        end = time.time() + limit - _length(facts["resources_used.walltime"])
    else:
        raise UnknownError("qstat does not say when the job began")
    return _in_future(end, "qstat's end time")


def pbs_facts(job: str, environment: Mapping[str, str]) -> dict[str, str]:
    """What PBS says of a job, by its own names: `Resource_List.walltime`, `depend`, ...

    Raises:
        UnknownError: it says nothing.
    """
    answer = ask_scheduler(["qstat", "-f", job], {**environment, "LC_ALL": "C"})
    whole = re.sub(r"\n\t(?![\w.]+ = )", "", answer)  # a long value goes on in the next line
    facts = dict(re.findall(r"^\s*([\w.]+) = (.+)$", whole, re.MULTILINE))
    if not facts:
        raise UnknownError("qstat says nothing of this job")
    return facts


def _moment(text: str, form: str, source: str) -> float:
    """Seconds since the epoch of a local time."""
    try:
        return time.mktime(time.strptime(text.strip(), form))
    except (ValueError, OverflowError):
        raise UnknownError(f"{source} answers {text.strip()!r}") from None


def _length(text: str) -> float:
    """Seconds of `[[D:]H:]M:S`, or of plain seconds."""
    try:
        parts = [int(part) for part in text.strip().split(":")]
    except ValueError:
        raise UnknownError(f"qstat answers a walltime of {text.strip()!r}") from None
    units = (1, 60, 3600, 86400)
    if len(parts) > len(units):
        raise UnknownError(f"qstat answers a walltime of {text.strip()!r}")
    return float(sum(number * unit for number, unit in zip(reversed(parts), units, strict=False)))
