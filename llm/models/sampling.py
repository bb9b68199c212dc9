"""Sample text from a model."""

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
    broadcast: Callable[[Tensor], Tensor] | None = None,
) -> list[str]:
    """Return texts that continue a prompt; each contains the prompt and ends at its end-of-text token.

    When a text fills the model's context, sampling continues with the last half of the context. The keys and values
    of the tokens in the context are cached. The mode of the model (train or eval) and the random state of the process
    are restored.

    Args:
        model: a causal language model, on any device.
        tokenizer: the tokenizer of the model.
        prompt: the text to continue; None or "" starts a new text, with a line break for a character tokenizer, else
            with the begin-of-text or end-of-text token, else with id 0.
        num_samples: number of texts.
        max_new_tokens: largest number of tokens that are added to each text.
        temperature: divides the logits; with 0 the likeliest token is always taken.
        top_k: only the k likeliest tokens can be drawn; None or 0: all tokens.
        seed: the same seed, model and arguments give the same texts.
        should_stop: called after each token; when it returns True, the texts end there.
        broadcast: with several ranks, overwrites a tensor of any shape and dtype with that of rank 0; all ranks then
            call this function together, and draw the same tokens in the same number of forward passes.
    """
    start = _start_ids(tokenizer, prompt).to(model.device)
    start_length = start.shape[1]
    ids = start.repeat(num_samples, 1)
    window = context_limit(model.config)
    end = start_length + max_new_tokens
    agreement = _Agreement(should_stop, broadcast)
    with _eval_mode(model), _forked_randomness(model.device, seed):
        while ids.shape[1] < end and not (
            agreement.should_stop(ids) or _all_ended(ids[:, start_length:], tokenizer.eos_token_id)
        ):
            room = min(end - ids.shape[1], max(1, window // 2))
            context = ids if ids.shape[1] < window else ids[:, -max(1, window - room) :]
            num_new = min(end - ids.shape[1], window - context.shape[1])
            output_ids = model.generate(  # type: ignore[operator]
                context,
                attention_mask=torch.ones_like(context),
                generation_config=_generation_config(tokenizer, num_new, temperature, top_k),
                logits_processor=[agreement.share_logits],
                stopping_criteria=[agreement.stop_rows],
            )
            ids = torch.cat([ids, output_ids[:, context.shape[1] :]], dim=1)
    return [_decode(tokenizer, prompt or "", start[0], row[start_length:]) for row in ids]


class _Agreement:
    """Values of rank 0 that all ranks of one sampling use: the logits, and whether to stop."""

    def __init__(self, should_stop: Callable[[], bool], broadcast: Callable[[Tensor], Tensor] | None) -> None:
        self._should_stop = should_stop
        self._broadcast = broadcast

    def should_stop(self, ids: Tensor) -> bool:
        """Whether rank 0 was asked to stop; `ids` (any shape) is on the device."""
        if self._broadcast is None:
            return self._should_stop()
        return bool(self._broadcast(torch.tensor(float(self._should_stop()), device=ids.device)))

    def stop_rows(self, ids: Tensor, *_: object, **__: object) -> Tensor:
        """Whether each row ends: bool [rows] for ids of [rows, length]."""
        return torch.full((len(ids),), self.should_stop(ids), device=ids.device)

    def share_logits(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Return rank 0's logits, float [rows, vocabulary]: rounding may differ between machines."""
        return logits if self._broadcast is None else self._broadcast(logits.contiguous())


def _start_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | None) -> Tensor:
    """Ids of the prompt, or of the start of a new text, int64 [1, length]."""
    ids: list[int] = tokenizer(prompt)["input_ids"] if prompt else []
    if not ids and is_character_level(tokenizer):
        # A character model was trained on a single text, without an end-of-text token.
        ids = [tokenizer.get_vocab()["\n"]]
    if not ids:
        candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
        ids = [next(token_id for token_id in candidates if token_id is not None)]
    return torch.tensor([ids], dtype=torch.int64)


def _generation_config(
    tokenizer: PreTrainedTokenizerBase, num_new: int, temperature: float, top_k: int | None
) -> GenerationConfig:
    """A complete configuration, so that nothing is taken from the generation configuration of the model."""
    eos_id = tokenizer.eos_token_id
    pad_id = next(token_id for token_id in (tokenizer.pad_token_id, eos_id, 0) if token_id is not None)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": 1.0}
    untyped: Any = GenerationConfig
    config: GenerationConfig = untyped(
        max_new_tokens=num_new, eos_token_id=eos_id, pad_token_id=pad_id, use_cache=True, **sampling
    )
    return config


def _all_ended(new_ids: Tensor, eos_id: int | None) -> bool:
    """Whether every row of int64 [rows, length] contains the end-of-text token."""
    return eos_id is not None and bool((new_ids == eos_id).any(dim=1).all())


def _decode(tokenizer: PreTrainedTokenizerBase, prompt: str, start: Tensor, new_ids: Tensor) -> str:
    """The prompt, unchanged, and the text of `new_ids`, int64 [length], up to the first end-of-text token."""
    ids = new_ids.tolist()
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    # Decode together with the start, because some tokenizers drop the space before the first word of a text.
    start_text: Any = tokenizer.decode(start.tolist(), **options)
    full_text: Any = tokenizer.decode(start.tolist() + ids, **options)
    return prompt + str(full_text[len(start_text) :])


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.train(False)
    try:
        # Layers that are compiled for training would be compiled again for every length of the text.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(training)


@contextmanager
def _forked_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Seed the random generators of the CPU and the device; restore their states on exit."""
    mps_state = torch.mps.get_rng_state() if device.type == "mps" else None
    can_fork = device.type in ("cuda", "xpu")
    with torch.random.fork_rng([device] if can_fork else [], device_type=device.type if can_fork else "cuda"):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            if mps_state is not None:
                torch.mps.set_rng_state(mps_state)
