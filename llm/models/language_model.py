"""The one module that is trained: ids and targets in, a summed loss out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, masking_utils

IGNORED = -100

_SEARCH = "find_packed_sequence_indices"


class LanguageModel(nn.Module):
    """A HuggingFace causal language model with its loss, as DDP, FSDP and compile wrap it.

    The loss is a sum and comes with the number of tokens it was summed over, so that micro-batches
    and ranks of any sizes add up to the mean over the tokens of an update. HF's own `labels` are
    not
    used: they shift the targets and divide by the micro-batch's count.

    Attributes:
        model: the HF model; checkpoints, export and sampling use it directly.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cross entropy of the targets, summed.

        A mixture of experts whose configuration sets `output_router_logits` adds its balancing
        loss, scaled to the tokens, while it trains; evaluation never sees it.

        Args:
            ids: int64 [batch, block], the inputs; blocks are full, so that there is no attention
                mask.
            targets: int64 [batch, block], the token after each input; -100 where there is none.
            positions: int64 [batch, block], counted from 0 at the beginning of a row and of every
                document in it, between which there is no attention then; None where a row is one text.

        Returns:
            The loss in nats, float32 scalar, and the number of targets that count, int64 scalar.
        """
        outputs = forward_apart(self.model, ids, positions)
        # In float32 also under autocast: bf16 keeps three digits, too few for a sum over a
        # vocabulary.
        logits = outputs.logits.float().flatten(0, 1)
        loss_sum = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
        num_tokens = (targets != IGNORED).sum()
        balance = getattr(outputs, "aux_loss", None)
        if self.training and isinstance(balance, torch.Tensor):
            loss_sum = loss_sum + self.model.config.router_aux_loss_coef * balance * num_tokens
        return loss_sum, num_tokens


def forward_apart(model: PreTrainedModel, ids: Tensor, positions: Tensor | None) -> Any:
    """What a model says of rows whose documents it keeps apart; `LanguageModel.forward` has the shapes.

    Not every model can: `require_document_mask` tries it. The logits of a flash model are one single row.
    """
    if positions is not None and uses_flash(model):
        # It finds documents by their positions, but in one single row only.
        ids, positions = ids.reshape(1, -1), positions.reshape(1, -1)
    words = {"input_ids": ids} if positions is None else {"input_ids": ids, "position_ids": positions}
    with nullcontext() if torch.compiler.is_compiling() else _told_apart(positions):
        return model(**words, use_cache=False)


def uses_flash(model: PreTrainedModel) -> bool:
    """Whether attention is computed by a flash attention library, which takes no masks."""
    return "flash" in (model.config._attn_implementation or "")


@contextmanager
def _told_apart(positions: Tensor | None) -> Iterator[None]:
    """Tells transformers which tokens of a row belong together: None for all of them.

    Without an attention mask it looks for rows whose positions start anew, and reads from the device
    in every forward pass whether there are any: the processor would wait once a micro-batch.
    """
    search = getattr(masking_utils, _SEARCH, None)
    if search is None:
        yield
        return
    setattr(masking_utils, _SEARCH, lambda _: None if positions is None else (positions == 0).cumsum(-1))
    try:
        yield
    finally:
        setattr(masking_utils, _SEARCH, search)
