"""Check, by running the model, that tokens attend to their own document only; no configuration states it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm.config.errors import UserError, first_line
from llm.models.attention import public_name
from llm.models.config import context_limit
from llm.models.language_model import forward_packed, uses_flash

# Tokens per row; fewer if the model's context is shorter.
_ROW_LENGTH = 16
# Largest allowed difference, relative to the largest logit. Rounding differs by 2e-6 (fp32) and 1e-2 (bf16); attention
# to other documents changes the logits by 2e-3 to 1.
_TOLERANCE_FP32 = 1e-4
_TOLERANCE_BF16 = 5e-2


@torch.no_grad()
def require_document_mask(model: PreTrainedModel, device: torch.device) -> None:
    """Compare the logits of a few short documents packed into rows with those of each document alone.

    No number is drawn from the random generators that training uses. A model with flash attention, which computes only
    on its device and in bfloat16, is moved to `device` first.

    Args:
        model: the model as it was built, in float32.
        device: device of the training.

    Raises:
        UserError: the logits differ, or the model takes no positions.
    """
    is_flash = uses_flash(model)
    if is_flash:
        torch.nn.Module.to(model, device)
    embeddings: Any = model.get_input_embeddings()
    vocab_size = int(embeddings.weight.shape[0])
    document_lengths = _document_lengths(min(_ROW_LENGTH, context_limit(model.config)))
    shape = (len(document_lengths), sum(document_lengths[0]))
    ids = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16) if is_flash else nullcontext():
            difference = _relative_difference(model, ids, document_lengths)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refusal(model, first_line(error)) from error
    finally:
        model.train(was_training)
    if not difference <= (_TOLERANCE_BF16 if is_flash else _TOLERANCE_FP32):
        raise _refusal(model, "the logits of a document change with the documents before it")


def _document_lengths(row_length: int) -> list[list[int]]:
    """Lengths of the documents in two rows: three documents per row if the row is long enough.

    The first document of the second row is a single token.
    """
    first_lengths = ([row_length // 3, row_length // 4], [1, row_length - row_length // 4])
    return [[length for length in (*lengths, row_length - sum(lengths)) if length > 0] for lengths in first_lengths]


def _relative_difference(model: PreTrainedModel, ids: Tensor, document_lengths: list[list[int]]) -> float:
    """Largest difference between a logit of packed documents and of documents alone, relative to the largest logit."""
    positions = torch.tensor(
        [[i for length in lengths for i in range(length)] for lengths in document_lengths], device=ids.device
    )
    packed = forward_packed(model, ids, positions).logits.float().view(*ids.shape, -1)
    largest = 0.0
    difference = 0.0
    for row, lengths in enumerate(document_lengths):
        begin = 0
        for length in lengths:
            end = begin + length
            alone = forward_packed(model, ids[row : row + 1, begin:end], None).logits.float()[0]
            largest = max(largest, float(alone.abs().max()))
            difference = max(difference, float((packed[row, begin:end] - alone).abs().max()))
            begin = end
    return difference / largest


def _refusal(model: PreTrainedModel, reason: str) -> UserError:
    config = model.config
    attention = public_name(model.config._attn_implementation)
    return UserError(
        f"--document_mask: {config.model_type} with --attn_implementation {attention} does not keep documents apart "
        f"({reason}); leave out --document_mask, or choose another attention or an architecture such as gpt2 or llama"
    )
