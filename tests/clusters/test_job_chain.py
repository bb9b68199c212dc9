"""A run in several jobs, with stand-ins for the schedulers' commands."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import llm.launch
from llm.clusters.allocation import JobAllocation
from llm.clusters.job_chain import Chain, chain_number, run_outcome
from tests.clusters.test_job_request import QSTAT

# Stands for mpiexec in a job of two hosts: it leaves the state that the test asks for.
_MPIEXEC = """#!/bin/sh
if [ "$1" = --version ]; then echo HYDRA; exit; fi
mkdir -p run
test -z '{state}' || echo '{{"state": "{state}", "step": 3, "pid": '$$'}}' > run/status.json
exit {code}
"""
_QUEUE = """#!/bin/sh
echo "{name} $* number=$LLM_CHAIN_JOB end=${{LLM_END_TIME:-none}}" >> {folder}/submissions
echo {answer}
exit {code}
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PBS job of two hosts in its folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "nodes").write_text("n1\nn2\n")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PBS_JOBID", "11.server")
    monkeypatch.setenv("PBS_NODEFILE", str(tmp_path / "nodes"))
    monkeypatch.setenv("LLM_END_TIME", "4000000000")
    stand_in(folder, "qstat", "#!/bin/sh\necho 'no answer' >&2\nexit 1\n")
    stand_in(folder, "squeue", "#!/bin/sh\nexit 1\n")
    for name, answer in (("qsub", "12.server"), ("qdel", ""), ("sbatch", "12;cluster"), ("scancel", "")):
        stand_in(folder, name, _QUEUE.format(name=name, folder=tmp_path, answer=answer, code=0))
    return tmp_path


