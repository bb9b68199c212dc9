"""``python -m llm.launch``: its options, the mistakes it refuses, and what it prints, submits and starts."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llm.launch import main

ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def launch(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in this process, in an empty folder: `launch(*words) -> code, out, err`."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMIX_"))]:
        monkeypatch.delenv(name)

    def run(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            code = main(list(words))
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capfd.readouterr())

    return run


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_when_requested_then_names_the_commands(words: list[str], launch: Run) -> None:
    code, out, _ = launch(*words)
    assert code == 0
    for command in ("node", "job", "pbs", "slurm", "doctor"):
        assert f"\n  {command} " in out


@pytest.mark.parametrize("command", ["node", "job", "pbs", "slurm"])
def test_help_when_of_a_command_then_lists_its_options(command: str, launch: Run) -> None:
    code, out, _ = launch(command, "--help")
    assert code == 0
    assert out.startswith(f"usage: python -m llm.launch {command} ")
    assert "--nproc N" in out


def test_help_when_requested_then_costs_half_a_second_and_no_torch() -> None:
    program = "import sys\nfrom llm.launch import main\ntry: main(['job', '--help'])\nexcept SystemExit: pass\n"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", program + "assert 'torch' not in sys.modules"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 0.75  # 0.4 s alone


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["jobb"], "jobb: unknown command; it is one of node, job, pbs, slurm, doctor"),
        (["node", "--nprocs", "2"], "did you mean --nproc?"),
        (["node", "--train_file", "x"], "options of the trainer stand behind --"),
        (["node", "my.toml"], "options of the trainer stand behind --"),
        (["node", "--", "llm.trainers"], "llm.trainers: there is no module of that name"),
        (["pbs", "--", "--lerning_rate", "1"], "did you mean --learning_rate?"),
        (["slurm", "--", "llm.trainers.gtp"], "llm.trainers.gtp: there is no module of that name"),
        (["pbs", "--", "--config", "missing.toml"], "--config missing.toml: no such file"),
        (["pbs", "--walltime", "1:30", "--"], "--walltime 1:30: not a duration"),
        (["pbs", "--chain", "2", "--"], "--chain needs the trainer's --output_dir"),
        (["job", "--chain", "2", "--", "--output_dir", "x"], "--chain needs the trainer's --resume_from_checkpoint"),
        (["slurm", "--chain", "2", "--", "--output_dir", "x", "--overwrite_output_dir"], "would remove"),
        (["slurm", "--chain", "2", "--", "json.tool"], "--chain needs the status.json of a trainer"),
        (
            ["pbs", "--site", "polaris", "--submit", "--"],
            "--submit: jobs of polaris need a project that pays",
        ),
        (["doctor", "--", "x"], "the doctor starts no trainer"),
    ],
)
def test_mistake_when_made_then_is_one_line_with_the_fix(words: list[str], message: str, launch: Run) -> None:
    if words[0] == "doctor":
        pytest.importorskip("llm.clusters.doctor.doctor")
    code, out, err = launch(*words)
    assert code == 2
    assert message in err
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert out == ""


def test_node_when_it_would_wait_for_ever_then_is_refused(launch: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("nodes").write_text("a\nb\n")
    monkeypatch.setenv("PBS_NODEFILE", str(Path("nodes").resolve()))
    code, _, err = launch("node", "--")
    assert code == 1
    assert "this job has 2 hosts" in err
    assert "python -m llm.launch job" in err


def test_node_when_pbs_started_it_in_the_home_folder_then_changes_to_the_folder_of_submission(
    launch: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, project = tmp_path / "home", tmp_path / "project"
    home.mkdir()
    project.mkdir()
    folders: list[Path] = []
    monkeypatch.setattr(os, "execvpe", lambda *_: folders.append(Path.cwd()))
    monkeypatch.setenv("PBS_JOBID", "1.x")
    monkeypatch.setenv("PBS_O_WORKDIR", str(project))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    launch("node", "--nproc", "1", "--")
    monkeypatch.chdir(tmp_path)
    launch("node", "--nproc", "1", "--")
    assert folders == [project, tmp_path]


def test_submission_when_requested_then_the_script_is_kept_and_queued(
    launch: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    qsub = tmp_path / "bin" / "qsub"
    qsub.parent.mkdir()
    qsub.write_text("#!/bin/sh\nbash -n $1 && echo took $1\n")
    qsub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{qsub.parent}:{os.environ['PATH']}")
    words = ["pbs", "--account", "me", "--name", "mine", "--submit", "--", "--max_train_steps", "3"]
    assert launch(*words)[:2] == (0, "took mine.pbs\n")
    assert launch(*words)[:2] == (0, "took mine.pbs\n")  # the same again
    code, _, err = launch(*words[:-1], "4")
    assert code == 1
    assert "mine.pbs already exists" in err
    qsub.write_text("#!/bin/sh\nexit 7\n")
    assert "qsub refused mine.pbs (exit code 7)" in launch(*words)[2]
    assert not Path("mine.pbs").exists()


@pytest.mark.parametrize("container", ["apptainer 'exec", "no_such_program exec x.sif"])
def test_job_when_the_container_cannot_be_run_then_is_refused(container: str, launch: Run) -> None:
    code, _, err = launch("job", "--container", container, "--")
    assert code == 1
    assert err.startswith(f"error: --container {container}: ")


def test_submission_when_there_is_no_scheduler_then_names_the_file_of_the_script(
    launch: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = launch("slurm", "--submit", "--")
    assert code == 1
    assert "there is no sbatch here; the script is in gpt.sbatch" in err


def test_submission_when_the_script_cannot_be_written_then_is_refused(launch: Run) -> None:
    Path("gpt.pbs").mkdir()
    code, _, err = launch("pbs", "--submit", "--")
    assert code == 1
    assert err == "error: gpt.pbs cannot be written here (Is a directory); submit from another folder\n"


@pytest.mark.parametrize(("code", "agent_code"), [(0, 0), (75, 0), (1, 1), (2, 2)])
def test_worker_when_its_trainer_stopped_with_everything_saved_then_the_agent_sees_success(
    code: int, agent_code: int, launch: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a_trainer.py").write_text(f"import sys\nprint(sys.argv[1:], __name__)\nsys.exit({code})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["launch"])
    assert launch("worker", "a_trainer", "--x", "a b")[:2] == (agent_code, "['--x', 'a b'] __main__\n")


@pytest.mark.parametrize(("rank", "code", "starts"), [("0", 1, 1), ("0", 2, 1), ("1", 1, 2), ("0", 75, 2), ("0", 3, 2)])
def test_worker_when_its_trainer_ended_by_a_user_error_then_is_not_run_again(
    rank: str, code: int, starts: int, launch: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a_trainer.py").write_text(f"import sys\nprint('a start')\nsys.exit({code})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["launch"])
    monkeypatch.setenv("RANK", rank)
    outcomes = []
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"attempt_{attempt}" / rank / "error.json"))
        outcomes.append(launch("worker", "a_trainer"))
    assert [outcome[0] for outcome in outcomes] == [0 if code == 75 else code] * 2
    assert sum("a start" in out for _, out, _ in outcomes) == starts
