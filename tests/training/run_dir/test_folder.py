"""A run's run_dir: its lock, the files that are removed from it, and its status."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from llm.config.errors import UsageError, UserError
from llm.config.options import HubOptions, Options, OutputOptions
from llm.distributed.world import World
from llm.files.lock import LockLostError
from llm.training.run_dir.console import teardown_logging
from llm.training.run_dir.folder import RunDirectory, claim_run_dir

MAIN = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def status(run_dir: RunDirectory) -> dict[str, object]:
    facts: dict[str, object] = json.loads(run_dir.status.read_text())
    return facts


def output(**options: object) -> OutputOptions:
    return OutputOptions.model_validate(options)


def test_check_when_the_folder_is_new_then_creates_it_empty(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path / "runs" / "mine")
    run_dir.check(output())
    assert os.listdir(run_dir.path) == []
    assert str(run_dir) == f"output: {tmp_path / 'runs' / 'mine'}"


@pytest.mark.parametrize("sign", ["metrics.jsonl", "checkpoints", "model.safetensors", "model.safetensors.index.json"])
def test_check_when_another_run_got_as_far_as_training_then_is_refused(tmp_path: Path, sign: str) -> None:
    (tmp_path / sign).touch()
    (tmp_path / "status.json").touch()
    run_dir = RunDirectory(tmp_path)
    with pytest.raises(UserError, match=r"holds another run.*--resume_from_checkpoint.*--overwrite_output_dir"):
        run_dir.check(output())
    run_dir.check(output(overwrite_output_dir=True))
    run_dir.check(output(resume_from_checkpoint="latest"))
    assert sorted(os.listdir(tmp_path)) == sorted([sign, "status.json"])


def test_check_when_there_are_only_a_users_files_or_a_failed_start_then_is_accepted(tmp_path: Path) -> None:
    for name in ("notes.txt", "config.toml", "status.json", "log.txt"):
        (tmp_path / name).touch()
    RunDirectory(tmp_path).check(output())


def test_check_when_a_file_has_the_name_of_the_folder_then_the_error_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"cannot be written.*choose another folder") as refusal:
            RunDirectory(path).check(output())
        assert "\n" not in str(refusal.value)


def test_remove_run_files_when_called_then_removes_those_of_a_run_and_no_others(tmp_path: Path) -> None:
    for name in ("checkpoints/step_1/model.safetensors", "tensorboard/events", "data/README.md"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    written = """model.safetensors model-00001-of-00002.safetensors config.json generation_config.json tokenizer.json
    README.md curves.png all_results.json config.toml status.json metrics.jsonl log.txt""".split()
    users = ("notes.txt", "model.py", "data.jsonl", "my_model.safetensors", "README.txt")
    for name in (*written, *users):
        (tmp_path / name).touch()
    RunDirectory(tmp_path).remove_run_files()
    assert set(os.listdir(tmp_path)) == {*users, "data", "log.txt", "status.json"}
    assert (tmp_path / "data" / "README.md").exists()


def test_remove_run_files_when_checkpoints_is_a_link_then_its_target_is_kept(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "step_1").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch")
    RunDirectory(tmp_path / "run").remove_run_files()
    assert os.listdir(tmp_path / "run") == []
    assert (tmp_path / "scratch" / "step_1").exists()


def test_claim_when_it_holds_then_the_folder_is_locked_and_described(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path / "run")
    options = Options(
        output=OutputOptions(output_dir=str(run_dir.path), logging_steps=3), hub=HubOptions(hub_token="hf_secret")
    )
    with claim_run_dir(run_dir, options, MAIN):
        run_dir.begin(options, fresh=True)
        assert status(run_dir)["state"] == "running"
        assert status(run_dir)["pid"] == os.getpid()
        assert "logging_steps = 3" in run_dir.config.read_text()
        assert "hf_secret" not in run_dir.config.read_text()
        with pytest.raises(UserError, match="used by another run"), claim_run_dir(run_dir, options, MAIN):
            pytest.fail("two holders")
        assert status(run_dir)["state"] == "running"  # the refused one wrote nothing
        run_dir.write_status("done", step=7, exit_code=0)
    teardown_logging()
    assert not run_dir.lock.exists()
    assert (status(run_dir)["state"], status(run_dir)["step"]) == ("done", 7)


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("no text"), 1), (UsageError("no such"), 2), (ZeroDivisionError("bug"), 1)]
)
def test_claim_when_the_run_fails_then_status_says_why(tmp_path: Path, error: Exception, code: int) -> None:
    run_dir = RunDirectory(tmp_path / "run")
    with pytest.raises(type(error)), claim_run_dir(run_dir, Options(), MAIN):
        raise error
    teardown_logging()
    assert not run_dir.lock.exists()
    facts = status(run_dir)
    assert (facts["state"], facts["exit_code"]) == ("failed", code)
    assert facts["reason"] == f"{type(error).__name__}: {error}"


def test_begin_when_fresh_then_removes_the_earlier_run_and_keeps_it_when_resuming(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path)
    for fresh in (False, True):
        run_dir.metrics.touch()
        options = Options(output=output(overwrite_output_dir=True))
        with claim_run_dir(run_dir, options, MAIN):
            assert run_dir.metrics.exists()  # an error before `begin` must not destroy the earlier run
            run_dir.begin(options, fresh=fresh)
            assert run_dir.metrics.exists() is not fresh
        teardown_logging()


def test_claim_when_a_finished_run_has_no_checkpoint_then_a_bare_resume_is_refused(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path)
    run_dir.write_status("done")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    options = Options(output=output(resume_from_checkpoint=True))
    with pytest.raises(UserError, match="without a checkpoint"), claim_run_dir(run_dir, options, MAIN):
        pytest.fail("the finished run would be overwritten")
    assert status(run_dir)["state"] == "done"
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


def test_claim_when_a_start_was_killed_before_it_trained_then_is_taken_over(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path)
    run_dir.log.write_text("output: here\n")
    run_dir.lock.write_text("{}")
    with claim_run_dir(run_dir, Options(output=output(resume_from_checkpoint=True)), MAIN):
        assert run_dir.lock.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_claim_when_files_are_not_those_of_a_run_then_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "README.md").write_text("mine")
    options = Options(output=output(overwrite_output_dir=overwrite))
    with (
        pytest.raises(UserError, match="README\\.md, which no run wrote"),
        claim_run_dir(RunDirectory(tmp_path), options, MAIN),
    ):
        pytest.fail("the file would be replaced")


def test_claim_when_this_is_another_rank_then_writes_nothing(tmp_path: Path) -> None:
    class OtherRank(World):
        def run_on_main(self, work):  # type: ignore[no-untyped-def]
            return None  # rank 0 succeeded

    run_dir = RunDirectory(tmp_path / "run")
    other = OtherRank(rank=1, size=2, local_rank=1, device=torch.device("cpu"))
    with pytest.raises(UserError), claim_run_dir(run_dir, Options(), other):
        raise UserError("no text")
    assert not run_dir.path.exists()


def test_claim_when_another_run_took_the_folder_over_then_its_files_are_not_changed(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path / "run")
    options = Options()
    with claim_run_dir(run_dir, options, MAIN):
        run_dir.begin(options, fresh=True)
        run_dir.require_lock()
        run_dir.lock.write_text('{"host": "another-host", "pid": 7}')
        run_dir.status.write_text("of the other")
        run_dir.require_lock(reread=False)  # the heartbeat has not read the lock yet
        with pytest.raises(LockLostError, match="held by another run now"):
            run_dir.require_lock()
        with pytest.raises(LockLostError):
            run_dir.require_lock(reread=False)
        run_dir.write_status("stopped")
    teardown_logging()
    assert run_dir.status.read_text() == "of the other"
    assert json.loads(run_dir.lock.read_text())["pid"] == 7
    assert run_dir.claim is None


def test_status_when_there_is_no_room_for_a_second_file_then_the_first_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run_dir = RunDirectory(tmp_path)
    run_dir.write_status("failed", reason="a long story " * 20)
    monkeypatch.setattr("llm.training.run_dir.folder.write_text", full)
    run_dir.write_status("stopped", step=3)
    assert (status(run_dir)["state"], status(run_dir)["step"]) == ("stopped", 3)
    run_dir.status.unlink()
    with pytest.raises(OSError, match="No space left"):
        run_dir.write_status("running")
    run_dir.write_final_status("failed", reason="the disk is full", exit_code=1)  # only logs the failure
    assert not run_dir.status.exists()


def test_forced_exit_when_this_start_has_not_begun_then_the_earlier_status_is_kept(tmp_path: Path) -> None:
    run_dir = RunDirectory(tmp_path)
    run_dir.write_forced_exit("a second signal", 143)
    assert not run_dir.status.exists()
    for earlier in ({"state": "stopped", "pid": os.getpid()}, {"state": "running", "pid": os.getppid()}, {}):
        run_dir.status.write_text(json.dumps(earlier))
        run_dir.write_forced_exit("a second signal", 143)
        assert status(run_dir) == earlier
    run_dir.write_status("running")
    run_dir.write_forced_exit("a second signal", 143)
    facts = status(run_dir)
    assert (facts["state"], facts["reason"], facts["exit_code"]) == ("failed", "a second signal", 143)
