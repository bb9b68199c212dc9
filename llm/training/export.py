"""The trained model as a folder that `from_pretrained` loads, proved by loading it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llm.config.errors import UserError, first_line
from llm.data.batches.loader import Batch
from llm.files.atomic import sync_tree
from llm.models.language_model import LanguageModel

# Of a batch that both models read on the CPU in fp32; weights are compared bit by bit.
_LOSS_TOLERANCE = 1e-4
_PROBE_TOKENS = 128


def export_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    probe: Batch,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Writes the model and tokenizer into `folder`, after a strict reload gave the same weights and loss.

    The model is moved to the CPU, where a second copy of it has room.

    Args:
        folder: the run's folder.
        model: the trained model.
        tokenizer: its tokenizer.
        probe: a batch whose first tokens the loss is compared on.
        trust_remote_code: whether the model's own code may be run to load it.

    Raises:
        UserError: the written files do not give back the model; they are kept in `folder/unverified`.
    """
    temporary = folder / f".export.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"the finished model cannot be written into {folder} ({error}); make room") from error
        torch.nn.Module.to(model, "cpu")
        _verify(temporary, model, probe, trust_remote_code)
        sync_tree(temporary)
    except UserError:
        raise
    except Exception as error:  # whatever it is, hours of training are in those files
        kept = folder / "unverified"
        shutil.rmtree(kept, ignore_errors=True)
        temporary.rename(kept)
        raise UserError(f"the finished model was not verified ({first_line(error)}); it is kept in {kept}") from error
    for path in temporary.iterdir():
        os.replace(path, folder / path.name)
    temporary.rmdir()


def _verify(folder: Path, model: PreTrainedModel, probe: Batch, trust_remote_code: bool) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
    )
    reloaded, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report[kind]):
            raise ValueError(f"{kind} {', '.join(names[:3])}")
    found = reloaded.state_dict()
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, found[name]):
            raise ValueError(f"{name} came back changed")
    # On the CPU no special attention is there; the default computes the same function.
    model.set_attn_implementation(reloaded.config._attn_implementation)
    expected, back = _loss(model, probe), _loss(reloaded, probe)
    if not abs(back - expected) <= _LOSS_TOLERANCE * max(1.0, abs(expected)):
        raise ValueError(f"its loss is {back:.6f} on a batch where the trained one has {expected:.6f}")


def _loss(model: PreTrainedModel, probe: Batch) -> float:
    """Mean nats a token of the batch's first tokens, in fp32, without dropout."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        loss_sum, num_tokens = LanguageModel(model)(probe.ids[:1, :_PROBE_TOKENS], probe.targets[:1, :_PROBE_TOKENS])
    model.train(was_training)
    return float(loss_sum) / max(int(num_tokens), 1)
