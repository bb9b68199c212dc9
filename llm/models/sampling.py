"""Text that a model writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm.models.config import context_limit
from llm.tokenization.vocabulary import is_character_level


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | None,
    *,
    num_samples: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Texts that continue a prompt, the prompt included, each up to its end-of-text token.

    A text longer than the model's context goes on from its last half whenever the context is full;
    the keys and values of what stays in it are computed once. The model's mode and the random
    state of the process are left as they were.

    Args:
        model: a causal language model, on any device.
        tokenizer: its tokenizer.
        prompt: what is continued; None or "" starts a new text: a line break for a character
            tokenizer, else the begin or end-of-text token, else id 0.
        num_samples: texts drawn.
        max_new_tokens: tokens drawn for each.
        temperature: divides the logits; 0 takes the likeliest token always.
        top_k: only the k likeliest tokens are drawn; None or 0 for all.
        seed: the same seed, model and arguments give the same texts.
        should_stop: asked after each token; the texts then end where they are.
    """
    start = _start(tokenizer, prompt).to(model.device)
    ids = start.repeat(num_samples, 1)
    window = context_limit(model.config)
    with _evaluating(model), _own_randomness(model.device, seed):
        end, eos = ids.shape[1] + max_new_tokens, tokenizer.eos_token_id
        while ids.shape[1] < end and not (should_stop() or _all_ended(ids[:, start.shape[1] :], eos)):
            room = min(end - ids.shape[1], max(1, window // 2))
            context = ids if ids.shape[1] < window else ids[:, -max(1, window - room) :]
            num_new = min(end - ids.shape[1], window - context.shape[1])
            drawn = model.generate(  # type: ignore[operator]
                context,
                attention_mask=torch.ones_like(context),
                generation_config=_settings(tokenizer, num_new, temperature, top_k),
                stopping_criteria=[lambda ids, *_, **__: torch.full((len(ids),), should_stop(), device=ids.device)],
            )
            ids = torch.cat([ids, drawn[:, context.shape[1] :]], dim=1)
    return [_text(tokenizer, prompt or "", start[0], row[start.shape[1] :]) for row in ids]


def _start(tokenizer: PreTrainedTokenizerBase, prompt: str | None) -> Tensor:
    """int64 [1, length]: the ids that are continued."""
    ids: list[int] = tokenizer(prompt)["input_ids"] if prompt else []
    if not ids and is_character_level(tokenizer):
        # A single text holds no end-of-text token, so that a character model has never seen it.
        ids = [tokenizer.get_vocab()["\n"]]
    if not ids:
        known = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
        ids = [next(i for i in known if i is not None)]
    return torch.tensor([ids], dtype=torch.int64)


def _settings(
    tokenizer: PreTrainedTokenizerBase, num_new: int, temperature: float, top_k: int | None
) -> GenerationConfig:
    """All that decides what is drawn, so that nothing is taken from the model's own settings."""
    eos = tokenizer.eos_token_id
    pad = next(i for i in (tokenizer.pad_token_id, eos, 0) if i is not None)
    drawing: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        drawing = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": 1.0}
    settings: Any = GenerationConfig
    made: GenerationConfig = settings(
        max_new_tokens=num_new, eos_token_id=eos, pad_token_id=pad, use_cache=True, **drawing
    )
    return made


def _all_ended(new: Tensor, eos: int | None) -> bool:
    return eos is not None and bool((new == eos).any(dim=1).all())


def _text(tokenizer: PreTrainedTokenizerBase, prompt: str, start: Tensor, new: Tensor) -> str:
    """The prompt as it was given, and what follows it up to the first end-of-text token."""
    ids = new.tolist()
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    # Decoded with the prompt before it: some tokenizers drop the space before a text's first word.
    before: Any = tokenizer.decode(start.tolist(), **options)
    whole: Any = tokenizer.decode(start.tolist() + ids, **options)
    return prompt + str(whole[len(before) :])


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.train(False)
    try:
        # Layers that are compiled for training would be compiled again for every length of a text.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(training)


@contextmanager
def _own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers of this seed inside; after it the state of before, on CPU and device."""
    mps = torch.mps.get_rng_state() if device.type == "mps" else None
    forked = device.type in ("cuda", "xpu")
    with torch.random.fork_rng([device] if forked else [], device_type=device.type if forked else "cuda"):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            if mps is not None:
                torch.mps.set_rng_state(mps)
