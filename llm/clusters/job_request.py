"""Read the resources and options that this job requested, so that the next job of a chain can request the same.

The result includes the options that were given to qsub or sbatch on the command line, which are not in the job script.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

from llm.clusters.allocation import JobAllocation
from llm.clusters.scheduler import SchedulerError, pbs_job_attributes, run_scheduler_command

log = logging.getLogger(__name__)

# Options of sbatch, and the variables of a job that hold their values.
_SLURM_OPTIONS = {
    "--nodes": "SLURM_JOB_NUM_NODES",
    "--account": "SLURM_JOB_ACCOUNT",
    "--partition": "SLURM_JOB_PARTITION",
    "--qos": "SLURM_JOB_QOS",
    "--reservation": "SLURM_JOB_RESERVATION",
    "--gpus-per-node": "SLURM_GPUS_PER_NODE",
}
# Options of qsub, each with the start of its value, and qstat's names of the attributes that hold the rest.
_PBS_OPTIONS = {
    ("-l", "select="): "Resource_List.select",
    ("-l", "walltime="): "Resource_List.walltime",
    ("-A", ""): "Account_Name",
}


@dataclass(frozen=True)
class JobRequest:
    """The request of a job to its scheduler.

    Attributes:
        options: of qsub or sbatch.
        variables: names of the variables that were passed to the job.
        has_successor: whether PBS runs this job again, and a job that waits for its end is already queued.
    """

    options: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    has_successor: bool = False


def read_job_request(allocation: JobAllocation, environment: Mapping[str, str]) -> JobRequest:
    """Ask the scheduler what this job requested; if it does not answer, log one line and return an empty request."""
    assert allocation.job is not None
    try:
        if allocation.scheduler == "slurm":
            return _slurm_request(allocation.job, environment)
        return _pbs_request(allocation.job, environment)
    except SchedulerError as reason:
        log.warning(
            "chain: the request of this job is unknown (%s); the next job requests what the script says", reason
        )
        return JobRequest()


def _slurm_request(job: str, environment: Mapping[str, str]) -> JobRequest:
    options = [f"{option}={environment[name]}" for option, name in _SLURM_OPTIONS.items() if environment.get(name)]
    limit = run_scheduler_command(["squeue", "-h", "-j", job, "-o", "%l"], environment).strip()
    if re.fullmatch(r"[\d:-]+", limit):  # a partition may have no limit
        options.append(f"--time={limit}")
    return JobRequest(options=tuple(options))


def _pbs_request(job: str, environment: Mapping[str, str]) -> JobRequest:
    attributes = pbs_job_attributes(job, environment)
    options: list[str] = []
    for (flag, prefix), name in _PBS_OPTIONS.items():
        if name in attributes:
            options += [flag, prefix + attributes[name]]
    if environment.get("PBS_O_QUEUE"):  # the queue of the submission; qstat names the one that it routed the job to
        options += ["-q", environment["PBS_O_QUEUE"]]
    variables = re.findall(r"(?:^|,)([A-Za-z_]\w*)=", attributes.get("Variable_List", ""))
    run_count = attributes.get("run_count", "1")
    runs_again = run_count.isdigit() and int(run_count) > 1
    return JobRequest(
        options=tuple(options),
        variables=tuple(name for name in variables if not name.startswith("PBS_")),
        has_successor=runs_again and "beforeany:" in attributes.get("depend", ""),
    )
