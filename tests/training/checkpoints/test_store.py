"""A checkpoint is finished and right to the byte, or it is not taken."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm.config.errors import UserError
from llm.training.checkpoints.store import (
    NotFiniteError,
    abandon_newer,
    find_checkpoint,
    open_checkpoint,
    save_checkpoint,
    saved_steps,
    superseded,
)


@pytest.fixture
def save(tmp_path: Path, tiny_gpt2, byte_tokenizer):  # type: ignore[no-untyped-def]
    """`save(step, eval_loss)` writes a checkpoint into tmp_path/checkpoints and gives its path."""

    def write(step: int, eval_loss: float | None = None, *reasons: str, **wrong: torch.Tensor) -> Path:
        state: dict[str, Any] = {
            "progress": {"step": step, "eval_loss": eval_loss, "eval_step": step},
            "plan": {"seed": 7},
            "updater": {},
            "reasons": reasons or ["regular"],
        }
        tensors = {"wte.weight/exp_avg": torch.full((3, 2), float(step)), "wte.weight/step": torch.tensor(float(step))}
        folder = tmp_path / "checkpoints"
        weights = tiny_gpt2.state_dict() | wrong
        return save_checkpoint(
            folder, step, model=tiny_gpt2, tokenizer=byte_tokenizer, weights=weights, tensors=tensors, state=state
        )

    return write


def damage_it(path: Path, name: str = "optimizer.safetensors") -> None:
    """Flips the last bit of one of a checkpoint's files."""
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)


def test_checkpoint_when_saved_then_gives_back_everything(save, tmp_path: Path, tiny_gpt2) -> None:  # type: ignore[no-untyped-def]
    path = save(12, 1.5)
    assert path == tmp_path / "checkpoints" / "step_12"
    found = open_checkpoint(path)
    assert (found.step, found.path) == (12, path)
    assert found.state["progress"] == {"step": 12, "eval_loss": 1.5, "eval_step": 12}
    assert found.state["plan"] == {"seed": 7}
    reader = found.updater_state()
    tensors = {name: reader.read(name) for name in reader.shapes}
    assert torch.equal(tensors["wte.weight/exp_avg"], torch.full((3, 2), 12.0))
    assert tensors["wte.weight/step"].shape == ()
    model = AutoModelForCausalLM.from_pretrained(path)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), tiny_gpt2.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(path)("the")["input_ids"] != []


def test_checkpoint_when_saved_then_holds_no_pickle_and_nothing_is_left_beside_it(save) -> None:  # type: ignore[no-untyped-def]
    path = save(1)
    assert os.listdir(path.parent) == ["step_1"]
    assert {file.suffix for file in path.iterdir()} <= {".json", ".safetensors", ".txt", ".jinja"}
    manifest = path / "manifest.json"
    assert all(file.stat().st_mtime_ns <= manifest.stat().st_mtime_ns for file in path.iterdir())


def test_checkpoint_when_saved_twice_then_the_newer_one_stands(save) -> None:  # type: ignore[no-untyped-def]
    save(3, 2.0)
    path = save(3, 1.0)
    assert open_checkpoint(path).state["progress"]["eval_loss"] == 1.0
    assert os.listdir(path.parent) == ["step_3"]


