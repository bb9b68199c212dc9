"""A run in several jobs, with stand-ins for what queues them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import llm.launch
from llm.clusters.allocation import JobAllocation
from llm.clusters.job_chain import Chain, chain_number

# What a job of two hosts runs instead of mpiexec: it leaves the state that the test wants.
_MPIEXEC = """#!/bin/sh
if [ "$1" = --version ]; then echo HYDRA; exit; fi
mkdir -p run
test -z '{state}' || echo '{{"state": "{state}", "step": 3, "pid": '$$'}}' > run/status.json
exit {code}
"""
_QUEUE = """#!/bin/sh
echo "{name} $* number=$LLM_CHAIN_JOB end=${{LLM_END_TIME:-none}}" >> {folder}/asked
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


def asked(job: Path) -> list[str]:
    return (job / "asked").read_text().splitlines() if (job / "asked").exists() else []


def run(job: Path, state: str, code: int, *, chain: int = 3) -> int:
    stand_in(job / "bin", "mpiexec", _MPIEXEC.format(state=state, code=code))
    words = ["--chain", str(chain), "--script", "job.pbs", "--", "--output_dir", "run", "--resume_from_checkpoint"]
    return llm.launch.main(["job", *words])


QUEUED = "qsub -W depend=afterany:11.server -v LLM_CHAIN_JOB job.pbs number=2 end=none"
WITHDRAWN = "qdel 12.server number= end=4000000000"


