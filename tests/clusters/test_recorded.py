"""Jobs of every scheduler and MPI, with stand-ins that record what each host would run."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import llm.launch
from tests.clusters.stand_ins import Recorder, install_torch

ROOT = Path(__file__).parents[2]
AWKWARD = 'it\'s "$HOME" `x` *'
JOB = "4711"


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    (tmp_path / "bin").mkdir()
    return Recorder(tmp_path / "bin")


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder from which the job was submitted."""
    path = tmp_path / "a project"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def set_only(patch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Make these the only variables."""
    for name in set(os.environ) - set(environment):
        patch.delenv(name)
    for name, value in environment.items():
        patch.setenv(name, value)


def run_nodes(records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run `launch node` of each host, and return the agents that it becomes: command, environment, folder."""
    agents: list[dict[str, Any]] = []

    def record_exec(program: str, command: list[str], environment: dict[str, str]) -> None:
        agents.append({"command": command, "environment": dict(environment), "folder": os.getcwd()})
        raise SystemExit(0)

    for record in records:
        words = record["command"]
        assert words[1:4] == ["-m", "llm.launch", "node"]
        with monkeypatch.context() as patch:
            set_only(patch, record["environment"])
            patch.setattr(os, "execvpe", record_exec)
            patch.setattr(socket, "getaddrinfo", Mock())  # the hosts do not exist
            patch.chdir(record["folder"])
            with pytest.raises(SystemExit):
                llm.launch.main(words[3:])
    return agents


def option(command: list[str], flag: str) -> str:
    assert command.count(flag) == 1
    return command[command.index(flag) + 1]


CASES = list(itertools.product((1, 2, 4), (1, 4), ("pbs", "slurm", None), ("MPICH", "Open MPI", "PALS")))


@pytest.mark.parametrize(("num_hosts", "repeats", "scheduler", "kind"), CASES, ids=str)
def test_job_when_started_then_every_host_runs_one_agent_of_one_rendezvous(
    num_hosts: int,
    repeats: int,
    scheduler: str | None,
    kind: str,
    recorder: Recorder,
    submitted: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosts = [f"x{number}.cluster" for number in range(num_hosts)]
    python = recorder.install(kind, hosts)
    nodefile = submitted.parent / "nodes"
    nodefile.write_text("".join(f"{host}\n" * repeats for host in hosts))
    environment = {
        "PATH": f"{recorder.folder}:{os.environ['PATH']}",
        "HOME": os.environ["HOME"],
        "MY_SETTING": AWKWARD,
        "HF_TOKEN": "hf_secret",
        "OMP_NUM_THREADS": "64",
        "LLM_END_TIME": "4000000000",
    }
    words = ["--nproc", "2"]
    if scheduler == "pbs":
        environment |= {"PBS_JOBID": f"{JOB}.server", "PBS_NODEFILE": str(nodefile), "PBS_O_WORKDIR": str(submitted)}
    elif scheduler == "slurm":
        hostlist = ",".join(hosts)
        environment |= {"SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": hostlist, "SLURM_TASKS_PER_NODE": f"{repeats}"}
        environment |= {"SLURM_NTASKS_PER_NODE": "4", "SLURM_PROCID": "0"}
        del environment["OMP_NUM_THREADS"]
    else:
        words += ["--hostfile", str(nodefile), "--job", JOB]
        del environment["OMP_NUM_THREADS"]
    options = ["--run_name", AWKWARD, "--max_train_steps", "3"]
    with monkeypatch.context() as patch:
        set_only(patch, environment)
        patch.setattr(sys, "executable", str(python))
        assert llm.launch.main(["job", *words, "--", *options]) == 0
    records = recorder.records
    assert [record["host"] for record in records] == hosts  # exactly one per host
    agents = run_nodes(records, monkeypatch)
    assert len(agents) == num_hosts
    for number, agent in enumerate(agents):
        command, variables = agent["command"], agent["environment"]
        assert command[1:4] == ["-m", "llm.launch", "agent"]
        assert option(command, "--nnodes") == str(num_hosts)
        assert option(command, "--nproc_per_node") == "2"
        assert option(command, "--rdzv_backend") == "c10d"
        assert option(command, "--rdzv_endpoint") == f"{hosts[0]}:{20000 + int(JOB) % 20000}"
        assert JOB in option(command, "--rdzv_id")
        assert f"is_host={int(number == 0)}" in option(command, "--rdzv_conf")
        assert option(command, "--local_addr") == hosts[number]
        assert command[command.index("llm.trainers.gpt") + 1 :] == options
        assert variables["MY_SETTING"] == AWKWARD
        assert variables["LLM_END_TIME"] == "4000000000"
        assert variables["HF_TOKEN"] == "hf_secret"
        assert variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
        assert 1 <= int(variables["OMP_NUM_THREADS"]) <= (os.cpu_count() or 1)
        assert not [name for name in variables if name.startswith(("PMI_", "OMPI_"))]
        assert agent["folder"] == str(submitted)
        seconds = int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
        assert (5 <= seconds < 10) if scheduler == "pbs" else (10 <= seconds <= 30)
    assert len({option(agent["command"], "--rdzv_id") for agent in agents}) == 1


def test_secret_when_passed_on_then_is_not_logged_by_the_launcher(
    recorder: Recorder,
    submitted: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    python = recorder.install("Open MPI", ["a", "b"])
    # The stand-in records its own arguments, too.
    program = recorder.folder / "mpiexec"
    words_file = submitted / "words"
    program.write_text(program.read_text() + f"\nopen({str(words_file)!r}, 'w').write(repr(words))\n")
    environment = {"PATH": f"{recorder.folder}:{os.environ['PATH']}", "HOME": "/", "WANDB_API_KEY": "hush"}
    set_only(monkeypatch, environment)
    monkeypatch.setattr(sys, "executable", str(python))
    assert llm.launch.main(["job", "--hosts", "a,b", "--", "--hub_token", "hush"]) == 0
    assert [record["environment"]["WANDB_API_KEY"] for record in recorder.records] == ["hush", "hush"]
    assert "WANDB_API_KEY=" not in words_file.read_text()
    output = caplog.text + "".join(capsys.readouterr())
    assert "starting: " in output
    assert "hush" not in output


def launch_output(*words: str) -> str:
    """Standard output of `llm.launch`."""
    done = subprocess.run(
        [sys.executable, "-m", "llm.launch", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("scheduler", ["pbs", "slurm", None])
def test_script_when_bash_runs_it_then_starts_the_agents_in_the_folder_of_submission(
    scheduler: str | None, recorder: Recorder, submitted: Path, tmp_path: Path
) -> None:
    """Run all of it: bash, the real python, `job`, mpiexec or srun, on two hosts (on one, outside a job)."""
    kind = scheduler or "pbs"
    script = submitted / "job.sh"
    options = ["--run_name", AWKWARD, "--max_train_steps", "3"]
    # The python of .venv is the real one, with this package on its path.
    (submitted / ".venv" / "bin").mkdir(parents=True)
    wrapper = submitted / ".venv" / "bin" / "python"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path / "lib"}:{ROOT}" exec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    script.write_text(launch_output(kind, "--nproc", "2", "--", *options))
    recorder.install("MPICH", ["n1", "n2"])
    (recorder.folder / "python").unlink()
    srun = recorder.folder / "srun"
    srun.write_text(srun.read_text().replace(str(recorder.folder / "python"), sys.executable))
    # Outside a job, where only this host runs, torchrun is a stand-in, too.
    install_torch(tmp_path / "lib", recorder.records_file)
    (submitted / "nodes").write_text("n1\nn1\nn2\nn2\n")
    variables = {
        "pbs": {"PBS_JOBID": JOB, "PBS_NODEFILE": str(submitted / "nodes"), "PBS_O_WORKDIR": str(submitted)},
        "slurm": {"SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_SUBMIT_DIR": str(submitted)},
        None: {},
    }[scheduler]
    done = subprocess.run(
        ["bash", str(script)],
        env={"PATH": f"{recorder.folder}:/usr/bin:/bin", "HOME": str(tmp_path), "MINE": "1", **variables},
        cwd=tmp_path if scheduler else submitted,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "job: exit code 0" in done.stdout
    assert len(recorder.records) == (2 if scheduler else 1)
    for record in recorder.records:
        command = record["command"]
        assert command[-5:] == [*options, "--resume_from_checkpoint"]
        assert record["folder"] == str(submitted)
        assert record["environment"]["MINE"] == "1"
        if scheduler:
            assert option(command, "--hosts") == "n1,n2"
            assert option(command, "--job") == JOB
        else:
            assert option(command, "--rdzv_endpoint") == "localhost:0"
