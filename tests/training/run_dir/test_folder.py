"""A run's folder: whose it is, what is removed from it, and what its status says."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from llm.config.errors import UsageError, UserError
from llm.config.options import HubOptions, Options, OutputOptions
from llm.distributed.world import World
from llm.files.lock import LockLostError
from llm.training.run_dir.console import add_log_file, setup_logging, teardown_logging
from llm.training.run_dir.folder import RunDirectory, claim_run_dir

MAIN = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def status(folder: RunDirectory) -> dict[str, object]:
    facts: dict[str, object] = json.loads(folder.status.read_text())
    return facts


def output(**options: object) -> OutputOptions:
    return OutputOptions.model_validate(options)


def test_check_when_the_folder_is_new_then_makes_it_and_leaves_it_empty(tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path / "runs" / "mine")
    folder.check(output())
    assert os.listdir(folder.path) == []
    assert str(folder) == f"output: {tmp_path / 'runs' / 'mine'}"


@pytest.mark.parametrize("sign", ["metrics.jsonl", "checkpoints", "model.safetensors", "model.safetensors.index.json"])
def test_check_when_another_run_got_as_far_as_training_then_is_refused(tmp_path: Path, sign: str) -> None:
    (tmp_path / sign).touch()
    (tmp_path / "status.json").touch()
    folder = RunDirectory(tmp_path)
    with pytest.raises(UserError, match=r"holds another run.*--resume_from_checkpoint.*--overwrite_output_dir"):
        folder.check(output())
    folder.check(output(overwrite_output_dir=True))
    folder.check(output(resume_from_checkpoint="latest"))
    assert sorted(os.listdir(tmp_path)) == sorted([sign, "status.json"])


def test_check_when_there_are_only_a_users_files_or_a_failed_start_then_is_free(tmp_path: Path) -> None:
    for name in ("notes.txt", "config.toml", "status.json", "log.txt"):
        (tmp_path / name).touch()
    RunDirectory(tmp_path).check(output())


def test_check_when_a_file_is_in_the_way_then_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"cannot be written.*choose another folder") as refusal:
            RunDirectory(path).check(output())
        assert "\n" not in str(refusal.value)


def test_empty_when_asked_then_removes_a_runs_files_and_no_others(tmp_path: Path) -> None:
    for name in ("checkpoints/step_1/model.safetensors", "tensorboard/events", "data/README.md"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    written = """model.safetensors model-00001-of-00002.safetensors config.json generation_config.json tokenizer.json
    README.md curves.png all_results.json config.toml status.json metrics.jsonl log.txt""".split()
    mine = ("notes.txt", "model.py", "data.jsonl", "my_model.safetensors", "README.txt")
    for name in (*written, *mine):
        (tmp_path / name).touch()
    RunDirectory(tmp_path).remove_run_files()
    assert set(os.listdir(tmp_path)) == {*mine, "data", "log.txt", "status.json"}
    assert (tmp_path / "data" / "README.md").exists()


def test_empty_when_checkpoints_is_a_link_then_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "step_1").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch")
    RunDirectory(tmp_path / "run").remove_run_files()
    assert os.listdir(tmp_path / "run") == []
    assert (tmp_path / "scratch" / "step_1").exists()


def test_claim_when_it_holds_then_the_folder_is_locked_and_described(tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path / "run")
    options = Options(
        output=OutputOptions(output_dir=str(folder.path), logging_steps=3), hub=HubOptions(hub_token="hf_secret")
    )
    with claim_run_dir(folder, options, MAIN):
        folder.begin(options, fresh=True)
        assert status(folder)["state"] == "running"
        assert status(folder)["pid"] == os.getpid()
        assert "logging_steps = 3" in folder.config.read_text()
        assert "hf_secret" not in folder.config.read_text()
        with pytest.raises(UserError, match="used by another run"), claim_run_dir(folder, options, MAIN):
            pytest.fail("two holders")
        assert status(folder)["state"] == "running"  # the refused one wrote nothing
        folder.write_status("done", step=7, exit_code=0)
    teardown_logging()
    assert not folder.lock.exists()
    assert (status(folder)["state"], status(folder)["step"]) == ("done", 7)


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("no text"), 1), (UsageError("no such"), 2), (ZeroDivisionError("bug"), 1)]
)
def test_claim_when_the_run_fails_then_status_says_why(tmp_path: Path, error: Exception, code: int) -> None:
    folder = RunDirectory(tmp_path / "run")
    with pytest.raises(type(error)), claim_run_dir(folder, Options(), MAIN):
        raise error
    teardown_logging()
    assert not folder.lock.exists()
    facts = status(folder)
    assert (facts["state"], facts["exit_code"]) == ("failed", code)
    assert facts["reason"] == f"{type(error).__name__}: {error}"


def test_begin_when_fresh_then_clears_the_place_but_not_when_continuing(tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path)
    for fresh in (False, True):
        folder.metrics.touch()
        options = Options(output=output(overwrite_output_dir=True))
        with claim_run_dir(folder, options, MAIN):
            assert folder.metrics.exists()  # a mistake that is still to come must not cost the earlier run
            folder.begin(options, fresh=fresh)
            assert folder.metrics.exists() is not fresh
        teardown_logging()


def test_claim_when_a_finished_run_has_no_checkpoint_then_a_bare_resume_is_refused(tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path)
    folder.write_status("done")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    options = Options(output=output(resume_from_checkpoint=True))
    with pytest.raises(UserError, match="without a checkpoint"), claim_run_dir(folder, options, MAIN):
        pytest.fail("it would be trained over")
    assert status(folder)["state"] == "done"
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


def test_claim_when_a_start_was_killed_before_it_trained_then_is_taken_over(tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path)
    folder.log.write_text("output: here\n")
    folder.lock.write_text("{}")
    with claim_run_dir(folder, Options(output=output(resume_from_checkpoint=True)), MAIN):
        assert folder.lock.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_claim_when_files_are_no_runs_then_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "README.md").write_text("mine")
    options = Options(output=output(overwrite_output_dir=overwrite))
    with (
        pytest.raises(UserError, match="README\\.md, which no run wrote"),
        claim_run_dir(RunDirectory(tmp_path), options, MAIN),
    ):
        pytest.fail("it would be replaced")


def test_claim_when_this_is_another_rank_then_writes_nothing(tmp_path: Path) -> None:
    class OtherRank(World):
        def run_on_main(self, work):  # type: ignore[no-untyped-def]
            return None  # rank 0 succeeded

    folder = RunDirectory(tmp_path / "run")
    other = OtherRank(rank=1, size=2, local_rank=1, device=torch.device("cpu"))
    with pytest.raises(UserError), claim_run_dir(folder, Options(), other):
        raise UserError("no text")
    assert not folder.path.exists()


def test_claim_when_another_run_took_the_folder_over_then_its_files_are_left_alone(tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path / "run")
    options = Options()
    with claim_run_dir(folder, options, MAIN):
        folder.begin(options, fresh=True)
        folder.require_lock()
        folder.lock.write_text('{"host": "another-host", "pid": 7}')
        folder.status.write_text("of the other")
        folder.require_lock(reread=False)  # nothing has been seen of it yet
        with pytest.raises(LockLostError, match="held by another run now"):
            folder.require_lock()
        with pytest.raises(LockLostError):
            folder.require_lock(reread=False)
        folder.write_status("stopped")
    teardown_logging()
    assert folder.status.read_text() == "of the other"
    assert json.loads(folder.lock.read_text())["pid"] == 7
    assert folder.claim is None


def test_status_when_there_is_no_room_for_a_second_file_then_takes_the_place_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    folder = RunDirectory(tmp_path)
    folder.write_status("failed", reason="a long story " * 20)
    monkeypatch.setattr("llm.training.run_dir.folder.write_text", full)
    folder.write_status("stopped", step=3)
    assert (status(folder)["state"], status(folder)["step"]) == ("stopped", 3)
    folder.status.unlink()
    with pytest.raises(OSError, match="No space left"):
        folder.write_status("running")
    folder.write_final_status("failed")  # only says that it could not
    assert not folder.status.exists()


def test_sudden_end_when_this_start_has_not_begun_then_the_earlier_status_stays(tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path)
    folder.write_forced_exit("a second signal", 143)
    assert not folder.status.exists()
    for earlier in ({"state": "stopped", "pid": os.getpid()}, {"state": "running", "pid": os.getppid()}, {}):
        folder.status.write_text(json.dumps(earlier))
        folder.write_forced_exit("a second signal", 143)
        assert status(folder) == earlier
    folder.write_status("running")
    folder.write_forced_exit("a second signal", 143)
    facts = status(folder)
    assert (facts["state"], facts["reason"], facts["exit_code"]) == ("failed", "a second signal", 143)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_journal_when_its_disk_is_full_then_says_so_once_and_the_run_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = logging.getLogger("llm")
    setup_logging(is_main=True, rank=0)
    add_log_file(Path("/dev/full"))
    for number in range(3):
        log.info("line %d", number)
    teardown_logging()
    out, err = capsys.readouterr()
    assert out == "line 0\nline 1\nline 2\n"
    assert err.count("/dev/full") == err.count("\n") == 1 and "No space left on device" in err
