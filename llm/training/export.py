"""The trained model as a folder that `from_pretrained` loads, verified by loading it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llm.config.errors import UserError, first_line
from llm.data.batches.loader import Batch
from llm.files.atomic import sync_tree
from llm.models.language_model import LanguageModel
from llm.models.tied_weights import with_tied_names

# The reloaded model reads a batch on the CPU in fp32; weights are compared bit by bit.
_LOSS_TOLERANCE = 1e-4
# A loss that was computed in bf16, fp16 or TF32 differs by rounding.
_ROUNDED_LOSS_TOLERANCE = 2e-2
_PROBE_TOKENS = 128


def probe_loss(model: LanguageModel, probe: Batch) -> float:
    """Mean loss in nats a token of the first tokens of a batch, without dropout; all ranks call it together.

    Args:
        model: on any device, in train or eval mode, which is restored.
        probe: a batch on the CPU; `Batch` has shapes and dtypes.
    """
    was_training = model.training
    device = model.model.device
    model.eval()
    with torch.no_grad():
        ids = probe.ids[:1, :_PROBE_TOKENS].to(device)
        targets = probe.targets[:1, :_PROBE_TOKENS].to(device)
        loss_sum, num_tokens = model(ids, targets)
    model.train(was_training)
    return float(loss_sum) / max(int(num_tokens), 1)


def export_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    weights: Mapping[str, Tensor],
    unverified: Path,
    probe: Batch,
    loss: float,
    is_exact: bool,
    trust_remote_code: bool = False,
) -> None:
    """Write the model and tokenizer into `folder`, after a strict reload gave the same weights and loss.

    Args:
        folder: the run's folder.
        model: the trained model; its class and configuration are used, not its weights.
        tokenizer: its tokenizer.
        weights: whole weights of any shape and dtype on the CPU, each at least under its first name.
        unverified: folder in which the written files are kept if they do not give back the model.
        probe: a batch that the loss is compared on; `Batch` has shapes and dtypes.
        loss: `probe_loss` of the trained model.
        is_exact: whether that loss was computed in plain fp32; otherwise it may differ by rounding.
        trust_remote_code: whether the model's own code may be run to load it.

    Raises:
        UserError: the written files do not give back the model; they are kept in `unverified`.
    """
    temporary = folder / f".export.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    all_weights = with_tied_names(model, weights)
    try:
        try:
            model.save_pretrained(temporary, state_dict=all_weights)
            tokenizer.save_pretrained(temporary)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"the finished model cannot be written into {folder} ({error}); make room") from error
        reloaded = _reload(temporary, all_weights, trust_remote_code)
        reloaded_loss = probe_loss(LanguageModel(reloaded), probe)
        tolerance = _LOSS_TOLERANCE if is_exact else _ROUNDED_LOSS_TOLERANCE
        if not abs(reloaded_loss - loss) <= tolerance * max(1.0, abs(loss)):
            raise ValueError(f"its loss is {reloaded_loss:.6f} on a batch where the trained one has {loss:.6f}")
        sync_tree(temporary)
    except UserError:
        raise
    except Exception as error:  # of any kind: hours of training are in those files
        shutil.rmtree(unverified, ignore_errors=True)
        temporary.rename(unverified)
        raise UserError(
            f"the finished model was not verified ({first_line(error)}); it is kept in {unverified}"
        ) from error
    for path in temporary.iterdir():
        os.replace(path, folder / path.name)
    temporary.rmdir()


def _reload(folder: Path, weights: Mapping[str, Tensor], trust_remote_code: bool) -> PreTrainedModel:
    """Load the folder on the CPU in fp32, and check that its weights are those that were written, bit by bit."""
    result: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
    )
    model: PreTrainedModel = result[0]
    report = result[1]
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report[kind]):
            raise ValueError(f"{kind} {', '.join(names[:3])}")
    reloaded = model.state_dict()
    for name, tensor in weights.items():
        if not torch.equal(tensor, reloaded[name]):
            raise ValueError(f"{name} came back changed")
    return model
