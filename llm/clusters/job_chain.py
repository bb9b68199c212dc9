"""A run in several jobs: each job queues the next one when it starts, and cancels it if the run is over at its end."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm.clusters.allocation import JobAllocation
from llm.clusters.job_request import read_job_request
from llm.clusters.scheduler import SchedulerError, run_scheduler_command
from llm.config.errors import Stopped, UserError

log = logging.getLogger(__name__)

NUMBER_VARIABLE = "LLM_CHAIN_JOB"
_TIMEOUT_SECONDS = 60.0
# Variables that the next job must set for itself; SLURM_CONF says where the scheduler is.
_JOB_VARIABLES = re.compile(r"LLM_END_TIME|SLURM_(?!CONF$)\w*|PMI_\w*|PMIX_\w*")
_ALREADY_QUEUED = "chain: the next job was queued when this job started for the first time"


@dataclass(frozen=True)
class Chain:
    """This job among the jobs of the run.

    Attributes:
        allocation: this job.
        script: the job script that the next job runs.
        number: of this job, from 1.
        max_jobs: number of jobs that the run may take.
    """

    allocation: JobAllocation
    script: str | None
    number: int
    max_jobs: int

    @property
    def is_successor(self) -> bool:
        """Whether an earlier job queued this one."""
        return self.number > 1

    def queue_next(self, environment: Mapping[str, str] = os.environ) -> str | None:
        """Queue the next job, which starts when this job has ended in any way.

        It is queued at the start, because a job that the scheduler kills does not reach the end of its script. If
        the scheduler refuses, one line is logged and this job trains all the same.

        Returns:
            The name of the next job; None if none was queued.
        """
        if self.number >= self.max_jobs:
            return None
        if not self._is_batch_job(environment):
            log.warning("chain: this is not a batch job: no next job is queued")
            return None
        if environment.get("SLURM_RESTART_COUNT", "0") != "0":
            log.info(_ALREADY_QUEUED)
            return None
        if self.script is None:
            log.warning("chain: no next job is queued: --script must name the script that it runs")
            return None
        request = read_job_request(self.allocation, environment)
        if request.has_successor:
            log.info(_ALREADY_QUEUED)
            return None
        variables = {name: value for name, value in environment.items() if not _JOB_VARIABLES.fullmatch(name)}
        variables[NUMBER_VARIABLE] = str(self.number + 1)
        answer = _try_command(self._submit_command(variables, request.options, request.variables), variables)
        if answer is None and request.options:
            log.warning("chain: the next job requests what the script says")
            answer = _try_command(self._submit_command(variables, (), request.variables), variables)
        if answer is None:
            return None
        words = answer.split()
        name = words[-1].partition(";")[0] if words else ""
        cancel = shlex.join(self._cancel_command(name))
        log.info(
            "chain: job %d of %d; the next one is %s (`%s` ends the chain)", self.number, self.max_jobs, name, cancel
        )
        return name

    def cancel(self, name: str, environment: Mapping[str, str] = os.environ) -> None:
        """Cancel the next job; if that fails, the next job ends by itself when it starts."""
        if _try_command(self._cancel_command(name), environment) is not None:
            log.info("chain: cancelled the next job, %s", name)

    def _is_batch_job(self, environment: Mapping[str, str]) -> bool:
        is_interactive = environment.get("PBS_ENVIRONMENT") == "PBS_INTERACTIVE"
        return self.allocation.scheduler is not None and self.allocation.job is not None and not is_interactive

    def _submit_command(
        self, environment: Mapping[str, str], options: Sequence[str], names: Sequence[str]
    ) -> list[str]:
        """The command that queues the next job.

        Args:
            environment: variables of the command.
            options: of qsub or sbatch.
            names: variables that were passed to this job.
        """
        assert self.script is not None and self.allocation.job is not None
        dependency = f"afterany:{self.allocation.job}"
        if self.allocation.scheduler == "slurm":
            return ["sbatch", "--parsable", f"--dependency={dependency}", "--export=ALL", *options, self.script]
        # PBS passes on only the variables that are named; the script reads the first two.
        candidates = dict.fromkeys(("CONFIG", "CHAIN", *names, NUMBER_VARIABLE))
        passed_on = ",".join(name for name in candidates if name in environment)
        return ["qsub", "-W", f"depend={dependency}", "-v", passed_on, *options, self.script]

    def _cancel_command(self, name: str) -> list[str]:
        return ["scancel" if self.allocation.scheduler == "slurm" else "qdel", name]


def chain_number(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of this job in its chain, from 1."""
    text = environment.get(NUMBER_VARIABLE, "")
    return int(text) if text.isdigit() and int(text) > 0 else 1


def run_outcome(
    before: Mapping[str, object], after: Mapping[str, object], exit_code: int, *, keeps_status: bool
) -> tuple[int, bool]:
    """Return the exit code of the job, and whether the run is over.

    The status that the run wrote decides; the launcher's exit code says little, and an unchanged status nothing.

    Args:
        before: status.json at the start.
        after: status.json now.
        exit_code: the launcher's exit code.
        keeps_status: whether the run writes a status when it ends well.
    """
    if after == before:
        if after.get("state") != "done" and exit_code == 0 and keeps_status:
            return Stopped.exit_code, False  # stopped before it wrote anything
        return (0 if exit_code == 0 else UserError.exit_code), True
    if after["state"] == "done":
        return 0, True
    if after["state"] == "stopped":
        return Stopped.exit_code, False
    return UserError.exit_code, after["state"] == "failed"


def _try_command(command: list[str], environment: Mapping[str, str]) -> str | None:
    """The output of a scheduler's command; None, and a line in the log, if it fails."""
    try:
        return run_scheduler_command(command, environment, timeout_seconds=_TIMEOUT_SECONDS)
    except SchedulerError as reason:
        log.warning("chain: `%s` failed: %s", shlex.join(command), reason)
        return None
