"""The exported folder: it loads with the same weights and loss, or it is kept aside as unverified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from llm.config.errors import UserError
from llm.data.batches.loader import Batch
from llm.models.language_model import LanguageModel
from llm.training.export import export_model, probe_loss


@pytest.fixture
def probe() -> Batch:
    """Two rows of 32 tokens."""
    ids = torch.randint(257, (2, 33), generator=torch.Generator().manual_seed(3))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


@pytest.fixture
def export(tiny_gpt2: GPT2LMHeadModel, byte_tokenizer: Any, probe: Batch, tmp_path: Path) -> Any:
    """`export(**changes)` exports the tiny model into tmp_path/run; the loss is the true one plus `loss_error`."""

    def run(*, loss_error: float = 0.0, is_exact: bool = True) -> Path:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        weights = {name: t.clone() for name, t in tiny_gpt2.state_dict().items() if name != "lm_head.weight"}
        export_model(
            folder,
            tiny_gpt2,
            byte_tokenizer,
            weights=weights,
            unverified=folder / "unverified",
            probe=probe,
            loss=probe_loss(LanguageModel(tiny_gpt2), probe) + loss_error,
            is_exact=is_exact,
        )
        return folder

    return run


def test_probe_loss_when_computed_then_is_the_mean_over_the_first_row_and_the_mode_is_kept(
    tiny_gpt2: GPT2LMHeadModel, probe: Batch
) -> None:
    model = LanguageModel(tiny_gpt2).train()
    loss = probe_loss(model, probe)
    assert model.training
    with torch.no_grad():
        logits = tiny_gpt2(probe.ids[:1]).logits
    assert loss == pytest.approx(float(F.cross_entropy(logits[0], probe.targets[0])), rel=1e-6)


def test_export_when_the_model_is_good_then_the_folder_loads_and_older_files_are_replaced(
    export: Any, tiny_gpt2: GPT2LMHeadModel, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "log.txt").write_text("a line\n")
    folder = export()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in tiny_gpt2.state_dict().items())
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<|endoftext|>"
    assert (folder / "log.txt").read_text() == "a line\n"
    assert not any(path.name.startswith(".export") or path.name == "unverified" for path in folder.iterdir())


@pytest.mark.parametrize(
    ("loss_error", "is_exact", "is_accepted"),
    [(0.01, True, False), (0.01, False, True), (0.5, False, False), (float("nan"), False, False)],
)
def test_export_when_the_loss_of_the_reloaded_model_differs_then_only_rounding_is_accepted(
    loss_error: float, is_exact: bool, is_accepted: bool, export: Any, tmp_path: Path
) -> None:
    if is_accepted:
        assert (export(loss_error=loss_error, is_exact=is_exact) / "model.safetensors").exists()
        return
    (tmp_path / "run" / "unverified").mkdir(parents=True)
    (tmp_path / "run" / "unverified" / "old").touch()
    with pytest.raises(UserError, match=r"its loss is .*unverified"):
        export(loss_error=loss_error, is_exact=is_exact)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"unverified"}
    assert not (tmp_path / "run" / "unverified" / "old").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "unverified")


def test_export_when_a_weight_changes_on_the_way_then_is_named_and_the_files_are_kept_as_unverified(
    export: Any, tiny_gpt2: GPT2LMHeadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = GPT2LMHeadModel.save_pretrained

    def save_changed(self: GPT2LMHeadModel, folder: Path, *, state_dict: dict[str, torch.Tensor]) -> None:
        bias = state_dict["transformer.ln_f.bias"]
        save(self, folder, state_dict=state_dict | {"transformer.ln_f.bias": bias + 2**-20})

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", save_changed)
    with pytest.raises(UserError, match=r"ln_f\.bias came back changed"):
        export()
    assert (tmp_path / "run" / "unverified" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_export_when_a_weight_is_not_in_the_files_then_is_named(
    export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = GPT2LMHeadModel.save_pretrained

    def save_less(self: GPT2LMHeadModel, folder: Path, *, state_dict: dict[str, torch.Tensor]) -> None:
        save(self, folder, state_dict={name: t for name, t in state_dict.items() if name != "transformer.ln_f.bias"})

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", save_less)
    with pytest.raises(UserError, match=r"missing_keys transformer\.ln_f\.bias"):
        export()


def test_export_when_the_disk_is_full_then_nothing_is_left(
    export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: GPT2LMHeadModel, folder: Path, **_: Any) -> None:
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", fail)
    with pytest.raises(UserError, match=r"No space left.*make room"):
        export()
    assert list((tmp_path / "run").iterdir()) == []
