"""Test the pages about clusters in docs/: their commands run, with stand-ins for schedulers, other hosts and torchrun.

`tests/test_readme.py` has the other pages.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from llm.clusters.sites import read_site
from tests.clusters.stand_ins import Recorder, install_torch

ROOT = Path(__file__).parents[1]
PAGES = ("polaris", "slurm", "laptop")
HOSTS = ["n1", "n2"]
# Commands that need the site itself, or a network.
SITE_ONLY = (
    "module ",
    "conda activate base",
    "python -m venv --system-site-packages .venv",
    "python3 -m venv .venv",
    ". .venv/bin/activate",
    "python -m pip install -e .",
)

# Runs the script as a job of two hosts. A PBS job starts in the home directory, with a fresh environment.
QSUB = """#!/bin/bash
while [ $# -gt 1 ]; do
  if [ "$1" = -v ]; then IFS=, read -ra pairs <<< "$2"; fi
  shift
done
job=(env -i PATH="$PATH" HOME="$HOME" PBS_JOBID=7.x PBS_NODEFILE={folder}/nodes PBS_O_WORKDIR="$PWD" "${{pairs[@]}}")
script=$(realpath "$1")
cd
exec "${{job[@]}}" bash "$script"
"""
SBATCH = """#!/bin/bash
while [ $# -gt 1 ]; do
  case "$1" in
    --export=ALL,*) IFS=, read -ra pairs <<< "${{1#--export=ALL,}}" ;;
    --nodes=*|--gpus-per-node=*) ;;
    *) echo "unknown: $1"; exit 1 ;;
  esac
  shift
done
exec env SLURM_JOB_ID=7 SLURM_JOB_NODELIST=n[1-2] SLURM_SUBMIT_DIR="$PWD" "${{pairs[@]}}" bash "$1"
"""


def lines(page: str) -> list[str]:
    """Return the commands in the fenced blocks of a page."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert text.count("```") == 2 * len(blocks)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a reader's folder: the templates, the examples, the options of a run, and an environment in .venv."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("jobs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my.toml").write_text('[output]\noutput_dir = "runs/mine"\n')
    (folder / "nodes").write_text("".join(f"{host}\n" * 4 for host in HOSTS))
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "lib"}:{ROOT} exec {sys.executable} "$@"\n')
    return folder


@pytest.fixture
def recorder(tmp_path: Path, project: Path) -> Recorder:
    """Return stand-ins for all programs that this machine lacks."""
    recorder = Recorder(tmp_path / "bin")
    recorder.folder.mkdir()
    recorder.install("PALS", HOSTS)
    for name, text in (("qsub", QSUB), ("sbatch", SBATCH)):
        (recorder.folder / name).write_text(text.format(folder=project))
    shutil.copy(project / ".venv" / "bin" / "python", recorder.folder / "python")
    srun = recorder.folder / "srun"
    srun.write_text(srun.read_text().replace(str(recorder.folder / "python"), sys.executable))
    for path in (*recorder.folder.iterdir(), project / ".venv" / "bin" / "python"):
        path.chmod(0o755)
    install_torch(tmp_path / "lib", recorder.records_file)
    return recorder


def run_line(line: str, folder: Path, recorder: Recorder) -> subprocess.CompletedProcess[str]:
    """Run a line in bash, with the stand-ins in PATH."""
    environment = {"PATH": f"{recorder.folder}:/usr/bin:/bin", "HOME": str(folder.parent)}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def check_interactive(words: Sequence[str]) -> None:
    """Check a command that requests an allocation: its arguments are those of the site's scripts."""
    if words[0] == "qsub":
        resources = {words[number + 1] for number, word in enumerate(words) if word == "-l"}
        polaris = read_site("polaris", "pbs").pbs
        assert polaris is not None
        assert f"-q {polaris.queue}" in " ".join(words)
        directives = {line.replace("{nodes}", "2").removeprefix("-l ") for line in polaris.directives}
        assert resources == (directives - {"place=scatter"}) | {"walltime=1:00:00"}
    else:
        assert words == ["salloc", "--nodes=2", "--time=1:00:00"]


COMMANDS = [(page, line) for page in PAGES for line in lines(page) if not line.startswith(SITE_ONLY)]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda text: text[:50])
def test_command_when_run_then_starts_what_the_page_says(
    page: str, line: str, project: Path, recorder: Recorder
) -> None:
    words = shlex.split(line)
    if words[:2] == ["qsub", "-I"] or words[0] == "salloc":
        check_interactive(words)
        return
    done = run_line(line, project, recorder)
    assert done.returncode in (0, 75), done.stdout + done.stderr
    if words[:3] == ["python", "-m", "llm.launch"] and words[3] in ("pbs", "slurm"):
        assert done.stdout.startswith("#!/bin/bash")
        assert '--config "${CONFIG:-my.toml}"' in done.stdout
        return
    is_job = words[0] in ("qsub", "sbatch") or "--hosts anna,bert" in line
    assert len(recorder.records) == (2 if is_job else 1), done.stdout + done.stderr
    if is_job and words[0] != "python":
        assert [record["host"] for record in recorder.records] == HOSTS
    for record in recorder.records:
        command = " ".join(record["command"])
        config = re.search(r"--config (\S+)", command)
        assert config is not None
        assert config[1] == ("my.toml" if "my.toml" in line else "examples/polaris_gpt_neo_125m.toml")
        assert record["folder"] == str(project)


def test_pages_when_read_then_have_commands_and_name_existing_files() -> None:
    assert {page for page, _ in COMMANDS} == set(PAGES)
    assert len(COMMANDS) >= 15
    for page in PAGES:
        text = (ROOT / "docs" / f"{page}.md").read_text()
        paths = re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", text)
        assert [path for path in paths if not (ROOT / path).exists()] == []
        inline = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
        modules = {match[1] for span in inline if (match := re.match(r"python -m (llm\.\w+)", span))}
        assert modules <= {"llm.launch", "llm.runs"}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_nodes_when_simulated_in_two_terminals_then_train_as_one_process_does(
    tiny_text: Path, tiny_gpt2_dir: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    (tmp_path / "my.toml").write_text(
        f'[data]\ntrain_file = "{tiny_text}"\nblock_size = 32\n[tokenizer]\ntokenizer_name = "{tiny_gpt2_dir}"\n'
        f'[model]\nconfig_name = "{tiny_gpt2_dir}"\ndropout = 0.0\n[output]\noutput_dir = "run"\n'
        "[training]\nmax_train_steps = 5\nglobal_batch_size = 8\nper_device_train_batch_size = 4\nseed = 1\n"
        'mixed_precision = "no"\nuse_cpu = true\n[optimizer]\nadam_epsilon = 1e-6\n'
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    commands = [line for line in lines("laptop") if "--rank" in line]
    assert len(commands) == 2
    terminals = [
        subprocess.Popen(
            [sys.executable, *shlex.split(line)[1:]], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        for line in commands
    ]
    try:
        output = "".join(terminal.communicate(timeout=200)[0] for terminal in terminals)
    finally:
        for terminal in terminals:
            terminal.kill()
    assert [terminal.returncode for terminal in terminals] == [0, 0], output
    assert "2 processes" in output
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
    alone = [sys.executable, "-m", "llm.trainers.gpt", "--config", "my.toml", "--output_dir", "alone"]
    assert subprocess.run(alone, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, check=False).returncode == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "alone")]
    assert max(abs(weights[0][name] - weights[1][name]).max() for name in weights[0]) < 1e-5
