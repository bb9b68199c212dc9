"""Which job this is."""

from __future__ import annotations

from llm.clusters.job import job_id


def test_job_when_inside_or_outside_a_job_then_is_named_with_its_scheduler() -> None:
    assert job_id({}) is None
    assert job_id({"SLURM_JOB_ID": "12"}) == "slurm 12"
    assert job_id({"PBS_JOBID": "12.server"}) == "pbs 12.server"
    assert job_id({"SLURM_JOB_ID": ""}) is None