def test_save_when_it_fails_then_there_is_no_checkpoint(
    save,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import llm.training.checkpoints.store

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(llm.training.checkpoints.store, "write_manifest", full)
    with pytest.raises(UserError, match=r"No space left.*make room"):
        save(1)
    assert os.listdir(tmp_path / "checkpoints") == []


def test_steps_when_listed_then_are_in_the_order_of_numbers_without_temporary_ones(tmp_path: Path) -> None:
    for name in ("step_10", "step_9", "step_100", ".step_11.42.tmp", "step_", "step_9b", "best"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_12").touch()
    assert [step for step, _ in saved_steps(tmp_path)] == [9, 10, 100]
    assert saved_steps(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("limit", "gone"), [(None, [3, 5, 9]), (1, [1, 2, 3, 5, 9]), (2, [1, 3, 5, 9]), (5, [3, 5, 9])]
)
def test_superseded_when_saved_for_many_reasons_then_each_kind_has_its_own_limit(
    save,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    limit: int | None,
    gone: list[int],
) -> None:
    for step, reasons, loss in (
        (1, ["regular"], None),
        (2, ["regular", "timed"], None),
        (3, ["timed"], None),
        (4, ["best"], 1.0),
        (5, ["timed"], 1.5),
        (6, ["asked"], None),
        (7, ["regular"], None),
        (8, ["timed"], float("nan")),
        (9, ["best"], 1.25),
        (10, ["best"], 1.75),
    ):
        save(step, loss, *reasons)
    assert [path.name for path in superseded(tmp_path / "checkpoints", limit)] == [f"step_{step}" for step in gone]


def test_superseded_when_only_others_than_regular_ones_are_there_then_two_stay_and_the_best(
    save,  # type: ignore[no-untyped-def]
    tmp_path: Path,
) -> None:
    for step in range(1, 6):
        save(step, 1.0 if step == 2 else None, "timed")
    assert [path.name for path in superseded(tmp_path / "checkpoints", 1)] == ["step_1", "step_3"]


def test_save_when_a_weight_is_not_finite_then_nothing_is_written(save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for value in (float("nan"), float("inf"), -float("inf")):
        wrong = torch.ones(32)
        wrong[7] = value
        with pytest.raises(NotFiniteError, match=r"step 3 is not saved: transformer\.ln_f\.bias is not finite"):
            save(3, None, **{"transformer.ln_f.bias": wrong})
    assert not (tmp_path / "checkpoints").exists()


def test_find_when_bare_or_latest_then_is_the_newest(save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for step in (9, 10):
        save(step)
    for asked in (True, "latest"):
        found = find_checkpoint(asked, tmp_path / "checkpoints")
        assert found is not None
        assert found.step == 10
    assert find_checkpoint(False, tmp_path / "checkpoints") is None


def test_find_when_best_then_is_the_one_of_the_lowest_loss(save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for step, loss in ((1, None), (2, 1.25), (3, 1.5), (4, None)):
        save(step, loss)
    found = find_checkpoint("best", tmp_path / "checkpoints")
    assert found is not None
    assert found.step == 2


def test_find_when_best_and_a_loss_is_not_a_number_then_that_one_is_not_it(save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for step, loss in ((1, 1.25), (2, float("nan")), (3, 1.5), (4, float("nan"))):
        save(step, loss)
    found = find_checkpoint("best", tmp_path / "checkpoints")
    assert found is not None
    assert found.step == 1


def test_find_when_the_newest_is_damaged_then_says_so_and_takes_the_older(
    save,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("llm"), "propagate", True)
    for step in (1, 2, 3, 4):
        save(step, 1.0 / step)
    damage_it(tmp_path / "checkpoints" / "step_4")
    (tmp_path / "checkpoints" / "step_3" / "manifest.json").unlink()
    (tmp_path / "checkpoints" / "step_2" / "training_state.json").unlink()
    for asked in (True, "latest", "best"):
        caplog.clear()
        found = find_checkpoint(asked, tmp_path / "checkpoints")
        assert found is not None
        assert found.step == 1
        warned = [record.getMessage() for record in caplog.records]
        assert len(warned) == 3
        assert "step_4 is damaged: optimizer.safetensors has other content" in warned[0]
        assert "step_3 is damaged: manifest.json is missing" in warned[1]
        assert "step_2" in warned[2]


def test_find_when_all_are_damaged_then_even_a_bare_flag_is_refused(save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    # A fresh run would remove them.
    for step in (1, 2):
        damage_it(save(step))
    with pytest.raises(UserError, match=r"none of the checkpoints in .* is good.*--overwrite_output_dir") as error:
        find_checkpoint(True, tmp_path / "checkpoints")
    assert "\n" not in str(error.value)


def test_aside_when_set_then_those_beyond_are_moved_and_what_no_run_removes_is_named(
    save,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("llm"), "propagate", True)
    caplog.set_level(logging.INFO, "llm")
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3, 4):
        save(step)
    abandon_newer(folder, 4)
    assert caplog.text == ""
    (folder / "step_1" / "training_state.json").write_text("{")
    (folder / "epoch_0").mkdir()
    (folder / ".step_9.gone").mkdir()
    abandon_newer(folder, 3)
    assert (folder / "abandoned" / "step_4").is_dir()
    moved, alone = [record.getMessage() for record in caplog.records]
    assert "step_4 is later than step 3" in moved
    assert alone == f"in {folder}, damaged or not this run's, and removed by no run: epoch_0, step_1"
    assert "removed" not in moved
    save(4)
    caplog.clear()
    abandon_newer(folder, 3)
    assert "replacing an earlier one" in caplog.records[0].getMessage()


def test_find_when_there_is_none_then_only_a_bare_flag_is_content(tmp_path: Path) -> None:
    assert find_checkpoint(True, tmp_path / "checkpoints") is None
    assert find_checkpoint(True, None) is None
    for asked in ("latest", "best"):
        with pytest.raises(UserError, match=f"{asked}: there is no such checkpoint in {tmp_path}"):
            find_checkpoint(asked, tmp_path)
        with pytest.raises(UserError, match=f"{asked} needs --output_dir"):
            find_checkpoint(asked, None)


def test_find_when_a_path_is_named_then_only_that_one_will_do(save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    first, second = save(1), save(2)
    found = find_checkpoint(str(first), None)
    assert found is not None
    assert found.step == 1
    damage_it(second, "model.safetensors")
    with pytest.raises(UserError, match=r"step_2 is damaged: model\.safetensors has other content"):
        find_checkpoint(str(second), tmp_path / "checkpoints")
    with pytest.raises(UserError, match="is not a checkpoint"):
        find_checkpoint(str(tmp_path), None)


def test_open_when_another_version_wrote_it_then_is_refused(
    save,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import llm.training.checkpoints.store

    monkeypatch.setattr(llm.training.checkpoints.store, "VERSION", 99)
    path = save(1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="has version 99; this program reads 1"):
        open_checkpoint(path)
