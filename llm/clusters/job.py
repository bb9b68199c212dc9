"""The job that this process belongs to."""

from __future__ import annotations

import os
from collections.abc import Mapping


def job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """Such as `slurm 1234` or `pbs 1234.server`; None outside a job.

    A job that was put back into the queue, and runs again, has the same.
    """
    for scheduler, name in (("slurm", "SLURM_JOB_ID"), ("pbs", "PBS_JOBID")):
        if environment.get(name):
            return f"{scheduler} {environment[name]}"
    return None
