"""Checkpoints on disk: complete and verified, or refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm.config.errors import UserError
from llm.training.checkpoints.store import (
    Checkpoint,
    NotFiniteError,
    abandon_newer,
    find_checkpoint,
    open_checkpoint,
    save_checkpoint,
    superseded,
)


@pytest.fixture
def save(tmp_path: Path, tiny_gpt2, byte_tokenizer):  # type: ignore[no-untyped-def]
    """`save(step, eval_loss)` writes a checkpoint into tmp_path/checkpoints and returns its path."""

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


def damage(path: Path, name: str = "optimizer.safetensors") -> None:
    """Flip the last bit of one of a checkpoint's files."""
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)


def test_checkpoint_when_saved_then_everything_can_be_read_again(save, tmp_path: Path, tiny_gpt2) -> None:  # type: ignore[no-untyped-def]
    path = save(12, 1.5)
    assert path == tmp_path / "checkpoints" / "step_12"
    checkpoint = open_checkpoint(path)
    assert (checkpoint.step, checkpoint.path) == (12, path)
    assert checkpoint.state["progress"] == {"step": 12, "eval_loss": 1.5, "eval_step": 12}
    assert checkpoint.state["plan"] == {"seed": 7}
    reader = checkpoint.updater_state()
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


def test_checkpoint_when_saved_twice_then_the_second_one_is_kept(save) -> None:  # type: ignore[no-untyped-def]
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


def test_save_when_tied_weights_come_under_their_first_name_then_the_folder_loads_with_both(
    save,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    tiny_gpt2,  # type: ignore[no-untyped-def]
    byte_tokenizer,  # type: ignore[no-untyped-def]
) -> None:
    weights = {name: tensor + 1 for name, tensor in tiny_gpt2.state_dict().items() if name != "lm_head.weight"}
    state = {"progress": {"step": 1, "eval_loss": None, "eval_step": None}, "updater": {}, "reasons": []}
    arguments = {"model": tiny_gpt2, "tokenizer": byte_tokenizer, "tensors": {}, "state": state}
    path = save_checkpoint(tmp_path, 1, weights=weights, **arguments)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(model.lm_head.weight, weights["transformer.wte.weight"])
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())


def test_reader_when_slices_are_read_then_returns_them_in_the_saved_dtype(tmp_path: Path) -> None:
    table = torch.arange(35, dtype=torch.bfloat16).reshape(5, 7)
    save_file({"table": table, "step": torch.tensor(3.0)}, tmp_path / "optimizer.safetensors")
    reader = Checkpoint(tmp_path, 3, {"updater": {"optimizer": "AdamW"}}).updater_state()
    assert reader.numbers == {"optimizer": "AdamW"}
    assert dict(reader.shapes) == {"table": (5, 7), "step": ()}
    assert torch.equal(reader.read("table"), table)
    part = reader.read("table", (3, 2), (2, 4))
    assert part.dtype == torch.bfloat16
    assert torch.equal(part, table[3:5, 2:6])
    assert reader.read("table", (5, 0), (0, 7)).shape == (0, 7)  # a rank without rows
    assert reader.read("step", (), ()).item() == 3.0


def test_reader_when_the_file_is_missing_or_damaged_then_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, 3, {"updater": {}})
    for content in (None, b"damaged"):
        if content is not None:
            (tmp_path / "optimizer.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"optimizer\.safetensors cannot be read"):
            checkpoint.updater_state()


@pytest.mark.parametrize(
    ("limit", "removed"), [(None, [3, 5, 9]), (1, [1, 2, 3, 5, 9]), (2, [1, 3, 5, 9]), (5, [3, 5, 9])]
)
def test_superseded_when_checkpoints_have_different_reasons_then_each_kind_has_its_own_limit(
    save,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    limit: int | None,
    removed: list[int],
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
    assert [path.name for path in superseded(tmp_path / "checkpoints", limit)] == [f"step_{step}" for step in removed]


def test_superseded_when_there_are_timed_checkpoints_only_then_the_newest_two_and_the_best_are_kept(
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
    for requested in (True, "latest"):
        checkpoint = find_checkpoint(requested, tmp_path / "checkpoints")
        assert checkpoint is not None
        assert checkpoint.step == 10
    assert find_checkpoint(False, tmp_path / "checkpoints") is None


def test_find_when_best_then_is_the_checkpoint_with_the_lowest_loss(save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for step, loss in ((1, None), (2, 1.25), (3, 1.5), (4, None)):
        save(step, loss)
    checkpoint = find_checkpoint("best", tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 2


def test_find_when_best_and_some_losses_are_nan_then_those_are_not_considered(save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for step, loss in ((1, 1.25), (2, float("nan")), (3, 1.5), (4, float("nan"))):
        save(step, loss)
    checkpoint = find_checkpoint("best", tmp_path / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.step == 1


def test_find_when_the_newest_are_damaged_then_warns_and_takes_an_older_one(
    save,  # type: ignore[no-untyped-def]
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("llm"), "propagate", True)
    for step in (1, 2, 3, 4):
        save(step, 1.0 / step)
    damage(tmp_path / "checkpoints" / "step_4")
    (tmp_path / "checkpoints" / "step_3" / "manifest.json").unlink()
    (tmp_path / "checkpoints" / "step_2" / "training_state.json").unlink()
    for requested in (True, "latest", "best"):
        caplog.clear()
        checkpoint = find_checkpoint(requested, tmp_path / "checkpoints")
        assert checkpoint is not None
        assert checkpoint.step == 1
        warned = [record.getMessage() for record in caplog.records]
        assert len(warned) == 3
        assert "step_4 is damaged: optimizer.safetensors has other content" in warned[0]
        assert "step_3 is damaged: manifest.json is missing" in warned[1]
        assert "step_2" in warned[2]


def test_find_when_all_are_damaged_then_even_a_bare_flag_is_refused(save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    # A fresh run would remove them.
    for step in (1, 2):
        damage(save(step))
    with pytest.raises(UserError, match=r"none of the checkpoints in .* is good.*--overwrite_output_dir") as error:
        find_checkpoint(True, tmp_path / "checkpoints")
    assert "\n" not in str(error.value)


def test_abandon_when_a_run_continues_from_an_older_step_then_later_checkpoints_are_moved_and_others_are_named(
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
    moved, unmanaged = [record.getMessage() for record in caplog.records]
    assert "step_4 is later than step 3" in moved
    assert unmanaged == f"in {folder}, damaged or not this run's, and removed by no run: epoch_0, step_1"
    assert "removed" not in moved
    save(4)
    caplog.clear()
    abandon_newer(folder, 3)
    assert "replacing an earlier one" in caplog.records[0].getMessage()


def test_find_when_there_is_no_checkpoint_then_only_a_bare_flag_is_accepted(tmp_path: Path) -> None:
    assert find_checkpoint(True, tmp_path / "checkpoints") is None
    assert find_checkpoint(True, None) is None
    for requested in ("latest", "best"):
        with pytest.raises(UserError, match=f"{requested}: there is no such checkpoint in {tmp_path}"):
            find_checkpoint(requested, tmp_path)
        with pytest.raises(UserError, match=f"{requested} needs --output_dir"):
            find_checkpoint(requested, None)


def test_find_when_a_path_is_named_then_no_other_checkpoint_is_taken(save, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    first, second = save(1), save(2)
    checkpoint = find_checkpoint(str(first), None)
    assert checkpoint is not None
    assert checkpoint.step == 1
    damage(second, "model.safetensors")
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
