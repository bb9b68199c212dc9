"""A run in several jobs: each queues the next one while it runs, and withdraws it when nothing is left to do."""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llm.clusters.allocation import JobAllocation
from llm.clusters.job_request import read_job_request
from llm.clusters.scheduler import UnknownError, ask_scheduler
from llm.config.errors import Stopped, UserError

log = logging.getLogger(__name__)

NUMBER = "LLM_CHAIN_JOB"
_PATIENCE_SECONDS = 60.0
# What the next job must find out by itself; SLURM_CONF says where the scheduler is.
_OWN = re.compile(r"LLM_END_TIME|SLURM_(?!CONF$)\w*|PMI_\w*|PMIX_\w*")


@dataclass(frozen=True)
class Chain:
    """This job among those of the run.

    Attributes:
        place: the job.
        script: what the next job runs.
        number: of this job, from 1.
        count: of all jobs that the run may take.
    """

    place: JobAllocation
    script: str | None
    number: int
    count: int

    @property
    def is_follower(self) -> bool:
        """Whether a job before this one queued it."""
        return self.number > 1

    def queue_next(self, environment: Mapping[str, str] = os.environ) -> str | None:
        """Queues the next job behind this one, however this one ends; its name, or None where there is none.

        It is queued at the start, since a job that the scheduler kills comes to no end of its script. A
        scheduler that refuses is no reason to train less in this job: one line says so.
        """
        if self.number >= self.count:
            return None
        if (
            self.place.scheduler is None
            or self.place.job is None
            or environment.get("PBS_ENVIRONMENT") == "PBS_INTERACTIVE"
        ):
            log.warning("chain: this is no batch job, so that no next one is queued")
            return None
        if environment.get("SLURM_RESTART_COUNT", "0") != "0":
            log.info("chain: the next job was queued when this one started first")
            return None
        if self.script is None:
            log.warning("chain: no --script says what the next job runs, so that none is queued")
            return None
        asked = read_job_request(self.place, environment)
        if asked.is_followed:
            log.info("chain: the next job was queued when this one started first")
            return None
        variables = {name: value for name, value in environment.items() if not _OWN.fullmatch(name)}
        variables[NUMBER] = str(self.number + 1)
        answer = _ask(self._submission(variables, asked.options, asked.variables), variables)
        if answer is None and asked.options:
            log.warning("chain: the next job asks for what the script says")
            answer = _ask(self._submission(variables, (), asked.variables), variables)
        if answer is None:
            return None
        name = answer.split()[-1].partition(";")[0] if answer.split() else ""
        mend = shlex.join(self._withdrawal(name))
        log.info("chain: job %d of %d; the next one is %s (%s ends the chain)", self.number, self.count, name, mend)
        return name

    def withdraw(self, name: str, environment: Mapping[str, str] = os.environ) -> None:
        """Takes the next job back; if that fails it ends by itself, at its start."""
        if _ask(self._withdrawal(name), environment) is not None:
            log.info("chain: %s is not needed any more", name)

    def _submission(self, variables: Mapping[str, str], options: Sequence[str], given: Sequence[str]) -> list[str]:
        assert self.script is not None and self.place.job is not None
        after = f"afterany:{self.place.job}"
        if self.place.scheduler == "slurm":
            return ["sbatch", "--parsable", f"--dependency={after}", "--export=ALL", *options, self.script]
        # PBS passes on only what is named; the script reads the first ones.
        named = [name for name in dict.fromkeys(("CONFIG", "CHAIN", *given, NUMBER)) if name in variables]
        return ["qsub", "-W", f"depend={after}", "-v", ",".join(named), *options, self.script]

    def _withdrawal(self, name: str) -> list[str]:
        return ["scancel" if self.place.scheduler == "slurm" else "qdel", name]


def chain_number(environment: Mapping[str, str] = os.environ) -> int:
    """Which job of its chain this is, from 1."""
    text = environment.get(NUMBER, "")
    return int(text) if text.isdigit() and int(text) > 0 else 1


def judge(before: Mapping[str, object], after: Mapping[str, object], code: int, *, is_kept: bool) -> tuple[int, bool]:
    """The exit code, and whether the run is over; the launcher's own code says little, and an old status nothing.

    Args:
        before: status.json at the start.
        after: status.json now.
        code: the launcher's exit code.
        is_kept: whether a run that ends well writes its status.
    """
    if after == before and after.get("state") != "done" and code == 0 and is_kept:
        return Stopped.exit_code, False  # before it had anything to write
    if after == before:
        return (0 if code == 0 else UserError.exit_code), True
    if after["state"] == "done":
        return 0, True
    if after["state"] == "stopped":
        return Stopped.exit_code, False
    return UserError.exit_code, after["state"] == "failed"


def _ask(command: list[str], environment: Mapping[str, str]) -> str | None:
    """What a scheduler's command prints; None, and one line, if it fails."""
    try:
        return ask_scheduler(command, environment, patience=_PATIENCE_SECONDS)
    except UnknownError as reason:
        log.warning("chain: `%s` failed: %s", shlex.join(command), reason)
        return None
