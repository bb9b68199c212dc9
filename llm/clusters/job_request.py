"""What a job asked its scheduler for: on the command line of qsub or sbatch too, which its script does not know."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

from llm.clusters.allocation import JobAllocation
from llm.clusters.scheduler import UnknownError, ask_scheduler
from llm.clusters.walltime import pbs_facts

log = logging.getLogger(__name__)

# sbatch's options, and the variables in which a job finds them.
_OF_SLURM = {
    "--nodes": "SLURM_JOB_NUM_NODES",
    "--account": "SLURM_JOB_ACCOUNT",
    "--partition": "SLURM_JOB_PARTITION",
    "--qos": "SLURM_JOB_QOS",
    "--reservation": "SLURM_JOB_RESERVATION",
    "--gpus-per-node": "SLURM_GPUS_PER_NODE",
}
# qsub's options, and qstat's names for them.
_OF_PBS = {
    ("-l", "select="): "Resource_List.select",
    ("-l", "walltime="): "Resource_List.walltime",
    ("-A", ""): "Account_Name",
}


@dataclass(frozen=True)
class JobRequest:
    """What the next job has to ask for, to get the same.

    Attributes:
        options: of qsub or sbatch.
        variables: names of those that the job was given.
        is_followed: whether PBS runs this job again, and one that waits for its end is queued already.
    """

    options: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    is_followed: bool = False


def read_job_request(place: JobAllocation, environment: Mapping[str, str]) -> JobRequest:
    """What this job asked for; a scheduler that does not say it is a line in the log."""
    assert place.job is not None
    try:
        return (_slurm if place.scheduler == "slurm" else _pbs)(place.job, environment)
    except UnknownError as reason:
        log.warning(
            "chain: what this job asked for is not known (%s); the next one asks for what the script says", reason
        )
        return JobRequest()


def _slurm(job: str, environment: Mapping[str, str]) -> JobRequest:
    options = [f"{option}={environment[name]}" for option, name in _OF_SLURM.items() if environment.get(name)]
    limit = ask_scheduler(["squeue", "-h", "-j", job, "-o", "%l"], environment).strip()
    options += [f"--time={limit}"] if re.fullmatch(r"[\d:-]+", limit) else []  # a partition may have none
    return JobRequest(tuple(options))


def _pbs(job: str, environment: Mapping[str, str]) -> JobRequest:
    facts = pbs_facts(job, environment)
    options = [word for (flag, start), name in _OF_PBS.items() if name in facts for word in (flag, start + facts[name])]
    if environment.get("PBS_O_QUEUE"):  # the one that was named; qstat knows where its jobs are sent
        options += ["-q", environment["PBS_O_QUEUE"]]
    given = re.findall(r"(?:^|,)([A-Za-z_]\w*)=", facts.get("Variable_List", ""))
    runs = facts.get("run_count", "1")
    is_again = runs.isdigit() and int(runs) > 1
    return JobRequest(
        tuple(options),
        tuple(name for name in given if not name.startswith("PBS_")),
        is_again and "beforeany:" in facts.get("depend", ""),
    )
