"""Sampling: reproducible, longer than the context, and without side effects."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from llm.models.sampling import sample
from llm.tokenization.load import character_tokenizer


def _sample(model, tokenizer, prompt: str | None = "the king", **changes: object) -> list[str]:
    options = {"num_samples": 2, "max_new_tokens": 12, "seed": 5} | changes
    return sample(model, tokenizer, prompt, **options)


def test_sample_when_seed_is_the_same_then_texts_are_equal(tiny_gpt2, byte_tokenizer) -> None:
    first = _sample(tiny_gpt2, byte_tokenizer)
    torch.rand(3)
    assert first == _sample(tiny_gpt2, byte_tokenizer)
    assert first != _sample(tiny_gpt2, byte_tokenizer, seed=6)
    assert first[0] != first[1]
    assert all(text.startswith("the king") for text in first)


def test_sample_when_done_then_mode_and_random_state_are_restored(tiny_gpt2: PreTrainedModel, byte_tokenizer) -> None:
    tiny_gpt2.train()
    state = torch.get_rng_state()
    _sample(tiny_gpt2, byte_tokenizer)
    assert tiny_gpt2.training
    assert torch.equal(state, torch.get_rng_state())


def test_sample_when_temperature_is_zero_then_takes_the_likeliest_token(
    tiny_gpt2: PreTrainedModel, byte_tokenizer
) -> None:
    first, second = _sample(tiny_gpt2, byte_tokenizer, temperature=0)
    assert first == second == _sample(tiny_gpt2, byte_tokenizer, top_k=1, seed=9)[0]
    ids = byte_tokenizer("the king", return_tensors="pt")["input_ids"]
    tiny_gpt2.eval()
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, tiny_gpt2(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert first == byte_tokenizer.decode(ids[0], clean_up_tokenization_spaces=False)


def _always_predict(model: PreTrainedModel, token: int) -> None:
    """Make the model predict one token, regardless of the context."""
    model.lm_head = torch.nn.Linear(32, 257).requires_grad_(False)
    model.lm_head.weight.zero_()
    model.lm_head.bias.zero_()[token] = 50.0


@pytest.mark.parametrize("length", [10, 63, 64, 65, 200])
def test_sample_when_longer_than_the_context_then_continues(
    length: int, tiny_gpt2: PreTrainedModel, byte_tokenizer
) -> None:
    _always_predict(tiny_gpt2, 64)
    lengths = []
    generate = tiny_gpt2.generate

    def recording_generate(ids, **settings):
        output_ids = generate(ids, **settings)
        lengths.append((ids.shape[1], output_ids.shape[1]))
        return output_ids

    tiny_gpt2.generate = recording_generate
    prompt = "x" * length
    (text,) = _sample(tiny_gpt2, byte_tokenizer, prompt, num_samples=1, max_new_tokens=150)
    assert text.startswith(prompt)
    assert all(0 < before < after <= 64 for before, after in lengths)
    assert sum(after - before for before, after in lengths) == 150


def test_sample_when_end_of_text_is_drawn_then_text_ends(tiny_gpt2: PreTrainedModel, byte_tokenizer) -> None:
    _always_predict(tiny_gpt2, 256)
    assert _sample(tiny_gpt2, byte_tokenizer) == ["the king", "the king"]


def test_sample_when_prompt_is_none_then_starts_a_new_text(tiny_gpt2, byte_tokenizer) -> None:
    texts = _sample(tiny_gpt2, byte_tokenizer, None)
    assert len(texts) == 2
    assert "<|endoftext|>" not in "".join(texts)


def test_sample_when_tokenizer_has_characters_and_prompt_is_none_then_starts_after_a_line_break() -> None:
    tokenizer = character_tokenizer(set("abc\n"))
    config = GPT2Config(vocab_size=5, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    config.bos_token_id = config.eos_token_id = 0
    model = GPT2LMHeadModel(config)
    contexts = []
    generate = model.generate
    model.generate = lambda ids, **settings: contexts.append(ids) or generate(ids, **settings)
    sample(model, tokenizer, None, num_samples=1, max_new_tokens=3, seed=0)
    assert contexts[0].tolist() == [[tokenizer.get_vocab()["\n"]]]


def test_sample_when_model_has_a_generation_config_then_ignores_it(tiny_gpt2: PreTrainedModel, byte_tokenizer) -> None:
    expected = _sample(tiny_gpt2, byte_tokenizer)
    settings = tiny_gpt2.generation_config
    settings.top_k = 1
    settings.repetition_penalty = 3.0
    settings.temperature = 0.1
    settings.do_sample = True
    assert expected == _sample(tiny_gpt2, byte_tokenizer)


def test_sample_when_stopped_then_ends_after_the_token(tiny_gpt2: PreTrainedModel, byte_tokenizer) -> None:
    tiny_gpt2.train()
    answers = iter([False] * 4)
    full_texts = _sample(tiny_gpt2, byte_tokenizer, max_new_tokens=40)
    short_texts = _sample(tiny_gpt2, byte_tokenizer, max_new_tokens=40, should_stop=lambda: next(answers, True))
    assert all(full.startswith(short) for full, short in zip(full_texts, short_texts, strict=True))
    assert len("the king") < len(short_texts[0]) < len(full_texts[0])
    assert tiny_gpt2.training