def stand_in(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def submissions(job: Path) -> list[str]:
    """The commands of the scheduler that were run, with two of their variables."""
    path = job / "submissions"
    return path.read_text().splitlines() if path.exists() else []


def run(job: Path, state: str, code: int, *, chain: int = 3) -> int:
    stand_in(job / "bin", "mpiexec", _MPIEXEC.format(state=state, code=code))
    words = ["--chain", str(chain), "--script", "job.pbs", "--", "--output_dir", "run", "--resume_from_checkpoint"]
    return llm.launch.main(["job", *words])


QUEUED = "qsub -W depend=afterany:11.server -v LLM_CHAIN_JOB job.pbs number=2 end=none"
CANCELLED = "qdel 12.server number= end=4000000000"


@pytest.mark.parametrize(
    ("state", "code", "exit_code", "commands"),
    [
        ("stopped", 0, 75, [QUEUED]),
        ("done", 0, 0, [QUEUED, CANCELLED]),
        ("failed", 1, 1, [QUEUED, CANCELLED]),
        ("running", 137, 1, [QUEUED]),  # killed: the next job resumes from the newest checkpoint
        ("", 1, 1, [QUEUED, CANCELLED]),  # it wrote no status
        ("", 0, 75, [QUEUED]),  # it was stopped before it began
    ],
)
def test_job_when_it_ends_then_the_next_one_stays_queued_only_if_the_run_is_not_over(
    state: str, code: int, exit_code: int, commands: list[str], job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(job, state, code) == exit_code
    assert submissions(job) == commands
    assert f"job: exit code {exit_code}; run: " in capsys.readouterr().out


def test_job_when_the_status_is_unchanged_then_its_state_does_not_count(job: Path) -> None:
    (job / "run").mkdir()
    (job / "run" / "status.json").write_text('{"state": "stopped", "step": 3, "pid": 1}')
    assert run(job, "", 1) == 1
    assert submissions(job) == [QUEUED, CANCELLED]


@pytest.mark.parametrize(("state", "exit_code"), [("done", 0), ("failed", 1)])
def test_successor_when_the_run_is_over_then_starts_nothing(
    state: str, exit_code: int, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_CHAIN_JOB", "2")
    (job / "run").mkdir()
    before = json.dumps({"state": state, "step": 3})
    (job / "run" / "status.json").write_text(before)
    assert run(job, "running", 1) == exit_code
    assert submissions(job) == []
    assert (job / "run" / "status.json").read_text() == before


def test_first_job_when_the_run_failed_before_then_runs_it_again(job: Path) -> None:
    (job / "run").mkdir()
    (job / "run" / "status.json").write_text('{"state": "failed"}')
    assert run(job, "stopped", 0) == 75


def test_last_job_when_it_starts_then_queues_nothing(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_CHAIN_JOB", "3")
    assert run(job, "stopped", 0) == 75
    assert submissions(job) == []


def test_job_when_qsub_refuses_then_still_trains(job: Path, caplog: pytest.LogCaptureFixture) -> None:
    stand_in(job / "bin", "qsub", "#!/bin/sh\necho 'no more jobs today' >&2\nexit 3\n")
    assert run(job, "stopped", 0) == 75
    assert "no more jobs today" in caplog.text


def test_next_job_when_queued_by_sbatch_then_depends_on_this_one(
    job: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chain = Chain(JobAllocation(("a",), "slurm", "11"), "job.sbatch", 1, 2)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert chain.queue_next() == "12"
    assert submissions(job) == ["sbatch --parsable --dependency=afterany:11 --export=ALL job.sbatch number=2 end=none"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # requeued: its next job is already queued
    assert chain.queue_next() is None


def test_next_job_when_queued_by_qsub_then_requests_the_same(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(job / "bin", "qstat", QSTAT.format(runs=1, depend=""))
    for name, value in {"PBS_O_QUEUE": "prod", "CONFIG": "my.toml", "HF_HOME": "/data/x"}.items():
        monkeypatch.setenv(name, value)
    assert Chain(JobAllocation(("a",), "pbs", "11.server"), "job.pbs", 1, 2).queue_next() == "12.server"
    options = "-l select=16:system=polaris -l walltime=03:00:00 -A me -q prod"
    named = "CONFIG,HF_HOME,LLM_CHAIN_JOB"
    assert submissions(job) == [f"qsub -W depend=afterany:11.server -v {named} {options} job.pbs number=2 end=none"]


def test_next_job_when_queued_by_sbatch_then_requests_the_same(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(job / "bin", "squeue", "#!/bin/sh\necho 6:00:00\n")
    variables = {"JOB_NUM_NODES": "4", "JOB_ACCOUNT": "me", "JOB_PARTITION": "gpu", "GPUS_PER_NODE": "a100:4"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert Chain(JobAllocation(("a",), "slurm", "11"), "job.sbatch", 1, 2).queue_next() == "12"
    options = "--nodes=4 --account=me --partition=gpu --gpus-per-node=a100:4 --time=6:00:00"
    assert submissions(job)[0].startswith(
        f"sbatch --parsable --dependency=afterany:11 --export=ALL {options} job.sbatch "
    )


def test_job_when_pbs_runs_it_again_then_queues_no_second_successor(job: Path) -> None:
    chain = Chain(JobAllocation(("a",), "pbs", "11.server"), "job.pbs", 1, 2)
    stand_in(job / "bin", "qstat", QSTAT.format(runs=2, depend="beforeany:12.server@server"))
    assert chain.queue_next() is None
    assert submissions(job) == []
    # Its first start queued nothing.
    stand_in(job / "bin", "qstat", QSTAT.format(runs=2, depend=""))
    assert chain.queue_next() == "12.server"


def test_next_job_when_the_scheduler_refuses_the_options_then_requests_what_the_script_says(
    job: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusing = f'#!/bin/sh\necho "$*" >> {job}/submissions\ncase "$*" in *partition*) exit 1;; esac\necho 12\n'
    stand_in(job / "bin", "sbatch", refusing)
    stand_in(job / "bin", "squeue", "#!/bin/sh\necho UNLIMITED\n")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "inner")
    assert Chain(JobAllocation(("a",), "slurm", "11"), "job.sbatch", 1, 2).queue_next() == "12"
    assert len(submissions(job)) == 2
    assert "the next job requests what the script says" in caplog.text


def test_job_when_interactive_or_outside_a_job_then_queues_nothing(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Chain(JobAllocation(("a",)), "job", 1, 2).queue_next() is None
    monkeypatch.setenv("PBS_ENVIRONMENT", "PBS_INTERACTIVE")
    assert Chain(JobAllocation(("a",), "pbs", "11"), "job", 1, 2).queue_next() is None
    assert submissions(job) == []


def test_chain_number_when_the_variable_is_missing_or_wrong_then_is_one() -> None:
    assert [chain_number({"LLM_CHAIN_JOB": text}) for text in ("", "x", "0", "3")] == [1, 1, 1, 3]
    assert chain_number({}) == 1


@pytest.mark.parametrize(
    ("before", "after", "code", "keeps_status", "outcome"),
    [
        ({}, {"state": "done"}, 0, True, (0, True)),
        ({}, {"state": "stopped"}, 0, True, (75, False)),
        ({}, {"state": "failed"}, 0, True, (1, True)),
        ({}, {"state": "running"}, 137, True, (1, False)),
        ({}, {}, 0, True, (75, False)),
        ({}, {}, 0, False, (0, True)),  # a dry run writes no status
        ({"state": "done"}, {"state": "done"}, 0, True, (0, True)),
        ({"state": "stopped"}, {"state": "stopped"}, 9, True, (1, True)),
    ],
)
def test_outcome_when_a_run_has_ended_then_its_own_status_decides(
    before: dict[str, object], after: dict[str, object], code: int, *, keeps_status: bool, outcome: tuple[int, bool]
) -> None:
    assert run_outcome(before, after, code, keeps_status=keeps_status) == outcome