@pytest.mark.parametrize(
    ("state", "code", "exit_code", "questions"),
    [
        ("stopped", 0, 75, [QUEUED]),
        ("done", 0, 0, [QUEUED, WITHDRAWN]),
        ("failed", 1, 1, [QUEUED, WITHDRAWN]),
        ("running", 137, 1, [QUEUED]),  # killed: the next job goes on from the newest checkpoint
        ("", 1, 1, [QUEUED, WITHDRAWN]),  # it never began
        ("", 0, 75, [QUEUED]),  # it was stopped before it began
    ],
)
def test_job_when_it_ends_then_the_next_one_stays_only_where_something_is_left_to_do(
    state: str, code: int, exit_code: int, questions: list[str], job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(job, state, code) == exit_code
    assert asked(job) == questions
    assert f"job: exit code {exit_code}; run: " in capsys.readouterr().out


def test_job_when_the_old_status_is_still_there_then_its_state_does_not_count(job: Path) -> None:
    (job / "run").mkdir()
    (job / "run" / "status.json").write_text('{"state": "stopped", "step": 3, "pid": 1}')
    assert run(job, "", 1) == 1
    assert asked(job) == [QUEUED, WITHDRAWN]


@pytest.mark.parametrize(("state", "exit_code"), [("done", 0), ("failed", 1)])
def test_follower_when_nothing_is_left_to_do_then_starts_nothing(
    state: str, exit_code: int, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_CHAIN_JOB", "2")
    (job / "run").mkdir()
    before = json.dumps({"state": state, "step": 3})
    (job / "run" / "status.json").write_text(before)
    assert run(job, "running", 1) == exit_code
    assert asked(job) == []
    assert (job / "run" / "status.json").read_text() == before


def test_first_job_when_the_run_failed_before_then_tries_again(job: Path) -> None:
    (job / "run").mkdir()
    (job / "run" / "status.json").write_text('{"state": "failed"}')
    assert run(job, "stopped", 0) == 75


def test_last_job_when_it_starts_then_queues_no_more(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_CHAIN_JOB", "3")
    assert run(job, "stopped", 0) == 75
    assert asked(job) == []


def test_job_when_qsub_refuses_then_trains_all_the_same(job: Path, caplog: pytest.LogCaptureFixture) -> None:
    stand_in(job / "bin", "qsub", "#!/bin/sh\necho 'no more jobs today' >&2\nexit 3\n")
    assert run(job, "stopped", 0) == 75
    assert "no more jobs today" in caplog.text


def test_job_when_of_slurm_then_the_next_one_hangs_on_it_by_sbatch(
    job: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chain = Chain(JobAllocation(("a",), "slurm", "11"), "job.sbatch", 1, 2)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert chain.queue_next() == "12"
    assert asked(job) == ["sbatch --parsable --dependency=afterany:11 --export=ALL job.sbatch number=2 end=none"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # requeued: its next one is there already
    assert chain.queue_next() is None


# As PBS Pro writes it, which breaks long values, and a line as Slurm's qstat does.
_QSTAT = """#!/bin/sh
printf 'Job Id: 11.server\\n    Resource_List.select = 16:system=polaris\\n    Resource_List.walltime = 03:00:00\\n'
printf '\\tAccount_Name = me\\n    queue = medium\\n    run_count = {runs}\\n    depend = {depend}\\n'
printf '    Variable_List = PBS_O_HOME=/home/me,CONFIG=my.toml,HF_HOM\\n\\tE=/data/x,PBS_O_SHELL=/bin/sh,GONE=1\\n'
"""


def test_next_job_of_pbs_when_queued_then_asks_for_what_this_one_did(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(job / "bin", "qstat", _QSTAT.format(runs=1, depend=""))
    for name, value in {"PBS_O_QUEUE": "prod", "CONFIG": "my.toml", "HF_HOME": "/data/x"}.items():
        monkeypatch.setenv(name, value)
    assert Chain(JobAllocation(("a",), "pbs", "11.server"), "job.pbs", 1, 2).queue_next() == "12.server"
    options = "-l select=16:system=polaris -l walltime=03:00:00 -A me -q prod"
    named = "CONFIG,HF_HOME,LLM_CHAIN_JOB"
    assert asked(job) == [f"qsub -W depend=afterany:11.server -v {named} {options} job.pbs number=2 end=none"]


def test_next_job_of_slurm_when_queued_then_asks_for_what_this_one_did(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(job / "bin", "squeue", "#!/bin/sh\necho 6:00:00\n")
    given = {"JOB_NUM_NODES": "4", "JOB_ACCOUNT": "me", "JOB_PARTITION": "gpu", "GPUS_PER_NODE": "a100:4"}
    for name, value in given.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert Chain(JobAllocation(("a",), "slurm", "11"), "job.sbatch", 1, 2).queue_next() == "12"
    options = "--nodes=4 --account=me --partition=gpu --gpus-per-node=a100:4 --time=6:00:00"
    assert asked(job)[0].startswith(f"sbatch --parsable --dependency=afterany:11 --export=ALL {options} job.sbatch ")


def test_next_job_when_the_scheduler_refuses_the_options_then_asks_for_what_the_script_says(
    job: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refusing = f'#!/bin/sh\necho "$*" >> {job}/asked\ncase "$*" in *partition*) exit 1;; esac\necho 12\n'
    stand_in(job / "bin", "sbatch", refusing)
    stand_in(job / "bin", "squeue", "#!/bin/sh\necho UNLIMITED\n")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "inner")
    assert Chain(JobAllocation(("a",), "slurm", "11"), "job.sbatch", 1, 2).queue_next() == "12"
    assert len(asked(job)) == 2
    assert "the next job asks for what the script says" in caplog.text


def test_job_of_pbs_when_run_again_then_queues_no_second_follower(job: Path) -> None:
    chain = Chain(JobAllocation(("a",), "pbs", "11.server"), "job.pbs", 1, 2)
    stand_in(job / "bin", "qstat", _QSTAT.format(runs=2, depend="beforeany:12.server@server"))
    assert chain.queue_next() is None
    assert asked(job) == []
    # Its first start came to nothing.
    stand_in(job / "bin", "qstat", _QSTAT.format(runs=2, depend=""))
    assert chain.queue_next() == "12.server"


def test_job_when_interactive_or_in_no_job_then_queues_nothing(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Chain(JobAllocation(("a",)), "job", 1, 2).queue_next() is None
    monkeypatch.setenv("PBS_ENVIRONMENT", "PBS_INTERACTIVE")
    assert Chain(JobAllocation(("a",), "pbs", "11"), "job", 1, 2).queue_next() is None
    assert asked(job) == []


def test_number_when_nothing_says_it_then_is_the_first() -> None:
    assert [chain_number({"LLM_CHAIN_JOB": text}) for text in ("", "x", "0", "3")] == [1, 1, 1, 3]
    assert chain_number({}) == 1
