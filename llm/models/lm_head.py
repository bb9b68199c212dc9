"""Whether a model's logits are a linear layer of its body's last states and nothing more: tried, not assumed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm.models.config import context_limit

# Beside the largest state: rounding makes 1e-2 of it at most (bf16), another body's states are as large as itself.
_TOLERANCE = 5e-2


@torch.no_grad()
def has_linear_lm_head(model: PreTrainedModel) -> bool:
    """Compares the two on a few tokens, where the model is; no random number of the training is drawn.

    The head's output is replaced by large numbers on the way: they must come out as they are, which a soft cap, a
    scale or a second head would change, also where the model's own logits are still too small to tell.
    """
    head, body = model.get_output_embeddings(), model.base_model
    if type(head) is not nn.Linear or body is model:
        return False
    draw = torch.Generator().manual_seed(0)
    table: Any = model.get_input_embeddings()
    known = min(head.weight.shape[0], table.weight.shape[0])
    length = min(8, context_limit(model.config))
    ids = torch.randint(known, (2, length), generator=draw).to(head.weight.device)
    planted = torch.randint(-999, 1000, (2, length, head.weight.shape[0]), generator=draw).to(head.weight.device) / 4
    entered: list[Tensor] = []

    def replace(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        entered.append(inputs[0])
        return planted.to(output.dtype)

    was_training = model.training
    model.eval()
    hook = head.register_forward_hook(replace)
    try:
        # Layers that are compiled each alone are not compiled for this shape.
        with torch.compiler.set_stance("force_eager"):
            whole: Any = model(input_ids=ids, use_cache=False)
            hook.remove()
            states: Any = body(input_ids=ids, use_cache=False).last_hidden_state
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    finally:
        hook.remove()
        model.train(was_training)
    return len(entered) == 1 and _is_untouched(whole, planted) and _is_same(states, entered[0])


def _is_untouched(outputs: Any, planted: Tensor) -> bool:
    logits = outputs.logits
    if getattr(outputs, "aux_loss", None) is not None or logits.shape != planted.shape:
        return False
    return torch.equal(logits, planted.to(logits.dtype))


def _is_same(states: Tensor, entered: Tensor) -> bool:
    if states.shape != entered.shape:
        return False
    return bool((states - entered).abs().max() <= _TOLERANCE * states.abs().max())
