"""The one module that is trained: ids and targets in, a summed loss out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils

from llm.models.lm_head import has_linear_lm_head
from llm.models.loss import chunked_loss, chunking_is_faster, loss_of_logits
from llm.tokenization import IGNORE_INDEX

__all__ = ["LanguageModel", "forward_apart", "uses_flash"]

log = logging.getLogger(__name__)

_SEARCH = "find_packed_sequence_indices"
_WARNING = "warn_if_padding_and_no_attention_mask"

_Loss = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


class LanguageModel(nn.Module):
    """A HuggingFace causal language model with its loss, as DDP, FSDP and compile wrap it.

    The loss is a sum and comes with the number of tokens it was summed over, so that micro-batches
    and ranks of any sizes add up to the mean over the tokens of an update. HF's own `labels` are not
    used: they shift the targets and divide by the micro-batch's count.

    Attributes:
        model: the HF model; checkpoints, export and sampling use it directly.
        is_compiled: whether `compile` was called.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._trained: _Loss = self._loss
        self.is_compiled = False
        # Found out where the model trains, in its arithmetic.
        self._is_chunked: bool | None = None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the training's forward and backward pass, as `torch.compile` with these arguments.

        No weight gets another name. An evaluation, whose batches have other shapes, is never compiled.
        """
        self._trained = torch.compile(self._loss, *args, **kwargs)
        self.is_compiled = True

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
        if torch.compiler.is_compiling():  # by someone else
            return self._loss(ids, targets, positions)
        if self._is_chunked is None:
            self._is_chunked = self._may_be_chunked()
        with document_context(positions):
            if self.training:
                if self.is_compiled:
                    # If they are CUDA graphs: nobody reads the outputs of the one before any more.
                    torch.compiler.cudagraph_mark_step_begin()
                return self._trained(ids, targets, positions)
            with torch.compiler.set_stance("force_eager"):
                return self._loss(ids, targets, positions)

    def _loss(self, ids: Tensor, targets: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        num_tokens = (targets != IGNORE_INDEX).sum()
        if self._is_chunked:
            head: Any = self.model.get_output_embeddings()
            states = _forward(self.model.base_model, ids, positions).last_hidden_state
            return chunked_loss(states.flatten(0, 1), head.weight, head.bias, targets.flatten()), num_tokens
        outputs = _forward(self.model, ids, positions)
        loss_sum = loss_of_logits(outputs.logits.flatten(0, 1), targets.flatten())
        balance = getattr(outputs, "aux_loss", None)
        if self.training and isinstance(balance, torch.Tensor):
            loss_sum = loss_sum + self.model.config.router_aux_loss_coef * balance * num_tokens
        return loss_sum, num_tokens

    def _may_be_chunked(self) -> bool:
        head: Any = self.model.get_output_embeddings()
        if head is None or not chunking_is_faster(head.weight.shape[0]):
            return False
        if has_linear_lm_head(self.model):
            return True
        if self.training:
            log.info("loss: %s does more than a linear head; its logits are kept whole", self.model.config.model_type)
        return False


def forward_apart(model: nn.Module, ids: Tensor, positions: Tensor | None) -> Any:
    """What a model says of rows whose documents it keeps apart; `LanguageModel.forward` has the shapes.

    Not every model can: `require_document_mask` tries it. The logits of a flash model are one single row.
    """
    with document_context(positions):
        return _forward(model, ids, positions)


def _forward(model: nn.Module, ids: Tensor, positions: Tensor | None) -> Any:
    if positions is not None and uses_flash(model):
        # It finds documents by their positions, but in one single row only.
        ids, positions = ids.reshape(1, -1), positions.reshape(1, -1)
    words = {"input_ids": ids} if positions is None else {"input_ids": ids, "position_ids": positions}
    return model(**words, use_cache=False)


def uses_flash(model: Any) -> bool:
    """Whether attention is computed by a flash attention library, which takes no masks."""
    return "flash" in (model.config._attn_implementation or "")


@contextmanager
def document_context(positions: Tensor | None) -> Iterator[None]:
    """Tells transformers which tokens of a row belong together (all, without positions), and that none is padding.

    Without an attention mask it looks for rows whose positions start anew, and for the padding token at the rows' ends,
    and reads from the device in every forward pass whether there are any: the processor would wait once a micro-batch,
    and a compiled model would build a mask for each block.
    """
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (masking_utils, _SEARCH, _one_text if positions is None else _by_starts),
            (PreTrainedModel, _WARNING, _no_padding),
        ):
            if (before := getattr(owner, name, None)) is not None:
                setattr(owner, name, stand_in)
                stack.callback(setattr, owner, name, before)
        yield


# Functions of the module, not made for each call: a compiled model is compiled anew where it meets another one.
def _one_text(positions: Tensor) -> None:
    return None


def _by_starts(positions: Tensor) -> Tensor:
    return (positions == 0).cumsum(-1)


def _no_padding(model: PreTrainedModel, input_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    return
