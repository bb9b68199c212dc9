"""Check, by running the model, that logits = lm_head(last_hidden_state), without scaling or soft-capping."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm.models.config import context_limit

# Relative to the largest hidden state. Rounding differs by 1e-2 at most (bf16); the hidden states of another module
# differ by about 1.
_TOLERANCE = 5e-2


@torch.no_grad()
def has_linear_lm_head(model: PreTrainedModel) -> bool:
    """Return whether the logits are `lm_head(last_hidden_state)` and nothing else.

    The model runs on a few tokens, on its device, in eval mode; its mode is restored. No number is drawn from the
    random generators that training uses. During the run the output of the lm_head is replaced by large numbers. They
    must be returned as logits unchanged: a soft cap, a scale or a second output layer would change them, even when the
    model's own logits are too small to show it.
    """
    lm_head = model.get_output_embeddings()
    body = model.base_model
    if type(lm_head) is not nn.Linear or body is model:
        return False
    generator = torch.Generator().manual_seed(0)
    embeddings: Any = model.get_input_embeddings()
    vocab_size = lm_head.weight.shape[0]
    num_ids = min(vocab_size, embeddings.weight.shape[0])
    length = min(8, context_limit(model.config))
    device = lm_head.weight.device
    ids = torch.randint(num_ids, (2, length), generator=generator).to(device)
    planted = torch.randint(-999, 1000, (2, length, vocab_size), generator=generator).to(device) / 4
    head_inputs: list[Tensor] = []

    def replace_output(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        head_inputs.append(inputs[0])
        return planted.to(output.dtype)

    was_training = model.training
    model.eval()
    hook = lm_head.register_forward_hook(replace_output)
    try:
        # Do not compile layers that are compiled one by one: this shape occurs only here.
        with torch.compiler.set_stance("force_eager"):
            outputs: Any = model(input_ids=ids, use_cache=False)
            hook.remove()
            hidden: Any = body(input_ids=ids, use_cache=False).last_hidden_state
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    finally:
        hook.remove()
        model.train(was_training)
    return len(head_inputs) == 1 and _has_logits(outputs, planted) and _is_close(hidden, head_inputs[0])


def _has_logits(outputs: Any, planted: Tensor) -> bool:
    """Whether the planted numbers are the logits, and there is no balancing loss."""
    logits = outputs.logits
    if getattr(outputs, "aux_loss", None) is not None or logits.shape != planted.shape:
        return False
    return torch.equal(logits, planted.to(logits.dtype))


def _is_close(hidden: Tensor, head_input: Tensor) -> bool:
    if hidden.shape != head_input.shape:
        return False
    return bool((hidden - head_input).abs().max() <= _TOLERANCE * hidden.abs().max())
