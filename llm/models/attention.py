"""Causal attention over full blocks, by the kernel that is fastest; everything else as transformers does it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llm.system.precision import multiplies_bf16

# Never written to a file: a configuration keeps its attention to itself.
NAME = "llm_causal"

# Queries that are computed at once where no kernel of torch does all of it: each part sees the keys up to its end,
# so that of long blocks half the products are left out.
_ROWS = 256
# Positions up to which the weights of a block are kept for its backward pass; of longer ones they are computed again,
# a third more work, or 4 x 1,024 tokens of GPT-2 124M would keep 0.7 GiB of them.
_KEPT = 512

# Of the processor; a compiler could not follow the question.
_HAS_BF16 = multiplies_bf16(torch.device("cpu"))


def use_causal_attention(model: PreTrainedModel) -> bool:
    """Lets a model that would take torch's SDPA compute the attention of full blocks by `causal_attention`.

    Models that compute it themselves, or were told how to, are left as they are. Generation with a cache, masks
    and windows go on as before; `model.set_attn_implementation("sdpa")` takes it back.

    Returns:
        Whether the model takes it.
    """
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return False
    AttentionInterface.register(NAME, causal_attention)
    AttentionMaskInterface.register(NAME, causal_mask)
    model.set_attn_implementation(NAME)
    return True


def public_name(implementation: str | None) -> str:
    """The `--attn_implementation` that computes the same."""
    return "sdpa" if implementation in (NAME, None) else str(implementation)


def causal_mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    **more: Any,
) -> Tensor | None:
    """None for a full block that is one text, which needs no mask; else what SDPA gets, bool [batch, 1, q, kv].

    transformers builds one for every block while torch.compile looks on.
    """
    sees_all = local_size is None or kv_length < local_size
    if allow_is_causal_skip and attention_mask is None and q_length == kv_length and sees_all:
        return None
    mask: Tensor | None = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        local_size=local_size,
        **more,
    )
    return mask


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the layer.
        query: [batch, heads, q, width].
        key: [batch, heads or a part of them, kv, width].
        value: as `key`.
        attention_mask: what `causal_mask` gave.
        dropout: rate; 0 outside training.
        scaling: of the products; 1 / sqrt(width) when None.
        is_causal: as the layer says when None.
        more: what some architectures add.

    Returns:
        [batch, q, heads, width], and no weights.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_plain = attention_mask is None and causal and query.shape[2] == key.shape[2]
    if is_plain and _is_faster_by_rows(query, dropout) and not _EXTRAS & {k for k, v in more.items() if v is not None}:
        groups = query.shape[1] // key.shape[1]
        inputs = query, repeat_kv(key, groups), repeat_kv(value, groups), dropout, scaling
        if dropout > 0 or query.shape[2] <= _KEPT:
            return by_rows(*inputs), None
        return checkpoint(by_rows, *inputs, use_reentrant=False, preserve_rng_state=False), None
    output: Tensor = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **more
    )[0]
    return output, None


# What changes the scores, or where keys come from.
_EXTRAS = {"position_bias", "softcap", "cache", "s_aux"}


def _is_faster_by_rows(query: Tensor, dropout: float) -> bool:
    """Whether `by_rows` beats torch's SDPA.

    On a CPU in fp32 it does not without dropout up to 256 tokens (6 x 384: 80 against 76 ms), and of longer blocks it
    would keep the weights for what it wins (118 against 146 ms at 512; computed again, 148). With dropout SDPA has no
    fused kernel there (116 against 129 ms at 256, 293 against 465 at 1,024; benchmarks/results/attention.json). In
    bf16 SDPA is slower at every length where that is native (105 against 36 ms at 256, 164 against 84 at 1,024, or 111
    with the weights computed again; attention_bf16.json, with avx512_bf16: AMX was not measured), and faster where it
    is emulated (79 against 195 ms of 512 tokens at 256).
    CUDA was not measured: SDPA chooses among kernels of its own where there is no mask (FlashAttention 2, cuDNN's), and
    another one is a matter of `--attn_implementation`.
    """
    if query.device.type != "cpu":
        return False
    return dropout > 0 or (query.dtype == torch.bfloat16 and _HAS_BF16)


def by_rows(query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
    """Causal attention by plain products and a softmax; shapes as in `causal_attention`, equal heads.

    The scores are rounded to the inputs' dtype, as in transformers' eager attention, and so are the weights; between
    them the softmax computes in float32.
    """
    batch, heads, length, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    queries, keys, values = (t.reshape(batch * heads, length, -1) for t in (query, key, value))
    parts = []
    for begin in range(0, length, _ROWS):
        end = min(begin + _ROWS, length)
        future = torch.full((end - begin, end), float("-inf"), dtype=query.dtype, device=query.device).triu(begin + 1)
        scores = torch.baddbmm(future, queries[:, begin:end], keys[:, :end].transpose(1, 2), alpha=scale)
        weights = F.dropout(scores.softmax(-1), dropout)
        parts.append(torch.bmm(weights, values[:, :end]))
    output = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    # Some models take a view of it, as torch's own kernels allow.
    return output.view(batch, heads, length, -1).transpose(1, 2).contiguous()
