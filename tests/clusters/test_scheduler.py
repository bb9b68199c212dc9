"""The job's name, end and attributes, by variables and by stand-ins of the schedulers' commands."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest

import llm.clusters.scheduler
from llm.clusters.scheduler import job_end, job_id, pbs_job_attributes

# What PBS Pro 2022 and Torque 6 print, shortened in the middle.
PBS_PRO = """Job Id: 2017543.polaris-pbs-01.hsn.cm.polaris.alcf.anl.gov
    Job_Name = gpt
    Job_Owner = me@polaris-login-01
    resources_used.cput = 00:00:03
    resources_used.walltime = 00:10:00
    job_state = R
    queue = debug
    Resource_List.ncpus = 128
    Resource_List.select = 2:ncpus=64:ngpus=4:system=polaris
    Resource_List.walltime = 01:00:00
    stime = {began}
    session_id = 40023
    Variable_List = PBS_O_HOME=/home/me,PBS_O_LANG=en_US.UTF-8,PBS_O_LOGNAME=m
	e,PBS_O_PATH=/bin,PBS_O_SHELL=/bin/bash
    etime = {queued}

"""
TORQUE = """Job Id: 81.head
    Job_Name = gpt
    Resource_List.nodes = 1:ppn=8
    Resource_List.walltime = 1:00:00:00
    session_id = 32
    etime = {queued}
    start_time = {began}
    start_count = 1
"""


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    path = tmp_path / "bin"
    path.mkdir()
    return path


def stand_in(bin_dir: Path, name: str, text: str, *, code: int = 0, before: str = "") -> dict[str, str]:
    """Write a command into the folder, and return an environment in which it is the first of its name."""
    (bin_dir / f"{name}.txt").write_text(text)
    stream = ">&2" if code else ""
    program = bin_dir / name
    program.write_text(
        f'#!/bin/sh\n{before}\necho "$@" > {bin_dir}/arguments\ncat {bin_dir}/{name}.txt {stream}\nexit {code}\n'
    )
    program.chmod(0o755)
    return {"PATH": f"{bin_dir}:{os.environ['PATH']}"}


def ctime(moment: float) -> str:
    return time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(moment))


def test_job_end_when_outside_a_job_then_is_none_and_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert job_end({}) is None
    assert caplog.text == ""


def test_job_end_when_the_script_sets_it_then_that_comes_before_the_scheduler() -> None:
    now = time.time()
    environment = {"SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": str(int(now + 900)), "LLM_END_TIME": str(now + 300)}
    assert job_end(environment) == now + 300
    del environment["LLM_END_TIME"]
    assert job_end(environment) == int(now + 900)


def test_job_end_when_squeue_answers_then_is_its_local_time(bin_dir: Path) -> None:
    end = int(time.time()) + 3600
    text = time.strftime("%Y-%m-%dT%H:%M:%S\n", time.localtime(end))
    environment = stand_in(bin_dir, "squeue", text) | {"SLURM_JOB_ID": "4711"}
    assert job_end(environment) == end
    assert (bin_dir / "arguments").read_text() == "-h -j 4711 -o %e\n"


def test_job_end_when_slurm_has_no_limit_then_is_none_and_logs_nothing(
    bin_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert job_end(stand_in(bin_dir, "squeue", "N/A\n") | {"SLURM_JOB_ID": "4711"}) is None
    assert caplog.text == ""


@pytest.mark.parametrize(("answer", "length"), [(PBS_PRO, 3600), (TORQUE, 86_400)], ids=["pro", "torque"])
def test_job_end_when_qstat_answers_then_is_the_start_plus_the_limit(bin_dir: Path, answer: str, length: int) -> None:
    began = int(time.time()) - 600
    text = answer.format(began=ctime(began), queued=ctime(began - 5000))
    environment = stand_in(bin_dir, "qstat", text) | {"PBS_JOBID": "81.head"}
    assert job_end(environment) == began + length
    assert (bin_dir / "arguments").read_text() == "-f 81.head\n"


def test_job_end_when_qstat_gives_no_start_then_is_counted_from_the_used_walltime(bin_dir: Path) -> None:
    text = PBS_PRO.replace("    stime = {began}\n", "").format(queued="")
    end = job_end(stand_in(bin_dir, "qstat", text) | {"PBS_JOBID": "81.head"})
    assert end == pytest.approx(time.time() + 3000, abs=5)


@pytest.mark.parametrize(
    ("command", "variable", "text", "code", "reason"),
    [
        ("squeue", "SLURM_JOB_ID", "slurm_load_jobs error: Invalid job id specified\n", 1, "Invalid job id"),
        ("squeue", "SLURM_JOB_ID", "tomorrow\n", 0, "squeue answers 'tomorrow'"),
        ("squeue", "SLURM_JOB_ID", "2001-01-01T00:00:00\n", 0, "in the past"),
        ("qstat", "PBS_JOBID", "qstat: Unknown Job Id 81.head\n", 153, "Unknown Job Id"),
        ("qstat", "PBS_JOBID", "    Resource_List.walltime = long\n", 0, "'long'"),
        ("qstat", "PBS_JOBID", "    Resource_List.walltime = 01:00:00\n", 0, "when the job began"),
    ],
)
def test_job_end_when_the_answer_is_useless_then_is_none_and_one_line_gives_the_reason(
    bin_dir: Path, caplog: pytest.LogCaptureFixture, command: str, variable: str, text: str, code: int, reason: str
) -> None:
    with caplog.at_level(logging.INFO, "llm"):
        assert job_end(stand_in(bin_dir, command, text, code=code) | {variable: "81.head"}) is None
    assert len(caplog.records) == 1
    assert reason in caplog.text


def test_job_end_when_the_command_is_missing_then_is_none_and_one_line_gives_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_end({"PATH": str(tmp_path), "PBS_JOBID": "1"}) is None
    assert "there is no qstat here" in caplog.text


def test_job_end_when_the_command_hangs_then_is_none_after_the_timeout(
    bin_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm.clusters.scheduler, "TIMEOUT_SECONDS", 0.5)
    environment = stand_in(bin_dir, "squeue", "", before="exec sleep 30") | {"SLURM_JOB_ID": "1"}
    started = time.monotonic()
    assert job_end(environment) is None
    assert time.monotonic() - started < 10
    assert "no answer" in caplog.text


@pytest.mark.parametrize("text", ["noon", "nan", "1000"])
def test_job_end_when_the_variable_is_useless_then_is_none_and_the_line_names_it(
    caplog: pytest.LogCaptureFixture, text: str
) -> None:
    assert job_end({"LLM_END_TIME": text}) is None
    assert "LLM_END_TIME" in caplog.text


def test_job_id_when_inside_or_outside_a_job_then_names_it_with_its_scheduler() -> None:
    assert job_id({}) is None
    assert job_id({"SLURM_JOB_ID": "12"}) == "slurm 12"
    assert job_id({"PBS_JOBID": "12.server"}) == "pbs 12.server"
    assert job_id({"SLURM_JOB_ID": ""}) is None


def test_pbs_attributes_when_qstat_continues_a_value_on_the_next_line_then_it_is_joined(bin_dir: Path) -> None:
    environment = stand_in(bin_dir, "qstat", PBS_PRO.format(began="", queued=""))
    attributes = pbs_job_attributes("81.head", environment)
    assert attributes["Variable_List"].split(",")[2] == "PBS_O_LOGNAME=me"
    assert attributes["Resource_List.walltime"] == "01:00:00"
