"""Causal attention over full blocks by the fastest kernel; all other cases are left to transformers."""

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

# Name in the registries of transformers. It is never written to a file: a saved configuration has no attention name.
NAME = "llm_causal"

# Number of queries per chunk where torch has no fused kernel. A chunk computes products with the keys up to its end
# only, which saves half of the products of a long block.
QUERIES_PER_CHUNK = 256
# Longest block whose attention weights are kept for the backward pass. For longer blocks they are recomputed, which
# costs a third more work: kept, the weights of 4 x 1,024 tokens would take 0.7 GiB in GPT-2 124M.
MAX_STORED_LENGTH = 512

# Whether the CPU multiplies bf16 natively. Determined at import, because torch.compile cannot trace the check.
_HAS_NATIVE_BF16 = multiplies_bf16(torch.device("cpu"))

# Keyword arguments that change the scores, or where the keys come from.
_UNSUPPORTED_ARGUMENTS = ("position_bias", "softcap", "cache", "s_aux")


def use_causal_attention(model: PreTrainedModel) -> bool:
    """Replace the SDPA attention of a model by `causal_attention`, in place.

    A model that implements its own attention, or whose attention was chosen, is not changed. Generation with a cache,
    masks and sliding windows work as before. `model.set_attn_implementation("sdpa")` undoes the replacement.

    Returns:
        Whether the model now uses `causal_attention`.
    """
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return False
    AttentionInterface.register(NAME, causal_attention)
    AttentionMaskInterface.register(NAME, causal_mask)
    model.set_attn_implementation(NAME)
    return True


def public_name(implementation: str | None) -> str:
    """Return the value of `--attn_implementation` that computes the same as this implementation of transformers."""
    return "sdpa" if implementation in (NAME, None) else str(implementation)


def causal_mask(
    *,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return None for a full block that is one text, else the mask of SDPA: bool [batch, 1, q, kv].

    A full block that is one text needs no mask, but transformers builds one when the model is compiled. The parameters
    are those of `transformers.masking_utils.sdpa_mask`, which gets all of them.

    Args:
        q_length: number of queries.
        kv_length: number of keys.
        attention_mask: bool [batch, kv], False for padding; None without padding.
        allow_is_causal_skip: whether None may be returned.
        local_size: size of the sliding window; None without one.
        kwargs: further arguments of `sdpa_mask`.
    """
    sees_all_keys = local_size is None or kv_length < local_size
    if allow_is_causal_skip and attention_mask is None and q_length == kv_length and sees_all_keys:
        return None
    mask: Tensor | None = sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        local_size=local_size,
        **kwargs,
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
    *,
    max_stored_length: int = MAX_STORED_LENGTH,
    has_native_bf16: bool = _HAS_NATIVE_BF16,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention; the signature is that of the attention functions of transformers.

    Query, key, value and output have one floating dtype.

    Args:
        module: the attention layer.
        query: [batch, heads, q, width].
        key: [batch, kv_heads, kv, width]; heads is a multiple of kv_heads.
        value: [batch, kv_heads, kv, width].
        attention_mask: result of `causal_mask`, bool [batch, 1, q, kv] or None.
        dropout: dropout rate of the attention weights; 0 outside training.
        scaling: factor of the scores; None: 1 / sqrt(width).
        is_causal: None: the attribute `is_causal` of the layer decides.
        max_stored_length: longest block whose attention weights are kept for the backward pass.
        has_native_bf16: whether the CPU multiplies bf16 natively.
        kwargs: further arguments that some architectures pass.

    Returns:
        Output [batch, q, heads, width], and None in place of the attention weights.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_full_block = attention_mask is None and causal and query.shape[2] == key.shape[2]
    is_supported = not any(kwargs.get(name) is not None for name in _UNSUPPORTED_ARGUMENTS)
    if is_full_block and is_supported and _chunking_is_faster(query, dropout, has_native_bf16):
        num_groups = query.shape[1] // key.shape[1]
        key = repeat_kv(key, num_groups)
        value = repeat_kv(value, num_groups)
        if dropout > 0 or query.shape[2] <= max_stored_length:
            return query_chunked_attention(query, key, value, dropout, scaling), None
        recomputed: Tensor = checkpoint(
            query_chunked_attention,
            query,
            key,
            value,
            dropout,
            scaling,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        return recomputed, None
    output: Tensor = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )[0]
    return output, None


def _chunking_is_faster(query: Tensor, dropout: float, has_native_bf16: bool) -> bool:
    """Whether `query_chunked_attention` is faster than torch's SDPA.

    Measured on a CPU with a 6 x 384 model; the numbers are ms with SDPA against ms in chunks.

    fp32 without dropout: SDPA. Blocks of 256 tokens: 76 against 80. Blocks of 512: chunks gain (146 against 118) only
        if the attention weights are kept in memory; recomputed, they take 148.
    fp32 with dropout: chunks, because SDPA has no fused kernel there. Blocks of 256: 129 against 116; of 1,024: 465
        against 293 (benchmarks/results/attention.json).
    bf16, native: chunks at every length. Blocks of 256: 105 against 36; of 1,024: 164 against 84, or 111 with the
        weights recomputed (attention_bf16.json; measured with avx512_bf16, not with AMX).
    bf16, emulated: SDPA. 512 tokens in blocks of 256: 79 against 195.
    CUDA: not measured. Without a mask SDPA chooses among its own kernels (FlashAttention 2, cuDNN); another one can be
        chosen with `--attn_implementation`.
    """
    if query.device.type != "cpu":
        return False
    return dropout > 0 or (query.dtype == torch.bfloat16 and has_native_bf16)


def query_chunked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    queries_per_chunk: int = QUERIES_PER_CHUNK,
) -> Tensor:
    """Compute causal attention with matrix products and a softmax, for a chunk of queries at a time.

    Scores and attention weights are rounded to the dtype of the inputs, as in the eager attention of transformers;
    the softmax between them computes in float32.

    Args:
        query: [batch, heads, length, width], any floating dtype.
        key: as `query`.
        value: [batch, heads, length, value_width].
        dropout: dropout rate of the attention weights.
        scaling: factor of the scores; None: 1 / sqrt(width).
        queries_per_chunk: number of queries whose scores are in memory at once.

    Returns:
        Output [batch, length, heads, value_width], contiguous, in the dtype of `query`.
    """
    batch, heads, length, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    queries, keys, values = (t.reshape(batch * heads, length, -1) for t in (query, key, value))
    chunks = []
    for begin in range(0, length, queries_per_chunk):
        end = min(begin + queries_per_chunk, length)
        future = torch.full((end - begin, end), float("-inf"), dtype=query.dtype, device=query.device).triu(begin + 1)
        scores = torch.baddbmm(future, queries[:, begin:end], keys[:, :end].transpose(1, 2), alpha=scale)
        weights = F.dropout(scores.softmax(-1), dropout)
        chunks.append(torch.bmm(weights, values[:, :end]))
    output = chunks[0] if len(chunks) == 1 else torch.cat(chunks, 1)
    # Some models take a view of the output, which the contiguous output of torch's own kernels allows.
    return output.view(batch, heads, length, -1).transpose(1, 2).contiguous()
