"""A run that is asked to stop, at any moment: everything that was finished is kept, and it continues exactly."""

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
    facts: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return facts


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step_*"))


def are_equal(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def records(folder: Path) -> list[dict[str, Any]]:
    """The records without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if "second" not in key and key != "data_wait"}
        for line in lines
    ]


class Program:
    """The trainer in a process of its own."""

    def __init__(self, *words: str | Path, launcher: tuple[str, ...] = (), first: str = "", **environment: str) -> None:
        """`first` is code that runs before the trainer's `main`."""
        command = [sys.executable, *launcher, "-m", "llm.trainers.gpt"]
        if first:
            code = f"import sys\nfrom llm.trainers.gpt import main\n{first}\nsys.exit(main(sys.argv[1:]))"
            command = [sys.executable, "-c", code]
        self.process = subprocess.Popen(
            [*command, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **environment},
        )
        self.lines: list[str] = []
        self.asked = 0.0

    def wait_for_line(self, start: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith(start):
                return
        pytest.fail(f"no line {start!r} in:\n{self.out}")

    def wait_for(self, condition: Callable[[], object], seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends the signal; the exit code."""
        self.asked = time.time()
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=60)
        self.lines += rest.splitlines(keepends=True)
        return self.process.returncode

    def seconds_until(self, file: Path) -> float:
        """From the signal to the last change of a file; launchers wait 10 s at least before they kill."""
        return file.stat().st_mtime - self.asked

    @property
    def out(self) -> str:
        return "".join(self.lines)

    @property
    def last_step(self) -> int:
        """The last update that a line was printed of."""
        return max(int(line.split("/")[0][5:]) for line in self.lines if line.startswith("step "))


@pytest.fixture
def started() -> Iterator[Callable[..., Program]]:
    """Starts trainers that do not outlive the test."""
    running: list[Program] = []

    def start(*words: str | Path, **more: Any) -> Program:
        running.append(Program(*words, **more))
        return running[-1]

    yield start
    for program in running:
        if program.process.poll() is None:
            program.process.kill()
        program.process.communicate()


@pytest.fixture
def long_text(tiny_text: Path, tmp_path: Path) -> Path:
    """About 120 MB, which take many seconds to tokenize."""
    path = tmp_path / "long.txt"
    path.write_bytes(tiny_text.read_bytes() * 2000)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["alone", "torchrun"])
def test_signal_when_tokenizing_then_ends_soon_and_leaves_no_half_made_cache(
    tiny_options: list[str], tmp_path: Path, started: Any, long_text: Path, launcher: tuple[str, ...]
) -> None:
    cache, folder = tmp_path / "hf", tmp_path / "run"
    words = [*tiny_options, "--train_file", long_text, "--output_dir", folder]
    program = started(*words, launcher=launcher, HF_HOME=str(cache))
    program.wait_for(lambda: list(cache.glob("llm/tokens/.*.tmp/*")))
    code = program.stop()
    assert code != 0 if launcher else code == 75, program.out
    assert program.seconds_until(folder / "status.json") < 10, program.out
    facts = status(folder)
    assert (facts["state"], facts["reason"], facts["step"], facts["exit_code"]) == ("stopped", "SIGTERM", 0, 75)
    assert "llm/training/run.py" not in program.out  # no traceback of ours
    assert list(cache.glob("llm/tokens/*")) == []
    assert not (folder / "checkpoints").exists()
    assert not (folder / "run.lock").exists()


@pytest.mark.slow
def test_signal_when_evaluating_then_the_update_before_is_saved_and_the_evaluation_made_up_for(
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
def test_signal_when_sampling_then_ends_soon(tiny_options: list[str], tmp_path: Path, started: Any) -> None:
    folder = tmp_path / "run"
    program = started(
        *tiny_options, *LONG, "--sample_steps", "5", "--output_dir", folder,
        first="import llm.training.callbacks.sampling; llm.training.callbacks.sampling._SAMPLE_TOKENS = 10**6",
    )  # fmt: skip
    program.wait_for_line("step 5/")
    time.sleep(1)
    assert program.stop(signal.SIGUSR1) == 75, program.out
    assert program.seconds_until(folder / "status.json") < 10, program.out
    facts = status(folder)
    assert (facts["state"], facts["reason"], facts["exit_code"]) == ("stopped", "SIGUSR1", 75)
    assert facts["step"] >= 5
    assert steps(folder) == [f"step_{facts['step']}"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_when_torchrun_gets_it_then_every_finished_update_is_saved_and_the_run_continues(
    tiny_options: list[str], tmp_path: Path, started: Any, train: Train, number: int
) -> None:
    folder = tmp_path / "run"
    words = [*tiny_options, *LONG, "--per_device_train_batch_size", "4", "--output_dir", folder]
    # Readers of their own belong to the group of processes that torchrun signals.
    program = started(*words, "--dataloader_num_workers", "1", launcher=TORCHRUN)
    program.wait_for_line("step 20/")
    assert program.stop(number) != 0
    assert program.seconds_until(folder / "status.json") < 10, program.out
    facts = status(folder)
    assert (facts["state"], facts["reason"]) == ("stopped", signal.Signals(number).name), program.out
    assert facts["step"] >= program.last_step >= 20
    assert steps(folder) == [f"step_{facts['step']}"]
    assert "DataLoader worker" not in program.out
    state = json.loads((folder / "checkpoints" / f"step_{facts['step']}" / "training_state.json").read_text())
    assert state["world"] == {"num_processes": 2, "num_nodes": 1}
    words[words.index("1000000")] = str(facts["step"] + 2)
    outcome = train(*words, "--per_device_train_batch_size", "8", "--resume_from_checkpoint")
    assert outcome.code == 0, outcome.err
    assert f"resumed from step {facts['step']}" in outcome.out


@pytest.mark.slow
def test_signal_when_an_update_hangs_then_the_second_one_ends_the_run(
    tiny_options: list[str], tmp_path: Path, started: Any
) -> None:
    program = started(
        *tiny_options, *LONG, "--output_dir", tmp_path / "run",
        first="import time; from llm.training.updaters.synchronous import SynchronousUpdater\n"
        "SynchronousUpdater.update = lambda *_, **__: print('hangs', flush=True) or time.sleep(1000)",
    )  # fmt: skip
    program.wait_for_line("hangs")
    program.process.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert program.process.poll() is None
    assert program.stop() == 128 + signal.SIGTERM
    assert time.time() - program.asked < 5
    assert "a second signal (SIGTERM): ended at once" in program.out
    facts = status(tmp_path / "run")
    assert (facts["state"], facts["exit_code"]) == ("failed", 128 + signal.SIGTERM)
    said = status_line(read_run(tmp_path / "run", verify=False))
    assert said == "failed: a second signal (SIGTERM): ended at once (exit code 143)"


def test_max_time_when_it_is_over_then_the_run_saves_and_continues_later(
    train: Train, tiny_options: list[str], tmp_path: Path
) -> None:
    words = [*tiny_options, *LONG, "--output_dir", tmp_path]
    outcome = train(*words, "--max_time", "2s")
    assert outcome.code == 75, outcome.err
    facts = status(tmp_path)
    assert (facts["state"], facts["reason"]) == ("stopped", "max_time")
    assert "deadline: " in outcome.out
    assert f"saved step {facts['step']}" in outcome.out
    again = train(*words, "--max_time", "2s", "--resume_from_checkpoint")
    assert again.code == 75
    assert status(tmp_path)["step"] > facts["step"] > 0


@pytest.mark.slow
def test_max_time_when_one_of_two_ranks_sees_it_first_then_both_stop_after_the_same_update(
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
        "SynchronousUpdater.update = lambda *given, **more: calls.append(1) or update(*given, **more)\n"
        "AsyncSaver.save = lambda *given, **more: calls.append(1) or save(*given, **more)\n"
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
    facts = status(folder)
    assert (facts["state"], facts["reason"], facts["exit_code"]) == ("stopped", "max_time", 75), done.stderr
    last = max(int(line.split("/")[0][5:]) for line in done.stdout.splitlines() if line.startswith("step "))
    assert facts["step"] == last
    assert 19 <= last <= 20
    assert steps(folder) == [f"step_{last}"]
    words[words.index("1000000")] = str(last + 2)
    outcome = train(*words, "--per_device_train_batch_size", "8", "--resume_from_checkpoint")
    assert outcome.code == 0, outcome.err
    assert f"resumed from step {last}" in outcome.out


def test_walltime_when_slurm_says_it_then_the_run_stops_before_it(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = int(time.time()) + 10
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(end))
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho {text}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    outcome = train(*tiny_options, *LONG, "--output_dir", tmp_path / "run")
    assert outcome.code == 75, outcome.err
    assert time.time() < end
    assert (status(tmp_path / "run")["state"], status(tmp_path / "run")["reason"]) == ("stopped", "walltime")
    assert "before the job's walltime" in outcome.out


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["between micro-batches", "in an evaluation"])
def test_run_when_stopped_at_an_awkward_moment_then_continues_bit_identical(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    words = [*tiny_options, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    words += ["--dropout", "0.1", "--eval_steps", "5", "--logging_steps", "3", "--checkpointing_steps", "7"]
    assert train(*words, "--output_dir", tmp_path / "whole").code == 0
    forward, calls = LanguageModel.forward, {True: 0, False: 0}
    is_between = moment == "between micro-batches"

    def signalling(self: LanguageModel, *given: Any) -> Any:
        calls[self.training] += 1
        # The second micro-batch of the tenth update, or the fourth batch of the first evaluation.
        if (calls[True] == 38) if is_between else (calls[False] == 4):
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *given)

    monkeypatch.setattr(LanguageModel, "forward", signalling)
    outcome = train(*words, "--output_dir", tmp_path / "cut")
    assert outcome.code == 75, outcome.err
    assert status(tmp_path / "cut")["step"] == (9 if is_between else 5)
    monkeypatch.setattr(LanguageModel, "forward", forward)
    outcome = train(*words, "--output_dir", tmp_path / "cut", "--resume_from_checkpoint")
    assert outcome.code == 0, outcome.err
    assert are_equal(tmp_path / "whole", tmp_path / "cut")
    assert records(tmp_path / "whole") == records(tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in the samples", "in the export"])
def test_samples_when_the_run_ends_around_them_then_are_recorded_once(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    words = [*tiny_options, "--sample_steps", "8", "--checkpointing_steps", "7", "--dropout", "0.1"]
    assert train(*words, "--output_dir", tmp_path / "whole").code == 0
    assert [record["step"] for record in records(tmp_path / "whole") if "samples" in record] == [8, 16, 20]
    words += ["--output_dir", str(tmp_path / "cut")]
    with monkeypatch.context() as patch:
        if moment == "in the samples":

            def signalling(*given: Any, **more: Any) -> list[str]:
                os.kill(os.getpid(), signal.SIGTERM)
                return []

            patch.setattr("llm.training.callbacks.sampling.sample", signalling)
            assert train(*words).code == 75
            assert status(tmp_path / "cut")["step"] == 8
        else:
            patch.setattr("llm.training.finalize.export_model", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                train(*words)
    outcome = train(*words, "--resume_from_checkpoint")
    assert outcome.code == 0, outcome.err
    assert are_equal(tmp_path / "whole", tmp_path / "cut")
    assert records(tmp_path / "whole") == records(tmp_path / "cut")


def test_stop_when_nothing_was_trained_since_the_resume_then_nothing_is_written_again(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny_options, "--output_dir", tmp_path, "--checkpointing_steps", "10", "--max_train_steps"]
    assert train(*words, "10").code == 0
    manifest = tmp_path / "checkpoints" / "step_10" / "manifest.json"
    before, build = manifest.stat(), llm.training.build.build_optimizer

    def signalled(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return build(*given)

    monkeypatch.setattr(llm.training.build, "build_optimizer", signalled)
    halves = ("--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "4")
    outcome = train(*words, "20", *halves, "--resume_from_checkpoint")
    assert outcome.code == 75, outcome.err
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("stopped", 10)
    after = manifest.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_stop_when_the_weights_are_not_finite_then_does_not_say_that_they_were_saved(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = SynchronousUpdater.update

    def ruined(self: SynchronousUpdater, *given: Any, **more: Any) -> Any:
        report = update(self, *given, **more)
        if given[1] == 6:
            with torch.no_grad():
                self.parameters[0].fill_(float("inf"))
            os.kill(os.getpid(), signal.SIGTERM)
        return report

    monkeypatch.setattr(SynchronousUpdater, "update", ruined)
    outcome = train(*tiny_options, "--checkpointing_steps", "5", "--output_dir", tmp_path)
    assert outcome.code == 1
    assert re.search(r"^error: step \d is not saved: .* is not finite; the older checkpoints stay$", outcome.err, re.M)
    assert status(tmp_path)["state"] == "failed"
    assert steps(tmp_path) == ["step_5"]


def test_restart_when_torchrun_makes_it_then_continues_although_told_to_overwrite(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny_options, "--checkpointing_steps", "5", "--output_dir", tmp_path, "--overwrite_output_dir"]
    assert train(*words, "--max_train_steps", "10").code == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    outcome = train(*words)
    assert outcome.code == 0, outcome.err
    assert "resumed from step 10" in outcome.out
    assert {"step_5", "step_10", "step_15", "step_20"} <= set(steps(tmp_path))


def test_restart_when_the_checkpoint_was_named_then_counts_until_there_is_a_newer_one(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny_options, "--checkpointing_steps", "5", "--output_dir"]
    assert train(*words, tmp_path / "first", "--max_train_steps", "5").code == 0
    named = ("--resume_from_checkpoint", tmp_path / "first" / "checkpoints" / "step_5")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    outcome = train(*words, tmp_path / "second", "--max_train_steps", "10", *named)
    assert "resumed from step 5" in outcome.out
    assert "resumed from step 10" in train(*words, tmp_path / "second", *named).out


def test_health_when_updates_in_a_row_are_not_finite_then_the_run_stops_and_its_checkpoints_stay(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = LanguageModel.forward, []

    def poisoned(self: LanguageModel, *given: Any) -> Any:
        loss, count = forward(self, *given)
        calls.append(self.training)
        # One alone is skipped; from the eighth on there is no end to it.
        is_bad = self.training and (sum(calls) == 3 or sum(calls) >= 8)
        return (loss * float("nan") if is_bad else loss), count

    monkeypatch.setattr(LanguageModel, "forward", poisoned)
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


PLANTED = {"HF_TOKEN": "hf_PLANTEDinTHEenvironment", "WANDB_API_KEY": "f00dPLANTEDwandbKEY"}
GIVEN = "hf_PLANTEDonTHEcommandLINE"


def places_of_secrets(folder: Path, *texts: str) -> list[str]:
    """Where a planted secret stands, of all the files of a run and what it printed."""
    files = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(files) > 5
    places = files | {f"output {number}": text.encode() for number, text in enumerate(texts)}
    return [name for name, data in places.items() if any(s.encode() in data for s in (*PLANTED.values(), GIVEN))]


def test_secrets_when_planted_then_are_nowhere_in_the_folder_or_the_output(
    train: Train, tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, secret in PLANTED.items():
        monkeypatch.setenv(name, secret)
    words = [*tiny_options, "--hub_token", GIVEN, "--checkpointing_steps", "10", "--sample_steps", "10"]
    words += ["--with_tracking", "--report_to", "tensorboard", "--output_dir", tmp_path]
    outcome = train(*words)
    assert outcome.code == 0, outcome.err
    assert places_of_secrets(tmp_path, outcome.out, outcome.err) == []


@pytest.mark.slow
def test_secrets_when_the_run_crashes_then_are_not_in_its_last_words_either(
    tiny_options: list[str], tmp_path: Path, started: Any
) -> None:
    program = started(
        *tiny_options, "--hub_token", GIVEN, "--checkpointing_steps", "10", "--output_dir", tmp_path,
        first="import llm.training.finalize; llm.training.finalize.model_card = lambda _: 1 / 0", **PLANTED,
    )  # fmt: skip
    program.wait_for_line("ZeroDivisionError")
    program.process.wait(60)
    assert status(tmp_path)["state"] == "failed"
    assert places_of_secrets(tmp_path, program.out) == []
