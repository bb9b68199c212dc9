"""When the job ends, as far as variables and stand-ins of the schedulers' commands say."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest

import llm.clusters.scheduler
from llm.clusters.walltime import job_end

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
    """Puts a command into the folder; the environment in which it is the only one of its name."""
    (bin_dir / f"{name}.txt").write_text(text)
    stream = ">&2" if code else ""
    program = bin_dir / name
    program.write_text(
        f'#!/bin/sh\n{before}\necho "$@" > {bin_dir}/asked\ncat {bin_dir}/{name}.txt {stream}\nexit {code}\n'
    )
    program.chmod(0o755)
    return {"PATH": f"{bin_dir}:{os.environ['PATH']}"}


def ctime(moment: float) -> str:
    return time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(moment))


def test_end_when_in_no_job_then_is_none_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert job_end({}) is None
    assert caplog.text == ""


def test_end_when_the_script_says_it_then_wins_over_the_scheduler() -> None:
    now = time.time()
    environment = {"SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": str(int(now + 900)), "LLM_END_TIME": str(now + 300)}
    assert job_end(environment) == now + 300
    del environment["LLM_END_TIME"]
    assert job_end(environment) == int(now + 900)


def test_end_when_slurm_is_asked_then_is_the_local_time_that_it_says(bin_dir: Path) -> None:
    end = int(time.time()) + 3600
    text = time.strftime("%Y-%m-%dT%H:%M:%S\n", time.localtime(end))
    environment = stand_in(bin_dir, "squeue", text) | {"SLURM_JOB_ID": "4711"}
    assert job_end(environment) == end
    assert (bin_dir / "asked").read_text() == "-h -j 4711 -o %e\n"


def test_end_when_slurm_has_no_limit_then_is_none_without_a_word(
    bin_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert job_end(stand_in(bin_dir, "squeue", "N/A\n") | {"SLURM_JOB_ID": "4711"}) is None
    assert caplog.text == ""


@pytest.mark.parametrize(("answer", "length"), [(PBS_PRO, 3600), (TORQUE, 86_400)], ids=["pro", "torque"])
def test_end_when_pbs_is_asked_then_is_the_start_and_the_limit(bin_dir: Path, answer: str, length: int) -> None:
    began = int(time.time()) - 600
    text = answer.format(began=ctime(began), queued=ctime(began - 5000))
    environment = stand_in(bin_dir, "qstat", text) | {"PBS_JOBID": "81.head"}
    assert job_end(environment) == began + length
    assert (bin_dir / "asked").read_text() == "-f 81.head\n"


def test_end_when_pbs_does_not_say_the_start_then_counts_from_what_was_used(bin_dir: Path) -> None:
    text = PBS_PRO.replace("    stime = {began}\n", "").format(queued="")
    end = job_end(stand_in(bin_dir, "qstat", text) | {"PBS_JOBID": "81.head"})
    assert end == pytest.approx(time.time() + 3000, abs=5)


@pytest.mark.parametrize(
    ("command", "variable", "text", "code", "said"),
    [
        ("squeue", "SLURM_JOB_ID", "slurm_load_jobs error: Invalid job id specified\n", 1, "Invalid job id"),
        ("squeue", "SLURM_JOB_ID", "tomorrow\n", 0, "squeue answers 'tomorrow'"),
        ("squeue", "SLURM_JOB_ID", "2001-01-01T00:00:00\n", 0, "in the past"),
        ("qstat", "PBS_JOBID", "qstat: Unknown Job Id 81.head\n", 153, "Unknown Job Id"),
        ("qstat", "PBS_JOBID", "    Resource_List.walltime = long\n", 0, "'long'"),
        ("qstat", "PBS_JOBID", "    Resource_List.walltime = 01:00:00\n", 0, "when the job began"),
    ],
)
def test_end_when_the_answer_is_of_no_use_then_is_none_and_one_line_says_why(
    bin_dir: Path, caplog: pytest.LogCaptureFixture, command: str, variable: str, text: str, code: int, said: str
) -> None:
    with caplog.at_level(logging.INFO, "llm"):
        assert job_end(stand_in(bin_dir, command, text, code=code) | {variable: "81.head"}) is None
    assert len(caplog.records) == 1
    assert said in caplog.text


def test_end_when_there_is_no_command_then_is_none_and_one_line_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert job_end({"PATH": str(tmp_path), "PBS_JOBID": "1"}) is None
    assert "there is no qstat here" in caplog.text


def test_end_when_the_command_hangs_then_is_none_soon(
    bin_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm.clusters.scheduler, "PATIENCE_SECONDS", 0.5)
    environment = stand_in(bin_dir, "squeue", "", before="exec sleep 30") | {"SLURM_JOB_ID": "1"}
    started = time.monotonic()
    assert job_end(environment) is None
    assert time.monotonic() - started < 10
    assert "no answer" in caplog.text


@pytest.mark.parametrize("text", ["noon", "nan", "1000"])
def test_end_when_the_variable_is_of_no_use_then_is_none_and_names_it(
    caplog: pytest.LogCaptureFixture, text: str
) -> None:
    assert job_end({"LLM_END_TIME": text}) is None
    assert "LLM_END_TIME" in caplog.text
