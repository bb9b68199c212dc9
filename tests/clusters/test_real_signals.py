"""A job of a real Slurm that is signalled or cancelled, or whose script lacks srun."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.clusters.hosts import clone
from tests.clusters.slurm_cluster import Cluster, log_of
from tests.clusters.test_real_jobs import status, submit, words, write_config
from tests.conftest import FOREVER

pytestmark = [pytest.mark.clusters, pytest.mark.slow, pytest.mark.timeout(400)]
__all__ = ["words"]  # a fixture


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The folder from which a user submits."""
    return clone(tmp_path / "clone")


def start_run(cluster: Cluster, work: Path, options: list[str], *, chain: int = 1) -> str:
    """Start a job of an endless run, wait for its first record, and return the job's number."""
    write_config(work / "run.toml", [*options, *FOREVER], work / "run")
    job = submit(cluster, work, chain=chain)
    end = time.monotonic() + 120
    while not (work / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < end, log_of(work)
        time.sleep(0.2)
    return job


@pytest.mark.parametrize(
    "words_of_scancel",
    [
        pytest.param(["--signal=TERM", "{job}.0"], marks=pytest.mark.exhaustive, id="TERM"),
        pytest.param(["{job}"], id="cancel"),
    ],
)
def test_run_when_slurm_ends_it_then_everything_is_saved(
    words_of_scancel: list[str], slurm: Cluster, work: Path, words: list[str]
) -> None:
    job = start_run(slurm, work, words)
    assert slurm.ask("scancel", *[word.format(job=job) for word in words_of_scancel]).returncode == 0
    states = slurm.wait(100)
    stopped = status(work / "run")
    assert (stopped.get("state"), stopped.get("reason")) == ("stopped", "SIGTERM"), f"{states}\n{log_of(work)}"
    assert (work / "run" / "checkpoints" / f"step_{stopped['step']}" / "manifest.json").is_file()
    if len(words_of_scancel) == 2:
        assert "job: exit code 75; " in log_of(work)


def test_node_when_the_script_lacks_srun_then_is_refused_at_once(slurm: Cluster, work: Path) -> None:
    (work / "forgot.sh").write_text("#!/bin/bash\npython -m llm.launch node --nproc 1 -- --max_train_steps 1\n")
    slurm.submit("--nodes=2", "--ntasks-per-node=2", "forgot.sh", folder=work)
    slurm.wait(60)
    assert "this job has 2 hosts, and `launch node` runs on this one alone" in log_of(work)


def test_node_when_srun_starts_several_on_a_host_then_is_refused(slurm: Cluster, work: Path) -> None:
    (work / "many.sh").write_text("#!/bin/bash\nsrun python -m llm.launch node --nproc 1 -- --max_train_steps 1\n")
    slurm.submit("--nodes=2", "--ntasks-per-node=2", "many.sh", folder=work)
    slurm.wait(60)
    assert "4 agents were started, for 2 hosts: `launch node` runs once on each host" in log_of(work)
