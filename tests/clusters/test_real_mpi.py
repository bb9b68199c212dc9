"""Real MPICH and real Open MPI start one agent on each of two hosts, with all words and variables unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.clusters.hosts import MPIS, Hosts, clone, require

pytestmark = [pytest.mark.clusters, pytest.mark.slow]

WORDS = ["--text", "two words", 'a "quote"', "it's", "$HOME", "a\\b", "*", "--empty", ""]
# A trainer that only records where and how it was started.
RECORDER = """
import json, os, pathlib, socket, sys

names = ("RANK", "WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "GREETING")
facts = {name: os.environ.get(name) for name in names}
facts |= {"host": socket.gethostname(), "folder": os.getcwd(), "words": sys.argv[1:]}
pathlib.Path(f"record-{os.getpid()}.json").write_text(json.dumps(facts))
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mpi", MPIS)
@pytest.mark.parametrize("times", [4, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_job_when_started_by_a_real_mpiexec_then_each_host_has_one_agent_with_the_same_words(
    mpi: str, times: int, two_hosts: Hosts, tmp_path: Path
) -> None:
    require(MPIS[mpi])
    work = clone(tmp_path / "it's a $clone")
    (work / "recorder.py").write_text(RECORDER)
    nodes = tmp_path / "nodes"
    nodes.write_text("".join(f"{name}\n" * times for name in two_hosts.names))
    environment = two_hosts.environment(
        PBS_NODEFILE=str(nodes), PBS_JOBID="77.server", PBS_O_WORKDIR=str(work), GREETING="good  $day"
    )
    environment["PATH"] = f"{two_hosts.folder}/{mpi}:{environment['PATH']}"
    # As the last lines of a job script do, which PBS starts in the home folder.
    script = 'cd "$PBS_O_WORKDIR"; exec python -m llm.launch job --nproc 2 --max_restarts 0 -- recorder "$@"'
    done = two_hosts.run("n1", "bash", "-c", script, "job", *WORDS, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(path.read_text()) for path in work.glob("record-*.json")]
    assert sorted((record["host"], record["RANK"]) for record in records) in (
        [("n1", "0"), ("n1", "1"), ("n2", "2"), ("n2", "3")],
        [("n1", "2"), ("n1", "3"), ("n2", "0"), ("n2", "1")],
    )
    shared = {(record["WORLD_SIZE"], record["GROUP_WORLD_SIZE"], record["MASTER_ADDR"]) for record in records}
    assert len(shared) == 1
    assert shared.pop()[:2] == ("4", "2")
    assert {record["TORCHELASTIC_RUN_ID"] for record in records} == {"llm-77.server"}
    assert {record["folder"] for record in records} == {str(work)}
    assert all(record["words"] == WORDS for record in records)
    assert {record["GREETING"] for record in records} == {"good  $day"}
