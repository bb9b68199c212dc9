"""What a job requested, and the request of the next job, with stand-ins for the schedulers' commands."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from llm.clusters.allocation import JobAllocation
from llm.clusters.job_request import JobRequest, read_job_request

PBS = JobAllocation(("a",), "pbs", "11.server")
SLURM = JobAllocation(("a",), "slurm", "11")

# As PBS Pro prints it, which breaks long values, and a line as Slurm's qstat prints it.
QSTAT = """#!/bin/sh
printf 'Job Id: 11.server\\n    Resource_List.select = 16:system=polaris\\n    Resource_List.walltime = 03:00:00\\n'
printf '\\tAccount_Name = me\\n    queue = medium\\n    run_count = {runs}\\n    depend = {depend}\\n'
printf '    Variable_List = PBS_O_HOME=/home/me,CONFIG=my.toml,HF_HOM\\n\\tE=/data/x,PBS_O_SHELL=/bin/sh,GONE=1\\n'
"""

REQUEST_OPTIONS = "-l select=16:system=polaris -l walltime=03:00:00 -A me".split()


def stand_in(folder: Path, name: str, text: str) -> dict[str, str]:
    """Write a command into the folder, and return an environment in which it is the first of its name."""
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


def test_request_when_qstat_lists_attributes_then_they_are_options_of_qsub(tmp_path: Path) -> None:
    environment = stand_in(tmp_path, "qstat", QSTAT.format(runs=1, depend=""))
    request = read_job_request(PBS, environment)
    assert request == JobRequest(tuple(REQUEST_OPTIONS), ("CONFIG", "HF_HOME", "GONE"))
    named = read_job_request(PBS, environment | {"PBS_O_QUEUE": "prod"})
    assert list(named.options) == [*REQUEST_OPTIONS, "-q", "prod"]


@pytest.mark.parametrize(
    ("runs", "depend", "has_successor"),
    [(2, "beforeany:12.server@server", True), (2, "", False), (1, "beforeany:12.server@server", False)],
)
def test_request_when_pbs_runs_the_job_again_then_knows_whether_a_successor_waits(
    runs: int, depend: str, *, has_successor: bool, tmp_path: Path
) -> None:
    environment = stand_in(tmp_path, "qstat", QSTAT.format(runs=runs, depend=depend))
    assert read_job_request(PBS, environment).has_successor == has_successor


def test_request_when_slurm_sets_variables_then_they_are_options_of_sbatch(tmp_path: Path) -> None:
    environment = stand_in(tmp_path, "squeue", "#!/bin/sh\necho 6:00:00\n")
    environment |= {"SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_ACCOUNT": "me", "SLURM_GPUS_PER_NODE": "a100:4"}
    options = ("--nodes=4", "--account=me", "--gpus-per-node=a100:4", "--time=6:00:00")
    assert read_job_request(SLURM, environment) == JobRequest(options)


def test_request_when_the_partition_has_no_limit_then_asks_for_no_time(tmp_path: Path) -> None:
    environment = stand_in(tmp_path, "squeue", "#!/bin/sh\necho UNLIMITED\n")
    assert read_job_request(SLURM, environment) == JobRequest()


def test_request_when_the_scheduler_does_not_answer_then_is_empty_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    environment = stand_in(tmp_path, "qstat", "#!/bin/sh\necho 'no answer' >&2\nexit 1\n")
    with caplog.at_level(logging.WARNING, "llm"):
        assert read_job_request(PBS, environment) == JobRequest()
    assert "no answer" in caplog.text
