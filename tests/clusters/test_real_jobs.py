"""The job templates under a real Slurm and, through Slurm's own qsub, under an emulated PBS: two hosts train."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from llm.config.options import Options
from llm.config.reader import read_options
from llm.config.toml import to_toml
from tests.clusters.hosts import clone
from tests.clusters.slurm_cluster import Cluster, log_of
from tests.conftest import FOREVER, Outcome
from tests.faults.campaign import differences

pytestmark = [pytest.mark.clusters, pytest.mark.slow]

# The promised times hold for an idle machine; others may take this many times as long.
_SLOWDOWN = 3

TEMPLATES = {"slurm": "jobs/slurm/pretrain.sbatch", "pbs": "jobs/pbs/pretrain.pbs"}


@pytest.fixture(params=["slurm", "pbs"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    """Slurm, then the emulated PBS."""
    cluster: Cluster = request.getfixturevalue(request.param)
    return cluster


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The folder from which a user submits."""
    return clone(tmp_path / "clone")


@pytest.fixture
def words(tiny_options: list[str]) -> list[str]:
    """Options of a run whose steps have 8 blocks, for any number of processes."""
    return [*tiny_options, "--per_device_train_batch_size", "4", "--global_batch_size", "8", "--logging_steps", "5"]


def write_config(path: Path, words: Sequence[str], output_dir: Path) -> None:
    options = read_options(Options, [*words, "--output_dir", str(output_dir)], prog="", description="")
    path.write_text(to_toml(options))


def submit(cluster: Cluster, work: Path, script: str | None = None, *, minutes: int = 10, chain: int = 1) -> str:
    """Submit the template, or another script, with `run.toml`; return the number of the job."""
    variables = f"CONFIG=run.toml,CHAIN={chain}"
    template = script or TEMPLATES[cluster.kind]
    if cluster.kind == "pbs":
        return cluster.submit("-l", f"walltime=0:{minutes:02}:00", "-v", variables, template, folder=work)
    return cluster.submit(f"--time={minutes}", f"--export=ALL,{variables}", template, folder=work)


def status(folder: Path) -> dict[str, object]:
    path = folder / "status.json"
    content: dict[str, object] = json.loads(path.read_text()) if path.exists() else {}
    return content


@pytest.mark.timeout(500)
def test_template_when_submitted_then_two_hosts_train_to_the_weights_of_one_process(
    cluster: Cluster, work: Path, words: list[str], train: Callable[..., Outcome]
) -> None:
    write_config(work / "run.toml", words, work / "two")
    began = time.monotonic()
    submit(cluster, work)
    states = cluster.wait(300)
    seconds = time.monotonic() - began
    assert status(work / "two").get("state") == "done", f"{states}\n{log_of(work)}"
    print(f"{cluster.kind}: {seconds:.1f} s from the submission to the end")
    assert seconds < _SLOWDOWN * 120
    assert "cpu, 2 processes" in log_of(work)
    outcome = train(*words, "--output_dir", work / "one")
    assert outcome.code == 0, outcome.err
    one, two = (load_file(work / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(abs(one[name] - two[name]).max() for name in one) < 1e-5


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("scheduler", "num_cuts"),
    [
        ("slurm", 1),
        pytest.param("slurm", 4, marks=pytest.mark.exhaustive),
        pytest.param("pbs", 4, marks=pytest.mark.exhaustive),
    ],
)
def test_chain_when_the_walltime_cuts_the_run_then_it_ends_as_an_uncut_run(
    scheduler: str, num_cuts: int, request: pytest.FixtureRequest, work: Path, words: list[str]
) -> None:
    cluster: Cluster = request.getfixturevalue(scheduler)
    words = [*words, "--lr_scheduler_type", "constant", "--checkpointing_steps", "100000", "--logging_steps", "10"]
    write_config(work / "run.toml", [*words, *FOREVER], work / "cut")
    job = submit(cluster, work, minutes=2, chain=num_cuts + 3)
    pauses = Pauses(work / "cut" / "metrics.jsonl")
    steps: list[int] = []
    for number in range(num_cuts):
        successor = wait_for_successor(cluster, job)
        if number == num_cuts - 1:
            assert cluster.ask("scontrol", "hold", successor).returncode == 0
        wait_for_end(cluster, job, pauses)
        stopped = status(work / "cut")
        assert (stopped.get("state"), stopped.get("reason")) == ("stopped", "walltime"), log_of(work)
        steps.append(int(str(stopped["step"])))
        job = successor
    # The last job has few steps left, however fast this machine is.
    num_steps = str(steps[-1] + 20)
    write_config(work / "run.toml", [*words, "--max_train_steps", num_steps], work / "cut")
    # It requested the walltime of the first job, which must not cut it again.
    assert cluster.ask("scontrol", "update", f"jobid={job}", "timelimit=10").returncode == 0
    assert cluster.ask("scontrol", "release", job).returncode == 0
    wait_for_end(cluster, job, pauses)
    states = cluster.wait(60)
    print(f"{scheduler}: cut at steps {steps}, longest pause {pauses.longest_seconds:.1f} s, {states}")
    assert status(work / "cut").get("state") == "done", log_of(work)
    resumed = re.findall(r"^resumed from step (\d+)", log_of(work), re.MULTILINE)
    assert [int(step) for step in resumed] == steps
    assert pauses.longest_seconds < _SLOWDOWN * 60
    write_config(work / "run.toml", [*words, "--max_train_steps", num_steps], work / "uncut")
    submit(cluster, work)
    cluster.wait(900)
    assert status(work / "uncut").get("state") == "done", log_of(work)
    assert differences(work / "uncut", work / "cut") == []


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_job_when_its_end_is_unknown_then_it_saves_between_sigterm_and_sigkill(
    cluster: Cluster, work: Path, words: list[str]
) -> None:
    write_config(work / "run.toml", [*words, *FOREVER], work / "cut")
    template = (work / TEMPLATES[cluster.kind]).read_text()
    # A time in the past is ignored.
    script = template.replace("set -euo pipefail\n", "set -euo pipefail\nexport LLM_END_TIME=1\n")
    (work / "unknown.sh").write_text(script)
    submit(cluster, work, "unknown.sh", minutes=2)
    cluster.wait(300)
    stopped = status(work / "cut")
    assert (stopped.get("state"), stopped.get("reason")) == ("stopped", "SIGTERM"), log_of(work)
    assert f"saved step {stopped['step']}" in log_of(work)


class Pauses:
    """The longest time in which nothing was added to a file, after its first line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = 0.0
        self.longest_seconds = 0.0

    def check(self) -> None:
        """Read the file's time of change; must be called between any two of its lines."""
        changed = self._path.stat().st_mtime if self._path.exists() else 0.0
        if self._last:
            self.longest_seconds = max(self.longest_seconds, changed - self._last)
        self._last = changed


def wait_for_successor(cluster: Cluster, job: str) -> str:
    """The job that this one has queued."""
    deadline = time.monotonic() + 90
    while not (new := [other for other in cluster.jobs() if int(other) > int(job)]):
        assert time.monotonic() < deadline, f"no job behind {job}: {cluster.jobs()}"
        time.sleep(0.5)
    return new[0]


def wait_for_end(cluster: Cluster, job: str, pauses: Pauses) -> None:
    deadline = time.monotonic() + 300
    while cluster.jobs()[job] in ("PENDING", "RUNNING", "COMPLETING"):
        assert time.monotonic() < deadline, f"job {job} does not end: {cluster.jobs()}"
        pauses.check()
        time.sleep(0.5)
    pauses.check()
