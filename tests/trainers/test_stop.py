"""Tests of runs that are stopped at any moment: everything finished is kept, and the run continues bit-identically."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import llm.training.build
from llm.models.language_model import LanguageModel
from llm.training.run_dir.inspect import read_run, status_line
from llm.training.updaters.synchronous import SynchronousUpdater
from tests.conftest import FOREVER, Outcome

Train = Callable[..., Outcome]

LONG = (*FOREVER, "--logging_steps", "1")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def status(folder: Path) -> dict[str, Any]:
    """Return the content of a run's status.json."""
    content: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return content


def steps(folder: Path) -> list[str]:
    """Return the names of a run's checkpoints."""
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))


def are_equal(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same names and bits of weights."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl without the fields that depend on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if "second" not in key and key != "data_wait"}
        for line in lines
    ]


class Program:
    """The trainer in its own process."""

    def __init__(self, *words: str | Path, launcher: tuple[str, ...] = (), patch: str = "", **environment: str) -> None:
        """Start the trainer; `patch` is Python code that runs before the trainer's `main`."""
        command = [sys.executable, *launcher, "-m", "llm.trainers.gpt"]
        if patch:
            code = f"import sys\nfrom llm.trainers.gpt import main\n{patch}\nsys.exit(main(sys.argv[1:]))"
            command = [sys.executable, "-c", code]
        self.process = subprocess.Popen(
            [*command, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
        )
        self.lines: list[str] = []
        self.signal_time = 0.0  # when `stop` sent its signal, in seconds since the epoch

    def wait_for_line(self, start: str) -> None:
        """Read the output up to the first line that begins with `start`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith(start):
                return
        pytest.fail(f"no line {start!r} in:\n{self.out}")

    def wait_for(self, condition: Callable[[], object], seconds: float = 90) -> None:
        """Wait until a condition holds, while the program runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send the signal, wait for the end of the program and return its exit code."""
        self.signal_time = time.time()
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=60)
        self.lines += rest.splitlines(keepends=True)
        return self.process.returncode

    def seconds_until(self, file: Path) -> float:
        """Return the seconds from the signal to the last change of a file.

        Launchers wait at least 10 s before they kill.
        """
        return file.stat().st_mtime - self.signal_time

    @property
    def out(self) -> str:
        """What the program has printed, as far as it was read."""
        return "".join(self.lines)

    @property
    def last_step(self) -> int:
        """Number of the last step whose line was printed."""
        return max(int(line.split("/")[0][5:]) for line in self.lines if line.startswith("step "))


@pytest.fixture
def started() -> Iterator[Callable[..., Program]]:
    """Function that starts a `Program`; programs that still run at the end of the test are killed."""
    running: list[Program] = []

    def start(*words: str | Path, **settings: Any) -> Program:
        running.append(Program(*words, **settings))
        return running[-1]

    yield start
    for program in running:
        if program.process.poll() is None:
            program.process.kill()
        program.process.communicate()


@pytest.fixture
def long_text(tiny_text: Path, tmp_path: Path) -> Path:
    """Text of about 120 MB, which takes many seconds to tokenize."""
    path = tmp_path / "long.txt"
    path.write_bytes(tiny_text.read_bytes() * 2000)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["alone", "torchrun"])
def test_signal_when_tokenizing_then_exits_soon_and_leaves_no_partial_cache(
    tiny_options: list[str], tmp_path: Path, started: Any, long_text: Path, launcher: tuple[str, ...]
) -> None:
    cache, folder = tmp_path / "hf", tmp_path / "run"
    words = [*tiny_options, "--train_file", long_text, "--output_dir", folder]
    program = started(*words, launcher=launcher, HF_HOME=str(cache))
    program.wait_for(lambda: list(cache.glob("llm/tokens/.*.tmp/*")))
    code = program.stop()
    if launcher:
        assert code != 0, program.out
    else:
        assert code == 75, program.out
    assert program.seconds_until(folder / "status.json") < 10, program.out
    ended = status(folder)
    assert (ended["state"], ended["reason"], ended["step"], ended["exit_code"]) == ("stopped", "SIGTERM", 0, 75)
    assert "llm/training/run.py" not in program.out  # no traceback of this package
    assert list(cache.glob("llm/tokens/*")) == []
    assert not (folder / "checkpoints").exists()
    assert not (folder / "run.lock").exists()


@pytest.mark.slow
def test_signal_when_evaluating_then_the_step_is_saved_and_the_evaluation_repeated_after_the_resume(
    tiny_options: list[str], tmp_path: Path, started: Any, train: Train, tiny_text: Path
) -> None:
    folder = tmp_path / "run"
    (tmp_path / "long.txt").write_bytes(tiny_text.read_bytes() * 100)
    words = [*tiny_options, "--validation_file", tmp_path / "long.txt", "--eval_steps", "5", "--output_dir", folder]
    program = started(*words, "--logging_steps", "5")
    program.wait_for_line("step 5/")
    time.sleep(0.5)
    assert program.stop() == 75, program.out
    assert program.seconds_until(folder / "status.json") < 10, program.out
    assert "eval step" not in program.out
    assert (status(folder)["state"], status(folder)["step"]) == ("stopped", 5)
    assert steps(folder) == ["step_5"]
    outcome = train(*words, "--max_eval_batches", "2", "--resume_from_checkpoint")
    assert outcome.code == 0, outcome.err
    assert [line.split(" |")[0] for line in outcome.out.splitlines() if line.startswith("eval step")] == [
        f"eval step {step}" for step in (5, 10, 15, 20)
    ]


@pytest.mark.slow
def test_signal_when_sampling_then_exits_soon(tiny_options: list[str], tmp_path: Path, started: Any) -> None:
    folder = tmp_path / "run"
    program = started(
        *tiny_options, *LONG, "--sample_steps", "5", "--output_dir", folder,
        patch="import llm.training.callbacks.sampling; llm.training.callbacks.sampling._SAMPLE_TOKENS = 10**6",
    )  # fmt: skip
    program.wait_for_line("step 5/")
    time.sleep(1)
    assert program.stop(signal.SIGUSR1) == 75, program.out
    assert program.seconds_until(folder / "status.json") < 10, program.out
    ended = status(folder)
    assert (ended["state"], ended["reason"], ended["exit_code"]) == ("stopped", "SIGUSR1", 75)
    assert ended["step"] >= 5
    assert steps(folder) == [f"step_{ended['step']}"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_when_torchrun_receives_it_then_every_finished_step_is_saved_and_the_run_continues(
    tiny_options: list[str], tmp_path: Path, started: Any, train: Train, number: int
) -> None:
    folder = tmp_path / "run"
    words = [*tiny_options, *LONG, "--per_device_train_batch_size", "4", "--output_dir", folder]
    # The worker processes of the DataLoader belong to the process group that torchrun signals.
    program = started(*words, "--dataloader_num_workers", "1", launcher=TORCHRUN)
    program.wait_for_line("step 20/")
    assert program.stop(number) != 0
    assert program.seconds_until(folder / "status.json") < 10, program.out
    ended = status(folder)
    assert (ended["state"], ended["reason"]) == ("stopped", signal.Signals(number).name), program.out
    assert ended["step"] >= program.last_step >= 20
    assert steps(folder) == [f"step_{ended['step']}"]
    assert "DataLoader worker" not in program.out
    state = json.loads((folder / "checkpoints" / f"step_{ended['step']}" / "training_state.json").read_text())
    assert state["world"] == {"num_processes": 2, "num_nodes": 1}
    words[words.index("1000000")] = str(ended["step"] + 2)
    outcome = train(*words, "--per_device_train_batch_size", "8", "--resume_from_checkpoint")
    assert outcome.code == 0, outcome.err
    assert f"resumed from step {ended['step']}" in outcome.out


@pytest.mark.slow
def test_signal_when_an_update_hangs_then_the_second_signal_ends_the_run(
    tiny_options: list[str], tmp_path: Path, started: Any
) -> None:
    program = started(
        *tiny_options, *LONG, "--output_dir", tmp_path / "run",
        patch="import time; from llm.training.updaters.synchronous import SynchronousUpdater\n"
        "SynchronousUpdater.update = lambda *_, **__: print('hangs', flush=True) or time.sleep(1000)",
    )  # fmt: skip
    program.wait_for_line("hangs")
    program.process.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert program.process.poll() is None
    assert program.stop() == 128 + signal.SIGTERM
    assert time.time() - program.signal_time < 5
    assert "a second signal (SIGTERM): ended at once" in program.out
    ended = status(tmp_path / "run")
    assert (ended["state"], ended["exit_code"]) == ("failed", 128 + signal.SIGTERM)
    line = status_line(read_run(tmp_path / "run", verify=False))
    assert line == "failed: a second signal (SIGTERM): ended at once (exit code 143)"


def test_max_time_when_it_is_over_then_the_run_saves_and_can_be_resumed(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, *LONG, "--output_dir", tmp_path]
    outcome = train(*words, "--max_time", "2s")
    assert outcome.code == 75, outcome.err
    ended = status(tmp_path)
    assert (ended["state"], ended["reason"]) == ("stopped", "max_time")
    assert "deadline: " in outcome.out
    assert f"saved step {ended['step']}" in outcome.out
    again = train(*words, "--max_time", "2s", "--resume_from_checkpoint")
    assert again.code == 75
    assert status(tmp_path)["step"] > ended["step"] > 0


@pytest.mark.slow
def test_max_time_when_one_of_two_ranks_reaches_it_first_then_both_stop_after_the_same_step(
    tiny_options: list[str], tmp_path: Path, train: Train
) -> None:
    folder = tmp_path / "run"
    words = [*tiny_options, *LONG, "--per_device_train_batch_size", "4", "--output_dir", folder]
    script = tmp_path / "late.py"
    script.write_text(
        "import os, sys\n"
        "from llm.training.updaters.synchronous import SynchronousUpdater\n"
        "from llm.training.supervision.deadline import Deadline\n"
        "from llm.training.checkpoints.async_saver import AsyncSaver\n"
        "from llm.trainers.gpt import main\n"
        "update, save, calls = SynchronousUpdater.update, AsyncSaver.save, []\n"
        "SynchronousUpdater.update = lambda *args, **kwargs: calls.append(1) or update(*args, **kwargs)\n"
        "AsyncSaver.save = lambda *args, **kwargs: calls.append(1) or save(*args, **kwargs)\n"
        "Deadline.reason = lambda _: 'max_time' if len(calls) >= 21 - int(os.environ['RANK']) else None\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, *TORCHRUN, script, *words, "--max_time", "10h", "--save_minutes", "0"],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    ended = status(folder)
    assert (ended["state"], ended["reason"], ended["exit_code"]) == ("stopped", "max_time", 75), done.stderr
    last = max(int(line.split("/")[0][5:]) for line in done.stdout.splitlines() if line.startswith("step "))
    assert ended["step"] == last
    assert 19 <= last <= 20
    assert steps(folder) == [f"step_{last}"]
    words[words.index("1000000")] = str(last + 2)
    outcome = train(*words, "--per_device_train_batch_size", "8", "--resume_from_checkpoint")
    assert outcome.code == 0, outcome.err
    assert f"resumed from step {last}" in outcome.out


def test_walltime_when_slurm_reports_it_then_the_run_stops_before_it(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The job ends 10 s after the first call of squeue, however long the imports before it take.
    end_file = tmp_path / "end"
    code = "import time; print(time.strftime('%Y-%m-%dT%H:%M:%S', time.localtime(time.time() + 10)))"
    command = f'test -s "{end_file}" || "{sys.executable}" -S -c "{code}" > "{end_file}"; cat "{end_file}"'
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n{command}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    outcome = train(*tiny_options, *LONG, "--output_dir", tmp_path / "run")
    assert outcome.code == 75, outcome.err
    end = time.mktime(time.strptime(end_file.read_text().strip(), "%Y-%m-%dT%H:%M:%S"))
    assert (tmp_path / "run" / "status.json").stat().st_mtime < end
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["reason"]) == ("stopped", "walltime")
    assert "before the job's walltime" in outcome.out


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["between micro-batches", "in an evaluation"])
def test_run_when_stopped_inside_an_update_or_an_evaluation_then_continues_bit_identical(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    words = [*tiny_options, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    words += ["--dropout", "0.1", "--eval_steps", "5", "--logging_steps", "3", "--checkpointing_steps", "7"]
    assert train(*words, "--output_dir", tmp_path / "uninterrupted").code == 0
    forward = LanguageModel.forward
    num_calls = {"train": 0, "eval": 0}
    # The second micro-batch of the tenth update, or the fourth batch of the first evaluation.
    mode, number, last_step = ("train", 38, 9) if moment == "between micro-batches" else ("eval", 4, 5)

    def forward_and_signal(self: LanguageModel, *inputs: Any) -> Any:
        num_calls["train" if self.training else "eval"] += 1
        if num_calls[mode] == number and self.training == (mode == "train"):
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *inputs)

    monkeypatch.setattr(LanguageModel, "forward", forward_and_signal)
    outcome = train(*words, "--output_dir", tmp_path / "stopped")
    assert outcome.code == 75, outcome.err
    assert status(tmp_path / "stopped")["step"] == last_step
    monkeypatch.setattr(LanguageModel, "forward", forward)
    outcome = train(*words, "--output_dir", tmp_path / "stopped", "--resume_from_checkpoint")
    assert outcome.code == 0, outcome.err
    assert are_equal(tmp_path / "uninterrupted", tmp_path / "stopped")
    assert records(tmp_path / "uninterrupted") == records(tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in the samples", "in the export"])
def test_samples_when_the_run_is_stopped_while_sampling_or_fails_in_the_export_then_are_recorded_once(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    words = [*tiny_options, "--sample_steps", "8", "--checkpointing_steps", "7", "--dropout", "0.1"]
    assert train(*words, "--output_dir", tmp_path / "uninterrupted").code == 0
    assert [record["step"] for record in records(tmp_path / "uninterrupted") if "samples" in record] == [8, 16, 20]
    words += ["--output_dir", str(tmp_path / "stopped")]
    with monkeypatch.context() as patch:
        if moment == "in the samples":

            def signal_and_return_nothing(*_: Any, **__: Any) -> list[str]:
                os.kill(os.getpid(), signal.SIGTERM)
                return []

            patch.setattr("llm.training.callbacks.sampling.sample", signal_and_return_nothing)
            assert train(*words).code == 75
            assert status(tmp_path / "stopped")["step"] == 8
        else:
            patch.setattr("llm.training.finalize.export_model", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                train(*words)
    outcome = train(*words, "--resume_from_checkpoint")
    assert outcome.code == 0, outcome.err
    assert are_equal(tmp_path / "uninterrupted", tmp_path / "stopped")
    assert records(tmp_path / "uninterrupted") == records(tmp_path / "stopped")


def test_stop_when_no_step_was_trained_since_the_resume_then_the_checkpoint_is_not_written_again(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny_options, "--output_dir", tmp_path, "--checkpointing_steps", "10", "--max_train_steps"]
    assert train(*words, "10").code == 0
    manifest = tmp_path / "checkpoints" / "step_10" / "manifest.json"
    before, build = manifest.stat(), llm.training.build.build_optimizer

    def signal_and_build(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return build(*args)

    monkeypatch.setattr(llm.training.build, "build_optimizer", signal_and_build)
    halves = ("--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "4")
    outcome = train(*words, "20", *halves, "--resume_from_checkpoint")
    assert outcome.code == 75, outcome.err
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("stopped", 10)
    after = manifest.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_stop_when_the_weights_are_not_finite_then_fails_and_keeps_the_older_checkpoints(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = SynchronousUpdater.update

    def update_and_overwrite(self: SynchronousUpdater, *args: Any, **kwargs: Any) -> Any:
        report = update(self, *args, **kwargs)
        if args[1] == 6:  # the step
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("inf"))
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    monkeypatch.setattr(SynchronousUpdater, "update", update_and_overwrite)
    outcome = train(*tiny_options, "--checkpointing_steps", "5", "--output_dir", tmp_path)
    assert outcome.code == 1
    assert re.search(r"^error: step \d is not saved: \S+ is not finite", outcome.err, re.M)
    assert status(tmp_path)["state"] == "failed"
    assert steps(tmp_path) == ["step_5"]


def test_restart_by_torchrun_when_overwrite_output_dir_is_given_then_resumes(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny_options, "--checkpointing_steps", "5", "--output_dir", tmp_path, "--overwrite_output_dir"]
    assert train(*words, "--max_train_steps", "10").code == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    outcome = train(*words)
    assert outcome.code == 0, outcome.err
    assert "resumed from step 10" in outcome.out
    assert {"step_5", "step_10", "step_15", "step_20"} <= set(steps(tmp_path))


def test_restart_by_torchrun_when_a_checkpoint_is_named_then_resumes_from_it_until_there_is_a_newer_one(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny_options, "--checkpointing_steps", "5", "--output_dir"]
    assert train(*words, tmp_path / "first", "--max_train_steps", "5").code == 0
    named = ("--resume_from_checkpoint", tmp_path / "first" / "checkpoints" / "step_5")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    outcome = train(*words, tmp_path / "second", "--max_train_steps", "10", *named)
    assert "resumed from step 5" in outcome.out
    assert "resumed from step 10" in train(*words, tmp_path / "second", *named).out


def test_run_when_three_updates_in_a_row_are_not_finite_then_fails_and_its_checkpoints_stay(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = LanguageModel.forward, []

    def forward_with_nan(self: LanguageModel, *inputs: Any) -> Any:
        loss, count = forward(self, *inputs)
        calls.append(self.training)
        # The third update alone is skipped; from the eighth on no loss is finite.
        is_bad = self.training and (sum(calls) == 3 or sum(calls) >= 8)
        return (loss * float("nan") if is_bad else loss), count

    monkeypatch.setattr(LanguageModel, "forward", forward_with_nan)
    outcome = train(*tiny_options, "--checkpointing_steps", "5", "--output_dir", tmp_path)
    assert outcome.code == 1
    assert outcome.err.count("error:") == 1
    assert "3 updates in a row were not finite (the last is 10)" in outcome.err
    assert status(tmp_path)["state"] == "failed"
    assert steps(tmp_path) == ["step_5"]
    saved = load_file(tmp_path / "checkpoints" / "step_5" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_disk_when_three_checkpoints_do_not_fit_then_is_refused_before_the_model_is_built(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    outcome = train(*tiny_options, "--output_dir", tmp_path / "run")
    assert outcome.code == 1
    assert outcome.err.count("\n") == 1
    assert "3 checkpoints of" in outcome.err
    assert "weights:" not in outcome.out


SECRET_VARIABLES = {"HF_TOKEN": "hf_PLANTEDinTHEenvironment", "WANDB_API_KEY": "f00dPLANTEDwandbKEY"}
SECRET_OPTION = "hf_PLANTEDonTHEcommandLINE"


def find_secrets(folder: Path, *outputs: str) -> list[str]:
    """Return the names of the run's files and outputs that contain one of the secrets."""
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(files) > 5
    contents = files | {f"output {number}": text.encode() for number, text in enumerate(outputs)}
    secrets = [secret.encode() for secret in (*SECRET_VARIABLES.values(), SECRET_OPTION)]
    return [name for name, content in contents.items() if any(secret in content for secret in secrets)]


def test_secrets_when_in_the_environment_or_an_option_then_are_not_in_the_folder_or_the_output(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, secret in SECRET_VARIABLES.items():
        monkeypatch.setenv(name, secret)
    words = [*tiny_options, "--hub_token", SECRET_OPTION, "--checkpointing_steps", "10", "--sample_steps", "10"]
    words += ["--with_tracking", "--report_to", "tensorboard", "--output_dir", tmp_path]
    outcome = train(*words)
    assert outcome.code == 0, outcome.err
    assert find_secrets(tmp_path, outcome.out, outcome.err) == []


@pytest.mark.slow
def test_secrets_when_the_run_crashes_then_are_not_in_its_output_either(
    tiny_options: list[str], tmp_path: Path, started: Any
) -> None:
    program = started(
        *tiny_options, "--hub_token", SECRET_OPTION, "--checkpointing_steps", "10", "--output_dir", tmp_path,
        patch="import llm.training.finalize; llm.training.finalize.model_card = lambda _: 1 / 0", **SECRET_VARIABLES,
    )  # fmt: skip
    program.wait_for_line("ZeroDivisionError")
    program.process.wait(60)
    assert status(tmp_path)["state"] == "failed"
    assert find_secrets(tmp_path, program.out) == []
