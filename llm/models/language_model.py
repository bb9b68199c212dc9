"""The module that is trained: token ids and targets in, summed loss and number of targets out."""

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

log = logging.getLogger(__name__)

# Names of the functions of transformers that `document_context` replaces.
_FIND_DOCUMENTS = "find_packed_sequence_indices"
_WARN_OF_PADDING = "warn_if_padding_and_no_attention_mask"

_Loss = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


class LanguageModel(nn.Module):
    """A HuggingFace causal language model together with its loss: the module that DDP, FSDP and compile wrap.

    The loss is a sum and is returned with the number of tokens it was summed over, so that micro-batches and ranks of
    different sizes add up to the mean over the tokens of a step. The `labels` argument of HuggingFace models is not
    used: it shifts the targets and divides the loss by the number of tokens of the micro-batch.

    Attributes:
        model: the HuggingFace model; checkpoints, export and sampling use it directly.
        is_compiled: whether `compile` was called.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._training_loss: _Loss = self._loss
        self.is_compiled = False
        # Determined in the first forward pass: by then the model is on its device and autocast is active.
        self._is_chunked: bool | None = None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the forward and backward pass of training; the arguments are those of `torch.compile`.

        The names of the weights do not change. Evaluation is never compiled, because its batches have other shapes.
        """
        self._training_loss = torch.compile(self._loss, *args, **kwargs)
        self.is_compiled = True

    def forward(self, ids: Tensor, targets: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the cross entropy, summed over the targets, and the number of targets.

        In training mode, a mixture of experts whose configuration sets `output_router_logits` adds its load-balancing
        loss, multiplied by the number of targets. In eval mode it does not.

        Args:
            ids: int64 [batch, block], the input tokens; blocks are full, so there is no attention mask.
            targets: int64 [batch, block], the token that follows each input token; `IGNORE_INDEX` where none is
                predicted.
            positions: int64 [batch, block], the position of each token in its document: 0 at the start of every row
                and of every document, and tokens attend to their own document only. None: each row is one text.

        Returns:
            loss_sum: fp32 scalar, in nats; num_tokens: int64 scalar, the number of targets that are not
            `IGNORE_INDEX`. Both are on the device of the model.
        """
        if torch.compiler.is_compiling():  # the caller compiles this module
            return self._loss(ids, targets, positions)
        if self._is_chunked is None:
            self._is_chunked = self._uses_chunked_loss()
        with document_context(positions):
            if self.training:
                if self.is_compiled:
                    # With CUDA graphs: the outputs of the previous call are no longer needed and may be overwritten.
                    torch.compiler.cudagraph_mark_step_begin()
                return self._training_loss(ids, targets, positions)
            with torch.compiler.set_stance("force_eager"):
                return self._loss(ids, targets, positions)

    def _loss(self, ids: Tensor, targets: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        num_tokens = (targets != IGNORE_INDEX).sum()
        if self._is_chunked:
            lm_head: Any = self.model.get_output_embeddings()
            hidden = _forward(self.model.base_model, ids, positions).last_hidden_state
            return chunked_loss(hidden.flatten(0, 1), lm_head.weight, lm_head.bias, targets.flatten()), num_tokens
        outputs = _forward(self.model, ids, positions)
        loss_sum = loss_of_logits(outputs.logits.flatten(0, 1), targets.flatten())
        balancing_loss = getattr(outputs, "aux_loss", None)
        if self.training and isinstance(balancing_loss, torch.Tensor):
            loss_sum = loss_sum + self.model.config.router_aux_loss_coef * balancing_loss * num_tokens
        return loss_sum, num_tokens

    def _uses_chunked_loss(self) -> bool:
        lm_head: Any = self.model.get_output_embeddings()
        if lm_head is None or not chunking_is_faster(lm_head.weight.shape[0]):
            return False
        if has_linear_lm_head(self.model):
            return True
        if self.training:
            log.info(
                "loss: computed from whole logits, which needs more memory: "
                "the logits of %s are not a linear layer of its hidden states",
                self.model.config.model_type,
            )
        return False


def forward_packed(model: nn.Module, ids: Tensor, positions: Tensor | None) -> Any:
    """Return the outputs of a HuggingFace model for rows that pack several documents.

    Not every model keeps the documents apart; `require_document_mask` checks it.

    Args:
        model: the HuggingFace model.
        ids: int64 [batch, block].
        positions: int64 [batch, block], the position of each token in its document; None: each row is one text.

    Returns:
        The outputs of the model. Their logits are [batch, block, vocab], with flash attention and `positions`
        [1, batch * block, vocab], in the dtype of the model or of autocast.
    """
    with document_context(positions):
        return _forward(model, ids, positions)


def _forward(model: nn.Module, ids: Tensor, positions: Tensor | None) -> Any:
    if positions is None:
        return model(input_ids=ids, use_cache=False)
    if uses_flash(model):
        # Flash attention finds the documents by their positions, but only if the batch is one single row.
        ids = ids.reshape(1, -1)
        positions = positions.reshape(1, -1)
    return model(input_ids=ids, position_ids=positions, use_cache=False)


def uses_flash(model: Any) -> bool:
    """Return whether a flash attention library computes the attention; such a library takes no attention mask."""
    return "flash" in (model.config._attn_implementation or "")


@contextmanager
def document_context(positions: Tensor | None) -> Iterator[None]:
    """Tell transformers which tokens of a row form a document, and that no token is padding.

    Without an attention mask, transformers searches the positions for starts of documents and the ids for padding
    tokens. Both searches read a result from the device in every forward pass: the CPU would wait for the device once
    per micro-batch, and a compiled model would build a mask for every block. Inside this context both are replaced.

    Args:
        positions: int64 [batch, block], the position of each token in its document; None: each row is one document.
    """
    find_documents = _single_document if positions is None else _document_indices
    with ExitStack() as stack:
        for owner, name, replacement in (
            (masking_utils, _FIND_DOCUMENTS, find_documents),
            (PreTrainedModel, _WARN_OF_PADDING, _no_padding),
        ):
            if (original := getattr(owner, name, None)) is not None:
                setattr(owner, name, replacement)
                stack.callback(setattr, owner, name, original)
        yield


# Defined once in the module: a new function object in each call would make torch.compile compile the model again.
def _single_document(positions: Tensor) -> None:
    return None


def _document_indices(positions: Tensor) -> Tensor:
    """Index of the document of each token, counted from 1 in each row, int64 [batch, block]."""
    return (positions == 0).cumsum(-1)


def _no_padding(model: PreTrainedModel, input_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    return
