"""`launch node` with real processes: a killed one is restarted, and a signal loses nothing."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import FOREVER

# Each starts torchrun several times, which takes long on a busy machine.
pytestmark = [pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[1]
NUM_STEPS = 60


class Node:
    """A `launch node` of two processes."""

    def __init__(self, *words: str | Path, log: Path, command: str = "node") -> None:
        self.log = log
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
        environment |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command_line = [sys.executable, "-m", "llm.launch", command, "--nproc", "2", "--", *map(str, words)]
        with open(log, "wb") as out:
            self.process = subprocess.Popen(command_line, env=environment, stdout=out, stderr=out, process_group=0)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, pattern: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not re.search(pattern, self.text, re.MULTILINE):
            assert time.monotonic() < end, f"no {pattern!r} in:\n{self.text}"
            assert self.process.poll() is None, self.text
            time.sleep(0.05)

    def workers(self) -> list[int]:
        """The process ids of its two workers, by rank."""
        pids: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) if entry.name.isdigit() else 0
                variables = (entry / "environ").read_bytes().split(b"\0") if parent else []
            except OSError:
                continue
            ranks = [int(pair[5:]) for pair in variables if pair.startswith(b"RANK=")]
            if ranks and parent in self._family():
                pids[ranks[0]] = int(entry.name)
        assert len(pids) == 2, pids
        return [pids[0], pids[1]]

    def _family(self) -> set[int]:
        """Process ids that the agent may have: this process, or its child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return {self.process.pid, *map(int, children)}


@pytest.fixture(scope="module")
def options(tiny_text: Path, tiny_gpt2_dir: Path) -> list[str]:
    """60 steps of two processes, with a checkpoint every five."""
    words = f"--train_file {tiny_text} --tokenizer_name {tiny_gpt2_dir} --config_name {tiny_gpt2_dir} --dropout 0.1"
    words += f" --block_size 32 --per_device_train_batch_size 4 --max_train_steps {NUM_STEPS} --checkpointing_steps 5"
    return f"{words} --logging_steps 5 --learning_rate 1e-3 --seed 7 --use_cpu --mixed_precision no".split()


@pytest.fixture(scope="module")
def undisturbed(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a run without a killed process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    node = Node(*options, "--output_dir", folder / "run", log=folder / "log")
    assert node.process.wait(150) == 0, node.text
    assert "2 processes" in node.text
    return (folder / "run" / "model.safetensors").read_bytes()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Kill the processes that a failed test leaves."""
    started: list[subprocess.Popen[bytes]] = []
    original = subprocess.Popen.__init__

    def remember(self: subprocess.Popen[bytes], *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)  # type: ignore[arg-type]
        if kwargs.get("process_group") == 0:
            started.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", remember)
        yield
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def kill_one(options: list[str], run: Path, *, after: int, rank: int) -> Node:
    """A finished run of which one process was killed after a step."""
    node = Node(*options, "--output_dir", run, log=run.with_suffix(".log"))
    node.wait_for(rf"^saved step {after}$")
    os.kill(node.workers()[rank], signal.SIGKILL)
    assert node.process.wait(150) == 0, node.text
    return node


@pytest.mark.slow
def test_worker_when_killed_then_the_run_resumes_by_itself_and_ends_with_the_same_bits(
    options: list[str], undisturbed: bytes, tmp_path: Path
) -> None:
    node = kill_one(options, tmp_path / "killed", after=20, rank=1)
    assert "started again by torchrun (1)" in node.text
    resumed = re.findall(r"^resumed from step (\d+)", node.text, re.MULTILINE)
    assert len(resumed) == 1
    assert int(resumed[0]) >= 20
    assert json.loads((tmp_path / "killed" / "status.json").read_text())["state"] == "done"
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == undisturbed


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_worker_when_killed_ten_times_in_ten_runs_then_each_ends_with_the_same_bits(
    options: list[str], undisturbed: bytes, tmp_path: Path
) -> None:
    draw = random.Random(8)
    for number in range(10):
        run = tmp_path / f"killed{number}"
        node = kill_one(options, run, after=5 * draw.randint(1, 8), rank=number % 2)
        assert "started again by torchrun (1)" in node.text
        assert (run / "model.safetensors").read_bytes() == undisturbed, number


@pytest.mark.slow
@pytest.mark.parametrize(("command", "stop_signal"), [("node", signal.SIGTERM), ("job", signal.SIGUSR1)])
def test_launcher_when_stopped_by_a_signal_then_the_run_has_saved_everything_and_can_resume(
    command: str, stop_signal: signal.Signals, options: list[str], undisturbed: bytes, tmp_path: Path
) -> None:
    run = tmp_path / "stopped"
    node = Node(*options, "--output_dir", run, log=tmp_path / "stopped.log", command=command)
    node.wait_for(r"^saved step 20$")
    node.process.send_signal(stop_signal)
    code = node.process.wait(60)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped", node.text
    assert status["reason"] == stop_signal.name
    assert (run / "checkpoints" / f"step_{status['step']}" / "manifest.json").is_file()
    if command == "job":
        assert code == 75
        assert "job: exit code 75; " in node.text
    again = Node(*options, "--output_dir", run, "--resume_from_checkpoint", log=tmp_path / "again.log", command=command)
    assert again.process.wait(150) == 0, again.text
    assert f"resumed from step {status['step']}" in again.text
    assert (run / "model.safetensors").read_bytes() == undisturbed


@pytest.mark.slow
def test_run_when_max_time_is_over_then_the_agent_does_not_restart_it(options: list[str], tmp_path: Path) -> None:
    run = tmp_path / "short"
    words = [*options, *FOREVER, "--checkpointing_steps", "50000", "--max_time", "15s"]
    node = Node(*words, "--output_dir", run, log=tmp_path / "short.log", command="job")
    assert node.process.wait(150) == 75, node.text
    assert "started again" not in node.text
    assert "max_time" in node.text
