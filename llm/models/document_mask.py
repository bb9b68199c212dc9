"""Whether a model keeps the documents of a row apart: tried, since no configuration says it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm.config.errors import UserError, first_line
from llm.models.attention import public_name
from llm.models.config import context_limit
from llm.models.language_model import forward_apart, uses_flash

# Of a row, or all that a model can read.
_ROW = 16
# Beside the largest logit: rounding makes 2e-6 and 1e-2 of it, other documents that show through 2e-3 to 1.
_TOLERANCE = 1e-4
_TOLERANCE_OF_BF16 = 5e-2


@torch.no_grad()
def require_document_mask(model: PreTrainedModel, device: torch.device) -> None:
    """Compares a few short documents packed into rows with the same documents alone.

    No random number is drawn from the generators that training uses. Flash attention computes on its device
    and in bfloat16 only: there the model is moved to `device` first.

    Args:
        model: where it was built, in float32.
        device: where it will train.

    Raises:
        UserError: the logits differ, or the model takes no positions.
    """
    uses_half = uses_flash(model)
    if uses_half:
        torch.nn.Module.to(model, device)
    table: Any = model.get_input_embeddings()
    vocabulary = int(table.weight.shape[0])
    rows = _lengths(min(_ROW, context_limit(model.config)))
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (len(rows), sum(rows[0])), generator=draw).to(model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16) if uses_half else nullcontext():
            difference = _difference(model, ids, rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refusal(model, first_line(error)) from error
    finally:
        model.train(was_training)
    if not difference <= (_TOLERANCE_OF_BF16 if uses_half else _TOLERANCE):
        raise _refusal(model, "a document's logits change with what stands in front of it")


def _lengths(row: int) -> list[list[int]]:
    """Documents of two rows, three in each if they are long enough; of the second row the first is a single token."""
    rows = ([row // 3, row // 4], [1, row - row // 4])
    return [[length for length in (*some, row - sum(some)) if length > 0] for some in rows]


def _difference(model: PreTrainedModel, ids: Tensor, rows: list[list[int]]) -> float:
    """The largest difference of a logit, packed or alone, beside the largest logit."""
    positions = torch.tensor([[i for length in row for i in range(length)] for row in rows], device=ids.device)
    packed = forward_apart(model, ids, positions).logits.float().view(*ids.shape, -1)
    largest, difference = 0.0, 0.0
    for row, lengths in enumerate(rows):
        begin = 0
        for length in lengths:
            end = begin + length
            alone = forward_apart(model, ids[row : row + 1, begin:end], None).logits.float()[0]
            largest = max(largest, float(alone.abs().max()))
            difference = max(difference, float((packed[row, begin:end] - alone).abs().max()))
            begin = end
    return difference / largest


def _refusal(model: PreTrainedModel, reason: str) -> UserError:
    config, attention = model.config, public_name(model.config._attn_implementation)
    return UserError(
        f"--document_mask: {config.model_type} with --attn_implementation {attention} does not keep "
        f"documents apart ({reason}); leave it out, or choose another attention or architecture, such as gpt2 or llama"
    )
